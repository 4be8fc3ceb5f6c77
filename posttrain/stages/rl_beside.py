"""What goes on beside RL training: held-out evaluation and re-screening."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from curricula.sampler import DifficultySampler, UniformSampler
from posttrain.data.prompts import spread_over_domains
from posttrain.evaluation import evaluate, summarise
from posttrain.metrics import read_metrics, surviving
from posttrain.online.periodic import Periodic
from posttrain.online.rescreen import Rescreener
from posttrain.progress import say
from posttrain.stages.context import StageContext
from posttrain.stages.rl_roles import Role
from posttrain.types import PolicyVersion, Sampling
from posttrain.workers.generator import GeneratorPool
from posttrain.workers.publisher import WeightPublisher


class Beside:
    """Owns the loops beside training, and the critic's engine where it has one of its own."""

    def __init__(
        self,
        context: StageContext,
        attempt: int,
        generators: GeneratorPool,
        curriculum: DifficultySampler | UniformSampler,
        critic: GeneratorPool | None,
        to_critic: WeightPublisher | None,
    ) -> None:
        settings = context.settings.rl
        self._context = context
        self._attempt = attempt
        self._generators = generators
        self._critic = critic
        self._to_critic = to_critic
        self._step = 0
        self._told: set[str] = set()
        self._evaluating = (
            Periodic(settings.evaluation.every_steps, self._evaluate)
            if settings.evaluation is not None
            else None
        )
        self._rescreening: Periodic | None = None
        if settings.rescreen is None:
            return
        assert isinstance(curriculum, DifficultySampler)  # the settings refuse anything else
        lock_step = settings.max_lag == 0
        self._rescreener = Rescreener(
            settings.rescreen,
            stage="rl",
            generator=critic or generators,
            scorer=context.pools.scorer,
            encode=context.chat.encode,
            curriculum=curriculum,
            ledger=context.ledger,
            sampling=Sampling(max_tokens=settings.max_tokens, temperature=settings.temperature),
            seed=context.seed if lock_step else None,
            template=context.chat.template_hash,
            written=None if lock_step or critic is not None else lambda: generators.tokens,
        )
        self._rescreening = Periodic(settings.rescreen.every_steps, self._rescreen)

    @classmethod
    async def start(
        cls,
        context: StageContext,
        model: Path,
        attempt: int,
        generators: GeneratorPool,
        curriculum: DifficultySampler | UniformSampler,
        publish_to: Callable[..., WeightPublisher],
    ) -> Beside:
        """`publish_to(pool, scratch=…)` carries the learner's weights to a pool."""
        settings = context.settings.rl
        critic = to_critic = None
        if settings.rescreen is not None and settings.rescreen.placement == "dedicated":
            critic = await context.pools.start_critic(str(model))
            to_critic = publish_to(critic, scratch=context.pools.learner_scratch / "critic")
        return cls(context, attempt, generators, curriculum, critic, to_critic)

    @property
    def loops(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        """For the controller. In lock-step re-screening has its turn between steps instead."""
        loops = [self._evaluating]
        if self._context.settings.rl.max_lag > 0:
            loops.append(self._rescreening)
        return [loop.run for loop in loops if loop is not None]

    @property
    def judge(self) -> Role | None:
        """None where nothing is re-screened."""
        if self._rescreening is None:
            return None
        rescreener = self._rescreener
        return Role(
            idle_share=None if self._critic is None else self._critic.idle_share,
            tokens=lambda: rescreener.tokens,
        )

    def make_up(self, step: int) -> None:
        """Before the first step: the evaluation of `step`, which the stage goes on from, where a
        kill left it out."""
        self._step = step
        if self._evaluating is None or step in (0, self._context.settings.rl.num_steps):
            return
        done = {
            record["step"]
            for record in surviving(read_metrics(self._context.run.metrics_path))
            if (record.get("stage"), record.get("event")) == ("rl", "evaluation")
        }
        if step not in done:
            self._evaluating.reached(step)

    async def reached(self, version: PolicyVersion) -> None:
        """A step is done. The learner stands still until this returns."""
        self._step = version.step
        if version.step == self._context.settings.rl.num_steps:
            return  # nobody would wait for what begins now
        self._say_if_late("rl.evaluation", self._evaluating, "concurrency")
        shared = self._critic is None
        self._say_if_late("rl.rescreen", self._rescreening, "share" if shared else "concurrency")
        if self._evaluating is not None:
            self._evaluating.reached(version.step)
        if self._rescreening is None or self._context.settings.rl.max_lag == 0:
            return
        if self._critic is not None and self._rescreening.busy:
            # New weights would spoil the answers under way, and old ones judge no new slice: the
            # step is passed over.
            return
        await self._advance_critic(version)
        self._rescreening.reached(version.step)

    async def rescreen_now(self, version: PolicyVersion) -> None:
        """In lock-step: judges a slice if one is due, and returns when prompts have moved."""
        if self._rescreening is not None and self._rescreening.is_due(version.step):
            await self._advance_critic(version)
            await self._rescreen(version.step)

    def stop(self) -> None:
        if self._critic is not None:
            self._critic.stop()

    async def _advance_critic(self, version: PolicyVersion) -> None:
        """While the learner stands still, so that its weights are those of `version`."""
        assert self._rescreening is not None
        if self._to_critic is not None and self._rescreening.is_due(version.step):
            await self._to_critic.publish(version)

    async def _rescreen(self, step: int) -> None:
        report = await self._rescreener.slice(step)
        self._note("rescreen", step, asdict(report))
        if report.discarded and not report.prompts:
            say(
                f"rl: re-screening of step {step} decided nothing: all answers of a prompt must be "
                "of one version of the weights, and these took longer than a step. Give it engines "
                "of its own (rl.rescreen.placement: dedicated)"
            )

    def _say_if_late(self, key: str, loop: Periodic | None, faster: str) -> None:
        """Once in a stage: it will be late again."""
        if loop is None or not (loop.busy and loop.is_due(self._step)) or key in self._told:
            return
        self._told.add(key)
        say(
            f"rl: {key} is due at step {self._step} and still at work on an earlier one: raise its "
            f"every_steps or {faster}, or lower its prompts or samples"
        )

    async def _evaluate(self, step: int) -> None:
        """Weights change meanwhile: the figure is that of `step` to `until_step`."""
        context = self._context
        settings = context.settings.rl.evaluation
        assert settings is not None
        results = await evaluate(
            spread_over_domains(context.held_out, settings.prompts),
            generator=self._generators,
            scorer=context.pools.scorer,
            encode=context.chat.encode,
            instructions=list(context.instruction_mix(0).by_name.values()),
            settings=settings,
            label=f"step-{step}",
        )
        summary = summarise(results, settings.k)
        self._note("evaluation", step, {"until_step": self._step, **summary})

    def _note(self, event: str, step: int, found: Mapping[str, Any]) -> None:
        here = {"stage": "rl", "event": event, "step": step, "attempt": self._attempt}
        self._context.metrics.append({**here, **found})
