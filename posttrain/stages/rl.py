"""Asynchronous online RL: the loop of `posttrain.online` on real engines and a real learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from curricula.sampler import build_curriculum
from posttrain.online.controller import Controller
from posttrain.online.metrics import LoopSummary, StepRecord
from posttrain.progress import Progress
from posttrain.stages.context import StageContext
from posttrain.types import GenerationRequest, Sampling
from posttrain.workers.generator import GeneratorPool
from posttrain.workers.probe import ProbeSequence
from posttrain.workers.publisher import WeightPublisher

NUM_PROBES = 16


async def rl(context: StageContext, model: Path) -> dict[str, Any]:
    """Trains from the checkpoint `model`; the curriculum starts from the ledger's verdicts."""
    settings = context.settings.rl
    generators = await context.pools.serving(str(model))
    probes = await _probes(context, generators)
    learner = context.pools.start_learner(
        str(model),
        settings.learner,
        temperature=settings.temperature,
        max_age=settings.max_lag,
        max_tokens=settings.max_tokens,
        seed=context.seed,
    )
    publisher = WeightPublisher(
        learner,
        generators,
        model=model,
        scratch=context.pools.scratch,
        probes=probes,
        settings=settings.publish,
    )
    attempt = context.ledger.open_attempt("rl", from_step=0)
    progress = Progress("rl", settings.num_steps)

    async def on_step(record: StepRecord) -> None:
        context.metrics.append({"stage": "rl", "step": record.step} | dict(record.metrics))
        progress.advance(_note(record))

    controller = Controller(
        settings,
        curriculum=build_curriculum(
            context.train,
            context.ledger.verdicts(),
            settings.curriculum,
            settings.group_size,
            context.seed,
            batch_size=settings.groups_per_step,
        ),
        generator=generators,
        scorer=context.pools.scorer,
        learner=learner,
        publisher=publisher,
        ledger=context.ledger,
        encode=context.chat.encode,
        draw_system=context.instruction_mix(1).draw,
        pad_token_id=context.chat.pad_token_id,
        attempt=attempt,
        on_step=on_step,
    )
    summary = await controller.run()
    target = context.policy_of("rl")
    await learner.save_policy(target, str(model))
    context.ledger.commit_step(settings.num_steps)
    context.pools.serves_checkpoint(str(target))
    learner.stop()
    return _metrics(summary)


async def _probes(context: StageContext, generators: GeneratorPool) -> list[ProbeSequence]:
    """Prompts with the policy's own answers: natural text to compare log-probabilities on."""
    sequences = []
    for prompt in context.held_out[:NUM_PROBES]:
        request = GenerationRequest(
            request_id=f"probe-{prompt.prompt_id}",
            prompt_token_ids=context.chat.encode(prompt, None),
            num_rollouts=1,
            sampling=Sampling(max_tokens=context.settings.rl.max_tokens),
        )
        (rollout,) = await generators.generate(request)
        sequence = rollout.prompt_token_ids + rollout.completion_token_ids
        # An engine scores a sequence only with room for one more token.
        fitting = sequence[: context.settings.policy.max_length - 1]
        sequences.append(ProbeSequence(fitting, len(rollout.prompt_token_ids)))
    return sequences


def _note(record: StepRecord) -> str:
    metrics = record.metrics
    names = {"pass@1": "pass@1", "zero_advantage_share": "no signal", "lag_max": "lag"}
    return " · ".join(
        f"{label} {metrics[key]:.2f}" for key, label in names.items() if key in metrics
    )


def _metrics(summary: LoopSummary) -> dict[str, Any]:
    return {
        "steps": summary.num_steps,
        "draws": {outcome.value: n for outcome, n in summary.draws.items()},
        "draws_by_reason": dict(summary.draws_by_reason),
        "trained_by_domain": dict(summary.trained_by_domain),
        "trained_tokens": summary.trained_tokens,
        "generated_tokens": summary.generated_tokens,
        "max_lag": summary.max_lag,
        "loop_seconds": summary.seconds,
        "learning_seconds": summary.learning_seconds,
    }
