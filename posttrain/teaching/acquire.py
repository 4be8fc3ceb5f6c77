"""Every sequence gets its targets: what is stored costs nothing, the rest is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from posttrain.progress import Progress, say
from posttrain.teaching.records import Record, TokenSequence
from posttrain.teaching.store import TargetStore

SHARD_SEQUENCES = 512
"""What a pass that is killed loses at most, and what a damaged shard costs."""

Ask = Callable[[Sequence[TokenSequence]], Sequence[Record]]
"""A model's word on sequences, in order."""
Load = Callable[[], Ask]
"""Loads that model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AcquireReport:
    """What a pass came to. `seconds` were spent asking, the model's start included; `seconds_saved`
    is what the hits cost when they were made. `hit_rate` counts distinct sequences."""

    sequences: int
    labels: int
    hits: int
    hit_rate: float
    seconds: float
    seconds_saved: float
    bytes_per_label: float | None
    damaged_shards: int


def acquire(
    sequences: Sequence[TokenSequence], store: TargetStore, load: Load, label: str
) -> AcquireReport:
    """Afterwards every sequence with a label is in `store`. The model is loaded only for what is
    missing, and what it says is on disk shard by shard: a pass that was killed goes on."""
    wanted = {s.key: s for s in sequences if s.num_labels}
    damaged = len(store.damaged)
    if damaged:
        say(f"{label}: {damaged} damaged shards in {store.directory} are left out and made anew")
    missing = {key: s for key, s in wanted.items() if key not in store}
    hits = wanted.keys() - missing.keys()
    saved = store.seconds_paid(hits)
    began = time.perf_counter()
    if missing:
        say(f"{label}: {len(hits)} of {len(wanted)} sequences are stored, {len(missing)} are asked")
        _ask_for(missing, store, load, label)
    else:
        say(f"{label}: all of {len(wanted)} sequences are stored, nothing is loaded")
    return AcquireReport(
        sequences=len(wanted),
        labels=sum(s.num_labels for s in wanted.values()),
        hits=len(hits),
        hit_rate=len(hits) / len(wanted) if wanted else 1.0,
        seconds=time.perf_counter() - began,
        seconds_saved=saved,
        bytes_per_label=store.bytes_per_label,
        damaged_shards=damaged,
    )


def _ask_for(
    missing: dict[bytes, TokenSequence], store: TargetStore, load: Load, label: str
) -> None:
    progress = Progress(label, -(-len(missing) // SHARD_SEQUENCES))
    began = time.perf_counter()
    ask = load()
    for keys in _shards(list(missing)):
        records = ask([missing[key] for key in keys])
        # The first shard bears the model's start: whoever finds it stored saves that too.
        now = time.perf_counter()
        store.write(dict(zip(keys, records, strict=True)), seconds=now - began)
        began = now
        progress.advance()


def _shards(keys: list[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(keys), SHARD_SEQUENCES):
        yield keys[start : start + SHARD_SEQUENCES]


def wait_for(sequences: Sequence[TokenSequence], store: TargetStore, poll_s: float = 1.0) -> None:
    """Until another process has stored all of them."""
    keys = {s.key for s in sequences if s.num_labels}
    while any(key not in store for key in keys):
        time.sleep(poll_s)
        store.refresh()
