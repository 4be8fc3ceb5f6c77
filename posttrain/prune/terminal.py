"""The summary that `posttrain prune` ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from posttrain.prune.card import describe_selection, histogram_lines


def print_summary(report: Mapping[str, Any], console: Console) -> None:
    """`report` is the manifest with `examples` and `out`."""
    figures = report["figures"]
    rows, undecided = figures["rows"], figures["undecided"]

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    chosen = describe_selection(report["settings"])
    line(f"{rows['kept']:,} of {rows['judged']:,} rows kept: {chosen}")
    line(
        f"judged: {figures['prompts']['judged']:,} prompts with {figures['answers']:,} answers by"
        f" {report['judged_with']['critic']['model']}"
    )
    line("")
    line(f"rows by {report['metric']}  (█ kept, ▒ dropped)")
    for bar in histogram_lines(figures["histogram"]):
        line(f"  {bar}")
    console.print(_domains(report))
    if "unsolved_share_of_kept" in figures:
        share = figures["unsolved_share_of_kept"]
        shown = "nothing is kept" if share is None else f"{share:.1%} of the kept rows"
        line(f"never answered right: {shown}")
    for set_name, count in figures["overlaps"].items():
        line(f"{count:,} rows share text with {set_name}")
    if rows["held_out"]:
        line(f"{rows['held_out']:,} rows dropped because they are held out")
    if rows["quarantined"]:
        line(f"{rows['quarantined']:,} rows could not be used; see quarantine.jsonl:")
        for reason, count in figures["quarantine"].items():
            line(f"  {count:>8,}  {reason}")
    for advice in report["advice"]:
        line(advice)
    if undecided["prompts"]:
        line("")
    line("examples")
    for example in report["examples"]:
        counts = f" {example['correct']}/{example['samples']}" if example["samples"] else ""
        kept = "kept" if example["kept"] else "dropped"
        value = f"{example['value']:.2f}"
        line(f"  {example['bucket']:9}{value}{counts} {kept}: {example['prompt']}")
    line("")
    line(f"written to {report['out']}; load it with datasets.load_dataset({report['out']!r})")


def print_estimate(estimate: Mapping[str, Any], console: Console) -> None:
    for name, value in estimate.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        console.print(f"{name.replace('_', ' '):32}{shown}", highlight=False, markup=False)


def _domains(report: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("domain", "rows", "kept", "dropped", f"mean {report['metric']}", "unsolved/kept"):
        table.add_column(name, justify="left" if name == "domain" else "right", overflow="fold")
    for name, d in report["figures"]["domains"].items():
        unsolved = d["unsolved_share_of_kept"]
        table.add_row(
            escape(name),
            f"{d['rows']:,}",
            f"{d['kept']:,}",
            f"{d['dropped_share']:.0%}",
            f"{d['mean']:.3f}",
            "–" if unsolved is None else f"{unsolved:.1%}",
        )
    return table
