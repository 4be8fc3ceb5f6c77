"""The order in which answers are taken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from online_fakes import make_group

from posttrain.online.arrivals import Arrivals


@given(st.permutations(range(8)))
def test_ordered_arrivals_are_taken_in_the_order_of_draws(order: list[int]) -> None:
    arrivals = Arrivals(ordered=True)
    for number in range(8):
        arrivals.expect(str(number))
    taken: list[str] = []
    for place, number in enumerate(order):
        taken += [draw_id for draw_id, _ in arrivals.arrive(str(number), make_group("01"))]
        # Exactly those before whom nobody is missing.
        here = set(order[: place + 1])
        whole = next(n for n in range(9) if n not in here)
        assert taken == [str(n) for n in range(whole)]


@given(st.permutations(range(8)))
def test_others_are_taken_as_they_come(order: list[int]) -> None:
    arrivals = Arrivals(ordered=False)
    for number in range(8):
        arrivals.expect(str(number))
    taken = [draw_id for n in order for draw_id, _ in arrivals.arrive(str(n), None)]
    assert taken == [str(number) for number in order]


def test_a_draw_of_a_slot_that_was_freed_meanwhile_comes_last() -> None:
    arrivals = Arrivals(ordered=True)
    arrivals.expect("a")
    arrivals.expect("b")
    group = make_group("01")
    assert arrivals.arrive("a", group) == [("a", group)]
    arrivals.expect("c")
    assert arrivals.arrive("c", None) == []
    assert arrivals.arrive("b", group) == [("b", group), ("c", None)]
