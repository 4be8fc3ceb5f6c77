"""Adapters in PEFT's format: checked against their base, merged into it, stacked on it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.atomic import staged_directory
from posttrain.errors import ModelError
from posttrain.run_dir import MODEL_SUFFIXES, fingerprint_directory, hash_path
from posttrain.workers.settings import LoraSettings

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
"""Beside an adapter of ours: the fingerprint of the policy that it was trained on, and of the
adapters that it is made of."""


def is_adapter(path: Path) -> bool:
    return (path / CONFIG).is_file()


def base_of(adapter: Path) -> str:
    """The model that an adapter names as its base. Raises ModelError if it names none."""
    try:
        base = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise ModelError(f"{adapter / CONFIG} names no base model: {error!r}") from error
    if not isinstance(base, str) or not base:
        raise ModelError(f"{adapter / CONFIG} names no base model, but {base!r}")
    return base


def check_adapter(adapter: Path, base: Path) -> None:
    """Raises ModelError if the adapter was trained on another model than `base`, or its weights
    are damaged. Nothing is loaded: shapes are compared."""
    recorded = adapter / BASE
    if recorded.is_file():
        expected = json.loads(recorded.read_text())["fingerprint"]
        found = fingerprint_directory(base)
        if expected != found:
            raise ModelError(
                f"the adapter {adapter} was trained on another policy than {base} "
                f"(fingerprint {expected[:12]}, here {found[:12]}): restore its base"
            )
    shapes = _module_shapes(base)
    for name, (rows, columns) in _adapted_modules(adapter).items():
        if name not in shapes:
            raise ModelError(
                f"the adapter {adapter} adapts {name}, which {base} does not have: it is for "
                "another base"
            )
        if shapes[name] != (rows, columns):
            raise ModelError(
                f"the adapter {adapter} is for a base whose {name} has {rows} × {columns} weights; "
                f"in {base} it has {shapes[name][0]} × {shapes[name][1]}: it is for another base"
            )


def check_targets(base: Path, settings: LoraSettings) -> None:
    """Raises SettingsError if an adapter cannot be put where it should be; loads no weights."""
    from posttrain.workers.policy_model import add_adapter, empty_model

    add_adapter(empty_model(base), settings)


def merged_once(adapter: Path, base: Path) -> Path:
    """Base and adapter as one checkpoint, made at the first call and found again afterwards. It
    lies where models that were downloaded lie, too. Raises ModelError as `check_adapter`."""
    from huggingface_hub.constants import HF_HOME

    check_adapter(adapter, base)
    both = f"{fingerprint_directory(base)} {fingerprint_directory(adapter)}"
    target = Path(HF_HOME) / "posttrain" / hashlib.sha256(both.encode()).hexdigest()[:16]
    if not target.is_dir():
        own = (adapter / "tokenizer_config.json").is_file()
        with staged_directory(target) as staged:
            merge_adapter(base, adapter, staged, adapter if own else base)
    return target


def merge_adapter(base: Path, adapter: Path, target: Path, tokenizer: Path) -> None:
    """Writes base and adapter as one checkpoint with the tokenizer of `tokenizer`. Raises
    ModelError if they do not fit."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain.workers.policy_export import save_model

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", trust_remote_code=False)
    try:
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (ValueError, RuntimeError, OSError) as error:
        raise ModelError(f"the adapter {adapter} does not fit {base}: {error}") from error
    save_model(merged, target)
    AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).save_pretrained(target)


def stack_adapters(adapters: Sequence[Path], base: Path, named: str, target: Path) -> None:
    """Writes one adapter on `base` that changes it as all of them do, each trained on what the
    ones before it had made of it.

    Exact, not an approximation: ranks are put side by side, W + s₁B₁A₁ + s₂B₂A₂ =
    W + [s₁B₁ s₂B₂][A₁; A₂], so that the rank is the sum of theirs. All were trained with one
    table of settings and adapt the same modules. `named` is how the base is called in it. Nothing
    is done where `target` is that adapter already.
    """
    made_of = {
        "fingerprint": fingerprint_directory(base),
        "named": named,
        "stacked": [fingerprint_directory(path) for path in adapters],
    }
    if _is_made_of(target, made_of):
        return
    import torch
    from safetensors.torch import load_file, save_file

    configs = [json.loads((path / CONFIG).read_text(encoding="utf-8")) for path in adapters]
    parts = [load_file(path / WEIGHTS) for path in adapters]
    stacked: dict[str, Any] = {}
    for name in parts[0]:
        if ".lora_A." in name:
            stacked[name] = torch.cat([part[name] for part in parts], dim=0)
            continue
        scaled = [p[name] * (c["lora_alpha"] / c["r"]) for p, c in zip(parts, configs, strict=True)]
        stacked[name] = torch.cat(scaled, dim=1)
    rank = sum(config["r"] for config in configs)
    changes = {"r": rank, "lora_alpha": rank, "base_model_name_or_path": named}
    with staged_directory(target) as staged:
        save_file({n: t.contiguous() for n, t in stacked.items()}, staged / WEIGHTS)
        (staged / CONFIG).write_text(json.dumps(configs[0] | changes, indent=2) + "\n")
        weights = {"weights": hash_path(staged / WEIGHTS)}
        (staged / BASE).write_text(json.dumps(made_of | weights))
        _copy_tokenizer(base, staged)


def _is_made_of(stacked: Path, made_of: Mapping[str, Any]) -> bool:
    """Whether `stack_adapters` wrote it from that, and its weights are as they were."""
    if not (stacked / BASE).is_file() or not (stacked / WEIGHTS).is_file():
        return False
    recorded: dict[str, Any] = json.loads((stacked / BASE).read_text())
    return recorded == {**made_of, "weights": hash_path(stacked / WEIGHTS)}


def _copy_tokenizer(source: Path, target: Path) -> None:
    """All small files of a policy but those that describe its weights."""
    for file in source.iterdir():
        described = file.name == "config.json" or file.name.endswith(".index.json")
        if file.suffix in MODEL_SUFFIXES - {".safetensors"} and not described:
            shutil.copy(file, target / file.name)


def _adapted_modules(adapter: Path) -> dict[str, tuple[int, int]]:
    """Module -> (rows, columns) of the weight that the adapter is for."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(adapter / WEIGHTS, framework="np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{adapter / WEIGHTS} cannot be read: {error}") from error
    columns = {n.partition(".lora_A.")[0]: s[-1] for n, s in shapes.items() if ".lora_A." in n}
    rows = {n.partition(".lora_B.")[0]: s[0] for n, s in shapes.items() if ".lora_B." in n}
    return {
        name.removeprefix("base_model.model."): (rows[name], columns[name])
        for name in columns
        if name in rows
    }


def _module_shapes(base: Path) -> Mapping[str, tuple[int, int]]:
    """Linear layer -> shape of its weight."""
    from torch import nn

    from posttrain.workers.policy_model import empty_model

    modules = empty_model(base).named_modules()
    return {
        name: (module.out_features, module.in_features)
        for name, module in modules
        if isinstance(module, nn.Linear)
    }
