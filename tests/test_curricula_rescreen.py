"""Prompts that leave a curriculum, come back, and are looked at again."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_curricula_sampler import GROUP, build, draws, number, verdict

from curricula.buckets import BUCKETS


def identify(index: int) -> str:
    return f"{index:016x}"


def test_what_was_dropped_is_not_drawn_until_it_is_restored():
    curriculum = build(50, domains=("a", "b"), cooldown=0)
    gone = {0, 1, 2, 3, 7, 20}
    for index in gone:
        curriculum.drop(identify(index))
    drawn = {number(p) for p in draws(curriculum, 3000)}
    assert drawn == set(range(50)) - gone
    assert all(curriculum.is_dropped(identify(index)) for index in gone)

    curriculum.restore(identify(7))
    assert not curriculum.is_dropped(identify(7))
    assert 7 in {number(p) for p in draws(curriculum, 1000)}


def test_a_restored_prompt_stands_where_what_was_learned_meanwhile_puts_it():
    curriculum = build(20, [verdict(i, 4) for i in range(20)])
    curriculum.drop(identify(3))
    assert curriculum.pool() == {"d": dict.fromkeys(BUCKETS, 0) | {"(.25, .5]": 19, "dropped": 1}}
    for step in range(30):  # answers are observed, and it stays where it is
        curriculum.observe(identify(3), GROUP, GROUP, step)
    assert curriculum.pool()["d"]["dropped"] == 1
    curriculum.restore(identify(3))
    pool = curriculum.pool()["d"]
    assert (pool["(.25, .5]"], pool["(.75, 1)"], pool["dropped"]) == (19, 1, 0)


def test_a_domain_keeps_its_last_prompt():
    curriculum = build(4, domains=("a", "b"))
    for index in range(4):
        curriculum.drop(identify(index))
    assert [pool["dropped"] for pool in curriculum.pool().values()] == [1, 1]
    assert {number(p) for p in draws(curriculum, 20)} == {2, 3}


def test_a_slice_is_what_was_observed_longest_ago_and_a_share_of_the_dropped():
    curriculum = build(400, seed=2)
    for index in range(100):
        curriculum.drop(identify(index))
    for index in range(100, 250):
        curriculum.observe(identify(index), GROUP, 4, step=5)
    chosen = [number(prompt) for prompt in curriculum.rescreen_slice(40, retest_share=0.25)]
    assert len(set(chosen)) == len(chosen)
    dropped = [index for index in chosen if index < 100]
    assert 8 <= len(dropped) <= 10  # drawn with replacement, each taken once
    active = [index for index in chosen if index >= 100]
    assert len(active) == 40 - len(dropped)
    # Of some 120 looked at, about half were never observed: enough of them for the whole slice.
    assert all(index >= 250 for index in active)


def test_slices_reach_every_dropped_prompt_in_time():
    curriculum = build(60, domains=("a", "b"))
    for index in range(30):
        curriculum.drop(identify(index))
    seen = Counter(
        number(p) for _ in range(60) for p in curriculum.rescreen_slice(8, retest_share=0.5)
    )
    assert set(range(30)) <= set(seen)


@pytest.mark.parametrize(("size", "share"), [(4, 0.1), (1, 0.25), (4, 0.0)])
def test_the_share_of_small_slices_holds_on_average(size, share):
    curriculum = build(50)
    for index in range(10):
        curriculum.drop(identify(index))
    retested = []
    for _ in range(600):
        chosen = [number(p) for p in curriculum.rescreen_slice(size, share)]
        assert len(chosen) == size
        retested.append(sum(index < 10 for index in chosen))
    assert set(retested) == ({0, 1} if share else {0})
    error = 4 * math.sqrt(0.25 / len(retested))  # four standard errors of a yes or no
    assert abs(sum(retested) / len(retested) - size * share) < error


@pytest.mark.parametrize(("size", "share"), [(4, 0.0), (4, 1.0), (1, 0.5)])
def test_without_dropped_prompts_a_slice_is_of_active_ones(size, share):
    curriculum = build(50)
    slice_ = curriculum.rescreen_slice(size, share)
    assert len(slice_) == size


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from(["drop", "restore", "observe"]), st.integers(0, 11))),
    st.integers(0, 5),
)
def test_every_prompt_is_in_one_place_and_the_state_travels(moves, seed):
    curriculum = build(12, domains=("a", "b", "c"), seed=seed)
    dropped = set()
    for step, (move, index) in enumerate(moves):
        if move == "observe":
            curriculum.observe(identify(index), GROUP, index % (GROUP + 1), step)
        elif move == "drop":
            last_one = len({i for i in range(12) if i % 3 == index % 3} - dropped) == 1
            if index not in dropped and not last_one:
                dropped.add(index)
            curriculum.drop(identify(index))
        elif index in dropped:
            dropped.remove(index)
            curriculum.restore(identify(index))
    assert {i for i in range(12) if curriculum.is_dropped(identify(i))} == dropped
    for domain, places in enumerate(curriculum.pool().values()):
        assert sum(places.values()) == 4
        assert places["dropped"] == sum(index % 3 == domain for index in dropped)

    again = build(12, domains=("a", "b", "c"), seed=seed + 1)
    again.load_state_dict(curriculum.state_dict())
    assert again.pool() == curriculum.pool()
    assert [p.prompt_id for p in again.rescreen_slice(6, 0.5)] == [
        p.prompt_id for p in curriculum.rescreen_slice(6, 0.5)
    ]
    assert draws(again, 20) == draws(curriculum, 20)
    assert np.array_equal(again.state_dict()["rng"], curriculum.state_dict()["rng"])
