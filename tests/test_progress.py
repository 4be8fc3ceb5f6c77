"""Plain lines off a terminal, one rewritten line on it, the time left at the pace so far."""

from __future__ import annotations

import itertools
import sys

import pytest

from posttrain.progress import Progress, duration, say


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("posttrain.progress.time", clock)
    return clock


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (59.6, "1:00"),
        (75, "1:15"),
        (3599, "59:59"),
        (3675, "1:01:15"),
        (360_000, "100:00:00"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_say_goes_to_stderr_alone(capsys: pytest.CaptureFixture[str]) -> None:
    say("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_lines_at_intervals_with_the_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Progress("judge", 100)
    for _ in range(12):
        clock.now += 2
        bar.advance("4 samples")
    # A line when ten seconds have passed since the last: after 10 s and 20 s. Each item takes 2 s.
    assert capsys.readouterr() == (
        "",
        "judge 5/100 · 4 samples · 3:10 left\njudge 10/100 · 4 samples · 3:00 left\n",
    )


def test_the_last_line_comes_at_once_and_says_how_long_it_took(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Progress("rl", 3)
    for _ in range(3):
        clock.now += 0.5
        bar.advance()
    assert capsys.readouterr().err == "rl 3/3 · 0:02\n"


def test_the_pace_is_that_of_the_whole_so_far(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Progress("rl", 4)
    clock.now += 60
    bar.advance()
    clock.now += 20
    bar.advance()
    # 60 s for one makes 180 s for three; 80 s for two makes 80 s for two.
    assert capsys.readouterr().err == "rl 1/4 · 3:00 left\nrl 2/4 · 1:20 left\n"


def test_a_terminal_has_one_line_that_is_rewritten(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = Progress("rl", 4)
    for step in (0.1, 0.1, 0.1, 0.1):
        clock.now += step
        bar.advance("x")
    erased = "\r\x1b[K"
    # Nothing more often than five times a second, and an end that stays.
    assert capsys.readouterr().err == f"{erased}rl 2/4 · x · 0:00 left{erased}rl 4/4 · x · 0:00\n"


def test_a_line_never_wraps_on_a_terminal(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")
    bar = Progress("rl", 1)
    clock.now += 1
    bar.advance("x" * 100)
    assert capsys.readouterr().err == "\r\x1b[Krl 1/1 · " + "x" * 10 + "\n"


def test_nothing_is_said_twice_within_the_interval(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Progress("rl", 1000)
    for _ in itertools.repeat(None, 99):
        clock.now += 0.1
        bar.advance()
    assert capsys.readouterr().err == ""
