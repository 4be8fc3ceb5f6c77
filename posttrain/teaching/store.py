"""Targets on disk, paid for once: a directory of shards that are named after their content.

    identity.json       what they were made with
    3f…e1.safetensors   up to some hundred sequences: keys, and their records' arrays

A shard appears whole under its name or not at all, and never changes. So a pass that was killed
goes on behind its last shard, several runs read and write one store at a time, and a shard whose
content is not what its name says is known as damaged: it is left out, what was in it counts as
missing, and the next writer that makes it anew removes it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.atomic import PARTIAL, fsync_path
from posttrain.errors import StoreError
from posttrain.teaching.records import KEY_BYTES, Record

IDENTITY = "identity.json"
SUFFIX = ".safetensors"
Identity = Mapping[str, str | int | float | None]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a record stands: its shard, and the ranges of its labels and ids there."""

    shard: Path
    labels: slice
    ids: slice


@dataclass(frozen=True, slots=True)
class _Shard:
    """What is known of a whole shard without its arrays."""

    num_bytes: int
    num_labels: int
    seconds: float


class TargetStore:
    """Records by key. Open shards are memory-mapped, so a store may be larger than memory.

    Args:
        directory: made if it is not there.
        identity: all that the records depend on beside the sequence itself; plain values.

    Raises:
        StoreError: the directory was made with another identity, or holds something else.
    """

    def __init__(self, directory: Path, identity: Identity) -> None:
        self.directory = directory
        _claim(directory, identity)
        self._shards: dict[Path, _Shard] = {}
        self._places: dict[bytes, _Place] = {}
        self._open: dict[Path, Any] = {}
        self.damaged: list[Path] = []
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    @property
    def num_labels(self) -> int:
        return sum(shard.num_labels for shard in self._shards.values())

    @property
    def bytes_per_label(self) -> float | None:
        """On disk, keys and headers included; None while there is nothing."""
        total = sum(shard.num_bytes for shard in self._shards.values())
        return total / self.num_labels if self.num_labels else None

    def refresh(self) -> None:
        """Takes in what other writers have added since."""
        known = {*self._shards, *self.damaged}
        for path in sorted(self.directory.glob(f"*{SUFFIX}")):
            if path in known:
                continue
            try:
                whole = _digest_of(path) == path.stem
            except FileNotFoundError:  # damaged, and just written anew by another writer
                continue
            if whole:
                self._index(path)
            else:
                self.damaged.append(path)

    def seconds_paid(self, keys: Iterable[bytes]) -> float:
        """What the records of `keys` cost when they were made: their shards' seconds, by label."""
        paid = 0.0
        for key in keys:
            place = self._places[key]
            shard = self._shards[place.shard]
            paid += shard.seconds * (place.labels.stop - place.labels.start) / shard.num_labels
        return paid

    def read(self, key: bytes) -> Record:
        """Raises KeyError for what is missing."""
        place = self._places[key]
        arrays = self._opened(place.shard)
        names = [name.partition(".") for name in arrays.offset_keys()]
        return Record(
            per_label={
                n: arrays.get_slice(f"label.{n}")[place.labels]
                for kind, _, n in names
                if kind == "label"
            },
            per_id={
                n: arrays.get_slice(f"id.{n}")[place.ids] for kind, _, n in names if kind == "id"
            },
        )

    def write(self, records: Mapping[bytes, Record], seconds: float) -> None:
        """Adds one shard; it is on disk when this returns. `seconds` is what it cost to make."""
        from safetensors.numpy import save

        content = save(_arrays(records), metadata={"seconds": repr(seconds)})
        path = self.directory / f"{_digest(content)}{SUFFIX}"
        self._forget_damaged(path)
        partial = self.directory / f".{path.name}.{os.getpid()}{PARTIAL}"
        partial.write_bytes(content)
        fsync_path(partial)
        partial.rename(path)
        fsync_path(self.directory)
        self._index(path)

    def _forget_damaged(self, rewritten: Path) -> None:
        for path in self.damaged:
            if path != rewritten:
                path.unlink(missing_ok=True)
        self.damaged.clear()

    def _index(self, path: Path) -> None:
        arrays = self._opened(path)
        labels = np.cumsum(arrays.get_tensor("num_labels"))
        ids = np.cumsum(arrays.get_tensor("num_ids"))
        keys = arrays.get_tensor("keys").tobytes()
        label_starts = np.concatenate([[0], labels[:-1]])
        id_starts = np.concatenate([[0], ids[:-1]])
        for row in range(len(labels)):
            self._places[keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]] = _Place(
                path,
                slice(int(label_starts[row]), int(labels[row])),
                slice(int(id_starts[row]), int(ids[row])),
            )
        self._shards[path] = _Shard(
            num_bytes=path.stat().st_size,
            num_labels=int(labels[-1]),
            seconds=float(arrays.metadata()["seconds"]),
        )

    def _opened(self, path: Path) -> Any:
        from safetensors import safe_open

        if path not in self._open:
            self._open[path] = safe_open(path, framework="np")
        return self._open[path]


def check_identity(directory: Path, identity: Identity) -> None:
    """Raises StoreError if `directory` is a store of another identity, or no store at all; one that
    is not there, or is empty, has none yet."""
    if not directory.exists():
        return
    try:
        found = json.loads((directory / IDENTITY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        files = [e.name for e in directory.iterdir() if not e.name.endswith(PARTIAL)]
        if IDENTITY in files:  # somebody has claimed it since
            check_identity(directory, identity)
        elif files:
            raise StoreError(
                f"{directory} is no store of teacher targets: it has files but no {IDENTITY}; "
                "name another directory"
            ) from None
        return
    except (OSError, ValueError) as error:
        raise StoreError(f"{directory / IDENTITY} cannot be read: {error}") from error
    wanted = dict(identity)
    changed = [
        f"{name} {found.get(name)!r}, now {wanted.get(name)!r}"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]
    if changed:
        raise StoreError(
            f"{directory} was made with something else ({'; '.join(changed)}), and such targets "
            "are not mixed: name another store, or take that back"
        )


def _claim(directory: Path, identity: Identity) -> None:
    """Writes who the store belongs to, if nobody has; of several at once, the first one counts."""
    directory.mkdir(parents=True, exist_ok=True)
    check_identity(directory, identity)
    target = directory / IDENTITY
    if target.exists():
        return
    partial = directory / f".{IDENTITY}.{os.getpid()}{PARTIAL}"
    partial.write_text(json.dumps(dict(identity), indent=2) + "\n", encoding="utf-8")
    fsync_path(partial)
    try:
        os.link(partial, target)  # unlike a rename it does not replace what came in between
    except FileExistsError:
        check_identity(directory, identity)
    finally:
        partial.unlink()
    fsync_path(directory)


def _arrays(records: Mapping[bytes, Record]) -> dict[str, Any]:
    rows: Sequence[Record] = list(records.values())
    arrays = {
        "keys": np.frombuffer(b"".join(records), dtype=np.uint8).reshape(-1, KEY_BYTES),
        "num_labels": np.array([len(r.per_label["label_logprobs"]) for r in rows], dtype=np.int32),
        "num_ids": np.array([len(r.per_id["ids"]) if r.per_id else 0 for r in rows], np.int32),
    }
    for name in rows[0].per_label:
        arrays[f"label.{name}"] = np.concatenate([row.per_label[name] for row in rows])
    for name in rows[0].per_id:
        arrays[f"id.{name}"] = np.concatenate([row.per_id[name] for row in rows])
    return arrays


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
