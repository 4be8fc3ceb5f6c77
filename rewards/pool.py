"""A local pool of killable scorer processes.

The answers of a group are sent to a worker process one by one, so that it is known which of them
hangs. An answer that takes longer than `patience_s` gives way: it keeps its process, at a low
priority, while the rest of its group goes back into the queue and a spare process takes over. So
`num_workers` answers are always being scored besides those that hang, as long as there are spares;
without one left everybody waits. Judges and reward models are asked first, outside of these
processes (`rewards.remote`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import Pipe
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from posttrain.errors import StageError
from posttrain.types import Outcome, Prompt, Reward, Rollout, SystemInstruction
from rewards.judged import Ask
from rewards.loop_slots import LoopSlots
from rewards.remote import Remote
from rewards.remote import longest_s as longest_remote_s
from rewards.score import Finding, Verifier, failed
from rewards.scorer import stopped, unscored
from rewards.shaping import RewardSettings
from rewards.verifiers import VERIFIERS, remote_names, verifier_names
from rewards.worker_process import DeadlineHit, WorkerProcess
from rewards.worker_template import START_DEADLINE_S, Closed, Template, WorkerDied

RETRIES = 2
"""Times that an answer is tried again after its process died without running late."""

GROUPS_PER_WORKER = 4
"""Groups under way per worker and event loop; further callers wait in `score`."""


class _Group:
    """What was asked and what has been found so far. Its pieces may be worked on side by side."""

    def __init__(
        self,
        prompt: Prompt,
        rollouts: tuple[Rollout, ...],
        system: SystemInstruction | None,
        given: tuple[Mapping[str, Finding], ...],
    ) -> None:
        self.prompt = prompt
        self.rollouts = rollouts
        self.system = system
        self.given = given
        self.future: Future[tuple[Reward, ...]] = Future()
        self._rewards: dict[int, Reward] = {}
        self._lock = threading.Lock()

    def put(self, index: int, reward: Reward) -> None:
        with self._lock:
            self._rewards[index] = reward
            if len(self._rewards) == len(self.rollouts) and not self.future.done():
                self.future.set_result(tuple(self._rewards[i] for i in range(len(self.rollouts))))

    def fail(self, error: Exception) -> None:
        with self._lock:
            if not self.future.done():
                self.future.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Piece:
    """The answers of a group from `start` on."""

    group: _Group
    start: int = 0


@dataclass(slots=True)
class _Permit:
    """The right to score, of which there are `num_workers`; given back once."""

    permits: threading.Semaphore
    held: bool = False

    def take(self) -> None:
        self.permits.acquire()
        self.held = True

    def give_back(self) -> None:
        if self.held:
            self.held = False
            self.permits.release()


class ScorerPool:
    """`posttrain.types.Scorer` over local processes, usable from any event loop.

    Args:
        num_workers: answers that are scored at the same time.
        spares: processes beside them, started only when answers are slow: so many may hang before
            others have to wait.
        patience_s: seconds of wall-clock after which an answer gives way.
        answers_per_worker: after so many a process is replaced by a new one.
        engine: asks the judge, where the settings name a model instead of an endpoint.
        verifiers: picklable functions by name; importable in the workers under the same name.

    Raises SettingsError for a judge that cannot be asked.
    """

    def __init__(
        self,
        num_workers: int,
        settings: RewardSettings,
        *,
        spares: int = 8,
        patience_s: float = 0.1,
        answers_per_worker: int = 20_000,
        engine: Ask | None = None,
        verifiers: Mapping[str, Verifier] = VERIFIERS,
    ) -> None:
        if num_workers < 1 or spares < 0 or patience_s <= 0 or answers_per_worker < 1:
            raise ValueError(
                "num_workers and answers_per_worker must be at least 1, spares not negative and "
                f"patience_s above 0, got {num_workers}, {answers_per_worker}, {spares} and "
                f"{patience_s}"
            )
        self._settings = settings
        self._patience_s = patience_s
        self._answers_per_worker = answers_per_worker
        self._pieces: SimpleQueue[_Piece | None] = SimpleQueue()
        self._slots = LoopSlots(GROUPS_PER_WORKER * num_workers + spares)
        self._permits = threading.Semaphore(num_workers)
        self._lock = threading.Lock()
        self._closed = False
        # The closing of one end wakes every thread, whatever it waits for.
        self._closing, self._close_signal = Pipe(duplex=False)
        self._remote = Remote(settings, engine, self._closing)
        num_threads = num_workers + spares
        self._template = Template(settings, verifiers, self._closing)
        self._workers = [
            WorkerProcess(settings, self._template, self._closing) for _ in range(num_threads)
        ]
        self._idle = list(self._workers)
        self._threads = [
            threading.Thread(target=self._serve, name=f"scorer-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    async def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], system: SystemInstruction | None
    ) -> tuple[Reward, ...]:
        """One reward per rollout, in order. Raises DataError for a prompt that cannot be scored at
        all, ModelError for a reward model that cannot be used, StageError if the pool is closed
        (also while this waits)."""
        if self._closed:
            raise _closed_error()
        if not rollouts:
            return ()
        given = await self._given(prompt, rollouts, system)
        async with self._slots.here():
            group = _Group(prompt, tuple(map(without_logprobs, rollouts)), system, given)
            with self._lock:
                if self._closed:
                    raise _closed_error()
                self._pieces.put(_Piece(group))
            return await asyncio.wrap_future(group.future)

    async def _given(
        self, prompt: Prompt, rollouts: Sequence[Rollout], system: SystemInstruction | None
    ) -> tuple[Mapping[str, Finding], ...]:
        names = remote_names(self._settings).intersection(verifier_names(prompt, self._settings))
        if not names:
            return ({},) * len(rollouts)
        try:
            return await self._remote.findings(names, prompt, rollouts, system)
        except Closed:
            raise _closed_error() from None

    def close(self) -> None:
        """Kills every worker, fails what was under way, and returns when no process is left."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._close_signal.close()
        for _ in self._threads:
            self._pieces.put(None)
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.kill()
        self._template.kill()
        self._remote.close()
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
        permit = _Permit(self._permits)
        while True:
            permit.take()
            try:
                piece = self._pieces.get()
                if piece is None:
                    return
                self._work(piece, permit)
            finally:
                permit.give_back()

    def _work(self, piece: _Piece, permit: _Permit) -> None:
        group = piece.group
        if piece.start == 0 and not group.future.set_running_or_notify_cancel():
            return
        worker = self._idle.pop()  # the one that was used last: the others need not be started
        try:
            for index in range(piece.start, len(group.rollouts)):
                if self._closed:
                    raise Closed
                if group.future.done() or not permit.held:
                    return
                give_way = partial(self._give_way, permit, group, index)
                group.put(index, self._score(worker, group, index, give_way))
                if worker.num_answers >= self._answers_per_worker:
                    worker.kill()
        except Closed:
            group.fail(_closed_error())
        except Exception as error:
            group.fail(error)
        finally:
            self._idle.append(worker)

    def _give_way(self, permit: _Permit, group: _Group, index: int) -> None:
        """Others go on, with the rest of this group too, while this thread waits for something."""
        if permit.held and index + 1 < len(group.rollouts):
            self._pieces.put(_Piece(group, index + 1))
        permit.give_back()

    def _score(
        self, worker: WorkerProcess, group: _Group, index: int, give_way: Callable[[], None]
    ) -> Reward:
        rollout = group.rollouts[index]
        deadline_s = _deadline_s(group.prompt, self._settings)
        why = ""
        for _ in range(1 + RETRIES):
            try:
                return worker.score(
                    group.prompt,
                    rollout,
                    group.system,
                    group.given[index],
                    deadline_s,
                    self._patience_s,
                    give_way,
                )
            except DeadlineHit:
                late = failed(Outcome.LIMIT, f"not scored within {deadline_s:g} s")
                return stopped(late, group.prompt, rollout, group.system, self._settings)
            except WorkerDied as error:
                why = str(error)
        return unscored(f"{why}, {1 + RETRIES} times")


def longest_s(prompt: Prompt, num_answers: int, settings: RewardSettings) -> float:
    """Within which a pool that is not stuck answers some group, as long as it has any and none has
    more than `num_answers` answers; `prompt` says what scores them.

    Even if every answer hangs: a process has as many groups as there are slots for it, and an
    answer that gives way lets all of them go first.
    """
    remote = set(verifier_names(prompt, settings)) & remote_names(settings)
    each_s = (1 + RETRIES) * _deadline_s(prompt, settings)
    local_s = START_DEADLINE_S + GROUPS_PER_WORKER * num_answers * each_s
    return longest_remote_s(remote, num_answers, settings) + local_s


def _deadline_s(prompt: Prompt, settings: RewardSettings) -> float:
    """Of all verifiers that score an answer in one process, one after the other."""
    local = set(verifier_names(prompt, settings)) - remote_names(settings)
    return sum(map(settings.deadline_of, local)) or settings.deadline_s


def without_logprobs(rollout: Rollout) -> Rollout:
    """What scoring does not read is not sent: it is most of a rollout's bytes."""
    return replace(rollout, prompt_token_ids=(), rollout_logprobs=(), version_spans=())


def _closed_error() -> StageError:
    return StageError("the scorer pool is closed; score before close(), or open another")
