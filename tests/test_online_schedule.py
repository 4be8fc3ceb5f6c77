"""Time and order: the lag bound under any schedule, and who waits for whom."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from online_fakes import CountingCurriculum, ScriptedGenerator, TimedLearner, World, loop_settings

from posttrain.types import DrawOutcome

DURATIONS = st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 20.0])


@given(
    groups_per_step=st.integers(1, 4),
    max_lag=st.integers(0, 3),
    straggler_lag=st.integers(0, 2),
    generating=st.lists(DURATIONS, min_size=1, max_size=40),
    learning=st.lists(st.sampled_from([0.1, 1.0, 5.0]), min_size=1, max_size=5),
    publishing=st.sampled_from([0.0, 0.3]),
    marks=st.lists(st.sampled_from(["10", "10", "01", "11", "00", "??", "1?"]), max_size=20),
    serial=st.booleans(),
)
def test_any_schedule_keeps_the_bound_and_ends_every_draw_once(
    groups_per_step: int,
    max_lag: int,
    straggler_lag: int,
    generating: list[float],
    learning: list[float],
    publishing: float,
    marks: list[str],
    serial: bool,
) -> None:
    marks = [*marks, "10"]
    straggler_lag = min(straggler_lag, max_lag)  # none in lock-step
    settings = loop_settings(
        num_steps=5,
        groups_per_step=groups_per_step,
        max_lag=max_lag,
        straggler_lag=straggler_lag,
        draw_deadline_s=1e6 if serial else 10.0,
        starvation_draws=1000,
    )
    world = World(
        settings,
        ScriptedGenerator(
            marks=lambda n: marks[n % len(marks)],
            seconds=lambda n: [*generating, 0.2][n % (len(generating) + 1)],
            serial=serial,
        ),
        learner=TimedLearner(seconds=lambda step: learning[step % len(learning)]),
        curriculum=CountingCurriculum(("a", "b", "c"), groups_per_step),
    )
    world.publisher.seconds = publishing
    summary = world.run()
    lags = [record.metrics["lag_max"] for record in world.records]
    assert lags == [world.learner.max_age(step) for step in range(5)]
    assert summary.max_lag == max(lags) <= max_lag + straggler_lag
    assert set(world.ledger.opened) == set(world.ledger.closed)
    assert sum(summary.draws.values()) == len(world.ledger.opened)
    assert summary.draws[DrawOutcome.TRAINED] == 5 * groups_per_step
    trained = [g.prompt.domain for g, end in world.groups if end is DrawOutcome.TRAINED]
    planned = Counter(world.curriculum.next_batch())
    for step in range(5):
        batch = trained[step * groups_per_step : (step + 1) * groups_per_step]
        assert Counter(batch) == planned
    in_flight = [
        record.metrics["queue/generating"] + record.metrics["queue/ready"]
        for record in world.records
    ]
    assert max(in_flight) <= (max_lag + 1) * groups_per_step


@pytest.mark.parametrize(
    ("groups_per_step", "max_lag", "straggler_lag"),
    [(1, 1, 0), (2, 1, 0), (4, 3, 0), (1, 1, 2), (2, 1, 2), (4, 1, 1)],
)
def test_a_straggler_reaches_the_bound(
    groups_per_step: int, max_lag: int, straggler_lag: int
) -> None:
    """The last of the first B draws is overtaken by all that may overtake it."""
    last = (max_lag + 1) * groups_per_step - 1
    world = World(
        loop_settings(
            num_steps=12,
            groups_per_step=groups_per_step,
            max_lag=max_lag,
            straggler_lag=straggler_lag,
        ),
        ScriptedGenerator(marks=lambda n: "10", seconds=lambda n: 500.0 if n == last else 0.01),
    )
    assert world.run().max_lag == max_lag + straggler_lag


def _seconds_per_step(generating: float, learning: float, **settings: Any) -> float:
    """Of 100 steps with a generator that takes `generating` seconds for the groups of a step."""
    groups = 4
    world = World(
        loop_settings(num_steps=100, groups_per_step=groups, **settings),
        ScriptedGenerator(marks=lambda n: "10", seconds=lambda n: generating / groups, serial=True),
        learner=TimedLearner(seconds=lambda step: learning),
    )
    return float(world.run().seconds / 100)


@pytest.mark.parametrize(("generating", "learning"), [(2.0, 1.0), (1.0, 2.0), (1.0, 1.0)])
def test_with_lag_only_the_slower_side_counts(generating: float, learning: float) -> None:
    slower = max(generating, learning)
    for max_lag in (1, 2):
        seconds = _seconds_per_step(generating, learning, max_lag=max_lag)
        assert seconds == pytest.approx(slower, rel=0.02)


@pytest.mark.parametrize(("generating", "learning"), [(2.0, 1.0), (1.0, 2.0), (1.0, 1.0)])
def test_lock_step_takes_the_sum(generating: float, learning: float) -> None:
    seconds = _seconds_per_step(generating, learning, max_lag=0)
    assert seconds == pytest.approx(generating + learning, rel=1e-6)


def test_the_learner_goes_on_past_a_straggler_as_far_as_the_lag_allows() -> None:
    def seconds(**lag: int) -> float:
        world = World(
            loop_settings(num_steps=10, **lag),
            ScriptedGenerator(marks=lambda n: "10", seconds=lambda n: 9.0 if n == 0 else 1.0),
        )
        return float(world.run().seconds)

    # The first answer takes 9 s and stalls whoever may not leave it behind: the first step is done
    # without it after 2 s, each further one that it may miss saves a second more.
    assert seconds(max_lag=0) == pytest.approx(28.0)
    assert seconds(max_lag=1) == pytest.approx(18.0)
    assert seconds(max_lag=1, straggler_lag=2) == pytest.approx(16.0)
    assert seconds(max_lag=3) == pytest.approx(16.0)
