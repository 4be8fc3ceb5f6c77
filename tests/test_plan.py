"""`posttrain plan`: the memory of each role, what to do where it does not fit, another split."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.cli import main
from posttrain.config import load, resolved
from posttrain.inputs import STARTER_POLICY
from posttrain.model_shape import read_shape
from posttrain.plan import examine
from posttrain.run_dir import RunDir

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: str) -> tuple[int, str, str]:
        command = ["posttrain", "plan", str(QUICKSTART), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


ON_GPUS = (
    *("resources.rollout.actor.gpus=1", "resources.rollout.replicas=4", "resources.gpu_gib=80"),
    *("resources.learner.gpus=1", "resources.learner.ranks=4"),
)


def test_roles_and_their_memory_are_told(plan: Call) -> None:
    code, out, err = plan(*ON_GPUS)
    assert (code, err) == (0, "")
    assert "starter: 0.00 billion parameters" in out
    assert "at the same time: 8 GPUs (80 GiB each) and 6 CPUs" in out
    assert "rollout 4 × (1 CPUs, 1 GPUs)" in out
    assert "nothing is known not to fit" in out
    found = json.loads(plan(*ON_GPUS, "--json")[1])
    assert [role["role"] for role in found["roles"]] == ["rollout", "sft", "rl", "dpo"]
    assert all(role["fits"] for role in found["roles"])
    assert found["problems"] == []
    for role in found["roles"]:
        assert role["needed"] == pytest.approx(sum(role["parts"].values()))
        assert f"{role['needed']:.1f} of {role['available']:.1f}" in out


@pytest.mark.parametrize(
    ("told", "size"),
    [("81920\n40960\n", 40.0), ("[N/A]\n", None), ("[Not Supported]\n49152\n", 48.0)],
)
def test_the_size_of_a_gpu_is_asked_for_and_may_be_unknown(
    told: str, size: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\nprintf '%s' '{told}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    shape = read_shape(str(STARTER_POLICY))
    assert examine(load(QUICKSTART), shape)["gpu_gib"] == size


def test_what_does_not_fit_comes_with_what_to_change(plan: Call) -> None:
    _, out, _ = plan(
        *ON_GPUS, "resources.gpu_gib=2", "sft.trainer.per_device_train_batch_size=4096"
    )
    (told,) = [line for line in out.splitlines() if line.startswith("does not fit: sft needs")]
    assert "of 2.0 on each device, most of it activations: gradient checkpointing" in told


def test_without_gpus_all_roles_share_this_machines_memory(plan: Call) -> None:
    _, out, _ = plan("resources.rollout.engine.kv_cache_gib=100000")
    assert "does not fit: the roles without GPUs need 100000" in out


@pytest.mark.parametrize(
    ("stages", "together"),
    [
        ("rl", ("rollout", "rewards.judge", "judge", "teacher", "rl")),
        ("sft, rl", ("rollout", "rewards.judge", "judge", "teacher", "rl")),
        ("sft, dpo", ("rollout", "rewards.judge", "dpo")),
    ],
)
def test_what_is_up_together_counts_together(
    stages: str, together: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = replace(read_shape(str(STARTER_POLICY)), parameters=2**30)
    monkeypatch.setattr("posttrain.plan.read_shape", lambda *_: shape)
    monkeypatch.setattr("posttrain.plan._memory_here", lambda: 0.0)
    asked = load(
        QUICKSTART,
        [
            *(f"stages=[{stages}]", "rl.rescreen={placement: dedicated}"),
            *("teacher.model=starter-teacher", "rl.distillation={}"),
            "rewards.judge={model: starter}",
        ],
    )
    report = examine(asked, shape)
    gib = {role["role"]: role["needed"] * role["actors"] for role in report["roles"]}
    needed = sum(gib[role] for role in together)
    assert f"the roles without GPUs need {needed:.1f} GiB" in report["problems"][0]


def run_with(path: Path, *, learner_idle: float, engines_idle: float, steps: int = 10) -> Path:
    """A run of the eight GPUs above that measured these shares, 10 s a step."""
    settings = resolved(load(QUICKSTART, ON_GPUS))
    RunDir.create_or_open(path, settings, fresh=False).close()
    record = {
        "stage": "rl",
        "step_s": 10.0,
        "publish_s": 0.0,
        "learner_busy_share": 1 - learner_idle,
        "learner_idle_share": learner_idle,
        "rollout_idle_share": engines_idle,
    }
    lines = [json.dumps(record | {"step": step}) for step in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_a_run_whose_learner_waits_gets_more_engines(plan: Call, tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", learner_idle=0.75, engines_idle=0.0)
    code, out, _ = plan(*ON_GPUS, "--from", str(run))
    assert code == 0
    assert "measured: 10.0 s a step; learner idle 75%, engines idle 0%" in out
    # 10 s of 4 engines are 6.7 s of 6; 2.5 s of 4 ranks are 5 s of 2.
    assert (
        "proposed: resources.rollout.replicas=6 resources.learner.ranks=2 (now 4 and 4): "
        "1.50 × as many steps" in out
    )
    split: dict[str, Any] = json.loads(plan(*ON_GPUS, "--from", str(run), "--json")[1])["split"]
    assert split["proposed"] == {"replicas": 6, "ranks": 2}
    assert split["expected_step_s"] == pytest.approx(10 * 4 / 6)


def test_a_run_whose_engines_wait_gets_more_ranks(plan: Call, tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", learner_idle=0.0, engines_idle=0.75)
    assert "replicas=2 resources.learner.ranks=6" in plan(*ON_GPUS, "--from", str(run))[1]


def test_a_balanced_run_is_left_as_it_is(plan: Call, tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", learner_idle=0.02, engines_idle=0.02)
    assert (
        "no other split of these devices would be faster" in plan(*ON_GPUS, "--from", str(run))[1]
    )
    assert "try rl.max_lag=1" in plan(*ON_GPUS, "rl.max_lag=0", "--from", str(run))[1]


def test_what_is_no_run_or_has_measured_nothing_is_refused(plan: Call, tmp_path: Path) -> None:
    for run, said in (
        (tmp_path, "holds no config.yaml"),
        (run_with(tmp_path / "short", learner_idle=0, engines_idle=0, steps=3), "3 steps of RL"),
    ):
        code, out, err = plan(*ON_GPUS, "--from", str(run))
        assert (code, out) == (2, "")
        assert said in err


def test_a_model_that_is_not_there_is_named(plan: Call, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(yaml.safe_dump({}))
    code, _, err = plan(f"policy.model={tmp_path}")
    assert code == 2
    assert f"policy.model: the size of {tmp_path} cannot be read" in err
