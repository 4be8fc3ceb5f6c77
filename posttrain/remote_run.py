"""A run whose directory is a URL: worked on on a local disk, copied whenever there is more to keep.

`run.dir` may be anything that fsspec knows (`s3://bucket/runs/a`, `gs://…`, `file:///mnt/…`). What
is copied: settings, manifest, metrics, evaluations, rollouts, policies, checkpoints, and a snapshot
of the ledger. Pointers come last (`rl/latest.json`, then `manifest.json`), so that a copy that
breaks off leaves the older state whole. Started anywhere else, the run goes on from the copy.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.atomic import PARTIAL, PREVIOUS, write_atomically
from posttrain.config import RunSettings
from posttrain.errors import RunDirError, SettingsError, StageError
from posttrain.lease import Lease
from posttrain.ledger import LedgerReader
from posttrain.ledger_schema import connect_readonly
from posttrain.progress import say
from posttrain.run_dir import KIND, RunDir

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for what `ray job submit` starts."""

POINTERS = ("rl/latest.json", "manifest.json")
COPIES = "copies.json"
"""How often the run was copied, which says which of two states is the later one; on the local disk
also where to, and what (size and time of each file)."""
CONFIG = "config.yaml"
LOCK = "driver.json"
LEDGER = "ledger.sqlite"
STAYS = ("lock", LEDGER, "superseded", COPIES)
HERE_ALONE = ("lock", "superseded")
"""What a newer copy does not replace: it never holds them."""


@dataclass(frozen=True, kw_only=True)
class RunPlace:
    """Where a run is worked on, and the URL that it is copied to, if any."""

    path: Path
    url: str | None


def run_place(settings: RunSettings) -> RunPlace:
    """SettingsError for a relative directory in a Ray job, whose working directory is an upload
    that is thrown away, and for a `work_dir` without a URL."""
    is_url = "://" in settings.dir
    if settings.work_dir is not None and not is_url:
        raise SettingsError(
            f"run.work_dir: {settings.work_dir} would hold nothing, since run.dir = {settings.dir} "
            "is no URL; leave it out"
        )
    named = settings.work_dir if is_url else settings.dir
    if named is None:
        name = f"{settings.dir.rstrip('/').rpartition('/')[2]}-{_short_hash(settings.dir)}"
        return RunPlace(path=Path.home() / ".cache" / "posttrain" / name, url=settings.dir)
    if RAY_JOB in os.environ and not Path(named).is_absolute():
        key = "run.work_dir" if is_url else "run.dir"
        raise SettingsError(
            f"{key}: {named} is relative, and a Ray job's working directory is an upload that is "
            "thrown away; give an absolute path on a disk that every node sees, or a URL"
        )
    return RunPlace(path=Path(named).absolute(), url=settings.dir if is_url else None)


def check_place(settings: RunSettings) -> None:
    """Whether a run can be started or gone on with there; leaves no trace.

    Raises:
        SettingsError: as `run_place`, or a URL of no known file system.
        RunDirError: something else is there, or nothing can be written.
    """
    place = run_place(settings)
    RunDir(place.path).check_usable()
    if place.url is not None:
        RemoteCopy(place.url, place.path, settings.copy_deadline_s).check_usable()


class RemoteCopy:
    """The copy of the run in `path` at `url`. One driver at a time may write there. Bringing it up
    to date may take `deadline_s`.

    Raises:
        SettingsError: no such file system, or its package is not installed.
    """

    def __init__(self, url: str, path: Path, deadline_s: float) -> None:
        import fsspec

        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise SettingsError(f"run.dir: {url}: {error}") from error
        self._root = str(root).rstrip("/")
        self._url = url.rstrip("/")
        self._path = path
        self._deadline_s = deadline_s
        self._copied: dict[str, list[int]] = {}
        self._pushing = False

    def check_usable(self) -> None:
        """RunDirError if something else is there or here, or nothing can be written; leaves no
        trace."""
        worked_on = self._read_copies().get("url", self._url)
        if worked_on != self._url:
            raise RunDirError(
                f"run.work_dir: {worked_on} is worked on in {self._path}; give {self._url} another"
            )
        with self._named(RunDirError, "cannot be read"):
            names = {str(f).rstrip("/").rpartition("/")[2] for f in self._listed()} - {LOCK}
            settings = f"{self._root}/{CONFIG}"
            head = self._fs.cat_file(settings)[:200] if CONFIG in names else b""
        if names and not head.startswith(f"format: {KIND} ".encode()):
            raise RunDirError(
                f"run.dir: {self._url} is there and holds no run of posttrain; choose another"
            )
        probe = f"{self._root}/.probe-{socket.gethostname()}-{os.getpid()}"
        with self._named(RunDirError, "cannot be written"):
            self._put_text(probe, "")
            self._fs.rm_file(probe)

    @contextmanager
    def driven(self, *, fresh: bool) -> Iterator[None]:
        """Keeps other drivers out, and brings the local state up to the copy's.

        RunDirError if another driver has it, or the local directory is another URL's. A driver
        that was killed, or whose copying hangs, leaves its mark: on its own machine that is seen,
        elsewhere a person must say that it is gone.
        """
        self.check_usable()
        self._take()
        try:
            if fresh:
                self._delete()
            else:
                self._catch_up()
            yield
        finally:
            if self._pushing:
                say(f"{self._url}/{LOCK} stays: this process may still be writing there")
            else:
                with self._named(StageError, "cannot be given back"):
                    self._fs.rm_file(f"{self._root}/{LOCK}")

    async def push(self) -> None:
        """Copies what is new since the last time.

        StageError if it cannot be written, or not in time: what is on the local disk is whole.
        """
        self._pushing = True
        try:
            async with asyncio.timeout(self._deadline_s):
                await _in_a_daemon(self._push)
        except TimeoutError as error:
            raise StageError(
                f"run.dir: {self._url} was not up to date after {self._deadline_s:g} s; the run is "
                f"worked on in {self._path}. If the copy only needs longer, raise "
                "run.copy_deadline_s"
            ) from error

    def _push(self) -> None:
        try:
            self._push_files()
        finally:
            self._pushing = False

    def _push_files(self) -> None:
        with (
            self._named(StageError, "could not be brought up to date"),
            _ledger_snapshot(self._path) as ledger,
        ):
            files = self._files()
            pointers = [name for name in POINTERS if name in files]
            for name in sorted(files.keys() - pointers, key=lambda n: (n != CONFIG, n)):
                self._put(name, files[name])
            if ledger is not None:
                self._fs.put_file(str(ledger), f"{self._root}/{LEDGER}")
            for name in pointers:
                self._put(name, files[name])
            for name in [name for name in self._copied if name not in files]:
                self._fs.rm_file(f"{self._root}/{name}")
                del self._copied[name]
            count = self._count_here() + 1
            self._put_text(f"{self._root}/{COPIES}", json.dumps({"count": count}))
        self._write_copies(count)

    def _listed(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            return list(self._fs.ls(self._root, detail=False))
        except FileNotFoundError:
            return []

    def _take(self) -> None:
        mark = f"{self._root}/{LOCK}"
        own = {"host": socket.gethostname(), "pid": os.getpid()}
        if self._fs.exists(mark):
            other = json.loads(self._fs.cat_file(mark))
            elsewhere = other["host"] != own["host"]
            if elsewhere or (other != own and Path(f"/proc/{other['pid']}").exists()):
                raise RunDirError(
                    f"{self._url} is being driven by pid {other['pid']} on host {other['host']}; "
                    f"wait for it or stop it. If it was killed, delete {self._url}/{LOCK}"
                )
        self._put_text(mark, json.dumps(own))

    def _catch_up(self) -> None:
        there = self._count_there()
        if there == self._count_here():
            self._copied = self._read_copies().get("files", {})
            return
        if there < self._count_here():
            return  # the copy was deleted or restored from a backup: all of it is copied anew
        say(f"{self._url} is newer than {self._path} and is brought here")
        self._path.mkdir(parents=True, exist_ok=True)
        lease = Lease(self._path / "lock")
        try:
            self._bring(there)
        finally:
            lease.release()

    def _bring(self, count: int) -> None:
        for entry in list(self._path.iterdir()):
            if entry.name not in HERE_ALONE:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        with self._named(StageError, "cannot be read"):
            for file in self._fs.find(self._root):
                name = str(file)[len(self._root) + 1 :]
                # Our own count is written last: until then nothing here counts as whole.
                if name not in (LOCK, COPIES):
                    target = self._path / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._fs.get_file(file, str(target))
        self._copied = {name: _state(file) for name, file in self._files().items()}
        self._write_copies(count)

    def _read_copies(self) -> dict[str, Any]:
        file = self._path / COPIES
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def _write_copies(self, count: int) -> None:
        content = {"url": self._url, "count": count, "files": self._copied}
        write_atomically(self._path / COPIES, json.dumps(content))

    def _count_here(self) -> int:
        return int(self._read_copies().get("count", 0))

    def _count_there(self) -> int:
        file = f"{self._root}/{COPIES}"
        return int(json.loads(self._fs.cat_file(file))["count"]) if self._fs.exists(file) else 0

    def _files(self) -> dict[str, Path]:
        found = {}
        for file in sorted(self._path.rglob("*")):
            name = file.relative_to(self._path)
            unfinished = any(part.endswith((PARTIAL, PREVIOUS)) for part in name.parts)
            if file.is_file() and not unfinished and not name.parts[0].startswith(STAYS):
                found[name.as_posix()] = file
        return found

    def _put(self, name: str, file: Path) -> None:
        state = _state(file)
        if self._copied.get(name) != state:
            target = f"{self._root}/{name}"
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(file), target)
            self._copied[name] = state

    def _put_text(self, target: str, text: str) -> None:
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(target, text.encode())

    def _delete(self) -> None:
        self._copied = {}
        with self._named(RunDirError, "cannot be emptied"):
            # The settings go last: by them a run whose deletion breaks off is still known as ours.
            for file in sorted(self._fs.find(self._root), key=lambda f: str(f).endswith(CONFIG)):
                if not str(file).endswith(f"/{LOCK}"):
                    self._fs.rm_file(file)

    @contextmanager
    def _named(self, kind: type[RunDirError] | type[StageError], what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every file system has errors of its own
            raise kind(
                f"run.dir: {self._url} {what} ({type(error).__name__}: {error}); the run is worked "
                f"on in {self._path}"
            ) from error


@contextmanager
def _ledger_snapshot(path: Path) -> Iterator[Path | None]:
    """Of the run's ledger as far as it is flushed; None if there is none."""
    ledger = path / LEDGER
    if not ledger.exists():
        yield None
        return
    with (
        tempfile.TemporaryDirectory() as directory,
        LedgerReader(connect_readonly(ledger)) as reader,
    ):
        snapshot = Path(directory) / LEDGER
        reader.snapshot(snapshot)
        yield snapshot


async def _in_a_daemon(work: Callable[[], None]) -> None:
    """`work` in a thread that nobody waits for when the process ends, however long it hangs."""
    ended: Future[None] = Future()
    ended.set_running_or_notify_cancel()  # from here on it is not cancelled, only given up

    def run() -> None:
        try:
            work()
        except BaseException as error:
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=run, daemon=True, name="copy").start()
    await asyncio.wrap_future(ended)


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
