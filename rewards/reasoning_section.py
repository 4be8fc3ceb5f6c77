"""Where the reasoning ends and the answer begins."""

from __future__ import annotations

import re

DELIMITERS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<reflection>", "</reflection>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
"""What opens and what closes a reasoning section; upper and lower case are the same."""


def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)), re.IGNORECASE)


_OPEN = _any_of(tuple(opening for opening, _ in DELIMITERS))
_CLOSE = _any_of(tuple(closing for _, closing in DELIMITERS))


def after_reasoning(text: str) -> str | None:
    """What follows the last closing delimiter: the whole of `text` when there is none.

    None when a section is still open at the end: all that was said in it, and before it, is not
    yet the answer.
    """
    answer = _CLOSE.split(text)[-1]
    return None if _OPEN.search(answer) else answer
