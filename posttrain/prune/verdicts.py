"""The verdicts as a table of their own, one row a task."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from judges.estimators import JEFFREYS
from judges.selection import RULES
from posttrain.prune.decisions import LABELS, Decisions, Reasons, interval
from posttrain.prune.settings import PruneSettings
from posttrain.prune.shards import LineShards, ParquetShards, json_lines
from posttrain.prune.store import Store, TaskTable

CHUNK = 10_000


def write_verdicts(
    directory: Path, store: Store, tasks: TaskTable, decided: Decisions, settings: PruneSettings
) -> None:
    """Shards in the order in which the tasks first came into the store."""
    import pyarrow as pa

    index_of = np.full(int(tasks.key.max()) + 1, -1, dtype=np.int32)
    index_of[tasks.key] = np.arange(len(tasks))
    known = (
        (index_of[key], *ids, json.dumps({str(o): n for o, n in outcomes.items()}))
        for key, *ids, outcomes in store.task_facts()
        if key < len(index_of) and index_of[key] >= 0
    )
    reasons = Reasons(tasks, decided, settings)
    schema = _schema()
    as_lines = settings.format == "jsonl"
    with LineShards(directory) if as_lines else ParquetShards(directory, schema) as shards:
        while chunk := list(itertools.islice(known, CHUNK)):
            indices, task_ids, prompt_ids, outcomes = zip(*chunk, strict=True)
            at = np.array(indices)
            columns: dict[str, Any] = {
                "id": task_ids,
                "prompt_id": prompt_ids,
                "domain": np.array(tasks.domains)[tasks.domain[at]],
                "num_rows": tasks.num_rows[at],
                "kept": decided.kept[at],
                "rule": np.array(RULES)[decided.rule[at]],
                "reason": reasons.of(at),
                "undecided": decided.undecided[at],
                "value": decided.value[at],
            }
            if settings.method == "critic":
                low, high = interval(tasks.scored[at], tasks.correct[at], settings.selection)
                columns |= {
                    "label": np.array(LABELS)[decided.label[at]],
                    "samples": tasks.scored[at],
                    "correct": tasks.correct[at],
                    "outcomes": outcomes,
                    "posterior_a": JEFFREYS[0] + tasks.correct[at],
                    "posterior_b": JEFFREYS[1] + tasks.scored[at] - tasks.correct[at],
                    "low": low,
                    "high": high,
                }
            arrays = [
                pa.array(columns[field.name], field.type)
                if field.name in columns
                else pa.nulls(len(at), field.type)
                for field in schema
            ]
            table = pa.table(arrays, schema=schema)
            shards.write(json_lines(table) if as_lines else table)


def _schema() -> Any:
    import pyarrow as pa

    text, number, count = pa.string(), pa.float64(), pa.int64()
    kinds = {"id": text, "prompt_id": text, "domain": text, "num_rows": count, "kept": pa.bool_()}
    kinds |= {"rule": text, "reason": text, "undecided": pa.bool_(), "value": number}
    kinds |= {"label": text, "samples": count, "correct": count, "outcomes": text}
    kinds |= {"posterior_a": number, "posterior_b": number, "low": number, "high": number}
    return pa.schema(list(kinds.items()))
