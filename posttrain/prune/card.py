"""The dataset card: what is in the directory, by which critic, how difficult it was for that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

BAR = 30


def dataset_card(manifest: Mapping[str, Any]) -> str:
    """README.md with the header that `datasets.load_dataset` reads: the kept rows by default,
    `annotated` and `verdicts` by name."""
    suffix = manifest["settings"]["format"]
    configs = [
        {"config_name": "default", "data_files": f"data/kept/*.{suffix}", "default": True},
        {"config_name": "annotated", "data_files": f"data/annotated/*.{suffix}"},
        {"config_name": "verdicts", "data_files": f"data/verdicts/*.{suffix}"},
    ]
    header = yaml.safe_dump({"configs": configs, "tags": ["posttrain-prune"]}, sort_keys=False)
    return "\n".join([f"---\n{header}---", *_body(manifest)]) + "\n"


def _body(manifest: Mapping[str, Any]) -> list[str]:
    figures, source = manifest["figures"], manifest["source"]
    rows = figures["rows"]
    identity = manifest["judged_with"]
    return [
        f"# {source['stem']}, pruned",
        "",
        f"{rows['kept']:,} of {rows['judged']:,} rows of `{source['path']}`, all columns as they"
        f" were, chosen by `posttrain prune`: {describe_selection(manifest['settings'])}.",
        "",
        f"- critic: `{identity['critic']['model']}` (fingerprint"
        f" `{identity['critic']['fingerprint'][:16]}`, chat template `{identity['template']}`)",
        f"- judged by: {identity['method']}",
        f"- left out: {rows['dropped']:,} by the selection, {rows['held_out']:,} held out,"
        f" {rows['quarantined']:,} in `quarantine.jsonl`",
        f"- unsolved among what is kept: {_share(figures.get('unsolved_share_of_kept'))}",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'kept = load_dataset("PATH")["train"]',
        'every_row = load_dataset("PATH", "annotated")["train"]  # with prune_* columns',
        "```",
        "",
        f"## {manifest['metric']} by rows",
        "",
        "```",
        *histogram_lines(figures["histogram"]),
        "```",
        "",
        "## Domains",
        "",
        f"| domain | rows | kept | dropped | mean {manifest['metric']} | unsolved among kept |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {d['rows']:,} | {d['kept']:,} | {d['dropped_share']:.0%} |"
            f" {d['mean']:.3f} | {_share(d['unsolved_share_of_kept'])} |"
            for name, d in figures["domains"].items()
        ),
    ]


def describe_selection(settings: Mapping[str, Any]) -> str:
    """The cut in words: `the easiest 50% by pass@1 dropped`."""
    chosen = settings["selection"]
    metric = f"pass@{chosen['k']}" if chosen["k"] else chosen["metric"]
    if settings["method"] != "critic":
        metric += " (experimental)"
    if chosen["drop_easiest"] is not None:
        of_each = " of each domain" if chosen["by_domain"] else ""
        most = "easiest" if metric.startswith("pass") else "lowest"
        return f"the {most} {chosen['drop_easiest'] * 100:g}%{of_each} by {metric} dropped"
    if chosen["easy_above"] is not None:
        return f"prompts with {metric} above {chosen['easy_above']:g} dropped"
    return f"rows with {metric} below {chosen['drop_below']:g} dropped"


def histogram_lines(bins: list[Mapping[str, Any]]) -> list[str]:
    """`0.0–0.1 ████▒▒ 12 kept, 3 dropped`, one line a bin."""
    most = max(b["kept"] + b["dropped"] for b in bins) or 1
    lines = []
    for b in bins:
        filled = round(BAR * b["kept"] / most)
        light = round(BAR * (b["kept"] + b["dropped"]) / most) - filled
        bar = ("█" * filled + "▒" * light).ljust(BAR)
        span = f"{b['from']:.2f}–{b['to']:.2f}"
        lines.append(f"{span} {bar} {b['kept']:>8,} kept {b['dropped']:>8,} dropped")
    return lines


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
