import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from judges.labels import MOST_ANSWERS, LabelSettings, confident_label, easy_from, label
from posttrain.types import Label

SETTINGS = LabelSettings()


@pytest.mark.parametrize(
    ("n", "c", "expected"),
    [
        (0, 0, None),
        (8, 8, None),  # P(p > .9) = .813
        (12, 12, None),  # .892
        (13, 13, Label.EASY),  # .905
        (8, 4, Label.MEDIUM),  # P(.25 ≤ p ≤ .9) = .940
        (4, 2, None),  # .858
        (5, 0, None),  # P(p < .25) = .918, but hard or unsolved is open until the cap
        (8, 1, None),  # .783
        (12, 1, Label.HARD),
        (16, 15, Label.MEDIUM),  # nothing is confident: P(p > .9) = .655
        (16, 1, Label.HARD),
        (16, 3, Label.MEDIUM),  # nothing is confident
        (16, 0, Label.UNSOLVED),
        (17, 0, Label.UNSOLVED),
    ],
)
def test_labels_at_a_cap_of_16(n, c, expected):
    assert label(n, c, cap=16, settings=SETTINGS) is expected


def test_confidence_is_told_apart_from_the_cap():
    assert confident_label(16, 15, SETTINGS) is None
    assert confident_label(16, 1, SETTINGS) is Label.HARD


def test_bounds_and_confidence_are_settings():
    assert label(8, 8, 16, LabelSettings(confidence=0.8)) is Label.EASY
    assert label(8, 8, 16, LabelSettings(easy_above=0.8)) is Label.EASY
    assert label(8, 1, 16, LabelSettings(hard_below=0.4)) is Label.HARD


@pytest.mark.parametrize(
    ("settings", "fewest"),
    [
        (SETTINGS, 13),
        (LabelSettings(confidence=0.8), 8),
        (LabelSettings(easy_above=0.999999), MOST_ANSWERS),
    ],
)
def test_the_fewest_answers_that_make_a_prompt_easy(settings, fewest):
    assert easy_from(settings) == fewest
    assert confident_label(fewest - 1, fewest - 1, settings) is not Label.EASY


@given(st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_something_is_said_at_the_cap_and_unsolved_means_no_success(counts):
    n, c = counts
    said = label(n, c, cap=n, settings=SETTINGS)
    assert said is not None
    assert (said is Label.UNSOLVED) == (c == 0)


@given(st.integers(1, 40))
def test_more_correct_answers_never_make_a_prompt_harder(n):
    order = [Label.UNSOLVED, Label.HARD, Label.MEDIUM, Label.EASY]
    ranks = [order.index(label(n, c, n, SETTINGS)) for c in range(n + 1)]
    assert ranks == sorted(ranks)


def test_settings_refuse_bounds_out_of_order():
    with pytest.raises(ValidationError, match=r"hard_below=0\.9 must lie below easy_above=0\.9"):
        LabelSettings(hard_below=0.9)
    with pytest.raises(ValidationError, match="confidence"):
        LabelSettings(confidence=0.5)
