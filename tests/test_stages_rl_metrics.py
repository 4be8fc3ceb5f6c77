"""What the RL stage reports when it was interrupted, or asked for more steps."""

from __future__ import annotations

from pathlib import Path

from ledger_entries import draw, end

from posttrain.cards import policy_card
from posttrain.ledger import Ledger
from posttrain.online.metrics import LoopSummary, TeacherTotals
from posttrain.stages.rl import _metrics
from posttrain.types import DrawOutcome, PolicyVersion


def summary(version: PolicyVersion, num_steps: int) -> LoopSummary:
    """Of an attempt that trained little itself."""
    return LoopSummary(
        version=version,
        num_steps=num_steps,
        seconds=2.0,
        draws={DrawOutcome.TRAINED: num_steps},
        draws_by_reason={},
        trained_by_domain={"maths": num_steps},
        trained_tokens=7,
        generated_tokens=9,
        max_lag=1,
        learning_seconds=1.5,
        teacher=TeacherTotals(waited_seconds=0.5, late_groups=2),
    )


def test_steps_and_draws_are_those_of_all_attempts(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        first = ledger.open_attempt("rl", 0)
        for number in range(3):
            draw(ledger, f"1-{number}", first, at=number)
            end(ledger, f"1-{number}", number + 1)
        ledger.commit_step(2)
        second = ledger.open_attempt("rl", 2)  # the third step never happened
        draw(ledger, "2-3", second, at=2)
        end(ledger, "2-3", 3, DrawOutcome.ZERO_ADVANTAGE, reason="all_correct")
        draw(ledger, "2-4", second, at=2)
        end(ledger, "2-4", 3)
        ledger.commit_step(3)
        third = ledger.open_attempt("rl", 3)  # nothing was left to do
        metrics = _metrics(summary(PolicyVersion(third, 3), 0), ledger)
    assert metrics == {
        "steps": 3,
        "draws": {"trained": 3, "zero_advantage": 1},
        "draws_by_reason": {"all_correct": 1},
        "trained_by_domain": {"maths": 3},
        "last_attempt": {
            "steps": 0,
            "trained_tokens": 7,
            "generated_tokens": 9,
            "max_lag": 1,
            "loop_seconds": 2.0,
            "learning_seconds": 1.5,
            "teacher": {"waited_seconds": 0.5, "late_groups": 2},
        },
    }


def test_a_card_says_what_is_of_the_last_attempt(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        attempt = ledger.open_attempt("rl", 0)
        metrics = _metrics(summary(PolicyVersion(attempt, 200), 100), ledger)
    settings = {
        "run": {"seed": 0},
        "policy": {"model": "starter"},
        "tasks": {"train": [], "held_out": []},
        "rl": {},
    }
    card = policy_card({"settings": settings, "inputs": {}, "versions": {}}, {"rl": metrics}, "rl")
    (line,) = [line for line in card.splitlines() if line.startswith("1. ")]
    assert line.startswith("1. asynchronous online RL: steps 200, ")
    assert ", last attempt (steps 100, trained tokens 7, " in line
