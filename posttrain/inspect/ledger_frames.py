"""Draws and verdicts from the ledger, also while it is written."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl

from posttrain.errors import DataError
from posttrain.inspect.columns import DRAWS, VERDICTS
from posttrain.ledger_schema import VOID_VERDICTS, connect_readonly
from posttrain.types import Outcome

CHUNK = 50_000
"""Rows that are Python objects at a time: what bounds memory beside the frames themselves."""

_OPENED = """
    SELECT d.draw_id, d.prompt_id, d.domain, d.system, a.stage, d.attempt, d.drawn_at_step,
           CAST(d.at * 1e6 AS INTEGER)
    FROM draws d JOIN attempts a USING (attempt) WHERE d.void_by IS NULL ORDER BY d.seq"""
_OPENED_SCHEMA = {
    **dict.fromkeys(("draw_id", "prompt_id", "domain", "system", "stage"), pl.String),
    **dict.fromkeys(("attempt", "drawn_at_step", "drawn_at"), pl.Int64),
}
_ENDED = """
    SELECT draw_id, outcome, reason, as_of_step, num_scored, num_correct,
           CAST(at * 1e6 AS INTEGER)
    FROM outcomes WHERE void_by IS NULL"""
_ENDED_SCHEMA = {
    **dict.fromkeys(("draw_id", "outcome", "reason"), pl.String),
    **dict.fromkeys(("step", "num_scored", "num_correct", "ended_at"), pl.Int64),
}
# Of several decisions that rest on a verdict the last one counts.
_JUDGED = f"""{VOID_VERDICTS}
    SELECT v.seq, CAST(v.at * 1e6 AS INTEGER), v.prompt_id, v.judge, v.critic, v.num_samples,
           v.num_correct, v.alpha, v.beta, v.label, v.decided_by, v.outcomes, d.stage, d.action,
           d.rule, d.reason
    FROM verdicts v LEFT JOIN decisions d ON d.seq = (
        SELECT max(seq) FROM decisions WHERE prompt_id = v.prompt_id AND verdict = v.seq)
    WHERE v.seq NOT IN (SELECT verdict FROM void_verdicts)
    ORDER BY v.seq"""
_JUDGED_SCHEMA = {
    **dict.fromkeys(("seq", "at"), pl.Int64),
    **dict.fromkeys(("prompt_id", "judge", "critic"), pl.String),
    **dict.fromkeys(("num_samples", "num_correct"), pl.Int64),
    **dict.fromkeys(("alpha", "beta"), pl.Float64),
    **dict.fromkeys(("label", "decided_by", "outcomes", "stage", "action"), pl.String),
    **dict.fromkeys(("rule", "reason"), pl.String),
}


def read_ledger(path: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """`draws` and `verdicts` of one moment, those of the surviving lineage; empty ones for a run
    that has recorded nothing yet.

    The verdicts' `domain` is left null: the ledger does not hold it.

    Raises:
        RunDirError: the ledger is of another version, or the file is no ledger.
        DataError: it is damaged.
    """
    if not path.exists() or path.stat().st_size == 0:
        return DRAWS.empty(), VERDICTS.empty()
    with closing(connect_readonly(path)) as connection:
        try:
            connection.execute("BEGIN")
            draws = _draws(connection)
            return draws, _verdicts(connection)
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{path} is damaged ({error}); a snapshot of it may stand in a checkpoint"
            ) from error


def _draws(connection: sqlite3.Connection) -> pl.DataFrame:
    opened = _read(connection, _OPENED, _OPENED_SCHEMA)
    ended = _read(connection, _ENDED, _ENDED_SCHEMA)
    return (
        opened.unique("draw_id", keep="last", maintain_order=True)
        .join(ended, on="draw_id", how="left", maintain_order="left")
        .with_columns(
            pl.col("outcome").fill_null("in_flight"),
            pl.col("reason").replace("", None),
            pl.from_epoch("drawn_at", "us").dt.replace_time_zone("UTC"),
            pl.from_epoch("ended_at", "us").dt.replace_time_zone("UTC"),
        )
        .select(DRAWS.names)
    )


def _verdicts(connection: sqlite3.Connection) -> pl.DataFrame:
    judged = _read(connection, _JUDGED, _JUDGED_SCHEMA)
    counts = [json.loads(outcomes) for outcomes in judged["outcomes"]]
    return judged.with_columns(
        pl.from_epoch("at", "us").dt.replace_time_zone("UTC"),
        pl.lit(None, pl.String).alias("domain"),
        policy_step("critic").alias("step"),
        (pl.col("num_correct") / pl.when(pl.col("num_samples") > 0).then("num_samples")).alias(
            "pass_rate"
        ),
        *(
            pl.Series(str(outcome), [count.get(outcome, 0) for count in counts], dtype=pl.Int64)
            for outcome in Outcome
        ),
    ).select(VERDICTS.names)


def policy_step(critic: str) -> pl.Expr:
    """The step of a critic `stage:attempt.step`; null for a checkpoint's fingerprint."""
    return pl.col(critic).str.extract(r"^\w+:\d+\.(\d+)$").cast(pl.Int64)


def policy_step_of_version(version: str) -> pl.Expr:
    """The step of a version `attempt.step`."""
    return pl.col(version).str.extract(r"^\d+\.(\d+)$").cast(pl.Int64)


def _read(
    connection: sqlite3.Connection, query: str, schema: dict[str, type[pl.DataType]]
) -> pl.DataFrame:
    cursor = connection.execute(query)
    chunks = [pl.DataFrame(schema=schema)]
    while rows := cursor.fetchmany(CHUNK):
        chunks.append(_frame(rows, schema))
    return pl.concat(chunks)


def _frame(rows: Sequence[Sequence[Any]], schema: dict[str, type[pl.DataType]]) -> pl.DataFrame:
    columns = zip(*rows, strict=True)
    return pl.DataFrame(
        [
            pl.Series(name, values, dtype=dtype)
            for (name, dtype), values in zip(schema.items(), columns, strict=True)
        ]
    )
