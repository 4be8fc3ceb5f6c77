"""What a run reads, loaded and checked before anything is started."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curricula.mixture import check_quotas
from posttrain.config import Settings
from posttrain.data.chat import ChatFormat
from posttrain.data.instructions import InstructionMix
from posttrain.data.prompts import check_disjoint
from posttrain.data.sources import STARTER, load_prompts, load_sft_rows
from posttrain.errors import DataError, ModelError
from posttrain.metric_sinks import check_sinks
from posttrain.types import Prompt, SFTRow
from rewards.verifiers import check_references

STARTER_POLICY = Path(__file__).parent / "starter" / "policy"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Policy and data of a run; `fingerprint` names their content."""

    model: Path
    chat: ChatFormat
    train: list[Prompt]
    held_out: list[Prompt]
    sft_rows: list[SFTRow]

    @property
    def fingerprint(self) -> str:
        content = json.dumps(
            [
                [_content(p) for p in self.train],
                [_content(p) for p in self.held_out],
                [[r.row_id, _content(r.prompt), r.completion, r.system] for r in self.sft_rows],
            ],
            sort_keys=True,
        )
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def _content(prompt: Prompt) -> list[Any]:
    return [prompt.prompt_id, prompt.reference, prompt.domain, dict(prompt.metadata)]


def load_inputs(settings: Settings) -> Inputs:
    """Reads policy and data and checks all that can be checked without a device.

    Raises:
        SettingsError: a package that `log` asks for is missing.
        ModelError: no readable checkpoint.
        DataError: a source is missing, empty or malformed; a held-out prompt is also trained on;
            a prompt is too long; a reference does not suit its verifier.
    """
    check_sinks(settings.log)
    model = locate_model(settings.policy.model)
    if settings.rewards.judge is not None and settings.rewards.judge.model is not None:
        judge = locate_model(settings.rewards.judge.model, "rewards.judge.model")
        ChatFormat(str(judge), "rewards.judge.model")
    chat = ChatFormat(str(model))
    train = load_prompts(settings.tasks.train, "train")
    held_out = load_prompts(settings.tasks.held_out, "held_out")
    wants_rows = settings.sft.data is not None and "sft" in settings.stages
    sft_rows = load_sft_rows(settings.sft.data) if wants_rows and settings.sft.data else []
    sft_prompts = [row.prompt for row in sft_rows]
    check_disjoint([*train, *sft_prompts], held_out)
    _check_references("tasks.train", train, settings)
    _check_references("tasks.held_out", held_out, settings)
    if "screen" in settings.stages:  # nothing else scores answers to them
        _check_references("sft.data", sft_prompts, settings)
    mix = InstructionMix(settings.system_instructions, seed=0)
    for row in sft_rows:
        _check_instruction(row, mix)
    if "rl" in settings.stages and settings.rl.curriculum.quotas is not None:
        check_quotas(settings.rl.curriculum.quotas, Counter(p.domain for p in train))
    room = settings.policy.max_length - settings.max_answer_tokens
    chat.check_lengths([*train, *held_out, *sft_prompts], mix.by_name.values(), room)
    chat.check_rows(sft_rows, mix, settings.policy.max_length)
    return Inputs(model=model, chat=chat, train=train, held_out=held_out, sft_rows=sft_rows)


def locate_model(name: str, setting: str = "policy.model") -> Path:
    """The directory of a checkpoint: `starter`, a path, or a hub name (downloaded once). `setting`
    is the one that names it, for the errors.

    Raises:
        ModelError: there is no checkpoint that transformers can read.
    """
    path = STARTER_POLICY if name == STARTER else Path(name)
    if not path.is_dir():
        path = _download(name, setting)
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a damaged file raises whatever its parser stumbles over
        raise ModelError(f"{setting}: {path} is no readable checkpoint: {error}") from error
    _check_weights(path, setting)
    return path.resolve()


def _check_weights(path: Path, setting: str) -> None:
    """Reads headers and sizes only, so that a download cut short is found in an instant."""
    from safetensors import SafetensorError, safe_open

    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{setting}: {path} holds no safetensors")
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


def _check_instruction(row: SFTRow, mix: InstructionMix) -> None:
    try:
        mix.resolve(row.system)
    except DataError as error:
        raise DataError(f"sft.data, {row.row_id}: {error}") from error


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
