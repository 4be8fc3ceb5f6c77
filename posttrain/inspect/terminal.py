"""A run in the terminal: tables, sparklines, and the differences between two."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import polars as pl
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from posttrain.inspect.compare import Difference
from posttrain.inspect.difficulty import RATE_BINS, pass_rate_bins
from posttrain.inspect.fates import FATES
from posttrain.inspect.findings import findings
from posttrain.inspect.run import Run
from posttrain.progress import duration

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 48
SPARKS = {
    "pass@1": "pass@1 of all answers",
    "reward_mean": "reward",
    "zero_advantage_share": "groups without signal",
    "learner_idle_share": "learner waits",
    "rollout_idle_share": "engines stand still",
    "lag_mean": "lag",
    "trained_tokens_per_s": "trained tokens a second",
    "learner/entropy": "entropy",
    "learner/k3": "mismatch k3",
}


def print_run(run: Run, console: Console) -> None:
    """What a reader looks for first, then where it comes from."""
    console.print(f"[bold]{escape(run.name)}[/bold]  {escape(str(run.path))}", highlight=False)
    for problem in run.problems:
        console.print(f"[red]left out:[/red] {escape(problem.message)}")
    if run.is_empty:
        console.print("Nothing was recorded yet.")
        return
    table = _table("", "")
    for finding in findings(run):
        table.add_row(f"[bold]{finding.question}[/bold]", escape(finding.answer))
    console.print(table)
    for title, part in (
        ("Stages", _stages(run)),
        ("Held-out pass@1 by domain", _accuracy(run)),
        ("Prompts by pass rate in screening", _histogram(run)),
        ("Where the prompts went", _fates(run)),
        ("RL, step by step", _sparks(run)),
    ):
        if part.row_count:
            console.print(f"[bold]{title}")
            console.print(part)


def print_differences(
    names: Sequence[str], stage: str | None, differences: Sequence[Difference], console: Console
) -> None:
    """`stage`: after which both were evaluated."""
    after = f"; held-out figures after {stage}" if stage else ""
    console.print(f"[bold]{escape(names[1])} against {escape(names[0])}[/bold]{after}")
    table = _table("", "domain", *map(escape, names), "difference", "95% interval", "over")
    for d in differences:
        mark = "[bold]" if d.is_clear else ""
        table.add_row(
            d.metric,
            escape(d.domain),
            f"{d.first:.3f}",
            f"{d.second:.3f}",
            f"{mark}{d.difference.mean:+.3f}",
            f"{d.difference.low:+.3f} to {d.difference.high:+.3f}",
            d.over,
        )
    console.print(table)


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """Block characters between the lowest and the highest value, neighbours averaged to fit.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7])
    '▁▂▃▄▅▆▇█'
    >>> sparkline([1, 1, 3, 3], width=2), sparkline([2, 2])
    ('▁█', '▁▁')
    """
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else [0]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    if not means:
        return ""
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(BLOCKS[round((m - low) / span * (len(BLOCKS) - 1))] for m in means)


def _stages(run: Run) -> Table:
    table = _table("stage", "state", "time", "held-out pass@1")
    for row in run.stages.iter_rows(named=True):
        table.add_row(
            escape(row["stage"]),
            row["state"],
            _or_dash(row["seconds"], duration),
            _or_dash(row["pass@1"], "{:.3f}".format),
        )
    return table


def _accuracy(run: Run) -> Table:
    rows = run.accuracy.filter((pl.col("metric") == "pass@1") & pl.col("step").is_null())
    stages = rows["stage"].unique(maintain_order=True).to_list()
    table = _table("domain", *(stage if stage == "start" else f"after {stage}" for stage in stages))
    found = {(r["stage"], r["domain"]): r for r in rows.iter_rows(named=True)}
    last = rows.filter((pl.col("stage") == stages[-1]) if stages else pl.lit(value=False))
    for domain in last.sort("mean")["domain"]:
        cells = [found.get((stage, domain)) for stage in stages]
        table.add_row(
            escape(domain),
            *(
                "–" if c is None else f"{c['mean']:.3f} [dim]{c['low']:.2f}–{c['high']:.2f}[/dim]"
                for c in cells
            ),
        )
    return table


def _histogram(run: Run) -> Table:
    bins = pass_rate_bins(run.verdicts, run.prompts)
    actions = [a for a in ("keep", "drop", "retest") if a in set(bins["action"])]
    table = _table("right answers", "prompts", "", *actions)
    most = bins.group_by("bin").agg(pl.col("prompts").sum())["prompts"].max() or 1
    assert isinstance(most, int)
    for name in RATE_BINS if len(bins) else ():
        rows = dict(bins.filter(pl.col("bin") == name).select("action", "prompts").rows())
        total = sum(rows.values())
        counts = [f"{rows.get(action, 0):,}" for action in actions]
        table.add_row(name, f"{total:,}", "█" * round(30 * total / most), *counts)
    return table


def _fates(run: Run) -> Table:
    known = run.prompts.drop_nulls("fate")
    there = [fate for fate in FATES if fate in set(known["fate"])]
    table = _table("domain", *there)
    if run.draws.is_empty():
        return table
    for domain in sorted(set(known["domain"]), key=str):
        rows = known.filter(pl.col("domain").eq_missing(pl.lit(domain)))
        counts = dict(rows.group_by("fate").len().rows())
        table.add_row(escape(domain or "unknown"), *(f"{counts.get(f, 0):,}" for f in there))
    return table


def _sparks(run: Run) -> Table:
    table = _table("", "first", "", "last")
    steps = run.steps.filter(pl.col("stage") == "rl")
    for name, words in SPARKS.items():
        values = steps[name].drop_nulls().to_list() if name in steps.columns else []
        if values:
            table.add_row(words, f"{values[0]:.3g}", sparkline(values), f"{values[-1]:.3g}")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(
            column, justify="left" if index == 0 or not column else "right", overflow="fold"
        )
    return table


def _or_dash(value: Any, show: Any) -> str:
    return "–" if value is None else str(show(value))
