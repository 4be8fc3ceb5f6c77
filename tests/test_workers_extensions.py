"""What DeepSpeed compiles can be compiled, and nobody waits for a compiler that was killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from posttrain.workers import extensions
from posttrain.workers.extensions import EXTENSION, prepare_extensions

HOLDER = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", os.environ["PATH"])  # is put back
    monkeypatch.setattr(extensions, "SECOND_LOOK_S", 0.01)
    (tmp_path / EXTENSION).mkdir()
    return tmp_path / EXTENSION / "lock"


def test_a_lock_goes_with_its_holder_and_not_before(
    lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_extensions()  # nothing there
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        prepare_extensions()
        assert lock.exists()
        holder.kill()
    assert not FileBaton(str(lock)).try_acquire()  # it would be waited for without end
    assert capsys.readouterr().err == ""
    prepare_extensions()
    assert FileBaton(str(lock)).try_acquire()
    assert f"removed {lock}" in capsys.readouterr().err


def test_ninja_is_found_where_it_was_installed(
    lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # as where no environment is activated
    assert shutil.which("ninja") is None
    prepare_extensions()
    assert shutil.which("ninja") == str(Path(sys.executable).parent / "ninja")
