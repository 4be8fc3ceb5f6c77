"""An engine whose starter is killed, with nobody there to clear up behind it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STARTER = """
import asyncio, sys
from posttrain.types import PolicyVersion
from posttrain.workers.engine import VllmEngine
from posttrain.workers.settings import EngineSettings

async def main():
    settings = EngineSettings(max_model_len=64, tensor_parallel=int(sys.argv[2]))
    engine = await VllmEngine.start(sys.argv[1], PolicyVersion(0, 0), settings)
    print("started", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("devices", [1, 2])
def test_an_engine_ends_with_the_process_that_started_it(tiny_policy: Path, devices: int) -> None:
    """The core, and the workers that it has where several devices share the engine."""
    command = [sys.executable, "-c", STARTER, str(tiny_policy), str(devices)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        assert "started\n" in iter(starter.stdout.readline, "")
        children = psutil.Process(starter.pid).children(recursive=True)
        cores = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
        assert len(cores) == 1
        workers = cores[0].children(recursive=True)
        assert len(workers) >= (devices if devices > 1 else 0)
        starter.kill()
    assert psutil.wait_procs([*cores, *workers], timeout=10)[1] == []
