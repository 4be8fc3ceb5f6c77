"""What each verifier takes for right, and what must not fool it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.prompts import make_prompt
from posttrain.errors import DataError
from posttrain.types import Outcome, Prompt
from rewards import exact, expression, reasoning_gym
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


@settings(deadline=None)
@given(st.integers(), st.integers(0, 5), st.sampled_from(["", "+"]))
def test_integers_normalise_to_their_decimal(number: int, zeros: int, plus: str) -> None:
    sign = "-" if number < 0 else plus
    assert exact.normalise(f" {sign}{'0' * zeros}{abs(number)} ") == str(number)


@settings(deadline=None)
@given(st.text())
def test_normalise_is_idempotent(text: str) -> None:
    once = exact.normalise(text)
    assert exact.normalise(once) == once


def reasoning_gym_prompt(family: str, seed: int) -> Prompt:
    import reasoning_gym as library

    entry = library.create_dataset(family, size=1, seed=seed)[0]
    return prompt({"family": family, "entry": entry})


@pytest.mark.parametrize(
    "family", ["chain_sum", "gcd", "base_conversion", "letter_counting", "number_sorting"]
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_reasoning_gym_families(family: str, seed: int) -> None:
    task = reasoning_gym_prompt(family, seed)
    reasoning_gym.check_reference(task)
    gold: str = task.reference["entry"]["answer"]
    assert reasoning_gym.score(task, f"thought#{gold}").outcome is CORRECT
    assert reasoning_gym.score(task, f"thought#[{gold}]").outcome is CORRECT
    changed = gold.replace("'", "'1", 1) if family == "number_sorting" else f"{gold}1"
    for wrong in (changed, "x", "[]]", "9" * 5000):
        result = reasoning_gym.score(task, f"#{wrong}")
        assert (result.outcome, result.correctness) == (WRONG, 0.0), wrong
    assert reasoning_gym.score(task, gold).outcome is UNPARSABLE


def test_reasoning_gym_gives_nothing_for_containing_the_answer() -> None:
    task = reasoning_gym_prompt("gcd", 1)
    gold = task.reference["entry"]["answer"]
    result = reasoning_gym.score(task, f"#{gold} {gold}")
    assert (result.outcome, result.correctness) == (WRONG, 0.0)


def test_an_answer_that_breaks_its_reasoning_gym_scorer_is_unparsable() -> None:
    task = reasoning_gym_prompt("prime_factorization", 1)
    assert reasoning_gym.score(task, "#two").outcome is UNPARSABLE


def test_families_that_evaluate_answers_are_all_refused() -> None:
    from reasoning_gym.factory import DATASETS

    own_parser = {"propositional_logic"}  # its parse_expr is not sympy's
    gold_only = {"number_sorting"}  # eval() on its own gold answer
    suspects = {
        family
        for family, (dataset, _) in DATASETS.items()
        if any(
            call in inspect.getsource(dataset.score_answer)
            for call in ("eval(", "exec(", "parse_expr(", "sympify(")
        )
    }
    assert suspects - own_parser - gold_only == reasoning_gym.EVALUATES_ANSWERS
    task = prompt({"family": "n_queens", "entry": {"question": "", "answer": "", "metadata": {}}})
    with pytest.raises(DataError, match="n_queens"):
        reasoning_gym.score(task, "#__import__('os').getpid()")


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


@settings(deadline=None)
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
            "cannot score",
        ),
        (
            "reasoning_gym",
            {"family": "gcd", "entry": {"question": "", "answer": "a#b", "metadata": {}}},
            "its own answer 'a#b'",
        ),
        ("nope", "5", "'nope'; there are exact, expression, maths, reasoning_gym"),
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
    assert set(VERIFIERS) == {"exact", "expression", "maths", "reasoning_gym"}
