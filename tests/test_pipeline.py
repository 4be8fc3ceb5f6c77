"""Stages that hand on, with stand-ins for what they compute: what runs, on what, and what not."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import pytest
import yaml

from posttrain import pipeline
from posttrain.config import load
from posttrain.errors import Interrupted, ModelError, RunDirError, SettingsError, StageError
from posttrain.evaluation import PromptResult
from posttrain.inputs import check_learner, load_inputs
from posttrain.inspect import Run
from posttrain.metrics import read_metrics
from posttrain.run_dir import RunDir, staged_directory


class Pools:
    """In place of everything that runs on Ray."""

    refusal: Exception | None = None
    starts = 0

    def __enter__(self) -> Self:
        if Pools.refusal is not None:
            raise Pools.refusal
        Pools.starts += 1
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Bench:
    """A settings file, and what the stages were asked for, in order."""

    def __init__(self, path: Path, config: Path) -> None:
        self.path = path
        self.run_dir = path / "run"
        self.config = config
        self.calls: list[tuple[str, str]] = []
        self.extras: dict[str, Any] = {}
        self.failures: dict[str, BaseException] = {}
        self.adapters = False
        self.stacks: list[tuple[list[str], Path, str]] = []

    def run(self, *overrides: str, fresh: bool = False) -> pipeline.RunResult:
        """The calls are those of this run only. A policy is named after all that made it."""
        self.calls.clear()
        settings = load(self.config, [f"run.dir={self.run_dir}", *overrides])
        return pipeline.run(settings, load_inputs(settings), fresh=fresh)

    def stage(self, name: str, context: Any, model: Path, extra: Any = None) -> dict[str, Any]:
        made_by = self.history(model)
        self.calls.append((name, made_by))
        self.extras[name] = extra
        if name in self.failures:
            raise self.failures.pop(name)
        policy = context.policy_of(name)
        shutil.copytree(model, policy)
        (policy / "history.txt").write_text(f"{made_by} {name}".strip())
        if self.adapters:
            context.adapter_of(name).mkdir()
            (context.adapter_of(name) / "weights").write_text(name)
        return {"stage": name}

    def stack(self, adapters: list[Path], base: Path, named: str, target: Path) -> None:
        self.stacks.append(([path.parent.name for path in adapters], base, named))
        with staged_directory(target) as staged:
            (staged / "weights").write_text(" ".join(a.parent.name for a in adapters))

    def history(self, model: Path) -> str:
        file = model / "history.txt"
        return file.read_text() if file.exists() else ""


@pytest.fixture
def bench(tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    def write(name: str, *rows: dict[str, Any]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    train = write("train.jsonl", {"question": "1+1=?", "answer": "2"})
    held_out = write("held_out.jsonl", {"question": "0+2=?", "answer": "2"})
    rows = [{"question": f"{i}-1=?", "completion": "#2", "answer": "2"} for i in (3, 4)]
    settings = {
        "run": {"dir": "unused"},
        "policy": {"model": str(tiny_policy), "max_length": 64},
        "tasks": {"train": [{"source": train}], "held_out": [{"source": held_out}]},
        "sft": {"data": {"source": write("sft.jsonl", *rows)}},
        "screen": {"judge": {"max_tokens": 16}},
        "rl": {"max_tokens": 16},
        "dpo": {"mining": {"max_tokens": 16}},
        "eval": {"max_tokens": 16},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    bench = Bench(tmp_path, tmp_path / "run.yaml")

    async def screen(context: Any, model: Path) -> Any:
        bench.calls.append(("screen", bench.history(model)))
        kept = frozenset(["sft.jsonl:2"])
        return SimpleNamespace(critic=f"critic {model.name}", kept_rows=kept, metrics={})

    async def sft(context: Any, model: Path, kept: Any) -> dict[str, Any]:
        return bench.stage("sft", context, model, kept)

    async def rl(context: Any, model: Path, critic: Any) -> dict[str, Any]:
        return bench.stage("rl", context, model, critic)

    async def dpo(context: Any, model: Path) -> dict[str, Any]:
        return bench.stage("dpo", context, model)

    async def measure(context: Any, model: Path, label: str) -> list[PromptResult]:
        bench.calls.append((f"evaluate {label}", bench.history(model)))
        return []

    for function in (screen, sft, rl, dpo):
        module = ModuleType(f"posttrain.stages.{function.__name__}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(pipeline, "_pools", lambda *_: Pools())
    monkeypatch.setattr(pipeline, "measure_policy", measure)
    monkeypatch.setattr(pipeline, "stack_adapters", bench.stack)
    monkeypatch.setattr(pipeline, "summarise", lambda results, k: SUMMARY | {"k": k})
    monkeypatch.setattr(Pools, "refusal", None)
    monkeypatch.setattr(Pools, "starts", 0)
    yield bench


SUMMARY: dict[str, Any] = {"domains": {}, "all": {}}

ALL = [
    *(("evaluate start", ""), ("screen", "")),
    *(("sft", ""), ("evaluate sft", "sft")),
    *(("rl", "sft"), ("evaluate rl", "sft rl")),
    *(("dpo", "sft rl"), ("evaluate dpo", "sft rl dpo")),
]


def test_each_stage_works_on_what_the_one_before_left(bench: Bench) -> None:
    result = bench.run()
    assert bench.calls == ALL
    assert bench.extras["sft"] == {"sft.jsonl:2"}  # what screening kept
    assert bench.extras["rl"].startswith("critic ")
    assert bench.history(result.policy) == "sft rl dpo"
    assert list(result.evaluations) == ["start", "sft", "rl", "dpo"]
    assert result.metrics["dpo"]["stage"] == "dpo"


def test_what_the_sets_share_is_recorded(bench: Bench) -> None:
    def recorded(*overrides: str) -> dict[str, int]:
        bench.run(*overrides)
        found: dict[str, int] = RunDir(bench.run_dir).config()["prompts_sharing_text"]
        return found

    assert recorded("stages=[rl]") == {}
    shared = [{"question": "1+1=?", "completion": "#2", "answer": "2"}]
    (bench.path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shared))
    assert recorded("stages=[sft,rl]") == {"sft and rl and dpo": 1}
    pairs = bench.path / "pairs.jsonl"
    pair = {"chosen": "#2", "rejected": "#3"}
    kinds = [{"prompt": "1+1=?"} | pair, {"prompt": "1+1=?", "chosen": "2", "rejected": "3"}]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in kinds))
    stored = ["stages=[sft,rl,dpo]", f"dpo.data={{source: {pairs}}}"]
    assert recorded(*stored) == {"sft and rl": 1, "sft and dpo": 1, "rl and dpo": 1}


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (["rl"], ["rl"]),
        (["dpo"], ["dpo"]),
        (["rl", "sft"], ["rl", "sft"]),
        (["dpo", "rl"], ["dpo", "rl"]),
        (["sft", "screen", "rl"], ["sft", "rl"]),
        (["screen"], []),
    ],
)
def test_any_order_hands_on(bench: Bench, stages: list[str], expected: list[str]) -> None:
    result = bench.run(f"stages=[{', '.join(stages)}]")
    worked = [name for name, _ in bench.calls if not name.startswith("evaluate")]
    assert worked == stages
    assert bench.history(result.policy) == " ".join(expected)
    if stages == ["rl", "sft"]:
        assert (bench.extras["sft"], bench.extras["rl"]) == (None, None)  # nothing was screened


def test_what_is_done_is_not_done_again_and_starts_nothing(bench: Bench) -> None:
    first = bench.run()
    assert Pools.starts == 1
    again = bench.run("log.tensorboard=false", "resources.rollout.replicas=2", "rl.export_every=5")
    assert (bench.calls, Pools.starts) == ([], 1)
    assert (again.evaluations, again.metrics) == (first.evaluations, first.metrics)


def test_a_changed_setting_runs_what_rests_on_it_again_and_says_so(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.run()
    result = bench.run("rl.group_size=4")
    assert bench.calls == ALL[4:]
    told = capsys.readouterr().err
    assert "rl: runs again, for this has changed: rl.group_size: 8 → 4" in told
    assert "dpo: runs again, for this has changed: the stage rl before it" in told
    assert "sft: done before" in told
    aside = bench.run_dir / "superseded"
    assert f"rl: what it had left is in {aside / 'rl-1'}; delete it" in told
    assert bench.history(aside / "rl-1" / "policy") == "sft rl"
    assert bench.history(result.policy) == "sft rl dpo"
    again = [r for r in read_metrics(RunDir(bench.run_dir).metrics_path) if r["event"] == "again"]
    assert [r["stage"] for r in again] == ["rl", "dpo"]
    assert RunDir(bench.run_dir).config()["settings"]["rl"]["group_size"] == 4


def test_other_evaluation_settings_measure_again_and_train_nothing(bench: Bench) -> None:
    bench.run()
    result = bench.run("eval.k=[1,2]")
    assert [name for name, _ in bench.calls] == [n for n, _ in ALL if n.startswith("evaluate")]
    assert {tuple(e["k"]) for e in result.evaluations.values()} == {(1, 2)}


def test_changed_data_count_by_content(bench: Bench) -> None:
    bench.run("stages=[sft, rl]")
    train = bench.path / "train.jsonl"
    moved = shutil.copy(train, bench.path / "moved.jsonl")
    elsewhere = f"tasks.train=[{{source: {moved}}}]"
    bench.run("stages=[sft, rl]", elsewhere)
    # The domain is named after the file, and the domain is a part of a task.
    assert [name for name, _ in bench.calls] == ["rl", "evaluate rl"]
    train.write_text(json.dumps({"question": "1+1=?", "answer": "3", "domain": "moved"}) + "\n")
    bench.run("stages=[sft, rl]")
    assert [name for name, _ in bench.calls] == ["rl", "evaluate rl"]


def test_rewards_count_by_their_source(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = bench.path / "edited_reward.py"
    module.write_text("def score(prompt, text):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(bench.path))
    settings = (
        "rewards.custom={mine: 'edited_reward:score'}",
        "rewards.default_verifier=mine",
        "stages=[sft, rl]",
    )
    bench.run(*settings)
    bench.run(*settings)
    assert bench.calls == []
    module.write_text("def score(prompt, text):\n    return 0.0\n")
    bench.run(*settings)
    assert [name for name, _ in bench.calls] == [
        *("evaluate start", "evaluate sft"),
        *("rl", "evaluate rl"),
    ]
    told = capsys.readouterr().err
    assert "rl: runs again, for this has changed: the source of the reward mine" in told
    assert "source of mine" in RunDir(bench.run_dir).config()["inputs"]


def test_a_judge_counts_by_its_weights(bench: Bench, tiny_policy: Path) -> None:
    judge = Path(shutil.copytree(tiny_policy, bench.path / "judge"))
    settings = ("stages=[sft]", f"rewards.judge={{model: {judge}}}")
    bench.run(*settings)
    moved = judge.rename(bench.path / "moved")
    bench.run("stages=[sft]", f"rewards.judge={{model: {moved}}}")
    assert bench.calls == []
    (moved / "generation_config.json").write_text("{}")
    bench.run("stages=[sft]", f"rewards.judge={{model: {moved}}}")
    assert [name for name, _ in bench.calls] == ["evaluate start", "evaluate sft"]


def test_a_stage_that_is_added_or_left_out(bench: Bench) -> None:
    bench.run("stages=[sft, rl]")
    result = bench.run("stages=[sft, rl, dpo]")
    assert bench.calls == ALL[6:]
    assert bench.history(result.policy) == "sft rl dpo"
    result = bench.run("stages=[sft, rl]")
    assert bench.calls == []
    assert bench.history(result.policy) == "sft rl"
    assert list(result.evaluations) == ["start", "sft", "rl"]


def test_more_steps_of_rl_go_on_from_what_there_is(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.run("stages=[rl]", "rl.num_steps=10")
    checkpoint = bench.run_dir / "rl" / "checkpoint-10"
    checkpoint.mkdir()
    bench.run("stages=[rl]", "rl.num_steps=20")
    assert ("rl", "") in bench.calls
    assert checkpoint.exists()
    assert "rl: goes on with rl.num_steps: 10 → 20" in capsys.readouterr().err


def test_a_stage_starts_from_a_checkpoint_or_the_policy_of_another_run(
    bench: Bench, tiny_policy: Path
) -> None:
    mine = Path(shutil.copytree(tiny_policy, bench.path / "mine"))
    (mine / "history.txt").write_text("elsewhere")
    bench.run("stages=[screen, rl, dpo]", f"rl.model={mine}")
    assert bench.calls[:2] == ALL[:2]
    assert bench.calls[2:] == [
        ("rl", "elsewhere"),
        ("evaluate rl", "elsewhere rl"),
        ("dpo", "elsewhere rl"),
        ("evaluate dpo", "elsewhere rl dpo"),
    ]
    other = bench.run_dir
    bench.run_dir = bench.path / "next"
    bench.run("stages=[dpo]", f"dpo.model={other}")
    assert ("dpo", "elsewhere rl dpo") in bench.calls


def test_a_critic_of_its_own_judges_and_is_not_trained(bench: Bench, tiny_policy: Path) -> None:
    critic = Path(shutil.copytree(tiny_policy, bench.path / "critic"))
    (critic / "history.txt").write_text("critic")
    bench.run("stages=[screen, rl]", f"screen.model={critic}")
    assert ("screen", "critic") in bench.calls
    assert ("rl", "") in bench.calls
    assert bench.extras["rl"] == "critic critic"


@pytest.mark.parametrize("stage", ["screen", "sft"])
def test_adapters_are_stacked_on_what_the_stages_that_trained_began_with(
    bench: Bench, tiny_policy: Path, stage: str
) -> None:
    other = Path(shutil.copytree(tiny_policy, bench.path / "other"))
    bench.adapters = True
    bench.run("stages=[sft, screen, rl]", f"{stage}.model={other}")
    adapters, base, named = bench.stacks[-1]
    assert adapters == ["sft", "rl"]
    assert base == (tiny_policy if stage == "screen" else other)  # a critic is nobody's base
    assert named == str(base)


@pytest.mark.parametrize("adapters", [False, True])
def test_the_policy_that_a_run_leaves_has_the_card_of_its_last_stage(
    bench: Bench, adapters: bool
) -> None:
    bench.adapters = adapters
    bench.run("stages=[sft]")
    policy = bench.run("stages=[sft, rl]").policy
    card = (policy / "README.md").read_text()
    assert card == (bench.run_dir / "rl" / "policy" / "README.md").read_text()
    assert ", after sft → rl" in card
    assert (policy / "weights").exists() is adapters

    (policy / "README.md").write_text("edited")
    if not adapters:  # the stand-in for what stacks adapters does it again each time
        bench.run("stages=[sft, rl]")
        assert (policy / "README.md").read_text() == "edited"


@pytest.mark.parametrize("error", [Interrupted("stopped"), StageError("no"), KeyError("bug")])
def test_an_interrupted_run_goes_on_where_it_was(bench: Bench, error: Exception) -> None:
    bench.failures["rl"] = error
    with pytest.raises(type(error)):
        bench.run()
    assert RunDir(bench.run_dir).stages()["rl"].state == "running"
    bench.run()
    assert bench.calls == ALL[4:]


def test_bad_input_that_shows_late_is_a_failure(bench: Bench) -> None:
    bench.failures["sft"] = RunDirError("a checkpoint is cut short")
    with pytest.raises(StageError, match="cut short"):
        bench.run()


def test_a_cluster_that_is_too_small_is_bad_input(bench: Bench) -> None:
    Pools.refusal = SettingsError("resources: 3 GPUs of 0")
    with pytest.raises(SettingsError, match="3 GPUs of 0"):
        bench.run()
    assert bench.calls == []
    Pools.refusal = None
    bench.run("resources.rollout.replicas=1")
    assert bench.calls == ALL


@pytest.mark.parametrize(
    ("engines", "named"),
    [
        ([], "resources.rollout.engine.dtype"),
        (["resources.rollout.engine.dtype=bfloat16"], "resources.judge.engine.dtype"),
    ],
)
def test_engines_that_do_not_suit_the_learner_are_bad_input(
    bench: Bench, engines: list[str], named: str
) -> None:
    """Else it would show at the first publish, after all the stages before."""
    learner = ["rl.learner.dtype=bfloat16", "rl.rescreen={placement: dedicated}"]
    settings = load(bench.config, [f"run.dir={bench.run_dir}", *learner, *engines])
    inputs = load_inputs(settings)  # of which an evaluation is made without a learner
    with pytest.raises(ModelError, match=f"bfloat16 .* computes in float32: set {named} and"):
        check_learner(settings, inputs)
    check_learner(settings.model_copy(update={"stages": ["sft"]}), inputs)


def test_an_evaluation_that_was_cut_short_is_all_that_is_repeated(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline.measure_policy

    async def breaks_off(context: Any, model: Path, label: str) -> Any:
        if label == "rl":
            raise Interrupted("stopped")
        return await whole(context, model, label)

    monkeypatch.setattr(pipeline, "measure_policy", breaks_off)
    with pytest.raises(Interrupted):
        bench.run()
    monkeypatch.setattr(pipeline, "measure_policy", whole)
    bench.run()
    assert bench.calls == ALL[5:]


def test_a_kill_between_an_evaluation_and_its_record_is_no_change_of_the_file(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def measure(context: Any, model: Path, label: str) -> list[PromptResult]:
        bench.calls.append((f"evaluate {label}", bench.history(model)))
        counts: dict[str, Any] = {"n": max(context.settings.eval.k), "correct": 1, "tokens": 1}
        about: dict[str, Any] = {"outcomes": {}, "instructions": {}, "greedy_correct": True}
        return [PromptResult(prompt_id="p", domain="d", **counts, **about)]

    def killed(*_: object, **__: object) -> None:
        raise Interrupted("killed")

    monkeypatch.setattr(pipeline, "measure_policy", measure)
    bench.run()
    with monkeypatch.context() as patched:
        patched.setattr(RunDir, "record_evaluation", killed)
        with pytest.raises(Interrupted):
            bench.run("eval.k=[1,2]")
    result = bench.run("eval.k=[1,2]")
    assert [name for name, _ in bench.calls] == [n for n, _ in ALL if n.startswith("evaluate")]
    assert {tuple(e["k"]) for e in result.evaluations.values()} == {(1, 2)}


def test_a_report_that_a_kill_prevented_is_written_by_the_next_start(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[str]] = []

    def write(run: Run, path: Path) -> None:
        told.append(run.stages["stage"].to_list())
        path.write_text("report")

    def killed(*_: object) -> None:
        raise Interrupted("killed")

    def run_and_be_killed(*overrides: str) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(pipeline, "_report", killed)
            with pytest.raises(Interrupted):
                bench.run(*overrides)

    monkeypatch.setattr(pipeline, "write_report", write)
    run_and_be_killed("stages=[sft]")
    assert (bench.path / "run" / "policy" / "config.json").exists()  # handed over before
    bench.run("stages=[sft]")
    assert (bench.calls, told) == ([], [["start", "sft"]])
    bench.run("stages=[sft]")
    assert len(told) == 1  # it is there
    run_and_be_killed("stages=[sft, rl]")
    bench.run("stages=[sft, rl]")
    assert (bench.calls, told[1:]) == ([], [["start", "sft", "rl"]])
    bench.run("stages=[sft]")
    assert (bench.calls, told[2:]) == ([], [["start", "sft"]])


def test_a_run_is_not_failed_by_its_report(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise OverflowError("more than 5000 rows")

    monkeypatch.setattr(pipeline, "write_report", fails)
    bench.run("stages=[sft]")
    assert "no report (OverflowError: more than 5000 rows); see" in capsys.readouterr().err


def test_a_copy_that_breaks_off_beside_an_evaluation_is_gone_on_with(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file may be new there and the manifest old."""
    here = (f"run.dir=file://{bench.path}/bucket/run", f"run.work_dir={bench.path}/here")
    bench.run("stages=[sft]", *here)

    def lost(*_: object, **__: object) -> None:
        raise Interrupted("the machine is gone")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline.RunDir, "record_evaluation", lost)
        with pytest.raises(Interrupted):
            bench.run("stages=[sft]", *here, "eval.max_tokens=8")
    copied = bench.path / "bucket" / "run"
    record = json.loads((copied / "manifest.json").read_text())["stages"]["start"]
    assert (record["artifacts"], record["evaluated_on"]) == ({}, None)


def test_a_run_at_a_url_goes_on_from_another_machine(bench: Bench) -> None:
    url = f"run.dir=file://{bench.path}/bucket/run"
    bench.failures["dpo"] = Interrupted("stopped")
    with pytest.raises(Interrupted):
        bench.run(url, f"run.work_dir={bench.path}/here")
    copied = bench.path / "bucket" / "run"
    assert json.loads((copied / "manifest.json").read_text())["stages"]["rl"]["state"] == "done"
    assert (copied / "rl" / "policy" / "config.json").exists()
    # Known before any of its files could have come there.
    assert json.loads((copied / "manifest.json").read_text())["stages"]["dpo"]["state"] == "running"
    result = bench.run(url, f"run.work_dir={bench.path}/there")
    assert bench.calls == ALL[6:]
    assert result.policy == bench.path / "there" / "policy"
    assert (copied / "policy" / "history.txt").read_text() == "sft rl dpo"
    assert (copied / "ledger.sqlite").exists()


def test_fresh_starts_over(bench: Bench) -> None:
    bench.run()
    bench.run(fresh=True)
    assert bench.calls == ALL
