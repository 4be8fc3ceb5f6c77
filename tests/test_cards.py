"""Model and dataset cards: what they say, and that they are no part of what is hashed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from inspect_runs import prompt, write_known_run

from posttrain.cards import pairs_card, policy_card, rollouts_card, write_policy_card
from posttrain.pair_table import write_pairs
from posttrain.run_dir import RunDir, hash_path
from posttrain.types import PreferencePair


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return write_known_run(tmp_path / "run")


def header(card: str) -> dict:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def pair(prompt_id: str, case: str, margin: float) -> PreferencePair:
    return PreferencePair(
        prompt=prompt(prompt_id),
        system=None,
        chosen="#1",
        rejected="#2",
        corner_case=case,
        margin=margin,
    )


def test_a_policy_says_how_it_was_made_and_how_good_it_is(run: RunDir) -> None:
    metrics = {name: record.metrics for name, record in run.stages().items()}
    del metrics["dpo"]
    card = policy_card(run.config(), metrics, "rl")
    assert header(card)["base_model"] == "starter"
    assert header(card)["tags"] == ["posttrain", "screen", "rl"]
    lines = card.splitlines()
    assert "1. screening by difficulty: samples 32" in lines
    assert "2. asynchronous online RL: done" in lines
    assert "| domain | start | rl |" in lines
    assert "| words | 0.250 [0.125, 0.375] | 0.500 [0.375, 0.625] |" in lines
    assert '- train tasks: `{"source": "t.jsonl"}`' in lines
    assert "  advantage: mean" in lines  # the settings of what was done
    assert "(seed 3)" in card


def test_cards_stand_beside_the_policy_and_are_not_hashed(run: RunDir) -> None:
    for directory in (run.stage_dir("rl") / "policy", run.policy_dir):
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
    before = hash_path(run.policy_dir)
    write_policy_card(run, "rl")
    assert hash_path(run.policy_dir) == before
    card = (run.policy_dir / "README.md").read_text()
    assert card == (run.stage_dir("rl") / "policy" / "README.md").read_text()
    assert "dpo" not in header(card)["tags"]  # begun, but after this policy


def test_stages_that_were_left_out_or_done_again_count_where_they_stand_now(run: RunDir) -> None:
    manifest = json.loads(run.manifest_path.read_text())
    stages = manifest["stages"]
    stages = {name: stages[name] for name in ("start", "dpo", "rl", "screen")}
    stages["dpo"] = stages["rl"]  # was done, and is no stage of the settings any more
    run.manifest_path.write_text(json.dumps(manifest | {"stages": stages}))
    config = run.config()
    config["settings"]["stages"] = ["screen", "rl"]
    run.config_path.write_text(yaml.safe_dump(config, sort_keys=False))
    (run.stage_dir("rl") / "policy").mkdir(parents=True)
    write_policy_card(run, "rl")
    card = (run.stage_dir("rl") / "policy" / "README.md").read_text()
    assert header(card)["tags"] == ["posttrain", "screen", "rl"]
    assert "| domain | start | rl |" in card.splitlines()


def test_a_policy_of_the_run_is_named_without_where_the_run_lies(run: RunDir) -> None:
    assert run.name_of(run.path / "rl" / "policy") == "rl/policy"
    assert run.name_of(Path("/models/mine")) == "/models/mine"


def test_pairs_are_counted_by_what_they_mend(tmp_path: Path) -> None:
    pairs = [pair("a1", "wrong", 1.0), pair("a2", "wrong", 0.5), pair("s1", "overlong", 0.25)]
    card = pairs_card(pairs, "rl/policy")
    assert header(card)["configs"] == [{"config_name": "default", "data_files": "pairs.jsonl"}]
    lines = card.splitlines()
    assert "| wrong | 2 | 0.750 |" in lines
    assert "| overlong | 1 | 0.250 |" in lines
    assert "| sums | 2 |" in lines

    write_pairs(tmp_path / "pairs.jsonl", pairs)
    first = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
    assert first == {
        "prompt": [{"role": "user", "content": "What is a1?"}],
        "chosen": "#1",
        "rejected": "#2",
        "corner_case": "wrong",
        "margin": 1.0,
    }


def test_the_answers_of_rl_load_with_datasets() -> None:
    settings = {"group_size": 8, "temperature": 1.0, "max_tokens": 96}
    card = rollouts_card({"draws": {"trained": 720, "stale": 1}}, settings)
    assert header(card)["configs"][0]["data_files"] == "*.parquet"
    assert "How draws ended: trained 720, stale 1." in card
