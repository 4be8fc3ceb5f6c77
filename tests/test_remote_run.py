"""A run that is copied to a URL: what comes there, in which order, and how it goes on from it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest

from posttrain.config import RunSettings
from posttrain.errors import RunDirError, SettingsError, StageError
from posttrain.lease import Lease
from posttrain.ledger import Ledger
from posttrain.remote_run import COPIES, LOCK, RAY_JOB, RemoteCopy, run_place


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/far/run"
    else:
        yield f"memory://{uuid4().hex}/run"


def there(url: str) -> dict[str, str]:
    """What lies at the URL, but for the marks of copying itself."""
    fs, root = fsspec.core.url_to_fs(url)
    found = {str(f)[len(str(root).rstrip("/")) + 1 :]: f for f in fs.find(root)}
    return {
        name: fs.cat_file(file).decode(errors="replace")
        for name, file in found.items()
        if name not in (COPIES, LOCK, "config.yaml")
    }


def remote(url: str, path: Path, deadline_s: float = 60.0) -> RemoteCopy:
    return RemoteCopy(url, path, deadline_s)


def push(copy: RemoteCopy) -> None:
    asyncio.run(copy.push())


SETTINGS = "format: posttrain run 3\n"


def fill(path: Path, **files: str) -> Path:
    """A run with these files, `__` for a slash."""
    for name, text in {**files, "config.yaml": SETTINGS}.items():
        target = path / name.replace("__", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return path


class TestPlace:
    def test_a_path_is_where_the_run_is(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        place = run_place(RunSettings(dir="runs/a"))
        assert (place.path, place.url) == (tmp_path / "runs" / "a", None)

    def test_a_url_is_worked_on_elsewhere(self, tmp_path: Path) -> None:
        place = run_place(RunSettings(dir="s3://b/runs/a", work_dir=str(tmp_path)))
        assert (place.path, place.url) == (tmp_path, "s3://b/runs/a")
        places = [run_place(RunSettings(dir=f"s3://{b}/runs/a")).path for b in ("b", "c", "b")]
        assert places[0] == places[2] != places[1]
        assert places[0].is_absolute()
        assert places[0].name.startswith("a-")

    @pytest.mark.parametrize(
        ("settings", "key"),
        [
            ({"dir": "runs/a"}, "run.dir: runs/a is relative"),
            ({"dir": "s3://b/a", "work_dir": "w"}, "run.work_dir: w is relative"),
        ],
    )
    def test_a_ray_job_takes_no_relative_directory(
        self, settings: dict[str, str], key: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_place(RunSettings(**settings))
        monkeypatch.setenv(RAY_JOB, "{}")
        with pytest.raises(SettingsError, match=key):
            run_place(RunSettings(**settings))
        assert run_place(RunSettings(dir="/data/runs/a")).path == Path("/data/runs/a")

    def test_a_work_directory_needs_a_url(self) -> None:
        with pytest.raises(SettingsError, match=r"run\.work_dir: w would hold nothing"):
            run_place(RunSettings(dir="runs/a", work_dir="w"))


def test_what_changed_is_copied_and_what_is_gone_is_removed(url: str, tmp_path: Path) -> None:
    run = fill(tmp_path / "run", manifest_json="1", rl__a="x", rl__b="y", lock="held")
    fill(run, **{"ledger.sqlite-wal": "w", "superseded__rl-1": "s", "rl__.c.partial__d": "z"})
    copy = remote(url, run)
    with copy.driven(fresh=False):
        push(copy)
        assert there(url) == {"manifest_json": "1", "rl/a": "x", "rl/b": "y"}
        (run / "rl" / "b").unlink()
        fill(run, rl__a="changed")
        push(copy)
        assert there(url) == {"manifest_json": "1", "rl/a": "changed"}


def test_pointers_come_last_and_a_torn_copy_keeps_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{uuid4().hex}/run"
    run = fill(
        tmp_path, **{"manifest.json": "old", "rl__latest.json": "1", "rl__checkpoint-1": "w"}
    )
    copy = remote(url, run)
    with copy.driven(fresh=False):
        push(copy)
        fill(run, **{"manifest.json": "new", "rl__latest.json": "2", "rl__checkpoint-2": "w"})
        fill(run, zzz="last by name")
        put: list[str] = []
        put_file = copy._fs.put_file

        def breaks_off(source: str, target: str) -> None:
            if source.endswith("zzz"):
                raise OSError("the line is dead")
            put.append(Path(source).name)
            put_file(source, target)

        monkeypatch.setattr(copy._fs, "put_file", breaks_off)
        with pytest.raises(StageError, match=r"could not be brought up to date .*the line is dead"):
            push(copy)
        assert put == ["config.yaml", "checkpoint-2"]
        assert there(url)["manifest.json"] == "old"
        assert there(url)["rl/latest.json"] == "1"
        (run / "zzz").unlink()
        put.clear()
        push(copy)
        assert put == ["latest.json", "manifest.json"]  # the checkpoint is there already


def test_a_run_goes_on_elsewhere_from_the_copy(url: str, tmp_path: Path) -> None:
    first = remote(url, fill(tmp_path / "first", **{"manifest.json": "1", "rl__a": "x"}))
    ledger = Ledger(tmp_path / "first" / "ledger.sqlite")
    with first.driven(fresh=False):
        ledger.flush()
        push(first)
    ledger.close()
    second = remote(url, tmp_path / "second")
    with second.driven(fresh=False):
        assert (tmp_path / "second" / "rl" / "a").read_text() == "x"
        with sqlite3.connect(tmp_path / "second" / "ledger.sqlite") as connection:
            tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
        connection.close()
        assert ("draws",) in tables
        fill(tmp_path / "second", **{"manifest.json": "2", "rl__b": "y"})
        push(second)
    # The first machine is behind now, and what it has that is not in the copy counts no more.
    fill(tmp_path / "first", rl__c="mine alone", **{"superseded__rl-1__weights": "never deleted"})
    again = remote(url, tmp_path / "first")
    with again.driven(fresh=False):
        assert (tmp_path / "first" / "manifest.json").read_text() == "2"
        assert (tmp_path / "first" / "rl" / "b").read_text() == "y"
        assert not (tmp_path / "first" / "rl" / "c").exists()
        kept = tmp_path / "first" / "superseded" / "rl-1" / "weights"
        assert kept.read_text() == "never deleted"


def test_the_same_machine_goes_on_without_copying_anything_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{uuid4().hex}/run"
    run = fill(tmp_path, **{"manifest.json": "1", "rl__a": "x"})
    copy = remote(url, run)
    with copy.driven(fresh=False):
        push(copy)
    (run / "rl" / "uncopied").write_text("y")  # as a driver that was killed leaves it
    again = remote(url, run)
    put: list[str] = []
    put_file = again._fs.put_file
    monkeypatch.setattr(again._fs, "put_file", lambda s, t: (put.append(s), put_file(s, t)))
    with again.driven(fresh=False):
        assert (run / "rl" / "uncopied").exists()
        push(again)
    assert put == [str(run / "rl" / "uncopied")]


def test_one_driver_at_a_time(url: str, tmp_path: Path) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    mark = f"{str(root).rstrip('/')}/{LOCK}"
    copy = remote(url, fill(tmp_path / "run", a="b"))
    alive = {"host": socket.gethostname(), "pid": os.getppid()}
    for other in (alive, {"host": "elsewhere", "pid": 1}):
        fs.makedirs(mark.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(mark, json.dumps(other).encode())
        with (
            pytest.raises(RunDirError, match=f"pid {other['pid']} on host {other['host']}"),
            copy.driven(fresh=False),
        ):
            pass
        assert json.loads(fs.cat_file(mark)) == other
    fs.pipe_file(mark, json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}).encode())
    with copy.driven(fresh=False):  # that one was killed
        assert json.loads(fs.cat_file(mark))["pid"] == os.getpid()
    assert not fs.exists(mark)


@pytest.mark.parametrize("fresh", [False, True])
def test_what_is_not_ours_is_left_alone(url: str, tmp_path: Path, fresh: bool) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    for name, text in (("thesis.tex", "mine"), ("config.yaml", "mine: all")):
        fs.makedirs(str(root), exist_ok=True)
        fs.pipe_file(f"{str(root).rstrip('/')}/{name}", text.encode())
        before = there(url)
        copy = remote(url, fill(tmp_path / "run", a="b"))
        with (
            pytest.raises(RunDirError, match="holds no run of posttrain"),
            copy.driven(fresh=fresh),
        ):
            pass
        assert there(url) == before


def test_fresh_empties_the_copy(url: str, tmp_path: Path) -> None:
    copy = remote(url, fill(tmp_path / "run", a="b"))
    with copy.driven(fresh=False):
        push(copy)
    with copy.driven(fresh=True):
        assert there(url) == {}


def test_what_cannot_be_written_or_is_unknown_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match=r"cannot be read .*Not a directory"):
        remote(f"file://{tmp_path}/file/run", tmp_path / "run").check_usable()
    with pytest.raises(SettingsError, match=r"run\.dir: zorp://a"):
        remote("zorp://a", tmp_path)


class TestAnotherStateHere:
    def test_what_is_worked_on_for_one_url_is_not_gone_on_with_for_another(
        self, url: str, tmp_path: Path
    ) -> None:
        run = fill(tmp_path / "run", **{"manifest.json": "of the first"})
        copy = remote(url, run)
        with copy.driven(fresh=False):
            push(copy)
        with remote(f"{url}/", run).driven(fresh=False):
            pass  # the same
        other = remote(f"memory://{uuid4().hex}/other", run)
        for fresh in (False, True):
            with (
                pytest.raises(RunDirError, match=f"work_dir: {url} is worked on in {run}; give"),
                other.driven(fresh=fresh),
            ):
                pass
        assert there(other._url) == {}
        assert (run / "manifest.json").read_text() == "of the first"

    def test_a_newer_copy_does_not_replace_what_a_driver_is_at_work_on(
        self, url: str, tmp_path: Path
    ) -> None:
        ahead = remote(url, fill(tmp_path / "ahead", **{"manifest.json": "1"}))
        with ahead.driven(fresh=False):
            push(ahead)
        run = fill(tmp_path / "run", **{"manifest.json": "at work"})
        lease = Lease(run / "lock")
        with (
            pytest.raises(RunDirError, match="is being driven"),
            remote(url, run).driven(fresh=False),
        ):
            pass
        lease.release()
        assert (run / "manifest.json").read_text() == "at work"


def test_a_download_that_breaks_off_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{uuid4().hex}/run"
    first = remote(url, fill(tmp_path / "first", **{"manifest.json": "1", "rl__a": "x"}))
    with first.driven(fresh=False):
        push(first)
    second = remote(url, tmp_path / "second")
    get_file = second._fs.get_file

    def breaks_off(source: str, target: str) -> None:
        if target.endswith("manifest.json"):
            raise OSError("the line is dead")
        get_file(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(second._fs, "get_file", breaks_off)
        with pytest.raises(StageError, match="the line is dead"), second.driven(fresh=False):
            pass
    assert not (tmp_path / "second" / "manifest.json").exists()
    with second.driven(fresh=False):
        assert (tmp_path / "second" / "manifest.json").read_text() == "1"
        push(second)
    assert there(url) == {"manifest.json": "1", "rl/a": "x"}


def test_a_copy_that_hangs_is_given_up_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the process need not wait for it to end."""
    copy = remote(f"memory://{uuid4().hex}/run", fill(tmp_path, a="b"), deadline_s=0.2)
    released = threading.Event()
    with copy.driven(fresh=False):
        # All that is asked of it from here on.
        monkeypatch.setattr(copy._fs, "put_file", lambda *_: released.wait(60))
        monkeypatch.setattr(copy._fs, "rm_file", lambda *_: released.wait(60))
        began = time.monotonic()
        with pytest.raises(StageError, match=r"not up to date after 0\.2 s.*run\.copy_deadline_s"):
            push(copy)
        assert time.monotonic() - began < 10
        (hanging,) = [thread for thread in threading.enumerate() if thread.name == "copy"]
        assert hanging.daemon
    assert time.monotonic() - began < 10
    # Another driver would be overwritten by what is still under way.
    assert copy._fs.exists(f"{copy._root}/{LOCK}")
    assert f"{LOCK} stays" in capsys.readouterr().err
    released.set()
    hanging.join(60)


def test_an_older_copy_gets_the_ledger_too(url: str, tmp_path: Path) -> None:
    run = fill(tmp_path / "run", **{"manifest.json": "1"})
    Ledger(run / "ledger.sqlite").close()
    copy = remote(url, run)
    with copy.driven(fresh=False):
        push(copy)
        copy._delete()  # somebody empties the bucket
    assert there(url) == {}
    again = remote(url, run)
    with again.driven(fresh=False):
        push(again)
    assert set(there(url)) == {"manifest.json", "ledger.sqlite"}
