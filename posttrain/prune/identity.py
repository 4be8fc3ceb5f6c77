"""What answers were judged with: answers of one identity are never mixed with those of another."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import rewards
from judges import grade, ifd
from posttrain.dependencies import REWARDS_ELSEWHERE
from posttrain.errors import RunDirError
from posttrain.prune.critic import CriticModel
from posttrain.prune.settings import PruneSettings
from posttrain.prune.store import Store
from posttrain.run_dir import fingerprint_directory
from posttrain.workers.settings import EngineSettings
from rewards import custom
from rewards.shaping import RewardSettings

_LIBRARIES = ("math-verify", "reasoning-gym")
"""Verifiers are made of these; another version may score otherwise."""

_NAMED_ONLY = "critic.model"
"""What a critic was called does not count: its fingerprint does."""


def identity(settings: PruneSettings, model: CriticModel) -> dict[str, Any]:
    """Plain values. Confidence, cap and cut are not in it: they only say how many answers of this
    kind are wanted."""
    resources = settings.resources
    judged_with: dict[str, Any] = {
        "method": settings.method,
        "critic": {"model": model.name, "fingerprint": model.fingerprint},
        "template": model.chat.template_hash,
        "system": settings.critic.system,
        "engine": _arithmetic(resources.rollout.engine),
    }
    if settings.method == "critic":
        judge = settings.judge
        judged_with["sampling"] = {
            "temperature": judge.temperature,
            "max_tokens": judge.max_tokens,
            "seed": judge.seed,
        }
        judged_with["verifier"] = {
            "settings": _reward_settings(settings.rewards),
            "version": verifier_version(),
        }
        if named := settings.rewards.models:  # directories here
            models = {part: fingerprint_directory(Path(model)) for part, model in named.items()}
            judged_with["verifier"]["models"] = models
        if "judge" in named:
            judged_with["verifier"]["judge_engine"] = _arithmetic(resources.rewards.judge.engine)
        if own := settings.rewards.custom:
            hashes = {name: custom.source_hash(name, path) for name, path in own.items()}
            judged_with["verifier"]["custom"] = hashes
    else:
        judged_with["scored_by"] = scoring_version(settings.method)
    return judged_with


def _arithmetic(engine: EngineSettings) -> dict[str, Any]:
    """What the same weights may answer otherwise with."""
    return {"dtype": engine.dtype, "extra": engine.extra}


def _reward_settings(given: RewardSettings) -> dict[str, Any]:
    """Without how the work is spread, and what models are called."""
    flat = _flat(given.model_dump(mode="json"), "rewards.")
    return {
        key.removeprefix("rewards."): value
        for key, value in flat.items()
        if not key.startswith(REWARDS_ELSEWHERE)
    }


def verifier_version() -> str:
    """Of all verifiers: a hash of their source, and the libraries that they are made of."""
    digest = hashlib.sha256()
    for file in sorted(Path(rewards.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    versions = [f"{name} {metadata.version(name)}" for name in _LIBRARIES]
    return ", ".join([digest.hexdigest()[:16], *versions])


def scoring_version(method: Literal["grade", "ifd"]) -> str:
    """Of a judge that looks once, its rubric included: a hash of its source."""
    source = inspect.getsource({"grade": grade, "ifd": ifd}[method])
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def claim(store: Store, judged_with: Mapping[str, Any]) -> None:
    """The store is of this identity from now on. RunDirError if it is of another."""
    before = store.meta("judged_with")
    if before is None:
        store.set_meta("judged_with", judged_with)
        return
    old, new = _flat(before), _flat(judged_with)
    changes = [
        f"{key}: {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and key != _NAMED_ONLY
    ]
    if changes:
        raise RunDirError(
            f"{store.path.parent} was judged with something else ({'; '.join(changes)}), and such"
            " answers are not mixed: take it back, give another --out, or --fresh to delete what is"
            " there and start anew"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
