"""The directory that `posttrain prune` writes: taken by one process, and deleted only if ours."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from posttrain.atomic import recover
from posttrain.errors import RunDirError
from posttrain.run_dir import Lease

STORE_NAME = "store.sqlite"
MANIFEST_NAME = "manifest.json"
_LOCK_NAME = "lock"


def refuse_overlap(source: str, others: Iterable[str], out: Path) -> None:
    """What is written into a source would be read as a part of it, and what is read must not be
    replaced by what is written, or deleted by `--fresh`. Raises RunDirError."""
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise RunDirError(f"--out {out} lies in the source {source}; give a place outside of it")
    for name in (source, *others):
        if Path(name).exists() and Path(name).resolve().is_relative_to(out.resolve()):
            raise RunDirError(
                f"{name} lies in --out {out}, where it would be replaced or deleted; give another"
                " --out, or move it out of there first"
            )


class PruneDir:
    """Holds the lease while it is open. Use it as a context manager."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        """Creates it if it is not there; `fresh` deletes what is in it.

        RunDirError: it holds something that is not ours, or another process works there.
        """
        self.path = path
        if not self.is_ours and not self._is_empty():
            raise RunDirError(f"--out {path} is there and was not made by `posttrain prune`")
        path.mkdir(parents=True, exist_ok=True)
        self._lease = Lease(path / _LOCK_NAME)
        recover(path)
        if fresh:
            self._delete()

    @property
    def store_path(self) -> Path:
        return self.path / STORE_NAME

    @property
    def is_ours(self) -> bool:
        return self.store_path.is_file()

    @property
    def data_path(self) -> Path:
        return self.path / "data"

    @property
    def manifest_path(self) -> Path:
        return self.path / MANIFEST_NAME

    @property
    def card_path(self) -> Path:
        return self.path / "README.md"

    @property
    def quarantine_path(self) -> Path:
        return self.path / "quarantine.jsonl"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lease.release()

    def _is_empty(self) -> bool:
        if not self.path.exists():
            return True
        return self.path.is_dir() and all(e.name == _LOCK_NAME for e in self.path.iterdir())

    def _delete(self) -> None:
        """The store goes last: until then the directory is known as ours."""
        last = [self.store_path.with_name(STORE_NAME + end) for end in ("-wal", "-shm", "")]
        for entry in self.path.iterdir():
            if entry.name != _LOCK_NAME and entry not in last:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for file in last:
            file.unlink(missing_ok=True)
