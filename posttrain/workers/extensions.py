"""What DeepSpeed compiles on a CPU, once, before ranks can meet: what it needs for that.

torch holds a lock meanwhile: a file, which a process that is killed leaves behind, so that all
later ones would wait for ever. Who holds it is seen on this machine only; machines that share a
home directory need a TORCH_EXTENSIONS_DIR each.
"""

from __future__ import annotations

import glob
import os
import sys
import time
from pathlib import Path

from torch.utils import cpp_extension

from posttrain.progress import say

EXTENSION = "deepspeed_shm_comm"
OPEN_FILES = "/proc/[0-9]*/fd/*"
SECOND_LOOK_S = 1.0
"""Whoever gives the lock back closes the file a moment before it removes it."""


def prepare_extensions() -> None:
    """Comes before DeepSpeed starts."""
    # torch calls ninja by name, and another version would compile everything anew. The one that is
    # installed lies beside this Python, which need not be on the path.
    beside = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])
    _remove_left_lock()


def _remove_left_lock() -> None:
    """If no process on this machine has it open."""
    lock = Path(cpp_extension._get_build_directory(EXTENSION, verbose=False)) / "lock"
    if not _is_left(lock):
        return
    time.sleep(SECOND_LOOK_S)
    if _is_left(lock):
        lock.unlink(missing_ok=True)
        say(f"removed {lock}, which a process that was killed had left")


def _is_left(lock: Path) -> bool:
    try:
        found = lock.stat()
    except FileNotFoundError:
        return False
    wanted = (found.st_dev, found.st_ino)
    # Not by pathlib, whose search fails where a process ends meanwhile.
    return not any(_identity(fd) == wanted for fd in glob.iglob(OPEN_FILES))  # noqa: PTH207


def _identity(fd: str) -> tuple[int, int] | None:
    try:
        status = Path(fd).stat()
    except OSError:  # closed meanwhile, or of another user, whose extensions are not ours
        return None
    return status.st_dev, status.st_ino
