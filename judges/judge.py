"""A critic checkpoint answers each prompt until its difficulty is decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from judges.estimators import posterior
from judges.labels import LabelSettings, confident_label, label
from judges.sampling import Answers, Encode, JudgeUsage, Sampler, unscorable
from judges.schedule import Schedule
from judges.stopping import FixedN, LabelRule
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
    """How a critic is sampled: `round_size` answers at a time until the label is decided or
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
        self, prompts: Iterable[Prompt], *, on_verdict: Callable[[Verdict], None]
    ) -> list[Verdict]:
        """Verdicts in the order of `prompts`, each handed to `on_verdict` as soon as it is there. A
        prompt that was given up has none.

        Raises as `Sampler.run` does, and StageError if all were given up.
        """
        asked = list(prompts)
        settings = self._settings
        rule = LabelRule(settings.labels) if settings.adaptive else FixedN()
        none = np.zeros(len(asked), dtype=np.int32)
        schedule = Schedule(
            none,
            none,
            none,
            none,
            rule,
            round_size=settings.round_size if settings.adaptive else None,
            cap=settings.max_samples,
        )
        outcomes = [Counter[Outcome]() for _ in asked]
        verdicts: dict[int, Verdict] = {}

        def take(answers: Answers) -> None:
            index = answers.index
            outcomes[index].update(r.outcome for r in answers.rewards)
            n, c = int(schedule.scored[index]), int(schedule.correct[index])
            if self._done(n, c):
                self.usage.prompts += 1
                verdicts[index] = self._verdict(asked[index], n, c, outcomes[index])
                on_verdict(verdicts[index])

        given_up = await self._sampler.run(schedule, asked.__getitem__, take)
        if given_up and not verdicts:
            raise unscorable("any prompt", next(iter(given_up.values())))
        return [verdicts[index] for index in range(len(asked)) if index not in given_up]

    def _done(self, n: int, c: int) -> bool:
        if not self._settings.adaptive:
            return n >= self._settings.max_samples
        return label(n, c, self._settings.max_samples, self._settings.labels) is not None

    def _verdict(self, prompt: Prompt, n: int, c: int, outcomes: Mapping[Outcome, int]) -> Verdict:
        settings = self._settings
        decided = label(n, c, settings.max_samples, settings.labels)
        assert decided is not None
        if not settings.adaptive:
            decided_by = "fixed n"
        elif confident_label(n, c, settings.labels) is decided:
            decided_by = "confidence"
        else:
            decided_by = "cap"
        return Verdict(
            prompt_id=prompt.prompt_id,
            judge="critic",
            critic=self._critic,
            num_samples=n,
            num_correct=c,
            outcomes=dict(outcomes),
            posterior=posterior(n, c),
            label=decided,
            decided_by=decided_by,
            sampling=self._sampled_with,
        )
