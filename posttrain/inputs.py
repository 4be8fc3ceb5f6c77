"""What a run reads, loaded and checked before anything is started."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from curricula.mixture import check_quotas
from posttrain.config import Settings
from posttrain.data.chat import ChatFormat
from posttrain.data.instructions import InstructionMix
from posttrain.data.overlap import shared_texts
from posttrain.data.pair_sets import load_pairs, pair_record
from posttrain.data.prompts import check_disjoint, each_once
from posttrain.data.sources import STARTER, load_prompts, load_sft_rows
from posttrain.dependencies import SOURCE_OF
from posttrain.errors import DataError, ModelError
from posttrain.metric_sinks import check_sinks
from posttrain.run_dir import RunDir, fingerprint_directory
from posttrain.teaching.identity import Teaching
from posttrain.teaching.settings import TeacherSettings
from posttrain.types import PreferencePair, Prompt, SFTRow
from posttrain.workers.adapters import base_of, check_targets, is_adapter, merged_once
from posttrain.workers.agreement import check_dtype, check_same_model, tokenizer_fingerprint
from rewards import custom
from rewards.shaping import RewardSettings
from rewards.verifiers import check_references

STARTER_POLICY = Path(__file__).parent / "starter" / "policy"
STARTER_TEACHER = "starter-teacher"
STARTER_TEACHER_DIR = Path(__file__).parent / "starter" / "teacher"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Policy and data of a run; `stage_models` holds what stages start from instead of the policy
    that the stage before them left, `teacher` is None where none is asked, `rewards` name their
    models by directory."""

    model: Path
    stage_models: Mapping[str, Path]
    chat: ChatFormat
    train: list[Prompt]
    held_out: list[Prompt]
    sft_rows: list[SFTRow]
    pairs: list[PreferencePair]
    teacher: Path | None
    rewards: RewardSettings

    @property
    def data(self) -> dict[str, str]:
        """Fingerprints of the content of `train`, `held_out`, `sft` and `pairs`."""
        return {
            "train": _digest([_content(p) for p in self.train]),
            "held_out": _digest([_content(p) for p in self.held_out]),
            "sft": _digest(
                [[r.row_id, _content(r.prompt), r.completion, r.system] for r in self.sft_rows]
            ),
            "pairs": _digest([pair_record(pair) for pair in self.pairs]),
        }

    @property
    def models(self) -> dict[str, str]:
        """Fingerprints of `policy` and of the stages' own checkpoints."""
        return {
            "policy": fingerprint_directory(self.model),
            **{stage: fingerprint_directory(path) for stage, path in self.stage_models.items()},
            **({} if self.teacher is None else {"teacher": fingerprint_directory(self.teacher)}),
        }

    @property
    def reward_content(self) -> dict[str, str]:
        """Fingerprints of what rewards are made of beside their settings, by what they are called
        in the tables of `posttrain.dependencies`. SettingsError for a function that cannot be
        loaded."""
        own = self.rewards.custom.items()
        models = self.rewards.models.items()
        return {
            **{f"{SOURCE_OF}{name}": custom.source_hash(name, path) for name, path in own},
            **{f"rewards.{n}.model": fingerprint_directory(Path(model)) for n, model in models},
        }

    def prompts_sharing_text(self) -> dict[str, int]:
        """By pair of the sets that stages train or are measured on (see `shared_texts`)."""
        sft = each_once(row.prompt for row in self.sft_rows)
        if self.pairs:
            dpo = each_once(pair.prompt for pair in self.pairs)
            trained = {"sft": sft, "rl": self.train, "dpo": dpo}
        else:  # DPO mines its pairs from the prompts of RL
            trained = {"sft": sft, "rl and dpo": self.train}
        return shared_texts(trained | {"held_out": self.held_out})


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _content(prompt: Prompt) -> list[Any]:
    return [prompt.prompt_id, prompt.reference, prompt.domain, dict(prompt.metadata)]


def load_inputs(settings: Settings) -> Inputs:
    """Reads policy and data and checks all that can be checked without a device.

    Raises:
        SettingsError: a package that `log` asks for is missing; an adapter cannot be put where
            `policy.lora` says.
        ModelError: no readable checkpoint, or a chat template that renders other than what was
            said.
        DataError: a source is missing, empty or malformed; a held-out prompt is also trained on;
            a prompt is too long; a reference does not suit its verifier.
    """
    check_sinks(settings.log)
    model = locate_model(settings.policy.model)
    check_context(model, settings.policy.max_length, "policy.max_length")
    if settings.policy.lora is not None:
        check_targets(model, settings.policy.lora)
    stage_models = {
        stage: _model_of_stage(stage, name, model) for stage, name in settings.own_models.items()
    }
    rewards = locate_reward_models(settings.rewards)
    if "judge" in rewards.models:
        ChatFormat(rewards.models["judge"], "rewards.judge.model")
    chat = ChatFormat(str(model))
    train = load_prompts(settings.tasks.train, "train")
    held_out = load_prompts(settings.tasks.held_out, "held_out")
    wants_rows = settings.sft.data is not None and "sft" in settings.stages
    sft_rows = load_sft_rows(settings.sft.data) if wants_rows and settings.sft.data else []
    sft_prompts = [row.prompt for row in sft_rows]
    wants_pairs = settings.dpo.data is not None and "dpo" in settings.stages
    pairs = load_pairs(settings.dpo.data) if wants_pairs and settings.dpo.data else []
    check_disjoint([*train, *sft_prompts, *(pair.prompt for pair in pairs)], held_out)
    _check_references("tasks.train", train, settings)
    _check_references("tasks.held_out", held_out, settings)
    if "screen" in settings.stages:  # nothing else scores answers to them
        _check_references("sft.data", sft_prompts, settings)
    mix = InstructionMix(settings.system_instructions, seed=0)
    for row in sft_rows:
        _check_instruction(f"sft.data, {row.row_id}", row.system, mix)
    for number, pair in enumerate(pairs, start=1):
        _check_instruction(f"dpo.data, pair {number}", pair.system, mix)
    if "rl" in settings.stages and settings.rl.curriculum.quotas is not None:
        check_quotas(settings.rl.curriculum.quotas, Counter(p.domain for p in train))
    room = settings.policy.max_length - settings.max_answer_tokens
    chat.check_lengths([*train, *held_out, *sft_prompts], mix.by_name.values(), room)
    chat.check_instructions(train[0], mix.by_name.values())
    chat.check_rows(sft_rows, mix, settings.policy.max_length)
    chat.check_pairs(pairs, mix, settings.policy.max_length)
    return Inputs(
        model=model,
        stage_models=stage_models,
        chat=chat,
        train=train,
        held_out=held_out,
        sft_rows=sft_rows,
        pairs=pairs,
        teacher=_teacher(settings, chat),
        rewards=rewards,
    )


def check_learner(settings: Settings, inputs: Inputs) -> None:
    """ModelError for what would show when RL starts, after the stages before it: an architecture
    that the learner does not compute, engines that refuse what it publishes."""
    from posttrain.workers.policy_model import check_architecture

    if "rl" not in settings.stages:
        return
    learner, resources = settings.rl.learner.dtype, settings.resources
    check_dtype(learner, resources.rollout.engine.dtype)
    if settings.rl.rescreen is not None and settings.rl.rescreen.placement == "dedicated":
        check_dtype(learner, resources.judge.engine.dtype, "resources.judge.engine.dtype")
    check_architecture(inputs.stage_models.get("rl", inputs.model))


def _teacher(settings: Settings, chat: ChatFormat) -> Path | None:
    """StoreError if the store was made with something else."""
    name = settings.teacher.model
    if name is None or not settings.taught_stages:
        return None
    teacher = locate_teacher(name, chat, settings.policy.model)
    dtype = settings.resources.teacher.dtype
    run = Path(settings.run.dir)
    teaching_of(teacher, teacher, chat, settings.teacher, dtype, run).check_store()
    return teacher


def teaching_of(
    teacher: Path, critic: Path, chat: ChatFormat, settings: TeacherSettings, dtype: str, run: Path
) -> Teaching:
    """`critic` is the frozen policy that labels are compared under. Unless `settings` name a store,
    it lies in the directory `run`, one for each kind of targets."""
    teaching = Teaching(
        teacher=str(teacher),
        teacher_fingerprint=fingerprint_directory(teacher),
        critic=str(critic),
        critic_fingerprint=fingerprint_directory(critic),
        tokenizer=tokenizer_fingerprint(chat.tokenizer),
        template=chat.template_hash,
        dtype=dtype,
        targets=settings.targets,
        store=Path(settings.store or "").absolute(),
    )
    if settings.store is not None:
        return teaching
    own = _digest([teaching.targets_identity])
    return replace(teaching, store=run.absolute() / "teacher" / own)


def locate_teacher(name: str, chat: ChatFormat, policy: str) -> Path:
    """`starter-teacher`, or as `locate_model`. ModelError if it is no checkpoint, or its tokenizer
    is not that of `policy`, which is `chat`'s: distributions over ids are compared."""
    try:
        path = locate_model(str(STARTER_TEACHER_DIR) if name == STARTER_TEACHER else name)
        own = ChatFormat(str(path)).tokenizer
    except ModelError as error:
        raise ModelError(f"teacher.model: {str(error).removeprefix('policy.model: ')}") from error
    ids, wanted = own.get_vocab(), chat.tokenizer.get_vocab()
    if ids != wanted:
        differing = sum(ids.get(token) != wanted.get(token) for token in {*ids, *wanted})
        raise ModelError(
            f"teacher.model = {name} and policy.model = {policy} have different tokenizers "
            f"({differing} tokens have other ids, or none): a teacher's distribution is over ids, "
            "so take one with the policy's tokenizer"
        )
    return path


def locate_reward_models(rewards: RewardSettings) -> RewardSettings:
    """The same with directories for the names of its models: whoever serves them may be elsewhere,
    and knows neither `starter` nor a run. Raises ModelError as `locate_model`."""
    found: dict[str, Any] = {}
    if rewards.judge is not None and rewards.judge.model is not None:
        judge = locate_model(rewards.judge.model, "rewards.judge.model")
        found["judge"] = rewards.judge.model_copy(update={"model": str(judge)})
    if rewards.reward_model is not None:
        name, setting = rewards.reward_model.model, "rewards.reward_model.model"
        path = Path(name) if Path(name).is_dir() else _download(name, setting)
        classifier = str(_readable(path, setting))
        found["reward_model"] = rewards.reward_model.model_copy(update={"model": classifier})
    return rewards.model_copy(update=found)


def _model_of_stage(stage: str, name: str, policy: Path) -> Path:
    """ModelError if it is no checkpoint, or none of the policy's architecture and tokenizer."""
    path = locate_model(name, f"{stage}.model")
    try:
        check_same_model(path, policy)
    except ModelError as error:
        raise ModelError(f"{stage}.model: {error}") from error
    return path


def locate_model(name: str, setting: str = "policy.model") -> Path:
    """The directory of a checkpoint: `starter`, a path (of a run: the policy that it left), a hub
    name (downloaded once), or an adapter in PEFT's format (merged into its base once). `setting`
    is the one that names it, for the errors.

    Raises:
        ModelError: there is no checkpoint that transformers can read, or an adapter for another
            base.
    """
    path = STARTER_POLICY if name == STARTER else Path(name)
    if RunDir(path).is_run():
        path = RunDir(path).policy_dir
        if not path.is_dir():
            raise ModelError(f"{setting}: the run {name} has left no policy yet; finish it first")
    if not path.is_dir():
        path = _download(name, setting)
    if is_adapter(path):
        return merged_once(path, locate_model(base_of(path), setting))
    return _readable(path, setting)


def _readable(path: Path, setting: str) -> Path:
    """Absolute. Raises ModelError for what transformers cannot read."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a damaged file raises whatever its parser stumbles over
        raise ModelError(f"{setting}: {path} is no readable checkpoint: {error}") from error
    _check_weights(path, setting)
    return path.resolve()


def check_context(path: Path, max_length: int, setting: str) -> None:
    """Raises ModelError if the checkpoint takes fewer tokens than `setting` says, where it says
    how many."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    takes = getattr(config, "max_position_embeddings", None)
    if takes is None:
        return
    scaling = getattr(config, "rope_parameters", None) or {}
    takes = int(takes * scaling.get("factor", 1))
    if takes < max_length:
        raise ModelError(f"{setting} is {max_length}, but {path} takes {takes} tokens: lower it")


def _check_weights(path: Path, setting: str) -> None:
    """Reads headers and sizes only, so that a download cut short is found in an instant."""
    from safetensors import SafetensorError, safe_open

    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{setting}: {path} holds no safetensors; write it anew with save_pretrained"
        )
    for file in files:
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{setting}: {file} is damaged: {error}") from error


def _check_references(key: str, prompts: Sequence[Prompt], settings: Settings) -> None:
    try:
        check_references(prompts, settings.rewards)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


def _check_instruction(place: str, name: str | None, mix: InstructionMix) -> None:
    try:
        mix.resolve(name)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def _download(name: str, setting: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "original/*"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{setting}: {name!r} is neither a directory nor a model that can be downloaded: "
            f"{error}"
        ) from error
