r"""Mathematical answers, compared by math-verify (symbolically, not as strings).

`prompt.reference` is the gold answer in LaTeX or plain notation, without `\boxed{}`. math-verify's
own time limits use SIGALRM, which fails off the main thread, so they are switched off; an answer
that takes for ever is stopped from outside (`rewards.pool`). Importing it takes about a third of
a second, so it happens at the first use.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from posttrain.errors import DataError
from posttrain.types import Outcome, Prompt
from rewards.answer import extract_answer
from rewards.score import Score, failed, quote, right

MAX_ANSWER_LENGTH = 1000
"""Characters; parsing time grows steeply with nesting."""

_OPEN_REASONING = re.compile(r"<(think|thinking|thought|reasoning|reflection)>", re.IGNORECASE)
_CLOSE_REASONING = re.compile(r"</(?:think|thinking|thought|reasoning|reflection)>", re.IGNORECASE)


def score(prompt: Prompt, text: str) -> Score:
    """Compares the last answer behind the reasoning section with the gold answer."""
    source = final_answer(text)
    if source is None:
        return failed(Outcome.UNPARSABLE, "no answer behind the reasoning section")
    if len(source) > MAX_ANSWER_LENGTH:
        reason = f"an answer of {len(source)} characters, the limit is {MAX_ANSWER_LENGTH}"
        return failed(Outcome.LIMIT, reason)
    prediction = _parse(source)
    if _math_verify().verify(_gold(prompt.reference), prediction, timeout_seconds=None):
        return right()
    if not _has_expression(prediction):
        return failed(Outcome.UNPARSABLE, f"{quote(source)} cannot be read as mathematics")
    return failed(Outcome.WRONG, f"{quote(source)} does not equal the reference")


def final_answer(text: str) -> str | None:
    r"""What math-verify gets to see: the last `\boxed{}` behind the reasoning section, else the
    line behind the last `#`, else the end of the text. None if there is nothing, or the reasoning
    section was never closed.
    """
    *reasoning, answer = _CLOSE_REASONING.split(text)
    if not reasoning and _OPEN_REASONING.search(text):
        return None
    boxed = last_boxed(answer)
    if boxed is not None:
        return f"\\boxed{{{boxed}}}"
    marked = extract_answer(answer)
    # Markdown headings begin with `#` too, but other lines follow them.
    if marked is not None and "\n" not in marked:
        return f"\\boxed{{{marked}}}"
    return answer.strip()[-MAX_ANSWER_LENGTH:] or None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{…}` of `text`; None without one whose braces close."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(text)):
        character = text[position]
        if character in "{}" and text[position - 1] != "\\":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[start:position]
    return None


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    # It warns once per process that its time limits are off, which is what we want.
    for module in ("parser", "grader"):
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    import math_verify

    return math_verify


def _parse(source: str) -> list[Any]:
    parsed: list[Any] = _math_verify().parse(source, parsing_timeout=None)
    return parsed


@lru_cache(maxsize=4096)
def _gold(reference: str) -> list[Any]:
    return _parse(f"\\boxed{{{reference}}}")


def _has_expression(parsed: list[Any]) -> bool:
    """math-verify adds the raw string to what it parsed; alone, it means that nothing was."""
    return any(not isinstance(item, str) for item in parsed)


def check_reference(prompt: Prompt) -> None:
    """Raises DataError for a gold answer that cannot be parsed."""
    reference = prompt.reference
    if not isinstance(reference, str):
        raise DataError(f"the reference must be a string, got {reference!r}; write it in quotes")
    if not _has_expression(_gold(reference)):
        raise DataError(
            f"math-verify cannot parse the gold answer {quote(reference)}; "
            "write it as LaTeX mathematics, words in \\text{}"
        )
