"""The stages in order: each one's policy is handed on, finished ones are not run again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain import config
from posttrain.atomic import staged_directory, write_atomically
from posttrain.cards import write_policy_card
from posttrain.config import Settings
from posttrain.data.instructions import InstructionMix
from posttrain.errors import Interrupted, PosttrainError, StageError
from posttrain.evaluation import PromptResult, evaluate, summarise
from posttrain.inputs import Inputs
from posttrain.inspect import load_run
from posttrain.inspect.page import write_report
from posttrain.ledger import Ledger
from posttrain.metric_sinks import open_sinks
from posttrain.metrics import MetricsLog
from posttrain.progress import duration, say
from posttrain.prompt_table import write_prompts
from posttrain.run_dir import RunDir, fingerprint_directory
from posttrain.stages.context import StageContext
from posttrain.workers.pools import Pools

START = "start"
"""The evaluation of the policy that comes in, recorded like a stage."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to: evaluations and seconds by stage, and where the policy is."""

    policy: Path
    evaluations: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, Any]]


def run(settings: Settings, inputs: Inputs, *, fresh: bool) -> RunResult:
    """Runs what is not done yet. The same call again resumes.

    Raises:
        RunDirError: the directory holds something else, or another driver has it.
        StageError: a stage failed; what was finished before it stays.
    """
    with RunDir.create_or_open(
        Path(settings.run.dir).absolute(),
        config.resolved(settings),
        fresh,
        {"data": inputs.fingerprint, "policy": fingerprint_directory(inputs.model)},
    ) as run_dir:
        if _pending(run_dir, settings, inputs):
            _run_stages(run_dir, settings, inputs)
            _report(run_dir)
        else:
            say(f"every stage of {run_dir.path} is done")
        return _result(run_dir)


def _run_stages(run_dir: RunDir, settings: Settings, inputs: Inputs) -> None:
    write_prompts(
        run_dir.prompts_path,
        train=inputs.train,
        held_out=inputs.held_out,
        sft_rows=inputs.sft_rows,
    )
    ledger = Ledger(run_dir.ledger_path)
    metrics = MetricsLog(run_dir.metrics_path, open_sinks(settings.log, run_dir.path))
    try:
        with _pools(run_dir.path, settings) as pools:
            context = StageContext(
                settings=settings,
                run=run_dir,
                ledger=ledger,
                metrics=metrics,
                pools=pools,
                chat=inputs.chat,
                train=inputs.train,
                held_out=inputs.held_out,
                sft_rows=inputs.sft_rows,
            )
            asyncio.run(_Runner(context, inputs).run())
    except PosttrainError as error:
        if error.exit_code == StageError.exit_code or isinstance(error, Interrupted):
            raise
        # Bad input ends with 2 only where nothing had been started.
        raise StageError(str(error)) from error
    finally:
        ledger.close()
        metrics.close()


def _report(run_dir: RunDir) -> None:
    """A run that is done is not failed by its report."""
    try:
        write_report(load_run(run_dir.path), run_dir.report_path)
    except PosttrainError as error:
        say(f"no report: {error}")
    else:
        say(f"report: {run_dir.report_path}")


class _Runner:
    """Walks through the stages; owns which policy comes next and which rows were kept."""

    def __init__(self, context: StageContext, inputs: Inputs) -> None:
        self._context = context
        self._inputs = inputs
        self._model = inputs.model
        self._kept_rows: frozenset[str] | None = None

    async def run(self) -> None:
        *earlier, last = _names(self._context.settings)
        for name in earlier:
            await self._stage(name)
        await self._stage(last, is_last=True)

    async def _stage(self, name: str, *, is_last: bool = False) -> None:
        run_dir = self._context.run
        fingerprint = _fingerprint(name, self._inputs)
        if run_dir.stage_done(name, fingerprint):
            say(f"{name}: done before")
            self._take_over(name)
            return
        run_dir.begin_stage(name, fingerprint)
        began = time.perf_counter()
        metrics, artifacts = await self._work(name)
        self._take_over(name)
        if name != "screen":
            artifacts.append(await self._evaluate(name))
            metrics["evaluation"] = _summary(artifacts[-1], self._context.settings)
        if is_last:
            with staged_directory(run_dir.policy_dir) as staged:
                shutil.copytree(self._model, staged, dirs_exist_ok=True)
            artifacts.append(run_dir.policy_dir)
        seconds = time.perf_counter() - began
        run_dir.finish_stage(name, artifacts, metrics, seconds)
        if name not in (START, "screen"):
            write_policy_card(run_dir, name)
        self._context.metrics.append({"stage": name, "event": "done", "seconds": seconds})
        say(f"{name}: {duration(seconds)}")

    async def _work(self, name: str) -> tuple[dict[str, Any], list[Path]]:
        """The stage itself: its metrics and what it left on disk."""
        context, directory = self._context, self._context.run.stage_dir(name)
        if name == START:
            return {}, []
        directory.mkdir(exist_ok=True)
        if name == "screen":
            from posttrain.stages.screen import screen

            screened = await screen(context, self._model)
            kept = _kept_file(context.run)
            write_atomically(kept, json.dumps(sorted(screened.kept_rows)))
            return screened.metrics, [kept]
        policy = context.policy_of(name)
        if policy.exists():  # left by an interrupted attempt at this stage
            shutil.rmtree(policy)
        if name == "sft":
            from posttrain.stages.sft import sft

            return sft(context, self._model, self._kept_rows), [policy]
        if name == "rl":
            from posttrain.stages.rl import rl

            return await rl(context, self._model), [policy]
        from posttrain.stages.dpo import dpo

        return await dpo(context, self._model), [policy]

    def _take_over(self, name: str) -> None:
        """What a finished stage hands to the next."""
        if name == "screen":
            kept = _kept_file(self._context.run).read_text()
            self._kept_rows = frozenset(json.loads(kept))
        elif name != START:
            self._model = self._context.policy_of(name)

    async def _evaluate(self, name: str) -> Path:
        context = self._context
        results = await evaluate(
            context.held_out,
            generator=await context.pools.serving(str(self._model)),
            scorer=context.pools.scorer,
            encode=context.chat.encode,
            instructions=list(context.instruction_mix(0).by_name.values()),
            settings=context.settings.eval,
            label=name,
        )
        target = context.run.evals_dir / f"{name}.json"
        target.parent.mkdir(exist_ok=True)
        write_atomically(target, json.dumps([asdict(result) for result in results]))
        return target


def evaluate_models(
    settings: Settings, inputs: Inputs, models: Sequence[Path]
) -> list[dict[str, Any]]:
    """`summarise` of each policy on the held-out tasks; leaves nothing on disk.

    All have the tokenizer and the architecture of the first: the engines change weights.
    """
    with _pools(Path.cwd() / f"eval-{os.getpid()}", settings) as pools:

        async def measure(model: Path, label: str) -> list[PromptResult]:
            return await evaluate(
                inputs.held_out,
                generator=await pools.serving(str(model)),
                scorer=pools.scorer,
                encode=inputs.chat.encode,
                instructions=list(InstructionMix(settings.system_instructions, 0).by_name.values()),
                settings=settings.eval,
                label=label,
            )

        async def measure_all() -> list[list[PromptResult]]:
            return [await measure(m, f"eval-{number}") for number, m in enumerate(models)]

        results = asyncio.run(measure_all())
    return [summarise(result, settings.eval.k) for result in results]


def read_evaluation(path: Path) -> list[PromptResult]:
    """The results that a run's evaluation left, prompt by prompt."""
    return [PromptResult(**record) for record in json.loads(path.read_text())]


def _summary(path: Path, settings: Settings) -> dict[str, Any]:
    return summarise(read_evaluation(path), settings.eval.k)


def _names(settings: Settings) -> list[str]:
    return [START, *settings.stages]


def _pending(run_dir: RunDir, settings: Settings, inputs: Inputs) -> list[str]:
    return [
        name
        for name in _names(settings)
        if not run_dir.stage_done(name, _fingerprint(name, inputs))
    ]


def _fingerprint(name: str, inputs: Inputs) -> str:
    """Of the data that a stage rests on; the run directory itself refuses other settings."""
    return hashlib.sha256(f"{name} {inputs.fingerprint}".encode()).hexdigest()[:16]


def _kept_file(run_dir: RunDir) -> Path:
    return run_dir.stage_dir("screen") / "kept_rows.json"


def _pools(owner: Path, settings: Settings) -> Pools:
    """`owner` names what is left in shared memory, should the driver be killed."""
    resources = settings.resources
    return Pools(
        hashlib.sha256(str(owner).encode()).hexdigest()[:12],
        rollout=resources.rollout.as_long_as(settings.policy.max_length),
        judge=resources.judge.as_long_as(settings.policy.max_length),
        learner=resources.learner,
        rewards=settings.rewards,
        reward_workers=resources.rewards.workers,
        reward_judge=resources.rewards.judge,
        reward_actor=resources.rewards.actor,
        deadline_s=resources.deadline_s,
    )


def _result(run_dir: RunDir) -> RunResult:
    stages = run_dir.stages()
    return RunResult(
        policy=run_dir.policy_dir,
        evaluations={
            n: r.metrics["evaluation"] for n, r in stages.items() if "evaluation" in r.metrics
        },
        seconds={n: r.seconds for n, r in stages.items() if r.seconds is not None},
        metrics={n: r.metrics for n, r in stages.items()},
    )
