"""What each verifier takes for right, and what must not fool it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.prompts import make_prompt
from posttrain.errors import DataError
from posttrain.types import Outcome, Prompt
from rewards import exact, expression
from rewards.answer import extract_answer
from rewards.shaping import RewardSettings
from rewards.verifiers import VERIFIERS, check_references, verifier_name

CORRECT, WRONG, UNPARSABLE, LIMIT = (
    Outcome.CORRECT,
    Outcome.WRONG,
    Outcome.UNPARSABLE,
    Outcome.LIMIT,
)
KILOBYTES_100 = 100_000


def prompt(reference: Any, domain: str = "test", **metadata: Any) -> Prompt:
    return make_prompt("a question", reference=reference, domain=domain, metadata=metadata)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2+9=11#11", "11"),
        ("#1#2", "2"),
        ("# 5 ", "5"),
        ("#[5]", "5"),
        ("#[ 5 ]", "5"),
        ("#[[5]]", "[5]"),
        ("#[5", "[5"),
        ("#[", "["),
        ("#a\nb", "a\nb"),
        ("#[]", None),
        ("5", None),
        ("5#", None),
        ("#5# \n", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("reference", "text", "outcome"),
    [
        ("51", "#51", CORRECT),
        ("51", "1+1=2#[51]", CORRECT),
        ("51", "#051", CORRECT),
        ("51", "#+51", CORRECT),
        ("0051", "#51", CORRECT),
        ("0", "#-000", CORRECT),
        ("-7", "#-07", CORRECT),
        ("A  b", "# a\tB ", CORRECT),
        ("[1, 2]", "#[1, 2]", CORRECT),
        ("[1, 2]", "#[[1, 2]]", CORRECT),
        ("51", "#51#52", WRONG),
        ("51", "#51 52", WRONG),
        ("51", "#-51", WRONG),
        ("51", "#5 1", WRONG),
        ("51", "#51.0", WRONG),
        ("3", "#٣", WRONG),
        ("3", "#３", WRONG),
        ("10", "#1", WRONG),
        ("1", "#" + "0" * KILOBYTES_100 + "1", CORRECT),
        ("1", "#" + "9" * KILOBYTES_100, WRONG),
        ("1", "#" + "[" * KILOBYTES_100, WRONG),
        ("51", "51", UNPARSABLE),
        ("51", "#", UNPARSABLE),
    ],
)
def test_exact(reference: str, text: str, outcome: Outcome) -> None:
    result = exact.score(prompt(reference), text)
    assert result.outcome is outcome
    assert result.correctness == (1.0 if outcome is CORRECT else 0.0)
    assert len(result.explanation) < 300


@given(st.integers(), st.integers(0, 5), st.sampled_from(["", "+"]))
def test_integers_normalise_to_their_decimal(number: int, zeros: int, plus: str) -> None:
    sign = "-" if number < 0 else plus
    assert exact.normalise(f" {sign}{'0' * zeros}{abs(number)} ") == str(number)


@given(st.text())
def test_normalise_is_idempotent(text: str) -> None:
    once = exact.normalise(text)
    assert exact.normalise(once) == once


DOUBLE_PLUS_ONE = {"variable": "x", "examples": [[0, 1], [3, 7], [-2, -3]]}


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("#2*x+1", CORRECT),
        ("#[x + x + 1]", CORRECT),
        ("#-(-x*2-1)", CORRECT),
        ("#(x*4+2)//2", CORRECT),
        ("#" + "(" * 60 + "2*x+1" + ")" * 60, CORRECT),
        ("#x+1", WRONG),
        ("#2*x", WRONG),
        ("#2*x%1000", WRONG),
        ("#9**9**9", UNPARSABLE),
        ("#x/1", UNPARSABLE),
        ("#y", UNPARSABLE),
        ("#2x+1", UNPARSABLE),
        ("#1if x else 2", UNPARSABLE),
        ("#0x10", UNPARSABLE),
        ("#1_0", UNPARSABLE),
        ("#1.0", UNPARSABLE),
        ("#True", UNPARSABLE),
        ("#+x", UNPARSABLE),
        ("#x(1)", UNPARSABLE),
        ("#()", UNPARSABLE),
        ("#2*x+1;", UNPARSABLE),
        ("#２*x+1", UNPARSABLE),
        ("#2*ｘ+1", UNPARSABLE),
        ("#2*x+1\x00", UNPARSABLE),
        ("#__import__('os')", UNPARSABLE),
        ("#lambda: 0", UNPARSABLE),
        ("#2*x+", UNPARSABLE),
        ("2*x+1", UNPARSABLE),
        ("#1//x", LIMIT),
        ("#x%0", LIMIT),
        ("#" + "9" * 150, LIMIT),
        ("#" + "*".join(["999999"] * 20), LIMIT),
        ("#" + "-" * 150 + "x", LIMIT),
        ("#" + "x+" * 60 + "x", LIMIT),
        ("#" + "(" * KILOBYTES_100, LIMIT),
        ("#" + "x+" * (KILOBYTES_100 // 2) + "x", LIMIT),
    ],
)
def test_expression(text: str, outcome: Outcome) -> None:
    result = expression.score(prompt(DOUBLE_PLUS_ONE), text)
    assert result.outcome is outcome, result.explanation
    assert result.correctness == (1.0 if outcome is CORRECT else 0.0)


sources = st.recursive(
    st.one_of(st.integers(0, 99).map(str), st.just("x")),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(
            lambda parts: f"({' '.join(parts)})"
        ),
        inner.map(lambda operand: f"-{operand}"),
    ),
    max_leaves=6,
)


@given(sources, st.integers(-9, 9))
def test_expressions_run_as_python_does(source: str, value: int) -> None:
    expected = eval(source, {"x": value})
    task = prompt({"variable": "x", "examples": [[value, expected]]})
    assert expression.score(task, f"#{source}").outcome is CORRECT
    task = prompt({"variable": "x", "examples": [[value, expected + 1]]})
    assert expression.score(task, f"#{source}").outcome is WRONG


@pytest.mark.parametrize(
    ("verifier", "reference", "message"),
    [
        ("exact", 51, "string"),
        ("exact", " ", "empty"),
        ("exact", "a#b", "#"),
        ("maths", "\\frac{1}{", "parse"),
        ("maths", "", "parse"),
        ("maths", 5, "string"),
        ("expression", {"variable": "x", "examples": []}, "at least one"),
        ("expression", {"variable": "if", "examples": [[1, 2]]}, "'if'"),
        ("expression", {"variable": "x", "examples": [[1, 2.5]]}, "2.5"),
        ("expression", {"variable": "x", "examples": [[1, 10**99]]}, "integers up to"),
        ("reasoning_gym", "5", "family"),
        (
            "reasoning_gym",
            {"family": "nope", "entry": {"question": "", "answer": "", "metadata": {}}},
            "no family 'nope'",
        ),
        (
            "reasoning_gym",
            {"family": "composite", "entry": {"question": "", "answer": "", "metadata": {}}},
            "source_dataset",
        ),
        (
            "reasoning_gym",
            {"family": "dice", "entry": {"question": "", "answer": 0.5, "metadata": {}}},
            "its own answer '0.5'",
        ),
        ("nope", "5", "'nope'; there are code, exact, expression, maths, reasoning_gym"),
    ],
)
def test_bad_references_are_found_and_named(verifier: str, reference: Any, message: str) -> None:
    good = prompt("5")
    bad = prompt(reference, verifier=verifier)
    check_references([good, good], RewardSettings())
    with pytest.raises(DataError, match="1 prompts") as caught:
        check_references([good, bad], RewardSettings())
    assert message in str(caught.value)
    assert bad.prompt_id in str(caught.value)


def test_who_chooses_the_verifier() -> None:
    settings = RewardSettings(verifiers={"algebra": "maths"})
    assert verifier_name(prompt("5"), settings) == "exact"
    assert verifier_name(prompt("5", verifier="expression"), settings) == "expression"
    assert verifier_name(prompt("5", "algebra", verifier="expression"), settings) == "maths"
    assert set(VERIFIERS) == {"code", "exact", "expression", "maths", "reasoning_gym"}
