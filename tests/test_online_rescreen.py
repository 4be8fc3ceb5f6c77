"""Re-screening: whose verdict it is, who leaves, who comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pytest
from online_fakes import CountingCurriculum, TextScorer, make_prompt, make_rollout, run_virtual
from pydantic import ValidationError

from curricula.sampler import CurriculumSettings, DifficultySampler, build_curriculum
from judges.labels import LabelSettings
from posttrain.online.periodic import Periodic
from posttrain.online.rescreen import Rescreener, RescreenReport, RescreenSettings, of_one_version
from posttrain.types import (
    Action,
    Decision,
    GenerationRequest,
    PolicyVersion,
    Rollout,
    Sampling,
    VersionSpan,
)

V6, V7 = PolicyVersion(2, 6), PolicyVersion(2, 7)


class Critic:
    """Prompt i is answered with the marks of `answers[i % len]` in turn, by one version or two;
    each further request to it by the next of `later`."""

    def __init__(
        self,
        answers: Sequence[str],
        versions: Sequence[PolicyVersion] = (V7,),
        later: Sequence[PolicyVersion] | None = None,
    ) -> None:
        self.answers = answers
        self.versions = versions
        self.later = versions if later is None else later
        self.requests: list[GenerationRequest] = []
        self.running = 0
        self.most_running = 0

    async def generate(self, request: GenerationRequest) -> tuple[Rollout, ...]:
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(1.0)
        self.running -= 1
        before = int(request.request_id.rpartition("-")[2])
        marks = self.answers[request.prompt_token_ids[0] % len(self.answers)][before:]
        versions = self.later if before else self.versions
        return tuple(
            make_rollout(request.request_id, i, mark, versions[i % len(versions)])
            for i, mark in enumerate(marks[: request.num_rollouts])
        )


class Decisions:
    def __init__(self) -> None:
        self.recorded: list[tuple[str, Decision]] = []

    def record_decisions(self, stage: str, decisions: Sequence[Decision]) -> None:
        self.recorded += [(stage, decision) for decision in decisions]


def rescreen(
    critic: Critic,
    curriculum: CountingCurriculum | DifficultySampler,
    seed: int | None = None,
    written: Callable[[], int] | None = None,
    **settings: Any,
) -> tuple[RescreenReport, Decisions]:
    ledger = Decisions()
    rescreener = Rescreener(
        RescreenSettings(**{"prompts": 4, "samples": 16, **settings}),
        stage="rl",
        generator=critic,
        scorer=TextScorer(),
        encode=lambda prompt, system: (int(prompt.prompt_id[1:]),),
        curriculum=curriculum,
        ledger=ledger,
        sampling=Sampling(max_tokens=8, temperature=0.5),
        seed=seed,
        template="abc",
        written=written,
    )
    report = run_virtual(rescreener.slice(step=7))
    assert rescreener.tokens == 2 * sum(request.num_rollouts for request in critic.requests)
    return report, ledger


def pool_of(num_prompts: int, *dropped: str) -> CountingCurriculum:
    curriculum = CountingCurriculum()
    curriculum.num_drawn = num_prompts
    curriculum.dropped = set(dropped)
    return curriculum


def test_easy_prompts_leave_and_dropped_ones_come_back_when_they_are_not() -> None:
    curriculum = pool_of(4, "p2", "p3")
    critic = Critic(["1" * 16, "0" * 8 + "1" * 8, "1" * 16, "1" * 12 + "0" * 4])
    report, ledger = rescreen(critic, curriculum, retest_share=0.5)

    assert curriculum.dropped == {"p0", "p2"}  # p2 is still easy, p3 is back
    assert report == RescreenReport(
        prompts=4,
        samples=64,
        discarded=0,
        dropped=1,
        restored=1,
        labels={"easy": 2, "medium": 2},
    )
    # What metrics.jsonl gets: asdict turns a Counter into nonsense.
    assert json.loads(json.dumps(asdict(report)))["labels"] == report.labels
    assert [(d.prompt_id, d.action) for _, d in ledger.recorded] == [
        ("p0", Action.DROP),
        ("p1", Action.KEEP),
        ("p2", Action.DROP),
        ("p3", Action.KEEP),
    ]
    decision = ledger.recorded[0][1]
    assert decision.rule == "re-screening"
    assert decision.reason == "easy at step 7: 16 of 16 right"
    assert decision.verdict.critic == "rl:2.7"
    assert decision.verdict.posterior == (16.5, 0.5)
    assert decision.verdict.sampling == {
        "temperature": 0.5,
        "max_tokens": 8,
        "template": "abc",
        "system": None,
    }
    # The policy's posterior learns from the same answers, at the version that gave them.
    assert curriculum.observed == [
        ("p0", 16, 16, 7),
        ("p1", 16, 8, 7),
        ("p2", 16, 16, 7),
        ("p3", 16, 12, 7),
    ]


def test_the_last_prompt_of_a_domain_is_kept_and_recorded_so() -> None:
    curriculum = build_curriculum(
        [make_prompt(0), make_prompt(1)], [], CurriculumSettings(), group_size=4, seed=0
    )
    assert isinstance(curriculum, DifficultySampler)
    report, ledger = rescreen(Critic(["1" * 16]), curriculum, retest_share=0.01)
    assert curriculum.pool()["toy"]["dropped"] == report.dropped == 1
    (_, first), (_, last) = ledger.recorded
    assert curriculum.is_dropped(first.prompt_id) and not curriculum.is_dropped(last.prompt_id)
    assert (first.action, first.reason) == (Action.DROP, "easy at step 7: 16 of 16 right")
    assert last.action is Action.KEEP
    assert last.reason == "easy at step 7: 16 of 16 right, but it is the last of its domain"


def test_too_few_right_answers_bring_nothing_back() -> None:
    """Nine of nine do not show that a prompt is easy; and even less that it is not any more."""
    curriculum = pool_of(2, "p0")
    report, ledger = rescreen(Critic(["1" * 16] * 2, versions=[V6, V7]), curriculum)
    assert (report.prompts, report.discarded, report.restored) == (0, 14, 0)
    assert (curriculum.dropped, curriculum.observed, ledger.recorded) == ({"p0"}, [], [])


def test_answers_of_another_version_are_discarded() -> None:
    curriculum = pool_of(1)
    critic = Critic(["111" + "10" * 6 + "1"], versions=[V6], later=[V7])
    report, ledger = rescreen(critic, curriculum)
    assert (report.samples, report.discarded) == (13, 3)
    verdict = ledger.recorded[0][1].verdict
    assert (verdict.critic, verdict.num_samples, verdict.num_correct) == ("rl:2.7", 13, 7)


def test_the_first_answers_suffice_where_some_are_right_and_some_are_not() -> None:
    curriculum = pool_of(5)
    mixed, easy, unscored, late, unsolved = (
        *("110" + "1" * 13, "1" * 16, "?11" + "1" * 13),
        *("111" + "0" + "1" * 12, "0" * 16),
    )
    critic = Critic([mixed, easy, unscored, late, unsolved])
    report, ledger = rescreen(critic, curriculum, prompts=5)
    sizes: dict[int, list[int]] = {}
    for request in critic.requests:
        sizes.setdefault(request.prompt_token_ids[0], []).append(request.num_rollouts)
    assert sizes == {0: [3], 1: [3, 13], 2: [3, 13], 3: [3, 13], 4: [3, 13]}
    assert report.samples == 3 + 16 + 15 + 16 + 16
    assert curriculum.dropped == {"p1", "p2"}
    verdicts = {d.prompt_id: d.verdict for _, d in ledger.recorded}
    assert {p: (v.label.value, v.decided_by) for p, v in verdicts.items()} == {
        "p0": ("medium", "cut"),
        "p1": ("easy", "confidence"),
        "p2": ("easy", "confidence"),
        "p3": ("medium", "cap"),
        "p4": ("unsolved", "cap"),
    }


def test_one_request_shows_that_a_prompt_is_easy_when_the_version_changed_before_it() -> None:
    """The default of samples leaves room for the first answers to be of no use."""
    critic = Critic(["1" * 16], versions=[V6], later=[V7])
    report, _ = rescreen(critic, pool_of(1))
    assert (report.dropped, report.samples, report.discarded) == (1, 13, 3)


def test_an_answer_that_spans_a_publish_belongs_to_neither_version() -> None:
    spanning = Rollout(
        rollout_id="r",
        draw_id="d",
        prompt_token_ids=(1,),
        completion_token_ids=(3, 3),
        rollout_logprobs=(-0.5, -0.5),
        text="1",
        finish_reason="stop",
        version_spans=(VersionSpan(0, 1, V6), VersionSpan(1, 2, V7)),
    )
    old, new = make_rollout("d", 1, "1", V6), make_rollout("d", 2, "1", V7)
    assert of_one_version([old, spanning, new]) == (V7, [new])
    assert of_one_version([spanning]) == (V7, [])
    # All begin together, and a publish comes while the longest is written.
    assert of_one_version([old, old, spanning]) == (V6, [old, old])
    assert of_one_version([old, old, spanning, new]) == (V6, [old, old])


def test_a_prompt_without_a_usable_answer_gets_no_verdict() -> None:
    curriculum = pool_of(1)
    report, ledger = rescreen(Critic(["?" * 16]), curriculum)
    assert (report.prompts, report.samples, report.discarded) == (0, 0, 0)
    assert ledger.recorded == []
    assert curriculum.observed == []


def test_prompts_in_flight_are_capped() -> None:
    critic = Critic(["1" * 16])
    rescreen(critic, pool_of(8), prompts=8, concurrency=3)
    assert (len(critic.requests), critic.most_running) == (16, 3)


def test_on_shared_engines_judging_has_its_share_of_the_tokens() -> None:
    """Rollouts write 100 tokens a second, judging 32 for an easy prompt: at most a tenth of all."""
    critic = Critic(["1" * 16])
    ended: list[float] = []

    def written() -> int:
        ended.append(asyncio.get_running_loop().time())
        return int(100 * ended[-1]) + 32 * len(critic.requests) // 2

    report, _ = rescreen(critic, pool_of(8), prompts=8, concurrency=2, share=0.1, written=written)
    assert report.dropped == 8
    # The last prompt begins when the tokens of six are a tenth: 192 of 1920, of them 1728 of
    # rollouts. Without a share all would be judged in 8 s.
    assert 17.2 <= max(ended) <= 17.6


def test_samples_are_seeded_only_where_a_run_must_repeat_itself() -> None:
    free, seeded, again = Critic(["1" * 16]), Critic(["1" * 16]), Critic(["1" * 16])
    rescreen(free, pool_of(4))
    rescreen(seeded, pool_of(4), seed=3)
    rescreen(again, pool_of(4), seed=3)
    assert {r.sampling.seed for r in free.requests} == {None}
    assert len({r.sampling.seed for r in seeded.requests}) == 8
    assert [r.sampling.seed for r in seeded.requests] == [r.sampling.seed for r in again.requests]


def test_too_few_samples_to_drop_anything_are_refused() -> None:
    said = r"samples = 12 can show of no prompt that it is easy, .* takes 13 right answers of 13"
    with pytest.raises(ValidationError, match=said):
        RescreenSettings(samples=12)
    assert RescreenSettings(samples=13).samples == 13
    assert RescreenSettings(samples=8, labels=LabelSettings(confidence=0.8)).samples == 8


def test_periodic_work_never_overlaps_and_skips_what_it_missed() -> None:
    done: list[tuple[int, float]] = []

    async def work(step: int) -> None:
        await asyncio.sleep(3.5)
        done.append((step, asyncio.get_running_loop().time()))

    async def steps() -> None:
        periodic = Periodic(2, work)
        running = asyncio.create_task(periodic.run())
        for step in range(1, 9):  # a step a second: 2, 4, 6, 8 are due at 1, 3, 5, 7
            periodic.reached(step)
            await asyncio.sleep(1.0)
        await asyncio.sleep(10)
        running.cancel()
        await asyncio.wait([running])

    run_virtual(steps())
    assert done == [(2, 4.5), (4, 8.0), (8, 11.5)]
