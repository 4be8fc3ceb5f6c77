"""What works on this machine, by trying it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import SandboxError
from rewards.sandbox import Sandbox
from rewards.sandbox_launcher import SandboxSettings

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "trl", "accelerate", "peft", "datasets")
IMPORTS = {
    "vLLM engine": "import vllm; print(vllm.__version__)",
    "DeepSpeed": "import deepspeed; print(deepspeed.__version__)",
    "TRL trainers": "from trl import DPOTrainer, SFTTrainer; import trl; print(trl.__version__)",
    "reasoning-gym": "import reasoning_gym; print('loads')",
    "math-verify": "import math_verify; print('loads')",
}
IMPORT_DEADLINE_S = 120
NEEDED_GIB = 7.0
"""What the system sees of 8 GB: a kernel and its devices take their part."""


@dataclass(frozen=True)
class Finding:
    """`works` is None where something is optional and not there."""

    name: str
    works: bool | None
    detail: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """Tries everything; takes half a minute, because the engines are really imported."""
    return [
        Finding("Python", sys.version_info >= (3, 11), sys.version.split()[0]),
        Finding("CPU cores", True, str(os.cpu_count())),
        _memory(),
        _gpu(),
        *(_package(name) for name in PACKAGES),
        *(_imports(name, code) for name, code in IMPORTS.items()),
        _compiler(),
        _shared_memory(),
        examine_sandbox(),
    ]


def _memory() -> Finding:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding("memory", gib >= NEEDED_GIB, f"{gib:.1f} GiB (a machine of 8 GB suffices)")


def _gpu() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("GPU", None, f"not known without torch: {error}")
    if not torch.cuda.is_available():
        return Finding("GPU", None, "none; everything runs on CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("GPU", True, ", ".join(names))


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed; `make install`")


def _imports(name: str, code: str) -> Finding:
    """In a process of its own: engines leave threads and patches behind."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            timeout=IMPORT_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(name, False, f"did not import within {IMPORT_DEADLINE_S} s")
    output = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return Finding(name, done.returncode == 0, output[-1] if output else "no output")


def _compiler() -> Finding:
    path = shutil.which("g++")
    return Finding("g++", path is not None, path or "not found; DeepSpeed compiles an operator")


def _shared_memory() -> Finding:
    directory = Path("/dev/shm")
    if not directory.is_dir():
        return Finding("shared memory", False, "/dev/shm is not there; weights are published in it")
    free = shutil.disk_usage(directory).free / 2**30
    return Finding("shared memory", free > 0.1, f"{free:.1f} GiB free")


def examine_sandbox() -> Finding:
    """None where there is no sandbox: only code tasks need one, and they refuse to run without."""
    try:
        with Sandbox(SandboxSettings()) as sandbox:
            escapes = f"{len(sandbox.attempts)} attempts to get out, all failed"
            detail = "; ".join([sandbox.launcher.name, escapes, *sandbox.refused])
            return Finding("sandbox", True, detail)
    except SandboxError as error:
        return Finding("sandbox", None, str(error))
