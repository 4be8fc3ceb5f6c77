"""The verdicts as a table of their own, one row a task."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from judges.estimators import posterior
from judges.selection import RULES
from posttrain.prune.decisions import LABELS, Decisions, reasons
from posttrain.prune.settings import PruneSettings
from posttrain.prune.shards import make_shards
from posttrain.prune.store import Store, TaskTable

CHUNK = 10_000


def write_verdicts(
    directory: Path, store: Store, tasks: TaskTable, decided: Decisions, settings: PruneSettings
) -> None:
    """Shards in the order in which the tasks first came into the store."""
    import pyarrow as pa

    index_of = np.full(int(tasks.key.max()) + 1, -1, dtype=np.int64)
    index_of[tasks.key] = np.arange(len(tasks))
    known = (
        (index_of[key], task_id, prompt_id, outcomes)
        for key, task_id, prompt_id, outcomes in store.task_facts()
        if key < len(index_of) and index_of[key] >= 0
    )
    reason_of = reasons(tasks, decided, settings)
    with make_shards(settings.format, directory, _schema()) as shards:
        while chunk := list(itertools.islice(known, CHUNK)):
            records = []
            for index, task_id, prompt_id, outcomes in chunk:
                a, b = posterior(int(tasks.scored[index]), int(tasks.correct[index]))
                code = int(decided.label[index])
                record: dict[str, Any] = {
                    "id": task_id,
                    "prompt_id": prompt_id,
                    "domain": tasks.domains[tasks.domain[index]],
                    "num_rows": int(tasks.num_rows[index]),
                    "kept": bool(decided.kept[index]),
                    "rule": RULES[decided.rule[index]],
                    "reason": reason_of(int(index)),
                    "undecided": bool(decided.undecided[index]),
                    "value": float(decided.value[index]),
                }
                if settings.method == "critic":
                    record |= {
                        "label": LABELS[code],
                        "samples": int(tasks.scored[index]),
                        "correct": int(tasks.correct[index]),
                        "outcomes": json.dumps({str(o): n for o, n in outcomes.items()}),
                        "posterior_a": a,
                        "posterior_b": b,
                        "low": float(decided.low[index]),
                        "high": float(decided.high[index]),
                    }
                records.append(record)
            shards.write(pa.Table.from_pylist(records, _schema()), None)


def _schema() -> Any:
    import pyarrow as pa

    text, number, count = pa.string(), pa.float64(), pa.int64()
    kinds = {"id": text, "prompt_id": text, "domain": text, "num_rows": count, "kept": pa.bool_()}
    kinds |= {"rule": text, "reason": text, "undecided": pa.bool_(), "value": number}
    kinds |= {"label": text, "samples": count, "correct": count, "outcomes": text}
    kinds |= {"posterior_a": number, "posterior_b": number, "low": number, "high": number}
    return pa.schema(list(kinds.items()))
