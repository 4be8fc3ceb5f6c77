r"""Mathematical answers, compared by math-verify (symbolically, not as strings).

`prompt.reference` is the gold answer in LaTeX or plain notation, without `\boxed{}`. Where the
answer stands says `maths_answer`, how it is written `maths_notation`, what it may cost
`maths_limits`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from posttrain.errors import DataError
from posttrain.types import Outcome, Prompt
from rewards import maths_words
from rewards.maths_answer import final_answer
from rewards.maths_equality import equal, parse
from rewards.maths_limits import MAX_LENGTH, LimitBroken, computations
from rewards.maths_notation import num_ors, to_latex
from rewards.maths_number_words import without_counting_word
from rewards.maths_units import Value, split
from rewards.score import Score, failed, quote, right


def score(prompt: Prompt, text: str) -> Score:
    """Compares the last answer behind the reasoning section with the gold answer."""
    answer = final_answer(text)
    if answer is None:
        return failed(Outcome.UNPARSABLE, "no answer behind the reasoning section")
    if len(answer) > MAX_LENGTH:
        reason = f"an answer of {len(answer)} characters, the limit is {MAX_LENGTH}"
        return failed(Outcome.LIMIT, reason)
    try:
        verdict = _agrees(prompt.reference, answer)
    except LimitBroken as error:
        return failed(Outcome.LIMIT, f"{quote(answer)}: {error}")
    if verdict is None:
        return failed(Outcome.UNPARSABLE, f"{quote(answer)} cannot be read as mathematics")
    return right() if verdict else failed(Outcome.WRONG, f"{quote(answer)} is not the reference")


def _agrees(reference: str, answer: str) -> bool | None:
    latex = to_latex(answer)
    if latex is None:
        return None
    letter = maths_words.gold_choice(reference)
    if letter is not None:
        return maths_words.choice(latex) == letter
    expected = maths_words.gold_words(reference)
    if expected is not None:
        return maths_words.words(latex) == expected
    gold = _gold(reference)
    assert gold is not None, "gold answers are checked when the data is loaded"
    verdict = _equals(gold, answer, latex)
    if verdict is False:
        return _counts_in_words(gold, reference, answer)
    return verdict


def _equals(gold: Value, answer: str, latex: str) -> bool | None:
    left = computations(latex) - computations(gold.latex)
    if left:
        raise LimitBroken(f"{', '.join(sorted(left))} is left to be worked out")
    return equal(gold, replace(split(latex, gold.unit), num_ors=num_ors(answer)))


def _counts_in_words(gold: Value, reference: str, answer: str) -> bool:
    """As with percent (`maths_equality.equal`): asked "how many dozens", 7 dozen are 7. Not where
    the gold answer has a unit or such a word itself: 7 dozen eggs are not 7 eggs."""
    counted = without_counting_word(answer)
    if counted is None or without_counting_word(reference) or gold.latex != to_latex(reference):
        return False
    latex = to_latex(counted)
    return latex is not None and bool(_equals(gold, counted, latex))


@lru_cache(maxsize=4096)
def _gold(reference: str) -> Value | None:
    latex = to_latex(reference)
    return None if latex is None else replace(split(latex), num_ors=num_ors(reference))


def _is_readable(gold: Value | None) -> bool:
    return (
        gold is not None
        and not maths_words.is_sentence(gold.latex)
        and parse(gold.latex) is not None
    )


def check_reference(prompt: Prompt) -> None:
    """Raises DataError for a gold answer that cannot be parsed, or that no answer could equal."""
    reference = prompt.reference
    if not isinstance(reference, str):
        raise DataError(f"the reference must be a string, got {reference!r}; write it in quotes")
    gold = _gold(reference)
    is_text = maths_words.gold_choice(reference) or maths_words.gold_words(reference)
    try:
        if not is_text and not _is_readable(gold):
            raise DataError(
                f"math-verify cannot parse the gold answer {quote(reference)}; "
                "write it as LaTeX mathematics, words in \\text{}"
            )
    except LimitBroken as error:
        raise DataError(f"the gold answer {quote(reference)} is too large: {error}") from error
    own = score(prompt, f"\\boxed{{{reference}}}")
    if own.outcome is not Outcome.CORRECT:
        raise DataError(
            f"the gold answer {quote(reference)} does not equal itself: {own.explanation}; "
            "write it as one mathematical value without \\boxed{}"
        )
