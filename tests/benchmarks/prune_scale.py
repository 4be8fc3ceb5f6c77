"""Another threshold for a set that is judged already: seconds and memory by number of rows.

    python tests/benchmarks/prune_scale.py [ROWS …]

Each size runs in a process of its own. *select* loads the counts and decides; *write* writes the
kept rows, all rows annotated, and the verdicts. Seconds are by the clock and, which tells more on a
busy machine, of the processor; memory is the process's peak, and what it was before the first step.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from posttrain.prune.columns import Task
from posttrain.prune.decisions import decide
from posttrain.prune.figures import figures
from posttrain.prune.output import Annotator, row_table, write_rows
from posttrain.prune.settings import PruneSettings
from posttrain.prune.source import open_source
from posttrain.prune.store import Store
from posttrain.prune.verdicts import write_verdicts
from posttrain.types import Message, Prompt

SIZES = (100_000, 1_000_000)
BATCH = 10_000
TEXT = "an answer that explains in a few sentences how it came to what it says, " * 3


def build(directory: Path, size: int) -> None:
    """A Parquet source and a store with the verdicts of a critic on all of it."""
    store = Store(directory / "store.sqlite")
    with store.transaction():
        for start in range(0, size, BATCH):
            store.add_rows(list(_tasks(start, min(start + BATCH, size))))
    store.close()
    _judge(directory / "store.sqlite", size)
    schema = pa.schema([("question", pa.string()), ("completion", pa.string())])
    with pq.ParquetWriter(directory / "source.parquet", schema) as writer:
        for start in range(0, size, BATCH):
            count = min(BATCH, size - start)
            columns = [[f"question {start + i}" for i in range(count)], [TEXT] * count]
            writer.write_table(pa.table(columns, schema=schema))


def _tasks(start: int, end: int) -> Iterator[tuple[int, Task]]:
    for number in range(start, end):
        messages = (Message(role="user", content=f"question {number}"),)
        prompt = Prompt(
            prompt_id=f"{number:016x}", messages=messages, reference="1", domain=f"d{number % 8}"
        )
        yield number, Task(task_id=prompt.prompt_id, prompt=prompt, completion=TEXT)


def _judge(path: Path, size: int) -> None:
    import sqlite3

    rng = np.random.default_rng(0)
    asked = rng.choice([4, 8, 12, 16], size)
    right = rng.binomial(asked, rng.beta(0.6, 0.6, size))
    with sqlite3.connect(path) as connection:
        connection.executemany(
            "UPDATE tasks SET correct = ?, wrong = ? WHERE task = ?",
            (
                (int(c), int(n - c), i + 1)
                for i, (n, c) in enumerate(zip(asked, right, strict=True))
            ),
        )


def measure(directory: Path) -> dict[str, float]:
    settings = PruneSettings.model_validate(
        {
            "source": {"path": str(directory / "source.parquet")},
            "critic": {"model": "m"},
            "selection": {"easy_above": 0.8},
        }
    )
    before = _peak_mib()
    store = Store(directory / "store.sqlite")
    began = _clocks()
    tasks = store.tasks()
    decided = decide(tasks, settings)
    selected = _clocks()
    peak_of_selecting = _peak_mib()
    rows = row_table(store, tasks)
    source = open_source(settings.source.path)
    target = Path(tempfile.mkdtemp(dir=directory))
    annotator = Annotator(store, tasks, rows, decided, settings)
    write_rows(target, source, rows, annotator, decided.kept, form="parquet")
    write_verdicts(target / "verdicts", store, tasks, decided, settings)
    found = figures(store, tasks, rows, decided, settings)
    written = _clocks()
    assert found["rows"]["kept"] == int(decided.kept.sum())
    store.close()
    return {
        "rows": len(tasks),
        "select_s": round(selected[0] - began[0], 2),
        "select_cpu_s": round(selected[1] - began[1], 2),
        "write_s": round(written[0] - selected[0], 2),
        "write_cpu_s": round(written[1] - selected[1], 2),
        "before_mib": round(before),
        "select_mib": round(peak_of_selecting),
        "write_mib": round(_peak_mib()),
    }


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(size: int) -> dict[str, Any]:
    """Builds and measures in separate processes: a peak is for good."""
    with tempfile.TemporaryDirectory() as directory:
        for step in ("build", "measure"):
            command = [sys.executable, __file__, step, directory, str(size)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        return dict(json.loads(done.stdout))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["build", directory, size]:
            build(Path(directory), int(size))
        case ["measure", directory, _]:
            print(json.dumps(measure(Path(directory))))
        case sizes:
            for size in map(int, sizes or SIZES):
                print(json.dumps(run(size)), flush=True)
