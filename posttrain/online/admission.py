"""Who may be drawn, and who may be trained next: what bounds staleness and keeps the domain mix."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class _Entry:
    domain: str
    step: int
    """Steps trained when it was admitted."""
    ready: bool = False


class Admission:
    """B = (S+1)·P slots, each meant for a domain, and which groups may leave for training.

    The slots are the seats of S+1 planned batches: the one that is gathered or trained now, and
    the S after it. A batch leaves when every one of its seats has a group of the seat's domain, so
    that each holds the mix that was planned. The life of an entry against the life of its slot::

        entry   admit() ── waiting ── ready() ── ready ── release() ── gone
        slot    charged ──────────────────────────────────────────────── trained()  (published)

        entry   admit() ── waiting ── end()   the gate ended the draw; its seat is vacant
        slot    charged ──────────── freed

    Counting slots alone bounds nothing: a straggler would be overtaken for ever. So what is
    admitted after N steps has to leave for step N+1+L at the latest, where the lag bound L is
    S + `straggler_lag`. Ready groups leave oldest first; a batch whose leaving would let something
    older stay that no longer fits into the seats of its domain up to its own last step waits for
    it. Whatever is admitted fits: at that moment its domain has at least as many seats as entries.

    Pure and synchronous; whoever waits for a change owns the waiting.

    >>> admission = Admission(groups_per_step=2, max_lag=1)
    >>> admission.num_slots, admission.lag_bound
    (4, 1)
    >>> while admission.needs_plan:
    ...     admission.plan(["sums", "words"])
    >>> for draw_id in "abcd":
    ...     admission.admit(draw_id, admission.vacant)
    >>> admission.vacant is None
    True
    >>> admission.ready("b"); admission.ready("c"); admission.ready("d")
    >>> admission.release()                     # a waits, c is of the same domain; b before d
    ['b', 'c']
    >>> admission.vacant is None                # in training: their slots stay charged
    True
    >>> admission.trained()                     # the generators hold the new weights
    >>> admission.release() is None             # what was admitted with a may not overtake it again
    True
    >>> admission.end("a")                      # no signal
    >>> admission.vacant                        # its seat wants another of its domain
    'sums'
    """

    def __init__(self, *, groups_per_step: int, max_lag: int, straggler_lag: int = 0) -> None:
        self.num_slots = (max_lag + 1) * groups_per_step
        self.lag_bound = max_lag + straggler_lag
        self._groups_per_step = groups_per_step
        self._num_plans = max_lag + 1
        self._plans: deque[list[str]] = deque()
        self._steps = 0
        self._order: dict[str, _Entry] = {}
        self._training: list[str] = []

    @property
    def needs_plan(self) -> bool:
        return len(self._plans) < self._num_plans

    @property
    def plans(self) -> list[list[str]]:
        """The domains of the seats of each batch that has not been trained, the next one first."""
        return [list(seats) for seats in self._plans]

    @property
    def num_waiting(self) -> int:
        """Entries that are still being generated or scored."""
        return sum(not entry.ready for entry in self._order.values())

    @property
    def vacant(self) -> str | None:
        """The domain of the first seat without an entry; None if there is none."""
        entries = Counter(self._training)
        entries.update(entry.domain for entry in self._order.values())
        for seats in self._plans:
            for domain in seats:
                if not entries[domain]:
                    return domain
                entries[domain] -= 1
        return None

    def plan(self, seats: Sequence[str]) -> None:
        """The domains of the groups of a further batch."""
        assert self.needs_plan, "planned too far ahead"
        assert len(seats) == self._groups_per_step, seats
        self._plans.append(list(seats))

    def pass_on(self, domain: str, to: str) -> None:
        """Gives a vacant seat of a domain to another one: the last, which nothing waits for."""
        seats = next(seats for seats in reversed(self._plans) if domain in seats)
        seats[seats.index(domain)] = to

    def admit(self, draw_id: str, domain: str) -> None:
        """Charges a slot of the domain."""
        assert draw_id not in self._order, draw_id
        taken = sum(entry.domain == domain for entry in self._order.values())
        seats = sum(seats.count(domain) for seats in self._plans)
        assert taken + self._training.count(domain) < seats, "admitted without a free slot"
        self._order[draw_id] = _Entry(domain, self._steps)

    def ready(self, draw_id: str) -> None:
        """The draw has a trainable group."""
        assert not self._order[draw_id].ready, draw_id
        self._order[draw_id].ready = True

    def end(self, draw_id: str) -> None:
        """The draw ended untrained: its slot is free."""
        del self._order[draw_id]

    def release(self) -> list[str] | None:
        """The draws of the next batch, in order of admission; None while they may not leave."""
        assert not self._training, "released before the last batch was trained"
        if not self._plans:
            return None
        leaving: set[str] = set()
        for domain, num_seats in Counter(self._plans[0]).items():
            chosen = self._choose(domain, num_seats)
            if chosen is None:
                return None
            leaving.update(chosen)
        self._training = [self._order[draw_id].domain for draw_id in leaving]
        ordered = [draw_id for draw_id in self._order if draw_id in leaving]
        for draw_id in ordered:
            del self._order[draw_id]
        return ordered

    def trained(self) -> None:
        """Frees the slots of the released batch, once generators hold the weights it trained."""
        assert self._training, "nothing was released"
        self._training = []
        self._plans.popleft()
        self._steps += 1

    def _choose(self, domain: str, num_seats: int) -> list[str] | None:
        of_domain = [d for d, entry in self._order.items() if entry.domain == domain]
        chosen = [d for d in of_domain if self._order[d].ready][:num_seats]
        if len(chosen) < num_seats:
            return None
        staying = [self._order[d].step for d in of_domain if d not in chosen]
        later = [seats.count(domain) for seats in self._plans][1:]
        for step in set(staying):
            may_wait = step + self.lag_bound - self._steps
            if sum(s <= step for s in staying) > sum(later[:may_wait]):
                return None
        return chosen
