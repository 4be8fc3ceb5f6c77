"""The answer is a program: an arithmetic expression that is run on every example.

`prompt.reference` is `{"variable": "x", "examples": [[in, out], ...]}`. The language is integer
literals, the variable, `+ - * // %`, unary minus and parentheses, walked over Python's syntax tree
within fixed limits; nothing is ever handed to eval().
"""

from __future__ import annotations

import ast
import keyword
import operator
import re
from collections.abc import Callable
from typing import Any

from posttrain.errors import DataError
from posttrain.types import Outcome, Prompt
from rewards.answer import extract_answer
from rewards.score import Score, failed, quote, right, unanswered

MAX_LENGTH = 200
"""Characters. Below it Python's own parser cannot run out of stack."""
MAX_DEPTH = 32
"""Nested operators."""
MAX_MAGNITUDE = 10**15
"""Of every intermediate value, so that no step is expensive."""

_TOKENS = re.compile(r"[\sA-Za-z0-9_()+\-*/%]*", re.ASCII)
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class _NotInLanguage(Exception):
    pass


class _LimitBroken(Exception):
    pass


def score(prompt: Prompt, text: str) -> Score:
    """Correct when every example comes out right; `LIMIT` when the program fails on one."""
    answer = extract_answer(text)
    if answer is None:
        return unanswered()
    variable: str = prompt.reference["variable"]
    try:
        program = _parse(answer)
        for value, expected in prompt.reference["examples"]:
            result = _run(program, {variable: value}, depth=1)
            if result != expected:
                return failed(Outcome.WRONG, f"{variable}={value} gives {result}")
    except _NotInLanguage as error:
        return failed(Outcome.UNPARSABLE, f"{quote(answer)}: {error}")
    except (_LimitBroken, ZeroDivisionError) as error:
        return failed(Outcome.LIMIT, f"{quote(answer)}: {error}")
    return right()


def _parse(source: str) -> ast.expr:
    if len(source) > MAX_LENGTH:
        raise _LimitBroken(f"{len(source)} characters, the limit is {MAX_LENGTH}")
    if not _TOKENS.fullmatch(source):
        raise _NotInLanguage("a character that the language does not have")
    # `1if x` would make the tokeniser warn, and Python reads `0x10`, `1_0` as numbers.
    if re.search(r"[0-9][A-Za-z_]", source):
        raise _NotInLanguage("a number runs into a name")
    try:
        return ast.parse(source.strip(), mode="eval").body
    except SyntaxError as error:
        raise _NotInLanguage(str(error.msg)) from error


def _run(node: ast.expr, names: dict[str, int], depth: int) -> int:
    if depth > MAX_DEPTH:
        raise _LimitBroken(f"operators nested deeper than {MAX_DEPTH}")
    match node:
        case ast.Constant(value=value) if type(value) is int:
            result = value
        case ast.Name(id=name) if name in names:
            result = names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            result = -_run(operand, names, depth + 1)
        case ast.BinOp(left=left, op=op, right=right_hand) if type(op) in _OPERATORS:
            apply = _OPERATORS[type(op)]
            result = apply(_run(left, names, depth + 1), _run(right_hand, names, depth + 1))
        case _:
            raise _NotInLanguage(f"{type(node).__name__} is not in the language")
    if abs(result) > MAX_MAGNITUDE:
        raise _LimitBroken(f"a value beyond {MAX_MAGNITUDE:.0e}")
    return result


def check_reference(prompt: Prompt) -> None:
    """Raises DataError unless the reference names a variable and integer examples within limits."""
    reference: Any = prompt.reference
    match reference:
        case {"variable": str(variable), "examples": [_, *_] as examples}:
            pass
        case _:
            raise DataError(
                'the reference must be {"variable": name, "examples": [[in, out], …]} with at '
                f"least one example, got {quote(str(reference))}"
            )
    if not (variable.isascii() and variable.isidentifier()) or keyword.iskeyword(variable):
        raise DataError(f"{variable!r} cannot be a variable; use an ASCII name such as 'x'")
    for example in examples:
        match example:
            case [int(given), int(out)] if max(abs(given), abs(out)) <= MAX_MAGNITUDE:
                continue
            case _:
                raise DataError(
                    f"an example must be two integers up to {MAX_MAGNITUDE:.0e}, got {example!r}"
                )
