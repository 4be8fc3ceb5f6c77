"""The stages in order: each one's policy is handed on, finished ones are not run again."""

from __future__ import annotations

import asyncio
import contextlib
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
from posttrain.inputs import STARTER_POLICY, Inputs
from posttrain.inspect import load_run
from posttrain.inspect.page import write_report
from posttrain.ledger import Ledger
from posttrain.metric_sinks import open_sinks
from posttrain.metrics import AGAIN, MetricsLog
from posttrain.progress import duration, say
from posttrain.prompt_table import write_prompts
from posttrain.remote_run import RemoteCopy, run_place
from posttrain.rerun import Kind, Plan
from posttrain.roles import demands
from posttrain.run_dir import CARD_NAME, RunDir, hash_path
from posttrain.stage_order import START
from posttrain.stages.context import StageContext
from posttrain.stages.held_out import measure_policy
from posttrain.workers.adapters import is_adapter, stack_adapters
from posttrain.workers.pools import Pools
from rewards.shaping import RewardSettings


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to: evaluations and seconds by stage, and where the policy is."""

    policy: Path
    evaluations: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, Any]]


def run(settings: Settings, inputs: Inputs, *, fresh: bool) -> RunResult:
    """Runs what is not done yet, or rests on something that changed. The same call again resumes.

    Raises:
        RunDirError: the directory holds something else, cannot be written, or another driver has
            it.
        SettingsError: the cluster is too small.
        StageError: a stage failed; what was finished before it stays.
    """
    plan = Plan.of(settings, inputs)
    place = run_place(settings.run)
    copy = (
        RemoteCopy(place.url, place.path, settings.run.copy_deadline_s)
        if place.url is not None
        else None
    )
    with contextlib.ExitStack() as driving:
        if copy is not None:
            driving.enter_context(copy.driven(fresh=fresh))
        run_dir = driving.enter_context(
            RunDir.create_or_open(
                place.path,
                config.resolved(settings),
                fresh,
                plan.fingerprints,
                inputs.prompts_sharing_text(),
            )
        )
        if plan.is_done(run_dir):
            say(f"every stage of {settings.run.dir} is done")
        else:
            with _pools(run_dir.path, settings, inputs.rewards) as pools:
                _run_stages(run_dir, settings, inputs, plan, pools, copy)
        _hand_over(run_dir, settings, inputs)
        if not _has_report(run_dir):
            _report(run_dir)
        if copy is not None:
            asyncio.run(copy.push())
        return _result(run_dir, settings)


def _run_stages(
    run_dir: RunDir,
    settings: Settings,
    inputs: Inputs,
    plan: Plan,
    pools: Pools,
    copy: RemoteCopy | None,
) -> None:
    write_prompts(
        run_dir.prompts_path,
        train=inputs.train,
        held_out=inputs.held_out,
        sft_rows=inputs.sft_rows,
    )
    ledger = Ledger(run_dir.ledger_path)
    metrics = MetricsLog(run_dir.metrics_path, open_sinks(settings.log, run_dir.path))
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
        pairs=inputs.pairs,
        copy=copy,
        teacher=inputs.teacher,
    )
    try:
        asyncio.run(_Runner(context, inputs, plan).run())
    except PosttrainError as error:
        if error.exit_code == StageError.exit_code or isinstance(error, Interrupted):
            raise
        # Bad input ends with 2 only where nothing had been started.
        raise StageError(str(error)) from error
    finally:
        ledger.close()
        metrics.close()


def _has_report(run_dir: RunDir) -> bool:
    """Whether there is one of what the run has come to: a driver may have been killed before it
    wrote it."""
    if not run_dir.report_path.exists():
        return False
    written = run_dir.report_path.stat().st_mtime_ns
    rests_on = (run_dir.config_path, run_dir.manifest_path)
    return all(path.stat().st_mtime_ns <= written for path in rests_on)


def _report(run_dir: RunDir) -> None:
    """A run that is done is not failed by its report, whatever is wrong with that."""
    try:
        write_report(load_run(run_dir.path), run_dir.report_path)
    except Exception as error:
        say(f"no report ({type(error).__name__}: {error}); see `posttrain inspect {run_dir.path}`")
    else:
        say(f"report: {run_dir.report_path}")


class _Runner:
    """Walks through the stages; owns which policy comes next and what screening found."""

    def __init__(self, context: StageContext, inputs: Inputs, plan: Plan) -> None:
        self._context = context
        self._inputs = inputs
        self._plan = plan
        self._model = inputs.model
        self._kept_rows: frozenset[str] | None = None
        self._critic: str | None = None

    async def run(self) -> None:
        for name in self._plan.tables:
            if name == "screen":  # its critic is nobody else's policy
                await self._stage(name)
            else:
                self._model = self._inputs.stage_models.get(name, self._model)
                await self._stage(name)
                await self._evaluation(name)
            if name not in (START, "screen"):
                write_policy_card(self._context.run, name)
            await self._context.keep()

    async def _stage(self, name: str) -> None:
        run_dir, wanted = self._context.run, self._plan.tables[name]
        if run_dir.stage_done(name, wanted):
            say(f"{name}: done before")
        else:
            self._make_way(name)
            run_dir.begin_stage(name, wanted)
            # The copy is told before any file of the stage comes there: one that breaks off holds
            # none that its manifest would call changed.
            await self._context.keep()
            began = time.perf_counter()
            metrics, artifacts = await self._work(name)
            seconds = time.perf_counter() - began
            run_dir.finish_stage(name, artifacts, metrics, seconds)
            self._context.metrics.append({"stage": name, "event": "done", "seconds": seconds})
            say(f"{name}: {duration(seconds)}")
        self._take_over(name)

    def _make_way(self, name: str) -> None:
        """Whatever was begun under other settings is moved aside."""
        run_dir = self._context.run
        outlook = self._plan.state(run_dir, name)
        if outlook.kind is Kind.GOES_ON and outlook.why:
            say(f"{name}: goes on with {outlook.why}")
        elif outlook.kind is Kind.AGAIN:
            say(f"{name}: runs again, for this has changed: {outlook.why}")
            left = run_dir.set_aside(name)
            if left is not None:
                say(f"{name}: what it had left is in {left}; delete it when you need it no more")
            self._context.metrics.append({"stage": name, "event": AGAIN, "changed": outlook.why})

    async def _work(self, name: str) -> tuple[dict[str, Any], list[Path]]:
        """The stage itself: its metrics and what it left on disk."""
        context, directory = self._context, self._context.run.stage_dir(name)
        if name == START:
            return {}, []
        directory.mkdir(exist_ok=True)
        if name == "screen":
            from posttrain.stages.screen import screen

            critic = self._inputs.stage_models.get(name, self._model)
            screened = await screen(context, critic)
            kept = _kept_file(context.run)
            write_atomically(
                kept, json.dumps({"critic": screened.critic, "rows": sorted(screened.kept_rows)})
            )
            return screened.metrics, [kept]
        policy = context.policy_of(name)
        if policy.exists():  # left by an interrupted attempt at this stage
            shutil.rmtree(policy)
        if name == "sft":
            from posttrain.stages.sft import sft

            return await sft(context, self._model, self._kept_rows), context.left_by(name)
        if name == "rl":
            from posttrain.stages.rl import rl

            return await rl(context, self._model, self._critic), context.left_by(name)
        from posttrain.stages.dpo import dpo

        return await dpo(context, self._model), context.left_by(name)

    def _take_over(self, name: str) -> None:
        """What a finished stage hands to the next."""
        if name == "screen":
            kept = json.loads(_kept_file(self._context.run).read_text())
            self._critic, self._kept_rows = kept["critic"], frozenset(kept["rows"])
        elif name != START:
            self._model = self._context.policy_of(name)

    async def _evaluation(self, name: str) -> None:
        context, wanted = self._context, self._plan.evaluations[name]
        target = context.run.evals_dir / f"{name}.json"
        if context.run.evaluation_done(name, wanted):
            context.evaluations[self._model] = read_evaluation(target)
            return
        began = time.perf_counter()
        results = await measure_policy(context, self._model, name)
        summary = summarise(results, context.settings.eval.k)
        target.parent.mkdir(exist_ok=True)
        context.run.forget_evaluation(name, target)
        await context.keep()  # as before a stage
        write_atomically(target, json.dumps([asdict(result) for result in results]))
        context.run.record_evaluation(
            name,
            wanted,
            artifact=target,
            summary=summary,
            seconds=time.perf_counter() - began,
        )


def evaluate_models(
    settings: Settings, inputs: Inputs, models: Sequence[Path]
) -> list[dict[str, Any]]:
    """`summarise` of each policy on the held-out tasks; leaves nothing on disk.

    All have the tokenizer and the architecture of the first: the engines change weights.
    """
    serving_only = settings.model_copy(update={"stages": []})
    owner = Path.cwd() / f"eval-{os.getpid()}"
    with _pools(owner, serving_only, inputs.rewards) as pools:

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


def _kept_file(run_dir: RunDir) -> Path:
    return run_dir.stage_dir("screen") / "kept_rows.json"


def _pools(owner: Path, settings: Settings, rewards: RewardSettings) -> Pools:
    """`owner` names what is left in shared memory, should the driver be killed; `rewards` are those
    of the inputs, with the places of their models."""
    resources = settings.resources
    return Pools(
        hashlib.sha256(str(owner).encode()).hexdigest()[:12],
        rollout=resources.rollout.as_long_as(settings.policy.max_length),
        judge=resources.judge.as_long_as(settings.policy.max_length),
        learner=resources.learner,
        rewards=rewards,
        reward_workers=resources.rewards.workers,
        reward_judge=resources.rewards.judge,
        reward_actor=resources.rewards.actor,
        demands=demands(settings),
        deadline_s=resources.deadline_s,
    )


def _hand_over(run_dir: RunDir, settings: Settings, inputs: Inputs) -> None:
    """The policy of the last stage that trained becomes the run's, or the adapters of all; with its
    card."""
    trained = [name for name in settings.stages if name != "screen"]
    base, adapters = _adapters(run_dir, settings, inputs)
    # What began with an adapter has a base that lies in a cache: it would not be found elsewhere.
    if (
        adapters
        and not settings.policy.merge_adapter
        and not is_adapter(Path(settings.policy.model))
    ):
        from_hub = base == inputs.model and not Path(settings.policy.model).exists()
        named = settings.policy.model if from_hub and base != STARTER_POLICY else str(base)
        stack_adapters(adapters, base, named, run_dir.policy_dir)
    else:
        last = run_dir.stage_dir(trained[-1]) / "policy" if trained else inputs.model
        _copy_policy(last, run_dir.policy_dir)
    # After a stage a card goes beside what is there by then, which this may have replaced.
    if trained and not (run_dir.policy_dir / CARD_NAME).exists():
        write_policy_card(run_dir, trained[-1])


def _copy_policy(source: Path, target: Path) -> None:
    if target.exists() and hash_path(target) == hash_path(source):
        return
    with staged_directory(target) as staged:
        shutil.copytree(source, staged, dirs_exist_ok=True)


def _adapters(run_dir: RunDir, settings: Settings, inputs: Inputs) -> tuple[Path, list[Path]]:
    """The policy that the last unbroken row of stages began with, and the adapters that they left
    on it, in order. A critic of screening's own is nobody else's policy."""
    base, adapters = inputs.model, list[Path]()
    for name in settings.stages:
        if name in inputs.stage_models and name != "screen":
            base, adapters = inputs.stage_models[name], []
        adapter = run_dir.stage_dir(name) / "adapter"
        if adapter.is_dir():
            adapters.append(adapter)
    return base, adapters


def _result(run_dir: RunDir, settings: Settings) -> RunResult:
    recorded = run_dir.stages()
    stages = {name: recorded[name] for name in (START, *settings.stages)}
    return RunResult(
        policy=run_dir.policy_dir,
        evaluations={
            n: r.metrics["evaluation"] for n, r in stages.items() if "evaluation" in r.metrics
        },
        seconds={n: r.seconds for n, r in stages.items() if r.seconds is not None},
        metrics={n: r.metrics for n, r in stages.items()},
    )
