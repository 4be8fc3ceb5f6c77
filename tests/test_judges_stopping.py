import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.labels import LabelSettings
from judges.selection import SelectionSettings, choose
from judges.stopping import (
    CUT,
    LABEL,
    Cell,
    CutRule,
    FixedN,
    LabelRule,
    PurposeRule,
    weighted_cut,
    with_purpose,
)


def cut_rule(population, confidence=0.9, **selection) -> CutRule:
    rule = CutRule(SelectionSettings(**selection), confidence)
    rule.follow(population)
    return rule


def test_a_threshold_is_left_behind_once_a_side_is_sure():
    rule = cut_rule({Cell(0, 4, 2): 1}, easy_above=0.9)
    # P(p > .9): 4/4 .65, 8/8 .81, 13/13 .90; 4/3 .14, 4/2 .01.
    assert rule.is_open(Cell(0, 4, 4))
    assert rule.is_open(Cell(0, 12, 12))
    assert not rule.is_open(Cell(0, 13, 13))
    assert rule.is_open(Cell(0, 4, 3))
    assert not rule.is_open(Cell(0, 4, 2))
    # On the far side of a threshold a prompt without success is as decided as any.
    assert not rule.is_open(Cell(0, 4, 0))
    assert not rule.breadth_first


def test_the_unsolved_are_asked_to_the_cap_where_they_are_dropped():
    assert cut_rule({}, easy_above=0.9, drop_unsolved=True).is_open(Cell(0, 15, 0))
    assert cut_rule({Cell(0, 4, 2): 1}, drop_easiest=0.95).is_open(Cell(0, 15, 0))
    # By a threshold they go when more than 90% are above it.
    mostly_easy = {Cell(0, 16, 16): 19, Cell(0, 4, 0): 1}
    assert cut_rule(mostly_easy, easy_above=0.9).is_open(Cell(0, 4, 0))
    assert not cut_rule(mostly_easy, easy_above=0.9, drop_unsolved=False).is_open(Cell(0, 4, 0))


def test_a_quantiles_cut_follows_the_prompts():
    # 4/0, 4/2, 4/4 have means .1, .5, .9; unsampled prompts have no say.
    population = {Cell(0, 4, 0): 10, Cell(0, 4, 2): 2, Cell(0, 4, 4): 10, Cell(0, 0, 0): 99}
    rule = cut_rule(population, drop_easiest=0.5)  # the cut runs through 4/2, at .5
    assert [rule.is_open(Cell(0, 4, c)) for c in range(5)] == [False, True, True, True, False]
    assert rule.is_open(Cell(0, 0, 0))
    assert rule.breadth_first
    rule.follow({**population, Cell(0, 4, 4): 40})  # now it runs through 4/4, at .9
    assert [rule.is_open(Cell(0, 4, c)) for c in range(5)] == [False, False, False, True, True]


def test_prompts_of_both_purposes_are_open_while_either_rule_is():
    cut = CutRule(SelectionSettings(drop_easiest=0.5), 0.9)
    rule = PurposeRule(cut, LabelRule(LabelSettings()))
    codes = with_purpose(np.array([0, 0, 0]), np.array([CUT, LABEL, CUT | LABEL])).tolist()
    of_cut, of_label, of_both = codes
    assert len({*codes}) == 3
    # Those that are for a label only have no say in the cut, however many they are.
    rule.follow({Cell(of_cut, 4, 0): 9, Cell(of_both, 4, 4): 9, Cell(of_label, 4, 4): 99})
    cells = [(0, 4), (2, 4), (4, 4), (3, 5), (13, 13)]
    found = {code: [rule.is_open(Cell(code, n, c)) for c, n in cells] for code in codes}
    assert found == {
        of_cut: [False, True, False, True, False],
        of_label: [True, True, True, False, False],
        of_both: [True, True, True, True, False],
    }
    assert rule.breadth_first


def test_each_domain_has_its_own_cut():
    population = {Cell(0, 4, 0): 10, Cell(0, 4, 4): 1, Cell(1, 4, 4): 10, Cell(1, 4, 0): 1}
    apart = cut_rule(population, drop_easiest=0.5, by_domain=True)
    assert [apart.is_open(Cell(d, 4, c)) for d in (0, 1) for c in (0, 4)] == [
        *(True, False),
        *(False, True),
    ]
    assert not apart.is_open(Cell(2, 4, 4))  # a domain that has not been sampled yet
    together = cut_rule(population, drop_easiest=0.5)
    assert together.is_open(Cell(0, 4, 0)) == together.is_open(Cell(1, 4, 0))


def test_pass_at_k_moves_the_side():
    # pass@8 > .9 means p > 1 - .1^(1/8) = .25.
    rule = cut_rule({Cell(0, 4, 2): 1}, metric="pass@k", k=8, easy_above=0.9)
    assert not rule.is_open(Cell(0, 8, 5))
    assert rule.is_open(Cell(0, 8, 2))


def test_labels_and_fixed_n():
    rule = LabelRule(LabelSettings())
    assert [rule.is_open(Cell(0, n, n)) for n in (12, 13)] == [True, False]
    assert rule.is_open(Cell(0, 16, 0))
    assert FixedN().is_open(Cell(0, 100, 50))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5)), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.25, 0.5, 0.9]),
)
def test_the_weighted_cut_is_where_selection_cuts(cells, share):
    values, weights = (np.array(column, dtype=float) for column in zip(*cells, strict=True))
    every = np.repeat(values, weights.astype(int))
    zeros = np.zeros(len(every), dtype=int)
    ties = np.arange(len(every), dtype=np.uint64)
    selection = choose(every, zeros > 0, zeros, ties, SelectionSettings(drop_easiest=share))
    cut = weighted_cut(values, weights, share)
    assert np.all(every[selection.kept] <= cut)
    assert np.all(every[~selection.kept] >= cut)


def test_a_cut_between_two_prompts_is_halfway():
    values, weights = np.array([0.2, 0.8, 0.4]), np.array([1.0, 2.0, 1.0])
    assert weighted_cut(values, weights, 0.5) == pytest.approx(0.6)
    assert weighted_cut(values, weights, 0.25) == 0.8
    assert weighted_cut(values, weights, 0.0) == 0.8
