"""Proof, by queries, that every draw ended exactly once, and the history of one prompt."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from posttrain.ledger_schema import (
    VERDICT_COLUMNS,
    VOID_VERDICTS,
    connect_readonly,
    verdict_from_row,
)
from posttrain.types import Action, DrawOutcome, Verdict

# Each query lists (draw_id, detail) of what breaks a rule. "Surviving" is `void_by IS NULL`.
RULES = {
    "a draw ends once": """
        SELECT draw_id, 'ended ' || count(*) || ' times: ' || group_concat(outcome, ', ')
        FROM outcomes WHERE void_by IS NULL GROUP BY draw_id HAVING count(*) > 1""",
    "what ends was drawn": """
        SELECT draw_id, outcome || ' in attempt ' || attempt FROM outcomes
        WHERE void_by IS NULL AND draw_id NOT IN (SELECT draw_id FROM draws WHERE void_by IS NULL)
        """,
    "what has ended is not drawn again": """
        SELECT d.draw_id, o.outcome || ' in attempt ' || o.attempt
               || ', drawn again in attempt ' || d.attempt
        FROM draws d JOIN outcomes o ON o.draw_id = d.draw_id AND o.attempt < d.attempt
        WHERE d.void_by IS NULL AND o.void_by IS NULL""",
    "a draw keeps its prompt": """
        SELECT draw_id, 'drawn for ' || group_concat(DISTINCT prompt_id)
        FROM draws WHERE void_by IS NULL GROUP BY draw_id HAVING count(DISTINCT prompt_id) > 1""",
    "a draw ends after it was drawn": """
        SELECT d.draw_id, 'drawn at step ' || d.drawn_at_step || ', ended at ' || o.as_of_step
        FROM draws d JOIN outcomes o ON o.draw_id = d.draw_id
        WHERE d.void_by IS NULL AND o.void_by IS NULL
              AND (o.as_of_step < d.drawn_at_step OR o.seq < d.seq)""",
    "an outcome is one of the known": f"""
        SELECT draw_id, outcome FROM outcomes
        WHERE outcome NOT IN ({", ".join(f"'{outcome}'" for outcome in DrawOutcome)})""",
    # The attempts alone say which draws are off the lineage: the marks must agree with them.
    "a draw is void exactly when a later attempt started before it": """
        SELECT d.draw_id, 'drawn at step ' || d.drawn_at_step || ' in attempt ' || d.attempt
               || ', void by ' || coalesce(d.void_by, 'none')
        FROM draws d JOIN attempts a ON a.attempt = d.attempt
        WHERE d.void_by IS NOT (
            SELECT min(later.attempt) FROM attempts later
            WHERE later.stage = a.stage AND later.attempt > d.attempt
                  AND later.from_step <= d.drawn_at_step)""",
    "an outcome beyond the start of a later attempt is void": """
        SELECT o.draw_id, o.outcome || ' at step ' || o.as_of_step || ' in attempt ' || o.attempt
        FROM outcomes o JOIN attempts a ON a.attempt = o.attempt
        WHERE o.void_by IS NULL AND EXISTS (
            SELECT 1 FROM attempts later
            WHERE later.stage = a.stage AND later.attempt > o.attempt
                  AND later.from_step < o.as_of_step)""",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """`draw_id` breaks `rule`; None where a sum is wrong."""

    rule: str
    draw_id: str | None
    detail: str

    def describe(self) -> str:
        return f"{self.draw_id or 'sums'}: {self.detail} (rule: {self.rule})"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """`counts` of draws on the surviving lineage by outcome, and `in_flight`; `num_draws` is what
    they must add up to. `num_provisional` ended beyond the last committed checkpoint; `num_voided`
    outcomes were voided by a resume."""

    num_attempts: int
    num_draws: int
    counts: dict[str, int]
    num_provisional: int
    num_voided: int
    violations: tuple[Violation, ...]

    @property
    def ok(self) -> bool:
        return not self.violations

    def describe(self) -> str:
        """Several lines for a person."""
        ends = ", ".join(f"{name} {n:,}" for name, n in self.counts.items() if n)
        lines = [
            f"{self.num_draws:,} draws in {self.num_attempts} attempt(s): {ends or 'none'}",
            f"{self.num_provisional:,} provisional, {self.num_voided:,} voided by resuming",
        ]
        if self.ok:
            return "\n".join([*lines, "every draw is in exactly one state, and the sums match"])
        return "\n".join([*lines, *(f"VIOLATION {v.describe()}" for v in self.violations)])


def audit(ledger_path: Path) -> AuditReport:
    """Check every rule against one consistent view of the ledger, also while it is written.

    RunDirError if there is no ledger.
    """
    with closing(connect_readonly(ledger_path)) as connection:
        connection.execute("BEGIN")
        violations = [
            Violation(rule=rule, draw_id=draw_id, detail=detail)
            for rule, query in RULES.items()
            for draw_id, detail in connection.execute(query)
        ]
        counts = _counts(connection)
        num_draws = _number(
            connection, "SELECT count(DISTINCT draw_id) FROM draws WHERE void_by IS NULL"
        )
        if sum(counts.values()) != num_draws:
            detail = f"{num_draws} draws, but the states add up to {sum(counts.values())}: {counts}"
            violations.append(
                Violation(rule="every draw is in one state", draw_id=None, detail=detail)
            )
        return AuditReport(
            num_attempts=_number(connection, "SELECT count(*) FROM attempts"),
            num_draws=num_draws,
            counts=counts,
            num_provisional=_number(
                connection,
                "SELECT count(*) FROM lineage l WHERE as_of_step > coalesce((SELECT max(c.step)"
                " FROM commits c JOIN attempts a USING (attempt)"
                " WHERE a.stage = l.stage AND c.void_by IS NULL), -1)",
            ),
            num_voided=_number(
                connection, "SELECT count(*) FROM outcomes WHERE void_by IS NOT NULL"
            ),
            violations=tuple(violations),
        )


def _counts(connection: sqlite3.Connection) -> dict[str, int]:
    """Counted from the two tables apart, not from the view that joins them."""
    counts = {str(outcome): 0 for outcome in DrawOutcome}
    counts |= dict(
        connection.execute(
            "SELECT outcome, count(*) FROM outcomes WHERE void_by IS NULL GROUP BY outcome"
        ).fetchall()
    )
    counts["in_flight"] = _number(
        connection,
        "SELECT count(DISTINCT draw_id) FROM draws WHERE void_by IS NULL AND NOT EXISTS (SELECT 1"
        " FROM outcomes WHERE outcomes.draw_id = draws.draw_id AND outcomes.void_by IS NULL)",
    )
    return counts


def _number(connection: sqlite3.Connection, query: str) -> int:
    number: int = connection.execute(query).fetchone()[0]
    return number


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A critic's verdict about the prompt. `void_by` is the attempt that resumed from a checkpoint
    which knows nothing of it, None if it counts."""

    seq: int
    at: float
    verdict: Verdict
    void_by: int | None

    def describe(self) -> str:
        v = self.verdict
        stage, _, version = v.critic.partition(":")
        # Re-screening judges with a version of the stage's weights, not with a checkpoint.
        how = f"{stage}: re-screened" if version else "judged"
        by = f"with version {version}" if version else f"by {v.judge} with critic {v.critic}"
        return (
            f"{_clock(self.at)} {how} {v.label} {by}:"
            f" {v.num_correct} of {v.num_samples} right ({v.decided_by}){_void(self.void_by)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What selection did with the prompt, and why. `void_by` is that of the verdict."""

    seq: int
    at: float
    stage: str
    action: Action
    rule: str
    reason: str
    verdict: Verdict
    void_by: int | None

    def describe(self) -> str:
        return (
            f"{_clock(self.at)} {self.stage}: {self.action} by {self.rule}: {self.reason}"
            f"{_void(self.void_by)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The prompt was drawn. `void_by` is the attempt that resumed from before it, None if the
    draw is on the surviving lineage."""

    seq: int
    at: float
    draw_id: str
    stage: str
    attempt: int
    step: int
    system: str | None
    void_by: int | None

    def describe(self) -> str:
        system = f" with system instruction {self.system}" if self.system is not None else ""
        return (
            f"{_clock(self.at)} {self.stage}: drawn as {self.draw_id} at step {self.step} of"
            f" attempt {self.attempt}{system}{_void(self.void_by)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A draw of the prompt ended. `void_by` as in `Drawn`; `step` is None if none was given."""

    seq: int
    at: float
    draw_id: str
    stage: str
    attempt: int
    step: int | None
    outcome: DrawOutcome
    num_scored: int
    num_correct: int
    reason: str
    void_by: int | None

    def describe(self) -> str:
        step = f" at step {self.step}" if self.step is not None else ""
        reason = f": {self.reason}" if self.reason else ""
        return (
            f"{_clock(self.at)} {self.stage}: {self.draw_id} ended {self.outcome}{step} of attempt"
            f" {self.attempt}, {self.num_correct} of {self.num_scored} right{reason}"
            f"{_void(self.void_by)}"
        )


Event = Judged | Decided | Drawn | Ended


def prompt_history(ledger_path: Path, prompt_id: str) -> list[Event]:
    """Everything that happened to a prompt, in the order it was recorded; empty if nothing did.

    RunDirError if there is no ledger.
    """
    with closing(connect_readonly(ledger_path)) as connection:
        connection.execute("BEGIN")
        events: list[Event] = [
            *_judged(connection, prompt_id),
            *_decided(connection, prompt_id),
            *_drawn(connection, prompt_id),
            *_ended(connection, prompt_id),
        ]
    return sorted(events, key=lambda event: event.seq)


def _judged(connection: sqlite3.Connection, prompt_id: str) -> list[Judged]:
    rows = connection.execute(
        f"{VOID_VERDICTS} SELECT seq, at, void_by, {VERDICT_COLUMNS}"
        " FROM verdicts LEFT JOIN void_verdicts ON verdict = seq WHERE prompt_id = ?",
        (prompt_id,),
    )
    return [
        Judged(seq=seq, at=at, verdict=verdict_from_row(rest), void_by=void_by)
        for seq, at, void_by, *rest in rows
    ]


def _decided(connection: sqlite3.Connection, prompt_id: str) -> list[Decided]:
    verdict = ", ".join(f"v.{column.strip()}" for column in VERDICT_COLUMNS.split(","))
    rows = connection.execute(
        f"{VOID_VERDICTS} SELECT d.seq, d.at, d.stage, d.action, d.rule, d.reason, w.void_by,"
        f" {verdict} FROM decisions d JOIN verdicts v ON v.seq = d.verdict"
        " LEFT JOIN void_verdicts w ON w.verdict = d.verdict WHERE d.prompt_id = ?",
        (prompt_id,),
    )
    return [
        Decided(
            seq=seq,
            at=at,
            stage=stage,
            action=Action(action),
            rule=rule,
            reason=reason,
            verdict=verdict_from_row(rest),
            void_by=void_by,
        )
        for seq, at, stage, action, rule, reason, void_by, *rest in rows
    ]


def _drawn(connection: sqlite3.Connection, prompt_id: str) -> list[Drawn]:
    rows = connection.execute(
        "SELECT d.seq, d.at, d.draw_id, a.stage, d.attempt, d.drawn_at_step, d.system, d.void_by"
        " FROM draws d JOIN attempts a USING (attempt) WHERE d.prompt_id = ?",
        (prompt_id,),
    )
    return [
        Drawn(
            seq=row[0],
            at=row[1],
            draw_id=row[2],
            stage=row[3],
            attempt=row[4],
            step=row[5],
            system=row[6],
            void_by=row[7],
        )
        for row in rows
    ]


def _ended(connection: sqlite3.Connection, prompt_id: str) -> list[Ended]:
    # An id can be reused for another prompt once its draw is void: the outcome belongs to the
    # prompt that the draw had when it was last opened before.
    rows = connection.execute(
        "SELECT o.seq, o.at, o.draw_id, a.stage, o.attempt, o.step, o.outcome, o.num_scored,"
        " o.num_correct, o.reason, o.void_by"
        " FROM outcomes o JOIN attempts a USING (attempt)"
        " WHERE o.draw_id IN (SELECT draw_id FROM draws WHERE prompt_id = :prompt)"
        " AND :prompt = (SELECT d.prompt_id FROM draws d"
        "     WHERE d.draw_id = o.draw_id AND d.seq < o.seq ORDER BY d.seq DESC LIMIT 1)",
        {"prompt": prompt_id},
    )
    return [
        Ended(
            seq=row[0],
            at=row[1],
            draw_id=row[2],
            stage=row[3],
            attempt=row[4],
            step=row[5],
            outcome=DrawOutcome(row[6]),
            num_scored=row[7],
            num_correct=row[8],
            reason=row[9],
            void_by=row[10],
        )
        for row in rows
    ]


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _void(void_by: int | None) -> str:
    return "" if void_by is None else f" (void: attempt {void_by} resumed from before it)"
