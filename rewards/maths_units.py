r"""Percent signs and units around a value.

math-verify strips what looks like a unit at the end of an answer: 5 cm equals 5 m for it, and the
variable of 3m is a metre. Here a unit comes off only a number, and two units that are both known
and differ make two different answers. Units are not converted: 1 m is not 100 cm.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_SAME = """
m metre meter | cm centimetre centimeter | mm millimetre millimeter | km kilometre kilometer
in inch inches | ft foot feet | yd yard | mi mile
g gram | kg kilogram | mg milligram | lb pound | oz ounce | t ton tonne
s sec second | ms millisecond | min minute | h hr hour | day | week | month | year yr
l litre liter | ml millilitre milliliter | gal gallon
$ dollar usd | cent | € euro | £ | degree deg | rad radian
km/h kmh kph | mph | m/s | hz | n newton | j joule | w watt | v volt | a ampere amp | k kelvin | pa
"""
_CANONICAL = {
    name: group.split()[0] for group in re.split(r"[|\n]", _SAME) for name in group.split()
}
_POWERS = {"square": "2", "squared": "2", "sq": "2", "cubic": "3", "cubed": "3"}

_BASE = re.compile(r"(?<=[0-9])_\{?([2-9]|[12][0-9]|3[0-6])\}?$")
_CURRENCY = re.compile(r"^([-+]?)\s*(?:\\\$|([€£]))\s*")
_ORDINAL = re.compile(
    r"(?<=[0-9])(?:\^?\{?\\(?:text|mathrm)\{(?:st|nd|rd|th)\}\}?|\^\{?(?:st|nd|rd|th)\}?|(?:st|nd|rd|th))$"
)
_DEGREE = re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?$")
_TEXT = re.compile(
    r"(?:\\[,;:! ]|\s)*\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*"
    r"\{(?P<name>[^{}]*)\}(?:\^\{?(?P<power>[0-9])\}?)?$"
)
# A whole answer in text: a number and at most the name of a unit, or one word.
_WHOLE_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{\s*"
    r"([-+]?(?:[0-9][0-9.,]*(?:/[0-9]+)?|\.[0-9]+)"
    r"(?:\s*\\%|\s*(?:(?:squared?|sq|cubic|cubed)\s+)?[A-Za-z/]+(?:\^\{?[0-9]\}?)?)?)\s*\}"
)
_ATTACHED = re.compile(r"(?<=[0-9)}])(?P<name>[A-Za-z/]+)(?:\^\{?(?P<power>[0-9])\}?)?$")
# A hyphen between letters that are no word is a minus sign.
_PLAIN = re.compile(
    r"\s+(?P<name>[A-Za-z]+(?:(?:[ /]|(?<=[A-Za-z]{4})-(?=[A-Za-z]{4}))[A-Za-z]+)*)"
    r"(?:\^\{?(?P<power>[0-9])\}?)?$"
)
# What is counted, or a unit that is not in the table; `2 pi`, `5 or x`, `2/3 squared` and
# `5 hundredths` are no such things.
_NOUN = re.compile(
    r"(?!.*\b(?:or|and|not|pi|infinity)\b)"
    r"(?!\s*(?:(?:squared|cubed)\s*$|factorial\b|(?:hundred|thousand|million|billion|trillion)ths?\b))"
    r".*[A-Za-z]{3}.*",
    re.IGNORECASE,
)
_NUMERIC = re.compile(
    r"(?:[0-9.,\s+\-*/^(){}]|\\(?:[dtc]?frac|sqrt|cdot|times|pi|[,;:! ])(?![A-Za-z]))+"
)


@dataclass(frozen=True, slots=True)
class Value:
    """`latex` without the percent sign or unit that stood around it; `unit` None is no unit or one
    that is not known. `num_ors`: times that the text says "or", which is a comma in `latex`."""

    latex: str
    percent: bool = False
    unit: str | None = None
    num_ors: int = 0


def split(latex: str, expected: str | None = None) -> Value:
    """Takes a percent sign, a currency, degrees, an ordinal's ending, or words behind a number off
    what `to_latex` returned. Letters right behind a number are variables, unless they are the unit
    that is `expected`: `5cm`."""
    whole = _WHOLE_TEXT.fullmatch(latex)
    if whole:
        latex = whole[1]
    if latex.endswith(r"\%"):
        return Value(latex.removesuffix(r"\%").rstrip(), percent=True)
    percent = re.sub(
        r"\s*(?:\\text\{\s*per\s?cent(?:age)?\s*\}|(?<=[0-9} ])per\s?cent)$", "", latex
    )
    if percent != latex:
        return Value(percent, percent=True)
    currency = _CURRENCY.match(latex)
    if currency:
        return Value(
            currency[1] + latex[currency.end() :], unit=_canonical(currency[2] or "$", None)
        )
    base = _BASE.search(latex)
    if base:
        return Value(latex[: base.start()], unit=f"base {base[1]}")
    latex = _ORDINAL.sub("", latex)
    if _DEGREE.search(latex):
        return Value(_DEGREE.sub("", latex), unit=_canonical("degree", None))
    for pattern in (_TEXT, _PLAIN):
        match = pattern.search(latex)
        if match and _NUMERIC.fullmatch(latex[: match.start()]):
            unit = _canonical(match["name"], match["power"])
            if unit is not None or _NOUN.fullmatch(match["name"]):
                return Value(latex[: match.start()], unit=unit)
    match = _ATTACHED.search(latex)
    if expected is None or match is None or not _NUMERIC.fullmatch(latex[: match.start()]):
        return Value(latex)
    unit = _canonical(match["name"], match["power"])
    return Value(latex[: match.start()], unit=unit) if unit == expected else Value(latex)


def _canonical(name: str, power: str | None) -> str | None:
    """One name for a known unit, with its power; `square cm`, `squared cm` and `cm squared` are
    `cm^2`."""
    words = name.casefold().split()
    if words and words[0] in _POWERS:
        power, words = _POWERS[words[0]], words[1:]
    elif words and words[-1] in ("squared", "cubed"):
        power, words = _POWERS[words[-1]], words[:-1]
    word = " ".join(words)
    unit = _CANONICAL.get(word) or _CANONICAL.get(word.removesuffix("s"))
    return None if unit is None else f"{unit}^{power or '1'}"
