"""What a pool of teachers does while one of them is replaced."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.errors import EngineError, PlacementError
from posttrain.workers import teacher_pool
from posttrain.workers.settings import TeacherPoolSettings
from posttrain.workers.teacher_pool import TeacherPool
from posttrain.workers.workload import Workload


class Copies:
    """Every copy dies when it is asked, except the last of `fates`; `None` does not even start."""

    def __init__(self, *fates: str | None) -> None:
        self.fates = list(fates)
        self.pool: TeacherPool | None = None
        self.idle: list[float] = []

    def start(self, *_: Any) -> Any:
        if self.pool is not None:
            self.idle.append(self.pool.idle_share())  # as the loop may, meanwhile
        fate = self.fates.pop(0)
        if fate is None:
            raise PlacementError("no room")
        return Copy(fate)


class Copy:
    def __init__(self, fate: str) -> None:
        self.fate = fate
        self.workload = Workload()

    def ask(self, *_: Any) -> list[str]:
        if self.fate == "dies":
            raise EngineError("died")
        return [self.fate]

    def stop(self) -> None: ...


@pytest.fixture
def pool_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(teacher_pool, "refuse_more_than_there_is", lambda _: None)

    def start(*fates: str | None) -> tuple[TeacherPool, Copies]:
        copies = Copies(*fates)
        monkeypatch.setattr(teacher_pool, "_Copy", copies.start)
        pool = TeacherPool("a model", TeacherPoolSettings(max_restarts=2), 1)
        copies.pool = pool
        return pool, copies

    return start


def test_a_pool_of_one_can_be_measured_while_it_is_replaced(pool_of: Any) -> None:
    pool, copies = pool_of("dies", "answers")
    assert pool._ask("targets", [], None) == ["answers"]
    assert len(copies.idle) == 1
    assert [copy.fate for copy in pool._copies] == ["answers"]
    pool.stop()


def test_one_that_could_not_be_replaced_is_replaced_at_the_next_question(pool_of: Any) -> None:
    pool, _ = pool_of("dies", None, "answers")
    with pytest.raises(PlacementError):
        pool._ask("targets", [], None)
    assert pool._ask("targets", [], None) == ["answers"]
    assert [copy.fate for copy in pool._copies] == ["answers"]
    pool.stop()


def test_restarts_are_bounded(pool_of: Any) -> None:
    pool, _ = pool_of("dies", "dies", "dies")
    with pytest.raises(EngineError, match="died"):
        pool._ask("targets", [], None)
    pool.stop()


def test_one_that_comes_up_while_the_pool_is_stopped_is_stopped_too(pool_of: Any) -> None:
    pool, _ = pool_of("dies", "answers")
    stopped: list[str] = []

    def start(*_: Any) -> Copy:
        pool.stop()  # from the driver's thread, while the new copy loads its model
        copy = Copy("answers")
        copy.stop = lambda: stopped.append("the new one")  # type: ignore[method-assign]
        return copy

    pool._start_copy = start
    with pytest.raises(EngineError, match="died"):
        pool._ask("targets", [], None)
    assert stopped == ["the new one"]
