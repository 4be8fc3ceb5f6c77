"""What may be written where a reasoning-gym scorer hands text to eval().

Nine families evaluate the policy's answer, five evaluate parts of the task itself (sympy's
parse_expr is eval() too). Run in a sandbox, such an answer could still forge its own score, which
is computed in the same process. So each family has a language: digits and blanks, or arithmetic,
checked over Python's syntax tree, without a name, call or power that could do more. What is not in
it never reaches the scorer.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

MAX_LENGTH = 2000
"""Characters of an expression."""
MAX_EXPONENT = 100
"""Of every number in an exponent."""

_FUNCTIONS = """
exp log ln sqrt Abs sin cos tan sec csc cot asin acos atan sinh cosh tanh asinh acosh atanh
"""
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div)
_PLAIN = re.compile(r"[-+*/()., A-Za-z0-9]*")
_NUMBER_NAME = re.compile(r"[0-9.][A-Za-z]|[A-Za-z]\.")

Language = Callable[[str], bool]


def _text(pattern: str) -> Language:
    compiled = re.compile(pattern)
    return lambda text: compiled.fullmatch(text) is not None


def _expression(*, names: str = "", functions: str = "") -> Language:
    """Numbers, `+ - * /`, parentheses; with `names` (a pattern) also variables and powers."""
    name, known = re.compile(names), functions.split()

    def allows(node: ast.AST) -> bool:
        match node:
            case ast.Expression() | ast.operator() | ast.unaryop() | ast.Load():
                return True
            case ast.Constant(value=value):
                return type(value) in (int, float)
            case ast.BinOp(op=ast.Pow(), right=exponent):
                return bool(names) and _is_small(exponent)
            case ast.BinOp(op=operator):
                return isinstance(operator, _ARITHMETIC)
            case ast.UnaryOp(op=operator):
                return isinstance(operator, ast.USub | ast.UAdd)
            case ast.Call(func=ast.Name(id=called), args=[_], keywords=[]):
                return called in known
            case ast.Name(id=used):
                return used in known or name.fullmatch(used) is not None
            case _:
                return False

    def contains(text: str) -> bool:
        tree = _parse(text)
        return tree is not None and all(map(allows, ast.walk(tree)))

    return contains


def _parse(text: str) -> ast.Expression | None:
    """None for what is not plain ASCII arithmetic: Python also reads 0x1f, 1_0, 1e9 and 2j."""
    if len(text) > MAX_LENGTH or not _PLAIN.fullmatch(text) or _NUMBER_NAME.search(text):
        return None
    try:
        return ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_small(exponent: ast.expr) -> bool:
    """No power within the power, no large number."""
    match exponent:
        case ast.Constant(value=int(value)):
            return value <= MAX_EXPONENT
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _is_small(operand)
        case ast.Name():
            return True
        case ast.BinOp(left=left, op=operator, right=right) if isinstance(operator, _ARITHMETIC):
            # 99*99*99 would be large without a large number in it.
            named = any(isinstance(part, ast.Name) for part in ast.walk(exponent))
            small = named or isinstance(operator, ast.Div)
            return small and _is_small(left) and _is_small(right)
        case _:
            return False


ANSWERS: Mapping[str, Language] = {
    "binary_matrix": _text(r"[0-9\s]*"),
    "countdown": _expression(),
    "intermediate_integration": _expression(names="[A-Za-z]|pi", functions=_FUNCTIONS),
    "n_queens": _text(r"[_Q\s]*"),
    "polynomial_multiplication": _expression(names="[A-Za-z]"),
    "puzzle24": _expression(),
    "simple_integration": _expression(names="[A-Za-z]|pi", functions=_FUNCTIONS),
    "spiral_matrix": _text(r"[-0-9\s]*"),
    "string_insertion": _text("[A-E]*"),
    # These two evaluate nothing, but take NaN for equal to everything.
    "complex_arithmetic": _text(r"[-+0-9.eEij()\s]*"),
    "number_sorting": _text(r"""[-+0-9.eE,'"\[\]\s]*"""),
}
"""Of the families whose scorers must not see every answer."""

DATA: Mapping[str, tuple[Callable[[Mapping[str, Any]], str], Language]] = {
    "bitwise_arithmetic": (
        lambda entry: entry["metadata"]["problem"],
        _text(r"(?:0x[0-9a-fA-F]+|[-+*()\s]|<<|>>|[&|^~])*"),
    ),
    "intermediate_integration": (
        lambda entry: entry["metadata"]["integrand"],
        ANSWERS["intermediate_integration"],
    ),
    "number_sorting": (lambda entry: entry["answer"], ANSWERS["number_sorting"]),
    "polynomial_multiplication": (
        lambda entry: entry["answer"],
        ANSWERS["polynomial_multiplication"],
    ),
    "simple_integration": (
        lambda entry: entry["metadata"]["integrand"],
        ANSWERS["simple_integration"],
    ),
}
"""Which part of an entry a family's scorer evaluates, and its language: entries come from files."""
