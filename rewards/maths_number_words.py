r"""Words that calculate with the number before them: `5 million`, `3 dozen`, `5 squared`.

They are no nouns: who takes them for what is counted finds 5 million equal to 5 thousand. Rewritten
are `5 million`, `5 \text{ million people}` and `\text{5 million people}`, in text that is in one
notation otherwise (see `maths_notation`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

_FACTORS = {
    "hundred": r" \cdot 10^{2}",
    "thousand": r" \cdot 10^{3}",
    "million": r" \cdot 10^{6}",
    "billion": r" \cdot 10^{9}",
    "trillion": r" \cdot 10^{12}",
    "dozen": r" \cdot 12",
}
_OPERATIONS = {"squared": "^{2}", "cubed": "^{3}", "factorial": "!"}

# Not hundred-dollar bills, which are counted; but 5 million-x is a difference.
_WORD_END = r"(?![A-Za-z]|-[A-Za-z]{2})"
FACTOR_WORD = rf"(?i:(?:{'|'.join(_FACTORS)})s?{_WORD_END})"
_FACTOR_WORDS = rf"{FACTOR_WORD}(?: {FACTOR_WORD})*"

_SPACES = r"(?:\\[,;:! ]|\s)*"
_TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{\s*"
# 25 squared feet are 25 square feet.
_UNIT_BEHIND = rf"(?:\\[,;:! ]|[\s}}])*(?:{_TEXT})?[A-Za-z]"
_OPERATION = rf"(?i:(?:squared|cubed)(?!{_UNIT_BEHIND})|factorial(?![A-Za-z]))"

_WORDS = rf"(?P<words>{_FACTOR_WORDS}|{_OPERATION})"
# From its first digit, or a long number is gone through from each of its digits.
_NUMBER = r"(?<![0-9])(?<![0-9][,.])[0-9][0-9,]*(?:\.[0-9]+)?"
_UNIT = r" (?:(?:squared?|sq|cubic|cubed) )?[A-Za-z/]+"


def _out_of_text(match: re.Match[str]) -> str:
    r"""`\text{5 million people}` → `5 million\text{ people}`."""
    rest = match["rest"].strip()
    return f"{match['number']} {match['words']}" + (rest and rf"\text{{ {rest}}}")


def _multiplied(match: re.Match[str]) -> str:
    r"""`5,000 million` → `5000 \cdot 10^{6}`."""
    factors = [_FACTORS[word.removesuffix("s")] for word in match["words"].casefold().split()]
    return _without_commas(match["number"]) + "".join(factors)


def _operated(match: re.Match[str]) -> str:
    return _without_commas(match["number"]) + _OPERATIONS[match["operation"].casefold()]


def _without_commas(number: str) -> str:
    """In a product or a power math-verify takes the comma for a list's."""
    return re.sub(r",(?=[0-9]{3}(?![0-9]))", "", number)


def _enclosed(match: re.Match[str]) -> str:
    """`3 dozen/6 dozen` → `3 dozen/(6 dozen)`; of 5/2 million the whole fraction is multiplied."""
    return f"{match['over']}({match['number']})"


def _outside_text(
    pattern: str, replacement: Callable[[re.Match[str]], str]
) -> tuple[re.Pattern[str], Callable[[re.Match[str]], str]]:
    r"""What is left in `\text{(B) 5 million}` is said, not calculated."""

    def replaced(match: re.Match[str]) -> str:
        return match[0] if match["number"] is None else replacement(match)

    return re.compile(rf"{_TEXT}[^{{}}]*\}}|{pattern}"), replaced


_REWRITES: list[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]] = [
    (
        re.compile(rf"(?P<number>(?<=[0-9)}}])){_SPACES}{_TEXT}{_WORDS}(?P<rest>[^{{}}]*)\}}"),
        _out_of_text,
    ),
    (
        re.compile(
            rf"{_TEXT}(?P<number>[-+]?(?:\\\$)?{_NUMBER}) {_WORDS}(?P<rest>(?:{_UNIT})?\s*)\}}"
        ),
        _out_of_text,
    ),
    _outside_text(
        rf"(?P<over>{FACTOR_WORD}{_SPACES}(?:/|\\div){_SPACES})"
        rf"(?P<number>{_NUMBER}{_SPACES}{_FACTOR_WORDS})",
        _enclosed,
    ),
    _outside_text(
        rf"(?P<number>{_NUMBER}|(?<=[)}}])){_SPACES}(?P<words>{_FACTOR_WORDS})", _multiplied
    ),
    # Not 2/3 squared, which is read in two ways.
    _outside_text(
        rf"(?P<number>(?<![\w.,/^]){_NUMBER}|(?<=\))){_SPACES}(?P<operation>{_OPERATION})",
        _operated,
    ),
]

# The last side of an equation, if it is one number with such a word behind it; in 5 + 2 dozen the
# word belongs to a part of the value.
_COUNTED = re.compile(
    r"(?P<number>(?:.*=)?[^-+−–=]*[0-9}\s$])"
    rf"(?i:dozens?{_WORD_END}(?=[^0-9]*\Z)|(?:hundreds|thousands)(?=[^0-9A-Za-z]*\Z))"
    r"(?P<rest>.*)",
    re.DOTALL,
)


def calculated(latex: str) -> str:
    """`latex` with signs in the place of the words."""
    for pattern, replacement in _REWRITES:
        latex = pattern.sub(replacement, latex)
    return latex


def without_counting_word(text: str) -> str | None:
    """`7 eggs` of `7 dozen eggs`, `2` of `2 hundreds`, which "how many dozens", "how many hundreds"
    ask for; None for all else: nobody who is asked for 5 says 5 million."""
    match = _COUNTED.fullmatch(text)
    return match and match["number"] + match["rest"]
