"""What the README tells a new user to do with data and rewards of their own, done as it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.audit import audit
from posttrain.run_dir import RunDir

ROOT = Path(__file__).parents[1]


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """An empty directory with the files of the section in it, and the tasks made."""
    section = (
        (ROOT / "README.md").read_text().partition("## Bring your own")[2].partition("\n## ")[0]
    )
    for name, content in re.findall(r"```\w+\n# (\S+)\n(.*?)```", section, flags=re.DOTALL):
        (tmp_path / name).write_text(content)
    assert {path.name for path in tmp_path.iterdir()} == {
        "make_tasks.py",
        "my_rewards.py",
        "my.yaml",
    }
    subprocess.run([sys.executable, "make_tasks.py"], cwd=tmp_path, check=True)
    return tmp_path


def posttrain(desk: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "posttrain.cli", *arguments],
        cwd=desk,
        env={**os.environ, "PYTHONPATH": f"{desk}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_the_example_passes_its_dry_run(desk: Path) -> None:
    done = posttrain(desk, "run", "my.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert re.search(r"train prompts +150\n", done.stdout)
    assert re.search(r"does not fit +none\n", done.stdout)


@pytest.mark.slow
def test_the_example_runs(desk: Path) -> None:
    done = posttrain(desk, "run", "my.yaml")
    assert done.returncode == 0, done.stderr
    run = RunDir(desk / "runs" / "mine")
    before, after = (
        run.stages()[stage].metrics["evaluation"]["all"]["pass@1"]["mean"]
        for stage in ("start", "rl")
    )
    assert after > before
    assert audit(run.ledger_path).ok
    assert posttrain(desk, "audit", "runs/mine").returncode == 0
