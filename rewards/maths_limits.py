r"""What an answer may ask of the verifier.

Nothing in math-verify or sympy bounds the work: 9^{9^9} is computed digit by digit. An answer is
bounded before it is parsed (length, depth, commands that stand for a computation), and what was
parsed before it is evaluated (the digits that its numbers would have, the terms that its powers
would have). What still takes too long is killed from outside (`rewards.pool`).
"""

from __future__ import annotations

import math
import re
from typing import Any

MAX_LENGTH = 1000
"""Characters of an answer."""
MAX_DEPTH = 20
"""Nested brackets of all kinds."""
MAX_DIGITS = 10_000
"""Decimal digits of every exact intermediate value: 2^{2024} has 610."""
MAX_TERMS = 5_000
"""Terms of a written-out power of a sum."""
MAX_ARGUMENT_DIGITS = 4
"""Of every number in an answer with a factorial, binomial coefficient or gamma function: the parser
computes some of them itself."""

_COMPUTES = re.compile(
    r"\\(?:i*int|oint|sum|prod|lim|det)(?![A-Za-z])"
    r"|\\operatorname\*?\s*\{\s*(?:eye|zeros|ones|diag|[hv]stack|orth\w*|eig\w*|diagonalize|svd"
    r"|rref|nullspace|rank|trace|tr|cols|rows|norm)\s*\}"
)
_COMBINATORIAL = re.compile(r"!|\\[dt]?binom|\\(?:Γ|[Gg]amma)(?![A-Za-z])|\\operatorname\{Gamma\}")
_BRACKETS = {**dict.fromkeys("([{", 1), **dict.fromkeys(")]}", -1)}


class LimitBroken(Exception):
    """Says which limit and by how much."""


def check_text(latex: str) -> None:
    """Raises LimitBroken for what is too expensive to parse."""
    if len(latex) > MAX_LENGTH:
        raise LimitBroken(f"{len(latex)} characters, the limit is {MAX_LENGTH}")
    depth = deepest = 0
    for character in latex:
        depth = max(depth + _BRACKETS.get(character, 0), 0)
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise LimitBroken(f"brackets nested {deepest} deep, the limit is {MAX_DEPTH}")
    longest = max(map(len, re.findall("[0-9]+", latex)), default=0)
    if _COMBINATORIAL.search(latex) and longest > MAX_ARGUMENT_DIGITS:
        raise LimitBroken(f"a factorial or the like beside a number of {longest} digits")


def computations(latex: str) -> frozenset[str]:
    """The commands that leave a computation to the reader: sums, integrals, determinants, …"""
    return frozenset(match[0] for match in _COMPUTES.finditer(latex))


def check_expression(expression: Any) -> None:
    """Raises LimitBroken for a sympy object that is too expensive to evaluate or to simplify."""
    _digits(expression)


def _digits(expression: Any) -> float:
    """An upper bound of the decimal digits of the exact value, written-out terms included."""
    import mpmath
    import sympy

    if isinstance(expression, sympy.Rational):
        digits = math.log10(max(abs(expression.p), 1)) + math.log10(expression.q)
    elif isinstance(expression, sympy.Float):
        digits = abs(mpmath.mag(expression.num)) * math.log10(2) if expression else 0.0
    elif isinstance(expression, sympy.Pow | sympy.exp):
        digits = _digits_of_power(*expression.as_base_exp())
    elif isinstance(expression, sympy.factorial | sympy.gamma | sympy.binomial):
        largest = 10.0 ** max(map(_digits_of_argument, expression.args))
        digits = largest * math.log10(largest + 1)
    else:
        parts = [_digits(part) for part in getattr(expression, "args", ())]
        digits = sum(parts) if isinstance(expression, sympy.Mul) else max(parts, default=0.0) + 1
    if digits > MAX_DIGITS:
        raise LimitBroken(f"a value of about {digits:.3g} digits, the limit is {MAX_DIGITS}")
    return digits


def _digits_of_argument(argument: Any) -> float:
    digits = _digits(argument)
    if digits > MAX_ARGUMENT_DIGITS + 1:
        raise LimitBroken(f"a factorial or the like of a number of {digits:.0f} digits")
    return digits


def _digits_of_power(base: Any, exponent: Any) -> float:
    if _digits(exponent) > math.log10(MAX_DIGITS) * 10:
        raise LimitBroken("an exponent that is itself a large power")
    times = abs(float(exponent.evalf(5))) if exponent.is_number and exponent.is_real else 1.0
    if base.is_Add and base.free_symbols and exponent.is_Integer:
        terms = math.comb(int(times) + len(base.args) - 1, len(base.args) - 1)
        if times > MAX_TERMS or terms > MAX_TERMS:
            raise LimitBroken(f"a power of a sum with {terms:.3g} terms")
    if base.free_symbols and times > MAX_DIGITS:
        raise LimitBroken(f"an exponent of {times:.3g}")
    return max(_digits(base), 1) * times
