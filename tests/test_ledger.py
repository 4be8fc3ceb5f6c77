import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.audit import Decided, Drawn, Ended, Judged, audit, prompt_history
from posttrain.errors import RunDirError, StageError
from posttrain.ledger import Ledger, LedgerReader, OpenDraw
from posttrain.types import Action, Decision, DrawOutcome, Label, Outcome, Verdict

ROOT = Path(__file__).parent.parent
NONE_DRAWN = {str(outcome): 0 for outcome in DrawOutcome} | {"in_flight": 0}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger(path) as ledger:
        yield ledger


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


def ids(draws):
    return [d.draw_id for d in draws]


class TestDraws:
    def test_are_counted_by_how_they_ended(self, ledger):
        attempt = ledger.open_attempt("rl", 0)
        assert attempt == 1
        assert ledger.draw_counts() == NONE_DRAWN
        for i, outcome in enumerate([*DrawOutcome, DrawOutcome.TRAINED]):
            draw(ledger, f"1-{i}", attempt, at=0)
            end(ledger, f"1-{i}", 1, outcome)
        draw(ledger, "1-7", attempt, at=1)
        expected = {str(outcome): 1 for outcome in DrawOutcome} | {"trained": 2, "in_flight": 1}
        assert ledger.draw_counts() == expected

    def test_in_flight_ones_are_listed_in_order(self, ledger):
        attempt = ledger.open_attempt("rl", 0)
        draw(ledger, "b", attempt, at=0, prompt_id="p1", system="brief")
        draw(ledger, "a", attempt, at=1, prompt_id="p2")
        draw(ledger, "c", attempt, at=1)
        end(ledger, "c", 2)
        assert ledger.open_draws() == [
            OpenDraw(
                draw_id="b",
                prompt_id="p1",
                domain="maths",
                system="brief",
                attempt=1,
                drawn_at_step=0,
            ),
            OpenDraw(
                draw_id="a",
                prompt_id="p2",
                domain="maths",
                system=None,
                attempt=1,
                drawn_at_step=1,
            ),
        ]

    def test_end_once(self, ledger):
        attempt = ledger.open_attempt("rl", 0)
        draw(ledger, "1-0", attempt, at=0)
        end(ledger, "1-0", 1)
        with pytest.raises(ValueError, match="1-0 cannot end as stale: it has ended as trained"):
            end(ledger, "1-0", 1, DrawOutcome.STALE)
        with pytest.raises(ValueError, match="1-1 cannot end as trained: it was never opened"):
            end(ledger, "1-1", 1)
        assert ledger.draw_counts() == NONE_DRAWN | {"trained": 1}

    def test_are_opened_once_in_the_current_attempt(self, ledger):
        attempt = ledger.open_attempt("rl", 0)
        draw(ledger, "1-0", attempt, at=0)
        with pytest.raises(ValueError, match="in flight"):
            draw(ledger, "1-0", attempt, at=0)
        end(ledger, "1-0", 1)
        with pytest.raises(ValueError, match="is trained; a new draw needs a new id"):
            draw(ledger, "1-0", attempt, at=1)
        with pytest.raises(ValueError, match="of attempt 2 in attempt 1"):
            draw(ledger, "1-1", 2, at=1)

    def test_do_not_end_before_they_were_drawn(self, ledger):
        draw(ledger, "1-0", ledger.open_attempt("rl", 0), at=5)
        with pytest.raises(ValueError, match="of step 5 cannot end at step 4"):
            end(ledger, "1-0", 4)


class TestResume:
    def test_voids_what_the_checkpoint_does_not_hold(self, path, ledger):
        first = ledger.open_attempt("rl", 0)
        for draw_id in ("1-0", "1-1", "1-2"):
            draw(ledger, draw_id, first, at=0)
        end(ledger, "1-0", 1)
        ledger.commit_step(1)
        draw(ledger, "1-3", first, at=1)
        end(ledger, "1-1", 2)
        end(ledger, "1-3", 2, DrawOutcome.ZERO_ADVANTAGE)
        ledger.flush()
        assert audit(path).num_provisional == 2

        second = ledger.open_attempt("rl", 1)
        assert second == 2
        # 1-1 is in flight again, 1-3 was drawn after the checkpoint and never happened
        assert ids(ledger.open_draws(second)) == ["1-1", "1-2"]
        assert ledger.draw_counts() == NONE_DRAWN | {"trained": 1, "in_flight": 2}
        draw(ledger, "1-1", second, at=1)
        end(ledger, "1-1", 2, DrawOutcome.STALE)
        draw(ledger, "1-3", second, at=1, prompt_id="another")
        ledger.flush()
        assert ledger.draw_counts() == NONE_DRAWN | {"trained": 1, "stale": 1, "in_flight": 2}
        report = audit(path)
        assert report.ok, report.describe()
        assert (report.num_draws, report.num_voided, report.num_attempts) == (4, 2, 2)

    def test_from_the_beginning_voids_everything(self, ledger):
        first = ledger.open_attempt("rl", 0)
        draw(ledger, "1-0", first, at=0)
        end(ledger, "1-0", 1)
        draw(ledger, "1-1", first, at=0)
        ledger.open_attempt("rl", 0)
        assert ledger.draw_counts() == NONE_DRAWN

    def test_may_go_back_beyond_an_earlier_resume(self, path, ledger):
        first = ledger.open_attempt("rl", 0)
        draw(ledger, "1-0", first, at=0)
        ledger.commit_step(1)
        ledger.commit_step(2)
        second = ledger.open_attempt("rl", 2)
        draw(ledger, "1-0", second, at=2)
        end(ledger, "1-0", 3)
        third = ledger.open_attempt("rl", 1)
        assert [(d.draw_id, d.attempt) for d in ledger.open_draws(third)] == [("1-0", first)]
        draw(ledger, "1-0", third, at=1)
        end(ledger, "1-0", 2)
        ledger.flush()
        assert ledger.draw_counts() == NONE_DRAWN | {"trained": 1}
        assert audit(path).ok

    def test_leaves_other_stages_alone(self, path, ledger):
        draw(ledger, "a", ledger.open_attempt("rl", 0), at=3)
        end(ledger, "a", 4)
        draw(ledger, "b", ledger.open_attempt("rescreen", 0), at=5)
        third = ledger.open_attempt("rescreen", 0)
        draw(ledger, "c", third, at=0)
        assert ledger.draw_counts() == NONE_DRAWN | {"trained": 1, "in_flight": 1}
        assert ids(ledger.open_draws(third)) == ["c"]
        assert ids(ledger.open_draws(1)) == []
        ledger.flush()
        assert audit(path).ok

    def test_an_end_without_a_step_counts_in_the_step_under_way(self, ledger):
        first = ledger.open_attempt("rl", 0)
        for draw_id, at in (("early", 0), ("late", 0), ("last", 4)):
            draw(ledger, draw_id, first, at=at)
            if draw_id == "early":
                end(ledger, "early", None, DrawOutcome.ERRORED)  # step 1 is under way
        end(ledger, "late", None, DrawOutcome.ERRORED)  # step 4 was served: later than 3
        ledger.open_attempt("rl", 3)
        assert ids(ledger.open_draws()) == ["late"]
        assert ledger.draw_counts() == NONE_DRAWN | {"errored": 1, "in_flight": 1}

    def test_what_is_open_when_the_stage_ends_can_be_closed_without_drawing_again(self, ledger):
        first = ledger.open_attempt("rl", 0)
        draw(ledger, "1-0", first, at=0)
        ledger.commit_step(1)
        second = ledger.open_attempt("rl", 1)
        for open_draw in ledger.open_draws(second):
            ledger.close_draw(
                open_draw.draw_id, DrawOutcome.UNUSED, step=None, num_scored=0, num_correct=0
            )
        assert ledger.draw_counts() == NONE_DRAWN | {"unused": 1}

    def test_commits_beyond_it_do_not_count(self, path, ledger):
        first = ledger.open_attempt("rl", 0)
        for i in range(3):
            draw(ledger, f"1-{i}", first, at=i)
            end(ledger, f"1-{i}", i + 1)
            ledger.commit_step(i + 1)
        assert audit(path).num_provisional == 0
        second = ledger.open_attempt("rl", 1)
        draw(ledger, "2-0", second, at=1)
        end(ledger, "2-0", 2)
        ledger.flush()
        assert audit(path).num_provisional == 1


class TestFile:
    def test_readers_see_what_was_flushed_while_it_is_written(self, path, ledger):
        attempt = ledger.open_attempt("rl", 0)
        with Ledger.open_readonly(path) as reader:
            draw(ledger, "1-0", attempt, at=0)
            assert reader.draw_counts()["in_flight"] == 0
            ledger.flush()
            assert reader.draw_counts()["in_flight"] == 1
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                reader._connection.execute("DELETE FROM draws")

    def test_reopened_it_goes_on(self, path):
        with Ledger(path) as ledger:
            draw(ledger, "1-0", ledger.open_attempt("rl", 0), at=0)
            ledger.commit_step(1)
            ledger.record_verdicts([verdict()])
        with Ledger(path) as ledger:
            assert ledger.open_attempt("rl", 1) == 2
            end(ledger, "1-0", 2)
            ledger.flush()
            kinds = [type(event) for event in prompt_history(path, "p")]
        assert kinds == [Drawn, Judged, Ended]

    @pytest.mark.parametrize("opened", [Ledger, Ledger.open_readonly])
    def test_of_another_version_is_refused(self, path, opened):
        Ledger(path).close()
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE meta SET schema_version = 99")
        connection.close()
        with pytest.raises(RunDirError, match="schema 99, this version of posttrain reads 1"):
            opened(path)

    @pytest.mark.parametrize("opened", [Ledger, Ledger.open_readonly])
    def test_what_is_no_ledger_is_refused(self, path, opened):
        path.write_text("not a database, but long enough to look at" * 9)
        with pytest.raises(RunDirError, match="is no ledger"):
            opened(path)
        path.unlink()
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE theirs (x)")
        connection.close()
        with pytest.raises(RunDirError, match="schema None"):
            opened(path)

    def test_reading_one_that_is_not_there_creates_none(self, path):
        for read in (Ledger.open_readonly, audit, lambda p: prompt_history(p, "p")):
            with pytest.raises(RunDirError, match="no ledger at"):
                read(path)
        assert not path.exists()

    def test_a_full_disk_is_a_clear_error_and_spoils_nothing(self, path):
        ledger = Ledger(path)
        attempt = ledger.open_attempt("rl", 0)
        draw(ledger, "1-0", attempt, at=0)
        ledger.commit_step(1)
        ledger._connection.execute("PRAGMA max_page_count = 40")
        with pytest.raises(StageError, match=r"ledger\.sqlite cannot be written .*full.*resumes"):
            for i in range(1, 5000):
                draw(ledger, f"1-{i}", attempt, at=1)
        LedgerReader.close(ledger)
        report = audit(path)
        assert report.ok
        assert report.num_draws == 1

    def test_a_snapshot_is_one_file_that_audits(self, path, ledger, tmp_path):
        attempt = ledger.open_attempt("rl", 0)
        draw(ledger, "1-0", attempt, at=0)
        (tmp_path / "checkpoint-1").mkdir()
        ledger.snapshot(tmp_path / "checkpoint-1" / "ledger.sqlite")
        end(ledger, "1-0", 1)
        assert [p.name for p in (tmp_path / "checkpoint-1").iterdir()] == ["ledger.sqlite"]
        assert audit(tmp_path / "checkpoint-1" / "ledger.sqlite").counts["in_flight"] == 1


class TestJudgements:
    def test_verdicts_come_back_as_they_were(self, ledger):
        given_verdicts = [verdict("p"), verdict("q", "c1"), verdict("p", correct=8)]
        ledger.record_verdicts(given_verdicts)
        assert ledger.verdicts() == given_verdicts
        assert ledger.verdicts("c1") == [given_verdicts[1]]
        assert ledger.verdicts("c2") == []

    def test_a_decision_brings_its_verdict_unless_it_is_there(self, path, ledger):
        first, second = verdict(), verdict(correct=8, label=Label.EASY)
        ledger.record_verdicts([first])

        def decide(action, on):
            decision = Decision(
                prompt_id="p", action=action, rule="easy-above", reason="8 > 7", verdict=on
            )
            ledger.record_decisions("screen", [decision])

        decide(Action.KEEP, first)
        decide(Action.DROP, second)
        decide(Action.RETEST, second)
        ledger.flush()
        assert ledger.verdicts() == [first, second]
        decisions = [e for e in prompt_history(path, "p") if isinstance(e, Decided)]
        assert [(e.action, e.verdict) for e in decisions] == [
            (Action.KEEP, first),
            (Action.DROP, second),
            (Action.RETEST, second),
        ]


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


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from([*["open", "end"] * 3, *["step"] * 2, "commit", "resume", "crash"]),
        st.integers(0, 10**6),
    ),
    max_size=60,
)


class Model:
    """What a checkpoint holds, kept in plain dictionaries: the ledger has to agree."""

    def __init__(self):
        self.open, self.ended = {}, {}
        self.step = 0
        self.checkpoints = {0: ({}, {})}
        self.durable = {0}

    def counts(self):
        ends = list(self.ended.values())
        return {o: ends.count(o) for o in DrawOutcome} | {"in_flight": len(self.open)}

    def advance(self):
        self.step += 1
        self.checkpoints[self.step] = (dict(self.open), dict(self.ended))

    def resume(self, step):
        self.step = step
        self.checkpoints = {s: c for s, c in self.checkpoints.items() if s <= step}
        self.durable = {s for s in self.durable if s <= step}
        self.open, self.ended = map(dict, self.checkpoints[step])


@settings(max_examples=60, deadline=None)
@given(OPERATIONS)
def test_any_history_agrees_with_a_simple_model(operations):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "ledger.sqlite")
        ledger, model = Ledger(path), Model()
        attempt = ledger.open_attempt("rl", 0)
        number = 0
        for operation, choice in operations:
            if operation == "open":
                # ids start over with the attempt's step: voided ones are used again
                number += 1
                draw_id = f"{model.step}-{len(model.open) + len(model.ended)}"
                if draw_id not in model.open and draw_id not in model.ended:
                    draw(ledger, draw_id, attempt, at=model.step, prompt_id=f"p{number}")
                    model.open[draw_id] = f"p{number}"
            elif operation == "end" and model.open:
                draw_id = sorted(model.open)[choice % len(model.open)]
                outcome = list(DrawOutcome)[choice % 6]
                end(ledger, draw_id, model.step + 1, outcome)
                del model.open[draw_id]
                model.ended[draw_id] = outcome
            elif operation == "step":
                model.advance()
            elif operation == "commit":
                ledger.commit_step(model.step)
                model.durable.add(model.step)
            elif operation in ("resume", "crash"):
                if operation == "crash":
                    LedgerReader.close(ledger)  # without a flush: what was not written is lost
                    ledger = Ledger(path)
                step = sorted(model.durable)[choice % len(model.durable)]
                model.resume(step)
                attempt = ledger.open_attempt("rl", step)
                again = {d.draw_id: d.prompt_id for d in ledger.open_draws(attempt)}
                assert again == model.open
                for draw_id in sorted(again)[: choice % 5]:
                    draw(ledger, draw_id, attempt, at=step, prompt_id=again[draw_id])
            assert ledger.draw_counts() == model.counts()
        ledger.close()
        report = audit(path)
        assert report.ok, report.describe()
        assert report.counts == model.counts()


DRIVER = """
    # Each step draws five groups and ends the four oldest; a checkpoint every three steps.
    import sys, time
    from pathlib import Path
    from posttrain.atomic import write_atomically
    from posttrain.ledger import Ledger
    from posttrain.types import DrawOutcome
    path, pointer = Path(sys.argv[1]), Path(sys.argv[2])
    ledger = Ledger(path)
    step = int(pointer.read_text()) if pointer.exists() else 0
    attempt = ledger.open_attempt("rl", step)
    queue, number = [], 0

    def open_draw(draw_id, prompt_id):
        ledger.open_draw(draw_id=draw_id, prompt_id=prompt_id, domain="d", system=None,
                         attempt=attempt, drawn_at_step=step)
        queue.append(draw_id)

    for draw in ledger.open_draws(attempt):
        open_draw(draw.draw_id, draw.prompt_id)
    while True:
        for _ in range(5):
            open_draw(f"{attempt}-{number:06}", f"p{number % 50}")
            number += 1
        for _ in range(4):
            ledger.close_draw(queue.pop(0), DrawOutcome.TRAINED, step=step + 1,
                              num_scored=8, num_correct=4)
        step += 1
        if step % 3 == 0:
            ledger.commit_step(step)
            write_atomically(pointer, str(step))
            print(step, flush=True)
"""


def test_a_driver_killed_at_any_moment_resumes_with_nothing_lost_and_nothing_twice(path, tmp_path):
    pointer = tmp_path / "latest"
    chance = random.Random(0)
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(DRIVER), path, pointer],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        ) as driver:
            assert driver.stdout.readline()
            time.sleep(chance.uniform(0.0, 0.2))
            driver.send_signal(signal.SIGKILL)
        report = audit(path)
        assert report.ok, report.describe()
    step = int(pointer.read_text())
    assert step >= 9
    with Ledger(path) as ledger:
        assert ledger.open_attempt("rl", step) == 4
        assert len(ledger.open_draws()) == step
        expected = NONE_DRAWN | {"trained": 4 * step, "in_flight": step}
        assert ledger.draw_counts() == expected
    report = audit(path)
    assert report.ok, report.describe()
    assert (report.counts, report.num_provisional) == (expected, 0)


def test_speed(path):
    num_draws, num_prompts = 200_000, 5_000
    with Ledger(path) as ledger:
        attempt = ledger.open_attempt("rl", 0)
        started = time.process_time()
        for i in range(num_draws):
            draw(ledger, f"1-{i:07}", attempt, at=i // 64, prompt_id=f"p{i % num_prompts}")
            end(ledger, f"1-{i:07}", i // 64 + 1)
        ledger.flush()
        per_second = num_draws / (time.process_time() - started)
        assert per_second >= 20_000, f"{per_second:.0f} draws opened and ended a second"
        started = time.process_time()
        events = prompt_history(path, "p77")
        seconds = time.process_time() - started
    assert len(events) == 2 * num_draws / num_prompts
    assert seconds <= 0.05
