"""`posttrain prune` on the command line: its options become settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.errors import SettingsError

DEFAULT_SHARE = 0.5

Text = str | None
Number = int | None
Share = float | None


def option(text: str) -> Any:
    return typer.Option(help=text)


def prune_command(
    source: Annotated[str, typer.Argument(help="JSONL, Parquet, a directory, or a hub name.")],
    model: Annotated[str, typer.Option(help="The critic: checkpoint, adapter, hub name.")],
    out: Annotated[Path, typer.Option(help="Directory to write; the same again goes on.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Other settings.", metavar="KEY.SUB=VALUE")
    ] = None,
    drop_easiest: Annotated[
        Share, option("Share of the prompts to drop (.5 if there is no other cut).")
    ] = None,
    easy_above: Annotated[Share, option("Drop what has a pass rate above this.")] = None,
    drop_below: Annotated[Share, option("Drop what has a grade or IFD below this.")] = None,
    metric: Annotated[Text, option("pass@1, or pass@K for a number K.")] = None,
    method: Annotated[str, option("critic, or experimental: grade, ifd.")] = "critic",
    by_domain: Annotated[bool, option("Take the share from each domain.")] = False,
    min_per_domain: Annotated[int, option("Keep at least so many in each.")] = 0,
    drop_unsolved: Annotated[
        bool | None, option("Drop what is never answered right (default: if over 90% go).")
    ] = None,
    reward: Annotated[Text, option("Verifier of rows that name none.")] = None,
    max_samples: Annotated[Number, option("Answers to a prompt, at most.")] = None,
    max_tokens: Annotated[Number, option("Tokens of an answer, at most.")] = None,
    max_length: Annotated[Number, option("Tokens of prompt and answer.")] = None,
    confidence: Annotated[Share, option("How sure a decision must be.")] = None,
    fixed: Annotated[bool, option("Exactly --max-samples to each prompt.")] = False,
    held_out: Annotated[list[str] | None, option("Set whose text must not be kept.")] = None,
    compare: Annotated[list[str] | None, option("Set to count shared text with.")] = None,
    split: Annotated[Text, option("Split of a data set.")] = None,
    subset: Annotated[Text, option("Subset of a data set.")] = None,
    limit: Annotated[Number, option("The first so many rows only.")] = None,
    sample: Annotated[Number, option("So many rows at random.")] = None,
    seed: Annotated[int, option("Of --sample and of a dry run.")] = 0,
    output_format: Annotated[str, typer.Option("--format", help="parquet, jsonl")] = "parquet",
    top_up: Annotated[bool, option("Ask on where another selection is unsure.")] = False,
    strict: Annotated[bool, option("Stop at the first row that cannot be used.")] = False,
    fresh: Annotated[bool, option("Delete what is in --out and start over.")] = False,
    dry_run: Annotated[bool, option("Estimate the cost from a probe; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Judge the rows of SOURCE with a critic and keep what is worth learning.

    What is not an option is a setting: source.columns.prompt=task, judge.concurrency=256,
    resources.rollout.actor.gpus=1, …
    """
    given = dict(locals())
    from posttrain.config import compose
    from posttrain.prune.settings import PruneSettings

    asked = compose(PruneSettings, _content(given), overrides or [], "posttrain prune")
    from posttrain.prune.estimate import estimate
    from posttrain.prune.run import prune
    from posttrain.stages.prune import critic_model, critic_opener, with_located_models

    settings = with_located_models(asked)
    critic = critic_model(settings.critic.model, settings.critic.max_length)
    opener = critic_opener(settings, out)
    if dry_run:
        guess = estimate(settings, out, critic, opener, fresh=fresh, top_up=top_up)
        _show(guess, as_json, is_estimate=True)
    else:
        report = prune(settings, out, critic, opener, fresh=fresh, top_up=top_up)
        _show(report, as_json, is_estimate=False)


_PLACES = {
    "source": "source.path",
    "split": "source.split",
    "subset": "source.subset",
    "limit": "source.limit",
    "sample": "source.sample",
    "model": "critic.model",
    "max_length": "critic.max_length",
    "method": "method",
    "max_samples": "judge.max_samples",
    "max_tokens": "judge.max_tokens",
    "confidence": "judge.labels.confidence",
    "drop_easiest": "selection.drop_easiest",
    "easy_above": "selection.easy_above",
    "drop_below": "selection.drop_below",
    "by_domain": "selection.by_domain",
    "min_per_domain": "selection.min_per_domain",
    "drop_unsolved": "selection.drop_unsolved",
    "reward": "rewards.default_verifier",
    "held_out": "overlap.held_out",
    "compare": "overlap.compare",
    "seed": "seed",
    "strict": "strict",
    "output_format": "format",
}
"""Option -> the setting that it stands for."""

_CUTS = ("drop_easiest", "easy_above", "drop_below")


def _content(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the options state, as a settings file would."""
    content: dict[str, Any] = {}
    for name, place in _PLACES.items():
        if given[name] is not None:
            _put(content, place, given[name])
    for name in ("held_out", "compare"):
        if given[name] is not None:
            _put(content, _PLACES[name], [_other_set(text) for text in given[name]])
    _put(content, "judge.adaptive", not given["fixed"])
    if not _names_a_cut(given):
        _put(content, "selection.drop_easiest", DEFAULT_SHARE)
    for key, value in _metric(given["metric"], given["method"]).items():
        _put(content, f"selection.{key}", value)
    return content


def _other_set(text: str) -> Any:
    """A name as it is; more than that, `{path: …, split: …}`, is YAML as in an override."""
    from posttrain.config import read_value

    return read_value(text, text) if text.startswith("{") else text


def _names_a_cut(given: Mapping[str, Any]) -> bool:
    """As an option, or as the setting that it stands for."""
    overridden = {override.partition("=")[0] for override in given["overrides"] or ()}
    return any(given[cut] is not None or _PLACES[cut] in overridden for cut in _CUTS)


def _put(content: dict[str, Any], place: str, value: Any) -> None:
    *sections, last = place.split(".")
    for section in sections:
        content = content.setdefault(section, {})
    content[last] = value


def _metric(text: str | None, method: str) -> dict[str, Any]:
    if text is None:
        return {"metric": "pass@1" if method == "critic" else method}
    if match := re.fullmatch(r"pass@([1-9][0-9]*)", text):
        k = int(match[1])
        return {"metric": "pass@1"} if k == 1 else {"metric": "pass@k", "k": k}
    raise SettingsError(f"--metric {text}: write pass@1, or pass@K for a number K")


def _show(record: Mapping[str, Any], as_json: bool, *, is_estimate: bool) -> None:
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
        return
    from posttrain.console import stdout_console
    from posttrain.prune.terminal import print_estimate, print_summary

    console = stdout_console()
    (print_estimate if is_estimate else print_summary)(record, console)
