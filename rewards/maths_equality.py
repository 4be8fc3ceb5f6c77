r"""Whether two mathematical texts say the same, by math-verify within limits.

math-verify's own time limits use SIGALRM, which fails off the main thread and in Ray actors, so
they are switched off; an answer that takes for ever is stopped from outside (`rewards.pool`).
Importing it takes about a third of a second, so it happens at the first use.
"""

from __future__ import annotations

import logging
import zlib
from functools import lru_cache
from itertools import chain
from typing import Any

from rewards.maths_limits import check_expression, check_text
from rewards.maths_units import Value

FLOAT_TOLERANCE = 1e-9
"""Relative: below it two decimal numbers are the same."""
ROUNDING_TOLERANCE = 1e-3
"""Relative: above it two values are not the same, though both are 0 to the six digits behind the
point that math-verify looks at."""
EXACT_TOLERANCE = 1e-35
"""Relative, of values without decimals, which are equal or not."""
_PRECISION = 50


def equal(gold: Value, answer: Value) -> bool | None:
    """None if the answer cannot be read as mathematics. Raises LimitBroken (`maths_limits`).

    Where only one of the two is a percentage, 50 % equals 50 as well as 0.5: questions ask "how
    many percent", and gold answers leave the sign out.
    """
    if None not in (gold.unit, answer.unit) and gold.unit != answer.unit:
        return False
    expected, given = parse(gold.latex), parse(answer.latex)
    assert expected is not None, "gold answers are checked when the data is loaded"
    if given is None:
        return None
    expected, given = _as_regions(expected, given, gold.num_ors, answer.num_ors)
    if gold.percent == answer.percent:
        return _same(expected, given)
    if not (_is_scalar(expected) and _is_scalar(given)):
        return False
    percent, number = (expected, given) if gold.percent else (given, expected)
    return _same(number, percent / 100) or (_counts(number) and _same(number, percent))


@lru_cache(maxsize=4096)
def parse(latex: str) -> Any | None:
    """A sympy object; None if it cannot be read. Raises LimitBroken."""
    check_text(latex)
    library, config = _math_verify()
    # Only what stands in this box, as a whole: no number is looked for inside it.
    parsed = library.parse(
        f"\\boxed{{{latex}}}",
        extraction_config=[config],
        extraction_mode="first_match",
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    if not parsed:
        return None
    check_expression(parsed[0])
    return parsed[0]


def _same(gold: Any, answer: Any) -> bool:
    import sympy

    gold = _values_of_names(gold, answer)
    distance = _distance(gold, answer)
    if distance is not None:
        decimal = gold.has(sympy.Float) or answer.has(sympy.Float)
        if distance > (ROUNDING_TOLERANCE if decimal else EXACT_TOLERANCE):
            return False
        if decimal and distance <= FLOAT_TOLERANCE and _is_scalar(gold) and _is_scalar(answer):
            return True
    sides, gold_sides = _sides(answer), _sides(gold)
    if sides and not gold_sides:
        return _verify(gold, answer) and all(_may_equal(side, sides[-1]) for side in sides)
    # It takes 1 < x < 2 for {1, 2} and the reverse, and -oo < x < oo for the empty set.
    inequality = isinstance(gold, sympy.core.relational.Relational | sympy.And) and not gold_sides
    if inequality and isinstance(answer, sympy.FiniteSet | sympy.Tuple):
        return False
    region = isinstance(gold, sympy.Interval | sympy.Union) and not answer.has(sympy.oo)
    return _verify(gold, answer, allow_set_relation_comp=region)


def _values_of_names(gold: Any, answer: Any) -> Any:
    """Of x = 1 the 1, of x = 1, y = 2 the tuple (1, 2), when the answer names nothing: math-verify
    would take (2, 1) for the latter as well."""
    import sympy

    sides = _sides(gold)
    if sides and sides[0].is_Symbol and isinstance(answer, sympy.Expr):
        return sides[-1]
    if isinstance(gold, sympy.FiniteSet) and isinstance(answer, sympy.Set | sympy.Tuple):
        equations = [_sides(element) for element in gold._unsorted_args]
        names = {sides[0] for sides in equations if sides}
        bare = not any(_sides(element) for element in answer.args)
        if bare and len(names) == len(equations) > 1:
            return sympy.Tuple(*(sides[-1] for sides in equations))
    return gold


def _as_regions(gold: Any, answer: Any, gold_ors: int, answer_ors: int) -> tuple[Any, Any]:
    """Of x < 3 or x > 5 the union, where the other is a region too, or says so of the same x."""
    unions = _union(gold, gold_ors), _union(answer, answer_ors)
    if None not in unions:
        return unions if gold.free_symbols == answer.free_symbols else (gold, answer)
    if unions[0] is not None and _is_region(answer):
        return unions[0], answer
    if unions[1] is not None and _is_region(gold):
        return gold, unions[1]
    return gold, answer


def _is_region(expression: Any) -> bool:
    import sympy

    return isinstance(expression, sympy.Set) and not isinstance(expression, sympy.FiniteSet)


def _union(alternatives: Any, num_ors: int) -> Any | None:
    """None unless "or" stands between all of them (a comma may be an "and"), they speak of one
    variable, and at least one is an inequality: x = 1 or x = 2 are two values."""
    import sympy

    if not isinstance(alternatives, sympy.FiniteSet) or len(alternatives) != num_ors + 1:
        return None
    parts = alternatives.args
    if len(alternatives.free_symbols) != 1 or all(_sides(part) for part in parts):
        return None
    links = [part.args if isinstance(part, sympy.And) else [part] for part in parts]
    if not all(isinstance(link, sympy.core.relational.Relational) for link in chain(*links)):
        return None
    try:
        return sympy.Union(*(part.as_set() for part in parts))
    except Exception:  # sympy cannot solve them, for one reason or another
        return None


def _verify(gold: Any, answer: Any, **options: bool) -> bool:
    library, _ = _math_verify()
    equal: bool = library.verify(gold, answer, timeout_seconds=None, **options)
    return equal


def _distance(gold: Any, answer: Any) -> float | None:
    """Relative, of two values or of two functions at one point; None where one has no finite value
    there, or is a symbol (math-verify joins letters to words).

    math-verify looks at six digits behind the point whatever the size of the values, and for what
    differs it tries to simplify the difference, which may take for ever.
    """
    import sympy

    for expression in (gold, answer):
        if not isinstance(expression, sympy.Expr) or expression.is_Symbol:
            return None
        if any(map(_has_no_value_yet, sympy.preorder_traversal(expression))):
            return None
    first, second = (_value_at_a_point(expression) for expression in (gold, answer))
    sizes = (abs(first), abs(second))
    if not all(size.is_Number and size.is_finite for size in sizes):
        return None
    return float(abs(first - second) / max(sizes)) if any(sizes) else 0.0


def _has_no_value_yet(part: Any) -> bool:
    import sympy

    pending = sympy.Sum | sympy.Product | sympy.Integral | sympy.Limit | sympy.Derivative
    return bool(part.is_Matrix) or isinstance(part, pending)


def _value_at_a_point(expression: Any) -> Any:
    """With a positive value for every variable, always the same for one name."""
    import sympy

    point = {
        symbol: sympy.Rational(zlib.crc32(symbol.name.encode()) % 9973 + 5000, 9973)
        for symbol in expression.free_symbols
    }
    return sympy.N(expression.subs(point).doit(), _PRECISION)


def _is_scalar(expression: Any) -> bool:
    import sympy

    return isinstance(expression, sympy.Expr) and bool(expression.is_number)


def _counts(number: Any) -> bool:
    """A number below 1 is a share, never a count of percent."""
    import sympy

    size = sympy.N(abs(number))
    return bool(size.is_finite and size >= 1)


def _sides(relation: Any) -> list[Any]:
    """Of an equation or a chain of them, a = b = c; empty for anything else."""
    import sympy

    links = relation._unsorted_args if isinstance(relation, sympy.And) else [relation]
    if not all(isinstance(link, sympy.Eq) for link in links):
        return []
    return [links[0].lhs, *(link.rhs for link in links)]


def _may_equal(side: Any, value: Any) -> bool:
    """math-verify takes the last side of an equation for the answer, in 3 = 5 too. Other sides may
    be names for it (with a variable of their own, or a function) or equal to it."""
    from sympy.core.function import AppliedUndef

    named = side.free_symbols - value.free_symbols or side.has(AppliedUndef)
    return bool(named) or side == value or _same(value, side)


@lru_cache(maxsize=1)
def _math_verify() -> tuple[Any, Any]:
    # It warns once per process that its time limits are off, which is what we want.
    for module in ("parser", "grader"):
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    import math_verify
    from math_verify.parser import NormalizationConfig

    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
    )
    config = math_verify.LatexExtractionConfig(
        boxed_match_priority=0, normalization_config=normalization
    )
    return math_verify, config
