"""Short ways to write entries into a ledger, for the tests of ledger and audit."""

from posttrain.types import DrawOutcome, Label, Outcome, Verdict

NONE_DRAWN = {str(outcome): 0 for outcome in DrawOutcome} | {"in_flight": 0}


def draw(ledger, draw_id, attempt, at, prompt_id="p", system=None):
    ledger.open_draw(
        draw_id=draw_id,
        prompt_id=prompt_id,
        domain="maths",
        system=system,
        attempt=attempt,
        drawn_at_step=at,
    )


def end(ledger, draw_id, step, outcome=DrawOutcome.TRAINED, reason=""):
    ledger.close_draw(draw_id, outcome, step=step, num_scored=8, num_correct=3, reason=reason)


def verdict(prompt_id="p", critic="c0", correct=3, label=Label.MEDIUM):
    return Verdict(
        prompt_id=prompt_id,
        judge="checkpoint",
        critic=critic,
        num_samples=8,
        num_correct=correct,
        outcomes={Outcome.CORRECT: correct, Outcome.WRONG: 8 - correct, Outcome.INFRASTRUCTURE: 1},
        posterior=(correct + 0.5, 8.5 - correct),
        label=label,
        decided_by="interval",
        sampling={"temperature": 1.0, "max_tokens": 64, "system": None},
    )
