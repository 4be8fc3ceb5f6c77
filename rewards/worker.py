"""The template of scorer processes: `python -m rewards.worker FD PARENT_PID MEMORY_LIMIT`.

It imports what verifiers need and forks a process for each socket that it is handed, so that one
that was killed is replaced in milliseconds, whatever the imports take. All speak pickles: what is
asked, answered with the result or the exception. The template is told (settings, verifiers) first.
Each ends when its socket closes, and with its parent. MEMORY_LIMIT is in bytes of address space, 0
for none. Reads only from the process that started it, so nothing unpickled crosses a trust
boundary.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

from posttrain.errors import SandboxError
from posttrain.types import Prompt
from rewards import reward_model
from rewards.sandbox import shared_sandbox
from rewards.score import Verifier
from rewards.scorer import score_rollout
from rewards.shaping import RewardSettings
from rewards.verifiers import check_reference
from rewards.worker_requests import AskModel, Check, Fork, Reap, ScoreOne, StartSandbox

_PR_SET_PDEATHSIG = 1


def main() -> None:
    control = Connection(int(sys.argv[1]))
    _die_with_parent(int(sys.argv[2]))
    _limit_memory(int(sys.argv[3]))
    try:
        settings, verifiers = control.recv()
        control.send(None)
        template = _Template(control, settings, verifiers)
        while True:
            control.send(_caught(template.answer, control.recv()))
    except (EOFError, ConnectionError):
        return


def _caught(answer: Callable[[Any], object], request: object) -> object:
    try:
        return answer(request)
    except Exception as error:
        error.add_note(f"in a scorer process:\n{traceback.format_exc()}")
        return error


class _Template:
    def __init__(
        self, control: Connection, settings: RewardSettings, verifiers: Mapping[str, Verifier]
    ) -> None:
        self._control = control
        self._settings = settings
        self._verifiers = verifiers

    def answer(self, request: Check | Fork | Reap) -> int | None:
        match request:
            case Check(prompt=prompt):
                check_reference(prompt, self._settings, self._verifiers)
                return None
            case Reap(pid=pid):
                _, status = os.waitpid(pid, 0)
                return os.waitstatus_to_exitcode(status)
            case Fork():
                return self._fork(reduction.recv_handle(self._control))

    def _fork(self, handle: int) -> int:
        template = os.getpid()
        pid = os.fork()
        if pid != 0:
            # A group, not a session: Linux shares the processor out among sessions before it looks
            # at priorities (autogroup), so what hangs would take as much as all training beside it.
            with contextlib.suppress(ProcessLookupError):
                os.setpgid(pid, pid)
            os.close(handle)
            return pid
        status = 1
        try:
            _die_with_parent(template)
            self._control.close()
            _serve(Connection(handle), self._settings, self._verifiers)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)


def _serve(
    connection: Connection, settings: RewardSettings, verifiers: Mapping[str, Verifier]
) -> None:
    last: Prompt | None = None

    def answer(request: ScoreOne | AskModel | StartSandbox) -> object:
        nonlocal last
        match request:
            case StartSandbox():
                with contextlib.suppress(SandboxError):  # each answer that needs it will say so
                    shared_sandbox(settings.code.sandbox)
                return None
            case AskModel(prompt=prompt, texts=texts, system=system):
                assert settings.reward_model is not None
                return reward_model.score_texts(prompt, texts, system, settings.reward_model)
            case ScoreOne(rollout=rollout, system=system, given=given):
                last = request.prompt or last
                assert last is not None
                return score_rollout(last, rollout, system, settings, verifiers, given)

    try:
        while True:
            connection.send(_caught(answer, connection.recv()))
    except (EOFError, ConnectionError):
        return


def _limit_memory(limit: int) -> None:
    if limit == 0:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _die_with_parent(parent: int) -> None:
    """The closed socket ends a process that waits; this also ends one that is busy in C code. The
    kernel sends the signal when the *thread* that started the process ends."""
    if sys.platform == "linux":
        prctl: Any = ctypes.CDLL(None, use_errno=True).prctl
        if prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent:  # it died before the call
            sys.exit(1)


if __name__ == "__main__":
    main()
