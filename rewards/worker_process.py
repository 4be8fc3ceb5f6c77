"""The parent's side of one scorer process: started when needed, killed when late, started anew."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from posttrain.types import Prompt, Reward, Rollout, SystemInstruction
from rewards.score import Finding, Verifier
from rewards.shaping import RewardSettings
from rewards.verifiers import verifier_names
from rewards.worker_requests import AskModel, Check, ScoreOne

START_DEADLINE_S = 60.0
"""For starting the process and for importing what a verifier needs."""

MEMORY_LIMIT = 4 << 30
"""Bytes of address space. An answer that wants more is stopped before the machine suffers."""

LOWEST_PRIORITY = 19
"""Niceness while an answer is late: what hangs must not take the processor from what does not."""

_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class DeadlineHit(Exception):
    """The request took longer than it may; the process was killed."""


class WorkerDied(Exception):
    """The process ended, or never came up; what it was asked is not known to be at fault."""


class Closed(Exception):
    """The pool is closing."""


class WorkerProcess:
    """Used by one thread at a time; every thread that has used it must outlive the process (see
    `rewards.worker`).

    Plain subprocesses rather than `multiprocessing`: that would import the caller's main module in
    every worker and leave its resource tracker running after the last of them. Each is a session
    of its own, so that whatever it started is killed with it and Ctrl-C does not reach it.
    """

    def __init__(
        self,
        settings: RewardSettings,
        verifiers: Mapping[str, Verifier],
        closing: Connection,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self._settings = settings
        self._verifiers = dict(verifiers)
        self._closing = closing
        self._memory_limit = memory_limit
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._ready_for: dict[tuple[str, ...], Prompt] = {}
        self._last_prompt: Prompt | None = None
        self.num_answers = 0

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
        self._get_ready(prompt)
        known = prompt is self._last_prompt
        self._send(
            ScoreOne(prompt=None if known else prompt, rollout=rollout, system=system, given=given)
        )
        self._last_prompt = prompt
        self.num_answers += 1
        slow = patience_s < deadline_s and not self._arrived(patience_s)
        if slow:
            on_slow()
            self._lower_priority()
        try:
            reward: Reward = self._receive(deadline_s - patience_s if slow else deadline_s)
        finally:
            if slow and self._process is not None:
                self._restore_priority(self._process.pid)
        return reward

    def ask_model(self, request: AskModel, deadline_s: float) -> tuple[Finding, ...]:
        """Raises DeadlineHit, WorkerDied, Closed, or what the worker raised (ModelError)."""
        if self._process is None:
            self._start()
        self._send(request)
        findings: tuple[Finding, ...] = self._receive(deadline_s)
        return findings

    def revive(self) -> None:
        """Starts anew and imports what was imported, before the next answer waits for it. Raises
        Closed; what else goes wrong shows again at the next answer."""
        ready_for = self._ready_for
        self._ready_for = {}
        with contextlib.suppress(WorkerDied):
            for prompt in ready_for.values():
                self._get_ready(prompt)

    @property
    def was_killed(self) -> bool:
        """Since it has last been ready."""
        return self._process is None and bool(self._ready_for)

    def _get_ready(self, prompt: Prompt) -> None:
        """Pays for start and imports outside an answer's deadline: checking the reference of the
        first prompt imports everything that its verifiers need."""
        if self._process is None:
            self._start()
        names = verifier_names(prompt, self._settings)
        if names not in self._ready_for:
            self._send(Check(prompt=prompt))
            self._receive_in_time()
            self._ready_for[names] = prompt

    def _start(self) -> None:
        self._ready_for = {}
        ours, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "rewards.worker", str(theirs.fileno())]
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._connection = ours
        try:
            self._process = subprocess.Popen(
                [*command, str(os.getpid()), str(self._memory_limit)],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the parent's stdout may carry one JSON object
                start_new_session=True,
            )
        except OSError as error:
            self.kill()
            raise WorkerDied(f"cannot start a scorer process: {error}") from error
        finally:
            theirs.close()
        self._send((self._settings, self._verifiers))
        self._receive_in_time()

    def _receive_in_time(self) -> None:
        try:
            self._receive(START_DEADLINE_S)
        except DeadlineHit as error:
            raise WorkerDied(f"not ready within {START_DEADLINE_S:.0f} s") from error

    def _send(self, request: object) -> None:
        assert self._connection is not None
        try:
            self._connection.send_bytes(pickle.dumps(request, pickle.HIGHEST_PROTOCOL))
        except OSError as error:
            raise WorkerDied(f"the scorer process died ({self.kill()})") from error

    def _arrived(self, within_s: float) -> bool:
        """Whether the reply, or the end of the process, is there. Raises Closed."""
        assert self._connection is not None
        ready = wait([self._connection, self._closing], timeout=within_s)
        if self._closing in ready:
            raise Closed
        return bool(ready)

    def _receive(self, deadline_s: float) -> Any:
        if not self._arrived(deadline_s):
            self.kill()
            raise DeadlineHit
        assert self._connection is not None
        try:
            reply = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(f"the scorer process died ({self.kill()})") from error
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _lower_priority(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PGRP, self._process.pid, LOWEST_PRIORITY)

    def _restore_priority(self, pid: int) -> None:
        """Where this user may not, the process has had its day."""
        try:
            os.setpriority(os.PRIO_PGRP, pid, os.getpriority(os.PRIO_PROCESS, 0))
        except (PermissionError, ProcessLookupError):
            self.kill()

    def kill(self) -> str:
        """Leaves no process behind and says how it had ended; the next request starts another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._last_prompt = None
        self.num_answers = 0
        if self._process is None:
            return "not started"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._process = None
        return f"exit code {code}"
