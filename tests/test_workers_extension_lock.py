"""A process that was killed while torch compiled an extension for it keeps nobody waiting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from posttrain.workers import extension_lock
from posttrain.workers.extension_lock import EXTENSION, remove_left_lock

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
    monkeypatch.setattr(extension_lock, "SECOND_LOOK_S", 0.01)
    (tmp_path / EXTENSION).mkdir()
    return tmp_path / EXTENSION / "lock"


def test_a_lock_goes_with_its_holder_and_not_before(
    lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remove_left_lock()  # nothing there
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        remove_left_lock()
        assert lock.exists()
        holder.kill()
    assert not FileBaton(str(lock)).try_acquire()  # it would be waited for without end
    assert capsys.readouterr().err == ""
    remove_left_lock()
    assert FileBaton(str(lock)).try_acquire()
    assert f"removed {lock}" in capsys.readouterr().err
