"""The command line: exit codes, messages that name what is wrong, one JSON object, signals."""

from __future__ import annotations

import ast
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

import posttrain
from posttrain import doctor
from posttrain.cli import main
from posttrain.config import load, resolved
from posttrain.doctor import Finding
from posttrain.errors import Interrupted, PlacementError, RunDirError, SettingsError
from posttrain.inputs import load_inputs
from posttrain.ledger import Ledger
from posttrain.rerun import Plan
from posttrain.run_dir import RunDir
from posttrain.types import DrawOutcome

STARTED = {"ray", "vllm", "deepspeed", "trl"}


class Done(NamedTuple):
    code: int
    out: str
    err: str


@dataclass
class Desk:
    """A settings file with everything it names, all of it good."""

    path: Path
    call: Callable[..., Done]

    @property
    def config(self) -> str:
        return str(self.path / "run.yaml")

    @property
    def run_dir(self) -> Path:
        return self.path / "runs" / "mine"

    def write(self, name: str, *rows: dict[str, Any] | str) -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.path / name).write_text("".join(f"{line}\n" for line in lines))
        return self.path / name

    def run(self, *arguments: str) -> Done:
        return self.call("run", self.config, *arguments)


def task(question: str, answer: Any = "2") -> dict[str, Any]:
    return {"question": question, "answer": answer}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["posttrain", *arguments])
        code: Any = 0
        try:
            main()
        except SystemExit as done:
            code = done.code or 0
        return Done(code, *capfd.readouterr())

    return call


@pytest.fixture
def desk(tmp_path: Path, tiny_policy: Path, call: Callable[..., Done]) -> Desk:
    desk = Desk(tmp_path, call)
    desk.write("train.jsonl", task("1+1=?"), task("2+0=?"))
    desk.write("held_out.jsonl", task("0+2=?"))
    desk.write("sft.jsonl", task("3-1=?") | {"completion": "#2", "system": "brief"})
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "run": {"dir": str(desk.run_dir)},
                "policy": {"model": str(tiny_policy), "max_length": 64},
                "tasks": {
                    "train": [{"source": str(tmp_path / "train.jsonl")}],
                    "held_out": [{"source": str(tmp_path / "held_out.jsonl")}],
                },
                "system_instructions": [{"name": "brief", "text": "Answer only."}],
                "sft": {"data": {"source": str(tmp_path / "sft.jsonl")}},
                "screen": {"judge": {"max_tokens": 16}},
                "rl": {"max_tokens": 16, "num_steps": 5, "groups_per_step": 4, "group_size": 4},
                "dpo": {"mining": {"max_tokens": 16}},
                "eval": {"max_tokens": 16},
            }
        )
    )
    return desk


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline, which alone starts anything, cannot even be imported."""
    monkeypatch.setitem(sys.modules, "posttrain.pipeline", None)
    monkeypatch.delattr(posttrain, "pipeline", raising=False)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in whose functions a test sets."""
    stand_in = ModuleType("posttrain.pipeline")
    monkeypatch.setitem(sys.modules, "posttrain.pipeline", stand_in)
    monkeypatch.setattr(posttrain, "pipeline", stand_in, raising=False)
    return stand_in


def refused(done: Done, *said: object) -> None:
    assert done.code == 2, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    for part in said:
        assert str(part) in done.err


@pytest.mark.usefixtures("nothing_starts")
def test_the_trap_of_these_tests_works(desk: Desk) -> None:
    assert desk.run("--dry-run").code == 0
    done = desk.run()
    assert done.code == 3
    assert done.err.splitlines()[-1].startswith("ModuleNotFoundError")


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rl.num_step=3"], ["rl.num_step: unknown setting. Did you mean rl.num_steps?"]),
        (["rll.num_steps=3"], ["rll: unknown setting. Did you mean rl?"]),
        (["rl.num_steps=many"], ["rl.num_steps", "integer", "'many'"]),
        (["rl.num_steps"], ["'rl.num_steps' is no override; write key.sub=value"]),
        (["stages=[sft]", "sft.data="], ["sft.data: the stage sft has no input"]),
        (["tasks.train=[]"], ["tasks.train: no tasks in []"]),
        (["policy.model=./no/such/model"], ["policy.model", "./no/such/model"]),
        (["policy.max_length=20"], ["'1+1=?' has 20 tokens", "leaves 4 beside the answer"]),
        (["rewards.default_verifier=guess"], ["tasks.train: 2 prompts", "'guess'", "exact"]),
        (["system_instructions=[]"], ["sft.data, sft.jsonl:1", "'brief'"]),
        (
            ["policy.lora={}", "rl.learner.expert_parallel=2"],
            ["rl.learner.expert_parallel = 2 divides experts that policy.lora does not train"],
        ),
        (["rl.learner.lora={}"], ["rl.learner.lora: unknown setting", "policy.lora?"]),
        (["policy.lora.target_modules=[gates]"], ["policy.lora.target_modules = ('gates',)"]),
        (["dpo.mining=null"], ["without mining and without data there are no pairs"]),
        (["sft.trainer.lerning_rate=1"], ["sft.trainer.lerning_rate", "learning_rate?"]),
        (["sft.trainer.learning_rate=fast"], ["sft.trainer.learning_rate", "number", "'fast'"]),
        (["dpo.trainer.max_steps=1", "dpo.budget.steps=2"], ["both say how much"]),
        (["--no-such-option"], ["No such option", "--no-such-option"]),
        (["stages=[rl, screen]"], ["stages: ['rl', 'screen'] screens for nobody"]),
        (["stages=[sft, rl]", "rl.model=starter"], ["rl.model: rl would start from it, and nob"]),
        (["stages=[rl]", "rl.model=./no/such"], ["rl.model: ", "./no/such"]),
        (["run.dir=/proc/posttrain/run"], ["run.dir: nothing can be written to /proc"]),
        (["run.dir=zorp://bucket/run"], ["run.dir: zorp://bucket/run", "zorp"]),
        (["run.work_dir=/tmp/w"], ["run.work_dir: /tmp/w would hold nothing"]),
    ],
)
@pytest.mark.parametrize("mode", [[], ["--dry-run"], ["--json"]], ids=["run", "dry", "json"])
def test_bad_settings_start_nothing(
    desk: Desk, arguments: list[str], said: list[str], mode: list[str]
) -> None:
    refused(desk.run(*arguments, *mode), *said)
    assert not desk.run_dir.exists()


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("file", "rows", "said"),
    [
        ("train.jsonl", [], ["tasks.train: no tasks in", "train.jsonl"]),
        ("held_out.jsonl", [], ["tasks.held_out: no tasks in", "held_out.jsonl"]),
        ("sft.jsonl", [], ["sft.data:", "sft.jsonl has no rows"]),
        ("train.jsonl", [task("a"), '{"question": "b"'], ["train.jsonl, line 2: no JSON"]),
        ("train.jsonl", [task("a"), {"question": "b"}], ["line 2: column 'answer' is missing"]),
        ("sft.jsonl", [task("a")], ["sft.jsonl, line 1: column 'completion' is missing"]),
        ("held_out.jsonl", [task("a"), task("a", "3")], ["'a' has two answers, '2' and '3'"]),
        ("held_out.jsonl", [task("1+1=?")], ["tasks.held_out: 1 of its prompts", "'1+1=?'"]),
        (
            "held_out.jsonl",
            [task("3-1=?")],
            ["also in tasks.train, sft.data or dpo.data", "'3-1=?'"],
        ),
        ("held_out.jsonl", [task("a", 7)], ["tasks.held_out: 1 prompts", "a string, got 7"]),
        ("sft.jsonl", [{"question": "a", "completion": "#"}], ["sft.data: 1 prompts", "None"]),
    ],
)
def test_bad_data_starts_nothing(
    desk: Desk, file: str, rows: list[dict[str, Any] | str], said: list[str]
) -> None:
    desk.write(file, *rows)
    refused(desk.run(), *said)
    assert not desk.run_dir.exists()


PAIR = {"prompt": "1+1=?", "chosen": "#2", "rejected": "#3"}


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([PAIR, {"prompt": "1", "chosen": "#1"}], ["line 2: column 'rejected' is missing"]),
        ([PAIR | {"rejected": "#2"}], ["line 1: chosen and rejected are identical"]),
        ([PAIR, PAIR], ["line 2: the same two answers", "line 1"]),
        ([PAIR | {"prompt": "0+2=?"}], ["tasks.held_out: 1 of its prompts", "'0+2=?'"]),
        ([PAIR | {"system": "loud"}], ["dpo.data, pair 1", "'loud'", "brief"]),
        ([PAIR | {"chosen": "#" * 60}], ["dpo.data, chosen of pair 1 has 68 tokens"]),
        ([], ["dpo.data:", "pairs.jsonl has no pairs"]),
    ],
)
def test_bad_pairs_start_nothing(desk: Desk, rows: list[dict[str, Any]], said: list[str]) -> None:
    file = desk.write("pairs.jsonl", *rows)
    refused(desk.run(f"dpo.data.source={file}"), *said)
    assert not desk.run_dir.exists()


@pytest.mark.usefixtures("nothing_starts")
def test_pairs_of_ones_own_are_enough(desk: Desk) -> None:
    file = desk.write("pairs.jsonl", PAIR)
    assert desk.run(f"dpo.data.source={file}", "dpo.mining=null", "--dry-run").code == 0


@pytest.mark.usefixtures("nothing_starts")
def test_a_template_that_drops_turns_starts_nothing(
    desk: Desk, tiny_policy: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "forgetful"
    shutil.copytree(tiny_policy, policy)
    template = policy / "chat_template.jinja"
    template.write_text(template.read_text().replace("in messages", "in messages[-2:]"))
    refused(desk.run(f"policy.model={policy}"), "its chat template drops or changes a turn")
    assert not desk.run_dir.exists()


@pytest.mark.usefixtures("nothing_starts")
def test_an_adapter_for_another_base_starts_nothing(
    desk: Desk, tiny_policy: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(tiny_policy), "peft_type": "LORA", "r": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    place = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {
            f"{place}.lora_A.weight": np.zeros((2, 99), np.float32),
            f"{place}.lora_B.weight": np.zeros((16, 2), np.float32),
        },
        adapter / "adapter_model.safetensors",
    )
    refused(desk.run(f"policy.model={adapter}"), "q_proj has 16 × 99", "it is for another base")
    assert not desk.run_dir.exists()


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("file", ["run.yaml", "train.jsonl", "held_out.jsonl", "sft.jsonl"])
def test_a_missing_file_is_named(desk: Desk, file: str) -> None:
    (desk.path / file).unlink()
    refused(desk.run(), desk.path / file)


@pytest.mark.usefixtures("nothing_starts")
def test_rows_without_answers_are_enough_where_nothing_scores_them(desk: Desk) -> None:
    desk.write("sft.jsonl", {"question": "a", "completion": "#"})
    assert desk.run("stages=[sft]", "--dry-run").code == 0


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.usefixtures("nothing_starts")
def test_a_policy_that_takes_fewer_tokens_than_asked_for_starts_nothing(desk: Desk) -> None:
    said = "takes 32768 tokens: lower it"
    refused(desk.run("policy.max_length=40000"), "policy.max_length is 40000", said)


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: (p / "config.json").unlink(), "no readable checkpoint"),
        (lambda p: (p / "config.json").write_text("{"), "no readable checkpoint"),
        (lambda p: (p / "config.json").write_text('{"model_type": "zorp"}'), "zorp"),
        (
            lambda p: (p / "config.json").write_text('{"model_type": "qwen3", "hidden_size": "x"}'),
            "no readable checkpoint",
        ),
        (
            lambda p: (p / "config.json").write_text(
                '{"model_type": "zorp", "auto_map": {"AutoConfig": "code.Config"}}'
            ),
            "custom code",
        ),
        (lambda p: (p / "model.safetensors").unlink(), "holds no safetensors"),
        (lambda p: cut_short(p / "model.safetensors"), "model.safetensors is damaged"),
        (lambda p: (p / "model.safetensors").write_text("version 1\noid"), "damaged"),
        (lambda p: (p / "tokenizer.json").write_text("{}"), "no readable tokenizer"),
        (lambda p: (p / "chat_template.jinja").write_text("{% if %}"), "chat template cannot"),
    ],
)
def test_an_unreadable_model_starts_nothing(
    desk: Desk, tiny_policy: Path, spoil: Callable[[Path], None], said: str
) -> None:
    policy = Path(shutil.copytree(tiny_policy, desk.path / "policy"))
    spoil(policy)
    refused(desk.run(f"policy.model={policy}"), "policy.model: ", said)
    assert not desk.run_dir.exists()


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "./no/model", "CONFIG"], ["policy.model", "./no/model"]),
        (["eval", "POLICY", "CONFIG", "--k", "1,9"], ["eval: pass@9", "eval.num_samples is 8"]),
        (["eval", "POLICY", "CONFIG", "--k", "1,x"], ["eval.k.1", "integer", "'x'"]),
        (["eval", "POLICY", "CONFIG", "--k", "1]"], ["'eval.k=[1]]': the value is no YAML"]),
        (["eval", "POLICY", "CONFIG", "evil.k=1"], ["evil: unknown setting. Did you mean eval?"]),
        (["eval", "POLICY"], ["Missing argument 'CONFIG'"]),
        (["run"], ["Missing argument 'CONFIG'"]),
        (["rum"], ["No such command 'rum'"]),
    ],
)
def test_bad_usage(desk: Desk, tiny_policy: Path, arguments: list[str], said: list[str]) -> None:
    known = {"CONFIG": desk.config, "POLICY": str(tiny_policy)}
    refused(desk.call(*(known.get(a, a) for a in arguments)), *said)


@pytest.mark.usefixtures("nothing_starts")
def test_dry_run_prints_the_plan(desk: Desk, tiny_policy: Path) -> None:
    plan = {
        "stages": ["screen", "rl"],
        "run": str(desk.run_dir),
        "policy": str(tiny_policy),
        "teacher": "none",
        "train_prompts": 2,
        "held_out_prompts": 1,
        "sft_rows": 0,
        "screening_answers_at_most": 2 * 16,
        "rl_trained_answers": 3 * 4 * 4,
        "asked_for_at_once": [
            "rollout 1 × (1 CPUs, 0 GPUs)",
            "rewards 1 × (0 CPUs, 0 GPUs)",
            "learner 1 × (1 CPUs, 0 GPUs)",
        ],
        "gib_on_each_device": ["rollout 1.0", "rl 0.0"],
        "does_not_fit": [],
        "prompts_sharing_text": [],
    }
    changed = ["stages=[screen, rl]", "rl.num_steps=3"]
    done = desk.run(*changed, "--dry-run", "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == plan
    assert len(done.out.splitlines()) == 1
    lines = desk.run(*changed, "--dry-run").out.splitlines()
    rows = {line[:28].strip().replace(" ", "_"): line[28:] for line in lines}
    shown = {
        key: ", ".join(value) or "none" for key, value in plan.items() if isinstance(value, list)
    }
    assert rows == {k: str(v) for k, v in plan.items()} | shown
    assert not desk.run_dir.exists()


@pytest.mark.usefixtures("nothing_starts")
def test_a_dry_run_counts_the_answers_of_the_stages_that_run(desk: Desk) -> None:
    rows = [task("3-1=?") | {"completion": text} for text in ("#2", "3-1=2#2")]
    desk.write("sft.jsonl", *rows, task("1+1=?") | {"completion": "#2"})

    def counted(*stages: str) -> dict[str, int]:
        plan = json.loads(desk.run(f"stages=[{', '.join(stages)}]", "--dry-run", "--json").out)
        return {name: count for name, count in plan.items() if "answers" in name}

    screening = {"screening_answers_at_most": 3 * 16}  # of two tasks and one more prompt of SFT
    assert counted("screen", "sft") == screening
    assert counted("screen", "sft", "rl") == screening | {"rl_trained_answers": 5 * 4 * 4}
    assert counted("rl") == {"rl_trained_answers": 5 * 4 * 4}
    assert counted("sft") == {}


@pytest.mark.usefixtures("nothing_starts")
def test_a_ray_job_takes_no_relative_directory(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    refused(desk.run("run.dir=runs/mine"), "run.dir: runs/mine is relative", "absolute path")


@pytest.mark.usefixtures("nothing_starts")
def test_a_stage_starts_from_a_checkpoint_of_the_same_model_only(
    desk: Desk, tiny_policy: Path
) -> None:
    other = Path(shutil.copytree(tiny_policy, desk.path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    told = (f"rl.model: {other} has hidden_size = 32 and the policy", "has 16")
    refused(desk.run("stages=[screen, rl]", f"rl.model={other}"), *told)
    assert desk.run("stages=[rl]", f"rl.model={tiny_policy}", "--dry-run").code == 0


@pytest.mark.usefixtures("nothing_starts")
def test_a_dry_run_says_what_a_change_runs_again(desk: Desk) -> None:
    settings = load(Path(desk.config))
    plan = Plan.of(settings, load_inputs(settings))
    with RunDir.create_or_open(desk.run_dir, resolved(settings), fresh=False) as run:
        for name in ("screen", "sft", "rl"):
            run.begin_stage(name, plan.tables[name])
            if name != "rl":
                run.finish_stage(name, [], {}, 1.0)

    def stages(*changed: str) -> list[str]:
        done = desk.run(*changed, "--dry-run", "--json")
        assert done.code == 0, done.err
        told: list[str] = json.loads(done.out)["stages"]
        return told

    assert stages() == ["screen: done before", "sft: done before", "rl: goes on", "dpo: runs"]
    assert stages("sft.trainer.max_steps=7") == [
        "screen: done before",
        "sft: runs again (sft.trainer: {} → (absent); sft.trainer.max_steps: (absent) → 7)",
        "rl: runs again (the stage sft before it)",
        "dpo: runs",
    ]
    assert stages("rl.num_steps=50")[2] == "rl: goes on (rl.num_steps: 5 → 50)"
    # Without SFT its rows are not screened.
    assert stages("stages=[screen, rl]") == [
        "screen: runs again (the content of sft.data)",
        "rl: runs again (the stage screen before it; the stage sft before it; the checkpoint "
        "policy.model)",
    ]
    desk.write("sft.jsonl", task("3-1=?", "2") | {"completion": "two #2"})
    assert stages()[:2] == [
        "screen: runs again (the content of sft.data)",
        "sft: runs again (the stage screen before it; the content of sft.data)",
    ]


@pytest.fixture
def finished(desk: Desk, tiny_policy: Path) -> Path:
    """The run's directory, with a policy in it."""
    shutil.copytree(tiny_policy, desk.run_dir / "policy")
    (desk.run_dir / "config.yaml").write_text("format: posttrain run 3\n")
    (desk.path / "link").symlink_to(desk.run_dir / "policy")
    return desk.run_dir


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("dpo.model", "runs/mine"),
        ("policy.model", "runs/mine/policy"),
        ("policy.model", "link"),
        ("rewards.judge.model", "runs/mine"),
        ("rewards.reward_model.model", "runs/mine/policy"),
    ],
)
@pytest.mark.parametrize("mode", ["--dry-run", "--fresh"])
def test_a_run_does_not_start_from_its_own_result(
    desk: Desk, finished: Path, setting: str, name: str, mode: str
) -> None:
    own = desk.path / name
    told = f"{setting} = {own} lies in run.dir = {finished}, which this run writes itself"
    refused(desk.run("stages=[dpo]", f"{setting}={own}", mode), told, "choose another run.dir")
    assert (finished / "policy" / "config.json").exists()


@pytest.mark.usefixtures("nothing_starts")
def test_a_teacher_is_not_of_the_run_that_it_teaches(desk: Desk, finished: Path) -> None:
    teacher = f"teacher.model={finished / 'policy'}"
    done = desk.run("stages=[sft]", teacher, "sft.distillation={}", "--dry-run")
    refused(done, f"teacher.model = {finished / 'policy'} lies in run.dir")


def test_the_result_of_a_run_is_started_from_elsewhere_and_measured(
    desk: Desk, finished: Path, pipeline: ModuleType
) -> None:
    elsewhere = f"run.dir={desk.path / 'runs' / 'more'}"
    assert desk.run("stages=[dpo]", f"dpo.model={finished}", elsewhere, "--dry-run").code == 0
    measured: list[Path] = []

    def evaluate_models(settings: Any, inputs: Any, models: Any) -> list[dict[str, Any]]:
        measured.extend(models)
        return [one_metric(0.25)]

    pipeline.evaluate_models = evaluate_models  # type: ignore[attr-defined]
    assert desk.call("eval", str(finished), desk.config, "--json").code == 0
    assert measured == [finished / "policy"]


def test_a_dry_run_loads_no_engine(desk: Desk) -> None:
    """In a process of its own, as a person starts it."""
    code = (
        "import sys\nfrom posttrain.cli import main\n"
        "try: main()\nexcept SystemExit as done: assert not done.code, done.code\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "run", desk.config, "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["train_prompts"] == 2
    loaded = set(ast.literal_eval(done.stderr.splitlines()[-1]))
    assert "transformers" in loaded
    assert not loaded & STARTED


class FakeResult(NamedTuple):
    policy: Path
    evaluations: dict[str, Any]
    seconds: dict[str, float]
    metrics: dict[str, Any]


def one_metric(mean: float) -> dict[str, Any]:
    metrics = {"pass@1": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}
    return {"all": metrics, "domains": {"maths": metrics}}


def test_run_prints_tables_or_one_object(desk: Desk, pipeline: ModuleType) -> None:
    def run(settings: Any, inputs: Any, *, fresh: bool) -> FakeResult:
        assert (settings.run.seed, fresh) == (7, True)
        assert [p.messages[0].content for p in inputs.train] == ["1+1=?", "2+0=?"]
        print("a line of log", file=sys.stderr)
        return FakeResult(Path("/p"), {"rl": one_metric(0.5)}, {"rl": 61.0}, {"rl": {}})

    pipeline.run = run  # type: ignore[attr-defined]
    done = desk.run("run.seed=7", "--fresh", "--json")
    assert (done.code, done.err) == (0, "a line of log\n")
    assert json.loads(done.out) == {
        "policy": "/p",
        "evaluations": {"rl": one_metric(0.5)},
        "seconds": {"rl": 61.0},
    }
    done = desk.run("run.seed=7", "--fresh")
    assert done.code == 0
    for part in ("Held-out pass@1", ".500 .400–.600", "RL 1:01", "vllm serve /p"):
        assert part in done.out


def test_eval_measures_the_model_it_is_given(
    desk: Desk, pipeline: ModuleType, tiny_policy: Path
) -> None:
    odd = Path(shutil.copytree(tiny_policy, desk.path / "a: policy #1 ü"))

    def evaluate_models(settings: Any, inputs: Any, models: Any) -> list[dict[str, Any]]:
        assert models == [inputs.model] == [odd]
        assert (settings.eval.k, settings.eval.num_samples) == ([1, 4], 4)
        return [one_metric(0.25)]

    pipeline.evaluate_models = evaluate_models  # type: ignore[attr-defined]
    arguments = ["eval", str(odd), desk.config, "eval.num_samples=4", "--k", "1,4"]
    done = desk.call(*arguments, "--json")
    assert (done.code, json.loads(done.out)) == (0, one_metric(0.25))
    done = desk.call(*arguments)
    assert done.code == 0
    assert ".250 .150–.350" in done.out


@pytest.mark.parametrize(
    ("error", "code", "last_line"),
    [
        (PlacementError("no GPU"), 3, "posttrain: no GPU"),
        (RunDirError("locked"), 2, "posttrain: locked"),
        (Interrupted("stopped"), 4, "posttrain: stopped"),
        (OSError(28, "No space left on device"), 3, "OSError: [Errno 28] No space left on device"),
    ],
)
def test_the_exit_code_is_the_errors_and_the_cause_comes_last(
    desk: Desk, pipeline: ModuleType, error: Exception, code: int, last_line: str
) -> None:
    def run(settings: Any, inputs: Any, *, fresh: bool) -> FakeResult:
        raise error

    pipeline.run = run  # type: ignore[attr-defined]
    done = desk.run("--json")
    assert (done.code, done.out) == (code, "")
    assert done.err.splitlines()[-1] == last_line


SLOW_COMMAND = """
import asyncio, signal, sys, time
from posttrain import cli

def ready():
    print("started", flush=True)

def asleep():
    ready()
    time.sleep(60)

def loop_of_callbacks():
    async def forever():
        loop = asyncio.get_running_loop()
        def spin():
            until = time.monotonic() + 0.05
            while time.monotonic() < until:
                pass
            loop.call_soon(spin)
        loop.call_soon(spin)
        # Said by a callback, so that the signal finds the loop running.
        loop.call_soon(ready)
        await asyncio.sleep(60)
    asyncio.run(forever())

def inside_ray():
    try:
        asleep()
    except SystemExit:
        sys.exit(1)

@cli.app.command("slow")
def slow(how: str):
    try:
        globals()[how]()
    except Exception:
        print("swallowed")
    finally:
        print("cleaned up")

cli.main()
"""


@pytest.mark.parametrize(
    ("how", "number"),
    [
        ("asleep", signal.SIGTERM),
        ("asleep", signal.SIGINT),
        # An exception out of a callback would be logged by asyncio and forgotten.
        ("loop_of_callbacks", signal.SIGTERM),
        # Ray turns what is raised inside ray.get into a SystemExit of its own.
        ("inside_ray", signal.SIGTERM),
    ],
)
def test_a_signal_cleans_up_and_ends_with_4(how: str, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_COMMAND, "slow", how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "started\n"
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 4
    assert out == "cleaned up\n"
    assert err == (
        f"posttrain: stopped by {number.name}; the same command goes on from the last stage or "
        "checkpoint\n"
    )


def test_handlers_are_put_back(desk: Desk) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    desk.call("--help")
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_doctor_lists_and_fails_when_something_is_missing(
    call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = [Finding("Python", True, "3.11"), Finding("GPU", None, "none")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert call("doctor") == (0, f"{'ok':8}{'Python':24}3.11\n{'-':8}{'GPU':24}none\n", "")
    findings.append(Finding("ray", False, "not installed"))
    done = call("doctor", "--json")
    assert done.code == 3
    assert json.loads(done.out) == {
        "findings": [
            {"name": "Python", "works": True, "detail": "3.11"},
            {"name": "GPU", "works": None, "detail": "none"},
            {"name": "ray", "works": False, "detail": "not installed"},
        ]
    }
    assert f"{'MISSING':8}{'ray':24}not installed" in call("doctor").out


@pytest.mark.parametrize(("gib", "works"), [(6.5, False), (7.5, True), (15.6, True)])
def test_a_machine_of_8_gb_is_large_enough(
    monkeypatch: pytest.MonkeyPatch, gib: float, works: bool
) -> None:
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": int(gib * 2**30 / 4096)}
    monkeypatch.setattr("posttrain.doctor.os.sysconf", pages.get)
    assert doctor._memory() == Finding(
        "memory", works, f"{gib:.1f} GiB (a machine of 8 GB suffices)"
    )


def test_doctor_survives_what_it_looks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("pytest", "no-such-package"))
    imports = {"good": "print('1.2')", "absent": "import no_such_module"}
    monkeypatch.setattr(doctor, "IMPORTS", imports)
    monkeypatch.setitem(sys.modules, "torch", None)
    found = {finding.name: finding for finding in doctor.examine()}
    assert found["Python"].works
    assert (found["pytest"].works, found["pytest"].detail) == (True, pytest.__version__)
    assert found["no-such-package"].works is False
    assert found["good"] == Finding("good", True, "1.2")
    assert found["absent"].works is False
    assert found["absent"].detail == "ModuleNotFoundError: No module named 'no_such_module'"
    assert found["GPU"].works is None
    assert "torch" in found["GPU"].detail
    monkeypatch.setattr(doctor, "IMPORTS", {"slow": "while True: pass"})
    monkeypatch.setattr(doctor, "IMPORT_DEADLINE_S", 0.2)
    assert Finding("slow", False, "did not import within 0.2 s") in doctor.examine()


def test_a_setting_that_trl_does_not_know_is_refused_before_anything_is_started() -> None:
    from posttrain.stages.trl_settings import check_trainer_settings

    check_trainer_settings("dpo", {"beta": 0.1, "learning_rate": 1e-6})
    with pytest.raises(SettingsError, match=r"sft\.trainer\.lerning_rate.*learning_rate\?"):
        check_trainer_settings("sft", {"lerning_rate": 1.0})
    with pytest.raises(SettingsError, match=r"sft\.trainer\.beta"):
        check_trainer_settings("sft", {"beta": 0.1})


def test_audit_tells_a_prompts_history_and_fails_on_what_is_no_run(
    call: Callable[..., Done], tmp_path: Path
) -> None:
    with RunDir.create_or_open(tmp_path / "run", {"run": {"seed": 0}}, fresh=False) as run:
        ledger = Ledger(run.ledger_path)
        attempt = ledger.open_attempt("rl", from_step=0)
        ledger.open_draw(
            draw_id="d1-0", prompt_id="p0", domain="sums", system=None,
            attempt=attempt, drawn_at_step=0,
        )  # fmt: skip
        ledger.close_draw("d1-0", DrawOutcome.TRAINED, step=1, num_scored=8, num_correct=3)
        ledger.close()
    done = call("audit", str(tmp_path / "run"))
    assert (done.code, done.err) == (0, "")
    assert "1" in done.out
    history = call("audit", str(tmp_path / "run"), "--prompt", "p0")
    assert history.code == 0
    assert len(history.out.splitlines()) == 2
    assert "trained" in history.out.splitlines()[1]
    unknown = call("audit", str(tmp_path / "run"), "--prompt", "p1")
    assert unknown.code == 2
    assert "p1" in unknown.err
    nothing = call("audit", str(tmp_path))
    assert nothing.code == 2
    assert str(tmp_path) in nothing.err
