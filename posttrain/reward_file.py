"""Scores the rows of a JSONL file, to try out a verifier or to audit one.

A row is an object with `question` (a text) or `messages` (a conversation), and `completion`;
optionally `answer` (the reference), `domain`, `verifier`, `system` (a system message that the
policy saw) and `finish_reason` (`length` for a completion that was cut off).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.atomic import write_atomically
from posttrain.data.json_lines import MalformedLine, parse_object, read_lines
from posttrain.data.prompts import content_hash
from posttrain.errors import DataError, StageError
from posttrain.progress import Progress
from posttrain.types import Message, Outcome, Prompt, Reward, Rollout, SystemInstruction
from rewards.code import require_sandbox
from rewards.pool import ScorerPool
from rewards.shaping import RewardSettings
from rewards.verifiers import check_custom, check_reference, known_names, verifier_names

CONCURRENCY = 64
"""Rows under way; the pool has its own bounds below that."""

_COLUMNS = {
    "question", "messages", "completion", "answer", "domain", "verifier", "system", "finish_reason",
}  # fmt: skip


class _Unusable(Exception):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Line `number` (from 1) of the file."""

    number: int
    prompt: Prompt
    rollout: Rollout
    system: SystemInstruction | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A line that holds no row, and why."""

    number: int
    reason: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Rows with their rewards, in the order of the file, and the lines that were left out."""

    file: Path
    rows: Sequence[Row]
    rewards: Sequence[Reward]
    rejected: Sequence[Rejected]
    quarantine: Path | None
    seconds: float

    def summary(self) -> dict[str, Any]:
        """`outcomes` counts every scored row; the means leave out what is unscored and are None
        when nothing is left."""
        values = [r.value for r in self.rewards if r.value is not None]
        correctness = [r.correctness for r in self.rewards if r.correctness is not None]
        outcomes = Counter(reward.outcome for reward in self.rewards)
        return {
            "file": str(self.file),
            "rows": len(self.rows),
            "outcomes": {outcome.value: outcomes[outcome] for outcome in Outcome},
            "mean_correctness": fmean(correctness) if correctness else None,
            "mean_value": fmean(values) if values else None,
            "rejected": [{"row": r.number, "reason": r.reason} for r in self.rejected],
            "quarantine": None if self.quarantine is None else str(self.quarantine),
            "seconds": self.seconds,
        }


def chosen(settings: RewardSettings, verifier: str | None) -> RewardSettings:
    """`verifier` scores every row, whatever row and settings name. Raises DataError for one that is
    not there, SettingsError for a custom one that cannot be used."""
    check_custom(settings)
    if verifier is None:
        return settings
    if verifier not in known_names(settings):
        raise DataError(
            f"--verifier {verifier}: there are {', '.join(known_names(settings))}; judge, "
            "reward_model and your own need a section `rewards` in --config"
        )
    return settings.model_copy(update={"default_verifier": verifier, "verifiers": {}})


def score_file(
    file: Path, settings: RewardSettings, *, forced: bool, workers: int, strict: bool
) -> Scores:
    """Scores every row. What cannot be used is written beside the file, as NAME.quarantined.jsonl
    with row and reason. `forced` ignores the verifiers that rows name.

    Raises:
        DataError: no such file, no usable row, or with `strict` any that is not usable.
        SettingsError, SandboxError: the verifier cannot work here.
        StageError: not one row could be scored.
    """
    started = time.monotonic()
    rows, rejected = _read(file, settings, forced=forced, strict=strict)
    quarantine = _quarantine(file, rejected)
    if not rows:
        reason = f"; row {rejected[0].number}: {rejected[0].reason}" if rejected else ""
        raise DataError(f"{file} has no row that can be scored{reason}")
    if any("code" in verifier_names(row.prompt, settings) for row in rows):
        require_sandbox(settings.code)
    # Rows hold text, no tokens: their length cannot be told.
    settings = settings.model_copy(update={"overlong_penalty": None})
    with ScorerPool(workers, settings) as pool:
        rewards = asyncio.run(_score(pool, rows))
    if all(reward.value is None for reward in rewards):
        raise StageError(f"not one of {len(rows)} rows could be scored: {rewards[0].explanation}")
    return Scores(
        file=file,
        rows=rows,
        rewards=rewards,
        rejected=rejected,
        quarantine=quarantine,
        seconds=time.monotonic() - started,
    )


async def _score(pool: ScorerPool, rows: Sequence[Row]) -> list[Reward]:
    rewards: dict[int, Reward] = {}
    waiting = iter(enumerate(rows))
    progress = Progress("reward", len(rows))

    async def work() -> None:
        for index, row in waiting:
            (rewards[index],) = await pool.score(row.prompt, [row.rollout], row.system)
            progress.advance()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [rewards[index] for index in range(len(rows))]


def _read(
    file: Path, settings: RewardSettings, *, forced: bool, strict: bool
) -> tuple[list[Row], list[Rejected]]:
    if not file.is_file():
        raise DataError(f"{file} is no file; give a JSONL file of questions and completions")
    rows: list[Row] = []
    rejected: list[Rejected] = []
    for line in read_lines(file):
        try:
            _, record = parse_object(line)
            row = _row(line.number, record, file.stem, forced=forced)
            check_reference(row.prompt, settings)
            rows.append(row)
        except (MalformedLine, _Unusable, DataError) as error:
            if strict:
                raise DataError(f"{file}, row {line.number}: {error}") from error
            shown = (line.content or b"").decode(errors="backslashreplace")
            rejected.append(Rejected(number=line.number, reason=str(error), content=shown))
    return rows, rejected


def _row(number: int, record: Mapping[str, Any], stem: str, *, forced: bool) -> Row:
    """Columns that are not read are let through: files of other tools have many."""
    for column in _COLUMNS - {"answer", "messages"}:
        if not isinstance(record.get(column), str | None):
            raise _Unusable(f"column {column!r} must be a text, got {str(record[column])[:80]}")
    if record.get("completion") is None:
        raise _Unusable(f"column 'completion' is missing. Columns there: {sorted(record)}")
    messages = _messages(record)
    verifier = None if forced else record.get("verifier")
    system = record.get("system")
    prompt = Prompt(
        prompt_id=content_hash(messages),
        messages=messages,
        reference=record.get("answer"),
        domain=record.get("domain") or stem,
        metadata={} if verifier is None else {"verifier": verifier},
    )
    rollout = Rollout(
        rollout_id=f"{stem}:{number}",
        draw_id=stem,
        prompt_token_ids=(),
        completion_token_ids=(),
        rollout_logprobs=(),
        text=record["completion"],
        finish_reason=record.get("finish_reason") or "stop",
        version_spans=(),
    )
    instruction = None if system is None else SystemInstruction(name="row", text=system)
    return Row(number=number, prompt=prompt, rollout=rollout, system=instruction)


def _messages(record: Mapping[str, Any]) -> tuple[Message, ...]:
    if "messages" not in record:
        if not record.get("question"):
            raise _Unusable(
                f"there is neither 'question' nor 'messages'. Columns there: {sorted(record)}"
            )
        return (Message(role="user", content=record["question"]),)
    match record["messages"]:
        case [_, *_] as turns:
            pass
        case other:
            raise _Unusable(f"column 'messages' is no conversation: {str(other)[:80]}")
    messages = []
    for turn in turns:
        match turn:
            case {"role": str(role), "content": str(content)}:
                messages.append(Message(role=role, content=content))
            case _:
                raise _Unusable(f"a turn is {{role: text, content: text}}, got {str(turn)[:80]}")
    return tuple(messages)


def _quarantine(file: Path, rejected: Sequence[Rejected]) -> Path | None:
    """Of this file as it is now: what an earlier call has left there goes."""
    place = file.with_name(f"{file.name}.quarantined.jsonl")
    if not rejected:
        place.unlink(missing_ok=True)
        return None
    lines = (
        json.dumps(
            {"file": str(file), "row": r.number, "reason": r.reason, "content": r.content},
            ensure_ascii=False,
        )
        for r in rejected
    )
    write_atomically(place, "\n".join(lines) + "\n")
    return place
