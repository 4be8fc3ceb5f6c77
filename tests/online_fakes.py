"""Fakes for the loop's Protocols and an event loop whose clock jumps instead of waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from posttrain.online.controller import Controller
from posttrain.online.settings import LoopSettings
from posttrain.types import (
    DrawOutcome,
    GenerationRequest,
    Message,
    Outcome,
    PolicyVersion,
    Prompt,
    Reward,
    Rollout,
    RolloutGroup,
    Sampling,
    SystemInstruction,
    TrainingBatch,
    Verdict,
    VersionSpan,
)

T = TypeVar("T")


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """Jumps to the next timer when nothing is ready; raises when nothing ever will be."""

    def __init__(self) -> None:
        super().__init__()
        self._virtual_now = 0.0

    def time(self) -> float:
        return self._virtual_now

    def _run_once(self) -> None:
        if not self._ready:  # type: ignore[attr-defined]
            timers = [h.when() for h in self._scheduled if not h.cancelled()]  # type: ignore[attr-defined]
            if not timers:
                raise RuntimeError("deadlock: no task can run and no timer is set")
            self._virtual_now = max(self._virtual_now, min(timers))
        super()._run_once()  # type: ignore[misc]


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` on the virtual clock; whatever happens, it may leave no task behind."""

    async def leaving_nothing() -> T:
        try:
            return await main
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(leaving_nothing())


def make_prompt(index: int, domain: str = "toy") -> Prompt:
    return Prompt(
        prompt_id=f"p{index}",
        messages=(Message(role="user", content=str(index)),),
        reference=None,
        domain=domain,
    )


def make_reward(mark: str, **components: float) -> Reward:
    """`1` correct, `0` wrong, `u` unparsable, `t` truncated, `?` unscored."""
    outcomes = {
        "1": Outcome.CORRECT,
        "0": Outcome.WRONG,
        "u": Outcome.UNPARSABLE,
        "t": Outcome.TRUNCATED,
        "?": Outcome.INFRASTRUCTURE,
    }
    score = None if mark == "?" else float(mark == "1")
    return Reward(value=score, correctness=score, outcome=outcomes[mark], components=components)


def make_rollout(
    draw_id: str, index: int, text: str, version: PolicyVersion, length: int = 2
) -> Rollout:
    return Rollout(
        rollout_id=f"{draw_id}/{index}",
        draw_id=draw_id,
        prompt_token_ids=(1, 2),
        completion_token_ids=(3,) * length,
        rollout_logprobs=(-0.5,) * length,
        text=text,
        finish_reason="stop",
        version_spans=(VersionSpan(0, length, version),),
    )


def make_group(
    marks: str,
    *,
    draw_id: str = "d1-0000000",
    version: PolicyVersion | None = None,
    domain: str = "toy",
    system: str | None = None,
    length: int = 2,
    components: Mapping[str, float] | None = None,
) -> RolloutGroup:
    version = version or PolicyVersion(1, 0)
    return RolloutGroup(
        draw_id=draw_id,
        prompt=make_prompt(0, domain),
        system=system,
        sampling=Sampling(max_tokens=8),
        rollouts=tuple(make_rollout(draw_id, i, m, version, length) for i, m in enumerate(marks)),
        rewards=tuple(make_reward(m, **(components or {})) for m in marks),
    )


class CountingCurriculum:
    """Prompts p0, p1, …; remembers what it was told."""

    def __init__(self, domains: Sequence[str] = ("toy",), batch_size: int = 2) -> None:
        self.batch_size = batch_size
        self.num_drawn = 0
        self.observed: list[tuple[str, int, int, int]] = []
        self.dropped: set[str] = set()
        self.domain_of: dict[str, str] = {}
        self.gates: list[tuple[str, bool]] = []
        self._domains = domains

    def next_batch(self) -> list[str]:
        return [self._domains[i % len(self._domains)] for i in range(self.batch_size)]

    def gated(self, domain: str, *, trainable: bool) -> None:
        self.gates.append((domain, trainable))

    def instead_of(self, domain: str) -> str:
        return domain

    def draw(self, domain_name: str) -> Prompt:
        self.num_drawn += 1
        prompt = make_prompt(self.num_drawn - 1, domain_name)
        self.domain_of[prompt.prompt_id] = domain_name
        return prompt

    def observe(self, prompt_id: str, num_scored: int, num_correct: int, step: int) -> None:
        self.observed.append((prompt_id, num_scored, num_correct, step))

    def observe_verdict(self, verdict: Verdict, step: int) -> None:
        self.observe(verdict.prompt_id, verdict.num_samples, verdict.num_correct, step)

    def rescreen_slice(self, size: int, retest_share: float) -> list[Prompt]:
        retest = sorted(self.dropped)[: round(size * retest_share)]
        active = [f"p{i}" for i in range(self.num_drawn) if f"p{i}" not in self.dropped]
        return [make_prompt(int(p[1:])) for p in [*active[: size - len(retest)], *retest]]

    def drop(self, prompt_id: str) -> None:
        self.dropped.add(prompt_id)

    def restore(self, prompt_id: str) -> None:
        self.dropped.remove(prompt_id)

    def is_dropped(self, prompt_id: str) -> bool:
        return prompt_id in self.dropped

    def pool(self) -> dict[str, dict[str, int]]:
        return {"toy": {"1": self.num_drawn - len(self.dropped), "dropped": len(self.dropped)}}

    def quotas(self) -> dict[str, float]:
        return {"toy": 1.0}

    def state_dict(self) -> dict[str, Any]:
        return {"num_drawn": self.num_drawn, "observed": [*self.observed], "gates": [*self.gates]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_drawn = state["num_drawn"]
        self.observed = [*state["observed"]]
        self.gates = [*state["gates"]]


@dataclass
class ScriptedGenerator:
    """Call n takes `seconds(n)` and answers with the characters of `marks(n)`.

    `serial` answers one call after the other, as an engine does that is at its throughput.
    """

    marks: Callable[[int], str]
    seconds: Callable[[int], float] = lambda n: 1.0
    serial: bool = False
    served: PolicyVersion | None = None
    num_calls: int = 0
    requests: list[GenerationRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    written: dict[str, int] = field(default_factory=dict)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def generate(self, request: GenerationRequest) -> tuple[Rollout, ...]:
        call, self.num_calls = self.num_calls, self.num_calls + 1
        self.requests.append(request)
        version = self.served
        assert version is not None, "asked before anything was published"
        try:
            if self.serial:
                async with self._turn:
                    await asyncio.sleep(self.seconds(call))
            else:
                await asyncio.sleep(self.seconds(call))
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        marks = self.marks(call)
        assert len(marks) == request.num_rollouts
        return tuple(make_rollout(request.request_id, i, m, version) for i, m in enumerate(marks))

    async def tokens_written(self, request_id: str) -> int | None:
        return self.written.get(request_id)


class TextScorer:
    """Reads the mark that the generator wrote."""

    async def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], system: SystemInstruction | None
    ) -> tuple[Reward, ...]:
        return tuple(make_reward(rollout.text) for rollout in rollouts)


@dataclass
class TimedLearner:
    """Takes `seconds(step)` a step; keeps the batches and the highest age it was given."""

    seconds: Callable[[int], float] = lambda step: 1.0
    batches: list[TrainingBatch] = field(default_factory=list)

    async def step(self, batch: TrainingBatch) -> Mapping[str, float]:
        self.batches.append(batch)
        await asyncio.sleep(self.seconds(len(self.batches) - 1))
        return {"loss": 0.25}

    def max_age(self, step: int) -> int:
        return max(int(micro.ages.max()) for micro in self.batches[step].micro_batches)


@dataclass
class DirectPublisher:
    """Hands the version to a fake generator."""

    generator: Any
    seconds: float = 0.0
    versions: list[PolicyVersion] = field(default_factory=list)

    async def publish(self, version: PolicyVersion) -> Mapping[str, float]:
        await asyncio.sleep(self.seconds)
        self.generator.served = version
        self.versions.append(version)
        return {"pause_s": 0.125}


class MemoryLedger:
    """Refuses what the real ledger's tables would: a draw opened twice or ended twice."""

    def __init__(self) -> None:
        self.opened: dict[str, dict[str, Any]] = {}
        self.closed: dict[str, dict[str, Any]] = {}
        self.num_flushed = 0

    def open_draw(self, *, draw_id: str, **row: Any) -> None:
        assert draw_id not in self.opened, draw_id
        self.opened[draw_id] = row

    def close_draw(self, draw_id: str, outcome: DrawOutcome, **row: Any) -> None:
        assert draw_id in self.opened, draw_id
        assert draw_id not in self.closed, draw_id
        self.closed[draw_id] = {"outcome": outcome, **row}

    def flush(self) -> None:
        self.num_flushed += 1

    def ids(self, outcome: DrawOutcome) -> list[str]:
        return [draw_id for draw_id, row in self.closed.items() if row["outcome"] is outcome]


class World:
    """A controller among fakes; every part can be replaced by keyword."""

    def __init__(self, settings: LoopSettings, generator: Any, **parts: Any) -> None:
        self.generator = generator
        self.curriculum = parts.pop("curriculum", None) or CountingCurriculum(
            batch_size=settings.groups_per_step
        )
        self.learner = parts.pop("learner", None) or TimedLearner()
        self.publisher = parts.pop("publisher", None) or DirectPublisher(generator)
        self.ledger: Any = parts.pop("ledger", None) or MemoryLedger()
        self.records: list[Any] = []
        self.groups: list[tuple[RolloutGroup, DrawOutcome]] = []
        self._on_step = parts.pop("on_step", None)
        self.controller = Controller(
            settings,
            curriculum=self.curriculum,
            generator=generator,
            scorer=parts.pop("scorer", None) or TextScorer(),
            learner=self.learner,
            publisher=self.publisher,
            ledger=self.ledger,
            encode=parts.pop("encode", lambda prompt, system: (1, 2)),
            draw_system=parts.pop("draw_system", lambda number: None),
            pad_token_id=0,
            attempt=parts.pop("attempt", 1),
            seed=parts.pop("seed", 0),
            on_step=self._record,
            on_group=lambda group, outcome: self.groups.append((group, outcome)),
            **parts,
        )

    async def _record(self, record: Any) -> None:
        self.records.append(record)
        if self._on_step:
            waiting: Awaitable[None] = self._on_step(record)
            await waiting

    def run(self) -> Any:
        return run_virtual(self.controller.run())


def loop_settings(**changed: Any) -> LoopSettings:
    """Small numbers: two rollouts a group, two groups a step."""
    small = {
        "num_steps": 4,
        "group_size": 2,
        "groups_per_step": 2,
        "max_tokens": 8,
        "row_tokens": 32,
        "micro_tokens": 32,
    }
    return LoopSettings.model_validate({**small, **changed})
