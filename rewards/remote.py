"""What a pool asks outside of its scorer processes: a judge, and a reward model in its own process.

They take seconds, most of them spent waiting or in one large batch, and would keep the processes
from answers that take milliseconds.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from posttrain.types import Prompt, Rollout, SystemInstruction
from rewards import judged, reward_model
from rewards.judge_access import judge_of, longest_grade_s
from rewards.judged import Ask
from rewards.reward_model import RewardModelSettings
from rewards.score import Finding, Unscored
from rewards.shaping import RewardSettings
from rewards.worker_process import DeadlineHit, WorkerProcess
from rewards.worker_requests import AskModel
from rewards.worker_template import Closed, Template, WorkerDied

LOADING_S = 600.0
"""Seconds more for the first group: imports, and reading the model."""

RETRIES = 1
"""Times that a group is given to the reward model again after its process died."""


def longest_s(names: set[str], num_answers: int, settings: RewardSettings) -> float:
    """Within which the group that has waited longest has what `names` find, if no group has more
    than `num_answers`: groups are asked about in the order in which they came."""
    longest = 0.0
    if judged.NAME in names:
        assert settings.judge is not None
        turns = 1 + math.ceil(num_answers / settings.judge.concurrency)
        longest = turns * longest_grade_s(settings.judge)
    if reward_model.NAME in names:
        assert settings.reward_model is not None
        each = settings.reward_model.deadline_s + LOADING_S
        longest = max(longest, (1 + RETRIES) * each)
    return longest


class Remote:
    """Raises SettingsError for a judge that cannot be asked."""

    def __init__(self, settings: RewardSettings, engine: Ask | None, closing: Connection) -> None:
        self._judge = None if settings.judge is None else judge_of(settings.judge, engine)
        self._model = (
            None
            if settings.reward_model is None
            else _ModelProcess(settings, settings.reward_model, closing)
        )

    async def findings(
        self,
        names: set[str],
        prompt: Prompt,
        rollouts: Sequence[Rollout],
        system: SystemInstruction | None,
    ) -> tuple[Mapping[str, Finding], ...]:
        """For each rollout, what each of the verifiers has found."""
        calls = {}
        if judged.NAME in names:
            assert self._judge is not None
            calls[judged.NAME] = self._judge.findings(prompt, rollouts, system)
        if reward_model.NAME in names:
            assert self._model is not None
            calls[reward_model.NAME] = self._model.findings(prompt, rollouts, system)
        columns = await asyncio.gather(*calls.values())
        return tuple(dict(zip(calls, row, strict=True)) for row in zip(*columns, strict=True))

    def close(self) -> None:
        if self._model is not None:
            self._model.close()


class _ModelProcess:
    """One process with the model, and the one thread that uses it: groups queue for it."""

    def __init__(
        self, settings: RewardSettings, model: RewardModelSettings, closing: Connection
    ) -> None:
        self._deadline_s = model.deadline_s
        self._loaded = False
        self._template = Template(settings, {}, closing, memory_limit=0)
        self._worker = WorkerProcess(settings, self._template, closing)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward-model")

    async def findings(
        self, prompt: Prompt, rollouts: Sequence[Rollout], system: SystemInstruction | None
    ) -> tuple[Finding, ...]:
        request = AskModel(
            prompt=prompt, texts=tuple(rollout.text for rollout in rollouts), system=system
        )
        try:
            asked = self._thread.submit(self._ask, request)
        except RuntimeError as error:  # the thread was shut down
            raise Closed from error
        return await asyncio.wrap_future(asked)

    def _ask(self, request: AskModel) -> tuple[Finding, ...]:
        why = ""
        for _ in range(1 + RETRIES):
            try:
                more = 0.0 if self._loaded else LOADING_S
                findings = self._worker.ask_model(request, self._deadline_s + more)
                self._loaded = True
                return findings
            except DeadlineHit:
                self._loaded = False
                why = f"no output of the reward model within {self._deadline_s:g} s"
                break
            except WorkerDied as error:
                self._loaded = False
                why = str(error)
        return (Unscored(f"the reward model: {why}"),) * len(request.texts)

    def close(self) -> None:
        """After the closing signal: what is under way ends with Closed."""
        self._thread.shutdown(wait=True)
        self._worker.kill()
        self._template.kill()
