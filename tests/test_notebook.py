"""The notebook runs from top to bottom, on the run that ships with it and on another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from inspect_runs import write_known_run
from nbclient import NotebookClient

from posttrain.audit import audit
from posttrain.inspect import charts, load_run

CURRICULA = Path(__file__).parents[1] / "curricula"
NOTEBOOK = CURRICULA / "difficulty.ipynb"
RECORDED = CURRICULA / "recorded_run"
LINE = 'RUN = "recorded_run"'


def executed(notebook: Any, directory: Path) -> Any:
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(directory)}})
    return client.execute()


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.filterwarnings("default")  # of the Jupyter packages, which are none of ours
def test_runs_from_top_to_bottom_on_the_recorded_run() -> None:
    pytest.importorskip("vl_convert")
    notebook = executed(nbformat.read(NOTEBOOK, as_version=4), CURRICULA)
    assert pictures(notebook) == len(charts.__all__) - 1  # no teacher took part
    text = "".join(o.get("text", "") for o in outputs(notebook))
    assert "trained with advantages" in text
    assert "user: " in text


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_another_run_takes_one_line(tmp_path: Path) -> None:
    write_known_run(tmp_path / "mine")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [cell for cell in notebook.cells if LINE in cell.source]
    cell.source = cell.source.replace(LINE, 'RUN = "mine"')
    done = executed(notebook, tmp_path)
    assert pictures(done) == len(charts.__all__) - 1
    assert "prompt s2, words" in "".join(o.get("text", "") for o in outputs(done))


def test_every_chart_of_the_recorded_run_has_something_to_show() -> None:
    run = load_run(RECORDED)
    specs = {name: getattr(charts, name)(run).to_dict() for name in charts.__all__}
    empty = [n for n, spec in specs.items() if spec.get("mark", {}).get("type") == "text"]
    assert empty == ["distillation_weights"]


def test_it_ships_without_outputs() -> None:
    assert outputs(nbformat.read(NOTEBOOK, as_version=4)) == []


def test_the_recorded_run_is_whole_and_small(tmp_path: Path) -> None:
    assert sum(f.stat().st_size for f in RECORDED.rglob("*") if f.is_file()) < 700_000
    assert audit(RECORDED / "ledger.sqlite").ok
    run = load_run(RECORDED)
    assert run.stages["stage"].to_list() == ["start", "screen", "sft", "rl", "dpo"]
    assert run.rescreens["dropped"].sum() > 0
    assert not run.pairs.is_empty()
    # Looking at it leaves nothing behind: SQLite would, for a ledger in WAL mode.
    shutil.copytree(RECORDED, tmp_path / "copy")
    before = sorted(p.name for p in (tmp_path / "copy").iterdir())
    load_run(tmp_path / "copy")
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == before
