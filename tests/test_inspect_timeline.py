"""The life of one prompt: what happened, in order, with its answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from inspect_runs import decide, verdict, write_known_run

from posttrain.inspect.timeline import timeline
from posttrain.ledger import Ledger
from posttrain.run_dir import RunDir
from posttrain.types import Action, Label


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return write_known_run(tmp_path / "run")


def told(run: RunDir, prompt_id: str, *, texts: bool = False) -> list[str]:
    """Without dates, which begin the lines of events."""
    lines = timeline(run, prompt_id, texts=texts)
    return [line.split(" ", 2)[2] if line[0].isdigit() else line for line in lines]


def test_judged_drawn_answered_trained_and_drawn_again_after_a_crash(run: RunDir) -> None:
    assert told(run, "s2") == [
        "prompt s2, words",
        "judged medium by critic with critic c0: 2 of 8 right (fixed n)",
        "rl: drawn as d1-2 at step 1 of attempt 1 (void: attempt 2 resumed from before it)",
        "rl: d1-2 ended trained at step 2 of attempt 1, 4 of 4 right"
        " (void: attempt 2 resumed from before it)",
        "    answered by version 1.1: correct correct correct correct",
        "    trained with advantages +0.000 +0.000 +0.000 +0.000, lag 0",
        "rl: drawn as d2-0 at step 1 of attempt 2",
        "rl: d2-0 ended trained at step 3 of attempt 2, 1 of 4 right",
        "    answered by versions 2.1 to 2.2: correct wrong wrong wrong",
        "    trained with advantages +0.750 -0.250 -0.250 -0.250, lag 1",
    ]


def test_texts_on_request(run: RunDir) -> None:
    lines = told(run, "s1", texts=True)
    assert lines[:3] == ["prompt s1, words", "    user: What is s1?", '    reference: "S1"']
    assert lines[-5:] == [
        "    answered by version 1.0: wrong wrong wrong wrong",
        *["      wrong, reward 0.000: '0'"] * 4,
    ]
    trained = told(run, "a2", texts=True)
    assert "      correct, reward 1.000, advantage +0.250: '1'" in trained
    assert "      wrong, reward 0.000, advantage -0.750: '0'" in trained


def test_re_screened_dropped_and_re_tested(run: RunDir) -> None:
    with Ledger(run.ledger_path) as ledger:
        for step, correct, action in ((5, 16, Action.DROP), (9, 8, Action.KEEP)):
            label = Label.EASY if action is Action.DROP else Label.MEDIUM
            judged = verdict("a1", correct, 16, label, critic=f"rl:2.{step}")
            reason = f"{label} at step {step}"
            ledger.record_decisions("rl", [decide(judged, action, "re-screening", reason)])
    assert told(run, "a1")[1:] == [
        "judged easy by critic with critic c0: 8 of 8 right (fixed n)",
        "sft: drop by drop_easiest: the easiest",
        "rl: re-screened easy with version 2.2: 16 of 16 right (fixed n)",
        "rl: drop by re-screening: easy at step 2; it leaves the pool",
        "rl: re-screened easy with version 2.5: 16 of 16 right (fixed n)",
        "rl: drop by re-screening: easy at step 5; it stays out of the pool",
        "rl: re-screened medium with version 2.9: 8 of 16 right (fixed n)",
        "rl: keep by re-screening: medium at step 9; it is back in the pool",
    ]


def test_what_was_decided_beyond_a_checkpoint_moves_nothing(run: RunDir) -> None:
    with Ledger(run.ledger_path) as ledger:
        ledger.open_attempt("rl", 1)
        judged = verdict("a1", 8, 16, Label.MEDIUM, critic="rl:3.4")
        kept = decide(judged, Action.KEEP, "re-screening", "medium at step 4")
        ledger.record_decisions("rl", [kept])
    void = "(void: attempt 3 resumed from before it)"
    assert told(run, "a1")[3:] == [
        f"rl: re-screened easy with version 2.2: 16 of 16 right (fixed n) {void}",
        f"rl: drop by re-screening: easy at step 2 {void}",
        "rl: re-screened medium with version 3.4: 8 of 16 right (fixed n)",
        "rl: keep by re-screening: medium at step 4",  # it had never left
    ]


def test_an_unknown_prompt_has_no_life(run: RunDir) -> None:
    assert timeline(run, "nobody", texts=False) == []
