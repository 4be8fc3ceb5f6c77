"""What follows a step of RL, with stand-ins for the learner and all around it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from posttrain.config import RLSettings
from posttrain.online.metrics import StepRecord
from posttrain.stages.rl_after_step import AfterStep
from posttrain.types import PolicyVersion


class Killed(BaseException):
    """Nothing catches it."""


class Learner:
    """Notes what it saved, and when it is told to, is killed instead."""

    def __init__(self) -> None:
        self.saved: list[str] = []
        self.killed_at: str | None = None

    async def save_checkpoint(self, directory: Path, version: PolicyVersion) -> None:
        self._save(directory, f"checkpoint {version.step}")

    async def save_policy(self, directory: Path, tokenizer_path: str) -> None:
        assert tokenizer_path == "the policy"
        self._save(directory, directory.name)

    def _save(self, directory: Path, what: str) -> None:
        if what == self.killed_at:
            raise Killed
        directory.mkdir()
        self.saved.append(what)


class Beside:
    def __init__(self) -> None:
        self.made_up: list[int] = []

    async def reached(self, version: PolicyVersion) -> None: ...

    def make_up(self, step: int) -> None:
        self.made_up.append(step)


@pytest.fixture
def learner() -> Learner:
    return Learner()


def after_step(directory: Path, learner: Learner, first_step: int = 0, **settings: Any) -> Any:
    async def keep() -> None: ...

    context: Any = SimpleNamespace(
        settings=SimpleNamespace(
            rl=RLSettings(num_steps=100, checkpoint_every=10, keep_checkpoints=1, **settings)
        ),
        run=SimpleNamespace(stage_dir=lambda _: directory, rollouts_dir=directory / "rollouts"),
        metrics=SimpleNamespace(append=lambda _: None),
        ledger=SimpleNamespace(commit_step=lambda _: None),
        keep=keep,
    )
    state = {"a": np.zeros(1)}
    curriculum: Any = SimpleNamespace(state_dict=lambda: state, pool=dict, quotas=dict)
    beside: Any = Beside()
    return AfterStep(context, Path("the policy"), 1, first_step, curriculum, learner, {}, beside)


def record(step: int) -> StepRecord:
    version = PolicyVersion(1, step)
    return StepRecord(step=step, version=version, num_draws=0, plans=(), learned=(), metrics={})


async def test_checkpoints_and_exports_have_their_turns(tmp_path: Path, learner: Learner) -> None:
    after = after_step(tmp_path, learner, export_every=15)
    await after.make_up()
    for step in range(1, 31):
        await after(record(step))
    first, last = ["checkpoint 10", "export-15", "checkpoint 20"], ["checkpoint 30", "export-30"]
    assert learner.saved == first + last
    left = sorted(path.name for path in tmp_path.glob("*-*"))
    assert left == ["checkpoint-30", "export-15", "export-30"]


async def test_an_export_that_a_kill_left_out_is_made_up(tmp_path: Path, learner: Learner) -> None:
    """Both were due, and the checkpoint is what the stage goes on from."""
    learner.killed_at = "export-30"
    with pytest.raises(Killed):
        await after_step(tmp_path, learner, export_every=15)(record(30))
    learner.killed_at = None
    for _ in range(2):  # once
        after = after_step(tmp_path, learner, first_step=30, export_every=15)
        await after.make_up()
        assert after._beside.made_up == [30]
    assert learner.saved == ["checkpoint 30", "export-30"]
    assert (tmp_path / "export-30").is_dir()


async def test_whoever_has_to_start_again_is_told_where_that_is(
    tmp_path: Path, learner: Learner
) -> None:
    after = after_step(tmp_path, learner)
    assert "no checkpoint yet" in after.where_it_goes_on()
    for step in range(1, 16):
        await after(record(step))
    assert after.where_it_goes_on().endswith("last checkpoint, rl step 10.")


async def test_nothing_is_made_up_that_was_not_due(tmp_path: Path, learner: Learner) -> None:
    await after_step(tmp_path, learner, first_step=20, export_every=15).make_up()
    await after_step(tmp_path, learner, first_step=30).make_up()
    await after_step(tmp_path, learner, export_every=15).make_up()
    assert learner.saved == []
