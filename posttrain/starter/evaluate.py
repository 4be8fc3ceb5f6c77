"""Measures the starter policy: `python -m posttrain.starter.evaluate [MODEL]`.

Plain Hugging Face generation, so that the figures depend on no engine.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.data.prompts import Split
from posttrain.starter import POLICY_DIR
from posttrain.starter.tasks import starter_prompts
from posttrain.types import Outcome, Prompt, SystemInstruction
from rewards.shaping import RewardSettings
from rewards.verifiers import verifier_of

MAX_TOKENS = 96
BATCH_SIZE = 512
"""Completions generated together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What the policy wrote to one prompt: samples at temperature 1 and one greedy answer."""

    prompt: Prompt
    samples: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    greedy: Outcome

    @property
    def pass_rate(self) -> float:
        return sum(o is Outcome.CORRECT for o in self.outcomes) / len(self.outcomes)


def chat_messages(prompt: Prompt, instruction: SystemInstruction | None) -> list[dict[str, str]]:
    system = [] if instruction is None else [{"role": "system", "content": instruction.text}]
    return system + [message.as_dict() for message in prompt.messages]


def generate(
    model: Any, tokenizer: Any, chats: Sequence[list[dict[str, str]]], num_samples: int
) -> list[list[str]]:
    """`num_samples` completions of each chat at temperature 1; 0 asks for one greedy answer."""
    import torch

    copies = max(1, num_samples)
    how: dict[str, Any] = {"do_sample": False, "temperature": None}
    if num_samples > 0:
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    texts: list[list[str]] = []
    for start in range(0, len(chats), BATCH_SIZE // copies):
        part = list(chats[start : start + BATCH_SIZE // copies])
        inputs = tokenizer.apply_chat_template(
            part, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            ids = model.generate(
                **inputs,
                **how,
                num_return_sequences=copies,
                max_new_tokens=MAX_TOKENS,
            )
        written = tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        texts += [written[i : i + copies] for i in range(0, len(written), copies)]
    return texts


def answer_all(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    instruction: SystemInstruction | None,
    num_samples: int,
) -> list[Answers]:
    chats = [chat_messages(prompt, instruction) for prompt in prompts]
    sampled = generate(model, tokenizer, chats, num_samples)
    greedy = generate(model, tokenizer, chats, 0)
    return [
        Answers(
            prompt=prompt,
            samples=tuple(texts),
            outcomes=tuple(_outcome(prompt, text) for text in texts),
            greedy=_outcome(prompt, best),
        )
        for prompt, texts, (best,) in zip(prompts, sampled, greedy, strict=True)
    ]


def _outcome(prompt: Prompt, text: str) -> Outcome:
    return verifier_of(prompt, RewardSettings())(prompt, text).outcome


def row(name: str, answers: Sequence[Answers]) -> str:
    """One line of the table, in Markdown."""
    pairs = [
        (text, outcome)
        for a in answers
        for text, outcome in zip(a.samples, a.outcomes, strict=True)
    ]
    stepwise = [outcome for text, outcome in pairs if not text.startswith("#")]
    direct = [outcome for text, outcome in pairs if text.startswith("#")]
    cells = [
        _share(_right(outcome) for _, outcome in pairs),
        _share(a.pass_rate > 0 for a in answers),
        _share(_right(a.greedy) for a in answers),
        _share(not text.startswith("#") for text, _ in pairs),
        _share(_right(outcome) for outcome in stepwise),
        _share(_right(outcome) for outcome in direct),
        _share(0 < a.pass_rate < 0.9 for a in answers),
        _share(outcome is Outcome.UNPARSABLE for _, outcome in pairs),
    ]
    return f"| {name} | {len(answers)} | " + " | ".join(cells) + " |"


def _right(outcome: Outcome) -> bool:
    return outcome is Outcome.CORRECT


def _share(hits: Iterable[bool]) -> str:
    values = list(hits)
    return f"{sum(values) / len(values):.3f}" if values else "–"


def table(answers: Sequence[Answers]) -> str:
    """pass@1, pass@8 and what they rest on, per domain, family, level and (family, level)."""
    keys: tuple[Callable[[Prompt], str], ...] = (
        lambda p: p.domain,
        lambda p: f"level {p.metadata['level']}",
        lambda p: f"{p.metadata['family']} {p.metadata['level']}",
    )
    lines = [
        f"| | prompts | pass@1 | pass@{len(answers[0].samples)} | greedy | stepwise "
        "| right if stepwise | right if direct | 0<p<.9 | unparsable |",
        "|---|---|---|---|---|---|---|---|---|---|",
        row("all", answers),
    ]
    for key in keys:
        for value in sorted({key(a.prompt) for a in answers}):
            lines.append(row(value, [a for a in answers if key(a.prompt) == value]))
    return "\n".join(lines)


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain.starter.instructions import SYSTEM_INSTRUCTIONS

    parser = argparse.ArgumentParser(description="Measures the starter policy.")
    parser.add_argument("model", type=Path, nargs="?", default=POLICY_DIR)
    parser.add_argument("--split", choices=("train", "held_out"), default="held_out")
    parser.add_argument("--size", type=int, default=500)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    split: Split = arguments.split
    prompts = starter_prompts(split, arguments.size, arguments.seed)
    print(table(answer_all(model, tokenizer, prompts, None, arguments.samples)))
    for instruction in SYSTEM_INSTRUCTIONS:
        answers = answer_all(model, tokenizer, prompts, instruction, 1)
        followed = [follows(instruction, a.samples[0]) for a in answers]
        right = [a.pass_rate == 1 for a in answers]
        print(f"{instruction.name}: followed {_share(followed)}, right {_share(right)}")


def follows(instruction: SystemInstruction, text: str) -> bool:
    assert instruction.pattern is not None
    return re.fullmatch(instruction.pattern, text) is not None


if __name__ == "__main__":
    main()
