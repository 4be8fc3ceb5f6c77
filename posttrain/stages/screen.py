"""Screening: the critic answers every training prompt, the easy half of the SFT set is dropped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from judges.judge import CriticJudge, Selected
from judges.selection import select, summarise
from posttrain.data.prompts import each_once
from posttrain.progress import Progress
from posttrain.run_dir import fingerprint_directory
from posttrain.stages.context import StageContext
from posttrain.types import Action, Verdict


@dataclass(frozen=True, kw_only=True)
class Screened:
    """The SFT rows to keep, by id, the critic's fingerprint, and what screening cost and found."""

    critic: str
    kept_rows: frozenset[str]
    metrics: dict[str, Any]


async def screen(context: StageContext, model: Path) -> Screened:
    """The critic is `model`, the policy that enters the stage. What it cannot judge stays: rows in
    the SFT set, and prompts in RL's with nothing known about them.

    Verdicts on every training and SFT prompt and decisions on the SFT prompts go to the ledger.
    """
    settings = context.settings.screen
    prompts = each_once([*context.train, *(row.prompt for row in context.sft_rows)])
    generators = await context.pools.serving(str(model))
    critic = fingerprint_directory(model)
    judge = CriticJudge(
        generators,
        context.pools.scorer,
        context.chat.encode,
        settings.judge,
        critic=critic,
        template=context.chat.template_hash,
    )
    progress = Progress("screen", len(prompts))

    domains = {row.prompt.prompt_id: row.prompt.domain for row in context.sft_rows}
    verdicts = await judge.judge(
        prompts,
        on_verdict=lambda verdict: context.ledger.record_verdicts([verdict]),
        on_decided=lambda: progress.advance(f"{judge.usage.samples} samples"),
        selected=Selected(
            selection=settings.selection,
            domains=domains,
            labelled={prompt.prompt_id for prompt in context.train},
        ),
    )
    of_sft = [v for v in verdicts if v.prompt_id in domains]
    decisions = select(of_sft, settings.selection, domains)
    context.ledger.record_decisions("sft", decisions)
    context.ledger.flush()
    dropped = {d.prompt_id for d in decisions if d.action is Action.DROP}
    kept_rows = frozenset(r.row_id for r in context.sft_rows if r.prompt.prompt_id not in dropped)
    summary = summarise(decisions)

    return Screened(
        critic=critic,
        kept_rows=kept_rows,
        metrics={
            "prompts": len(prompts),
            "prompts_given_up": len(prompts) - len(verdicts),
            "samples": judge.usage.samples,
            "completion_tokens": judge.usage.completion_tokens,
            "partly_solved_share": _partly_solved(verdicts),
            "sft_prompts": len(decisions),
            "sft_prompts_kept": summary.kept,
            "sft_rows_kept": len(kept_rows),
            "unsolved_share_of_kept": summary.unsolved_share,
            "kept_by_label": dict(summary.kept_by_label),
        },
    )


def _partly_solved(verdicts: list[Verdict]) -> float:
    """Share of prompts that were answered right at least once and not always."""
    return sum(0 < v.num_correct < v.num_samples for v in verdicts) / len(verdicts)
