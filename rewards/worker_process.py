"""The parent's side of one scorer process: started when needed, killed when late, started anew."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from posttrain.types import Prompt, Reward, Rollout, SystemInstruction
from rewards.score import Verifier
from rewards.shaping import RewardSettings
from rewards.verifiers import verifier_name

START_DEADLINE_S = 60.0
"""For starting the process and for importing what a verifier needs."""

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
    """Owned by one thread, which must outlive the process (see `rewards.worker`).

    Plain subprocesses rather than `multiprocessing`: that would import the caller's main module in
    every worker and leave its resource tracker running after the last of them. Each is a session
    of its own, so that whatever it started is killed with it and Ctrl-C does not reach it.
    """

    def __init__(
        self, settings: RewardSettings, verifiers: Mapping[str, Verifier], closing: Connection
    ) -> None:
        self._settings = settings
        self._verifiers = dict(verifiers)
        self._closing = closing
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._ready_verifiers: set[str] = set()

    def score(
        self,
        prompt: Prompt,
        rollouts: Sequence[Rollout],
        system: SystemInstruction | None,
        deadline_s: float,
    ) -> tuple[Reward, ...]:
        """Raises DeadlineHit, WorkerDied, Closed, or what the worker raised (DataError)."""
        try:
            self._get_ready(prompt)
        except DeadlineHit as error:
            raise WorkerDied(f"not ready within {START_DEADLINE_S:.0f} s") from error
        rewards: tuple[Reward, ...] = self._ask(
            ("score", prompt, tuple(rollouts), system), deadline_s
        )
        return rewards

    def _get_ready(self, prompt: Prompt) -> None:
        """Pays for start and imports outside an answer's deadline: checking the reference of the
        first prompt imports everything that its verifier needs."""
        if self._process is None:
            self._start()
        name = verifier_name(prompt, self._settings)
        if name not in self._ready_verifiers:
            self._ask(("check", prompt), START_DEADLINE_S)
            self._ready_verifiers.add(name)

    def _start(self) -> None:
        ours, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "rewards.worker", str(theirs.fileno())]
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._connection = ours
        try:
            self._process = subprocess.Popen(
                [*command, str(os.getpid())],
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
        self._ask((self._settings, self._verifiers), START_DEADLINE_S)

    def _ask(self, request: object, deadline_s: float) -> Any:
        assert self._connection is not None
        try:
            self._connection.send_bytes(pickle.dumps(request, pickle.HIGHEST_PROTOCOL))
            ready = wait([self._connection, self._closing], timeout=deadline_s)
            if self._closing in ready:
                raise Closed
            if not ready:
                self.kill()
                raise DeadlineHit
            reply = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(f"the scorer process died ({self.kill()})") from error
        if isinstance(reply, Exception):
            raise reply
        return reply

    def kill(self) -> str:
        """Leaves no process behind and says how it had ended; the next request starts another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._ready_verifiers.clear()
        if self._process is None:
            return "not started"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._process = None
        return f"exit code {code}"
