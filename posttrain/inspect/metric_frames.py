"""Steps, re-screenings and held-out curves, from metrics.jsonl and the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from posttrain.inspect.columns import ACCURACY, RESCREENS, STAGES, STEPS
from posttrain.run_dir import StageRecord

Record = Mapping[str, Any]
TRAINED_BY_TRL = ("sft", "dpo")


def steps_frame(records: Iterable[Record]) -> pl.DataFrame:
    """`steps` from surviving records."""
    rows = [_row(r) for r in records if "event" not in r and r.get("step") is not None]
    by_step: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        by_step.setdefault((row["stage"], row["step"]), {}).update(row)
    rows = list(by_step.values())
    if not rows:
        return STEPS.empty()
    further = {name: pl.Float64 for row in rows for name in row if name not in STEPS.columns}
    frame = pl.DataFrame(rows, schema={**STEPS.schema, **further}, strict=False)
    return frame.with_columns(pl.col("step_s").cum_sum().over("stage").alias("elapsed_s"))


def _row(record: Record) -> dict[str, Any]:
    """Without tables and texts, which have no column of numbers."""
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
    stage = record["stage"]
    if stage in TRAINED_BY_TRL:
        numbers = {n if n == "step" else f"trainer/{n}": value for n, value in numbers.items()}
    return {"stage": stage, **numbers}


def rescreens_frame(records: Iterable[Record]) -> pl.DataFrame:
    rows = [{k: r[k] for k in RESCREENS.columns} for r in records if r.get("event") == "rescreen"]
    return pl.DataFrame(rows, schema=RESCREENS.schema)


def stages_frame(stages: Mapping[str, StageRecord], steps: pl.DataFrame) -> pl.DataFrame:
    rows = [
        {
            "stage": name,
            "state": record.state,
            "seconds": _seconds(name, record, steps),
            "pass@1": _summary(record).get("all", {}).get("pass@1", {}).get("mean"),
            "metrics": json.dumps({k: v for k, v in record.metrics.items() if k != "evaluation"}),
        }
        for name, record in stages.items()
    ]
    return pl.DataFrame(rows, schema=STAGES.schema)


def accuracy_frame(
    records: Iterable[Record], stages: Mapping[str, StageRecord], steps: pl.DataFrame
) -> pl.DataFrame:
    """`accuracy`: at the end of each stage, and during RL where it was evaluated.

    `elapsed_s` counts the seconds of finished stages; what a failed attempt did and another did
    again counts once. A stage that is not among `stages` counts not at all, unless none is known.
    """
    rows: list[dict[str, Any]] = []
    began: dict[str, float] = {}
    elapsed = 0.0
    for name, record in stages.items():
        began[name] = elapsed
        seconds = _seconds(name, record, steps)
        if seconds is not None:
            elapsed += seconds
            rows += _rows(_summary(record), name, None, elapsed)
    loop_s = {
        (stage, step): seconds
        for stage, step, seconds in steps.select("stage", "step", "elapsed_s").iter_rows()
    }
    for event in records:
        if event.get("event") == "evaluation" and (not stages or event["stage"] in stages):
            at = (event["stage"], event["step"])
            seconds = loop_s.get(at)
            since = None if seconds is None else began.get(at[0], 0.0) + seconds
            rows += _rows(event, *at, since)
    return pl.DataFrame(rows, schema=ACCURACY.schema)


def _seconds(name: str, record: StageRecord, steps: pl.DataFrame) -> float | None:
    """Of a finished stage. An attempt that was killed recorded none: its steps tell of it."""
    if record.state != "done" or record.seconds is None:
        return None
    of_steps: list[float] = (
        steps.filter(pl.col("stage") == name)["elapsed_s"].drop_nulls().to_list()
    )
    return max([record.seconds, *of_steps])


def _rows(
    summary: Record, stage: str, step: int | None, elapsed_s: float | None
) -> list[dict[str, Any]]:
    if "all" not in summary:
        return []
    by_domain = {"all": summary["all"], **summary["domains"]}
    return [
        {"stage": stage, "step": step, "elapsed_s": elapsed_s, "domain": domain, "metric": metric}
        | dict(estimate)
        for domain, metrics in by_domain.items()
        for metric, estimate in metrics.items()
    ]


def _summary(record: StageRecord) -> Record:
    found: Record = record.metrics.get("evaluation", {})
    return found
