"""`posttrain teach` as a user calls it, and a run that learns from a teacher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.cli_teach import _content
from posttrain.config import compose, load, resolved
from posttrain.data.chat import ChatFormat
from posttrain.dependencies import stage_tables
from posttrain.errors import ModelError, SettingsError, StoreError
from posttrain.inputs import STARTER_TEACHER_DIR, load_inputs, locate_model, locate_teacher
from posttrain.metrics import read_metrics
from posttrain.run_dir import RunDir
from posttrain.starter.tasks import starter_sft_rows

ROOT = Path(__file__).parents[1]
CONFIG = "configs/quickstart.yaml"
TEACHER = "teacher.model=starter-teacher"


def posttrain(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "posttrain.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def rows(tmp_path):
    """40 supervised rows without a system instruction."""
    file = tmp_path / "rows.jsonl"
    chosen = [row for row in starter_sft_rows(120, seed=9) if row.system is None][:40]
    lines = [
        {"question": row.prompt.messages[-1].content, "completion": row.completion}
        for row in chosen
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def other_tokenizer(tmp_path):
    """The starter's teacher, two of its tokens exchanged."""
    directory = tmp_path / "other"
    shutil.copytree(STARTER_TEACHER_DIR, directory)
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(tokenizer))
    return directory


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sft.distillation={}"], "sft.distillation: name a teacher"),
        (["rl.distillation={}"], "rl.distillation: name a teacher"),
        ([TEACHER], "nobody learns from it"),
        ([TEACHER, "sft.distillation={divergence: reverse_kl}"], "teacher.targets.kind = top_k"),
        ([TEACHER, "sft.distillation={weight: constant, prior: 0.5}"], "does not read prior"),
        ([TEACHER, "sft.distillation={wieght: constant}"], "weight"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, said):
    with pytest.raises(SettingsError, match=said):
        load(ROOT / CONFIG, overrides)


def test_cross_entropy_alone_needs_no_teacher():
    settings = load(ROOT / CONFIG, ["sft.distillation={weight: ce_only}"])
    assert settings.taught_stages == []


def test_stages_that_are_not_run_need_no_teacher():
    settings = load(ROOT / CONFIG, [TEACHER, "sft.distillation={}", "stages=[rl]"])
    assert settings.taught_stages == []
    taught = load(ROOT / CONFIG, [TEACHER, "sft.distillation={}", "rl.distillation={}"])
    assert taught.taught_stages == ["sft", "rl"]


def test_a_teacher_counts_for_the_stages_that_learn_from_it():
    """Another teacher has SFT done again, and leaves a stage alone that never asked it."""
    shared = [TEACHER, "sft.distillation={}"]
    data = dict.fromkeys(("train", "held_out", "sft", "pairs"), "d")
    plain = resolved(load(ROOT / CONFIG, shared))
    tables = stage_tables(plain, data, {"policy": "p", "teacher": "one"}, {})
    assert tables["sft"]["teacher.model"] == "one"
    assert tables["sft"]["teacher.targets.temperature"] == 1.0
    assert tables["sft"]["resources.teacher.dtype"] == "float32"
    for stage in ("start", "screen", "rl", "dpo"):
        assert not [key for key in tables[stage] if "teacher." in key], stage
    elsewhere = resolved(load(ROOT / CONFIG, [*shared, "teacher.store=/shared"]))
    assert stage_tables(elsewhere, data, {"policy": "p", "teacher": "one"}, {}) == tables
    other = stage_tables(plain, data, {"policy": "p", "teacher": "other"}, {})
    assert [name for name in tables if tables[name] != other[name]] == ["sft", "rl", "dpo"]
    assert other["screen"] == tables["screen"]


# --- bad input ------------------------------------------------------------------------------------


def small(tmp_path, *overrides):
    return load(
        ROOT / CONFIG,
        [
            f"run.dir={tmp_path / 'run'}",
            "tasks.train=[{source: starter, size: 8}]",
            "tasks.held_out=[{source: starter, size: 4}]",
            "sft.data.size=8",
            "sft.distillation={}",
            *overrides,
        ],
    )


def test_the_starters_teacher_is_found(tmp_path):
    inputs = load_inputs(small(tmp_path, TEACHER))
    assert inputs.teacher == STARTER_TEACHER_DIR.resolve()
    assert set(inputs.models) == {"policy", "teacher"}


def test_a_teacher_with_another_tokenizer_is_refused_and_both_are_named(tmp_path, other_tokenizer):
    with pytest.raises(ModelError) as refused:
        load_inputs(small(tmp_path, f"teacher.model={other_tokenizer}"))
    assert str(other_tokenizer) in str(refused.value)
    assert "policy.model = starter" in str(refused.value)
    assert "2 tokens have other ids" in str(refused.value)


def test_a_teacher_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"teacher\.model"):
        load_inputs(small(tmp_path, f"teacher.model={tmp_path / 'nowhere'}"))


def test_a_store_of_another_temperature_is_refused_before_anything_starts(tmp_path):
    store = tmp_path / "store"
    shared = [TEACHER, f"teacher.store={store}"]
    load_inputs(small(tmp_path, *shared))
    assert not store.exists()  # looking makes nothing
    (store / "targets").mkdir(parents=True)
    identity = {"teacher": "somebody", "temperature": 1.0}
    (store / "targets" / "identity.json").write_text(json.dumps(identity))
    with pytest.raises(StoreError, match=r"teacher 'somebody', now .*temperature 1\.0, now 2\.0"):
        load_inputs(small(tmp_path, *shared, "teacher.targets.temperature=2.0"))


def test_the_command_names_what_is_wrong(tmp_path, rows, other_tokenizer):
    refused = posttrain(
        *("teach", rows, "--teacher", other_tokenizer, "--policy", "starter"),
        *("--out", tmp_path / "out"),
    )
    assert refused.returncode == 2
    assert "different tokenizers" in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", ["starter-teacher", str(STARTER_TEACHER_DIR)])
def test_the_policy_is_the_teacher_unless_it_is_named(tmp_path, rows, named):
    from posttrain.stages.teach import TeachSettings

    content = _content(str(rows), named, tmp_path / "out", None, None, None)
    settings = compose(TeachSettings, content, ["policy.max_length=192"], "posttrain teach")
    policy = locate_model(settings.policy.model)
    assert policy == STARTER_TEACHER_DIR.resolve()
    chat = ChatFormat(str(policy))
    assert locate_teacher(settings.teacher.model, chat, settings.policy.model) == policy


# --- for real -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_data_set_is_taught_once(tmp_path, rows):
    command = ["teach", rows, "--teacher", "starter-teacher", "--policy", "starter"]
    command += ["--out", tmp_path / "out", "policy.max_length=192"]
    first = posttrain(*command, "--json")
    assert first.returncode == 0, first.stderr[-3000:]
    report = json.loads(first.stdout)
    assert report["targets"]["sequences"] == 40
    assert report["targets"]["hits"] == 0
    assert 5 < report["targets"]["bytes_per_label"] < 60
    again = posttrain(*command)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "40 of 40 sequences were stored (100%)" in again.stdout
    assert "nothing is loaded" in again.stderr
    refused = posttrain(*command, "teacher.targets.temperature=2.0")
    assert refused.returncode == 2
    assert "temperature 1.0, now 2.0" in refused.stderr


@pytest.mark.slow
@pytest.mark.e2e
def test_runs_share_a_teacher_and_the_second_loads_none(tmp_path):
    """SFT and RL with a teacher in actors of its own; then SFT again over the same rows."""
    shared = (
        *(
            "tasks.train=[{source: starter, size: 48}]",
            "tasks.held_out=[{source: starter, size: 8}]",
        ),
        *(
            "sft.data.size=96",
            "sft.checkpoints.count=1",
            TEACHER,
            f"teacher.store={tmp_path / 's'}",
        ),
        *("sft.distillation={held_out: 8, every_steps: 1}", "resources.teacher.cpus=0.5"),
        *("rl.num_steps=3", "rl.groups_per_step=4", "eval.num_samples=1", "eval.k=[1]"),
        "eval.instruction_samples=0",
    )
    first = RunDir(tmp_path / "first")
    done = posttrain(
        *("run", CONFIG, f"run.dir={first.path}", "stages=[sft,rl]", *shared),
        "rl.distillation={weight: dynamic}",
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Traceback" not in done.stderr
    asked = first.stages()["sft"].metrics["teacher"]
    assert asked["targets"]["hits"] == 0
    assert asked["targets"]["sequences"] > 80
    records = read_metrics(first.metrics_path)
    weighed = [r for r in records if r["stage"] == "sft" and "distill/alpha" in r]
    assert weighed and all(0 <= r["distill/alpha"] <= 1 for r in weighed)
    steps = [r for r in records if r["stage"] == "rl" and "learner/loss" in r]
    assert len(steps) == 3
    for step in steps:
        assert 0.1 <= step["teacher/weight"] <= 1
        assert step["teacher/late"] == 0
        assert abs(step["teacher/gap"]) < 5
    assert first.stages()["rl"].metrics["last_attempt"]["teacher"]["late_groups"] == 0

    second = RunDir(tmp_path / "second")
    done = posttrain("run", CONFIG, f"run.dir={second.path}", "stages=[sft]", *shared)
    assert done.returncode == 0, done.stderr[-5000:]
    found = second.stages()["sft"].metrics["teacher"]
    for who in ("targets", "critic"):
        assert found[who]["hit_rate"] == 1.0
        assert found[who]["seconds_saved"] > 0
        assert found[who]["seconds"] < 1
