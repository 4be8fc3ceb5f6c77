"""Who may be drawn, and who may be trained next: what bounds staleness."""

from __future__ import annotations

from enum import Enum, auto


class _State(Enum):
    WAITING = auto()
    READY = auto()
    LEFT = auto()


class Admission:
    """B = (S+1)·P slots and the order in which groups leave for training.

    The life of an entry against the life of its slot::

        entry   admit() ── WAITING ── ready() ── READY ── release() ── LEFT
        slot    charged ─────────────────────────────────────────────────── free()   (published)

        entry   admit() ── WAITING ── end()   the gate ended the draw: it vanishes from the order
        slot    charged ──────────── freed

    Counting slots alone bounds nothing: a straggler would be overtaken for ever. So groups leave
    in order of admission, within a window of W anchored at the oldest entry that has not left:
    an entry leaves when fewer than W entries stand between the anchor and it, the anchor
    included. Entries that have left still count there (else the window would slide past the
    anchor), ended ones do not.

    When a draw is admitted under version v, at most B−1 groups are ahead of it, a batch in
    training included, and at most W−1 later ones overtake it. So at most B+W−2 groups are trained
    between v and it, and its tokens lag by at most ⌊(B+W−2)/P⌋ steps; W = 1 gives exactly S.

    Pure and synchronous; whoever waits for a change owns the waiting.

    >>> admission = Admission(groups_per_step=2, max_lag=1, window=1)
    >>> admission.num_slots, admission.lag_bound
    (4, 1)
    >>> for draw_id in "abcd":
    ...     admission.admit(draw_id)
    >>> admission.num_free
    0
    >>> admission.ready("c"); admission.ready("b")
    >>> admission.release(2) is None            # a is the oldest and still being generated
    True
    >>> admission.end("a")                      # no signal: its slot is free at once
    >>> admission.admit("e")
    >>> admission.release(2)
    ['b', 'c']
    >>> admission.num_free                      # in training: the slots stay charged
    0
    >>> admission.free(["b", "c"])              # the generators hold the new weights
    >>> admission.num_free, admission.num_waiting
    (2, 2)
    """

    def __init__(self, *, groups_per_step: int, max_lag: int, window: int) -> None:
        self.num_slots = (max_lag + 1) * groups_per_step
        self.lag_bound = (self.num_slots + window - 2) // groups_per_step
        self._window = window
        self._charged: set[str] = set()
        self._order: dict[str, _State] = {}

    @property
    def num_free(self) -> int:
        return self.num_slots - len(self._charged)

    @property
    def num_waiting(self) -> int:
        """Entries that are still being generated or scored."""
        return sum(state is _State.WAITING for state in self._order.values())

    def admit(self, draw_id: str) -> None:
        """Charges a slot and puts the draw at the end of the order."""
        assert self.num_free > 0, "admitted without a free slot"
        assert draw_id not in self._charged, draw_id
        self._charged.add(draw_id)
        self._order[draw_id] = _State.WAITING

    def ready(self, draw_id: str) -> None:
        """The draw has a trainable group."""
        assert self._order[draw_id] is _State.WAITING, draw_id
        self._order[draw_id] = _State.READY

    def end(self, draw_id: str) -> None:
        """The draw ended untrained: it vanishes from the order and its slot is free."""
        assert self._order[draw_id] is not _State.LEFT, draw_id
        del self._order[draw_id]
        self._charged.remove(draw_id)
        self._forget_overtaken()

    def release(self, count: int) -> list[str] | None:
        """The next `count` draws to train, oldest first; None while fewer may leave."""
        leaving = self._releasable()[:count]
        if len(leaving) < count:
            return None
        for draw_id in leaving:
            self._order[draw_id] = _State.LEFT
        self._forget_overtaken()
        return leaving

    def free(self, draw_ids: list[str]) -> None:
        """Frees the slots of released draws, once generators hold the weights they trained."""
        assert self._charged.issuperset(draw_ids), draw_ids
        assert all(self._order.get(d, _State.LEFT) is _State.LEFT for d in draw_ids), draw_ids
        self._charged.difference_update(draw_ids)

    def _releasable(self) -> list[str]:
        leaving: list[str] = []
        distance = 0
        for draw_id, state in self._order.items():
            if distance >= self._window:
                break
            if state is _State.READY:
                leaving.append(draw_id)
            # The anchor is the first entry that cannot leave; those before it all do.
            if distance > 0 or state is _State.WAITING:
                distance += 1
        return leaving

    def _forget_overtaken(self) -> None:
        """Entries that left matter only while an older one has not."""
        while self._order:
            oldest = next(iter(self._order))
            if self._order[oldest] is not _State.LEFT:
                break
            del self._order[oldest]
