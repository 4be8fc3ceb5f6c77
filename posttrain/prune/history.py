"""Why a row was kept or dropped: all that a prune directory knows about a prompt."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from posttrain.errors import DataError, RunDirError
from posttrain.prune.columns import Task
from posttrain.prune.directory import MANIFEST_NAME, STORE_NAME
from posttrain.prune.store import Sampled, Store


def is_prune_dir(path: Path) -> bool:
    return (path / STORE_NAME).is_file()


def history(path: Path, wanted: str) -> list[str]:
    """Lines for a person. `wanted` is a row's number (from 1), a task's id (`prune_id`) or a
    prompt's.

    Raises DataError for what is not there, RunDirError for a directory without a finished pass.
    """
    manifest_path = path / MANIFEST_NAME
    if not manifest_path.exists():
        raise RunDirError(f"{path} is not finished: start `posttrain prune` on it again first")
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    with closing(Store(path / STORE_NAME)) as store:
        lines: list[str] = []
        if wanted.isdigit() and len(wanted) < 16:  # ids have 16 hex digits
            row = int(wanted) - 1
            lines += _about_row(store, row)
            key = store.task_of(row)
            found = [] if key is None else [(key, store.task(key))]
        else:
            found = store.find(wanted)
        for key, task in found:
            lines += _about_task(path, store, key, task, manifest)
    if not lines:
        raise DataError(f"--prompt {wanted}: {path} has no row, task or prompt of that name")
    return lines


def _about_row(store: Store, row: int) -> Iterator[str]:
    for number, _, details in store.quarantined():
        if number == row:
            yield f"row {row + 1} ({details['file']}, row {details['row']}): {details['reason']}"
    for number, other, drops, shared in store.overlaps():
        if number == row:
            what = "dropped" if drops else "noted"
            yield f"row {row + 1}: {what} because it shares {shared!r} with {other}"


def _about_task(
    path: Path, store: Store, key: int, task: Task, manifest: dict[str, Any]
) -> Iterator[str]:
    rows = store.rows_of(key)
    numbers = ", ".join(str(row + 1) for row in rows) or "none of the source as it is now"
    yield f"task {task.task_id}, rows {numbers}"
    for message in task.prompt.messages:
        yield f"  {message.role}: {message.content}"
    if task.prompt.reference is not None:
        yield f"  reference: {task.prompt.reference!r}"
    critic = manifest["judged_with"]["critic"]
    yield f"  critic {critic['model']}, fingerprint {critic['fingerprint']}"
    for sample in store.samples(key):
        yield f"  {_clock(sample.at)} {_found(sample)}"
    verdict = _verdict(path, task.task_id)
    if verdict is None:
        yield "  has no verdict: its rows are held out, or no longer in the source"
        return
    if verdict["label"] is not None:
        yield (
            f"  posterior Beta({verdict['posterior_a']:g}, {verdict['posterior_b']:g}):"
            f" {manifest['metric']} {verdict['value']:.3f}, 95% {verdict['low']:.3f} to"
            f" {verdict['high']:.3f}, {verdict['label']}"
        )
    action = "kept" if verdict["kept"] else "dropped"
    unsure = ", undecided at this confidence" if verdict["undecided"] else ""
    yield f"  {action} by {verdict['rule']}: {verdict['reason']}{unsure}"


def _found(sample: Sampled) -> str:
    if isinstance(sample.found, dict):
        parts = ", ".join(f"{name} {value}" for name, value in sample.found.items())
        return f"scored from {sample.tokens} tokens: {parts}"
    right = sum(outcome == "correct" for outcome, _ in sample.found)
    ends = ", ".join(f"{outcome} …{text!r}" for outcome, text in sample.found)
    return f"{right} of {len(sample.found)} answers right: {ends}"


def _verdict(path: Path, task_id: str) -> dict[str, Any] | None:
    """From the shards that were written last, without reading the others' columns."""
    import pyarrow.dataset as ds

    files = sorted((path / "data" / "verdicts").iterdir())
    form = "parquet" if files[0].suffix == ".parquet" else "json"
    found = ds.dataset(files, format=form).to_table(filter=ds.field("id") == task_id)
    rows: list[dict[str, Any]] = found.to_pylist()
    return rows[0] if rows else None


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
