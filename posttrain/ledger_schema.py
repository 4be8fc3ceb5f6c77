"""The ledger's tables: their schema, its version, and rows that become records.

`posttrain.ledger` writes them, `posttrain.audit` and notebooks read them.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import RunDirError
from posttrain.types import Label, Outcome, Verdict

SCHEMA_VERSION = 1

# Rows are added and never deleted. The one thing that changes is `void_by`: the attempt that
# started from a checkpoint which does not hold the row; NULL means on the surviving lineage.
# `seq` numbers the events of a run over all tables, in the order they were recorded.
# Times (`at`) are seconds since 1970.
SCHEMA = """
CREATE TABLE meta (schema_version INTEGER NOT NULL);

CREATE TABLE attempts (
    attempt   INTEGER PRIMARY KEY,            -- 1, 2, … over all stages
    stage     TEXT NOT NULL,
    from_step INTEGER NOT NULL,               -- the checkpoint it starts from; 0: the beginning
    at        REAL NOT NULL
);
CREATE TABLE commits (                        -- checkpoints that are on disk
    seq       INTEGER PRIMARY KEY,
    attempt   INTEGER NOT NULL REFERENCES attempts,
    step      INTEGER NOT NULL,
    at        REAL NOT NULL,
    void_by   INTEGER REFERENCES attempts
);
CREATE TABLE draws (                          -- one row each time a draw is opened
    seq           INTEGER PRIMARY KEY,
    draw_id       TEXT NOT NULL,
    attempt       INTEGER NOT NULL REFERENCES attempts,
    prompt_id     TEXT NOT NULL,
    domain        TEXT NOT NULL,
    system        TEXT,                       -- the system instruction, NULL for none
    drawn_at_step INTEGER NOT NULL,           -- in the checkpoints of later steps
    at            REAL NOT NULL,
    void_by       INTEGER REFERENCES attempts,
    UNIQUE (draw_id, attempt)
);
CREATE INDEX draws_by_prompt ON draws (prompt_id);
CREATE TABLE outcomes (                       -- one row each time a draw ends
    seq         INTEGER PRIMARY KEY,
    draw_id     TEXT NOT NULL,
    attempt     INTEGER NOT NULL REFERENCES attempts,
    outcome     TEXT NOT NULL,                -- posttrain.types.DrawOutcome
    step        INTEGER,                      -- as given
    as_of_step  INTEGER NOT NULL,             -- step, or the one under way: in its checkpoint
    num_scored  INTEGER NOT NULL,
    num_correct INTEGER NOT NULL CHECK (num_correct BETWEEN 0 AND num_scored),
    reason      TEXT NOT NULL,
    at          REAL NOT NULL,
    void_by     INTEGER REFERENCES attempts,
    UNIQUE (draw_id, attempt)
);
CREATE VIEW lineage AS                        -- every surviving draw once, with its state
    SELECT d.draw_id, d.prompt_id, d.domain, d.system, d.attempt, a.stage, d.drawn_at_step,
           coalesce(o.outcome, 'in_flight') AS state, o.as_of_step, o.num_scored, o.num_correct
    FROM draws d
    JOIN attempts a ON a.attempt = d.attempt
    LEFT JOIN outcomes o ON o.draw_id = d.draw_id AND o.void_by IS NULL
    WHERE d.void_by IS NULL AND NOT EXISTS (
        SELECT 1 FROM draws again
        WHERE again.draw_id = d.draw_id AND again.attempt > d.attempt AND again.void_by IS NULL);
CREATE TABLE verdicts (                       -- what a critic's answers say about a prompt
    seq         INTEGER PRIMARY KEY,
    prompt_id   TEXT NOT NULL,
    judge       TEXT NOT NULL,
    critic      TEXT NOT NULL,
    num_samples INTEGER NOT NULL,
    num_correct INTEGER NOT NULL,
    outcomes    TEXT NOT NULL,                -- JSON, outcome -> count
    alpha       REAL NOT NULL,                -- posterior Beta(alpha, beta)
    beta        REAL NOT NULL,
    label       TEXT NOT NULL,
    decided_by  TEXT NOT NULL,
    sampling    TEXT NOT NULL,                -- JSON
    at          REAL NOT NULL
);
CREATE INDEX verdicts_by_prompt ON verdicts (prompt_id);
CREATE TABLE decisions (                      -- what selection did with a prompt
    seq       INTEGER PRIMARY KEY,
    stage     TEXT NOT NULL,
    prompt_id TEXT NOT NULL,
    action    TEXT NOT NULL,
    rule      TEXT NOT NULL,
    reason    TEXT NOT NULL,
    verdict   INTEGER NOT NULL REFERENCES verdicts,
    at        REAL NOT NULL
);
CREATE INDEX decisions_by_prompt ON decisions (prompt_id);
"""

VERDICT_COLUMNS = (
    "prompt_id, judge, critic, num_samples, num_correct, outcomes, alpha, beta, label,"
    " decided_by, sampling"
)

# Verdicts of re-screening (critic `stage:attempt.step`) carry no mark. The checkpoint of step N
# holds those that were recorded before anything was drawn at step N: it is taken right before that
# draw, and in lock-step the slice of step N comes before both.
VOID_VERDICTS = """
    WITH first_draws AS (
        SELECT attempt, drawn_at_step, min(seq) AS seq FROM draws GROUP BY attempt, drawn_at_step
    ), beyond AS (
        SELECT own.stage || ':' || own.attempt AS critic, later.attempt AS void_by,
               min(d.seq) AS seq
        FROM attempts own
        JOIN attempts later ON later.stage = own.stage AND later.attempt > own.attempt
        JOIN first_draws d ON d.attempt = own.attempt AND d.drawn_at_step >= later.from_step
        GROUP BY own.attempt, later.attempt
    ), void_verdicts AS (
        SELECT v.seq AS verdict, min(beyond.void_by) AS void_by
        FROM verdicts v
        JOIN beyond ON beyond.critic = substr(v.critic, 1, instr(v.critic, '.') - 1)
             AND beyond.seq < v.seq
        GROUP BY v.seq
    )"""
"""Comes before a query, which may then ask `void_verdicts (verdict, void_by)`; decisions are void
with the verdict that they rest on."""


def connect_readonly(path: Path) -> sqlite3.Connection:
    """A connection that cannot write. RunDirError if there is no ledger of this version."""
    if not path.exists():
        raise RunDirError(f"there is no ledger at {path}; is it a run that was started?")
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        if not is_ledger(connection, path):
            raise RunDirError(f"{path} is empty: the run was ended before it recorded anything")
    except BaseException:
        connection.close()
        raise
    return connection


def verdict_from_row(row: Sequence[Any]) -> Verdict:
    """From the values of `VERDICT_COLUMNS`."""
    return Verdict(
        prompt_id=row[0],
        judge=row[1],
        critic=row[2],
        num_samples=row[3],
        num_correct=row[4],
        outcomes={Outcome(name): count for name, count in json.loads(row[5]).items()},
        posterior=(row[6], row[7]),
        label=Label(row[8]),
        decided_by=row[9],
        sampling=json.loads(row[10]),
    )


def verdict_to_row(verdict: Verdict) -> tuple[Any, ...]:
    """The values of `VERDICT_COLUMNS`; equal verdicts give equal rows."""
    return (
        verdict.prompt_id,
        verdict.judge,
        verdict.critic,
        verdict.num_samples,
        verdict.num_correct,
        json.dumps(dict(verdict.outcomes), sort_keys=True),
        *verdict.posterior,
        verdict.label,
        verdict.decided_by,
        json.dumps(dict(verdict.sampling), sort_keys=True),
    )


def is_ledger(connection: sqlite3.Connection, path: Path) -> bool:
    """False for an empty file; RunDirError for anything but a ledger of this version."""
    try:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if not tables:
            return False
        version = (
            connection.execute("SELECT schema_version FROM meta").fetchone()[0]
            if "meta" in tables
            else None
        )
    except sqlite3.DatabaseError as error:
        raise RunDirError(f"{path} is no ledger ({error})") from error
    if version != SCHEMA_VERSION:
        raise RunDirError(
            f"{path} has ledger schema {version}, this version of posttrain reads"
            f" {SCHEMA_VERSION}: use the version that wrote it, or another run.dir"
        )
    return True
