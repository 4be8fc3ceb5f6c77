"""What a run still has to do: which stages are done, go on, or run again because of a change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from posttrain.config import Settings, resolved
from posttrain.dependencies import (
    Table,
    describe_changes,
    evaluation_table,
    goes_on,
    stage_tables,
)
from posttrain.errors import SettingsError
from posttrain.inputs import Inputs
from posttrain.metrics import to_json
from posttrain.remote_run import run_place
from posttrain.run_dir import RunDir


class Kind(StrEnum):
    """What will become of a stage."""

    DONE = "done before"
    NEW = "runs"
    GOES_ON = "goes on"
    AGAIN = "runs again"


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Of one stage; `why` says what has changed since it was begun, if anything has."""

    kind: Kind
    why: str = ""

    def describe(self) -> str:
        return f"{self.kind} ({self.why})" if self.why else str(self.kind)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the stages of a run and their evaluations rest on, by name and in order; fingerprints of
    the data, of the policies that come in and of what rewards are made of."""

    tables: Mapping[str, Table]
    evaluations: Mapping[str, Table]
    data: Mapping[str, str]
    models: Mapping[str, str]
    rewards: Mapping[str, str]

    @classmethod
    def of(cls, settings: Settings, inputs: Inputs) -> Plan:
        plain, data, models = resolved(settings), inputs.data, inputs.models
        rewards = inputs.reward_content
        tables = stage_tables(plain, data, models, rewards)
        return cls(
            tables=tables,
            evaluations={
                name: evaluation_table(plain, data, rewards, name, table)
                for name, table in tables.items()
                if name != "screen"
            },
            data=data,
            models=models,
            rewards=rewards,
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of all that the run reads."""
        return {**self.data, **self.models, **self.rewards}

    def state(self, run_dir: RunDir, name: str) -> Outlook:
        """RunDirError if the stage is done and what it left was changed."""
        wanted = self.tables[name]
        record = run_dir.stages().get(name)
        if record is None:
            return Outlook(kind=Kind.NEW)
        if record.depends_on == to_json(wanted):
            done = run_dir.stage_done(name, wanted)
            return Outlook(kind=Kind.DONE if done else Kind.GOES_ON)
        why = describe_changes(record.depends_on, wanted)
        again = not goes_on(name, record.depends_on, wanted)
        return Outlook(kind=Kind.AGAIN if again else Kind.GOES_ON, why=why)

    def is_done(self, run_dir: RunDir) -> bool:
        return all(run_dir.stage_done(name, table) for name, table in self.tables.items()) and all(
            run_dir.evaluation_done(name, table) for name, table in self.evaluations.items()
        )


def refuse_own_output(settings: Settings) -> None:
    """Raises SettingsError for a model that lies in the run's own directory: the run replaces it,
    so the same command would train on top of it for ever, and --fresh would delete it."""
    run = run_place(settings.run).path.resolve()
    named = {f"{stage}.model": model for stage, model in settings.own_models.items()}
    named["policy.model"] = settings.policy.model
    if settings.taught_stages and settings.teacher.model is not None:
        named["teacher.model"] = settings.teacher.model
    named |= {f"rewards.{part}.model": model for part, model in settings.rewards.models.items()}
    for setting, name in named.items():
        if Path(name).exists() and Path(name).resolve().is_relative_to(run):
            raise SettingsError(
                f"{setting} = {name} lies in run.dir = {settings.run.dir}, which this run writes "
                "itself: it would go on from its own result; choose another run.dir"
            )


def outlook(settings: Settings, inputs: Inputs) -> list[str]:
    """What the same settings would do now, stage by stage: `rl: runs again (rl.group_size: …)`.
    What is at a URL and not here is not looked at."""
    run_dir = RunDir(run_place(settings.run).path)
    if not run_dir.is_run():
        return list(settings.stages)
    plan = Plan.of(settings, inputs)
    return [f"{name}: {plan.state(run_dir, name).describe()}" for name in settings.stages]
