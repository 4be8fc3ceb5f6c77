"""The lag bound: exhaustively for small numbers, at random for larger ones."""

from __future__ import annotations

import copy
import doctest
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.online import admission as admission_module
from posttrain.online.admission import Admission


def test_the_example_in_the_docstring_runs() -> None:
    result = doctest.testmod(admission_module)
    assert result.attempted > 10
    assert result.failed == 0


@pytest.mark.parametrize(
    ("groups_per_step", "max_lag", "window", "bound"),
    [(8, 1, 1, 1), (8, 0, 1, 0), (16, 3, 1, 3), (8, 1, 9, 2), (1, 1, 3, 3), (4, 2, 4, 3)],
)
def test_bound_is_the_formula(groups_per_step: int, max_lag: int, window: int, bound: int) -> None:
    admission = Admission(groups_per_step=groups_per_step, max_lag=max_lag, window=window)
    assert admission.lag_bound == bound
    assert admission.num_slots == groups_per_step * (max_lag + 1)


def test_slots_are_charged_until_the_weights_are_served() -> None:
    admission = Admission(groups_per_step=1, max_lag=1, window=1)
    admission.admit("a")
    admission.admit("b")
    admission.ready("a")
    assert admission.release(1) == ["a"]
    assert admission.num_free == 0
    admission.free(["a"])
    assert admission.num_free == 1


def test_window_stays_with_the_straggler() -> None:
    admission = Admission(groups_per_step=1, max_lag=4, window=3)
    for draw_id in "abcde":
        admission.admit(draw_id)
    for draw_id in "bcde":
        admission.ready(draw_id)
    assert [admission.release(1) for _ in range(3)] == [["b"], ["c"], None]
    admission.ready("a")
    assert [admission.release(1) for _ in range(3)] == [["a"], ["d"], ["e"]]


def test_ended_draws_vanish_from_the_order() -> None:
    admission = Admission(groups_per_step=1, max_lag=4, window=2)
    for draw_id in "abcde":
        admission.admit(draw_id)
    admission.end("b")
    admission.end("c")
    admission.ready("d")
    admission.ready("e")
    assert admission.release(2) is None  # a holds the window: d is next to it, e is not
    assert admission.release(1) == ["d"]
    admission.end("a")
    assert admission.release(1) == ["e"]
    assert admission.num_free == 3


@pytest.mark.parametrize("misuse", ["full", "twice", "unready", "untrained"])
def test_misuse_is_an_assertion(misuse: str) -> None:
    admission = Admission(groups_per_step=2, max_lag=0, window=1)
    admission.admit("a")
    with pytest.raises(AssertionError):
        if misuse == "full":
            admission.admit("b")
            admission.admit("c")
        elif misuse == "twice":
            admission.admit("a")
        elif misuse == "unready":
            admission.ready("a")
            admission.ready("a")
        else:
            admission.free(["a"])


@dataclass
class _Played:
    """An admission with the age of every draw, moved by an adversary."""

    admission: Admission
    ages: dict[str, int] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    training: list[str] = field(default_factory=list)
    drawn: int = 0
    worst: int = 0

    def moves(self) -> list[tuple[str, str]]:
        waiting = [d for d in self.ages if d not in self.ready]
        return [
            *([("admit", "")] if self.admission.num_free else []),
            *(("ready", d) for d in waiting),
            *(("end", d) for d in waiting),
            *([] if self.training else [("train", "")]),
            *([("publish", "")] if self.training else []),
        ]

    def play(self, move: str, draw_id: str, groups_per_step: int) -> None:
        if move == "admit":
            self.admission.admit(name := f"{self.drawn:06d}")
            self.drawn += 1
            self.ages[name] = 0
        elif move == "ready":
            self.admission.ready(draw_id)
            self.ready.add(draw_id)
        elif move == "end":
            self.admission.end(draw_id)
            del self.ages[draw_id]
        elif move == "train":
            self.training = self.admission.release(groups_per_step) or []
            for left in self.training:
                self.worst = max(self.worst, self.ages.pop(left))
                self.ready.remove(left)
                self.left.add(left)
        else:
            self.admission.free(self.training)
            self.training = []
            self.ages = {d: age + 1 for d, age in self.ages.items()}

    def key(self) -> tuple[object, ...]:
        """What the future depends on: the order with ages, and what left within it."""
        oldest = min(self.ages, default="~")
        order = sorted({*self.ages, *(d for d in self.left if d > oldest)})
        return (
            tuple((self.ages.get(d), d in self.ready) for d in order),
            len(self.training),
        )


@pytest.mark.parametrize(
    ("groups_per_step", "max_lag", "window"),
    [
        (1, 0, 1),
        (1, 1, 1),
        (1, 1, 2),
        (1, 1, 3),
        (1, 2, 1),
        (2, 0, 1),
        (2, 1, 1),
        (2, 1, 2),
        (2, 1, 4),
        (2, 2, 1),
        (3, 1, 2),
    ],
)
def test_every_schedule_keeps_the_bound_and_some_reaches_it(
    groups_per_step: int, max_lag: int, window: int
) -> None:
    """All reachable states, whatever the order of draws, answers, endings, steps and publishes."""
    first = _Played(Admission(groups_per_step=groups_per_step, max_lag=max_lag, window=window))
    bound = first.admission.lag_bound
    seen = {first.key()}
    frontier = [first]
    worst = 0
    while frontier:
        state = frontier.pop()
        for move, draw_id in state.moves():
            after = copy.deepcopy(state)
            after.play(move, draw_id, groups_per_step)
            worst = max(worst, after.worst)
            assert worst <= bound
            if after.key() not in seen:
                seen.add(after.key())
                frontier.append(after)
    assert worst == bound
    assert len(seen) > 3


@given(
    groups_per_step=st.integers(1, 5),
    max_lag=st.integers(0, 3),
    window=st.integers(1, 8),
    choices=st.lists(st.integers(0, 1000), min_size=20, max_size=300),
)
def test_random_schedules_keep_the_bound(
    groups_per_step: int, max_lag: int, window: int, choices: list[int]
) -> None:
    played = _Played(Admission(groups_per_step=groups_per_step, max_lag=max_lag, window=window))
    for choice in choices:
        moves = played.moves()
        move, draw_id = moves[choice % len(moves)]
        played.play(move, draw_id, groups_per_step)
        assert played.worst <= played.admission.lag_bound
        assert len(played.ages) + len(played.training) <= played.admission.num_slots
    if window == 1:
        assert played.worst <= max_lag
