"""A critic checkpoint answers each prompt until its difficulty is decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from judges.estimators import posterior
from judges.labels import LabelSettings, decided_by, label
from judges.sampling import Answers, Encode, JudgeUsage, Sampler, unscorable
from judges.schedule import Schedule
from judges.selection import SelectionSettings
from judges.stopping import (
    CUT,
    LABEL,
    CutRule,
    FixedN,
    LabelRule,
    PurposeRule,
    StoppingRule,
    with_purpose,
)
from posttrain.types import (
    Generator,
    Outcome,
    Prompt,
    Sampling,
    Scorer,
    SystemInstruction,
    Verdict,
)

__all__ = ["CriticJudge", "Encode", "JudgeSettings", "JudgeUsage"]


class JudgeSettings(BaseModel):
    """How a critic is sampled: `round_size` answers at a time until enough is known or
    `max_samples` are scored. Not `adaptive`: exactly `max_samples`, what pass@k needs.

    `concurrency` counts requests at the engine. A `seed` makes the answers repeatable; it costs an
    engine throughput, so there is none unless asked for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    adaptive: bool = True
    round_size: int = Field(default=4, gt=0)
    max_samples: int = Field(default=16, gt=0)
    temperature: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=512, gt=0)
    concurrency: int = Field(default=64, gt=0)
    seed: int | None = Field(default=None, ge=0)
    labels: LabelSettings = LabelSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """The prompts of `domains` (prompt id -> domain) are judged until it is sure on which side of
    the cut of `selection` they lie; those of `labelled` (prompt ids) until their label is."""

    selection: SelectionSettings
    domains: Mapping[str, str]
    labelled: Collection[str]


class CriticJudge:
    """Verdicts from a critic's own answers.

    `critic` is the checkpoint's fingerprint and `template` the chat template's hash: a verdict
    holds only for these, the system instruction and the sampling settings. `usage` adds up over
    calls.
    """

    def __init__(
        self,
        generator: Generator,
        scorer: Scorer,
        encode: Encode,
        settings: JudgeSettings,
        *,
        critic: str,
        template: str,
        system: SystemInstruction | None = None,
    ) -> None:
        self._sampler = Sampler(
            generator,
            scorer,
            encode,
            sampling=Sampling(
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                seed=settings.seed,
            ),
            concurrency=settings.concurrency,
            system=system,
        )
        self._settings = settings
        self._critic = critic
        self._sampled_with = {
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
            "template": template,
            "system": system.name if system else None,
        }

    @property
    def usage(self) -> JudgeUsage:
        return self._sampler.usage

    async def judge(
        self,
        prompts: Iterable[Prompt],
        *,
        on_verdict: Callable[[Verdict], None],
        on_decided: Callable[[], None] = lambda: None,
        selected: Selected | None = None,
    ) -> list[Verdict]:
        """Verdicts in the order of `prompts`, each handed to `on_verdict` as soon as it is there:
        those for a cut at the end, because the cut moves and a prompt may be asked again.
        `on_decided` is called once for every prompt, when its answers suffice for the first time,
        or in the end. A prompt that was given up has no verdict.

        Raises as `Sampler.run` does, and StageError if all were given up.
        """
        asked = list(prompts)
        schedule, purpose = self._schedule(asked, selected)
        outcomes = [Counter[Outcome]() for _ in asked]
        undecided = set(range(len(asked)))
        verdicts: dict[int, Verdict] = {}

        def conclude(index: int) -> None:
            self.usage.prompts += 1
            n, c = int(schedule.scored[index]), int(schedule.correct[index])
            verdicts[index] = self._verdict(asked[index], n, c, outcomes[index])
            on_verdict(verdicts[index])

        def decide(index: int) -> None:
            if index in undecided:
                undecided.discard(index)
                on_decided()

        def take(answers: Answers) -> None:
            outcomes[answers.index].update(r.outcome for r in answers.rewards)
            if not schedule.is_open(answers.index):
                decide(answers.index)
                if not purpose[answers.index] & CUT:
                    conclude(answers.index)

        given_up = await self._sampler.run(schedule, asked.__getitem__, take)
        if len(given_up) == len(asked) > 0:
            raise unscorable("any prompt", next(iter(given_up.values())))
        for index in range(len(asked)):
            decide(index)
            if index not in verdicts and index not in given_up:
                conclude(index)
        return [verdicts[index] for index in sorted(verdicts)]

    def _schedule(
        self, asked: Sequence[Prompt], selected: Selected | None
    ) -> tuple[Schedule, NDArray[np.integer]]:
        """And what each prompt `[N]` is judged for."""
        settings = self._settings
        none = np.zeros(len(asked), dtype=np.int32)
        purpose: NDArray[np.integer] = np.full(len(asked), LABEL)
        domain: NDArray[np.integer] = none
        rule: StoppingRule = LabelRule(settings.labels) if settings.adaptive else FixedN()
        if settings.adaptive and selected is not None and selected.domains:
            purpose = np.array([_purpose(prompt.prompt_id, selected) for prompt in asked])
            names = {name: code for code, name in enumerate(sorted({*selected.domains.values()}))}
            # The domain of what no cut is for says nothing.
            own = [names.get(selected.domains.get(p.prompt_id, ""), 0) for p in asked]
            domain = with_purpose(np.array(own), purpose)
            cut = CutRule(selected.selection, settings.labels.confidence)
            rule = PurposeRule(cut, LabelRule(settings.labels))
        schedule = Schedule(
            none,
            none,
            none,
            domain,
            rule,
            round_size=settings.round_size if settings.adaptive else None,
            cap=settings.max_samples,
        )
        return schedule, purpose

    def _verdict(self, prompt: Prompt, n: int, c: int, outcomes: Mapping[Outcome, int]) -> Verdict:
        settings = self._settings
        decided = label(n, c, cap=n, settings=settings.labels)
        assert decided is not None
        return Verdict(
            prompt_id=prompt.prompt_id,
            judge="critic",
            critic=self._critic,
            num_samples=n,
            num_correct=c,
            outcomes=dict(outcomes),
            posterior=posterior(n, c),
            label=decided,
            decided_by=decided_by(n, c, settings.max_samples, settings.labels)
            if settings.adaptive
            else "fixed n",
            sampling=self._sampled_with,
        )


def _purpose(prompt_id: str, selected: Selected) -> int:
    """What no cut is for gets a label."""
    if prompt_id not in selected.domains:
        return LABEL
    return CUT | LABEL if prompt_id in selected.labelled else CUT
