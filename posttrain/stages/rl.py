"""Asynchronous online RL: the loop of `posttrain.online` on real engines and a real learner."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from curricula.sampler import DifficultySampler, UniformSampler, build_curriculum
from posttrain.cards import write_rollouts_card
from posttrain.errors import DivergenceError, RunDirError
from posttrain.ledger import LedgerReader
from posttrain.online.accounting import Draw
from posttrain.online.controller import Controller
from posttrain.online.metrics import LoopSummary, ends
from posttrain.online.teaching import REWARDS_ALONE, GroupTeacher, OnlineTeacher
from posttrain.progress import say
from posttrain.stages.context import StageContext
from posttrain.stages.rl_after_step import STAGE, AfterStep
from posttrain.stages.rl_beside import Beside
from posttrain.stages.rl_checkpoint import BEGINNING, LoopState, RLCheckpoints, read_state
from posttrain.stages.rl_roles import Role
from posttrain.stages.rl_stop import StopWithCheckpoint
from posttrain.types import DrawOutcome, GenerationRequest, RolloutGroup, Sampling
from posttrain.workers.checkpoints import check_ranks
from posttrain.workers.generator import GeneratorPool
from posttrain.workers.learner_ranks import RemoteLearner
from posttrain.workers.probe import ProbeSequence
from posttrain.workers.publisher import WeightPublisher
from posttrain.workers.teacher_pool import TeacherPool

NUM_PROBES = 64
"""With 16 short answers the mean difference of 16 bits varies by a factor of 5, with 64 by 2."""
SLOW_TEACHER = 0.05
"""Share of the loop's time that steps may wait for the teacher without a word about it."""


async def rl(context: StageContext, model: Path, critic: str | None) -> dict[str, Any]:
    """Trains from the checkpoint `model`, or goes on from the stage's own last checkpoint.

    The curriculum starts from the ledger's verdicts by `critic`; None: nothing was screened.
    """
    settings = context.settings.rl
    checkpoint, state = _beginning(context)
    generators = await context.pools.serving(str(model))
    recent = deque(await _own_answers(context, generators), maxlen=NUM_PROBES)
    learner = _learner(context, model, checkpoint)
    publish_to = partial(
        WeightPublisher, learner, model=model, probes=recent, settings=settings.publish
    )
    curriculum = _curriculum(context, state, critic)
    attempt = context.ledger.open_attempt(STAGE, from_step=state.step)
    reissue = _open_draws(context, attempt)
    if checkpoint is not None:
        say(f"rl: goes on from step {state.step}, {len(reissue)} draws are drawn again")
    beside = await Beside.start(context, model, attempt, generators, curriculum, publish_to)
    with _teaching(context, state) as (teacher, reading):
        roles = _roles(generators, beside, reading)
        after_step = AfterStep(
            context, model, attempt, state.step, curriculum, learner, roles, beside
        )
        await after_step.make_up()

        def on_group(group: RolloutGroup, outcome: DrawOutcome) -> None:
            after_step.rollouts.append(group, outcome)
            recent.append(ProbeSequence.of(group.rollouts[0], context.settings.policy.max_length))

        stop = StopWithCheckpoint(learner, after_step, after_step.save_last)
        controller = Controller(
            settings,
            curriculum=curriculum,
            generator=generators,
            scorer=context.pools.scorer,
            learner=stop,
            publisher=publish_to(generators, scratch=context.pools.learner_scratch),
            ledger=context.ledger,
            encode=context.chat.encode,
            draw_system=context.instruction_mix(1).draw,
            pad_token_id=context.chat.pad_token_id,
            share_prompts=await learner.can_share_prompts(),
            attempt=attempt,
            seed=context.seed,
            first_step=state.step,
            first_draw=state.num_draws,
            plans=state.plans,
            reissue=reissue,
            learned=state.learned,
            on_step=stop.after_step,
            on_group=on_group,
            beside=[*beside.loops, stop.run],
            teacher=teacher,
        )
        try:
            with stop.listening():
                summary = await controller.run()
        except DivergenceError as error:
            raise DivergenceError(f"{error} {after_step.where_it_goes_on()}") from error
    _say_whether_the_teacher_kept_up(summary)
    after_step.rollouts.flush()
    beside.stop()
    await _hand_on(context, learner, model)
    metrics = _metrics(summary, context.ledger)
    write_rollouts_card(context.run, metrics, settings.model_dump())
    return metrics


def _beginning(context: StageContext) -> tuple[Path | None, LoopState]:
    """The checkpoint to go on from, and what it says."""
    directory = context.run.stage_dir(STAGE)
    checkpoint = RLCheckpoints(directory, context.settings.rl.keep_checkpoints).latest()
    if checkpoint is None:
        return None, BEGINNING
    check_ranks(checkpoint / "learner", context.settings.resources.learner.ranks)
    return checkpoint, read_state(checkpoint)


async def _hand_on(context: StageContext, learner: RemoteLearner, model: Path) -> None:
    """The last policy becomes the stage's, which the generators serve already."""
    target = context.policy_of(STAGE)
    await learner.save_policy(target, str(model))
    if context.settings.policy.lora is not None:
        await learner.save_adapter(context.adapter_of(STAGE))
    context.pools.serves_checkpoint(str(target))
    learner.stop()


def _learner(context: StageContext, model: Path, checkpoint: Path | None) -> RemoteLearner:
    """One that starts from `model`, or goes on from the stage's checkpoint."""
    settings = context.settings.rl
    return context.pools.start_learner(
        str(model),
        settings.learner,
        temperature=settings.temperature,
        max_age=settings.max_lag + settings.straggler_lag,
        max_tokens=settings.max_tokens,
        num_steps=settings.num_steps,
        seed=context.seed,
        lora=context.settings.policy.lora,
        checkpoint=checkpoint / "learner" if checkpoint is not None else None,
    )


@contextmanager
def _teaching(
    context: StageContext, state: LoopState
) -> Iterator[tuple[GroupTeacher, TeacherPool | None]]:
    """Who reads admitted groups, and its actors, if it has any."""
    settings = context.settings
    if settings.rl.distillation is None:
        yield REWARDS_ALONE, None
        return
    assert context.teacher is not None
    resources = settings.resources
    pool = TeacherPool(str(context.teacher), resources.teacher, resources.deadline_s)
    score = partial(pool.score, temperature=settings.rl.temperature)
    try:
        yield OnlineTeacher(settings.rl.distillation, score, state.teacher_lead), pool
    finally:
        pool.stop()


def _roles(
    generators: GeneratorPool, beside: Beside, teacher: TeacherPool | None
) -> dict[str, Role]:
    """Those that this stage has, the learner left out: the loop measures it."""
    roles = {"rollout": Role(idle_share=generators.idle_share)}
    if beside.judge is not None:
        roles["judge"] = beside.judge
    if teacher is not None:
        roles["teacher"] = Role(idle_share=teacher.idle_share, tokens=lambda: teacher.tokens)
    return roles


def _say_whether_the_teacher_kept_up(summary: LoopSummary) -> None:
    if summary.teacher is None:
        return
    share = summary.teacher.waited_seconds / summary.seconds
    if share > SLOW_TEACHER or summary.teacher.late_groups:
        say(
            f"rl: the teacher was not fast enough: steps waited {share:.0%} of the time for it, "
            f"and {summary.teacher.late_groups} groups were trained without it. Give it more "
            "(resources.teacher.replicas, threads, or a GPU), or lower rl.distillation.deadline_s"
        )


def _curriculum(
    context: StageContext, state: LoopState, critic: str | None
) -> DifficultySampler | UniformSampler:
    settings = context.settings.rl
    curriculum = build_curriculum(
        context.train,
        context.ledger.verdicts(critic) if critic is not None else [],
        settings.curriculum,
        settings.group_size,
        context.seed,
        batch_size=settings.groups_per_step,
    )
    if state.curriculum:
        curriculum.load_state_dict(state.curriculum)
    return curriculum


def _open_draws(context: StageContext, attempt: int) -> list[Draw]:
    """What was in flight when the checkpoint was taken that this attempt starts from."""
    prompts = {prompt.prompt_id: prompt for prompt in context.train}
    mix = context.instruction_mix(1)
    draws = []
    for row in context.ledger.open_draws(attempt):
        if row.prompt_id not in prompts:
            raise RunDirError(
                f"draw {row.draw_id} is in flight for prompt {row.prompt_id}, which is no longer "
                "among the training prompts: restore the data, or start over with --fresh"
            )
        draws.append(
            Draw(
                draw_id=row.draw_id,
                prompt=prompts[row.prompt_id],
                system=mix.resolve(row.system),
            )
        )
    return draws


async def _own_answers(context: StageContext, generators: GeneratorPool) -> list[ProbeSequence]:
    """Of the policy that comes in: natural text to compare log-probabilities on at first."""
    asked = [
        GenerationRequest(
            request_id=f"probe-{prompt.prompt_id}",
            prompt_token_ids=context.chat.encode(prompt, None),
            num_rollouts=1,
            sampling=Sampling(max_tokens=context.settings.rl.max_tokens),
        )
        for prompt in context.held_out[:NUM_PROBES]
    ]
    answered = await asyncio.gather(*map(generators.generate, asked))
    max_length = context.settings.policy.max_length
    return [ProbeSequence.of(rollout, max_length) for (rollout,) in answered]


def _metrics(summary: LoopSummary, ledger: LedgerReader) -> dict[str, Any]:
    """Of the stage, whatever its attempts were; what nobody adds up over these stands apart."""
    draws, reasons, trained = ends(ledger.ended_draws(STAGE))
    return {
        "steps": summary.version.step,
        "draws": {outcome.value: n for outcome, n in draws.items()},
        "draws_by_reason": dict(reasons),
        "trained_by_domain": dict(trained),
        "last_attempt": {
            "steps": summary.num_steps,
            "trained_tokens": summary.trained_tokens,
            "generated_tokens": summary.generated_tokens,
            "max_lag": summary.max_lag,
            "loop_seconds": summary.seconds,
            "learning_seconds": summary.learning_seconds,
            **({} if summary.teacher is None else {"teacher": asdict(summary.teacher)}),
        },
    }
