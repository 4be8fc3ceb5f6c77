"""Settings are read strictly, and what is wrong with them is said by key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.config import Settings, load, read_yaml, resolved
from posttrain.errors import SettingsError

MINIMAL: dict[str, Any] = {
    "run": {"dir": "runs/test"},
    "policy": {"model": "some/model", "max_length": 1024},
    "tasks": {"train": [{"source": "a.jsonl"}], "held_out": [{"source": "b.jsonl"}]},
    "sft": {"data": {"source": "c.jsonl"}},
}


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_defaults_stand_beside_what_the_file_states(minimal: Path) -> None:
    settings = load(minimal)
    assert settings.stages == ["screen", "sft", "rl", "dpo"]
    assert (settings.run.dir, settings.run.seed) == ("runs/test", 0)
    assert settings.rl.group_size == 8
    assert settings.rl.learner.loss.kind == "cispo"
    assert settings.screen.selection.drop_easiest == 0.5
    assert settings.max_answer_tokens == 512


def test_overrides_are_yaml_and_reach_any_depth(minimal: Path) -> None:
    settings = load(
        minimal,
        [
            "rl.learner.learning_rate=3e-5",
            "stages=[rl, dpo]",
            "tasks.train=[{source: starter, size: 64, seed: 2}]",
            "sft.trainer.report=[]",
            "dpo.mining.pairs_per_prompt=1",
            "run.dir=a=b",
        ],
    )
    assert settings.rl.learner.learning_rate == 3e-5
    assert settings.stages == ["rl", "dpo"]
    assert (settings.tasks.train[0].source, settings.tasks.train[0].size) == ("starter", 64)
    assert settings.sft.trainer == {"report": []}
    assert settings.dpo.mining.pairs_per_prompt == 1
    assert settings.run.dir == "a=b"


def test_the_last_override_of_a_key_holds(minimal: Path) -> None:
    assert load(minimal, ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001"])
def test_a_number_is_a_number_where_no_type_is_known(minimal: Path, text: str) -> None:
    """YAML 1.1 reads 1e-4 as a text; it would reach the trainer as one."""
    assert load(minimal, [f"sft.trainer.learning_rate={text}"]).sft.trainer == {
        "learning_rate": 1e-4
    }


@pytest.mark.parametrize("text", ["e5", "1e", "12e5f0", "2026-11-21e", "1_0e"])
def test_what_only_looks_like_a_number_stays_a_text(minimal: Path, text: str) -> None:
    assert load(minimal, [f"sft.trainer.run_name={text}"]).sft.trainer == {"run_name": text}


def test_resolved_settings_read_back_as_the_same(minimal: Path, tmp_path: Path) -> None:
    settings = load(minimal, ["rl.num_steps=3", "rl.groups_per_step=5"])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(resolved(settings)))
    assert load(again) == settings
    assert settings.rl.starvation_draws == 200


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("rl.num_step=3", "rl.num_step: unknown setting. Did you mean rl.num_steps?"),
        ("rll.num_steps=3", "rll: unknown setting. Did you mean rl?"),
        ("num_steps=3", "num_steps: unknown setting. Did you mean rl.num_steps?"),
        ("rl.learning_rate=1", "Did you mean rl.learner.learning_rate?"),
        ("screen.max_tokens=9", "Did you mean screen.judge.max_tokens?"),
        ("policy.seed=9", "Did you mean run.seed?"),
        ("rl.dtype=float32", "Did you mean rl.learner.dtype?"),
        ("sft.data.sorce=x", "Did you mean sft.data.source?"),
        ("tasks.train=[{source: x, sise: 3}]", "tasks.train.0.sise: unknown setting. Did you mean"),
        (
            "run.zzz=1",
            "run.zzz: unknown setting. Known here: copy_deadline_s, dir, seed, work_dir.",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(
    minimal: Path, override: str, hint: str
) -> None:
    assert hint in complaint(minimal, override)


def test_an_unknown_key_in_the_file_is_named_too(minimal: Path) -> None:
    minimal.write_text(yaml.safe_dump(MINIMAL | {"rl": {"grup_size": 4}}))
    assert complaint(minimal) == (
        f"{minimal}: rl.grup_size: unknown setting. Did you mean rl.group_size?"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rl.num_steps=abc", ("rl.num_steps", "integer", "'abc'")),
        ("rl.group_size=1", ("rl.group_size", "greater than or equal to 2", "1")),
        ("rl.num_steps=2.5", ("rl.num_steps", "integer", "2.5")),
        ("policy.dtype=float17", ("policy.dtype", "'float32' or 'bfloat16'", "'float17'")),
        ("rl=3", ("rl", "a section of settings was expected", "3")),
        ("rl=", ("rl", "a section of settings was expected", "None")),
        ("tasks.train=x.jsonl", ("tasks.train", "list", "'x.jsonl'")),
        ("stages=[rll]", ("stages.0", "'screen', 'sft', 'rl' or 'dpo'", "'rll'")),
        ("eval.k=[1,x]", ("eval.k.1", "integer", "'x'")),
        ("dpo.mining.cases=[rude]", ("dpo.mining.cases.0", "'wrong'", "'rude'")),
        ("run.seed=-1", ("run.seed", "greater than or equal to 0", "-1")),
        ("rl.curriculum.quotas={a: -1}", ("rl.curriculum.quotas.a", "greater", "-1")),
    ],
)
def test_a_wrong_type_or_value_names_key_expectation_and_value(
    minimal: Path, override: str, said: tuple[str, ...]
) -> None:
    message = complaint(minimal, override)
    assert override in message
    for part in said:
        assert part in message.removeprefix(f"{minimal} with {override}")


def test_every_problem_is_told_at_once_and_only_real_ones(minimal: Path) -> None:
    message = complaint(minimal, "rl.group_size=one", "policy.max_length=0", "evil=1")
    assert len(message.splitlines()) == 4
    for key in ("rl.group_size", "policy.max_length", "evil"):
        assert f"\n  {key}: " in message


def test_what_has_no_default_must_be_set(minimal: Path) -> None:
    minimal.write_text("stages: [rl]\n")
    message = complaint(minimal)
    for key in ("run", "policy", "tasks"):
        assert f"{key}: must be set" in message
    assert "got" not in message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages=[rl, rl]"], "stages: each of screen, sft, rl, dpo at most once"),
        (["stages=[]"], "stages: each of screen, sft, rl, dpo at most once and at least one"),
        (["stages=[rl, screen]"], "stages: ['rl', 'screen'] screens for nobody"),
        (["stages=[screen, dpo]"], "stages: ['screen', 'dpo'] screens for nobody"),
        (["rl.model=x"], "rl.model: rl would start from it, and nobody would use the policy that"),
        (["sft.data="], "sft.data: the stage sft has no input"),
        (["eval.max_tokens=1024"], "eval.max_tokens = 1024 leaves no room for a prompt in policy"),
        (["rl.max_tokens=2000"], "rl.max_tokens = 2000"),
        (
            ["rl.draw_deadline_s=900"],
            "rl.draw_deadline_s = 900 is never reached: after resources.rollout.engine.deadline_s "
            "= 900 the engine has failed",
        ),
        (["eval.k=[0]"], "eval.k: k must be positive"),
        (["eval.k=[1,16]"], "eval: pass@16 needs as many answers a prompt; eval.num_samples is 8"),
        (
            ["screen.selection={easy_above: 0.9, drop_easiest: 0.5}"],
            "screen.selection: set exactly one of",
        ),
        (
            ["screen.selection={metric: grade, drop_below: 3}"],
            "screen: screening has answers alone to select by, no grade",
        ),
        (
            ["system_instructions=[{name: a, text: x}, {name: a, text: y}]"],
            "system_instructions: each name may stand once, got ['a', 'a']",
        ),
        (
            ["system_instructions=[{name: a, text: x, weight: 0}]"],
            "system_instructions: every weight is 0",
        ),
        (
            ["system_instructions=[{name: a, text: x, pattern: '['}]"],
            "system_instructions.0: '[' is no regular expression",
        ),
        (
            ["system_instructions=[{name: a, pattern: x}]"],
            "system_instructions.0: a pattern needs a text",
        ),
    ],
)
def test_settings_that_contradict_each_other(
    minimal: Path, overrides: list[str], said: str
) -> None:
    assert said in complaint(minimal, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["stages=[rl, sft]"],
        ["stages=[dpo, rl]"],
        ["stages=[sft, screen, rl]"],
        ["stages=[screen]"],
        ["stages=[screen, rl]", "rl.model=x", "screen.model=y"],
        ["stages=[screen, sft, rl, dpo]", "screen.model=y", "sft.model=x"],
        ["stages=[dpo]", "dpo.model=x", "rl.model=not-used"],
    ],
)
def test_stages_come_in_any_order_in_which_each_is_of_use(
    minimal: Path, overrides: list[str]
) -> None:
    settings = load(minimal, overrides)
    assert f"stages=[{', '.join(settings.stages)}]" == overrides[0]
    assert set(settings.own_models) <= set(settings.stages)


def test_an_engine_waits_longer_than_a_draw_where_there_are_draws(minimal: Path) -> None:
    slow = "rl.draw_deadline_s=3600"
    assert load(minimal, [slow, "resources.rollout.engine.deadline_s=3601"])
    assert load(minimal, [slow, "stages=[screen, sft]"])


def test_a_stage_that_is_left_out_needs_no_input(minimal: Path) -> None:
    assert load(minimal, ["stages=[rl]", "sft.data="]).sft.data is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rl", "'rl' is no override; write key.sub=value"),
        ("=3", "'=3' is no override"),
        ("rl.num_steps=[", "'rl.num_steps=[': the value is no YAML"),
        ("run.dir.deeper=1", "run.dir has no settings below it, it is 'runs/test'"),
        ("tasks.train.0.size=1", "tasks.train has no settings below it"),
    ],
)
def test_a_bad_override_is_quoted(minimal: Path, override: str, said: str) -> None:
    assert said in complaint(minimal, override)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [1", "is no YAML"),
        (b"\xff\xfe\x00", "is no YAML"),
        (b"", "a mapping of settings was expected"),
        (b"- rl\n", "a mapping of settings was expected"),
    ],
)
def test_a_file_that_holds_no_settings(minimal: Path, content: bytes, said: str) -> None:
    minimal.write_bytes(content)
    message = complaint(minimal)
    assert str(minimal) in message
    assert said in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("zero_optimization={stage: 3}", "zero_optimization.stage cannot .* rl.learner.zero_stage"),
        ("optimizer.params.lr=7", "optimizer cannot be set here: set rl.learner.learning_rate"),
        ("scheduler={type: x}", "scheduler cannot be set here: set rl.learner.schedule"),
        ("gradient_accumulation_steps=4", "cut by rl.micro_tokens"),
        ("expert_parallel={enabled: true}", "set rl.learner.expert_parallel"),
        ("zero_optimization=null", "zero_optimization is a table, got None"),
    ],
)
def test_what_has_a_setting_is_not_set_behind_its_back(
    minimal: Path, override: str, said: str
) -> None:
    assert re.search(said, complaint(minimal, f"rl.learner.deepspeed.{override}"))
    tuned = load(minimal, ["rl.learner.deepspeed.zero_optimization.reduce_bucket_size=1000"])
    assert tuned.rl.learner.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000}}


@pytest.mark.parametrize("pool", ["rollout", "judge"])
def test_an_engine_of_the_policy_takes_no_length_of_its_own(minimal: Path, pool: str) -> None:
    said = complaint(minimal, f"resources.{pool}.engine.max_model_len=4096")
    assert f"resources.{pool}: engine.max_model_len = 4096 would change nothing" in said
    assert load(minimal, ["resources.rewards.judge.engine.max_model_len=8192"])


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("rl:\n  num_steps: 500\nsft: {}\nrl:\n  group_size: 8\n")
    with pytest.raises(SettingsError, match=r"(?s)rl stands twice, first.*line 1,.*line 4,"):
        read_yaml(file)
    file.write_text("a: &a {x: 1}\nb: &b {y: 2}\nc: {<<: *a, <<: *b}\n")
    assert read_yaml(file)["c"] == {"x": 1, "y": 2}
    file.write_text("dir: {{ base }}/x\n")  # a template that nobody filled in
    with pytest.raises(SettingsError, match="is no YAML"):
        read_yaml(file)
    # What is merged in from an anchor is no second time, however deep the anchor stands.
    file.write_text("c: &c {x: 1}\na: {b: &b {<<: *c, x: 2}}\nd: {<<: *b, x: 3}\n")
    assert read_yaml(file) == {"c": {"x": 1}, "a": {"b": {"x": 2}}, "d": {"x": 3}}


def test_an_override_stays_out_of_sections_that_share_an_anchor(minimal: Path) -> None:
    content = yaml.safe_load(minimal.read_text())
    trl = content["sft"] | {"deepspeed": {"zero_optimization": {"stage": 3}}}
    minimal.write_text(
        yaml.safe_dump(content | {"sft": trl, "dpo": {"deepspeed": trl["deepspeed"]}})
    )
    assert "*" in minimal.read_text()  # one table in two places
    settings = load(minimal, ["sft.deepspeed.zero_optimization.stage=2"])
    stages = [s.deepspeed["zero_optimization"]["stage"] for s in (settings.sft, settings.dpo)]
    assert stages == [2, 3]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert f"{tmp_path / 'no.yaml'} cannot be read: No such file" in complaint(tmp_path / "no.yaml")
    assert f"{tmp_path} cannot be read: Is a directory" in complaint(tmp_path)


def test_the_quickstart_is_valid() -> None:
    settings = load(Path(__file__).parent.parent / "configs" / "quickstart.yaml")
    assert isinstance(settings, Settings)
    assert settings.sft.trainer["learning_rate"] == 1e-4
