"""The table that a run ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from posttrain.progress import duration

TITLES = {"start": "start", "screen": "screening", "sft": "SFT", "rl": "RL", "dpo": "DPO"}


def print_report(
    evaluations: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float],
    policy: str,
    console: Console,
) -> None:
    """Accuracy by domain after each stage, where the time went, and how to use the result.

    Args:
        evaluations: stage -> `posttrain.evaluation.summarise`.
        seconds: stage -> how long it took, its evaluation included.
    """
    console.print(_accuracy_table(evaluations))
    console.print(_form_table(evaluations))
    spent = " · ".join(f"{TITLES[name]} {duration(s)}" for name, s in seconds.items())
    console.print(f"Time: {spent} · in all {duration(sum(seconds.values()))}")
    console.print(f"\nThe policy: {policy}", soft_wrap=True)
    console.print(
        f"  transformers: AutoModelForCausalLM.from_pretrained({policy!r})\n"
        f"  vLLM:         vllm serve {policy}",
        soft_wrap=True,
        highlight=False,
    )


def print_evaluation(summary: Mapping[str, Any], console: Console) -> None:
    """One evaluation, as `posttrain eval` shows it."""
    console.print(_accuracy_table({"start": summary}))
    console.print(_form_table({"start": summary}))


def _accuracy_table(evaluations: Mapping[str, Mapping[str, Any]]) -> Table:
    metrics = _pass_metrics(evaluations)
    table = Table(title="Held-out accuracy, with 95% intervals over prompts")
    table.add_column("domain")
    for stage in evaluations:
        for metric in metrics:
            table.add_column(f"{TITLES[stage]}\n{metric}", justify="right")
    some = next(iter(evaluations.values()))
    for domain in [*some["domains"], "all"]:
        cells = []
        for summary in evaluations.values():
            row = summary["all"] if domain == "all" else summary["domains"][domain]
            cells += [_interval(row[metric]) for metric in metrics]
        table.add_row(domain, *cells, end_section=domain == list(some["domains"])[-1])
    return table


def _form_table(evaluations: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="Greedy accuracy and the form of the answers, all domains")
    table.add_column("")
    for stage in evaluations:
        table.add_column(TITLES[stage], justify="right")
    first = next(iter(evaluations.values()))["all"]
    for metric in first:
        if metric.startswith("pass@") and "/" not in metric:
            continue
        cells = [
            _interval(s["all"][metric], digits=1 if metric == "tokens" else 3)
            for s in evaluations.values()
        ]
        table.add_row(_describe(metric), *cells)
    return table


def _describe(metric: str) -> str:
    if metric.startswith("ignored/"):
        return f"instruction {metric.partition('/')[2]!r} ignored"
    if metric.startswith("pass@1/"):
        return f"pass@1 under {metric.partition('/')[2]!r}"
    return {
        "greedy": "greedy accuracy",
        "tokens": "tokens an answer",
        "unparsable": "unparsable answers",
        "truncated": "truncated answers",
    }[metric]


def _pass_metrics(evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    first = next(iter(evaluations.values()))["all"]
    return [metric for metric in first if metric.startswith("pass@") and "/" not in metric]


def _interval(estimate: Mapping[str, float], digits: int = 3) -> str:
    def show(value: float) -> str:
        text = f"{value:.{digits}f}"
        return text.removeprefix("0") if 0 <= value < 1 else text

    return f"{show(estimate['mean'])} [dim]{show(estimate['low'])}–{show(estimate['high'])}[/dim]"
