"""The table that a run ends with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from posttrain.progress import duration

TITLES = {"start": "start", "screen": "screening", "sft": "SFT", "rl": "RL", "dpo": "DPO"}
EVALUATED = "policy"
"""Heads the only column where a single policy is measured."""

Summaries = Mapping[str, Mapping[str, Any]]
"""Column -> `posttrain.evaluation.summarise`."""


def print_report(
    evaluations: Summaries,
    seconds: Mapping[str, float],
    policy: str,
    console: Console,
    metrics: Mapping[str, Mapping[str, Any]],
) -> None:
    """Accuracy by domain after each stage, what SFT and DPO came to, where the time went, and how
    to use the result.

    Args:
        evaluations: stage -> `posttrain.evaluation.summarise`.
        seconds: stage -> how long it took, its evaluation included.
        metrics: stage -> what the stage itself recorded.
    """
    _print_tables({TITLES[stage]: summary for stage, summary in evaluations.items()}, console)
    for note in [*_sft_notes(metrics.get("sft", {})), *_dpo_notes(metrics.get("dpo", {}))]:
        console.print(note, highlight=False, markup=False)
    spent = " · ".join(f"{TITLES[name]} {duration(s)}" for name, s in seconds.items())
    console.print(f"Time: {spent} · in all {duration(sum(seconds.values()))}")
    console.print(
        f"\nThe policy: {policy}\n"
        f"  transformers: AutoModelForCausalLM.from_pretrained({policy!r})\n"
        f"  vLLM:         {_serve(policy)}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _serve(policy: str) -> str:
    adapter = Path(policy) / "adapter_config.json"
    if not adapter.is_file():
        return f"vllm serve {policy}"
    config = json.loads(adapter.read_text(encoding="utf-8"))
    room = max(8, 1 << (config["r"] - 1).bit_length())  # vLLM takes powers of two only
    return (
        f"vllm serve {config['base_model_name_or_path']} --enable-lora "
        f"--max-lora-rank {room} --lora-modules policy={policy}"
    )


def _sft_notes(sft: Mapping[str, Any]) -> list[str]:
    if "checkpoints" not in sft:
        return []
    saved = {step: row for step, row in sft["checkpoints"].items() if step != "entered"}
    over = [step for step, row in saved.items() if row["over_constrained"]]
    chosen = f"SFT: step {sft['kept_step']} of {', '.join(saved)} was kept"
    return [f"{chosen}; over-constrained (pass@k fell): {', '.join(over) or 'none'}"]


def _dpo_notes(dpo: Mapping[str, Any]) -> list[str]:
    if "pairs_by_case" not in dpo:
        return []
    cases = " · ".join(f"{case} {count}" for case, count in dpo["pairs_by_case"].items())
    notes = [f"DPO: {dpo['pairs']} pairs, by the corner case they mend: {cases}"]
    if not dpo["kept"]:
        change = dpo["pass@1_change"]
        notes.append(f"DPO: undone, for held-out pass@1 had changed by {change:+.3f}")
    return notes


def print_evaluation(summary: Mapping[str, Any], console: Console) -> None:
    """One evaluation, as `posttrain eval` shows it."""
    _print_tables({EVALUATED: summary}, console)


def _print_tables(summaries: Summaries, console: Console) -> None:
    metrics = list(dict.fromkeys(name for s in summaries.values() for name in s["all"]))
    accuracies = [name for name in metrics if _is_accuracy(name)]
    for metric in accuracies:
        console.print(f"[bold]Held-out {metric}, with 95% intervals over prompts")
        console.print(_domain_table(metric, summaries))
    console.print("[bold]Greedy accuracy and the form of the answers, all domains")
    console.print(_form_table([m for m in metrics if m not in accuracies], summaries))


def _is_accuracy(metric: str) -> bool:
    return metric.startswith("pass@") and "/" not in metric


def _domain_table(metric: str, summaries: Summaries) -> Table:
    table = _table("domain", summaries)
    *domains, last = next(iter(summaries.values()))["domains"]
    for domain in [*domains, last]:
        cells = [_interval(s["domains"][domain].get(metric)) for s in summaries.values()]
        table.add_row(escape(domain), *cells, end_section=domain == last)
    table.add_row("all", *(_interval(s["all"].get(metric)) for s in summaries.values()))
    return table


def _form_table(metrics: list[str], summaries: Summaries) -> Table:
    table = _table("", summaries)
    for metric in metrics:
        digits = 1 if metric == "tokens" else 3
        cells = [_interval(s["all"].get(metric), digits) for s in summaries.values()]
        table.add_row(escape(_describe(metric)), *cells)
    return table


def _table(first_column: str, summaries: Summaries) -> Table:
    """On a narrow terminal a cell becomes two lines, mean and interval, and nothing is cut."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first_column, overflow="fold")
    for column in summaries:
        table.add_column(column, justify="right", min_width=len("1.000–1.000"), overflow="fold")
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


def _interval(estimate: Mapping[str, float] | None, digits: int = 3) -> str:
    if estimate is None:
        return "–"

    def show(value: float) -> str:
        text = f"{value:.{digits}f}"
        return text.removeprefix("0") if 0 <= value < 1 else text

    return f"{show(estimate['mean'])} [dim]{show(estimate['low'])}–{show(estimate['high'])}[/dim]"
