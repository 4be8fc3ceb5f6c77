"""Writes that are whole or not there: stage in the same directory, fsync, rename.

A file or directory under construction is called `.NAME.partial`; while a directory is being
replaced, the old one is for a moment `.NAME.previous`. `recover` clears up what a killed process
left under those names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
PREVIOUS = ".previous"


def fsync_path(path: Path) -> None:
    """Bring a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, parts: str | Iterable[str]) -> None:
    """Replace `path` by a text (UTF-8), or by parts of one, of which one at a time is in memory; a
    reader sees the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines([parts] if isinstance(parts, str) else parts)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; on success it is on disk and *is* `target`.

    An existing target is replaced. On an exception the target stays as it was and what was
    written is removed; after a kill `recover` does the same. One writer per target at a time.
    """
    partial = target.with_name(f".{target.name}{PARTIAL}")
    previous = target.with_name(f".{target.name}{PREVIOUS}")
    target.parent.mkdir(parents=True, exist_ok=True)
    _settle(target)
    partial.mkdir()
    try:
        yield partial
        for directory, _, names in os.walk(partial):
            for name in names:
                fsync_path(Path(directory, name))
            fsync_path(Path(directory))
    except BaseException:
        shutil.rmtree(partial)
        raise
    # A directory cannot be renamed over another: step aside, move in, and only then delete.
    if target.exists():
        target.rename(previous)
    partial.rename(target)
    fsync_path(target.parent)
    if previous.exists():
        shutil.rmtree(previous)


def recover(root: Path) -> None:
    """Undo what killed writers left anywhere under `root`: their targets are whole afterwards.

    Only for the one process that may write there.
    """
    for kind in (PREVIOUS, PARTIAL):
        for leftover in list(root.rglob(f".*{kind}")):
            _settle(leftover.with_name(leftover.name[1 : -len(kind)]))


def _settle(target: Path) -> None:
    """Finish or undo one interrupted write of `target`."""
    partial = target.with_name(f".{target.name}{PARTIAL}")
    previous = target.with_name(f".{target.name}{PREVIOUS}")
    if previous.exists():
        if target.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(target)
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)
