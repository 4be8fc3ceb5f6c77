"""The answer equals the reference, up to blanks, case and how an integer is written."""

from __future__ import annotations

import re

from posttrain.errors import DataError
from posttrain.types import Outcome, Prompt
from rewards.answer import extract_answer, strip_brackets
from rewards.score import Score, failed, quote, right, unanswered

# ASCII only: `\d` and int() also take the digits of other scripts, which are another answer.
_INTEGER = re.compile(r"([+-]?)0*([0-9]+)")


def score(prompt: Prompt, text: str) -> Score:
    """Compares the answer in `text` with the string `prompt.reference`."""
    answer = extract_answer(text)
    if answer is None:
        return unanswered()
    given = normalise(answer)
    # A reference that is itself bracketed may be answered with its own brackets or one pair more.
    expected = (normalise(prompt.reference), normalise(strip_brackets(prompt.reference.strip())))
    if given in expected:
        return right()
    return failed(Outcome.WRONG, f"{quote(given)} is not the reference")


def normalise(text: str) -> str:
    """Strips, collapses blanks, casefolds; an integer loses its plus sign and leading zeros."""
    text = " ".join(text.split()).casefold()
    integer = _INTEGER.fullmatch(text)
    if integer is None:
        return text
    sign, digits = integer.groups()
    return f"-{digits}" if sign == "-" and digits != "0" else digits


def check_reference(prompt: Prompt) -> None:
    """Raises DataError if no answer could ever equal the reference."""
    reference = prompt.reference
    if not isinstance(reference, str):
        raise DataError(f"the reference must be a string, got {reference!r}; write it in quotes")
    if score(prompt, f"#{reference}").outcome is not Outcome.CORRECT:
        raise DataError(
            f"the reference {quote(reference)} can never be answered: "
            "it must not be empty nor contain `#`"
        )
