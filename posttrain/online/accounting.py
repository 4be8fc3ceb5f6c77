"""Every draw is opened once and ends once: towards the ledger, the keeper of groups, the counts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from posttrain.types import DrawOutcome, Prompt, RolloutGroup, SystemInstruction


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """A prompt picked for training and the system instruction drawn for it.

    `draw_id` names the attempt that drew it first and its number among the lineage's draws.
    """

    draw_id: str
    prompt: Prompt
    system: SystemInstruction | None

    @staticmethod
    def make_id(attempt: int, number: int) -> str:
        return f"d{attempt}-{number:07d}"

    @property
    def number(self) -> int:
        """The same for a draw of an undisturbed run and for that of a resumed one."""
        return int(self.draw_id.partition("-")[2])


def stable_seed(seed: int, name: str | int) -> int:
    """62 bits from the run's seed and what they are for: the same in every attempt."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


class DrawLedger(Protocol):
    """What the loop needs of the run's ledger."""

    def open_draw(
        self,
        *,
        draw_id: str,
        prompt_id: str,
        domain: str,
        system: str | None,
        attempt: int,
        drawn_at_step: int,
    ) -> None: ...

    def close_draw(
        self,
        draw_id: str,
        outcome: DrawOutcome,
        *,
        step: int | None,
        num_scored: int,
        num_correct: int,
        reason: str = "",
    ) -> None: ...

    def flush(self) -> None: ...


class Accounting:
    """Owns the open draws and counts how the others ended, by (outcome, reason, domain).

    The steps it is given make a checkpoint at step N self-contained: a draw was opened before the
    checkpoint exactly when `drawn_at_step` < N, and ended before it exactly when `step` ≤ N.
    """

    def __init__(
        self,
        ledger: DrawLedger,
        *,
        attempt: int,
        on_group: Callable[[RolloutGroup, DrawOutcome], None] | None,
    ) -> None:
        self._ledger = ledger
        self._attempt = attempt
        self._on_group = on_group
        self._open: dict[str, Draw] = {}
        self.counts: Counter[tuple[DrawOutcome, str, str]] = Counter()

    @property
    def open_ids(self) -> list[str]:
        """Draws in flight, in order of admission."""
        return list(self._open)

    def open(self, draw: Draw, *, drawn_at_step: int) -> None:
        """`drawn_at_step` is the step of the version that the generators hold."""
        assert draw.draw_id not in self._open, draw.draw_id
        self._open[draw.draw_id] = draw
        self._ledger.open_draw(
            draw_id=draw.draw_id,
            prompt_id=draw.prompt.prompt_id,
            domain=draw.prompt.domain,
            system=draw.system.name if draw.system else None,
            attempt=self._attempt,
            drawn_at_step=drawn_at_step,
        )

    def close(
        self,
        draw_id: str,
        outcome: DrawOutcome,
        *,
        step: int,
        group: RolloutGroup | None,
        reason: str = "",
    ) -> Draw:
        """Ends a draw and returns it; `group` is None when it has no answers, `step` the record
        it counts in."""
        draw = self._open.pop(draw_id)
        self.counts[outcome, reason, draw.prompt.domain] += 1
        self._ledger.close_draw(
            draw_id,
            outcome,
            step=step,
            num_scored=group.num_scored if group else 0,
            num_correct=group.num_correct if group else 0,
            reason=reason,
        )
        if group and self._on_group:
            self._on_group(group, outcome)
        return draw

    def flush(self) -> None:
        self._ledger.flush()
