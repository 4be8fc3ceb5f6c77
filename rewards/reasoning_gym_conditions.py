"""What an answer must fulfil besides its reasoning-gym scorer, where the scorer is fooled.

Found by asking every family's scorer about answers that know nothing of the question, and about
right answers with something wrong added.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

Condition = Callable[[str, Mapping[str, Any]], bool]
"""(answer, entry) -> whether the scorer's verdict may stand."""

_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")


def _probability(answer: str, entry: Mapping[str, Any]) -> bool:
    """coin_flip gives everything to a beginning of the right digits: 0 for 0.109375."""
    gold = Fraction(entry["answer"])
    return math.isclose(Fraction(answer.replace(",", "")), gold, rel_tol=1e-3)


def _whole_word(answer: str, entry: Mapping[str, Any]) -> bool:
    """figlet_font gives .1 a letter: everything for ten right ones of a longer word."""
    gold: str = entry["answer"]
    return answer.replace(" ", "").casefold() == gold.strip().casefold()


def _same_text(answer: str, entry: Mapping[str, Any]) -> bool:
    """game_of_life_halting compares bool(text), which is true of every text."""
    gold: str = entry["answer"]
    return answer.casefold() == gold.casefold()


def _one_number(answer: str, entry: Mapping[str, Any]) -> bool:
    """gsm_symbolic takes the first of several numbers, without its sign."""
    numbers = _NUMBER.findall(answer.replace(",", ""))
    return len(numbers) == 1 and float(numbers[0]) == float(entry["answer"])


def _same_number_of_words(answer: str, entry: Mapping[str, Any]) -> bool:
    """letter_jumble lets anything follow."""
    return len(answer.split()) == len(entry["answer"].split())


def _same_numbers(answer: str, entry: Mapping[str, Any]) -> bool:
    """number_sorting lets every number be off by one."""
    given, gold = (list(map(float, _NUMBER.findall(text))) for text in (answer, entry["answer"]))
    return given == gold


def _numbers_only(answer: str, entry: Mapping[str, Any]) -> bool:
    """polynomial_equations skips what is not a number: any words say "no solution"."""
    if entry["answer"] == "":
        return answer in ("", '""')
    return all(_NUMBER.fullmatch(part.strip()) for part in answer.split(","))


def _the_given_numbers(answer: str, entry: Mapping[str, Any]) -> bool:
    """puzzle24 takes any four numbers, and 24.5 for 24."""
    used = sorted(int(number) for number in re.findall("[0-9]+", answer))
    if used != sorted(entry["metadata"]["numbers"]):
        return False
    try:
        return _value(ast.parse(answer.strip(), mode="eval").body) == 24
    except ZeroDivisionError:
        return False


def _value(node: ast.expr) -> Fraction:
    """Exactly, of what is in the language of the family (`reasoning_gym_language`)."""
    match node:
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.UnaryOp(op=sign, operand=operand):
            return -_value(operand) if isinstance(sign, ast.USub) else _value(operand)
        case ast.BinOp(left=left, op=operator, right=right):
            a, b = _value(left), _value(right)
            match operator:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case _:
                    return a / b
        case _:
            raise ValueError(f"{type(node).__name__} in an answer to puzzle24")


CONDITIONS: Mapping[str, Condition] = {
    "coin_flip": _probability,
    "figlet_font": _whole_word,
    "game_of_life_halting": _same_text,
    "gsm_symbolic": _one_number,
    "letter_jumble": _same_number_of_words,
    "number_sorting": _same_numbers,
    "polynomial_equations": _numbers_only,
    "puzzle24": _the_given_numbers,
}
