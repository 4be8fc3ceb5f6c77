"""Continuous re-screening: the critic moves up, and prompts leave or come back.

The judge's verdict decides who is drawn at all; which of those, and how often, the policy's own
answers say (`curricula`). Nothing is dropped for ever: a share of every slice are dropped prompts.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from judges.estimators import posterior
from judges.labels import LabelSettings, confident_label, decided_by, easy_from, label
from posttrain.online.accounting import stable_seed
from posttrain.types import (
    Action,
    Decision,
    GenerationRequest,
    Generator,
    Label,
    Outcome,
    PolicyVersion,
    Prompt,
    Reward,
    Rollout,
    Sampling,
    Scorer,
    SystemInstruction,
    Verdict,
)

RULE = "re-screening"
FIRST = 3
"""Answers that every prompt gives; the rest only if these were all right, so that it may be easy,
or all wrong. Of prompts that are answered right half of the time, one in four needs more."""


PAUSE_S = 0.1
"""Between two looks at whether judging has its share of tokens again."""


class RescreenSettings(BaseModel):
    """When, what and by whom prompts are judged again while RL goes on.

    - `prompts`: how many in a slice, every `every_steps` steps.
    - `samples`: answers to each at most: three first, and the others where these were all right
      or all wrong. 13 right ones of 13 make a prompt easy by default, so that of 16 the others
      suffice alone where new weights came in between.
    - `retest_share`: of a slice, on average, for prompts that were dropped.
    - `placement`: *shared* judges with the engines and weights that serve rollouts, *dedicated*
      with an engine of its own (`resources.judge`) whose weights stand still between slices: one
      that is due while another is judged is left out.
    - `share`: of the tokens that shared engines write while rollouts go on, at most so many are
      judging's: what it takes is taken from rollouts.
    - `concurrency`: prompts in flight; 4 on shared engines, 16 on an engine of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_steps: int = Field(default=10, gt=0)
    prompts: int = Field(default=64, gt=0)
    samples: int = Field(default=16, gt=FIRST)
    retest_share: float = Field(default=0.25, gt=0, le=1)
    placement: Literal["shared", "dedicated"] = "shared"
    share: float = Field(default=0.04, gt=0, le=1)
    concurrency: int | None = Field(default=None, gt=0)
    labels: LabelSettings = LabelSettings()

    @property
    def in_flight(self) -> int:
        return self.concurrency or (4 if self.placement == "shared" else 16)

    @model_validator(mode="after")
    def _a_prompt_can_be_found_easy(self) -> Self:
        fewest = easy_from(self.labels)
        if self.samples < fewest:
            raise ValueError(
                f"samples = {self.samples} can show of no prompt that it is easy, so that none "
                f"would ever leave: by these labels it takes {fewest} right answers of {fewest}; "
                "raise samples, or lower labels.easy_above or labels.confidence"
            )
        return self


class ScreenedCurriculum(Protocol):
    """What re-screening needs of a curriculum."""

    def observe_verdict(self, verdict: Verdict, step: int) -> None: ...

    def rescreen_slice(self, size: int, retest_share: float) -> list[Prompt]:
        """Prompts to judge again, each once: mostly those whose difficulty was observed longest
        ago, and a share of those that were dropped, as far as there are any."""
        ...

    def drop(self, prompt_id: str) -> None:
        """Takes a prompt out of what is drawn, until it is restored; refused for the last one of
        its domain."""
        ...

    def restore(self, prompt_id: str) -> None: ...

    def is_dropped(self, prompt_id: str) -> bool: ...


class VerdictLedger(Protocol):
    """What re-screening needs of the run's ledger."""

    def record_decisions(self, stage: str, decisions: Sequence[Decision]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RescreenReport:
    """What one slice came to. `discarded` answers were written by more than one version, or by
    another than that of most of their prompt's."""

    prompts: int
    samples: int
    discarded: int
    dropped: int
    restored: int
    labels: Mapping[str, int]


class Rescreener:
    """Judges a slice of the curriculum's prompts; owns nothing but how that is done.

    Args:
        seed: of the samples; None leaves them to the engine.
        template: the chat template's hash: verdicts hold for one only.
        written: tokens that the generator has written in all, for whomever, where judging gets a
            share of them; None where it need not care.
    """

    def __init__(
        self,
        settings: RescreenSettings,
        *,
        stage: str,
        generator: Generator,
        scorer: Scorer,
        encode: Callable[[Prompt, SystemInstruction | None], tuple[int, ...]],
        curriculum: ScreenedCurriculum,
        ledger: VerdictLedger,
        sampling: Sampling,
        seed: int | None,
        template: str,
        written: Callable[[], int] | None = None,
    ) -> None:
        self._settings = settings
        self._stage = stage
        self._generator = generator
        self._scorer = scorer
        self._encode = encode
        self._curriculum = curriculum
        self._ledger = ledger
        self._sampling = sampling
        self._seed = seed
        self._template = template
        self._written = written
        self.tokens = 0
        """That the critic has written so far."""

    async def slice(self, step: int) -> RescreenReport:
        """Judges one slice after `step`. All verdicts are in before the first prompt moves, so
        that the order in which answers come changes nothing."""
        prompts = self._curriculum.rescreen_slice(
            self._settings.prompts, self._settings.retest_share
        )
        gate = asyncio.Semaphore(self._settings.in_flight)
        may_go_on = self._budget()

        async def judge(prompt: Prompt) -> tuple[Verdict | None, int]:
            async with gate:
                while not may_go_on():
                    await asyncio.sleep(PAUSE_S)
                return await self._judge(prompt, step)

        async with asyncio.TaskGroup() as tasks:
            judging = [tasks.create_task(judge(prompt)) for prompt in prompts]
        judged = [task.result() for task in judging]
        verdicts = [verdict for verdict, _ in judged if verdict is not None]
        decisions = [self._decide(verdict, step) for verdict in verdicts]
        moved = Counter(d.action for d in decisions if self._move(d))
        self._ledger.record_decisions(self._stage, [self._as_moved(d) for d in decisions])
        return RescreenReport(
            prompts=len(verdicts),
            samples=sum(v.num_samples for v in verdicts),
            discarded=sum(discarded for _, discarded in judged),
            dropped=moved[Action.DROP],
            restored=moved[Action.KEEP],
            labels=dict(Counter(v.label.value for v in verdicts)),
        )

    def _budget(self) -> Callable[[], bool]:
        """Says whether judging has had no more than its share since now."""
        written = self._written
        if written is None:
            return lambda: True
        of_all, of_judging = written(), self.tokens
        return lambda: self.tokens - of_judging <= self._settings.share * (written() - of_all)

    async def _judge(self, prompt: Prompt, step: int) -> tuple[Verdict | None, int]:
        """The verdict, None where the answers decide nothing; and how many were of no use."""
        rollouts: tuple[Rollout, ...] = ()
        rewards: dict[str, Reward] = {}
        for size in (FIRST, self._settings.samples - FIRST):
            request_id = f"rescreen-{step}-{prompt.prompt_id}-{len(rollouts)}"
            answers = await self._generator.generate(self._request(prompt, request_id, size))
            self.tokens += sum(len(rollout.completion_token_ids) for rollout in answers)
            rollouts += answers
            version, usable = of_one_version(rollouts)
            new = [rollout for rollout in usable if rollout.rollout_id not in rewards]
            scored = await self._scorer.score(prompt, new, None) if new else ()
            rewards.update(zip((r.rollout_id for r in new), scored, strict=True))
            counted = [rewards[rollout.rollout_id] for rollout in usable]
            if self._decides(counted, last=len(rollouts) == self._settings.samples):
                return self._verdict(prompt, version, counted), len(rollouts) - len(usable)
        return None, len(rollouts) - len(usable)

    def _request(self, prompt: Prompt, request_id: str, size: int) -> GenerationRequest:
        seed = None if self._seed is None else stable_seed(self._seed, request_id)
        return GenerationRequest(
            request_id=request_id,
            prompt_token_ids=self._encode(prompt, None),
            num_rollouts=size,
            sampling=replace(self._sampling, seed=seed),
        )

    def _decides(self, rewards: Sequence[Reward], *, last: bool) -> bool:
        """Whether the answers that are lacking, all of them right, could not make the prompt easy;
        or do not need to. Without a right one it is asked on: three say of no prompt that it is
        unsolved."""
        n = sum(reward.correctness is not None for reward in rewards)
        c = sum(reward.correct for reward in rewards)
        if n == 0 or (c == 0 and not last):
            return False
        total, labels = self._settings.samples, self._settings.labels
        at_best = label(total, c + total - n, cap=total, settings=labels)
        return at_best is not Label.EASY or confident_label(n, c, labels) is Label.EASY

    def _verdict(
        self, prompt: Prompt, version: PolicyVersion, rewards: Sequence[Reward]
    ) -> Verdict:
        outcomes = Counter(reward.outcome for reward in rewards)
        n = outcomes.total() - outcomes[Outcome.INFRASTRUCTURE]
        c = sum(reward.correct for reward in rewards)
        decided = label(n, c, cap=n, settings=self._settings.labels)
        assert decided is not None
        return Verdict(
            prompt_id=prompt.prompt_id,
            judge="critic",
            critic=f"{self._stage}:{version}",
            num_samples=n,
            num_correct=c,
            outcomes=dict(outcomes),
            posterior=posterior(n, c),
            label=decided,
            decided_by=decided_by(n, c, self._settings.samples, self._settings.labels),
            sampling={
                "temperature": self._sampling.temperature,
                "max_tokens": self._sampling.max_tokens,
                "template": self._template,
                "system": None,
            },
        )

    def _decide(self, verdict: Verdict, step: int) -> Decision:
        easy = verdict.label is Label.EASY
        return Decision(
            prompt_id=verdict.prompt_id,
            action=Action.DROP if easy else Action.KEEP,
            rule=RULE,
            reason=f"{verdict.label} at step {step}: {verdict.num_correct} of "
            f"{verdict.num_samples} right",
            verdict=verdict,
        )

    def _move(self, decision: Decision) -> bool:
        """Whether the decision changed anything for the prompt."""
        verdict, prompt_id = decision.verdict, decision.prompt_id
        version = PolicyVersion.parse(verdict.critic.rpartition(":")[2])
        self._curriculum.observe_verdict(verdict, version.step)
        before = self._curriculum.is_dropped(prompt_id)
        if decision.action is Action.DROP and not before:
            self._curriculum.drop(prompt_id)
        elif decision.action is Action.KEEP and before:
            self._curriculum.restore(prompt_id)
        return self._curriculum.is_dropped(prompt_id) is not before

    def _as_moved(self, decision: Decision) -> Decision:
        """A curriculum keeps the last prompt of a domain, however easy it is."""
        if decision.action is Action.KEEP or self._curriculum.is_dropped(decision.prompt_id):
            return decision
        reason = f"{decision.reason}, but it is the last of its domain"
        return replace(decision, action=Action.KEEP, reason=reason)


def of_one_version(rollouts: Sequence[Rollout]) -> tuple[PolicyVersion, list[Rollout]]:
    """The version that wrote most of these alone (of two the later one), and those that it did.

    A verdict is about one critic: what spans a publish was written by two. Answers of a request
    begin together, so where one of them spans, those that had ended are of the version before.
    """
    alone: dict[PolicyVersion, list[Rollout]] = {}
    for rollout in rollouts:
        versions = {span.version for span in rollout.version_spans}
        for version in versions:
            of_it = alone.setdefault(version, [])
            if len(versions) == 1:
                of_it.append(rollout)
    version = max(alone, key=lambda version: (len(alone[version]), version))
    return version, alone[version]
