"""Checkpoints of the RL stage: the order of commits, what a kill leaves, what is kept."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from posttrain.atomic import recover
from posttrain.errors import RunDirError
from posttrain.stages.rl_checkpoint import LoopState, RLCheckpoints, read_state
from posttrain.workers.checkpoints import MANIFEST, Layout, Manifest, check_ranks
from posttrain.workers.settings import LearnerSettings


def state(step: int) -> LoopState:
    return LoopState(
        step=step,
        num_draws=step * 10,
        plans=[["sums"] * step, ["words"]],
        learned=["d1-0000003"],
        curriculum={"a": np.arange(step, dtype=np.float32)},
    )


def save(
    checkpoints: RLCheckpoints,
    step: int,
    *,
    learner_fails: bool = False,
    commit_fails: bool = False,
) -> list[str]:
    """What happened, in order."""
    events = []

    async def save_learner(directory: Path) -> None:
        directory.mkdir()
        (directory / "weights").write_text(str(step))
        events.append("weights")
        if learner_fails:
            raise OSError("the disk is full")

    def commit() -> None:
        latest = checkpoints.latest()
        events.append(f"mark while {latest.name if latest else None} is the latest")
        if commit_fails:
            raise OSError("the disk is full")

    asyncio.run(checkpoints.save(state(step), save_learner=save_learner, commit=commit))
    return events


def kept(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("checkpoint-*"))


def test_weights_and_state_then_the_mark_then_the_pointer(tmp_path: Path) -> None:
    checkpoints = RLCheckpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    assert save(checkpoints, 5) == ["weights", "mark while None is the latest"]
    assert save(checkpoints, 10) == ["weights", "mark while checkpoint-5 is the latest"]
    latest = checkpoints.latest()
    assert latest == tmp_path / "checkpoint-10"
    assert (latest / "learner" / "weights").read_text() == "10"
    loaded = read_state(latest)
    assert (loaded.step, loaded.num_draws) == (10, 100)
    assert loaded.plans == [["sums"] * 10, ["words"]]
    assert loaded.learned == ["d1-0000003"]
    assert loaded.curriculum["a"].tolist() == list(range(10))


def test_the_newest_are_kept_and_those_of_a_lineage_given_up_are_not(tmp_path: Path) -> None:
    checkpoints = RLCheckpoints(tmp_path, keep=2)
    for step in (5, 10, 15, 20):
        save(checkpoints, step)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-15",
        "checkpoint-20",
    ]
    # As after resuming from 15, had 20 been written and not named.
    save(checkpoints, 16)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-15",
        "checkpoint-16",
    ]


@pytest.mark.parametrize("failure", ["learner_fails", "commit_fails"])
def test_a_checkpoint_that_was_not_finished_is_none(tmp_path: Path, failure: str) -> None:
    checkpoints = RLCheckpoints(tmp_path, keep=2)
    save(checkpoints, 5)
    with pytest.raises(OSError, match="full"):
        save(checkpoints, 10, **{failure: True})
    recover(tmp_path)
    assert checkpoints.latest() == tmp_path / "checkpoint-5"
    save(checkpoints, 10)
    assert checkpoints.latest() == tmp_path / "checkpoint-10"


def test_a_checkpoint_of_other_ranks_is_refused_before_engines_start(tmp_path: Path) -> None:
    learner = tmp_path / "rl" / "checkpoint-5" / "learner"
    learner.mkdir(parents=True)
    layout = Layout.of(LearnerSettings(), None, fingerprint="f", ranks=2)
    manifest = Manifest(version="1.5", layout=layout, files={})
    (learner / MANIFEST).write_text(manifest.model_dump_json())
    check_ranks(learner, 2)
    with pytest.raises(
        RunDirError, match=rf"learner.ranks = 2, now .* 3: .* delete {tmp_path}/rl "
    ):
        check_ranks(learner, 3)


def test_a_checkpoint_that_is_named_and_cut_short_is_refused(tmp_path: Path) -> None:
    checkpoints = RLCheckpoints(tmp_path, keep=2)
    save(checkpoints, 5)
    (tmp_path / "checkpoint-5" / "loop.json").unlink()
    with pytest.raises(RunDirError, match=r"names checkpoint-5, which is missing or cut short"):
        checkpoints.latest()
