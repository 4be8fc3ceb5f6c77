"""Groups on disk as they were trained or rejected: Parquet files, for inspection and mining."""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posttrain.atomic import PARTIAL, fsync_path
from posttrain.types import DrawOutcome, RolloutGroup

GROUPS_PER_FILE = 512
COLUMNS = (
    *("draw_id", "prompt_id", "domain", "system", "outcome", "text", "num_tokens"),
    *("finish_reason", "reward", "correctness", "reward_outcome", "components"),
    *("oldest_version", "newest_version", "version_spans", "sampling"),
)


class RolloutLog:
    """Writes one file for every `GROUPS_PER_FILE` groups, and on `flush` for those that remain.

    A row is one answer: `draw_id`, `prompt_id`, `domain`, `system` (null for none), `outcome` of
    the draw, `text`, `num_tokens`, `finish_reason`, `reward` and `correctness` (null if unscored),
    `reward_outcome`, `components` (JSON), `oldest_version`, `newest_version`, `version_spans`
    (JSON: which weights wrote which tokens, a list of [start, end, version]), `sampling` (JSON: the
    fields of `posttrain.types.Sampling`). Files are named by attempt and number, so that a resumed
    run adds to them.
    """

    def __init__(self, directory: Path, attempt: int) -> None:
        self._directory = directory
        self._attempt = attempt
        self._rows: list[dict[str, Any]] = []
        self._groups = 0
        self._files = 0

    def append(self, group: RolloutGroup, outcome: DrawOutcome) -> None:
        self._rows += rows_of(group, outcome)
        self._groups += 1
        if self._groups == GROUPS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """What was appended is on disk, before a checkpoint says that it is. A reader sees whole
        files only."""
        if not self._rows:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._directory.mkdir(exist_ok=True)
        target = self._directory / f"{self._attempt:03d}-{self._files:05d}.parquet"
        partial = target.with_name(f".{target.name}{PARTIAL}")
        pq.write_table(pa.Table.from_pylist(self._rows, _schema()), partial)
        fsync_path(partial)
        partial.rename(target)
        for directory in (self._directory, self._directory.parent):
            fsync_path(directory)
        self._rows, self._groups = [], 0
        self._files += 1


def _schema() -> Any:
    """A column without a value in a whole file would otherwise have a type of its own there."""
    import pyarrow as pa

    others = {"num_tokens": pa.int64(), "reward": pa.float64(), "correctness": pa.float64()}
    return pa.schema([(name, others.get(name, pa.string())) for name in COLUMNS])


def rows_of(group: RolloutGroup, outcome: DrawOutcome) -> list[dict[str, Any]]:
    """One row an answer, see `RolloutLog`."""
    sampling = json.dumps(asdict(group.sampling))
    return [
        {
            "draw_id": group.draw_id,
            "prompt_id": group.prompt.prompt_id,
            "domain": group.prompt.domain,
            "system": group.system,
            "outcome": outcome.value,
            "text": rollout.text,
            "num_tokens": len(rollout.completion_token_ids),
            "finish_reason": rollout.finish_reason,
            "reward": reward.value,
            "correctness": reward.correctness,
            "reward_outcome": reward.outcome.value,
            "components": json.dumps(dict(reward.components)),
            "oldest_version": str(rollout.oldest_version),
            "newest_version": str(max(span.version for span in rollout.version_spans)),
            "version_spans": json.dumps(
                [(span.start, span.end, str(span.version)) for span in rollout.version_spans]
            ),
            "sampling": sampling,
        }
        for rollout, reward in zip(group.rollouts, group.rewards, strict=True)
    ]


def newest_groups(
    directory: Path, count: int, surviving: Container[tuple[str, int]]
) -> list[list[dict[str, Any]]]:
    """The rows of the `count` groups that were written last, each group's together, newest first.
    Fewer if there are no more. Only (draw, attempt) in `surviving` count: an attempt that was
    killed has left groups of steps that never happened, too."""
    import pyarrow.parquet as pq

    groups: list[list[dict[str, Any]]] = []
    for file in sorted(directory.glob("*.parquet"), reverse=True):
        attempt = int(file.name.partition("-")[0])
        by_draw: dict[str, list[dict[str, Any]]] = {}
        for row in pq.read_table(file).to_pylist():
            if (row["draw_id"], attempt) in surviving:
                by_draw.setdefault(row["draw_id"], []).append(row)
        groups += reversed(by_draw.values())
        if len(groups) >= count:
            break
    return groups[:count]
