"""The asynchronous loop: draw, generate, score, gate, train, publish.

::

                                                ┌─▶ teacher ─────────────┐
    curriculum ─▶ slot ─▶ generate ─▶ score ─▶ gate ─▶ seat in a batch ───▶ train ─▶ publish
        ▲          ▲                            │                                        │
        │          ├──────────── ended ─────────┤                                        │
        │          └─────────────────────────── │ ──────── trained, weights served ──────┘
        └────────────── observe ────────────────┘

Everything outside the awaits is synchronous, so the state needs no locks; what a loop waits for
is an `asyncio.Event` that the other side sets.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from posttrain.online.accounting import Accounting, Draw, DrawLedger
from posttrain.online.admission import Admission
from posttrain.online.answering import Answering, Late
from posttrain.online.arrivals import Arrivals
from posttrain.online.gate import Reason, classify
from posttrain.online.lag import checked_lag
from posttrain.online.metrics import (
    Interval,
    LoopSummary,
    StepRecord,
    StepTimes,
    Totals,
    step_metrics,
    summarise_loop,
)
from posttrain.online.settings import LoopSettings
from posttrain.online.starvation import StarvationWatch
from posttrain.online.teaching import REWARDS_ALONE, GroupTeacher
from posttrain.packing import pack
from posttrain.types import (
    Curriculum,
    DrawOutcome,
    Learner,
    ObservedGenerator,
    PolicyVersion,
    Prompt,
    Publisher,
    RolloutGroup,
    Scorer,
    SystemInstruction,
)


class Controller:
    """Runs the loop from `first_step` to `settings.num_steps`, once.

    Three kinds of tasks run at the same time, under one task group: `_dispatch` fills slots with
    draws, one `_play` per draw answers and scores it, `_train` turns groups into steps.

    With `max_lag` 0 it is reproducible: answers are taken in the order of draws, each with a seed
    of its own, and a slot is filled in the moment in which it is freed. Otherwise time decides
    which prompt comes next, and which weights write a token.

    Args:
        encode: token ids of a prompt under a system instruction, generation prompt included.
        draw_system: the system instruction of a draw by its number, or None for none.
        share_prompts: whether the learner's model lets answers share a prompt.
        attempt: how often the run has been started; policy versions and draw ids begin with it.
        seed: where the seeds of the draws' samples come from when they have one.
        first_step: optimizer steps done by earlier attempts.
        first_draw: how many draws the checkpoint of `first_step` holds; new ones count on.
        plans: the batches that the checkpoint of `first_step` had planned.
        reissue: the draws that were open in the checkpoint of `first_step`; they are drawn again
            under their old ids before the curriculum is asked for prompts.
        learned: those of `reissue` that the curriculum has learned from already: what they answer
            now trains, but nobody learns of it twice.
        on_step: awaited by the train loop after each step; checkpoints belong here. What it reads
            of curriculum and ledger before its own first await is exactly the state of that step;
            generation goes on meanwhile, except with `max_lag` 0.
        on_group: told of every group with answers when its draw ends.
        beside: loops that run until the stage ends: evaluation, re-screening.
        teacher: reads admitted groups while they wait for their turn.

    Before the first draw the learner's weights are published as (attempt, first_step): whatever
    the generators hold from before, every rollout then names a version of this attempt.
    """

    def __init__(
        self,
        settings: LoopSettings,
        *,
        curriculum: Curriculum,
        generator: ObservedGenerator,
        scorer: Scorer,
        learner: Learner,
        publisher: Publisher,
        ledger: DrawLedger,
        encode: Callable[[Prompt, SystemInstruction | None], tuple[int, ...]],
        draw_system: Callable[[int], SystemInstruction | None],
        pad_token_id: int,
        share_prompts: bool = False,
        attempt: int,
        seed: int,
        first_step: int = 0,
        first_draw: int = 0,
        plans: Sequence[Sequence[str]] = (),
        reissue: Sequence[Draw] = (),
        learned: Sequence[str] = (),
        on_step: Callable[[StepRecord], Awaitable[None]] | None = None,
        on_group: Callable[[RolloutGroup, DrawOutcome], None] | None = None,
        beside: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
        teacher: GroupTeacher = REWARDS_ALONE,
    ) -> None:
        self._settings = settings
        self._curriculum = curriculum
        self._learner = learner
        self._publisher = publisher
        self._draw_system = draw_system
        self._pad_token_id = pad_token_id
        self._share_prompts = share_prompts
        self._on_step = on_step
        self._beside = beside
        self._teacher = teacher
        self._answering = Answering(settings, generator, scorer, encode, seed)
        self._version = PolicyVersion(attempt, first_step)
        self._first_step = first_step
        self._num_draws = first_draw
        self._admission = Admission(
            groups_per_step=settings.groups_per_step,
            max_lag=settings.max_lag,
            straggler_lag=settings.straggler_lag,
        )
        for seats in plans:
            self._admission.plan(seats)
        self._reissue = deque(reissue)
        self._learned = set(learned)
        self._accounting = Accounting(ledger, attempt=attempt, on_group=on_group)
        self._starvation = StarvationWatch(settings.starvation_draws)
        self._trainable: dict[str, RolloutGroup] = {}
        self._arrivals: Arrivals[RolloutGroup | Late] = Arrivals(ordered=settings.max_lag == 0)
        self._tasks = asyncio.TaskGroup()
        self._playing: set[asyncio.Task[None]] = set()
        self._slot_freed = asyncio.Event()
        self._group_ready = asyncio.Event()
        self._interval = Interval()
        self._totals = Totals()

    async def run(self) -> LoopSummary:
        """Returns after the last step; draws still in flight then end as unused.

        The first exception of any part (generator, scorer, learner, publisher, curriculum,
        ledger, hooks) cancels everything and is raised as it is; the draws in flight stay open in
        the ledger, for the next attempt to draw again.

        Raises:
            StarvationError: `starvation_draws` draws in a row carried no signal.
            EngineError: a group was written by weights that the lag bound rules out.
        """
        started = _now()
        await self._publisher.publish(self._version)
        failure: BaseException | None = None
        try:
            async with self._tasks:
                loops = [self._dispatch, *self._beside]
                endless = [self._tasks.create_task(loop()) for loop in loops]
                self._tasks.create_task(self._train(endless))
        except BaseExceptionGroup as group:
            failure = _first_cause(group)
        if failure is not None:
            raise failure
        return summarise_loop(
            self._accounting.counts,
            self._totals,
            version=self._version,
            num_steps=self._version.step - self._first_step,
            seconds=_now() - started,
        )

    async def _dispatch(self) -> None:
        """Consumes free slots and prompts, produces draws in flight.

        Waits for: a free slot. Woken by: the train loop once the generators hold the weights of a
        step. (A slot that the gate frees is filled by whoever brought the answers.)
        """
        while self._version.step < self._settings.num_steps:
            self._fill_slots()
            self._slot_freed.clear()
            await self._slot_freed.wait()

    def _fill_slots(self) -> None:
        while self._admission.needs_plan:
            self._admission.plan(self._curriculum.next_batch())
        while (domain := self._admission.vacant) is not None:
            draw = self._reissue.popleft() if self._reissue else self._next_draw(domain)
            self._admission.admit(draw.draw_id, draw.prompt.domain)
            self._arrivals.expect(draw.draw_id)
            self._accounting.open(draw, drawn_at_step=self._version.step)
            task = self._tasks.create_task(self._play(draw))
            self._playing.add(task)
            task.add_done_callback(self._playing.discard)

    def _next_draw(self, domain: str) -> Draw:
        number, self._num_draws = self._num_draws, self._num_draws + 1
        return Draw(
            draw_id=Draw.make_id(self._version.attempt, number),
            prompt=self._curriculum.draw(domain),
            system=self._draw_system(number),
        )

    async def _play(self, draw: Draw) -> None:
        """Consumes one draw, produces a trainable group or a free slot, which it fills.

        Waits for: the generator, then the scorer, both within the draw's deadline. Wakes the
        train loop.
        """
        answer = await self._answering.answer(draw)
        for draw_id, arrived in self._arrivals.arrive(draw.draw_id, answer):
            if isinstance(arrived, Late):
                if arrived.longest is not None:
                    self._interval.stale_lengths.append(arrived.longest)
                self._end(draw_id, DrawOutcome.STALE, Reason.DEADLINE, group=None)
            else:
                self._receive(arrived)

    def _receive(self, group: RolloutGroup) -> None:
        self._interval.groups.append(group)
        if group.num_scored and group.draw_id not in self._learned:
            self._curriculum.observe(
                group.prompt.prompt_id, group.num_scored, group.num_correct, self._version.step
            )
        ended = classify(group, needs_contrast=self._teacher.reward_weight > 0)
        if ended is not None:
            self._end(group.draw_id, ended.outcome, ended.reason, group=group)
            return
        self._starvation.trainable()
        self._gated(group.draw_id, group.prompt.domain, trainable=True)
        self._learned.add(group.draw_id)
        self._trainable[group.draw_id] = group
        self._teacher.begin(group, self._tasks)
        self._admission.ready(group.draw_id)
        self._group_ready.set()

    def _end(
        self, draw_id: str, outcome: DrawOutcome, reason: Reason, *, group: RolloutGroup | None
    ) -> None:
        """Ends a draw untrained: another takes its seat, of the same domain if that has hope."""
        domain = self._close(draw_id, outcome, group=group, reason=reason).prompt.domain
        self._admission.end(draw_id)
        self._gated(draw_id, domain, trainable=False)
        self._learned.discard(draw_id)
        instead = self._curriculum.instead_of(domain)
        if instead != domain:
            self._admission.pass_on(domain, to=instead)
            self._interval.seats_passed_on += 1
        self._group_ready.set()
        self._starvation.ended(reason)
        self._fill_slots()

    def _gated(self, draw_id: str, domain: str, *, trainable: bool) -> None:
        if draw_id not in self._learned:
            self._curriculum.gated(domain, trainable=trainable)

    def _close(
        self, draw_id: str, outcome: DrawOutcome, *, group: RolloutGroup | None, reason: str = ""
    ) -> Draw:
        # What ends after the record of step N belongs to step N+1: a checkpoint at N holds
        # exactly what its curriculum had seen.
        step = min(self._version.step + 1, self._settings.num_steps)
        draw = self._accounting.close(draw_id, outcome, step=step, group=group, reason=reason)
        self._interval.ended[outcome, reason, draw.prompt.domain] += 1
        return draw

    async def _train(self, endless: Sequence[asyncio.Task[None]]) -> None:
        """Consumes trainable groups, a planned batch at a time; produces steps.

        Waits for: a batch that may leave, the learner, the publisher, `on_step`. Woken by: a group
        becoming trainable, and the end of a draw that others waited for.
        """
        recorded_at = _now()
        while self._version.step < self._settings.num_steps:
            asked_at = _now()
            groups = await self._next_groups()
            waited = _now() - asked_at
            record = await self._train_step(groups, waited=waited, recorded_at=recorded_at)
            recorded_at = _now()
            if record.step == self._settings.num_steps:
                await self._end_stage(endless)
            self._accounting.flush()
            if self._on_step:
                await self._on_step(record)
            self._slot_freed.set()
        for task in endless:  # nothing was left to do for an attempt that starts at the end
            task.cancel()

    async def _next_groups(self) -> list[RolloutGroup]:
        while True:
            draw_ids = self._admission.release()
            if draw_ids is not None:
                return [self._trainable.pop(draw_id) for draw_id in draw_ids]
            self._group_ready.clear()
            await self._group_ready.wait()

    async def _train_step(
        self, groups: list[RolloutGroup], *, waited: float, recorded_at: float
    ) -> StepRecord:
        """From groups to served weights. No await follows the new version, see `on_step`."""
        trained_under = self._version
        bound = self._admission.lag_bound
        lags = [checked_lag(group, trained_under, bound) for group in groups]
        self._totals.max_lag = max(self._totals.max_lag, *lags)
        lesson = await self._teacher.lesson(groups)
        batch = pack(
            lesson.samples(groups, self._settings.advantage),
            row_tokens=self._settings.row_tokens,
            micro_tokens=self._settings.micro_tokens,
            pad_token_id=self._pad_token_id,
            current=trained_under,
            teacher_weight=lesson.weight,
            share_prompts=self._share_prompts,
        )
        learning_at = _now()
        learner_metrics = await self._learner.step(batch)
        publishing_at = _now()
        version = trained_under._replace(step=trained_under.step + 1)
        publish_metrics = await self._publisher.publish(version)
        published_at = _now()
        skipped = learner_metrics.get("skipped_steps", 0) > 0
        self._close_batch(groups, skipped=skipped)
        trained_tokens = 0 if skipped else batch.num_loss_tokens
        self._version = version
        self._admission.trained()
        if self._settings.max_lag > 0:
            self._slot_freed.set()
        interval, self._interval = self._interval, Interval()
        times = StepTimes(
            interval=published_at - recorded_at,
            waiting=waited,
            learning=publishing_at - learning_at,
            publishing=published_at - publishing_at,
        )
        self._totals.add(trained_tokens, interval, times, lesson)
        metrics = step_metrics(
            interval,
            trained=groups,
            current=trained_under,
            num_loss_tokens=trained_tokens,
            times=times,
            queues=self._queues(),
            learner=learner_metrics,
            publish=publish_metrics,
            teacher=lesson.metrics,
        )
        return StepRecord(
            step=version.step,
            version=version,
            num_draws=self._num_draws,
            plans=self._admission.plans,
            learned=sorted(self._learned),
            metrics=metrics,
        )

    def _close_batch(self, groups: Sequence[RolloutGroup], *, skipped: bool) -> None:
        for group in groups:
            self._learned.discard(group.draw_id)
            if skipped:
                end, reason = DrawOutcome.ERRORED, Reason.NOT_FINITE
                self._close(group.draw_id, end, group=group, reason=reason)
            else:
                self._close(group.draw_id, DrawOutcome.TRAINED, group=group)

    def _queues(self) -> dict[str, int]:
        scoring = self._answering.scoring
        generating = self._admission.num_waiting - scoring
        return {"generating": generating, "scoring": scoring, "ready": len(self._trainable)}

    async def _end_stage(self, endless: Sequence[asyncio.Task[None]]) -> None:
        """Cancels what is in flight; it ends as unused, before the last step is recorded."""
        tasks = [*endless, *self._playing, *self._teacher.pending]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for draw_id in self._accounting.open_ids:
            group = self._trainable.pop(draw_id, None)
            self._close(draw_id, DrawOutcome.UNUSED, group=group, reason=Reason.STAGE_ENDED)


def _now() -> float:
    """Seconds on the event loop's clock, which a test may replace."""
    return asyncio.get_running_loop().time()


def _first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first_cause(first) if isinstance(first, BaseExceptionGroup) else first
