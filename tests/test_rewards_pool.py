"""The pool of scorer processes: order, deadlines, deaths, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rewards_fakes import TASK, acting_pool, rollout, score

from posttrain.data.prompts import make_prompt
from posttrain.errors import DataError, StageError
from posttrain.types import Outcome, Reward, Scorer, SystemInstruction
from rewards.pool import GROUPS_PER_WORKER, ScorerPool
from rewards.scorer import score_rollouts
from rewards.shaping import RewardSettings


def outcomes(rewards: tuple[Reward, ...]) -> list[Outcome]:
    return [reward.outcome for reward in rewards]


def descendants() -> set[int]:
    """Process ids of what this process has started and what that has, ended but unreaped ones
    included."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found, newest = set[int](), {os.getpid()}
    while newest:
        newest = {pid for pid, parent in parents.items() if parent in newest}
        found |= newest
    return found


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


async def test_hundreds_of_groups_come_back_in_order_and_as_the_pure_path_scores_them() -> None:
    instruction = SystemInstruction(name="short", text="Be short.", pattern="#[0-9]+")
    settings = RewardSettings(instruction_weight=0.5)
    prompts = [
        make_prompt(f"{number}?", reference=str(number), domain="d") for number in range(300)
    ]
    groups = [[rollout(f"#{number}"), rollout(f"#{number}x")] for number in range(300)]
    before = descendants()
    with ScorerPool(2, settings, patience_s=60) as pool:  # no spare steps in on a busy machine
        scorer: Scorer = pool
        results = await asyncio.gather(
            *(
                scorer.score(prompt, group, instruction)
                for prompt, group in zip(prompts, groups, strict=True)
            )
        )
        assert len(descendants() - before) == 3  # a template and what is forked from it
    assert descendants() == before
    for prompt, group, rewards in zip(prompts, groups, results, strict=True):
        assert rewards == score_rollouts(prompt, group, instruction, settings)
        assert [reward.value for reward in rewards] == [1.5, 0.0]


def test_only_the_hanging_answer_hits_the_limit_and_the_pool_goes_on() -> None:
    with acting_pool(deadline_s=0.3) as pool:
        assert outcomes(score(pool, "good", "hang", "good")) == [
            Outcome.CORRECT,
            Outcome.LIMIT,
            Outcome.CORRECT,
        ]
        assert outcomes(score(pool, "good")) == [Outcome.CORRECT]


def test_a_group_of_slow_answers_is_not_late_as_a_whole() -> None:
    with acting_pool(deadline_s=1.2) as pool:
        rewards = score(pool, *["sleep 0.4"] * 4)
    assert outcomes(rewards) == [Outcome.CORRECT] * 4


def test_a_worker_killed_from_outside_is_replaced_and_its_answer_retried(tmp_path: Path) -> None:
    note = tmp_path / "pid"

    def kill_it() -> None:
        assert eventually(lambda: note.exists() and note.read_text() != "")
        os.kill(int(note.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill_it)
    killer.start()
    with acting_pool() as pool:
        rewards = score(pool, f"wait-to-be-killed-once {note}")
    killer.join()
    assert outcomes(rewards) == [Outcome.CORRECT]


def test_an_answer_whose_process_always_dies_stays_unscored_and_the_others_do_not() -> None:
    with acting_pool() as pool:
        good, dying = score(pool, "good", "die")
    assert good.outcome is Outcome.CORRECT
    assert (dying.outcome, dying.value) == (Outcome.INFRASTRUCTURE, None)
    assert dying.explanation == "the scorer process died (exit code -9), 3 times"


def test_an_answer_that_devours_memory_hits_the_limit() -> None:
    with acting_pool() as pool:
        assert outcomes(score(pool, "devour", "good")) == [Outcome.LIMIT, Outcome.CORRECT]


def test_real_verifiers_hang_and_are_stopped() -> None:
    matrix = r"\begin{pmatrix}x&y\\z&w\end{pmatrix}"
    task = make_prompt(
        "?", reference=f"{matrix}^{{99}}", domain="d", metadata={"verifier": "maths"}
    )
    with ScorerPool(1, RewardSettings(deadlines_s={"maths": 5.0})) as pool:
        # What it needs is loaded.
        (right,) = score(pool, rf"\boxed{{{matrix}^{{99}}}}", prompt=task)
        assert right.outcome is Outcome.CORRECT
        # No limit of the verifier's own is in the way of comparing these.
        (late,) = score(pool, rf"\boxed{{{matrix}^{{100}}}}", prompt=task)
        assert (late.outcome, late.explanation) == (Outcome.LIMIT, "not scored within 5 s")


def test_each_verifier_has_its_own_deadline() -> None:
    maths = make_prompt("?", reference="5", domain="d", metadata={"verifier": "maths"})
    settings = RewardSettings(deadlines_s={"maths": 0.005})
    power = r"\boxed{\begin{pmatrix}x&y\\z&w\end{pmatrix}^{50}}"
    with ScorerPool(1, settings) as pool:
        (late,) = score(pool, power, prompt=maths)
        (other,) = score(pool, "#2")
    assert (late.outcome, late.explanation) == (Outcome.LIMIT, "not scored within 0.005 s")
    assert other.outcome is Outcome.CORRECT


def test_workers_use_one_thread_know_no_torch_and_keep_stdout_clean(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with acting_pool() as pool:
        environment, _ = score(pool, "environment", "print")
    assert environment.explanation == "1 False"
    assert capfd.readouterr().out == ""


def test_what_is_wrong_with_the_prompt_is_raised() -> None:
    with ScorerPool(1, RewardSettings()) as pool:
        with pytest.raises(DataError, match="reference"):
            score(pool, "#2", prompt=make_prompt("?", reference=2, domain="d"))
        assert outcomes(score(pool, "#2", "#3")) == [Outcome.CORRECT, Outcome.WRONG]


async def test_closing_fails_what_is_under_way_and_leaves_nothing() -> None:
    before = descendants()
    pool = acting_pool(num_workers=2)
    waiting = [asyncio.create_task(pool.score(TASK, [rollout("hang")], None)) for _ in range(30)]
    while len(descendants() - before) < 3:
        await asyncio.sleep(0.01)
    started = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - started < 5
    assert descendants() == before
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [StageError] * 30
    with pytest.raises(StageError, match="closed"):
        await pool.score(TASK, [rollout("good")], None)


async def test_a_cancelled_caller_disturbs_nobody() -> None:
    with acting_pool() as pool:
        first = asyncio.create_task(pool.score(TASK, [rollout("sleep 0.2")], None))
        second = asyncio.create_task(pool.score(TASK, [rollout("hang")], None))
        await asyncio.sleep(0.01)
        second.cancel()
        first.cancel()
        assert outcomes(await pool.score(TASK, [rollout("good")], None)) == [Outcome.CORRECT]
        assert first.cancelled() and second.cancelled()


def test_callers_beyond_the_bound_wait_outside_the_queue() -> None:
    async def flood(pool: ScorerPool) -> int:
        calls = [pool.score(TASK, [rollout("sleep 0.02")], None) for _ in range(20)]
        tasks = [asyncio.create_task(call) for call in calls]
        await asyncio.sleep(0.05)
        queued = pool._pieces.qsize()
        assert {outcome for task in tasks for outcome in outcomes(await task)} == {Outcome.CORRECT}
        return queued

    with acting_pool(spares=0) as pool:
        assert asyncio.run(flood(pool)) <= GROUPS_PER_WORKER
        assert asyncio.run(flood(pool)) <= GROUPS_PER_WORKER  # and from a second event loop


def test_a_busy_worker_dies_with_its_parent(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"import rewards_fakes; rewards_fakes.hang_in_a_pool({str(note)!r})"
    path = os.pathsep.join(sys.path)
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    try:
        assert eventually(lambda: note.exists() and note.read_text() != "")
        worker = int(note.read_text())
        assert running(worker)
    finally:
        parent.kill()
        parent.wait()
    assert eventually(lambda: not running(worker), seconds=5)


async def test_a_thousand_good_answers_do_not_wait_for_ten_that_hang() -> None:
    """Ten answers that hang until their deadline of 5 s: were a worker lost to each, the two of
    them would be away for 25 s."""

    async def seconds(pool: ScorerPool, answer: str) -> float:
        """Until a thousand good answers are scored that come after ten groups with `answer`."""
        first = [rollout("good"), rollout(answer), rollout("good")]
        groups = [asyncio.create_task(pool.score(TASK, first, None)) for _ in range(10)]
        await asyncio.sleep(0.1)
        started = time.monotonic()
        good = await asyncio.gather(
            *(pool.score(TASK, [rollout("good")] * 10, None) for _ in range(100))
        )
        took = time.monotonic() - started
        assert [outcomes(rewards) for rewards in good] == [[Outcome.CORRECT] * 10] * 100
        expected = Outcome.CORRECT if answer != "sleep 60" else Outcome.LIMIT
        for group in groups:
            assert outcomes(await group) == [Outcome.CORRECT, expected, Outcome.CORRECT]
        return took

    with acting_pool(num_workers=2, deadline_s=5.0, patience_s=0.1, spares=10) as pool:
        await seconds(pool, "sleep 1")  # the spares have been started
        without = await seconds(pool, "good")
        with_hanging = await seconds(pool, "sleep 60")
    assert with_hanging < without + 2.5  # ten times the patience on two workers are .5 s


async def test_the_hanging_answers_of_one_group_hang_side_by_side() -> None:
    with acting_pool(deadline_s=2.0, patience_s=0.1, spares=5) as pool:
        group = [rollout(text) for text in ("sleep 60", "good", "sleep 60", "sleep 60", "good")]
        await pool.score(TASK, group, None)  # the spares are warm
        started = time.monotonic()
        rewards = await pool.score(TASK, group, None)
        took = time.monotonic() - started
    late, good = Outcome.LIMIT, Outcome.CORRECT
    assert [reward.outcome for reward in rewards] == [late, good, late, late, good]
    assert took < 5.5  # 6 one after the other


async def test_without_a_spare_others_wait_and_none_is_lost() -> None:
    with acting_pool(deadline_s=0.6, patience_s=0.1, spares=0) as pool:
        results = await asyncio.gather(
            *(pool.score(TASK, [rollout("hang"), rollout("good")], None) for _ in range(3))
        )
    assert [outcomes(rewards) for rewards in results] == [[Outcome.LIMIT, Outcome.CORRECT]] * 3


def test_a_slow_answer_keeps_its_process_and_runs_at_a_low_priority_meanwhile() -> None:
    with acting_pool(deadline_s=20.0, patience_s=0.1) as pool:
        before = score(pool, "nice")[0].explanation
        slow, fast = score(pool, "sleep-and-nice 0.5", "nice")
    own = str(os.nice(0))
    assert (before, slow.explanation, fast.explanation) == (own, "10", own)


def test_workers_share_the_session_so_that_their_priority_counts_outside_of_it() -> None:
    with acting_pool() as pool:
        assert score(pool, "session")[0].explanation == str(os.getsid(0))


def test_a_worker_is_recycled_after_so_many_answers() -> None:
    with acting_pool(answers_per_worker=3, spares=0) as pool:
        pids = [score(pool, "pid")[0].explanation for _ in range(7)]
    assert pids[0] == pids[1] == pids[2] != pids[3] == pids[4] == pids[5] != pids[6]


@pytest.mark.parametrize(
    ("num_workers", "spares", "patience_s"), [(0, 0, 1.0), (1, -1, 1.0), (1, 0, 0.0)]
)
def test_impossible_sizes_are_refused(num_workers: int, spares: int, patience_s: float) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ScorerPool(num_workers, RewardSettings(), spares=spares, patience_s=patience_s)
