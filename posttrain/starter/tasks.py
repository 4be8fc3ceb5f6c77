"""The starter policy's tasks as prompts and supervised rows.

The policy's own training text leaves out what may be held out (`posttrain.data.prompts.split_of`).
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from posttrain.data.prompts import Split, content_hash, make_prompt, split_of
from posttrain.starter.families import FAMILIES, LEVELS, Family, Task
from posttrain.starter.instructions import BRACKETS, BRIEF, STEPS, SYSTEM_INSTRUCTIONS
from posttrain.types import Message, Prompt, SFTRow

__all__ = ["SYSTEM_INSTRUCTIONS", "completion", "starter_prompts", "starter_sft_rows"]

MAX_REPEATS = 200
"""A (family, level) that yields this many known prompts in a row counts as used up."""

STEPWISE_SHARE = 0.25
PLAIN_SHARE = 0.5
"""Share of supervised rows without a system instruction; the rest is split evenly."""

TWO_ROW_SHARE = 0.1


def in_training_split(question: str) -> bool:
    return split_of(content_hash((Message(role="user", content=question),))) == "train"


def completion(task: Task, *, stepwise: bool, brackets: bool = False) -> str:
    """The text of a right answer: `#51`, `2+9+0=11,1+3+1=5#51`, `#[51]`, …"""
    answer = f"[{task.answer}]" if brackets else task.answer
    return f"{task.steps if stepwise else ''}#{answer}"


def starter_prompts(split: Split, size: int, seed: int) -> list[Prompt]:
    """`size` different prompts of a split, balanced over domains and over levels within a domain.

    A trivial level has few problems; once it is used up, the others fill its place.
    """
    return [prompt for prompt, _ in _draw(split, size, seed)]


def starter_sft_rows(size: int, seed: int) -> list[SFTRow]:
    """`size` supervised rows on training prompts, mixed like the policy's own training text.

    One prompt in ten has two rows, a direct and a stepwise one.
    """
    rng = Random(f"sft {seed}")
    rows: list[SFTRow] = []
    for prompt, task in _draw("train", size, seed):
        if len(rows) >= size:
            break
        system = draw_instruction(rng)
        stepwise = is_stepwise(rng, system)
        kinds = [(system, stepwise)]
        if rng.random() < TWO_ROW_SHARE:
            kinds = [(None, stepwise), (None, not stepwise)]
        for row_system, row_stepwise in kinds[: size - len(rows)]:
            text = completion(task, stepwise=row_stepwise, brackets=row_system == BRACKETS.name)
            row_id = f"starter-{seed}-{len(rows):06d}"
            rows.append(SFTRow(row_id=row_id, prompt=prompt, completion=text, system=row_system))
    return rows


def draw_instruction(rng: Random) -> str | None:
    """Name of a system instruction, or None for a row without one."""
    return None if rng.random() < PLAIN_SHARE else rng.choice(SYSTEM_INSTRUCTIONS).name


def is_stepwise(rng: Random, system: str | None, share: float = STEPWISE_SHARE) -> bool:
    """Whether a right answer under `system` shows its steps; `share` where it leaves that open."""
    if system == BRIEF.name:
        return False
    return system == STEPS.name or rng.random() < share


def _draw(split: Split, size: int, seed: int) -> Iterator[tuple[Prompt, Task]]:
    """Different prompts of one split with their tasks, one of each (domain, level) a round."""
    rng = Random(f"{split} {seed}")
    cells: dict[tuple[str, int], list[Family]] = {}
    for family in FAMILIES:
        for level in LEVELS:
            cells.setdefault((family.domain, level), []).append(family)
    seen: set[str] = set()
    while True:
        for (domain, level), families in rng.sample(sorted(cells.items(), key=_key), len(cells)):
            if len(seen) == size:
                return
            family = rng.choice(families)
            drawn = _new_prompt(rng, family, level, split, seen)
            if drawn is not None:
                seen.add(drawn[0].prompt_id)
                yield drawn
            elif len(families) > 1:
                families.remove(family)
            else:
                del cells[domain, level]
        if not cells:
            raise ValueError(f"only {len(seen)} {split} prompts exist, {size} were asked for")


def _key(item: tuple[tuple[str, int], list[Family]]) -> tuple[str, int]:
    return item[0]


def _new_prompt(
    rng: Random, family: Family, level: int, split: Split, seen: set[str]
) -> tuple[Prompt, Task] | None:
    """A prompt of the split that is not in `seen`, or None where the level is used up."""
    for _ in range(MAX_REPEATS):
        task = family.make(rng, level)
        prompt = make_prompt(
            task.question,
            reference=task.reference,
            domain=family.domain,
            metadata={"family": family.name, "level": level, "verifier": task.verifier},
        )
        if prompt.prompt_id not in seen and split_of(prompt.prompt_id) == split:
            return prompt, task
    return None
