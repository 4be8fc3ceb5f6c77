"""How many answers a second each verifier scores, on one core, in this process.

    python tests/benchmarks/verifiers.py [maths reasoning_gym exact expression]

Every answer is scored once, so that no cache knows it; imports and the check of the gold answers
are not counted. Rates are per second of processor time, which a busy machine does not change much;
the pool (`rewards.pool`) adds one message each way per group.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from posttrain.data.prompts import make_prompt
from posttrain.errors import DataError
from posttrain.starter.tasks import starter_sft_rows
from posttrain.types import Prompt
from rewards.verifiers import REFERENCE_CHECKS, VERIFIERS

Item = tuple[Prompt, str]


def maths() -> list[Item]:
    """The judged pairs of tests/maths_pairs.txt."""
    lines = (Path(__file__).parent.parent / "maths_pairs.txt").read_text("utf-8").splitlines()
    rows = [line.split(" | ", 3) for line in lines if line and not line.startswith("#")]
    return [
        (make_prompt("?", reference=gold, domain="maths"), text.replace("↵", "\n"))
        for _, _, gold, text in rows
    ]


def reasoning_gym() -> list[Item]:
    """Of every family five tasks, each with its own answer and a wrong one."""
    import reasoning_gym as library
    from reasoning_gym.factory import DATASETS

    items = []
    for family in sorted(set(DATASETS) - {"composite"}):
        for entry in library.create_dataset(family, size=5, seed=1):
            reference = {"family": family, "entry": json.loads(json.dumps(entry))}
            prompt = make_prompt("?", reference=reference, domain="logic")
            items += [(prompt, f"<answer>{answer}</answer>") for answer in (entry["answer"], "17")]
    return items


def exact() -> list[Item]:
    """Numbers, right and wrong in turns."""
    return [
        (make_prompt("?", reference=str(number), domain="sums"), f"1+1=2#{number + number % 2}")
        for number in range(10_000)
    ]


def expression() -> list[Item]:
    """The starter's own supervised answers to its expression tasks."""
    rows = starter_sft_rows(20_000, seed=0)
    return [(r.prompt, r.completion) for r in rows if r.prompt.metadata["verifier"] == "expression"]


MIXES: dict[str, Callable[[], list[Item]]] = {
    "maths": maths,
    "reasoning_gym": reasoning_gym,
    "exact": exact,
    "expression": expression,
}


def main() -> None:
    print(
        f"{'verifier':15} {'items':>6} {'items/s':>9} {'median':>9} {'99 %':>9} {'slowest':>9}  ms"
    )
    for name in sys.argv[1:] or MIXES:
        items = MIXES[name]()
        items = [(prompt, text) for prompt, text in items if _is_usable(name, prompt)]
        seconds = [_seconds(name, prompt, text) for prompt, text in items]
        median, late, slowest = 1000 * np.quantile(seconds, [0.5, 0.99, 1])
        print(
            f"{name:15} {len(items):6} {len(items) / sum(seconds):9.0f} "
            f"{median:9.3f} {late:9.3f} {slowest:9.3f}"
        )


def _is_usable(name: str, prompt: Prompt) -> bool:
    try:
        REFERENCE_CHECKS[name](prompt)
    except DataError as error:
        print(f"left out: {error}", file=sys.stderr)
        return False
    return True


def _seconds(name: str, prompt: Prompt, text: str) -> float:
    began = time.process_time()
    VERIFIERS[name](prompt, text)
    return time.process_time() - began


if __name__ == "__main__":
    main()
