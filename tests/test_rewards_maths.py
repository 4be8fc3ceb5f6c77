"""The maths verifier against pairs judged by hand, and what must neither fool nor stop it."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.prompts import make_prompt
from posttrain.errors import DataError
from posttrain.types import Outcome, Prompt
from rewards import maths
from rewards.score import Score

CORRECT, WRONG, UNPARSABLE, LIMIT = (
    Outcome.CORRECT,
    Outcome.WRONG,
    Outcome.UNPARSABLE,
    Outcome.LIMIT,
)
KILOBYTES_100 = 100_000


class Pair(NamedTuple):
    category: str
    outcome: Outcome
    gold: str
    completion: str


def read_pairs() -> list[Pair]:
    lines = (Path(__file__).parent / "maths_pairs.txt").read_text("utf-8").splitlines()
    rows = [line.split(" | ", 3) for line in lines if line and not line.startswith("#")]
    return [Pair(c, Outcome(o), gold, text.replace("↵", "\n")) for c, o, gold, text in rows]


PAIRS = read_pairs()
CATEGORIES = list(dict.fromkeys(pair.category for pair in PAIRS))

KNOWN = {
    # Units are not converted.
    (r"100 \text{ cm}", r"\boxed{1 \text{ m}}"): WRONG,
    # Without box or mark the number at the end counts, whatever is said about it.
    ("5", "I cannot solve problem 5."): CORRECT,
    # It takes a pair for an open interval, since (1, 2) may be either.
    (r"\mathbb{R}", r"\boxed{\pm\infty}"): CORRECT,
    # Notation that math-verify's grammar does not have: 0 all the same, under another name.
    ("7", r"\boxed{7 \lor 8}"): UNPARSABLE,
    ("7", r"\boxed{7 \text{ (or } 8)}"): UNPARSABLE,
    ("7", r"\boxed{2 \uparrow\uparrow 9!^{9!^{9!}}}"): UNPARSABLE,
}
"""Where the verifier and the judgement differ: what the verifier says."""


def task(gold: object) -> Prompt:
    return make_prompt("a question", reference=gold, domain="test")


def outcome(gold: str, text: str) -> Outcome:
    return maths.score(task(gold), text).outcome


def test_the_pairs_are_many_and_each_is_there_once() -> None:
    assert len(PAIRS) >= 700
    assert len({(pair.gold, pair.completion) for pair in PAIRS}) == len(PAIRS)
    assert Counter(pair.outcome for pair in PAIRS).keys() == {CORRECT, WRONG, UNPARSABLE, LIMIT}
    assert {(pair.gold, pair.completion) for pair in PAIRS} >= KNOWN.keys()


@pytest.mark.parametrize("category", CATEGORIES)
def test_agreement_with_judgement(
    category: str, record_property: Callable[[str, object], None]
) -> None:
    pairs = [pair for pair in PAIRS if pair.category == category]
    found = {}
    for pair in pairs:
        maths.check_reference(task(pair.gold))
        found[pair] = outcome(pair.gold, pair.completion)
    disagreements = {
        (pair.gold, pair.completion): said for pair, said in found.items() if said != pair.outcome
    }
    agreement = f"{len(pairs) - len(disagreements)}/{len(pairs)}"
    record_property("agreement", agreement)
    print(f"{category}: {agreement}")
    known = {(p.gold, p.completion) for p in pairs} & KNOWN.keys()
    assert disagreements == {key: KNOWN[key] for key in known}


def test_two_wrong_answers_are_taken_for_right() -> None:
    judged = {(pair.gold, pair.completion): pair.outcome for pair in PAIRS}
    taken = [key for key, said in KNOWN.items() if said is CORRECT and judged[key] is not CORRECT]
    assert taken == [
        ("5", "I cannot solve problem 5."),
        (r"\mathbb{R}", r"\boxed{\pm\infty}"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{" + "(" * KILOBYTES_100 + "}", LIMIT),
        ("\\boxed{" + "(" * KILOBYTES_100 + "5" + ")" * KILOBYTES_100 + "}", LIMIT),
        ("\\boxed{" + "{" * KILOBYTES_100, UNPARSABLE),
        ("\\boxed{" * (KILOBYTES_100 // 7), UNPARSABLE),
        ("\\boxed{" * 5000 + "5" + "}" * 5000, CORRECT),
        ("[" * KILOBYTES_100, LIMIT),
        ("\\boxed{" + "9" * KILOBYTES_100 + "}", LIMIT),
        ("\\boxed{" + "1+" * (KILOBYTES_100 // 2) + "1}", LIMIT),
        ("\\boxed{" + "\\frac{1}{1+" * 30 + "1" + "}" * 30 + "}", LIMIT),
        ("\\boxed{" + "\\sqrt{" * 30 + "5" + "}" * 30 + "}", LIMIT),
        ("\\boxed{" + "(" * 19 + "5" + ")" * 19 + "}", CORRECT),
        ("\\boxed{" + "-" * 300 + "5}", UNPARSABLE),
        ("\\boxed{0." + "0" * 900 + "5}", WRONG),
        ("<think>" * 10_000 + "</think>" * 10_000 + "\\boxed{5}", CORRECT),
        ("<think>" + "\\boxed{5}" * 10_000, UNPARSABLE),
        ("$" * KILOBYTES_100, UNPARSABLE),
        ("answer is " * 10_000 + "5", CORRECT),
        ("#" * KILOBYTES_100 + "5", CORRECT),
        ("a" * KILOBYTES_100 + " 5", CORRECT),
        ("5 " * (KILOBYTES_100 // 2), LIMIT),
        ("\\frac" * (KILOBYTES_100 // 5), LIMIT),
        ("\\boxed{" + "²" * 900 + "}", UNPARSABLE),
        ("\\boxed{" + "1,000" * 150 + "}", WRONG),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else str(value),
)
def test_long_texts_are_decided_quickly(text: str, expected: Outcome) -> None:
    maths.score(task("5"), "5")  # imports
    began = time.process_time()
    result = maths.score(task("5"), text)
    assert result.outcome is expected, result.explanation
    assert len(result.explanation) < 300
    assert time.process_time() - began < 5


def test_correctness_is_all_or_nothing() -> None:
    assert maths.score(task("5"), "\\boxed{5}").correctness == 1.0
    assert maths.score(task("5"), "\\boxed{5.1}").correctness == 0.0


numbers = st.builds(Fraction, st.integers(-400, 400), st.integers(1, 60))


def forms(value: Fraction) -> dict[str, str]:
    p, q = value.numerator, value.denominator
    whole, rest = divmod(abs(p), q)
    sign = "-" if p < 0 else ""
    return {
        "slash": f"{p}/{q}",
        "frac": rf"\frac{{{p}}}{{{q}}}",
        "sign before": rf"{sign}\dfrac{{{abs(p)}}}{{{q}}}",
        "not reduced": rf"\frac{{{3 * p}}}{{{3 * q}}}",
        "mixed": rf"{sign}{whole}\frac{{{rest}}}{{{q}}}" if whole and rest else f"{p}/{q}",
        "percent": rf"\frac{{{100 * p}}}{{{q}}}\%",
        "equation": f"x = {p}/{q}",
        "sum": rf"{p - q}/{q} + 1",
        "times": rf"{p} \cdot {q}^{{-1}}",
    }


@settings(max_examples=25, derandomize=True)
@given(numbers, numbers)
def test_a_fraction_equals_itself_in_every_form_and_no_other(a: Fraction, b: Fraction) -> None:
    written = forms(a)
    for gold in ("slash", "frac", "mixed"):
        for form, text in written.items():
            assert outcome(written[gold], f"\\boxed{{{text}}}") is CORRECT, (gold, form)
    if a != b:
        for form, text in forms(b).items():
            counts = form == "percent" and 100 * b == a  # "how many percent"
            expected = CORRECT if counts else WRONG
            assert outcome(written["frac"], f"\\boxed{{{text}}}") is expected, form


SOUP = r"""
    0 1 5 0.5 x e i \pi \infty + - \cdot / ^ ^{2} _1 ( ) [ ] \{ \} { } , ; = < \le \frac
    \frac{1}{2} \sqrt \sin \log \binom{5}{2} ! | \% % \$ $ \text{and} \text{cm} or \cup \in
    \mathbb{R} \pm \approx \left( \right) \begin{pmatrix}1\\2\end{pmatrix} \lfloor \max . ² √ ½
    ∞ − ٣ f(x) \Gamma \mod : ^\circ & \\ # @ \boxed{ \overline{3} lim
"""


@settings(max_examples=150, derandomize=True)
@given(
    st.sampled_from(["5", "x+1", r"\{1,2\}", "x=5", "x>3", r"50\%", r"5\text{ cm}", "B"]),
    st.lists(st.sampled_from(SOUP.split()), min_size=1, max_size=9).map(" ".join),
)
def test_no_text_makes_it_raise(gold: str, soup: str) -> None:
    for text in (f"\\boxed{{{soup}}}", soup, f"The answer is {soup}."):
        assert outcome(gold, text) in (CORRECT, WRONG, UNPARSABLE, LIMIT)


@pytest.mark.parametrize(
    "gold",
    [
        "",
        r"\frac{1}{",
        5,
        "???",
        "٥",
        r"1, 2, \ldots, 10",
        "the answer is 5",
        "She sells 48/2 = 24 clips.\n#### 72",
        r"9^{9^{9^{9}}}",
        "1000000!",
        r"\frac{0}{0}",
        "1.2.3",
    ],
)
def test_gold_that_no_answer_could_equal_is_found_at_load(gold: object) -> None:
    with pytest.raises(DataError, match=r"the reference must be|gold answer"):
        maths.check_reference(task(gold))


@pytest.mark.parametrize("gold", [r"\int_0^1 f(x) dx", r"\sum_{k=1}^n k", r"\lim_{n\to\infty} a_n"])
def test_an_answer_may_leave_open_what_the_gold_answer_leaves_open(gold: str) -> None:
    maths.check_reference(task(gold))
    assert outcome(gold, f"\\boxed{{{gold}}}") is CORRECT


def test_it_works_off_the_main_thread() -> None:
    results: list[Score] = []
    thread = threading.Thread(
        target=lambda: results.append(maths.score(task(r"\frac{3}{4}"), r"\boxed{0.75}"))
    )
    thread.start()
    thread.join()
    assert [result.outcome for result in results] == [CORRECT]


def test_threads_do_not_disturb_one_another() -> None:
    found: defaultdict[int, list[Outcome]] = defaultdict(list)

    def work(number: int) -> None:
        for other in range(12):
            found[number].append(outcome(str(number), rf"\boxed{{\frac{{{2 * other}}}{{2}}}}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, outcomes in found.items():
        assert [other for other, said in enumerate(outcomes) if said is CORRECT] == [number]
