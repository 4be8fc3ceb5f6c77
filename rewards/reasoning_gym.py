"""Answers to reasoning-gym tasks, scored by the family's own scorer.

`prompt.reference` is `{"family": name, "entry": {"question", "answer", "metadata"}}`. Importing
reasoning_gym takes about a second, so it happens at the first use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from posttrain.errors import DataError
from posttrain.types import Outcome, Prompt
from rewards.answer import extract_answer
from rewards.score import Score, failed, quote, right, unanswered

CORRECT_FROM = 1.0
"""Less than this is wrong and scores 0: many families give part of the score to any answer that
merely contains the right one ("15" for "5"), which a policy would learn to exploit."""

EVALUATES_ANSWERS = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Families whose scorer hands the policy's answer to eval() or sympy's parse_expr (the same)."""


def score(prompt: Prompt, text: str) -> Score:
    """Raises DataError for a family that cannot be used (found at load by `check_reference`)."""
    answer = extract_answer(text)
    if answer is None:
        return unanswered()
    entry = prompt.reference["entry"]
    score_answer = _score_answer_of(prompt.reference["family"])
    candidates = [answer]
    if str(entry["answer"]).startswith("["):
        candidates.append(f"[{answer}]")  # extraction took brackets that belong to the answer
    try:
        best = max(score_answer(answer=candidate, entry=entry) for candidate in candidates)
    except Exception as error:  # the entry scores its own answer, so this one broke the scorer
        return failed(Outcome.UNPARSABLE, f"{quote(answer)}: {type(error).__name__}: {error}")
    if best >= CORRECT_FROM:
        return right()
    return failed(Outcome.WRONG, f"{quote(answer)} scores {best:.3g}")


@cache
def _score_answer_of(family: str) -> Callable[..., float]:
    """Cached: some families read their word lists whenever they are built."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        raise DataError(f"reasoning-gym has no family {family!r}; see reasoning_gym.factory")
    if family in EVALUATES_ANSWERS:
        raise DataError(
            f"the reasoning-gym family {family!r} runs eval() on the policy's answers and is "
            "refused; choose another family"
        )
    try:
        scorer: Callable[..., float] = reasoning_gym.get_score_answer_fn(family)
    except Exception as error:
        raise DataError(f"the reasoning-gym family {family!r} cannot score: {error!r}") from error
    return scorer


def check_reference(prompt: Prompt) -> None:
    """Raises DataError for an unusable family or an entry that does not score its own answer."""
    reference: Any = prompt.reference
    match reference:
        case {"family": str(), "entry": {"question": _, "answer": gold, "metadata": _}}:
            pass
        case _:
            raise DataError(
                "the reference must be {family: name, entry: {question, answer, metadata}}, "
                f"got {quote(str(reference))}"
            )
    _score_answer_of(reference["family"])
    if gold is None:  # some families have no oracle, only a scorer
        return
    own = score(prompt, f"#{gold}")
    if own.outcome is not Outcome.CORRECT:
        raise DataError(
            f"the entry of family {reference['family']!r} does not score its own answer "
            f"{quote(str(gold))} as right: {own.explanation}"
        )
