"""Teachers in processes of their own: a copy is one actor, or several that share its weights."""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from posttrain.errors import EngineError
from posttrain.progress import say
from posttrain.teaching.records import Record, TokenSequence
from posttrain.teaching.settings import TargetSettings
from posttrain.workers.cluster import (
    create_actor,
    refuse_more_than_there_is,
    stop_actor,
    wait_until_ready,
)
from posttrain.workers.demand import Demand
from posttrain.workers.settings import TeacherPoolSettings
from posttrain.workers.workload import Workload

if TYPE_CHECKING:
    from posttrain.workers.teacher import CausalTeacher, FloatArray


class TeacherActor:
    """One rank of a `CausalTeacher` behind Ray. All ranks of a copy are told `ready` together."""

    def __init__(self, settings: TeacherPoolSettings, rank: int) -> None:
        self._settings = settings
        self._rank = rank
        self._teacher: CausalTeacher | None = None

    def address(self) -> str:
        """Where the ranks may meet, if this is the first of them."""
        from posttrain.workers.learner_config import free_address

        return free_address()

    def ready(self, model: str, address: str) -> None:
        """With `model`, in the place of the one before."""
        from posttrain.workers.teacher import CausalTeacher

        # Before there is a second one in memory: layers that ranks share refer to themselves.
        self._teacher = None
        gc.collect()
        self._teacher = CausalTeacher(model, self._settings, rank=self._rank, address=address)

    def targets(self, sequences: Sequence[TokenSequence], settings: TargetSettings) -> list[Record]:
        return self._running.targets(sequences, settings)

    def label_logprobs(
        self, sequences: Sequence[TokenSequence], temperature: float
    ) -> list[FloatArray]:
        return self._running.label_logprobs(sequences, temperature)

    @property
    def _running(self) -> CausalTeacher:
        assert self._teacher is not None, "ready() comes first"
        return self._teacher


class TeacherPool:
    """Asks whichever copy is free. Its methods block and may be called from several threads; with
    the event loop `score` does.

    All of them raise EngineError when a copy died or was late more often than may be.
    """

    def __init__(self, model: str, settings: TeacherPoolSettings, deadline_s: float) -> None:
        """Every copy is ready.

        Raises:
            SettingsError: the cluster has fewer devices than the copies need.
            PlacementError: they were not free in time.
            ModelError: the model cannot be loaded or divided.
        """
        self._settings = settings
        self._model = model
        self._deadline_s = deadline_s
        self._copies: list[_Copy] = []
        self._free: queue.SimpleQueue[_Copy] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._failures = 0
        self.tokens = 0
        """Read for `score` so far."""
        copies = settings.replicas * settings.tensor_parallel
        refuse_more_than_there_is([Demand(role="teacher", count=copies, each=settings)])
        self._threads = ThreadPoolExecutor(settings.replicas, thread_name_prefix="teacher")
        try:
            for _ in range(settings.replicas):
                self._copies.append(self._start_copy())
                self._free.put(self._copies[-1])
        except BaseException:
            self.stop()
            raise

    def targets(self, sequences: Sequence[TokenSequence], settings: TargetSettings) -> list[Record]:
        """See `CausalTeacher.targets`; the copies share the sequences."""
        return self._shared("targets", sequences, settings)

    def label_logprobs(
        self, sequences: Sequence[TokenSequence], temperature: float
    ) -> list[FloatArray]:
        """See `CausalTeacher.label_logprobs`; the copies share the sequences."""
        return self._shared("label_logprobs", sequences, temperature)

    async def score(
        self, sequences: Sequence[TokenSequence], temperature: float
    ) -> list[FloatArray]:
        """`label_logprobs` by one copy. Cancelled, the copy finishes first and is not heard."""
        loop = asyncio.get_running_loop()
        asking = partial(self._ask, "label_logprobs", sequences, temperature)
        scores: list[FloatArray] = await loop.run_in_executor(self._threads, asking)
        self.tokens += sum(len(sequence.token_ids) for sequence in sequences)
        return scores

    def idle_share(self) -> float:
        """Of the copies' time since this was last asked, the share in which nobody asked them."""
        return fmean(copy.workload.idle_share() for copy in self._copies)

    def load(self, model: str) -> None:
        """From now on every copy answers for `model`, in the processes that there are. Raises as
        the constructor; nobody may be asking meanwhile."""
        self._model = model
        self._failures = 0  # a model's own, as those of a pool
        for copy in self._copies:
            copy.load(model)

    def stop(self) -> None:
        self._stopped.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for copy in self._copies:
            copy.stop()

    def _start_copy(self) -> _Copy:
        return _Copy(self._model, self._settings, self._deadline_s)

    def _shared(self, method: str, sequences: Sequence[TokenSequence], how: Any) -> list[Any]:
        count = self._settings.replicas
        shares = [list(sequences[i::count]) for i in range(count)]
        asked = [self._threads.submit(self._ask, method, share, how) for share in shares if share]
        answers: list[Any] = [None] * len(sequences)
        for number, answer in enumerate(asked):
            answers[number::count] = answer.result()
        return answers

    def _ask(self, method: str, sequences: Sequence[TokenSequence], how: Any) -> list[Any]:
        copy = self._free.get()
        try:
            while True:
                try:
                    return copy.ask(method, sequences, how)
                except EngineError as error:
                    copy.stop()
                    self._failures += 1
                    if self._stopped.is_set() or self._failures > self._settings.max_restarts:
                        raise
                    say(f"teacher: {error}; started again")
                    lost, copy = copy, self._start_copy()
                    self._copies[self._copies.index(lost)] = copy
                    if self._stopped.is_set():  # meanwhile, and without this copy
                        copy.stop()
                        raise
        finally:
            self._free.put(copy)


class _Copy:
    """The ranks that share one set of weights: asked together, ended together."""

    def __init__(self, model: str, settings: TeacherPoolSettings, deadline_s: float) -> None:
        self.workload = Workload()
        self._settings = settings
        self._start_deadline_s = deadline_s
        self._ranks = [
            create_actor(
                TeacherActor,
                settings,
                rank,
                resources=settings,
                environment={"OMP_NUM_THREADS": str(settings.threads)},
            )
            for rank in range(settings.tensor_parallel)
        ]
        try:
            self.load(model)
        except BaseException:
            self.stop()
            raise

    def load(self, model: str) -> None:
        """In the place of the model before, if there is one."""
        ends_at = time.monotonic() + self._start_deadline_s
        name, settings = TeacherActor.__name__, self._settings
        first = self._ranks[0].address.remote()
        (address,) = wait_until_ready([first], name, settings, self._start_deadline_s)
        ready = [rank.ready.remote(model, address) for rank in self._ranks]
        wait_until_ready(ready, name, settings, ends_at - time.monotonic())

    def ask(self, method: str, sequences: Sequence[TokenSequence], how: Any) -> list[Any]:
        self.workload.add(len(sequences))
        try:
            calls = [getattr(rank, method).remote(sequences, how) for rank in self._ranks]
            answers: list[list[Any]] = ray.get(calls, timeout=self._settings.deadline_s)
        except RayTaskError as error:
            raise error.cause from error
        except RayActorError as error:
            raise EngineError(f"a teacher died: {error}") from error
        except GetTimeoutError as error:
            raise EngineError(
                f"a teacher did not answer within {self._settings.deadline_s:g} s "
                "(resources.teacher.deadline_s)"
            ) from error
        finally:
            self.workload.add(-len(sequences))
        return answers[0]

    def stop(self) -> None:
        for rank in self._ranks:
            stop_actor(rank)
