"""What runs inside a scorer process: `python -m rewards.worker FD PARENT_PID`.

It speaks pickles over one inherited socket: first it receives (settings, verifiers), then
requests, and answers each with the result or the exception. It ends when the socket closes.
Reads only from the process that started it, so nothing unpickled crosses a trust boundary.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, Literal

from posttrain.types import Prompt, Reward, Rollout, SystemInstruction
from rewards.score import Verifier
from rewards.scorer import score_rollouts
from rewards.shaping import RewardSettings
from rewards.verifiers import check_reference

CheckRequest = tuple[Literal["check"], Prompt]
ScoreRequest = tuple[Literal["score"], Prompt, tuple[Rollout, ...], SystemInstruction | None]
Request = CheckRequest | ScoreRequest

MEMORY_LIMIT = 4 << 30
"""Bytes of address space. An answer that wants more is stopped before the machine suffers."""

_PR_SET_PDEATHSIG = 1


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    _die_with_parent(int(sys.argv[2]))
    _limit_memory()
    try:
        settings, verifiers = connection.recv()
        connection.send(None)
        while True:
            connection.send(_answer(connection.recv(), settings, verifiers))
    except (EOFError, ConnectionError):
        return


def _answer(
    request: Request, settings: RewardSettings, verifiers: Mapping[str, Verifier]
) -> tuple[Reward, ...] | Exception | None:
    try:
        if request[0] == "check":
            check_reference(request[1], settings, verifiers)
            return None
        _, prompt, rollouts, system = request
        return score_rollouts(prompt, rollouts, system, settings, verifiers)
    except Exception as error:
        error.add_note(f"in a scorer process:\n{traceback.format_exc()}")
        return error


def _limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _die_with_parent(parent: int) -> None:
    """The closed socket ends a worker that waits; this also ends one that is busy in C code. The
    kernel sends the signal when the *thread* that started the worker ends."""
    if sys.platform == "linux":
        prctl: Any = ctypes.CDLL(None, use_errno=True).prctl
        if prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent:  # it died before the call
            sys.exit(1)


if __name__ == "__main__":
    main()
