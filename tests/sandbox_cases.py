"""A hostile program, how it is to end, and the look around afterwards."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

from sandbox_helpers import processes_in

from posttrain.data.prompts import make_prompt
from posttrain.types import Outcome
from rewards import code
from rewards.sandbox import Sandbox
from rewards.sandbox_client import Program
from rewards.score import Score

EXPECTED = "4213-what-no-program-can-know"


class Case(NamedTuple):
    program: str
    outcome: Outcome
    explanation: str = ""
    answer_s: float = 60.0


def check(sandbox: Sandbox, case: Case, reference: dict[str, Any]) -> None:
    """Scores the case, then looks whether anything has changed."""
    mounts, before = Path("/proc/self/mounts").read_text(), processes_in(sandbox)
    score = score_program(sandbox, case.program, reference, case.answer_s)
    assert (score.outcome, score.correctness) == (
        case.outcome,
        float(case.outcome is Outcome.CORRECT),
    )
    assert case.explanation in score.explanation
    assert processes_in(sandbox) == before
    assert Path("/proc/self/mounts").read_text() == mounts
    after = sandbox.run(Program(source="import os; print(os.listdir())"))
    assert (after.failure, after.stdout) == (None, b"[]\n")
    assert processes_in(sandbox) == before  # and it is the same zygote


def score_program(
    sandbox: Sandbox, program: str, reference: dict[str, Any], answer_s: float = 60.0
) -> Score:
    prompt = make_prompt("?", reference=reference, domain="programs")
    code.check_reference(prompt)
    text = f"```python\n{dedent(program)}\n```"
    return code.score_with(sandbox.run, prompt, text, code.CodeSettings(answer_s=answer_s))
