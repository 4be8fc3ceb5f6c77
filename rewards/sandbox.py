"""Runs Python programs that nobody has vouched for, one process each, and says how they ended.

    with Sandbox(SandboxSettings()) as sandbox:
        sandbox.run(Program(source="print(input())", stdin="5")).stdout   # b"5\\n"

What a program should have written never enters the sandbox: it writes, the caller compares. So the
worst that it can do to its own score is to be wrong.
"""

from __future__ import annotations

import atexit
import json
import logging
import threading
import warnings
from collections.abc import Sequence
from functools import lru_cache
from types import TracebackType
from typing import Self

from posttrain.errors import SandboxError
from rewards.sandbox_client import Execution, Program, ZygoteClient, ZygoteDied
from rewards.sandbox_launcher import (
    BUBBLEWRAP,
    OWN,
    UNSAFE,
    Launcher,
    SandboxSettings,
    Unavailable,
)
from rewards.sandbox_probe import PROBE, Attempt, judge, targets

RETRIES = 1
"""Times that a program is run again after the zygote died or fell silent over it."""

_log = logging.getLogger(__name__)


class Sandbox:
    """A zygote in the first launcher that holds (`rewards.sandbox_zygote`), usable from any thread,
    one program at a time.

    Raises SandboxError at the start, with what each launcher lacks, unless one of them contains
    every attempt of the probe or `settings.unsafe` allows to do without. Then `launcher` is the one
    in use, `attempts` what the probe found, and `refused` says why earlier launchers are not used.
    """

    def __init__(
        self, settings: SandboxSettings, launchers: Sequence[Launcher] = (BUBBLEWRAP, OWN)
    ) -> None:
        self._settings = settings
        self._launchers = (*launchers, UNSAFE) if settings.unsafe else tuple(launchers)
        self._lock = threading.Lock()
        self._zygote: ZygoteClient | None = self._start()

    def run(self, program: Program, wall_s: float | None = None) -> Execution:
        """`wall_s` shortens the settings' own deadline. Raises SandboxError when the sandbox itself
        fails, twice: then nothing is known about the program."""
        deadline_s = min(self._settings.wall_s, wall_s or self._settings.wall_s)
        with self._lock:
            for _ in range(1 + RETRIES):
                if self._zygote is None:
                    self._zygote = self._start()
                try:
                    return self._zygote.run(program, deadline_s)
                except ZygoteDied as error:
                    why = str(error)
                    self._end()
                except BaseException:
                    self._end()  # else the next program would get this one's answer
                    raise
        raise SandboxError(
            f"the sandbox ({self.launcher.name}) failed {1 + RETRIES} times over one program: "
            f"{why}; see whether the machine is out of memory or of processes"
        )

    def close(self) -> None:
        """Ends the zygote and all that it started."""
        with self._lock:
            self._end()

    @property
    def pid(self) -> int | None:
        """Of the process that everything in the sandbox descends from; None when closed."""
        return None if self._zygote is None else self._zygote.pid

    def _start(self) -> ZygoteClient:
        refused: list[str] = []
        for launcher in self._launchers:
            try:
                zygote = ZygoteClient(launcher, self._settings)
            except (Unavailable, ZygoteDied) as error:
                refused.append(f"{launcher.name}: {error}")
                continue
            attempts = _probe(zygote, self._settings) if launcher.isolates else ()
            escaped = [f"{a.name} ({a.detail})" for a in attempts if not a.contained]
            if escaped:
                zygote.close()
                refused.append(f"{launcher.name} does not hold: {', '.join(escaped)}")
                continue
            if not launcher.isolates:
                _warn(refused)
            self.launcher, self.attempts, self.refused = launcher, attempts, tuple(refused)
            return zygote
        raise SandboxError(
            f"programs cannot be run safely on this machine ({'; '.join(refused)}). Install "
            "bubblewrap, allow user namespaces (in a container: run it with them allowed), or, if "
            "nothing on this machine needs protection, set `unsafe: true` for the sandbox (for "
            "code tasks: rewards.code.sandbox.unsafe=true)"
        )

    def _end(self) -> None:
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@lru_cache(maxsize=4)
def shared_sandbox(settings: SandboxSettings) -> Sandbox:
    """This process's sandbox for these settings, started at the first use. Raises SandboxError."""
    sandbox = Sandbox(settings)
    atexit.register(sandbox.close)
    return sandbox


def _warn(refused: Sequence[str]) -> None:
    message = (
        "UNSAFE: programs that the policy writes run WITHOUT a sandbox, with every right of this "
        "user, because the settings say `unsafe: true` and no sandbox works here "
        f"({'; '.join(refused)})"
    )
    _log.error(message)
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _probe(zygote: ZygoteClient, settings: SandboxSettings) -> tuple[Attempt, ...]:
    """What became of each attempt; of the probe as a whole, when it does not come to its end."""
    try:
        with targets(settings) as aims:
            program = Program(source=PROBE, function="attempt", arguments=(aims.as_dict(),))
            execution = zygote.run(program, settings.wall_s)
    except ZygoteDied as error:
        return (Attempt("the probe", contained=False, detail=str(error)),)
    if execution.failure is not None:
        return (Attempt("the probe", contained=False, detail=execution.failure),)
    return judge(json.loads(execution.result))
