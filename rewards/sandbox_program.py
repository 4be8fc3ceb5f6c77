"""What the forked process inside the sandbox does: run the program and, if asked, one function.

Nothing here decides whether an answer is right, and nothing here knows: the program shares this
process and may change whatever it likes in it. What it can reach is its own output.

Imported inside the sandbox: the standard library only.
"""

from __future__ import annotations

import atexit
import json
import os
import site
import sys
import traceback
from types import ModuleType
from typing import Any, NoReturn

NOT_PYTHON = 65
"""Exit code of a program that does not compile (EX_DATAERR)."""

PRELOADED = (
    "array", "bisect", "cmath", "collections", "contextlib", "copy", "dataclasses", "datetime",
    "decimal", "enum", "fractions", "functools", "heapq", "io", "itertools", "json", "math",
    "operator", "queue", "random", "re", "statistics", "string", "textwrap", "threading", "time",
    "typing",
)  # fmt: skip
"""Modules that programs often import: loaded once, inherited by every fork."""

_NOT_COMPILED = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)


def run(job: dict[str, Any], result_fd: int) -> NoReturn:
    """Ends the process as Python would have ended it, without taking the interpreter down.

    `job` has the program's `source` and, for a function call, `function` and `arguments`; what it
    returns is written to `result_fd` as JSON.
    """
    code = [1]
    # Called last of all, behind whatever the program registers.
    atexit.register(_leave, code)
    site.setquit()  # exit() and quit(), which start-up without `site` leaves out
    try:
        program = compile(job["source"], "<answer>", "exec", dont_inherit=True)
    except _NOT_COMPILED:
        traceback.print_exc(limit=0)
        code[0] = NOT_PYTHON
        sys.exit()
    module = ModuleType("__main__" if job["function"] is None else "answer")
    sys.modules[module.__name__] = module
    sys.argv = ["answer.py"]
    try:
        exec(program, module.__dict__)
        if job["function"] is not None:
            value = _find(module, job["function"])(*job["arguments"])
            _write(result_fd, json.dumps(value, default=_plain).encode())
        code[0] = 0
    except SystemExit as request:
        code[0] = _exit_code(request.code)
    except BaseException:
        traceback.print_exc()
    sys.exit()


def _leave(code: list[int]) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # full, closed, or no stream any more
            code[0] = code[0] or 1
    os._exit(code[0])


def _exit_code(code: Any) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _find(module: ModuleType, name: str) -> Any:
    """`f`, or `Solution.f`: a class on the way is instantiated."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found() if isinstance(found, type) else found, part)
    return found


def _plain(value: object) -> Any:
    """What JSON has no word for, as the list or number that the tests can hold."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__} cannot be compared")


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
