"""A local pool of killable scorer processes.

One thread per worker process takes groups from a queue, so that a group costs one message each
way. A group that runs past the deadline, or whose process dies, is scored again answer by answer:
only the answer that hangs gets `LIMIT`, only the one that keeps killing its process stays unscored.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from queue import SimpleQueue
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary

from posttrain.errors import StageError
from posttrain.types import Outcome, Prompt, Reward, Rollout, SystemInstruction
from rewards.score import Verifier, failed
from rewards.scorer import unscored
from rewards.shaping import RewardSettings, combine
from rewards.verifiers import VERIFIERS
from rewards.worker_process import Closed, DeadlineHit, WorkerDied, WorkerProcess

RETRIES = 2
"""Times that an answer is tried again after its process died without running late."""

GROUPS_PER_WORKER = 4
"""Groups under way per worker and event loop; further callers wait in `score`."""


@dataclass(frozen=True, slots=True)
class _Job:
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    system: SystemInstruction | None
    rewards: Future[tuple[Reward, ...]] = field(default_factory=Future)


class ScorerPool:
    """`posttrain.types.Scorer` over `num_workers` local processes, usable from any event loop.

    Args:
        deadline_s: seconds of wall-clock that one answer may take.
        verifiers: picklable functions by name; importable in the workers under the same name.
    """

    def __init__(
        self,
        num_workers: int,
        settings: RewardSettings,
        *,
        deadline_s: float = 10.0,
        verifiers: Mapping[str, Verifier] = VERIFIERS,
    ) -> None:
        if num_workers < 1 or deadline_s <= 0:
            raise ValueError(
                "num_workers must be at least 1 and deadline_s above 0, "
                f"got {num_workers} and {deadline_s}"
            )
        self._settings = settings
        self._deadline_s = deadline_s
        self._verifiers = verifiers
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            WeakKeyDictionary()
        )
        self._lock = threading.Lock()
        self._closed = False
        # The closing of one end wakes every thread, whatever it waits for.
        self._closing, self._close_signal = Pipe(duplex=False)
        self._threads = [
            threading.Thread(target=self._serve, name=f"scorer-{index}", daemon=True)
            for index in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    async def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], system: SystemInstruction | None
    ) -> tuple[Reward, ...]:
        """One reward per rollout, in order. Raises DataError for a prompt that cannot be scored at
        all, StageError if the pool is closed (also while this waits)."""
        loop = asyncio.get_running_loop()
        slots = self._slots.get(loop)
        if slots is None:
            slots = asyncio.Semaphore(GROUPS_PER_WORKER * len(self._threads))
            self._slots[loop] = slots
        async with slots:
            job = _Job(prompt, tuple(map(_without_logprobs, rollouts)), system)
            with self._lock:
                if self._closed:
                    raise _closed_error()
                self._jobs.put(job)
            return await asyncio.wrap_future(job.rewards)

    def close(self) -> None:
        """Kills every worker, fails what was under way, and returns when no process is left."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._close_signal.close()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self) -> None:
        """One worker's thread: the only one that touches its process."""
        worker = WorkerProcess(self._settings, self._verifiers, self._closing)
        try:
            while (job := self._jobs.get()) is not None:
                if job.rewards.set_running_or_notify_cancel():
                    self._finish(job, worker)
        finally:
            worker.kill()

    def _finish(self, job: _Job, worker: WorkerProcess) -> None:
        try:
            if self._closed:
                raise Closed
            job.rewards.set_result(self._score_group(worker, job))
        except Closed:
            job.rewards.set_exception(_closed_error())
        except Exception as error:
            job.rewards.set_exception(error)

    def _score_group(self, worker: WorkerProcess, job: _Job) -> tuple[Reward, ...]:
        if len(job.rollouts) > 1:
            try:
                return worker.score(job.prompt, job.rollouts, job.system, self._deadline_s)
            except (DeadlineHit, WorkerDied):
                pass  # not known by which answer
        return tuple(self._score_single(worker, job, rollout) for rollout in job.rollouts)

    def _score_single(self, worker: WorkerProcess, job: _Job, rollout: Rollout) -> Reward:
        why = ""
        for _ in range(1 + RETRIES):
            try:
                (reward,) = worker.score(job.prompt, (rollout,), job.system, self._deadline_s)
                return reward
            except DeadlineHit:
                late = failed(Outcome.LIMIT, f"not scored within {self._deadline_s:g} s")
                return combine(late, rollout, job.system, self._settings)
            except WorkerDied as error:
                why = str(error)
        return unscored(f"{why}, {1 + RETRIES} times")


def _without_logprobs(rollout: Rollout) -> Rollout:
    """What scoring does not read is not sent: it is most of a rollout's bytes."""
    return replace(rollout, prompt_token_ids=(), rollout_logprobs=(), version_spans=())


def _closed_error() -> StageError:
    return StageError("the scorer pool is closed; score before close(), or open another")
