"""The settings of a run: each component's own, composed; read from YAML, strictly.

Defaults live beside the component they belong to. A file states only what differs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from curricula.sampler import CurriculumSettings
from judges.judge import JudgeSettings
from judges.selection import SelectionSettings
from posttrain.data.instructions import InstructionSettings
from posttrain.data.sources import SourceSettings
from posttrain.errors import SettingsError
from posttrain.evaluation import EvalSettings
from posttrain.metric_sinks import LogSettings
from posttrain.online.rescreen import RescreenSettings
from posttrain.online.settings import LoopSettings
from posttrain.online.teacher_settings import OnlineDistillationSettings
from posttrain.settings_errors import explain
from posttrain.stage_order import STAGES, StageName, check_stages
from posttrain.teaching.settings import TeacherSettings, check_learning, needs_teacher
from posttrain.workers.settings import (
    ActorResources,
    EngineSettings,
    LearnerResources,
    LearnerSettings,
    LoraSettings,
    PublishSettings,
    RolloutPoolSettings,
    TeacherPoolSettings,
)
from posttrain.workers.trainer_settings import DPOSettings, SFTSettings
from rewards.shaping import RewardSettings

Composed = TypeVar("Composed", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunSettings(_Section):
    """`dir` is where everything goes: a path, or a URL that fsspec knows (see
    `posttrain.remote_run`), which is worked on in `work_dir` and copied there, each time within
    `copy_deadline_s`. `seed` is the only source of randomness that is named."""

    dir: str = Field(min_length=1)
    work_dir: str | None = None
    copy_deadline_s: float = Field(default=3600.0, gt=0)
    seed: int = Field(default=0, ge=0)


class PolicySettings(_Section):
    """`model` is a checkpoint directory, a hub name, or `starter`, the one that ships.

    `dtype` is that of SFT and DPO; engines and the online learner have their own, since a bf16
    engine under an fp32 learner is common (`resources.rollout.engine.dtype`, `rl.learner.dtype`).
    With `lora` every stage trains an adapter on the policy that enters it, and the run leaves one
    adapter, in PEFT's format, for the policy that it began with; with `merge_adapter` it leaves the
    whole policy.
    """

    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_length: int = Field(default=2048, gt=0, description="tokens of prompt and answer")
    lora: LoraSettings | None = None
    merge_adapter: bool = False


class TaskSettings(_Section):
    """Tasks to learn from and tasks to measure on; the two may share no prompt."""

    train: list[SourceSettings]
    held_out: list[SourceSettings]


class ScreenSettings(_Section):
    """Difficulty screening: how the critic is sampled, what is dropped from the SFT set. `model` is
    the critic, by default the policy that enters the stage."""

    model: str | None = None
    judge: JudgeSettings = JudgeSettings()
    selection: SelectionSettings = SelectionSettings(drop_easiest=0.5)

    @model_validator(mode="after")
    def _answers_are_what_it_selects_by(self) -> Self:
        if not self.selection.is_rate:
            raise ValueError(
                f"screening has answers alone to select by, no {self.selection.metric}: take pass@1"
                " or pass@k, or `posttrain prune --method` beforehand"
            )
        return self


class TrainingEvalSettings(EvalSettings):
    """Evaluation on `prompts` held-out prompts of all domains every so many steps, beside
    training."""

    every_steps: int = Field(default=20, gt=0)
    prompts: int = Field(default=128, gt=0)
    k: list[int] = Field(default=[1])
    num_samples: int = Field(default=1, gt=0)
    instruction_samples: int = Field(default=0, ge=0)
    concurrency: int = Field(default=8, gt=0)


class RLSettings(LoopSettings):
    """Asynchronous online RL: the loop's own settings, and those of its parts.

    `model` is what the stage starts from, by default what the stage before it left.
    `keep_checkpoints` counts the newest ones; `export_every` so many steps the policy is also
    written to `rl/export-N` in Hugging Face's format, and stays. That, `evaluation`, `rescreen` and
    a teacher's word (`distillation`) are off unless given.
    """

    model: str | None = None
    checkpoint_every: int = Field(default=20, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    export_every: int | None = Field(default=None, gt=0)
    evaluation: TrainingEvalSettings | None = None
    rescreen: RescreenSettings | None = None
    distillation: OnlineDistillationSettings | None = None
    learner: LearnerSettings = LearnerSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
    publish: PublishSettings = PublishSettings()


class RewardPoolSettings(_Section):
    """Scorer processes on one node; `judge` is the engines of the model that `rewards.judge` names,
    where it names one."""

    workers: int = Field(default=1, gt=0)
    actor: ActorResources = ActorResources(cpus=0.0)
    judge: RolloutPoolSettings = RolloutPoolSettings(engine=EngineSettings(max_model_len=4096))


class ResourceSettings(_Section):
    """The pools. `judge` is the engine of a dedicated critic during RL, where one is asked for,
    `teacher` holds a teacher while it is asked; `deadline_s` is how long a pool may take until it
    is placed and ready. `gpu_gib` is the memory of one GPU where the run will be, for `posttrain
    plan`: by default that of this machine's."""

    rollout: RolloutPoolSettings = RolloutPoolSettings()
    judge: RolloutPoolSettings = RolloutPoolSettings()
    learner: LearnerResources = LearnerResources()
    teacher: TeacherPoolSettings = TeacherPoolSettings()
    rewards: RewardPoolSettings = RewardPoolSettings()
    deadline_s: float = Field(default=300.0, gt=0)
    gpu_gib: float | None = Field(default=None, gt=0)

    @field_validator("rollout", "judge")
    @classmethod
    def _as_long_as_the_policy(cls, pool: RolloutPoolSettings) -> RolloutPoolSettings:
        return pool.without_own_length()


class Settings(_Section):
    """Everything that `posttrain run` reads."""

    stages: list[StageName] = list(STAGES)
    run: RunSettings
    policy: PolicySettings
    tasks: TaskSettings
    system_instructions: list[InstructionSettings] = []
    screen: ScreenSettings = ScreenSettings()
    sft: SFTSettings = SFTSettings()
    rl: RLSettings = RLSettings()
    dpo: DPOSettings = DPOSettings()
    teacher: TeacherSettings = TeacherSettings()
    rewards: RewardSettings = RewardSettings()
    resources: ResourceSettings = ResourceSettings()
    eval: EvalSettings = EvalSettings()
    log: LogSettings = LogSettings()

    @field_validator("system_instructions")
    @classmethod
    def _instructions_can_be_drawn(
        cls, entries: list[InstructionSettings]
    ) -> list[InstructionSettings]:
        names = [entry.name for entry in entries]
        if len(set(names)) < len(names):
            raise ValueError(f"each name may stand once, got {names}")
        if entries and not any(entry.weight for entry in entries):
            raise ValueError("every weight is 0, so that none could be drawn; raise one")
        return entries

    @model_validator(mode="after")
    def _stages_make_sense(self) -> Self:
        check_stages(self.stages, self.own_models)
        if "sft" in self.stages and self.sft.data is None:
            raise ValueError("sft.data: the stage sft has no input; name a source of rows")
        return self

    @model_validator(mode="after")
    def _answers_fit(self) -> Self:
        for key, limit in self._answer_limits().items():
            if limit >= self.policy.max_length:
                raise ValueError(
                    f"{key} = {limit} leaves no room for a prompt in policy.max_length = "
                    f"{self.policy.max_length}"
                )
        return self

    @model_validator(mode="after")
    def _an_adapter_leaves_experts_alone(self) -> Self:
        if self.policy.lora is not None and self.rl.learner.expert_parallel > 1:
            raise ValueError(
                f"rl.learner.expert_parallel = {self.rl.learner.expert_parallel} divides experts "
                "that policy.lora does not train; leave it at 1, and take rl.learner.zero_stage = "
                "3 if they are large"
            )
        return self

    @model_validator(mode="after")
    def _replies_of_the_judge_fit(self) -> Self:
        judge, room = self.rewards.judge, self.resources.rewards.judge.engine.max_model_len
        if judge is not None and judge.model is not None and judge.max_tokens >= room:
            raise ValueError(
                f"rewards.judge.max_tokens = {judge.max_tokens} leaves no room for a question in "
                f"resources.rewards.judge.engine.max_model_len = {room}"
            )
        return self

    @model_validator(mode="after")
    def _a_slow_draw_fails_no_engine(self) -> Self:
        draw, engine = self.rl.draw_deadline_s, self.resources.rollout.engine.deadline_s
        if "rl" in self.stages and engine <= draw:
            raise ValueError(
                f"rl.draw_deadline_s = {draw:g} is never reached: after "
                f"resources.rollout.engine.deadline_s = {engine:g} the engine has failed, and the "
                "run with it; raise the engine's above it, or lower rl.draw_deadline_s"
            )
        return self

    @model_validator(mode="after")
    def _rescreening_has_a_curriculum(self) -> Self:
        if self.rl.rescreen is not None and self.rl.curriculum.kind == "uniform":
            raise ValueError(
                "rl.rescreen: a uniform curriculum draws every prompt whatever is judged; leave it "
                "out, or take rl.curriculum.kind = difficulty"
            )
        return self

    @model_validator(mode="after")
    def _a_teacher_has_who_learns_from_it(self) -> Self:
        sections = {"sft": self.sft.distillation, "rl": self.rl.distillation}
        check_learning(self.teacher, sections, self.taught_stages)
        return self

    @property
    def taught_stages(self) -> list[str]:
        """Stages of this run in which a teacher is asked."""
        sections = {"sft": self.sft.distillation, "rl": self.rl.distillation}
        return [stage for stage in self.stages if needs_teacher(sections.get(stage))]

    @property
    def own_models(self) -> dict[str, str]:
        """Stages of this run that start from a checkpoint of their own, and which."""
        named = {stage: getattr(self, stage).model for stage in self.stages}
        return {stage: model for stage, model in named.items() if model is not None}

    @property
    def max_answer_tokens(self) -> int:
        """The longest answer that any stage of this run asks for."""
        return max(self._answer_limits().values())

    def _answer_limits(self) -> dict[str, int]:
        limits = {"eval.max_tokens": self.eval.max_tokens}
        if "screen" in self.stages:
            limits["screen.judge.max_tokens"] = self.screen.judge.max_tokens
        if "rl" in self.stages:
            limits["rl.max_tokens"] = self.rl.max_tokens
            if self.rl.evaluation is not None:
                limits["rl.evaluation.max_tokens"] = self.rl.evaluation.max_tokens
        if "dpo" in self.stages and self.dpo.mining is not None:
            limits["dpo.mining.max_tokens"] = self.dpo.mining.max_tokens
        return limits


class _Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it, but `1e-4` is a number as everywhere else, not a text, and a key
    that stands twice in a mapping is an error: the second would take the place of the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in first:
                raise yaml.composer.ComposerError(
                    f"{key.value} stands twice, first",
                    first[key.value].start_mark,
                    "and again",
                    key.start_mark,
                )
            first[key.value] = key
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load(path: Path, overrides: Sequence[str] = ()) -> Settings:
    """Reads a YAML file; each override is `key.sub=value` with a YAML value.

    Raises:
        SettingsError: no such file, no YAML, an unknown key (names the nearest known one), a value
            of the wrong type (names the key and what was expected).
    """
    return compose(Settings, read_yaml(path), overrides, str(path))


def load_rewards(path: Path) -> RewardSettings:
    """The section `rewards` of a file of settings; the others are not looked at. Raises as `load`
    does."""
    section = read_yaml(path).get("rewards", {})
    return compose(RewardSettings, section, (), f"{path}: rewards")


def read_yaml(path: Path) -> dict[str, Any]:
    """Raises SettingsError for what is no file with a mapping in YAML."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: a mapping of settings was expected at the top")
    return content


def compose(
    model: type[Composed], content: dict[str, Any], overrides: Sequence[str], source: str
) -> Composed:
    """`content`, from `source`, with the overrides in it; raises SettingsError as `load` does."""
    for override in overrides:
        _apply_override(content, override)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        named = " ".join([source, *(["with", *overrides] if overrides else [])])
        raise SettingsError(explain(error, named, model)) from error


def resolved(settings: Settings) -> dict[str, Any]:
    """What a run records: every setting, defaults included, as plain YAML values."""
    return settings.model_dump(mode="json")


def read_value(text: str, given: str) -> Any:
    """What a value on the command line says, where it was `given`. SettingsError: no YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SettingsError(f"{given!r}: the value is no YAML: {error}") from error


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise SettingsError(f"{override!r} is no override; write key.sub=value")
    value = read_value(text, override)
    *parents, last = key.split(".")
    target = content
    for depth, part in enumerate(parents, start=1):
        below = target.get(part, {})
        if not isinstance(below, dict):
            section = ".".join(parents[:depth])
            raise SettingsError(
                f"{override!r}: {section} has no settings below it, it is {below!r}; "
                f"override it as a whole: {section}=…"
            )
        # A section that YAML's aliases share with another one is changed in this place alone.
        target[part] = target = dict(below)
    target[last] = value
