"""Ctrl-C and SIGTERM during RL: the last whole step becomes a checkpoint, then the stage ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from posttrain.errors import Interrupted
from posttrain.online.metrics import StepRecord
from posttrain.progress import say
from posttrain.types import Learner, TrainingBatch


class StopWithCheckpoint:
    """Stands between the loop and its learner, to know when the learner's weights are those of a
    step that is on record; waits for a signal beside the loop.

    Args:
        on_step: what follows a step.
        save: makes a checkpoint of the last step on record, unless there is one; returns its step,
            None if there is nothing to save.
    """

    def __init__(
        self,
        learner: Learner,
        on_step: Callable[[StepRecord], Awaitable[None]],
        save: Callable[[], Awaitable[int | None]],
    ) -> None:
        self._learner = learner
        self._on_step = on_step
        self._save = save
        self._requested: str | None = None
        self._asked = asyncio.Event()
        self._on_record = asyncio.Event()
        self._on_record.set()

    async def step(self, batch: TrainingBatch) -> Mapping[str, float]:
        if self._requested is not None:
            await asyncio.Event().wait()  # the stage is ending: no further step begins
        self._on_record.clear()
        return await self._learner.step(batch)

    async def after_step(self, record: StepRecord) -> None:
        await self._on_step(record)
        self._on_record.set()

    async def run(self) -> None:
        """A loop beside training.

        Raises:
            Interrupted: a signal came, and the checkpoint is on disk.
        """
        await self._asked.wait()
        await self._on_record.wait()
        step = await self._save()
        raise self._interrupted(
            "before its first step" if step is None else f"with a checkpoint of step {step}"
        )

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile the first signal asks for an orderly end; the next one has its usual effect.

        Raises:
            Interrupted: the stage was just ending by itself when a signal came.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are for another thread to handle
            return
        loop = asyncio.get_running_loop()
        usual = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

        def stop(number: int, _: Any) -> None:
            _handle(usual)
            self._requested = signal.Signals(number).name
            loop.call_soon_threadsafe(self._ask)

        _handle(dict.fromkeys(usual, stop))
        try:
            yield
        finally:
            _handle(usual)
        if self._requested is not None:
            raise self._interrupted("after its last step")

    def _ask(self) -> None:
        say(
            f"{self._requested}: stops after the step under way, with a checkpoint; again: stops "
            "at once"
        )
        self._asked.set()

    def _interrupted(self, when: str) -> Interrupted:
        return Interrupted(f"rl stopped by {self._requested} {when}; the same command goes on")


def _handle(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
