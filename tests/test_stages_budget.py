"""How much SFT and DPO train, and when that is called heavy."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from posttrain.stages.budget import Budget, heavy, plan_budget
from posttrain.workers.trainer_settings import DPOSettings, SFTSettings


def plan(ranks: int = 1, **settings: object) -> Budget:
    """For 1000 rows of 100 tokens each."""
    stage = SFTSettings.model_validate(settings)
    return plan_budget(stage, rows=1000, tokens=100_000, ranks=ranks)


@pytest.mark.parametrize(
    ("settings", "passes", "trainer"),
    [
        ({}, 1.0, {"num_train_epochs": 1.0}),
        ({"trainer": {"num_train_epochs": 3}}, 3.0, {"num_train_epochs": 3.0}),
        ({"budget": {"epochs": 0.5}}, 0.5, {"num_train_epochs": 0.5}),
        ({"budget": {"tokens": 25_000}}, 0.25, {"num_train_epochs": 0.25}),
        # TRL's batches have 8 rows unless told otherwise.
        ({"budget": {"steps": 50}}, 0.4, {"max_steps": 50}),
        ({"trainer": {"max_steps": 50}}, 0.4, {"max_steps": 50}),
        (
            {
                "budget": {"steps": 50},
                "trainer": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
            },
            0.6,
            {"max_steps": 50},
        ),
        # 100 rows of 1000 tokens after packing, 8 of them a step: 80 rows.
        (
            {"budget": {"steps": 50}, "trainer": {"packing": True, "max_length": 1000}},
            4.0,
            {"max_steps": 50},
        ),
    ],
)
def test_a_budget_in_trls_words(
    settings: dict[str, object], passes: float, trainer: dict[str, object]
) -> None:
    found = plan(**settings)
    assert found.passes == pytest.approx(passes)
    assert found.trainer == trainer


def test_each_rank_has_a_batch_of_its_own() -> None:
    assert plan(ranks=4, budget={"steps": 50}).passes == pytest.approx(1.6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": {}}, "one of epochs, steps and tokens"),
        ({"budget": {"epochs": 1, "steps": 5}}, "one of epochs, steps and tokens"),
        ({"budget": {"steps": 0}}, "greater than 0"),
        (
            {"budget": {"steps": 5}, "trainer": {"num_train_epochs": 1}},
            "budget and trainer.num_train_epochs both say how much",
        ),
        ({"trainer": {"output_dir": "x"}}, "output_dir cannot be set here"),
        ({"trainer": {"deepspeed": "x"}}, "a table of its own"),
        ({"mining": None}, "no pairs"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, object], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        DPOSettings.model_validate(settings)


@pytest.mark.parametrize(
    ("passes", "rl_answers", "said"),
    [
        (1.0, None, None),
        (2.0, None, None),
        (2.5, None, r"sft: 2\.5 passes over 1000 rows are heavy"),
        (1.0, 1000, None),
        (1.0, 999, r"sft: 1000 sequences are heavy beside the 999 answers"),
        (0.5, 499, r"sft: 500 sequences"),
    ],
)
def test_what_is_heavy(passes: float, rl_answers: int | None, said: str | None) -> None:
    budget = Budget(passes=passes, trainer={})
    found = heavy("sft", budget, rows=1000, rl_answers=rl_answers)
    if said is None:
        assert found is None
    else:
        assert found is not None
        assert re.match(said, found)
