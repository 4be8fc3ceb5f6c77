"""How long a place had nothing to do."""

import pytest

from posttrain.workers import workload
from posttrain.workers.workload import Workload


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(workload, "time", clock)
    return clock


def test_only_time_with_nothing_outstanding_is_idle(clock: Clock) -> None:
    work = Workload()
    clock.now += 1  # idle
    work.add(2)
    clock.now += 2
    work.add(-1)  # one is left
    clock.now += 2
    work.add(-1)
    clock.now += 3  # idle
    assert work.outstanding == 0
    assert work.idle_share() == 4 / 8


def test_each_share_is_of_the_time_since_the_last(clock: Clock) -> None:
    work = Workload()
    clock.now += 5
    assert work.idle_share() == 1.0
    work.add(1)
    clock.now += 3
    assert work.idle_share() == 0.0  # what is under way counts already
    clock.now += 1
    work.add(-1)
    clock.now += 3
    assert work.idle_share() == 3 / 4
    assert work.idle_share() == 0.0  # no time has passed
