"""Programs a second through the sandbox, one at a time, beside what starting Python anew costs.

    python tests/benchmarks/sandbox_throughput.py

CPU time is that of everything that takes part, this process included. It is what bounds many
workers, and it is the same on a busy machine; the wall-clock is not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from posttrain.data.prompts import make_prompt
from posttrain.errors import SandboxError
from rewards import code
from rewards.sandbox import Sandbox
from rewards.sandbox_client import Program
from rewards.sandbox_launcher import BUBBLEWRAP, OWN, SandboxSettings

RUNS = 300
SUM = "a, b = map(int, input().split())\nprint(a + b)"
ANSWER = f"```python\n{SUM}\n```"
TASK = make_prompt(
    "Add two numbers.",
    reference={"cases": [{"input": f"{n} 1\n", "output": f"{n + 1}\n"} for n in range(10)]},
    domain="programs",
)


def cpu_seconds(pid: int) -> float:
    """Of a process, of those that it has waited for, and of its living children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(cpu_seconds(int(child)) for child in children)


def measure(name: str, run: Callable[[], object], times: int) -> None:
    run()
    wall, cpu = time.perf_counter(), cpu_seconds(os.getpid())
    for _ in range(times):
        run()
    wall, cpu = time.perf_counter() - wall, cpu_seconds(os.getpid()) - cpu
    print(f"{name:34}{times / wall:8.0f} a second{1e3 * cpu / times:10.2f} ms CPU each", flush=True)


def main() -> None:
    settings = SandboxSettings()
    for launcher in (OWN, BUBBLEWRAP):
        try:
            sandbox = Sandbox(settings, launchers=[launcher])
        except SandboxError as error:
            print(f"{launcher.name}: {error}")
            continue
        with sandbox:
            one = partial(sandbox.run, Program(source=SUM, stdin="1 2"))
            measure(f"{launcher.name}, programs", one, RUNS)
            ten = partial(code.score_with, sandbox.run, TASK, ANSWER, code.CodeSettings())
            measure(f"{launcher.name}, answers of 10 cases", ten, RUNS // 10)
    python = [os.path.realpath(sys._base_executable), "-I", "-S", "-c"]  # type: ignore[attr-defined]
    measure("Python anew, no isolation", partial(execute, [*python, SUM]), RUNS // 3)
    imports = "import bisect, collections, heapq, itertools, json, math, re\n"
    measure("with common imports", partial(execute, [*python, imports + SUM]), RUNS // 3)


def execute(command: list[str]) -> None:
    subprocess.run(command, input=b"1 2", capture_output=True, check=True)


if __name__ == "__main__":
    main()
