"""Says so when no prompt carries signal, instead of drawing for ever."""

from __future__ import annotations

from collections import Counter

from posttrain.errors import StarvationError
from posttrain.online.gate import Reason

_REMEDY = {
    Reason.ALL_CORRECT: "the prompts are too easy for this policy: add harder tasks, lower "
    "rl.curriculum.max_no_signal, or let rl.rescreen take easy prompts out",
    Reason.NONE_CORRECT: "the prompts are too hard for this policy: add easier tasks, drop the "
    "unsolved ones, or raise rl.group_size or rl.max_tokens",
    Reason.UNSCORED: "the scorer returned no score: look at the reward workers' log, the verifier "
    "or judge cannot be reached",
    Reason.DEADLINE: "answers take longer than rl.draw_deadline_s: raise it, or lower "
    "rl.max_tokens, rl.group_size or rl.groups_per_step",
}
_WORDS = {
    Reason.ALL_CORRECT: "all correct",
    Reason.NONE_CORRECT: "none correct",
    Reason.UNSCORED: "unscored",
    Reason.DEADLINE: "past the deadline",
}


class StarvationWatch:
    """Counts draws in a row that ended without a trainable group, by reason."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._ended: Counter[Reason] = Counter()

    def trainable(self) -> None:
        """A group with signal came: the row is broken."""
        self._ended.clear()

    def ended(self, reason: Reason) -> None:
        """Raises StarvationError when the row reaches the limit."""
        self._ended[reason] += 1
        if self._ended.total() < self._limit:
            return
        counts = ", ".join(f"{self._ended[reason]} {word}" for reason, word in _WORDS.items())
        commonest = self._ended.most_common(1)[0][0]
        raise StarvationError(
            f"{self._limit} draws in a row ended without a group that carries signal "
            f"({counts}); mostly {_WORDS[commonest]}: {_REMEDY[commonest]}. "
            f"rl.starvation_draws ({self._limit}) says how long to keep looking"
        )
