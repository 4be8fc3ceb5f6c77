"""In which order answers are taken that come back in any order."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Arrivals(Generic[T]):
    """Hands answers on as they come or, `ordered`, in the order in which they were expected.

    What the curriculum learns decides what it draws next, so only ordered arrivals make a run
    repeatable; the price is that an early answer waits for the slow ones drawn before it.

    >>> arrivals = Arrivals[str](ordered=True)
    >>> arrivals.expect("a"); arrivals.expect("b")
    >>> arrivals.arrive("b", "second")
    []
    >>> arrivals.arrive("a", "first")
    [('a', 'first'), ('b', 'second')]
    """

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._expected: dict[str, None] = {}
        self._waiting: dict[str, T] = {}

    def expect(self, draw_id: str) -> None:
        self._expected[draw_id] = None

    def arrive(self, draw_id: str, answer: T) -> list[tuple[str, T]]:
        """What can be taken now that this one is here, in the order to take it in."""
        if not self._ordered:
            del self._expected[draw_id]
            return [(draw_id, answer)]
        self._waiting[draw_id] = answer
        taken: list[tuple[str, T]] = []
        for oldest in list(self._expected):
            if oldest not in self._waiting:
                break
            del self._expected[oldest]
            taken.append((oldest, self._waiting.pop(oldest)))
        return taken
