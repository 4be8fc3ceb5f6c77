"""Screening with a critic that is as often right as the question says."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prune_fakes import FakeEngine, question

from judges.judge import JudgeSettings
from posttrain.config import ScreenSettings
from posttrain.data.chat import ChatFormat
from posttrain.data.prompts import make_prompt
from posttrain.stages.screen import screen
from posttrain.types import Decision, Verdict


class Ledger:
    def __init__(self) -> None:
        self.verdicts: list[Verdict] = []
        self.decisions: list[Decision] = []

    def record_verdicts(self, verdicts: list[Verdict]) -> None:
        self.verdicts += verdicts

    def record_decisions(self, _: str, decisions: list[Decision]) -> None:
        self.decisions += decisions

    def flush(self) -> None:
        pass


def context(
    policy: Path, rates: list[tuple[str, float]], *, adaptive: bool = False, **selection: Any
) -> Any:
    chat = ChatFormat(str(policy))
    engine = FakeEngine(chat)

    async def serving(_: str) -> FakeEngine:
        return engine

    rows = [
        SimpleNamespace(
            row_id=f"{domain}{number}",
            prompt=make_prompt(question(number, rate), reference="1", domain=domain),
        )
        for number, (domain, rate) in enumerate(rates)
    ]
    judge = JudgeSettings(adaptive=adaptive, max_samples=16, max_tokens=16, seed=0)
    settings = ScreenSettings.model_validate({"judge": judge, "selection": selection})
    return SimpleNamespace(
        settings=SimpleNamespace(screen=settings),
        train=[],
        sft_rows=rows,
        pools=SimpleNamespace(serving=serving, scorer=engine),
        chat=chat,
        ledger=Ledger(),
    )


def test_each_domain_loses_its_own_share(tiny_policy: Path) -> None:
    rates = [("a", 1.0), ("a", 0.9), ("b", 0.3), ("b", 0.1)]
    shared = context(tiny_policy, rates, drop_easiest=0.5)
    assert asyncio.run(screen(shared, tiny_policy)).kept_rows == {"b2", "b3"}
    apart = context(tiny_policy, rates, drop_easiest=0.5, by_domain=True)
    screened = asyncio.run(screen(apart, tiny_policy))
    assert screened.kept_rows == {"a1", "b3"}
    assert screened.metrics["sft_rows_kept"] == 2
    assert "easiest 50% of its domain" in apart.ledger.decisions[0].reason
    assert len(apart.ledger.verdicts) == 4


def test_rows_are_judged_for_the_cut_and_tasks_of_rl_for_their_label(tiny_policy: Path) -> None:
    rates = [("a", 1.0), ("a", 1.0), ("b", 0.0), ("b", 0.0)]
    shared = context(tiny_policy, rates, adaptive=True, drop_easiest=0.5)
    shared.train = [make_prompt(question(9, 1.0), reference="1", domain="a")]
    screened = asyncio.run(screen(shared, tiny_policy))
    assert screened.kept_rows == {"b2", "b3"}
    asked = {v.prompt_id: v.num_samples for v in shared.ledger.verdicts}
    assert asked.pop(shared.train[0].prompt_id) == 16
    assert set(asked.values()) <= {4, 8}


def test_what_cannot_be_judged_is_kept(tiny_policy: Path) -> None:
    rates = [("a", 1.0), ("a", 0.9), ("b", 0.3), ("b", 0.1)]
    shared = context(tiny_policy, rates, drop_easiest=0.5)
    shared.pools.scorer.poison = {question(0, 1.0)}
    screened = asyncio.run(screen(shared, tiny_policy))
    assert screened.kept_rows == {"a0", "b2", "b3"}
    assert (screened.metrics["prompts"], screened.metrics["prompts_given_up"]) == (4, 1)
    assert len(shared.ledger.verdicts) == len(shared.ledger.decisions) == 3


def test_a_domain_keeps_its_minimum(tiny_policy: Path) -> None:
    rates = [("a", 1.0), ("a", 0.9), ("b", 0.3), ("b", 0.1)]
    of_each = context(tiny_policy, rates, drop_easiest=0.5, min_per_domain=1)
    assert asyncio.run(screen(of_each, tiny_policy)).kept_rows == {"a1", "b2", "b3"}
