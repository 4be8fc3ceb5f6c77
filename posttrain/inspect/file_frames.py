"""Prompts, evaluations, pairs and answers from the files that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from posttrain.data.prompts import content_hash
from posttrain.errors import DataError
from posttrain.inspect.columns import ANSWERS, EVALS, PAIRS
from posttrain.types import Message, Outcome

PROMPT_SCHEMA = {
    **dict.fromkeys(("prompt_id", "domain", "text", "reference"), pl.String),
    **dict.fromkeys(("in_train", "in_held_out", "in_sft"), pl.Boolean),
}

NEWER = {"version_spans", "sampling"}
"""Columns of `answers` that logs of older versions do not have: they are null there."""


def read_prompts(path: Path) -> pl.DataFrame:
    """What prompts.parquet holds; empty for a run that did not keep it."""
    if not path.exists():
        return pl.DataFrame(schema=PROMPT_SCHEMA)
    try:
        return pl.read_parquet(path).select(list(PROMPT_SCHEMA))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_evaluation(path: Path) -> pl.DataFrame:
    """`evals` of the stage that the file is named after."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        rows = [_evaluated(path.stem, record) for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no evaluation of this version: {error!r}") from error
    return pl.DataFrame(rows, schema=EVALS.schema)


def _evaluated(stage: str, record: dict[str, Any]) -> dict[str, Any]:
    answers = sum(record["outcomes"].values())
    return {
        "stage": stage,
        "prompt_id": record["prompt_id"],
        "domain": record["domain"],
        "num_samples": record["n"],
        "num_correct": record["correct"],
        "pass_rate": record["correct"] / record["n"] if record["n"] else None,
        "greedy_correct": record["greedy_correct"],
        "tokens": record["tokens"] / answers if answers else None,
        **{o: record["outcomes"].get(o, 0) for o in (Outcome.UNPARSABLE, Outcome.TRUNCATED)},
    }


def read_pairs(path: Path) -> pl.DataFrame:
    """`pairs`, without the domains of their prompts, which the file does not hold."""
    if not path.exists():
        return PAIRS.empty()
    try:
        with path.open(encoding="utf-8") as file:
            rows = [_pair(json.loads(line)) for line in file]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no pairs of this version: {error!r}") from error
    return pl.DataFrame(rows, schema=PAIRS.schema)


def _pair(record: dict[str, Any]) -> dict[str, Any]:
    turns = tuple(Message(role=turn["role"], content=turn["content"]) for turn in record["prompt"])
    return {
        "prompt_id": content_hash(turns),
        "system": record.get("system"),
        "margin": record.get("margin"),
        **{name: record[name] for name in ("corner_case", "chosen", "rejected")},
    }


def answer_files(directory: Path) -> list[Path]:
    """Whole files only, oldest first."""
    return sorted(directory.glob("[!.]*.parquet"))


def check_answers(path: Path) -> Path:
    """DataError for a file that is no Parquet or lacks a column. Reads its last bytes only."""
    wanted = set(ANSWERS.columns) - {"attempt"} - NEWER
    try:
        missing = wanted - set(pl.read_parquet_schema(path))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if missing:
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}: was another version's")
    return path


def scan_answers(files: list[Path]) -> pl.LazyFrame:
    """`answers`; the attempt stands in a file's name."""
    if not files:
        return ANSWERS.empty().lazy()
    return (
        pl.scan_parquet(
            files,
            schema={name: dtype for name, dtype in ANSWERS.schema.items() if name != "attempt"},
            include_file_paths="file",
            missing_columns="insert",
        )
        .with_columns(
            pl.col("file").str.extract(r"(\d+)-\d+\.parquet$").cast(pl.Int64).alias("attempt")
        )
        .select(pl.col(name).cast(dtype) for name, dtype in ANSWERS.schema.items())
    )
