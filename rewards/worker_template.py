"""The parent's side of the template that scorer processes are forked from (`rewards.worker`)."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import Pipe, reduction
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from posttrain.types import Prompt
from rewards.sandbox_launcher import MAX_MEMORY_MB
from rewards.score import Verifier
from rewards.shaping import RewardSettings
from rewards.verifiers import verifier_names
from rewards.worker_requests import Check, Fork, Reap

START_DEADLINE_S = 60.0
"""For starting the template and for importing what a verifier needs."""

MEMORY_LIMIT = MAX_MEMORY_MB << 20
"""Bytes of address space of a process. An answer that wants more is stopped before the machine
suffers."""

_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}

Names = tuple[str, ...]
"""Verifiers that a prompt needs."""


class WorkerDied(Exception):
    """A process ended, or never came up; what it was asked is not known to be at fault."""


class Closed(Exception):
    """The pool is closing."""


@dataclass(frozen=True, slots=True)
class Forked:
    """A process, the socket that it answers on, and the verifiers that it has imported."""

    pid: int
    connection: Connection
    ready_for: frozenset[Names]
    template_pid: int


class Template:
    """Usable from any thread. The thread that starts the process, the first that forks, must
    outlive it (see `rewards.worker`).

    A plain subprocess rather than `multiprocessing`: that would import the caller's main module and
    leave its resource tracker running. Everything forked is a process group of its own, so that
    whatever it started is killed with it and Ctrl-C does not reach it.
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
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Connection | None = None
        self._ready_for: frozenset[Names] = frozenset()

    def fork(self, prompt: Prompt | None) -> Forked:
        """A process that is ready for `prompt`: checking the reference of the first prompt of its
        kind imports everything that its verifiers need. Raises WorkerDied, Closed, or what that
        check raised (DataError)."""
        with self._lock:
            if self._process is None:
                self._start()
            if prompt is not None:
                names = verifier_names(prompt, self._settings)
                if names not in self._ready_for:
                    self._ask(Check(prompt=prompt))
                    self._ready_for |= {names}
            ours, theirs = Pipe()
            try:
                pid = self._ask(Fork(), theirs)
            except BaseException:
                ours.close()
                raise
            finally:
                theirs.close()
            assert self._process is not None
            return Forked(pid, ours, self._ready_for, self._process.pid)

    def end(self, forked: Forked) -> str:
        """Kills the process and all that it started, and says how it had ended."""
        forked.connection.close()
        with self._lock:
            if self._process is None or self._process.pid != forked.template_pid:
                return "with its template"  # and its number may be another's by now
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(forked.pid, signal.SIGKILL)
            try:
                return f"exit code {self._ask(Reap(pid=forked.pid), until_closed=False)}"
            except WorkerDied:
                return "with its template"

    def kill(self) -> None:
        """Leaves no process behind; the next fork starts another template."""
        with self._lock:
            self._kill()

    def _start(self) -> None:
        ours, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "rewards.worker", str(theirs.fileno())]
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._control = ours
        try:
            self._process = subprocess.Popen(
                [*command, str(os.getpid()), str(self._memory_limit)],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the parent's stdout may carry one JSON object
                process_group=0,  # no session of its own: see `rewards.worker`
            )
        except OSError as error:
            self._kill()
            raise WorkerDied(f"cannot start a scorer process: {error}") from error
        finally:
            theirs.close()
        self._ask((self._settings, self._verifiers))

    def _ask(
        self, request: object, handle: Connection | None = None, *, until_closed: bool = True
    ) -> Any:
        assert self._control is not None and self._process is not None
        try:
            self._control.send_bytes(pickle.dumps(request, pickle.HIGHEST_PROTOCOL))
            if handle is not None:
                reduction.send_handle(self._control, handle.fileno(), self._process.pid)
            awaited = [self._control, self._closing] if until_closed else [self._control]
            ready = wait(awaited, timeout=START_DEADLINE_S)
            if self._control not in ready:
                self._kill()
                if ready:
                    raise Closed
                raise WorkerDied(f"not ready within {START_DEADLINE_S:.0f} s")
            reply = self._control.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(f"the scorer process died ({self._kill()})") from error
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _kill(self) -> str:
        if self._control is not None:
            self._control.close()
            self._control = None
        self._ready_for = frozenset()
        if self._process is None:
            return "not started"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._process = None
        return f"exit code {code}"
