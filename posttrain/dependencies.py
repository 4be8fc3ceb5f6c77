"""What each stage of a run rests on. A stage is done again when that has changed, and only then.

A table maps dotted settings, fingerprints of data and policies, and what was done before to their
values. What only says how the work is spread or watched (devices, concurrency, logs, checkpoints,
deadlines but those of verifiers) is in no table.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from posttrain.stage_order import STAGES, START

Table = dict[str, Any]

SOURCE_OF = "source of "

REWARDS_ELSEWHERE = (
    *("rewards.judge.model", "rewards.reward_model.model"),
    *("rewards.judge.concurrency", "rewards.judge.deadline_s", "rewards.judge.retries"),
    *("rewards.judge.endpoint.url", "rewards.judge.endpoint.api_key_env"),
    *("rewards.reward_model.deadline_s", "rewards.reward_model.batch_size"),
    "rewards.reward_model.device",
)
"""Those of rewards. Deadlines of verifiers count, since an answer that runs into one is wrong; one
that a judge does not get to is unscored."""

ELSEWHERE = (
    *(
        "stages",
        "run.dir",
        "run.work_dir",
        "run.copy_deadline_s",
        "log.",
        "eval.",
        "tasks.",
        "policy.model",
        "resources.",
    ),
    "policy.merge_adapter",
    *(f"{stage}.model" for stage in STAGES),
    *("sft.data.", "dpo.data.", "sft.threads", "dpo.threads"),
    *("screen.judge.concurrency", "dpo.mining.concurrency"),
    *("rl.checkpoint_every", "rl.keep_checkpoints", "rl.export_every", "rl.evaluation"),
    *("teacher.model", "teacher.store", "rl.distillation.deadline_s"),
    *REWARDS_ELSEWHERE,
    *("rl.rescreen.concurrency", "rl.rescreen.share"),
    *("rl.draw_deadline_s", "rl.starvation_draws", "rl.publish."),
    *("rl.learner.step_deadline_s", "rl.learner.threads"),
)
"""Prefixes of settings that no stage's result rests on, or that count by their content."""

ENGINE_DTYPE = "resources.rollout.engine.dtype"
JUDGE_DTYPE = "resources.rewards.judge.engine.dtype"
CRITIC_DTYPE = "resources.judge.engine.dtype"
TEACHER_DTYPE = "resources.teacher.dtype"
SCORING = ("screen", "rl", "dpo")
DATA = {"screen": ("train", "sft"), "sft": ("sft",), "rl": ("train",), "dpo": ("train", "pairs")}


def stage_tables(
    settings: Mapping[str, Any],
    data: Mapping[str, str],
    models: Mapping[str, str],
    rewards: Mapping[str, str],
) -> dict[str, Table]:
    """What each stage of `settings` (resolved, see `posttrain.config`) rests on, by name and in
    order, `start` first.

    Args:
        data: fingerprints of `train`, `held_out`, `sft` and `pairs`.
        models: fingerprints of `policy` and of the stages' own checkpoints, where they have one.
        rewards: fingerprints of what rewards are made of beside their settings: `source of NAME`
            for functions of one's own, models by their settings.
    """
    flat = flatten(settings)
    policy: Table = {"policy.model": models["policy"]}
    tables = {START: policy}
    screening: Table = {}
    for name in settings["stages"]:
        own = {f"{name}.model": models[name]} if name in models else policy
        tables[name] = {
            **_settings_of(name, flat),
            **{f"data.{part}": data[part] for part in DATA[name]},
            **own,
            **(rewards if name in SCORING else {}),
            **(screening if name in ("sft", "rl") else {}),
            **({"teacher.model": models.get("teacher")} if _is_taught(name, flat) else {}),
        }
        if name == "screen":
            screening = {"after screen": digest(tables[name])}
        else:
            policy = {f"after {name}": digest(tables[name])}
    return tables


def evaluation_table(
    settings: Mapping[str, Any],
    data: Mapping[str, str],
    rewards: Mapping[str, str],
    stage: str,
    table: Table,
) -> Table:
    """What the held-out evaluation after `stage`, which rests on `table`, rests on."""
    flat = flatten(settings)
    elsewhere = ("eval.concurrency", *REWARDS_ELSEWHERE)
    kept = ("eval.", "rewards.", "system_instructions", "policy.max_length", "run.seed")
    return {
        **{
            key: value
            for key, value in flat.items()
            if key.startswith(kept) and not key.startswith(elsewhere)
        },
        **rewards,
        **{name: flat[name] for name in _scoring_dtypes(flat)},
        "data.held_out": data["held_out"],
        f"after {stage}": digest(table),
    }


def goes_on(stage: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether what `stage` did under `before` is a beginning of what `now` asks for: RL that is
    to take more steps, at a learning rate that does not depend on how many."""
    if stage != "rl" or changed_keys(before, now) != ["rl.num_steps"]:
        return False
    longer: bool = now["rl.num_steps"] > before["rl.num_steps"]
    return longer and now["rl.learner.schedule"] == "constant"


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    absent = object()
    keys = sorted(before.keys() | now.keys())
    return [key for key in keys if before.get(key, absent) != now.get(key, absent)]


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`rl.group_size: 8 → 16; the stage sft before it`."""
    said = []
    for key in changed_keys(before, now):
        if key.startswith("after "):
            said.append(f"the stage {key.removeprefix('after ')} before it")
        elif key.startswith(SOURCE_OF):
            said.append(f"the source of the reward {key.removeprefix(SOURCE_OF)}")
        elif key.startswith("data."):
            said.append(f"the content of {_SOURCES[key]}")
        elif key.endswith(".model"):
            said.append(f"the checkpoint {key}")
        else:
            said.append(f"{key}: {_shown(before, key)} → {_shown(now, key)}")
    return "; ".join(said)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Table:
    """Nested tables as one, its keys dotted."""
    flat: Table = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def digest(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]


def _settings_of(stage: str, flat: Table) -> Table:
    """Everything but what belongs elsewhere: a section that is new counts until it is named."""
    elsewhere = (*ELSEWHERE, *(f"{other}." for other in STAGES if other != stage))
    if stage not in SCORING:
        elsewhere = (*elsewhere, "rewards.")
    if not _is_taught(stage, flat):
        elsewhere = (*elsewhere, "teacher.")
    table = {key: value for key, value in flat.items() if not key.startswith(elsewhere)}
    dtypes = [TEACHER_DTYPE] if _is_taught(stage, flat) else []
    if stage in SCORING:
        dtypes += _scoring_dtypes(flat)
    if stage == "rl" and flat.get("rl.rescreen.placement") == "dedicated":
        dtypes.append(CRITIC_DTYPE)
    return table | {name: flat[name] for name in dtypes}


def _scoring_dtypes(flat: Table) -> list[str]:
    """Of the engines that answers and their scores come from."""
    served = flat.get("rewards.judge.model") is not None
    return [ENGINE_DTYPE, *([JUDGE_DTYPE] if served else [])]


def _is_taught(stage: str, flat: Table) -> bool:
    """Whether the stage has a section `distillation`; without one its key stands for None."""
    return any(key.startswith(f"{stage}.distillation.") for key in flat)


_SOURCES = {
    "data.train": "tasks.train",
    "data.held_out": "tasks.held_out",
    "data.sft": "sft.data",
    "data.pairs": "dpo.data",
}


def _shown(table: Mapping[str, Any], key: str) -> str:
    return re.sub(r"\s+", " ", repr(table[key])) if key in table else "(absent)"
