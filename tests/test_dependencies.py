"""What a stage rests on: exactly what its result follows from, and what says so when it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.config import load, resolved
from posttrain.dependencies import (
    Table,
    changed_keys,
    describe_changes,
    evaluation_table,
    goes_on,
    stage_tables,
)

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
DATA = {"train": "t1", "held_out": "h1", "sft": "s1", "pairs": "d1"}
MODELS = {"policy": "p1"}
REWARDS = {"source of mine": "f1", "rewards.judge.model": "j1"}


def tables(
    *overrides: str,
    data: dict[str, str] = DATA,
    models: dict[str, str] = MODELS,
    rewards: dict[str, str] = REWARDS,
) -> dict[str, Table]:
    """Of the stages, and of their evaluations as `NAME evaluated`."""
    plain = resolved(load(QUICKSTART, overrides))
    stages = stage_tables(plain, data, models, rewards)
    measured = {
        f"{name} evaluated": evaluation_table(plain, data, rewards, name, table)
        for name, table in stages.items()
        if name != "screen"
    }
    return stages | measured


def changed(other: dict[str, Table], *base: str) -> set[str]:
    """Which of them differ from those of the quickstart, or of what it is with `base`."""
    before = tables(*base)
    assert before.keys() == other.keys()
    return {name for name in before if before[name] != other[name]}


EVALUATIONS = {f"{name} evaluated" for name in ("start", "sft", "rl", "dpo")}
ALL = {"screen", "sft", "rl", "dpo"} | EVALUATIONS - {"start evaluated"}
FROM_SFT = ALL - {"screen"}
FROM_RL = FROM_SFT - {"sft", "sft evaluated"}
DPO = {"dpo", "dpo evaluated"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("screen.judge.max_samples=5", ALL),
        ("sft.trainer.learning_rate=1e-5", FROM_SFT),
        ("rl.learner.learning_rate=1e-5", FROM_RL),
        ("rl.max_lag=0", FROM_RL),
        ("rl.rescreen={every_steps: 5}", FROM_RL),
        ("dpo.mining.samples=3", DPO),
        ("eval.num_samples=9", EVALUATIONS),
        ("rewards.instruction_weight=0.1", ALL | EVALUATIONS),
        ("run.seed=1", ALL | EVALUATIONS),
        ("resources.rollout.engine.dtype=bfloat16", ALL | EVALUATIONS),
        # How the work is spread, watched and kept changes nothing that is computed.
        ("run.dir=/elsewhere", set()),
        ("log.tensorboard=true", set()),
        ("resources.rollout.replicas=3", set()),
        ("resources.learner.ranks=2", set()),
        ("resources.deadline_s=1", set()),
        ("rl.checkpoint_every=7", set()),
        ("rl.export_every=7", set()),
        ("rl.evaluation={every_steps: 3, max_tokens: 96}", set()),
        ("rl.learner.step_deadline_s=9", set()),
        ("sft.threads=1", set()),
        ("screen.judge.concurrency=3", set()),
        ("eval.concurrency=3", set()),
        # By content, not by name.
        ("policy.model=/another/place", set()),
        ("tasks.train=[{source: elsewhere}]", set()),
        ("sft.data.source=elsewhere", set()),
    ],
)
def test_a_setting_concerns_what_follows_from_it(override: str, expected: set[str]) -> None:
    assert changed(tables(override)) == expected


JUDGED = "rewards.judge={endpoint: {url: 'http://here/v1', model: m}}"
RATED = "rewards.reward_model={model: m}"
SERVED = "rewards.judge={model: m, max_tokens: 64}"
RESCREENED = "rl.rescreen={every_steps: 5}"
DEDICATED = "rl.rescreen={placement: dedicated}"
JUDGES_DTYPE = "resources.rewards.judge.engine.dtype=bfloat16"
CRITICS_DTYPE = "resources.judge.engine.dtype=bfloat16"


@pytest.mark.parametrize(
    ("base", "override", "expected"),
    [
        (JUDGED, "rewards.judge.concurrency=3", set()),
        (JUDGED, "rewards.judge.deadline_s=3", set()),
        (JUDGED, "rewards.judge.retries=0", set()),
        (JUDGED, "rewards.judge.endpoint.url=http://there/v1", set()),
        (JUDGED, "rewards.judge.endpoint.api_key_env=KEY", set()),
        (JUDGED, "rewards.judge.endpoint.model=other", ALL | EVALUATIONS),
        (JUDGED, "rewards.judge.max_tokens=9", ALL | EVALUATIONS),
        (RATED, "rewards.reward_model.deadline_s=3", set()),
        (RATED, "rewards.reward_model.batch_size=3", set()),
        (RATED, "rewards.reward_model.device=cuda", set()),
        (RATED, "rewards.reward_model.dtype=bfloat16", ALL | EVALUATIONS),
        (RESCREENED, "rl.rescreen.concurrency=3", set()),
        (RESCREENED, "rl.rescreen.share=0.5", set()),
        (RESCREENED, "rl.rescreen.prompts=3", FROM_RL),
        # In another data type a model says something else.
        (SERVED, JUDGES_DTYPE, ALL | EVALUATIONS),
        (JUDGED, JUDGES_DTYPE, set()),
        (DEDICATED, CRITICS_DTYPE, FROM_RL),
        (RESCREENED, CRITICS_DTYPE, set()),
        # What runs into a verifier's deadline is wrong.
        ("run.seed=0", "rewards.deadline_s=20", ALL | EVALUATIONS),
        ("run.seed=0", "rewards.deadlines_s={exact: 20}", ALL | EVALUATIONS),
    ],
)
def test_how_rewards_are_spread_changes_nothing(
    base: str, override: str, expected: set[str]
) -> None:
    assert changed(tables(base, override), base) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"train": "t2"}, ALL),
        ({"held_out": "h2"}, EVALUATIONS),
        ({"sft": "s2"}, ALL),
        ({"pairs": "d2"}, DPO),
    ],
)
def test_data_concern_what_reads_them(data: dict[str, str], expected: set[str]) -> None:
    assert changed(tables(data=DATA | data)) == expected


def test_another_policy_concerns_everything() -> None:
    assert changed(tables(models={"policy": "p2"})) == ALL | {"start"} | EVALUATIONS


@pytest.mark.parametrize("what", REWARDS)
def test_what_rewards_are_made_of_concerns_all_that_scores(what: str) -> None:
    other = REWARDS | {what: "2"}
    assert changed(tables(rewards=other)) == ALL | EVALUATIONS
    alone, moved = (tables("stages=[sft]", rewards=made_of) for made_of in (REWARDS, other))
    assert alone["sft"] == moved["sft"]
    assert changed_keys(alone["sft evaluated"], moved["sft evaluated"]) == [what]


def test_models_of_rewards_count_by_content_and_not_by_name() -> None:
    here, there = (
        tables(f"rewards.judge={{model: {place}}}", f"rewards.reward_model={{model: {place}}}")
        for place in ("/here", "/there")
    )
    assert here == there
    assert here["rl"]["rewards.judge.model"] == "j1"
    assert "rewards.reward_model.model" not in here["rl evaluated"]


def test_a_stage_with_a_checkpoint_of_its_own_rests_on_that() -> None:
    own = "stages=[screen, rl]", "rl.model=x"
    first, other = (tables(*own, models={"policy": policy, "rl": "m1"}) for policy in ("p1", "p2"))
    assert first["rl"]["rl.model"] == "m1"
    assert "policy.model" not in first["rl"]
    # What screening found still counts, and screening asked the policy.
    assert changed_keys(first["rl"], other["rl"]) == ["after screen"]
    moved = tables(*own, models={"policy": "p1", "rl": "m2"})
    assert changed_keys(first["rl"], moved["rl"]) == ["rl.model"]
    critic = tables("stages=[screen, rl]", models={"policy": "p1", "screen": "c1"})
    assert critic["screen"]["screen.model"] == "c1"


def test_the_order_of_stages_is_part_of_what_they_rest_on() -> None:
    def before(*stages: str) -> dict[str, list[str]]:
        found = tables(f"stages=[{', '.join(stages)}]")
        return {
            name: sorted(key for key in found[name] if key.startswith("after ")) for name in stages
        }

    assert before("sft", "rl") == {"sft": [], "rl": ["after sft"]}
    assert before("rl", "sft") == {"rl": [], "sft": ["after rl"]}
    assert before("sft", "screen", "rl", "dpo") == {
        "sft": [],
        "screen": ["after sft"],
        "rl": ["after screen", "after sft"],
        "dpo": ["after rl"],
    }


def test_a_section_that_is_new_counts_for_every_stage() -> None:
    plain: dict[str, Any] = resolved(load(QUICKSTART))
    with_it = stage_tables(plain | {"unheard_of": {"model": "x"}}, DATA, MODELS, REWARDS)
    without = stage_tables(plain, DATA, MODELS, REWARDS)
    assert {name for name in without if with_it[name] != without[name]} == {
        "screen",
        "sft",
        "rl",
        "dpo",
    }


def test_what_has_changed_is_said_in_words() -> None:
    before = {
        "rl.num_steps": 3,
        "after sft": "x",
        "data.train": "1",
        "policy.model": "p",
        "rewards.judge.model": "j",
        "source of mine": "f",
        "same": 1,
    }
    now = {"rl.num_steps": 5, "after sft": "y", "data.train": "2", "rl.gate": None, "same": 1}
    assert describe_changes(before, now | {"source of mine": "g"}) == (
        "the stage sft before it; the content of tasks.train; the checkpoint policy.model; "
        "the checkpoint rewards.judge.model; rl.gate: (absent) → None; rl.num_steps: 3 → 5; "
        "the source of the reward mine"
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rl.num_steps=90"], True),
        (["rl.num_steps=44"], False),
        (["rl.num_steps=90", "rl.group_size=4"], False),
        (["rl.num_steps=90", "rl.learner.schedule=cosine"], False),
    ],
)
def test_only_rl_that_takes_more_steps_goes_on(overrides: list[str], expected: bool) -> None:
    assert goes_on("rl", tables()["rl"], tables(*overrides)["rl"]) is expected
    assert goes_on("dpo", tables()["dpo"], tables(*overrides)["dpo"]) is False


def test_a_schedule_over_all_steps_begins_anew() -> None:
    before, now = (tables(f"rl.num_steps={n}", "rl.learner.schedule=cosine") for n in (9, 10))
    assert not goes_on("rl", before["rl"], now["rl"])
