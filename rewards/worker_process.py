"""The parent's side of one scorer process: forked when needed, killed when late, forked anew."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from posttrain.types import Prompt, Reward, Rollout, SystemInstruction
from rewards.score import Finding
from rewards.shaping import RewardSettings
from rewards.verifiers import verifier_names
from rewards.worker_requests import AskModel, ScoreOne, StartSandbox
from rewards.worker_template import START_DEADLINE_S, Closed, Forked, Template, WorkerDied

LOW_PRIORITY = 10
"""Niceness while an answer is late: beside a busy process it gets a tenth of the processor, so a
deadline of 10 s leaves a slow but right answer a second of work. Not of programs in a sandbox,
which have a session of their own."""


class DeadlineHit(Exception):
    """The request took longer than it may; the process was killed."""


class WorkerProcess:
    """Used by one thread at a time."""

    def __init__(self, settings: RewardSettings, template: Template, closing: Connection) -> None:
        self._settings = settings
        self._template = template
        self._closing = closing
        self._process: Forked | None = None
        self._last_prompt: Prompt | None = None
        self.num_answers = 0
        """Of the process that there is."""

    def score(
        self,
        prompt: Prompt,
        rollout: Rollout,
        system: SystemInstruction | None,
        given: Mapping[str, Finding],
        deadline_s: float,
        patience_s: float,
        on_slow: Callable[[], None],
    ) -> Reward:
        """`on_slow` is called once if the answer takes longer than `patience_s`. Raises
        DeadlineHit, WorkerDied, Closed, or what the worker raised (DataError)."""
        process = self._ready_for(prompt)
        known = prompt is self._last_prompt
        self._send(
            process,
            ScoreOne(prompt=None if known else prompt, rollout=rollout, system=system, given=given),
        )
        self._last_prompt = prompt
        self.num_answers += 1
        first_s = min(patience_s, deadline_s)
        if self._arrived(process, first_s):  # as nearly all are
            quick: Reward = self._read(process)
            return quick
        if first_s < deadline_s:
            on_slow()
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PGRP, process.pid, LOW_PRIORITY)
        try:
            reward: Reward = self._receive(process, deadline_s - first_s)
        finally:
            if self._process is not None:
                self._restore_priority(process)
        return reward

    def ask_model(self, request: AskModel, deadline_s: float) -> tuple[Finding, ...]:
        """Raises DeadlineHit, WorkerDied, Closed, or what the worker raised (ModelError)."""
        if self._process is None:
            self._process = self._template.fork(None)
        self._send(self._process, request)
        findings: tuple[Finding, ...] = self._receive(self._process, deadline_s)
        return findings

    def _ready_for(self, prompt: Prompt) -> Forked:
        names = verifier_names(prompt, self._settings)
        if self._process is not None and names not in self._process.ready_for:
            self.kill()  # else it would import during the answer's time
        if self._process is None:
            self._process = self._template.fork(prompt)
            if "code" in names:  # the start of a sandbox is no answer's time either
                self._send(self._process, StartSandbox())
                self._receive(self._process, START_DEADLINE_S)
        return self._process

    def _send(self, process: Forked, request: object) -> None:
        try:
            process.connection.send_bytes(pickle.dumps(request, pickle.HIGHEST_PROTOCOL))
        except OSError as error:
            raise WorkerDied(f"the scorer process died ({self.kill()})") from error

    def _arrived(self, process: Forked, within_s: float) -> bool:
        """Whether the reply, or the end of the process, is there. Raises Closed."""
        ready = wait([process.connection, self._closing], timeout=within_s)
        if self._closing in ready:
            raise Closed
        return bool(ready)

    def _receive(self, process: Forked, deadline_s: float) -> Any:
        if not self._arrived(process, deadline_s):
            self.kill()
            raise DeadlineHit
        return self._read(process)

    def _read(self, process: Forked) -> Any:
        try:
            reply = process.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(f"the scorer process died ({self.kill()})") from error
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _restore_priority(self, process: Forked) -> None:
        """Where this user may not, the process has had its day."""
        try:
            ours = os.getpriority(os.PRIO_PROCESS, 0)
            os.setpriority(os.PRIO_PGRP, process.pid, ours)
        except (PermissionError, ProcessLookupError):
            self.kill()

    def kill(self) -> str:
        """Leaves no process behind and says how it had ended; the next request forks another."""
        process, self._process = self._process, None
        self._last_prompt = None
        self.num_answers = 0
        return "not started" if process is None else self._template.end(process)
