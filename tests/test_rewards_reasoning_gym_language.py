"""What of an answer may reach a reasoning-gym scorer that evaluates it."""

from __future__ import annotations

import pytest

from rewards.reasoning_gym_language import ANSWERS


@pytest.mark.parametrize(
    ("family", "answer", "expected"),
    [
        ("countdown", "(1 + 2) * 3 - 4/5", True),
        ("countdown", "1.5", True),
        ("countdown", "2**9", False),
        ("countdown", "2*x", False),
        ("countdown", "0x10", False),
        ("countdown", "1_0", False),
        ("countdown", "1e9", False),
        ("countdown", "3!", False),
        ("countdown", "1 if 2 else 3", False),
        ("countdown", "(1, 2)", False),
        ("countdown", "１+1", False),
        ("countdown", "1\n+1", False),
        ("countdown", "", False),
        ("countdown", "(" * 1500, False),
        ("countdown", "1+" * 2000 + "1", False),
        ("polynomial_multiplication", "3*x**2 - y*z", True),
        ("polynomial_multiplication", "x**(1/2)", True),
        ("polynomial_multiplication", "x**101", False),
        ("polynomial_multiplication", "x**(99*99*99)", False),
        ("polynomial_multiplication", "x**(1+(2+3))", False),
        ("polynomial_multiplication", "9**9**9", False),
        ("polynomial_multiplication", "sin(x)", False),
        ("simple_integration", "x**3/3 + sqrt(2)*exp(-x) + C", True),
        ("simple_integration", "E**(-2*x/3)", True),
        ("simple_integration", "2**(x**9)", False),
        ("simple_integration", "Integral(x, x)", False),
        ("simple_integration", "eval(x)", False),
        ("simple_integration", "exp(x)(x)", False),
        ("simple_integration", "x.real", False),
        ("simple_integration", "chr(95)", False),
        ("simple_integration", "exp(*x)", False),
        ("simple_integration", "lambda: x", False),
        ("n_queens", "_ Q\nQ _", True),
        ("n_queens", "[['_']]", False),
        ("string_insertion", "ABCDE", True),
        ("string_insertion", "ABCDEF", False),
        ("number_sorting", "['-1.5', '2']", True),
        ("number_sorting", "[NaN]", False),
        ("complex_arithmetic", "(1.5 - 2i)", True),
        ("complex_arithmetic", "nan", False),
        ("complex_arithmetic", "inf", False),
    ],
)
def test_languages(family: str, answer: str, expected: bool) -> None:
    assert ANSWERS[family](answer) is expected
