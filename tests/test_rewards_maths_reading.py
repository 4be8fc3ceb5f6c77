"""What of a completion is its answer, and how it is written down for math-verify."""

from __future__ import annotations

import timeit

import pytest
import sympy

from rewards.maths_answer import final_answer
from rewards.maths_limits import LimitBroken, check_expression, check_text, computations
from rewards.maths_notation import num_ors, to_latex
from rewards.maths_number_words import calculated
from rewards.maths_units import Value, split
from rewards.maths_words import choice, gold_choice, gold_words, is_sentence
from rewards.reasoning_section import DELIMITERS, after_reasoning


@pytest.mark.parametrize("opening, closing", DELIMITERS)
def test_the_answer_begins_where_the_reasoning_ends(opening: str, closing: str) -> None:
    assert after_reasoning("no reasoning") == "no reasoning"
    assert after_reasoning(f"{opening}a{closing}b{closing}c") == "c"
    assert after_reasoning(f"{opening.upper()}a{closing.upper()}b") == "b"
    assert after_reasoning(f"a{closing}b") == "b"
    assert after_reasoning(f"{opening}a") is None
    assert after_reasoning(f"{opening}a{closing}b{opening}c") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{a}", "a"),
        (r"\boxed{\frac{1}{2}} and more", r"\frac{1}{2}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{1\\}", r"1\\"),
        (r"\boxed{a}\boxed{b}", "b"),
        (r"\boxed{a\boxed{b}}", "b"),
        (r"\boxed{a} \boxed{", None),
        (r"\boxed{a} \boxed{ }", None),
        (r"\boxed5", "5"),
        ("boxed{1}", "1"),
        ("x # 5 ", "5"),
        ("#### Answer: 5", "5"),
        ("# Heading\nthe answer is 5, as $2+3=5$", "5"),
        ("The answer is: **7**.", "7"),
        ("The answer is $x+1$ because of that.", "$x+1$"),
        ("The answer is 4. So the answer is 5.", "5"),
        ("**Solution:**\n\nShe sold 48 in May. In all 48+24 = 72 clips.", "72"),
        ("**Solution:**\n* May: 48\n* June: 24\n* In all: 72", "72"),
        ("Solution:\n$\\frac{48}{2}=24$\n$48+24=72$", "48+24=72"),
        ("The solution is as follows.\n48+24=72", "48+24=72"),
        ("The solution is as follows.", "as follows"),
        ("Solution:\nx = 5\n\nCheck: 2*5 = 10", "x = 5"),
        ("Answer: not 5.\nCheck: 2+3 = 5", "not 5"),
        ("The answer is either 5 or 6.\n5+1 = 6", "either 5 or 6"),
        ("Answer: about 5.3 metres per second. Then 2*3 = 6", "about 5.3 metres per second"),
        ("The answer is:\n\n$$\n42\n$$", "42"),
        ("The answer is\n\\[\n42.\n\\]\nI hope it is correct.", "42"),
        ("The answer is:\n\\(\nx\n\\), because of 5.", "x"),
        ("Answer:\n```text\n42\n```\nDone with 5.", "42"),
        ("Answer:\n$$\n7\n$$ or $$\n8\n$$", "$$\n7\n$$ or $$\n8\n$$"),
        ("Solution:\n$$\n48/2 = 24\n$$\nThen\n$$\n48+24 = 72\n$$", "48+24 = 72"),
        ("Answer: $42.\nHe paid $50.", "$42"),
        (r"We get \[ x = 5 \]", "x = 5"),
        ("$a$ and $b$ here", "b"),
        ("$a$ gives 7 here", "7"),
        ("- 5", "5"),
        ("x = 5", "x = 5"),
        ("it costs $1,200.50 in all", "$1,200.50"),
        ("it is 3/4 of it", "3/4"),
        ("it is 5 hundred million in all", "5 hundred million"),
        ("it is $5$ thousand in all", "5 thousand"),
        ("there are 5 millionaires", "5"),
        ("nothing", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("−5", "-5"),
        ("5²", "5^{2}"),
        ("x⁻¹", "x^{-1}"),
        ("2½", r"2\frac{1}{2}"),
        ("√12", r"\sqrt{12}"),
        ("２％", r"2\%"),
        ("٢", None),
        ("五", None),
        ("1.2.3", None),
        (r"1, \ldots, 9", None),
        ("2**10", "2^10"),
        ("9^9^9", "9^{9^{9}}"),
        ("1.5e-3", r"1.5 \cdot 10^{-3}"),
        ("e3", "e3"),
        ("2 1/2", r"2\frac{1}{2}"),
        (r"0.1\overline{6}", r"\frac{15}{90}"),
        (r"1\,234\,567", "1234567"),
        ("1,234", "1,234"),
        ("5 6", "5, 6"),
        ("2(3)", r"2 \cdot (3)"),
        (r"\log_2(8)", r"\log_2(8)"),
        (r"\log_2 8", r"\log_2 8"),
        (r"\sin^2(x)", r"\sin^2(x)"),
        (r"\frac{7}{8}", r"\frac{7}{8}"),
        ("2pi", r"2\pi"),
        ("$5$.", "5"),
        (r"\(5\)", "5"),
        (r"5 \text{ or } 6", r"5 \text{ },\text{ } 6"),
        ("5\u200b0", "50"),
        ("5,000 million", r"5000 \cdot 10^{6}"),
        (r"5\text{ Million people}", r"5 \cdot 10^{6}\text{ people}"),
        (r"\text{2 hundred thousand}", r"2 \cdot 10^{2} \cdot 10^{3}"),
        (r"\text{5 million is wrong}", r"\text{5 million is wrong}"),
        (r"\text{(B) 5 million} 2 million", r"\text{(B) 5 million} 2 \cdot 10^{6}"),
        ("3 dozens", r"3 \cdot 12"),
        ("(x+1) squared", "(x+1)^{2}"),
        (r"\frac{2}{3} squared", r"\frac{2}{3} squared"),
    ],
)
def test_one_notation(text: str, latex: str | None) -> None:
    assert to_latex(text) == latex


def test_a_long_number_is_gone_through_once() -> None:
    """From each of its digits, 1000 of them took a hundred times as long."""
    assert min(timeit.repeat(lambda: calculated("1" * 1000), number=1, repeat=5)) < 0.02


def test_every_or_is_counted_and_nothing_else() -> None:
    texts = ("x<3 or x>5", r"1 \text{ or } 2\ \mathrm{or}\ 3", r"1 \text{ and } 2", r"for \lor")
    assert [num_ors(text) for text in texts] == [1, 2, 0, 0]


@pytest.mark.parametrize(
    ("latex", "value"),
    [
        (r"50\%", Value("50", percent=True)),
        (r"50 \text{ percent}", Value("50", percent=True)),
        (r"5 \text{ cm}", Value("5", unit="cm^1")),
        (r"5 \text{ centimeters}", Value("5", unit="cm^1")),
        (r"5 \text{ square meters}", Value("5", unit="m^2")),
        (r"5\text{ m}^{2}", Value("5", unit="m^2")),
        ("5 apples", Value("5")),
        (r"\$5", Value("5", unit="$^1")),
        (r"90^\circ", Value("90", unit="degree^1")),
        (r"7^{\text{th}}", Value("7")),
        ("101_2", Value("101", unit="base 2")),
        ("3m", Value("3m")),
        ("5 x", Value("5 x")),
        ("5 or x", Value("5 or x")),
        (r"x \text{ cm}", Value(r"x \text{ cm}")),
        (r"\text{Monday}", Value(r"\text{Monday}")),
        (r"\text{5 cm}", Value("5", unit="cm^1")),
        (r"\text{-2.5 square meters}", Value("-2.5", unit="m^2")),
        (r"\text{50\%}", Value("50", percent=True)),
        (r"\text{5 apples}", Value("5")),
        (r"\text{5 is wrong}", Value(r"\text{5 is wrong}")),
        (r"\text{5 to 6}", Value(r"\text{5 to 6}")),
        (r"\text{3m}", Value("3m")),
    ],
)
def test_what_stands_around_a_value(latex: str, value: Value) -> None:
    assert split(latex) == value


@pytest.mark.parametrize(
    ("latex", "unit", "value"),
    [
        ("5cm", "cm^1", Value("5", unit="cm^1")),
        (r"\text{5cm}", "cm^1", Value("5", unit="cm^1")),
        (r"\frac{1}{2}m^{2}", "m^2", Value(r"\frac{1}{2}", unit="m^2")),
        ("60km/h", "km/h^1", Value("60", unit="km/h^1")),
        ("5mm", "cm^1", Value("5mm")),
        ("3m^2", "m^1", Value("3m^2")),
        ("xm", "m^1", Value("xm")),
        ("3m", None, Value("3m")),
    ],
)
def test_a_unit_right_behind_its_number(latex: str, unit: str | None, value: Value) -> None:
    assert split(latex, unit) == value


def test_letters_and_words() -> None:
    assert [gold_choice(gold) for gold in ("B", "(B)", r"\text{(B)}", "AB", "x", "K")] == [
        "B",
        "B",
        "B",
        None,
        None,
        None,
    ]
    assert [
        choice(text) for text in ("b.", r"\textbf{(B)}\ 12", "option B", "B or C", "not B")
    ] == [
        "B",
        "B",
        "B",
        None,
        None,
    ]
    assert gold_words(r"\text{No solution}") == "no solution"
    assert gold_words("Monday") == "monday"
    assert [gold_words(gold) for gold in ("abc", "2x", "sin", r"\text{5}")] == [None] * 4
    assert is_sentence("the answer is 5")
    assert not is_sentence(r"2x \text{ is the answer}")


def test_limits_of_a_text() -> None:
    check_text("(" * 20 + ")" * 20)
    check_text("1" * 1000)
    check_text(r"9999! + \binom{10}{5}")
    for text, message in (
        ("(" * 21, "21 deep, the limit is 20"),
        ("1" * 1001, "1001 characters, the limit is 1000"),
        ("10000!", "a number of 5 digits"),
        (r"\binom{10000}{2}", "a number of 5 digits"),
    ):
        with pytest.raises(LimitBroken, match=message):
            check_text(text)
    assert computations(r"\int_0^1 \sum x + \operatorname{eye}(3)") == {
        r"\int",
        r"\sum",
        r"\operatorname{eye}",
    }
    assert computations(r"\operatorname{gcd}(4, 6) + \inf + \limits") == frozenset()


def test_limits_of_an_expression() -> None:
    x, y = sympy.symbols("x y")

    def power(base: object, exponent: object) -> sympy.Pow:
        return sympy.Pow(base, exponent, evaluate=False)

    for cheap in (power(2, 2024), power(x, 2024), power(x + y, 100), power(2, x), power(10, -9000)):
        check_expression(cheap)
    for dear, message in (
        (power(10, 10_001), "about 1e.04 digits"),
        (power(10, -10_001), "about 1e.04 digits"),
        (power(9, power(9, 9)), "digits, the limit is 10000"),
        (power(9, power(9, power(9, 9))), "digits"),
        (power(x, power(9, 9)), "an exponent of 3.87e.08"),
        (power(x + y, 6000), "terms"),
        (sympy.factorial(power(9, 9), evaluate=False), "of a number of 9 digits"),
        (sympy.Float("1e99999"), "digits"),
    ):
        with pytest.raises(LimitBroken, match=message):
            check_expression(dear)
