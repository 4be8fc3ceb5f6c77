"""What a run reads: found by name, checked, and handed to whoever works with it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from posttrain import pipeline
from posttrain.config import Settings, load
from posttrain.errors import ModelError, SettingsError
from posttrain.inputs import STARTER_POLICY, load_inputs
from posttrain.run_dir import fingerprint_directory

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


def small(path: Path, *overrides: str) -> Settings:
    return load(
        QUICKSTART,
        [
            f"run.dir={path / 'run'}",
            "stages=[screen]",
            "tasks.train=[{source: starter, size: 8}]",
            "tasks.held_out=[{source: starter, size: 4}]",
            *overrides,
        ],
    )


def test_models_of_rewards_are_found_as_others_are_and_served_from_there(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_policy.parent)
    named = f"rewards.reward_model={{model: {tiny_policy.name}}}"
    settings = small(tmp_path, "rewards.judge={model: starter, concurrency: 3}", named)
    inputs = load_inputs(settings)
    judge, classifier = inputs.rewards.judge, inputs.rewards.reward_model
    assert judge is not None and classifier is not None
    assert (judge.model, judge.concurrency) == (str(STARTER_POLICY.resolve()), 3)
    assert classifier.model == str(tiny_policy.resolve())
    assert pipeline._pools(tmp_path, settings, inputs.rewards)._rewards == inputs.rewards


@pytest.mark.parametrize(
    ("quotas", "said"),
    [
        ("{nowhere: 1}", "domain 'nowhere', which has no prompts; there are: arithmetic"),
        ("{arithmetic: 1}", "quotas say nothing about expressions, logic"),
        (
            "{arithmetic: 0, expressions: 0, logic: 0, number_theory: 0, programs: 0, sorting: 0, "
            "strings: 0}",
            "quotas sum to nothing",
        ),
    ],
)
def test_quotas_that_do_not_fit_the_tasks_are_refused_before_anything_runs(
    tmp_path: Path, quotas: str, said: str
) -> None:
    tasks = "tasks.train=[{source: starter, size: 64}]"
    with pytest.raises(SettingsError, match=said):
        load_inputs(small(tmp_path, "stages=[rl]", tasks, f"rl.curriculum.quotas={quotas}"))


def test_the_policy_of_a_run_can_judge(tmp_path: Path, tiny_policy: Path) -> None:
    run = tmp_path / "other"
    shutil.copytree(tiny_policy, run / "policy")
    (run / "config.yaml").write_text("format: posttrain run 3\n")
    inputs = load_inputs(small(tmp_path, f"rewards.judge={{model: {run}}}"))
    assert inputs.rewards.judge is not None
    assert inputs.rewards.judge.model == str((run / "policy").resolve())


def test_what_rewards_are_made_of_has_fingerprints(tmp_path: Path, tiny_policy: Path) -> None:
    own = "rewards.custom={short: 'custom_rewards:short'}"
    model = f"rewards.reward_model={{model: {tiny_policy}}}"
    source = (Path(__file__).parent / "custom_rewards.py").read_bytes()
    assert load_inputs(small(tmp_path, own, model)).reward_content == {
        "source of short": hashlib.sha256(source).hexdigest()[:16],
        "rewards.reward_model.model": fingerprint_directory(tiny_policy),
    }
    assert load_inputs(small(tmp_path)).reward_content == {}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("reward_model={model: ./nowhere}", r"^rewards\.reward_model\.model: '\./nowhere' is nei"),
        ("reward_model={model: EMPTY}", r"^rewards\.reward_model\.model: .* no readable checkpo"),
        ("judge={model: EMPTY}", r"^rewards\.judge\.model: .* no readable checkpoint"),
    ],
)
def test_a_model_of_rewards_that_is_none_starts_nothing(
    tmp_path: Path, section: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    named = section.replace("EMPTY", str(tmp_path / "empty"))
    with pytest.raises(ModelError, match=said):
        load_inputs(small(tmp_path, f"rewards.{named}"))
