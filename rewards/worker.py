"""What runs inside a scorer process: `python -m rewards.worker FD PARENT_PID MEMORY_LIMIT`.

It speaks pickles over one inherited socket: first it receives (settings, verifiers), then
requests, and answers each with the result or the exception. It ends when the socket closes.
MEMORY_LIMIT is in bytes of address space, 0 for none. Reads only from the process that started it,
so nothing unpickled crosses a trust boundary.
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
from typing import Any

from posttrain.types import Prompt, Reward
from rewards import reward_model
from rewards.score import Finding, Verifier
from rewards.scorer import score_rollout
from rewards.shaping import RewardSettings
from rewards.verifiers import check_reference
from rewards.worker_requests import AskModel, Check, Request, ScoreOne

_PR_SET_PDEATHSIG = 1


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    _die_with_parent(int(sys.argv[2]))
    _limit_memory(int(sys.argv[3]))
    try:
        settings, verifiers = connection.recv()
        server = _Server(settings, verifiers)
        connection.send(None)
        while True:
            connection.send(server.answer(connection.recv()))
    except (EOFError, ConnectionError):
        return


class _Server:
    """Remembers the last prompt: the answers to it come one by one."""

    def __init__(self, settings: RewardSettings, verifiers: Mapping[str, Verifier]) -> None:
        self._settings = settings
        self._verifiers = verifiers
        self._prompt: Prompt | None = None

    def answer(self, request: Request) -> object:
        try:
            return self._answer(request)
        except Exception as error:
            error.add_note(f"in a scorer process:\n{traceback.format_exc()}")
            return error

    def _answer(self, request: Request) -> Reward | tuple[Finding, ...] | None:
        match request:
            case Check(prompt=prompt):
                check_reference(prompt, self._settings, self._verifiers)
                return None
            case AskModel(prompt=prompt, texts=texts, system=system):
                assert self._settings.reward_model is not None
                return reward_model.score_texts(prompt, texts, system, self._settings.reward_model)
            case ScoreOne(rollout=rollout, system=system, given=given):
                self._prompt = request.prompt or self._prompt
                assert self._prompt is not None
                return score_rollout(
                    self._prompt, rollout, system, self._settings, self._verifiers, given
                )


def _limit_memory(limit: int) -> None:
    if limit == 0:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
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
