"""System instructions are drawn as often as their weights say, the same way for the same seed."""

from __future__ import annotations

from collections import Counter

import pytest
from pydantic import ValidationError

from posttrain.data.instructions import InstructionMix, InstructionSettings
from posttrain.errors import DataError

PLAIN = InstructionSettings(name="plain", weight=3)
BRIEF = InstructionSettings(name="brief", text="Answer only.", pattern="#.*")
STEPS = InstructionSettings(name="steps", text="Show steps.", weight=2)


def names(mix: InstructionMix, count: int) -> list[str | None]:
    drawn = (mix.draw(number) for number in range(count))
    return [None if system is None else system.name for system in drawn]


def test_draws_follow_the_weights() -> None:
    drawn = Counter(names(InstructionMix([PLAIN, BRIEF, STEPS], seed=0), 6000))
    # Standard deviations are at most sqrt(6000/4) = 39.
    assert drawn[None] == pytest.approx(3000, abs=160)
    assert drawn["brief"] == pytest.approx(1000, abs=160)
    assert drawn["steps"] == pytest.approx(2000, abs=160)
    assert drawn.total() == 6000


def test_a_seed_fixes_the_draws() -> None:
    first, same, other = (InstructionMix([PLAIN, BRIEF, STEPS], seed=s) for s in (1, 1, 2))
    drawn = names(first, 50)
    assert names(same, 50) == drawn
    assert names(other, 50) != drawn


def test_without_entries_nothing_is_ever_shown() -> None:
    mix = InstructionMix([], seed=0)
    assert names(mix, 20) == [None] * 20
    assert mix.by_name == {}


def test_weight_zero_is_never_drawn_but_known_by_name() -> None:
    brief = BRIEF.model_copy(update={"weight": 0.0})
    mix = InstructionMix([brief, STEPS], seed=0)
    assert set(names(mix, 200)) == {"steps"}
    resolved = mix.resolve("brief")
    assert resolved is not None
    assert (resolved.name, resolved.text, resolved.pattern) == ("brief", "Answer only.", "#.*")


def test_names_resolve_and_unknown_ones_are_refused() -> None:
    mix = InstructionMix([PLAIN, BRIEF, STEPS], seed=0)
    assert mix.resolve(None) is None
    with pytest.raises(DataError, match=r"no 'loud' with a text, only: brief, steps"):
        mix.resolve("loud")
    with pytest.raises(DataError, match=r"no 'plain' with a text"):
        mix.resolve("plain")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": ""}, "at least 1 character"),
        ({"name": "a", "weight": -1}, "greater than or equal to 0"),
        ({"name": "a", "text": "x", "pattern": "(["}, "is no regular expression"),
        ({"name": "a", "pattern": "x"}, "a pattern needs a text"),
    ],
)
def test_entries_that_cannot_work(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        InstructionSettings.model_validate(fields)
