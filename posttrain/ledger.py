"""The run's ledger: what was drawn and how it ended, what was judged, what was decided.

SQLite in WAL mode: one writer (the driver), any number of readers while it writes. Writes form
transactions of up to `BATCH` rows; readers see them after a flush.

**Exactly once.** A draw is opened, and ends in one `DrawOutcome`. A checkpoint of step N holds the
draws opened at a step < N and the outcomes of steps ≤ N; later ones are provisional until a
checkpoint that holds them is committed. Resuming from step N opens a new *attempt*, which marks
what the checkpoint does not hold as void: kept for the record, off the surviving lineage. A draw
whose outcome was voided is in flight again and is drawn again under its old id.
`posttrain.audit` proves that this holds.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from posttrain.errors import StageError
from posttrain.ledger_schema import (
    SCHEMA,
    SCHEMA_VERSION,
    VERDICT_COLUMNS,
    connect_readonly,
    is_ledger,
    verdict_from_row,
    verdict_to_row,
)
from posttrain.types import Decision, DrawOutcome, Verdict

BATCH = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenDraw:
    """A draw in flight, as it was last opened."""

    draw_id: str
    prompt_id: str
    domain: str
    system: str | None
    attempt: int
    drawn_at_step: int


class LedgerReader:
    """Queries. They see what the writer has flushed."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def verdicts(self, critic: str | None = None) -> list[Verdict]:
        """Every verdict (of one critic), oldest first: where a prompt was judged again, the last
        one counts."""
        where = "" if critic is None else "WHERE critic = ?"
        rows = self._connection.execute(
            f"SELECT {VERDICT_COLUMNS} FROM verdicts {where} ORDER BY seq",
            () if critic is None else (critic,),
        )
        return [verdict_from_row(row) for row in rows]

    def open_draws(self, stage_attempt: int | None = None) -> list[OpenDraw]:
        """Draws in flight on the surviving lineage, in the order they were opened.

        With `stage_attempt`, only those of that attempt's stage; right after `open_attempt`, they
        are what has to be drawn again.
        """
        rows = self._connection.execute(
            "SELECT draw_id, prompt_id, domain, system, attempt, drawn_at_step FROM lineage"
            " WHERE state = 'in_flight' AND (:attempt IS NULL OR"
            "     stage = (SELECT stage FROM attempts WHERE attempt = :attempt))"
            " ORDER BY (SELECT min(seq) FROM draws WHERE draws.draw_id = lineage.draw_id)",
            {"attempt": stage_attempt},
        )
        return [
            OpenDraw(
                draw_id=row[0],
                prompt_id=row[1],
                domain=row[2],
                system=row[3],
                attempt=row[4],
                drawn_at_step=row[5],
            )
            for row in rows
        ]

    def draw_counts(self) -> dict[str, int]:
        """Draws on the surviving lineage by outcome, every outcome named, and `in_flight`."""
        counts = {str(outcome): 0 for outcome in DrawOutcome} | {"in_flight": 0}
        rows = self._connection.execute("SELECT state, count(*) FROM lineage GROUP BY state")
        return counts | dict(rows.fetchall())

    def ended_draws(self, stage: str) -> Counter[tuple[DrawOutcome, str, str]]:
        """Draws of a stage that have ended on the surviving lineage, by (outcome, reason, domain):
        over all of its attempts."""
        rows = self._connection.execute(
            "SELECT o.outcome, o.reason, l.domain, count(*) FROM lineage l"
            " JOIN outcomes o ON o.draw_id = l.draw_id AND o.void_by IS NULL"
            " WHERE l.stage = ? GROUP BY o.outcome, o.reason, l.domain",
            (stage,),
        )
        return Counter({(DrawOutcome(row[0]), row[1], row[2]): row[3] for row in rows})

    def surviving_ends(self) -> set[tuple[str, int]]:
        """(draw, attempt that it ended in) of those that have ended on the surviving lineage."""
        rows = self._connection.execute(
            "SELECT draw_id, attempt FROM outcomes WHERE void_by IS NULL"
        )
        return set(rows.fetchall())

    def snapshot(self, target: Path) -> None:
        """Copies what has been flushed to a single new file."""
        copy = sqlite3.connect(target)
        try:
            self._connection.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        finally:
            copy.close()

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Ledger(LedgerReader):
    """The writer. One per run (the run's lease sees to that), used from one thread.

    RunDirError if the file is no ledger or of another schema version. StageError, from any
    writing method, if the disk is full or the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            if not is_ledger(connection, path):
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(
                    f"BEGIN; {SCHEMA} INSERT INTO meta VALUES ({SCHEMA_VERSION}); COMMIT;"
                )
            connection.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            connection.close()
            raise
        super().__init__(connection)
        self._path = path
        self._attempt: int | None = None
        self._step = 0  # the highest one that was recorded in this attempt
        self._unflushed = 0
        self._seq = max(
            connection.execute(f"SELECT coalesce(max(seq), 0) FROM {table}").fetchone()[0]
            for table in ("commits", "draws", "outcomes", "verdicts", "decisions")
        )

    @staticmethod
    def open_readonly(path: Path) -> LedgerReader:
        """Read a ledger, also while it is written. RunDirError if there is none."""
        return LedgerReader(connect_readonly(path))

    def open_attempt(self, stage: str, from_step: int) -> int:
        """Start or resume `stage` from its checkpoint of `from_step` (0: from the beginning).

        Voids what the stage did beyond that checkpoint. Returns the attempt's number.
        """
        self.flush()  # so that the marks below form one transaction
        last: int = self._connection.execute(
            "SELECT coalesce(max(attempt), 0) FROM attempts"
        ).fetchone()[0]
        attempt = last + 1
        self._write(
            "INSERT INTO attempts VALUES (?, ?, ?, ?)", (attempt, stage, from_step, time.time())
        )
        of_stage = (
            "void_by IS NULL AND attempt IN (SELECT attempt FROM attempts WHERE stage = :stage)"
        )
        beyond = {
            "commits": "step > :step",
            "draws": "drawn_at_step >= :step",
            "outcomes": "(as_of_step > :step OR NOT EXISTS (SELECT 1 FROM draws"
            " WHERE draws.draw_id = outcomes.draw_id AND draws.void_by IS NULL))",
        }
        for table, condition in beyond.items():
            self._write(
                f"UPDATE {table} SET void_by = :attempt WHERE {of_stage} AND {condition}",
                {"attempt": attempt, "stage": stage, "step": from_step},
            )
        self.flush()
        self._attempt, self._step = attempt, from_step
        return attempt

    def open_draw(
        self,
        *,
        draw_id: str,
        prompt_id: str,
        domain: str,
        system: str | None,
        attempt: int,
        drawn_at_step: int,
    ) -> None:
        """Note that a prompt was drawn at step `drawn_at_step` of the policy, or drawn again.

        ValueError if the attempt is not the current one, if the draw was opened in it before, has
        ended, or was of another prompt.
        """
        if attempt != self._attempt:
            raise ValueError(f"draw {draw_id} of attempt {attempt} in attempt {self._attempt}")
        before = self._find(draw_id)
        if before is not None:
            last_attempt, last_prompt, _, outcome = before
            if outcome is not None or last_attempt == attempt or last_prompt != prompt_id:
                raise ValueError(
                    f"draw {draw_id} (prompt {prompt_id}) was opened in attempt {last_attempt} for"
                    f" prompt {last_prompt} and is {outcome or 'in flight'}; a new draw needs a"
                    " new id"
                )
        self._step = max(self._step, drawn_at_step)
        self._insert(
            "draws (seq, draw_id, attempt, prompt_id, domain, system, drawn_at_step, at)",
            (draw_id, attempt, prompt_id, domain, system, drawn_at_step, time.time()),
        )

    def close_draw(
        self,
        draw_id: str,
        outcome: DrawOutcome,
        *,
        step: int | None,
        num_scored: int,
        num_correct: int,
        reason: str = "",
    ) -> None:
        """Note how a draw ended; `step` is the first step whose checkpoint holds it (None: the
        one under way), `num_correct` of `num_scored` answers were right.

        ValueError if the draw is not in flight: a draw ends once.
        """
        assert self._attempt is not None, "open_attempt comes first"
        found = self._find(draw_id)
        if found is None or found[3] is not None:
            state = "was never opened" if found is None else f"has ended as {found[3]}"
            raise ValueError(f"draw {draw_id} cannot end as {outcome}: it {state}")
        drawn_at_step = found[2]
        if step is not None and step < drawn_at_step:
            raise ValueError(f"draw {draw_id} of step {drawn_at_step} cannot end at step {step}")
        as_of_step = max(self._step, drawn_at_step + 1) if step is None else step
        self._step = max(self._step, as_of_step)
        self._insert(
            "outcomes (seq, draw_id, attempt, outcome, step, as_of_step, num_scored, num_correct,"
            " reason, at)",
            (
                draw_id,
                self._attempt,
                outcome,
                step,
                as_of_step,
                num_scored,
                num_correct,
                reason,
                time.time(),
            ),
        )

    def commit_step(self, step: int) -> None:
        """The checkpoint of `step` is on disk: what it holds is no longer provisional."""
        assert self._attempt is not None, "open_attempt comes first"
        self._insert("commits (seq, attempt, step, at)", (self._attempt, step, time.time()))
        self.flush()

    def record_verdicts(self, verdicts: Iterable[Verdict]) -> None:
        for verdict in verdicts:
            self._insert(
                f"verdicts (seq, {VERDICT_COLUMNS}, at)", (*verdict_to_row(verdict), time.time())
            )

    def record_decisions(self, stage: str, decisions: Iterable[Decision]) -> None:
        """Each rests on a verdict; one that is not in the ledger yet is recorded with it."""
        for decision in decisions:
            row = verdict_to_row(decision.verdict)
            found = self._connection.execute(
                f"SELECT {VERDICT_COLUMNS}, seq FROM verdicts"
                " WHERE prompt_id = ? AND judge = ? AND critic = ? ORDER BY seq DESC LIMIT 1",
                row[:3],
            ).fetchone()
            if found is None or found[:-1] != row:
                self.record_verdicts([decision.verdict])
                found = (self._seq,)
            self._insert(
                "decisions (seq, stage, prompt_id, action, rule, reason, verdict, at)",
                (
                    stage,
                    decision.prompt_id,
                    decision.action,
                    decision.rule,
                    decision.reason,
                    found[-1],
                    time.time(),
                ),
            )

    def flush(self) -> None:
        """Make everything recorded so far durable and visible to readers."""
        self._unflushed = 0
        if self._connection.in_transaction:
            self._execute("COMMIT")

    def close(self) -> None:
        self.flush()
        super().close()

    def _find(self, draw_id: str) -> tuple[int, str, int, str | None] | None:
        """(attempt, prompt_id, drawn_at_step, outcome) of a surviving draw as last opened."""
        return self._connection.execute(  # type: ignore[no-any-return]
            "SELECT d.attempt, d.prompt_id, d.drawn_at_step, o.outcome FROM draws d"
            " LEFT JOIN outcomes o ON o.draw_id = d.draw_id AND o.void_by IS NULL"
            " WHERE d.draw_id = ? AND d.void_by IS NULL ORDER BY d.attempt DESC LIMIT 1",
            (draw_id,),
        ).fetchone()

    def _insert(self, into: str, values: tuple[Any, ...]) -> None:
        self._seq += 1
        self._write(f"INSERT INTO {into} VALUES (?{', ?' * len(values)})", (self._seq, *values))

    def _write(self, sql: str, values: tuple[Any, ...] | dict[str, Any]) -> None:
        if not self._connection.in_transaction:
            self._execute("BEGIN IMMEDIATE")
        self._execute(sql, values)
        self._unflushed += 1
        if self._unflushed >= BATCH:
            self.flush()

    def _execute(self, sql: str, values: tuple[Any, ...] | dict[str, Any] = ()) -> None:
        try:
            self._connection.execute(sql, values)
        except sqlite3.OperationalError as error:
            raise StageError(
                f"{self._path} cannot be written ({error}); make room or end the other writer, then"
                " the same command resumes from the last checkpoint"
            ) from error
