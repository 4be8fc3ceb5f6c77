"""`posttrain reward` on the command line: what verifiers make of answers that are there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from posttrain.reward_file import Scores


def reward_command(
    file: Annotated[Path, typer.Argument(help="JSONL of questions and completions.")],
    verifier: Annotated[
        str | None, typer.Option(help="Scores every row, whatever row and settings name.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML whose section `rewards` is taken.")
    ] = None,
    explain: Annotated[bool, typer.Option(help="Every row with its reason.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Answers scored at the same time.")] = 1,
    strict: Annotated[bool, typer.Option(help="Stop at the first unusable row.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Score the completions of FILE and count the outcomes."""
    from posttrain.config import load_rewards
    from posttrain.reward_file import chosen, score_file
    from rewards.shaping import RewardSettings

    settings = RewardSettings() if config is None else load_rewards(config)
    settings = chosen(settings, verifier)
    scores = score_file(file, settings, forced=verifier is not None, workers=workers, strict=strict)
    if as_json:
        record = scores.summary()
        if explain:
            record["rewards"] = list(_rewards(scores))
        print(json.dumps(record, ensure_ascii=False))
        return
    if settings.overlong_penalty is not None:
        print("reward: rows hold no tokens, so the overlong penalty is left out", file=sys.stderr)
    _print(scores, explain)


def _rewards(scores: Scores) -> list[dict[str, Any]]:
    return [
        {
            "row": row.number,
            "value": reward.value,
            "correctness": reward.correctness,
            "outcome": reward.outcome.value,
            "components": dict(reward.components),
            "explanation": reward.explanation,
        }
        for row, reward in zip(scores.rows, scores.rewards, strict=True)
    ]


def _print(scores: Scores, explain: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from posttrain.console import stdout_console

    # A table that is piped into a file must not be cut to 80 columns.
    console = stdout_console()
    if explain:
        for found in _rewards(scores):
            value = "unscored" if found["value"] is None else f"{found['value']:.3g}"
            line = f"row {found['row']}: {value} {found['outcome']}"
            if found["explanation"]:
                line = f"{line}: {found['explanation']}"
            console.print(Text(line))
    summary = scores.summary()
    table = Table("outcome", "rows", "share")
    for outcome, count in summary["outcomes"].items():
        table.add_row(outcome, str(count), f"{count / len(scores.rows):.1%}")
    console.print(table)
    for name in ("mean_correctness", "mean_value"):
        if summary[name] is not None:
            console.print(f"{name.replace('_', ' ')}: {summary[name]:.4g}")
    if scores.rejected:
        first = scores.rejected[0]
        console.print(
            Text(
                f"{len(scores.rejected)} rows left out, in {scores.quarantine}; the first: row "
                f"{first.number}, {first.reason}"
            )
        )
