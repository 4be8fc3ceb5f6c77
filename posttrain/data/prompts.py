"""Making prompts: content hashes, and the checks that a task set passes at load."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from posttrain.errors import DataError
from posttrain.types import Message, Prompt

Split = Literal["train", "held_out"]

HELD_OUT_EVERY = 8


def content_hash(messages: Sequence[Message]) -> str:
    """Hex digest (16 characters) of what the policy is shown, system messages included."""
    canonical = json.dumps([m.as_dict() for m in messages], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def column_reference(value: Any) -> Any:
    """An answer as verifiers want it: a whole number in a table's column is a text of digits, for a
    column's type is nobody's choice."""
    return str(value) if isinstance(value, int) else value


def make_prompt(
    question: str,
    *,
    reference: Any,
    domain: str,
    metadata: Mapping[str, Any] | None = None,
) -> Prompt:
    """A single-turn prompt from a question."""
    messages = (Message(role="user", content=question),)
    return Prompt(
        prompt_id=content_hash(messages),
        messages=messages,
        reference=reference,
        domain=domain,
        metadata=metadata or {},
    )


def each_once(prompts: Iterable[Prompt]) -> list[Prompt]:
    """In order; of prompts that ask the same, the first."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        found.setdefault(prompt.prompt_id, prompt)
    return list(found.values())


def spread_over_domains(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` of the prompts (all, if there are no more), in their order: of each domain its first
    ones, as many as its share. Sources lie one behind the other, so that the first of all would be
    of one domain."""
    sizes = Counter(prompt.domain for prompt in prompts)
    met: Counter[str] = Counter()
    places = []
    for index, prompt in enumerate(prompts):
        places.append(((met[prompt.domain] + 0.5) / sizes[prompt.domain], index))
        met[prompt.domain] += 1
    return [prompts[index] for index in sorted(index for _, index in sorted(places)[:count])]


def split_of(prompt_id: str) -> Split:
    """Of a task that is made, not read: held out exactly when its content hash falls into one
    residue class, so that the splits cannot overlap, whatever sizes and seeds they are made with.
    """
    return "held_out" if int(prompt_id, 16) % HELD_OUT_EVERY == 0 else "train"


def check_disjoint(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """Raises DataError if a held-out prompt is also trained on; names the first offenders."""
    seen = {prompt.prompt_id for prompt in train}
    shared = [p for p in held_out if p.prompt_id in seen]
    if shared:
        examples = ", ".join(repr(p.messages[-1].content) for p in shared[:3])
        raise DataError(
            f"tasks.held_out: {len(shared)} of its prompts are also in tasks.train, sft.data or "
            f"dpo.data, e.g. {examples}. Remove them from one side: accuracy on what was trained "
            "on says nothing."
        )
