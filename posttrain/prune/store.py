"""The store of a prune directory: tasks, their samples, and the rows they belong to, in SQLite.

Samples belong to the critic, template, sampling and verifier that the store was begun with, and
stay for good; rows belong to the source as it was last taken in. Every recorded request is
committed at once: a killed process loses what was under way and nothing else.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from judges.sampling import Answers
from judges.selection import tie_break
from posttrain.errors import RunDirError, StageError
from posttrain.prune.columns import Task
from posttrain.prune.task_content import read_task, task_content
from posttrain.types import Outcome

SCHEMA_VERSION = 1

OUTCOMES = tuple(Outcome)
_COUNTS = ", ".join(f'tasks."{outcome}"' for outcome in OUTCOMES)
_ASKED = " + ".join(f'tasks."{outcome}"' for outcome in OUTCOMES)

_SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE tasks (                 -- what is judged; never deleted
    task      INTEGER PRIMARY KEY,
    task_id   TEXT NOT NULL UNIQUE,
    prompt_id TEXT NOT NULL,
    tie       INTEGER NOT NULL,      -- orders tasks that are equally easy
    content   TEXT NOT NULL,         -- JSON
    {", ".join(f'"{outcome}" INTEGER NOT NULL DEFAULT 0' for outcome in OUTCOMES)},
    score     REAL                   -- of a judge that looks once
);
CREATE INDEX tasks_by_prompt ON tasks (prompt_id);
CREATE TABLE samples (               -- one row a request that was answered and scored
    seq     INTEGER PRIMARY KEY,
    task    INTEGER NOT NULL REFERENCES tasks,
    tokens  INTEGER NOT NULL,
    found   TEXT NOT NULL,           -- JSON: [[outcome, end of the text], …], or a score's parts
    at      REAL NOT NULL            -- seconds since 1970
);
CREATE INDEX samples_by_task ON samples (task);
CREATE TABLE rows (                  -- of the source as it was last taken in
    row    INTEGER PRIMARY KEY,      -- from 0
    task   INTEGER REFERENCES tasks, -- NULL: quarantined
    domain TEXT NOT NULL
);
CREATE INDEX rows_by_task ON rows (task);
CREATE TABLE quarantine (
    row      INTEGER PRIMARY KEY,
    readable INTEGER NOT NULL,       -- 1: it has columns like the others
    details  TEXT NOT NULL           -- JSON: file, line, reason, …
);
CREATE TABLE overlaps (              -- rows that share text with another set
    row    INTEGER NOT NULL,
    other  TEXT NOT NULL,            -- which set
    drops  INTEGER NOT NULL,         -- 1: it is held out, 0: only reported
    shared TEXT NOT NULL,
    PRIMARY KEY (row, other)
)
"""

SHOWN_CHARACTERS = 120
"""Of each answer, its end: where the result stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTable:
    """Arrays `[N]` over the tasks of all rows that are not dropped as held out, in the order of
    their first rows, of 40 bytes a task. `key` is the store's own number of a task, `domain` a code
    into `domains`, `asked` counts unscored answers too, `score` is NaN where there is none."""

    key: NDArray[np.int32]
    domain: NDArray[np.int32]
    domains: Sequence[str]
    tie: NDArray[np.uint64]
    num_rows: NDArray[np.int32]
    asked: NDArray[np.int32]
    scored: NDArray[np.int32]
    correct: NDArray[np.int32]
    score: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.key)

    @property
    def unjudged(self) -> NDArray[np.bool_]:
        """Tasks of which nothing is known yet."""
        none: NDArray[np.bool_] = (self.scored == 0) & np.isnan(self.score)
        return none

    def take(self, indices: NDArray[np.integer]) -> TaskTable:
        """Some of the tasks, in this order."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "domains"}
        return replace(self, **{name: values[indices] for name, values in arrays.items()})


@dataclass(frozen=True, slots=True)
class Sampled:
    """One request in a task's history."""

    at: float
    tokens: int
    found: Any


class Store:
    """One writer, which holds the directory's lease, and any number of readers."""

    def __init__(self, path: Path) -> None:
        """Creates what is not there. RunDirError for anything but a store of this version."""
        self.path = path
        self._db = sqlite3.connect(path, isolation_level=None)
        try:
            # A commit survives the process; only a crash of the machine may cost the last ones.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                with self.transaction():
                    for statement in _SCHEMA.split(";\n"):
                        self._db.execute(statement)
                    self.set_meta("schema_version", SCHEMA_VERSION)
            version = self.meta("schema_version")
        except sqlite3.DatabaseError as error:
            raise RunDirError(f"{path} is no store of `posttrain prune` ({error})") from error
        if version != SCHEMA_VERSION:
            raise RunDirError(
                f"{path} has schema {version}, this version of posttrain reads {SCHEMA_VERSION}"
            )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing. StageError if the disk does not take it."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise StageError(
                f"{self.path} cannot be written ({error}); make room, then start the same command"
                " again"
            ) from error

    def meta(self, key: str) -> Any:
        """What was left with `set_meta`; None if nothing was."""
        found = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if found is None else json.loads(found[0])

    def set_meta(self, key: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def copy_to(self, path: Path) -> None:
        """A second store with all that is in this one."""
        copy = sqlite3.connect(path)
        try:
            self._db.backup(copy)
        finally:
            copy.close()

    def close(self) -> None:
        self._db.close()

    # Rows: of the source as it was last taken in

    def clear_rows(self) -> None:
        for table in ("rows", "quarantine", "overlaps"):
            self._db.execute(f"DELETE FROM {table}")

    def add_rows(self, rows: Sequence[tuple[int, Task]]) -> None:
        """Each with its number; a task that is known stays as it is."""
        self._db.executemany(
            "INSERT OR IGNORE INTO tasks (task_id, prompt_id, tie, content) VALUES (?, ?, ?, ?)",
            (
                # SQLite's integers are signed.
                (t.task_id, t.prompt.prompt_id, tie_break(t.task_id) - 2**63, task_content(t))
                for _, t in rows
            ),
        )
        self._db.executemany(
            "INSERT INTO rows SELECT ?, task, ? FROM tasks WHERE task_id = ?",
            ((number, t.prompt.domain, t.task_id) for number, t in rows),
        )

    def add_quarantined(
        self, number: int, domain: str, details: Mapping[str, Any], *, readable: bool
    ) -> None:
        self._db.execute("INSERT INTO rows VALUES (?, NULL, ?)", (number, domain))
        self._db.execute(
            "INSERT INTO quarantine VALUES (?, ?, ?)",
            (number, readable, json.dumps(details, ensure_ascii=False, default=str)),
        )

    def add_overlap(self, number: int, other: str, shared: str, *, drops: bool) -> None:
        self._db.execute("INSERT INTO overlaps VALUES (?, ?, ?, ?)", (number, other, drops, shared))

    def set_aside(self, reasons: Mapping[int, str], file: str) -> None:
        """Rows of these tasks, by key, which could not be judged: in quarantine until `take_back`.
        What is held out stays so."""
        mine = """SELECT row FROM rows WHERE task = ?
                  AND row NOT IN (SELECT row FROM overlaps WHERE drops)"""
        with self.transaction():
            for key, why in reasons.items():
                said = {"file": file, "reason": f"no answer could be scored ({why})", "task": key}
                for (row,) in self._db.execute(mine, (key,)).fetchall():
                    details = json.dumps(said | {"row": row + 1}, ensure_ascii=False)
                    self._db.execute("INSERT INTO quarantine VALUES (?, 1, ?)", (row, details))
                    self._db.execute("UPDATE rows SET task = NULL WHERE row = ?", (row,))

    def take_back(self) -> None:
        """What was set aside has its tasks again."""
        with self.transaction():
            self._db.execute(
                """UPDATE rows SET task = json_extract(details, '$.task') FROM quarantine
                   WHERE quarantine.row = rows.row AND json_extract(details, '$.task') NOTNULL"""
            )
            self._db.execute("DELETE FROM quarantine WHERE json_extract(details, '$.task') NOTNULL")

    def num_rows(self) -> int:
        """Of the source, up to the last that was taken in."""
        return int(self._db.execute("SELECT coalesce(max(row) + 1, 0) FROM rows").fetchone()[0])

    def counts(self) -> tuple[int, int]:
        """Rows that were taken in, and how many of them are quarantined."""
        query = "SELECT (SELECT count(*) FROM rows), (SELECT count(*) FROM quarantine)"
        taken, quarantined = self._db.execute(query).fetchone()
        return int(taken), int(quarantined)

    def quarantined(self) -> Iterator[tuple[int, bool, dict[str, Any]]]:
        """(row, readable, details) in order."""
        query = "SELECT row, readable, details FROM quarantine ORDER BY row"
        for row, readable, details in self._db.execute(query):
            yield row, bool(readable), json.loads(details)

    def overlaps(self) -> Iterator[tuple[int, str, bool, str]]:
        """(row, other set, whether that drops it, what is shared) in order."""
        query = "SELECT row, other, drops, shared FROM overlaps ORDER BY row, drops DESC, other"
        for row, other, drops, shared in self._db.execute(query):
            yield row, other, bool(drops), shared

    def row_tasks(self) -> Iterator[tuple[int, int | None, str]]:
        """(row, key of its task or None, domain) in order."""
        yield from self._db.execute("SELECT row, task, domain FROM rows ORDER BY row")

    # Tasks: what those rows ask

    def has_tasks(self) -> bool:
        """Whether any row has a task and is not dropped as held out."""
        query = """SELECT EXISTS (SELECT 1 FROM rows WHERE task IS NOT NULL
                   AND row NOT IN (SELECT row FROM overlaps WHERE drops))"""
        return bool(self._db.execute(query).fetchone()[0])

    def tasks(self) -> TaskTable:
        mine = """FROM rows WHERE task IS NOT NULL
                  AND row NOT IN (SELECT row FROM overlaps WHERE drops)"""
        query = f"""
            SELECT first.domain, tasks.tie, tasks.score, tasks.task, first.num_rows, {_ASKED},
                   {_ASKED} - tasks.infrastructure, tasks.correct
            FROM (SELECT task, min(row) AS row, domain, count(*) AS num_rows {mine}
                  GROUP BY task) AS first
            JOIN tasks USING (task) ORDER BY first.row"""
        codes: dict[str, int] = {}
        rows = (
            (
                tie + 2**63,
                math.nan if score is None else score,
                codes.setdefault(domain, len(codes)),
                *rest,
            )
            for domain, tie, score, *rest in self._db.execute(query)
        )
        kinds = {"tie": "u8", "score": "f8", "domain": "i4", "key": "i4", "num_rows": "i4"}
        kinds |= {"asked": "i4", "scored": "i4", "correct": "i4"}
        # Counted first: an array that grows takes half as much again.
        (total,) = self._db.execute(f"SELECT count(DISTINCT task) {mine}").fetchone()
        table = np.fromiter(rows, dtype=list(kinds.items()), count=total)
        return TaskTable(domains=list(codes), **{name: table[name] for name in kinds})

    def task_ids(self, keys: NDArray[np.integer]) -> list[str]:
        """In this order; the keys are of tasks that there are."""
        query = """SELECT task_id FROM json_each(?) AS wanted JOIN tasks ON task = wanted.value
                   ORDER BY wanted.key"""
        return [task_id for (task_id,) in self._db.execute(query, (json.dumps(keys.tolist()),))]

    def task(self, key: int) -> Task:
        row = self._db.execute("SELECT task_id, content FROM tasks WHERE task = ?", (key,))
        return read_task(*row.fetchone())

    def task_facts(self) -> Iterator[tuple[int, str, str, dict[Outcome, int]]]:
        """(key, task id, prompt id, outcomes) of every task, by key."""
        query = f"SELECT task, task_id, prompt_id, {_COUNTS} FROM tasks ORDER BY task"
        for key, task_id, prompt_id, *counts in self._db.execute(query):
            yield key, task_id, prompt_id, _outcomes(counts)

    def find(self, some_id: str) -> list[tuple[int, Task]]:
        """Tasks with this task id or prompt id, with their keys."""
        rows = self._db.execute(
            "SELECT task, task_id, content FROM tasks WHERE task_id = ?1 OR prompt_id = ?1",
            (some_id,),
        )
        return [(key, read_task(task_id, content)) for key, task_id, content in rows]

    def task_of(self, row: int) -> int | None:
        """Key of a row's task; None for a row in quarantine, or one that there is not."""
        found = self._db.execute("SELECT task FROM rows WHERE row = ?", (row,)).fetchone()
        return None if found is None else found[0]

    def rows_of(self, key: int) -> list[int]:
        query = "SELECT row FROM rows WHERE task = ? ORDER BY row"
        return [row for (row,) in self._db.execute(query, (key,))]

    # Samples: what the critic answered

    def record_answers(self, key: int, answers: Answers) -> None:
        """One request's answers, committed."""
        found = [
            [reward.outcome, rollout.text[-SHOWN_CHARACTERS:]]
            for rollout, reward in zip(answers.rollouts, answers.rewards, strict=True)
        ]
        tokens = sum(len(r.completion_token_ids) for r in answers.rollouts)
        counts = [sum(r.outcome is outcome for r in answers.rewards) for outcome in OUTCOMES]
        sums = ", ".join(f'"{outcome}" = "{outcome}" + ?' for outcome in OUTCOMES)
        with self.transaction():
            self._add_sample(key, tokens, found)
            self._db.execute(f"UPDATE tasks SET {sums} WHERE task = ?", (*counts, key))

    def record_score(self, key: int, score: float, tokens: int, parts: Mapping[str, Any]) -> None:
        """What a judge that looks once says, committed."""
        with self.transaction():
            self._add_sample(key, tokens, parts)
            self._db.execute("UPDATE tasks SET score = ? WHERE task = ?", (score, key))

    def mean_part(self, name: str) -> float | None:
        """Of one part of all that a judge that looks once has said; None if it has said nothing."""
        query = "SELECT avg(json_extract(found, ?)) FROM samples"
        mean: float | None = self._db.execute(query, (f"$.{name}",)).fetchone()[0]
        return mean

    def samples(self, key: int) -> list[Sampled]:
        query = "SELECT at, tokens, found FROM samples WHERE task = ? ORDER BY seq"
        return [
            Sampled(at, t, json.loads(found)) for at, t, found in self._db.execute(query, (key,))
        ]

    def usage(self) -> tuple[int, int]:
        """Requests that were answered and tokens that they cost, over all time."""
        query = "SELECT count(*), coalesce(sum(tokens), 0) FROM samples"
        requests, tokens = self._db.execute(query).fetchone()
        return int(requests), int(tokens)

    def _add_sample(self, key: int, tokens: int, found: Any) -> None:
        self._db.execute(
            "INSERT INTO samples (task, tokens, found, at) VALUES (?, ?, ?, ?)",
            (key, tokens, json.dumps(found, ensure_ascii=False), time.time()),
        )


def _outcomes(counts: Iterable[int]) -> dict[Outcome, int]:
    return {o: n for o, n in zip(OUTCOMES, counts, strict=True) if n}
