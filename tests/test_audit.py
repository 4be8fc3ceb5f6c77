import sqlite3
import time

import pytest
from ledger_entries import draw, end, verdict

from posttrain.audit import audit, prompt_history
from posttrain.ledger import Ledger
from posttrain.types import Action, Decision, DrawOutcome


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger(path) as ledger:
        yield ledger


class TestHistory:
    def test_tells_what_happened_in_order(self, path, ledger):
        judged = verdict()
        ledger.record_verdicts([judged, verdict("other")])
        decision = Decision(
            prompt_id="p", action=Action.KEEP, rule="band", reason="0.38 in band", verdict=judged
        )
        ledger.record_decisions("screen", [decision])
        first = ledger.open_attempt("rl", 0)
        draw(ledger, "1-0", first, at=0, system="brief")
        end(ledger, "1-0", 1)
        second = ledger.open_attempt("rl", 0)
        draw(ledger, "1-0", second, at=0, prompt_id="other")
        draw(ledger, "2-1", second, at=0)
        end(ledger, "1-0", 1)
        end(ledger, "2-1", None, DrawOutcome.ERRORED, reason="engine died")
        ledger.flush()
        events = prompt_history(path, "p")
        lines = [event.describe().split(" ", 2)[2] for event in events]
        void = "(void: attempt 2 resumed from before it)"
        assert lines == [
            "judged medium by checkpoint with critic c0: 3 of 8 right (interval)",
            "screen: keep by band: 0.38 in band",
            f"rl: drawn as 1-0 at step 0 of attempt 1 with system instruction brief {void}",
            f"rl: 1-0 ended trained at step 1 of attempt 1, 3 of 8 right {void}",
            "rl: drawn as 2-1 at step 0 of attempt 2",
            "rl: 2-1 ended errored of attempt 2, 3 of 8 right: engine died",
        ]
        assert all(abs(event.at - time.time()) < 60 for event in events)
        assert len(prompt_history(path, "other")) == 3
        assert prompt_history(path, "unknown") == []

    def test_a_re_screening_that_no_checkpoint_holds_is_void_with_its_decision(self, path, ledger):
        def judge(critic, correct):
            judged = verdict(critic=critic, correct=correct)
            decision = Decision(
                prompt_id="p", action=Action.KEEP, rule="r", reason="", verdict=judged
            )
            ledger.record_decisions("rl", [decision])

        def void():
            ledger.flush()
            return [(type(e).__name__, e.void_by) for e in prompt_history(path, "p")]

        def both(*void_by):
            return [(kind, by) for by in void_by for kind in ("Judged", "Decided")]

        first = ledger.open_attempt("rl", 0)
        draw(ledger, "1-0", first, at=0, prompt_id="other")
        judge("rl:1.1", 1)
        judge("rl:1.2", 2)  # in lock-step, before anything is drawn at step 2
        draw(ledger, "1-1", first, at=2, prompt_id="other")
        judge("rl:1.1", 4)  # beside training, of a slice that took long
        judge("rl:1.3", 5)
        second = ledger.open_attempt("rl", 2)
        draw(ledger, "2-0", second, at=2, prompt_id="other")
        judge("rl:2.2", 6)
        judge("c0", 7)
        ledger.open_attempt("other", 0)
        assert void() == both(None, None, 2, 2, None, None)
        ledger.open_attempt("rl", 0)  # begun again
        assert void() == both(4, 4, 2, 2, 4, None)


class TestAudit:
    """Each rule is broken by hand, behind the ledger's back."""

    @pytest.fixture
    def broken(self, path):
        with Ledger(path) as ledger:
            first = ledger.open_attempt("rl", 0)
            draw(ledger, "a", first, at=0)
            draw(ledger, "b", first, at=2)
            end(ledger, "a", 3)
            ledger.commit_step(2)
            ledger.open_attempt("rl", 2)
        assert audit(path).ok

        def apply(sql):
            connection = sqlite3.connect(path)
            with connection:
                connection.executescript(sql)
            connection.close()
            report = audit(path)
            assert not report.ok
            assert "VIOLATION" in report.describe()
            return {(v.rule, v.draw_id) for v in report.violations}

        return apply

    def outcome(self, draw_id, attempt, step=2, outcome="stale"):
        return (
            "INSERT INTO outcomes (draw_id, attempt, outcome, as_of_step, num_scored, num_correct,"
            f" reason, at) VALUES ('{draw_id}', {attempt}, '{outcome}', {step}, 0, 0, '', 0);"
        )

    def opening(self, draw_id, attempt, prompt_id="p", step=2):
        return (
            "INSERT INTO draws (draw_id, attempt, prompt_id, domain, drawn_at_step, at)"
            f" VALUES ('{draw_id}', {attempt}, '{prompt_id}', 'maths', {step}, 0);"
        )

    def test_two_ends(self, broken):
        revive = "UPDATE outcomes SET void_by = NULL, as_of_step = 2;"
        rules = broken(revive + self.outcome("a", 2))
        assert rules == {("a draw ends once", "a"), ("every draw is in one state", None)}

    def test_an_end_of_nothing(self, broken):
        rules = broken(self.outcome("ghost", 2))
        assert rules == {("what ends was drawn", "ghost"), ("every draw is in one state", None)}

    def test_drawn_again_after_it_ended(self, broken):
        revive = "UPDATE outcomes SET void_by = NULL, as_of_step = 2;"
        assert ("what has ended is not drawn again", "a") in broken(revive + self.opening("a", 2))

    def test_another_prompt_under_the_old_id(self, broken):
        assert broken(self.opening("a", 2, prompt_id="q")) == {("a draw keeps its prompt", "a")}

    def test_ended_before_it_was_drawn(self, broken):
        rules = broken(self.opening("c", 2, step=9) + self.outcome("c", 2, step=3))
        assert rules == {("a draw ends after it was drawn", "c")}

    def test_an_unknown_outcome(self, broken):
        rules = broken(self.opening("c", 2) + self.outcome("c", 2, 3, "vanished"))
        assert rules == {("an outcome is one of the known", "c")}

    def test_a_draw_voided_for_no_reason(self, broken):
        rules = broken("UPDATE draws SET void_by = 2")
        assert rules == {("a draw is void exactly when a later attempt started before it", "a")}

    def test_a_draw_that_should_be_void(self, broken):
        rules = broken("UPDATE draws SET void_by = NULL")
        assert rules == {("a draw is void exactly when a later attempt started before it", "b")}

    def test_an_outcome_that_should_be_void(self, broken):
        rules = broken("UPDATE outcomes SET void_by = NULL")
        assert rules == {("an outcome beyond the start of a later attempt is void", "a")}
