"""Answers to reasoning-gym tasks, scored by the family's own scorer.

`prompt.reference` is `{"family": name, "settings": {…}, "entry": {"question", "answer",
"metadata"}}`; `settings` are those that the family's data set was made with and may be left out
where they are its defaults. Importing reasoning_gym takes about a second, so it happens at the
first use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from posttrain.errors import DataError
from posttrain.types import Outcome, Prompt
from rewards.answer import extract_answer
from rewards.reasoning_gym_conditions import CONDITIONS
from rewards.reasoning_gym_language import ANSWERS, DATA
from rewards.reasoning_section import after_reasoning
from rewards.score import Score, failed, quote, right, unanswered

SUCCESS_FROM = 1.0
"""Scores are continuous; from here on an answer is correct, below it is wrong and earns nothing.
Many families give part of the score to any answer that merely contains the right one ("15" for
"5"), which a policy would learn to exploit."""

MAX_NUMBER_EXPONENT = 4
"""Digits behind the e of a number: fractions.Fraction writes 1e999999999 out."""

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_HUGE = re.compile(rf"[0-9]\.?[eE][-+]?[0-9]{{{MAX_NUMBER_EXPONENT + 1},}}")
_HEX = re.compile(r"(?<![0-9A-Za-z_.])0[xX][0-9a-fA-F]+")  # has no exponent, but e among its digits


def score(prompt: Prompt, text: str) -> Score:
    """Scores the answer in the last `<answer>…</answer>` behind the reasoning section, else the one
    behind the last `#`. Raises DataError for a family or an entry that cannot be used (found at
    load by `check_reference`)."""
    section = after_reasoning(text)
    tagged = _TAGGED.findall(section or "")
    if tagged:
        return _score_best([tagged[-1].strip()], prompt.reference)
    answer = extract_answer(section or "")
    if answer is None:
        return unanswered()
    candidates = [answer]
    if str(prompt.reference["entry"]["answer"]).startswith("["):
        candidates.append(f"[{answer}]")  # extraction took brackets that belong to the answer
    return _score_best(candidates, prompt.reference)


def _score_best(candidates: list[str], reference: Mapping[str, Any]) -> Score:
    family, score_answer = _scorer(reference)
    _check_data(family, reference["entry"])
    answer, entry = candidates[0], _own_entry(family, reference["entry"])
    if _HUGE.search(_HEX.sub(" ", answer)):
        return failed(Outcome.LIMIT, f"{quote(answer)} has a number with a huge exponent")
    if family in ANSWERS:
        candidates = list(filter(ANSWERS[family], candidates))
    if not candidates:
        return failed(Outcome.UNPARSABLE, f"{quote(answer)} is no answer of family {family!r}")
    try:
        scores = [score_answer(answer=candidate, entry=entry) for candidate in candidates]
        success = any(
            _is_success(family, candidate, entry, value)
            for candidate, value in zip(candidates, scores, strict=True)
        )
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # the entry scores its own answer, so this one broke the scorer
        return failed(Outcome.UNPARSABLE, f"{quote(answer)}: {type(error).__name__}: {error}")
    if success:
        return right()
    return failed(Outcome.WRONG, f"{quote(answer)} scores {max(scores):.3g}")


def _is_success(family: str, answer: str, entry: Mapping[str, Any], value: float) -> bool:
    """Above 1 a scorer has made a mistake: spell_backward does, adding up shares of letters."""
    condition = CONDITIONS.get(family)
    return SUCCESS_FROM <= value <= 1 and (condition is None or condition(answer, entry))


def _own_entry(family: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a scorer gets: a copy, since knight_swap writes into it."""
    metadata = dict(entry["metadata"])
    if family in ("arc_agi", "rearc"):  # they compare tuples, of which JSON makes lists
        metadata["output"] = tuple(map(tuple, metadata["output"]))
    return {**entry, "metadata": metadata}


def _scorer(reference: Mapping[str, Any]) -> tuple[str, Callable[..., float]]:
    family, settings = reference["family"], reference.get("settings", {})
    if family == "composite":  # a mixture of data sets: an entry says which one it is from
        family = reference["entry"]["metadata"].get("source_dataset")
        if family is None:
            raise DataError("an entry of family 'composite' must name its metadata.source_dataset")
        members = {member["name"]: member["config"] for member in settings.get("datasets", ())}
        settings = members.get(family, {})
    return family, _score_answer_of(family, json.dumps(settings, sort_keys=True))


@lru_cache(maxsize=512)
def _score_answer_of(family: str, settings: str) -> Callable[..., float]:
    """Cached: some families read their word lists whenever they are built."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        raise DataError(f"reasoning-gym has no family {family!r}; see reasoning_gym.factory")
    try:
        data_set = reasoning_gym.create_dataset(family, **json.loads(settings))
    except Exception as error:
        raise DataError(
            f"the reasoning-gym family {family!r} cannot be made with the settings {settings}: "
            f"{error!r}"
        ) from error
    scorer: Callable[..., float] = data_set.score_answer
    return scorer


def _check_data(family: str, entry: Mapping[str, Any]) -> None:
    if family not in DATA:
        return
    evaluated_part, language = DATA[family]
    text = evaluated_part(entry)
    if not language(text):
        raise DataError(
            f"an entry of family {family!r} has {quote(str(text))} where its scorer evaluates an "
            "expression; make the entry with reasoning_gym"
        )


def check_reference(prompt: Prompt) -> None:
    """Raises DataError for an unusable family or an entry that does not score its own answer."""
    reference: Any = prompt.reference
    match reference:
        case {"family": str(), "entry": {"question": _, "answer": gold, "metadata": {}}}:
            pass
        case _:
            raise DataError(
                "the reference must be {family: name, entry: {question, answer, metadata}}, "
                f"got {quote(str(reference))}"
            )
    family, _ = _scorer(reference)
    _check_data(family, reference["entry"])
    if gold is None:  # some families have no oracle, only a scorer
        return
    own = _score_best([str(gold)], reference)
    if own.outcome is not Outcome.CORRECT:
        raise DataError(
            f"the entry of family {family!r} does not score its own answer {quote(str(gold))} as "
            f"right: {own.explanation}; leave it out"
        )
