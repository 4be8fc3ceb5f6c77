"""The lag bound and the mix: exhaustively for small numbers, at random for larger ones."""

from __future__ import annotations

import copy
import doctest
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.online import admission as admission_module
from posttrain.online.admission import Admission


def planned(admission: Admission, *batches: str) -> Admission:
    """A seat per letter, each the name of a domain."""
    for batch in batches:
        admission.plan(list(batch))
    return admission


def admit(admission: Admission, draw_ids: str) -> None:
    for draw_id in draw_ids:
        assert admission.vacant is not None
        admission.admit(draw_id, admission.vacant)


def test_the_example_in_the_docstring_runs() -> None:
    result = doctest.testmod(admission_module)
    assert result.attempted > 10
    assert result.failed == 0


def test_slots_are_charged_until_the_weights_are_served() -> None:
    admission = planned(Admission(groups_per_step=1, max_lag=1), "x", "x")
    admit(admission, "ab")
    admission.ready("a")
    assert admission.release() == ["a"]
    assert (admission.vacant, admission.needs_plan) == (None, False)
    admission.trained()
    assert (admission.vacant, admission.needs_plan) == (None, True)
    admission.plan(["x"])
    assert admission.vacant == "x"


def test_a_batch_waits_for_every_domain_and_holds_what_was_planned() -> None:
    admission = planned(Admission(groups_per_step=3, max_lag=1), "xxy", "xyy")
    admit(admission, "abcdef")
    for draw_id in "abdef":
        admission.ready(draw_id)
    # One of y may be overtaken by the others, two of x leave with the batch: a and b before d.
    assert admission.release() == ["a", "b", "e"]
    admission.trained()
    assert admission.plans == [["x", "y", "y"]]
    assert admission.release() is None  # c is still missing
    admission.end("c")
    assert admission.vacant == "y"
    admission.admit("g", "y")
    assert admission.release() is None
    admission.ready("g")
    assert admission.release() == ["d", "f", "g"]


def test_what_was_drawn_later_may_be_overtaken_longer() -> None:
    admission = planned(Admission(groups_per_step=1, max_lag=2), "x", "x", "x")
    admit(admission, "abc")
    admission.ready("c")
    assert admission.release() == ["c"]
    admission.trained()
    planned(admission, "x")
    admit(admission, "d")
    admission.ready("d")
    # a and b have to leave in this step and the next, so d may not go before both.
    assert admission.release() is None
    admission.ready("b")
    assert admission.release() == ["b"]


def test_a_straggler_may_be_overtaken_for_as_many_steps_as_is_said() -> None:
    admission = planned(Admission(groups_per_step=1, max_lag=0, straggler_lag=2), "x")
    assert (admission.num_slots, admission.lag_bound) == (1, 2)
    admission = planned(Admission(groups_per_step=1, max_lag=1, straggler_lag=1), "x", "x")
    admit(admission, "ab")
    left = []
    for draw_id in "bcd":
        admission.ready(draw_id)
        left.append(admission.release())
        if left[-1] is not None:
            admission.trained()
            planned(admission, "x")
            admission.admit(chr(ord(draw_id) + 1), "x")
    assert left == [["b"], ["c"], None]


def test_a_seat_that_is_passed_on_takes_the_other_domain() -> None:
    admission = planned(Admission(groups_per_step=2, max_lag=1), "xy", "xy")
    admit(admission, "abcd")
    admission.end("b")
    assert admission.vacant == "y"
    admission.pass_on("y", to="x")
    assert admission.plans == [["x", "y"], ["x", "x"]]
    assert admission.vacant == "x"


@pytest.mark.parametrize("misuse", ["full", "other", "twice", "unready", "untrained", "planned"])
def test_misuse_is_an_assertion(misuse: str) -> None:
    admission = planned(Admission(groups_per_step=2, max_lag=0), "xx")
    admission.admit("a", "x")
    with pytest.raises(AssertionError):
        if misuse == "full":
            admission.admit("b", "x")
            admission.admit("c", "x")
        elif misuse == "other":
            admission.admit("b", "y")
        elif misuse == "twice":
            admission.admit("a", "x")
        elif misuse == "unready":
            admission.ready("a")
            admission.ready("a")
        elif misuse == "planned":
            admission.plan(["x", "x"])
        else:
            admission.trained()


@dataclass
class _Played:
    """An admission with the age of every draw, moved by an adversary. Batches are planned from
    `cycle`, one after the other."""

    admission: Admission
    cycle: list[str]
    passes_on: bool
    num_plans: int = 0
    ages: dict[str, int] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)
    domains: dict[str, str] = field(default_factory=dict)
    training: list[str] = field(default_factory=list)
    drawn: int = 0
    worst: int = 0

    def moves(self) -> list[tuple[str, str]]:
        waiting = [d for d in self.ages if d not in self.ready]
        vacant = self.admission.vacant
        return [
            *([("plan", "")] if self.admission.needs_plan else []),
            *([("admit", vacant)] if vacant else []),
            *([("pass on", vacant)] if vacant and self.passes_on else []),
            *(("ready", d) for d in waiting),
            *(("end", d) for d in waiting),
            *([("train", "")] if self.admission.plans and not self.training else []),
            *([("publish", "")] if self.training else []),
        ]

    def play(self, move: str, name: str) -> None:
        match move:
            case "plan":
                self.admission.plan(list(self.cycle[self.num_plans % len(self.cycle)]))
                self.num_plans += 1
            case "admit":
                draw_id = f"{self.drawn:06d}"
                self.admission.admit(draw_id, name)
                self.drawn += 1
                self.ages[draw_id] = 0
                self.domains[draw_id] = name
            case "pass on":
                self.admission.pass_on(name, to="y" if name == "x" else "x")
            case "ready":
                self.admission.ready(name)
                self.ready.add(name)
            case "end":
                self.admission.end(name)
                del self.ages[name]
            case "train":
                wanted = Counter(self.admission.plans[0])
                self.training = self.admission.release() or []
                if self.training:
                    assert Counter(self.domains[d] for d in self.training) == wanted
                for left in self.training:
                    self.worst = max(self.worst, self.ages.pop(left))
                    self.ready.remove(left)
            case "publish":
                self.admission.trained()
                self.training = []
                self.ages = {d: age + 1 for d, age in self.ages.items()}

    def assert_not_stuck(self) -> None:
        """Where every seat has its ready group, a batch leaves."""
        full = not self.admission.needs_plan and self.admission.vacant is None
        if full and not self.training and len(self.ready) == len(self.ages):
            assert copy.deepcopy(self.admission).release() is not None

    def key(self) -> tuple[object, ...]:
        """What the future depends on."""
        return (
            tuple((age, self.domains[d], d in self.ready) for d, age in self.ages.items()),
            tuple(sorted(self.domains[d] for d in self.training)),
            tuple(tuple(sorted(seats)) for seats in self.admission.plans),
            self.num_plans % len(self.cycle),
        )


def start(p: int, s: int, more: int, cycle: list[str], *, passes_on: bool = False) -> _Played:
    admission = Admission(groups_per_step=p, max_lag=s, straggler_lag=more)
    return _Played(admission, cycle, passes_on)


@pytest.mark.parametrize(
    ("groups_per_step", "max_lag", "straggler_lag", "cycle", "passes_on"),
    [
        (1, 0, 0, ["x"], False),
        (1, 1, 0, ["x"], False),
        (1, 1, 1, ["x"], False),
        (1, 2, 0, ["x"], False),
        (1, 2, 1, ["x"], False),
        (2, 0, 0, ["xy"], True),
        (2, 1, 0, ["xx"], False),
        (2, 1, 0, ["xx", "xy"], False),
        (2, 1, 1, ["xy"], False),
        (1, 1, 0, ["x", "y"], True),
        (1, 2, 0, ["x", "y"], False),
    ],
)
def test_every_schedule_keeps_the_bound_and_some_reaches_it(
    groups_per_step: int, max_lag: int, straggler_lag: int, cycle: list[str], passes_on: bool
) -> None:
    """All reachable states, whatever the order of draws, answers, endings, steps and publishes."""
    first = start(groups_per_step, max_lag, straggler_lag, cycle, passes_on=passes_on)
    bound = first.admission.lag_bound
    assert bound == max_lag + straggler_lag
    seen = {first.key()}
    frontier = [first]
    worst = 0
    while frontier:
        state = frontier.pop()
        state.assert_not_stuck()
        for move, name in state.moves():
            after = copy.deepcopy(state)
            after.play(move, name)
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
    straggler_lag=st.integers(0, 2),
    domains=st.lists(st.sampled_from("xyz"), min_size=15, max_size=15),
    passes_on=st.booleans(),
    choices=st.lists(st.integers(0, 1000), min_size=20, max_size=300),
)
def test_random_schedules_keep_the_bound(
    groups_per_step: int,
    max_lag: int,
    straggler_lag: int,
    domains: list[str],
    passes_on: bool,
    choices: list[int],
) -> None:
    batches = [domains[i : i + groups_per_step] for i in range(0, 15, groups_per_step)]
    cycle = ["".join(batch) for batch in batches if len(batch) == groups_per_step]
    played = start(groups_per_step, max_lag, straggler_lag, cycle, passes_on=passes_on)
    for choice in choices:
        moves = played.moves()
        played.play(*moves[choice % len(moves)])
        played.assert_not_stuck()
        assert played.worst <= max_lag + straggler_lag
        assert len(played.ages) + len(played.training) <= played.admission.num_slots
