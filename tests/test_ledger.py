import sqlite3

import pytest
from ledger_entries import NONE_DRAWN, draw, end, verdict

from posttrain.audit import Decided, Drawn, Ended, Judged, audit, prompt_history
from posttrain.errors import RunDirError, StageError
from posttrain.ledger import Ledger, LedgerReader, OpenDraw
from posttrain.types import Action, Decision, DrawOutcome, Label


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger(path) as ledger:
        yield ledger


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

    def test_what_ended_counts_over_all_attempts_of_the_stage(self, ledger):
        first = ledger.open_attempt("rl", 0)
        for draw_id, step in (("1-0", 1), ("1-1", 2)):
            draw(ledger, draw_id, first, at=0)
            end(ledger, draw_id, step)
        second = ledger.open_attempt("rl", 1)
        draw(ledger, "1-1", second, at=1)
        end(ledger, "1-1", 2, DrawOutcome.STALE, reason="deadline")
        draw(ledger, "2-2", second, at=1)
        draw(ledger, "other", ledger.open_attempt("rescreen", 0), at=0)
        end(ledger, "other", 1)
        assert ledger.ended_draws("rl") == {
            (DrawOutcome.TRAINED, "", "maths"): 1,
            (DrawOutcome.STALE, "deadline", "maths"): 1,
        }
        assert ledger.surviving_ends() == {("1-0", 1), ("1-1", 2), ("other", 3)}

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
        ledger.flush()
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
