"""Answers that are a letter to choose or words to say, compared as such.

math-verify reads words as products of variables, so that letters may change places, and does not
find a choice behind its own text ("(B) 12").
"""

from __future__ import annotations

import re

_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s*:?\s*)?"
    r"(?:\(\s*(?P<enclosed>[A-J])\s*\)|(?P<marked>[A-J])\s*[.:)]|(?P<bare>[A-J])$)(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_ANOTHER = re.compile(r"\(\s*[A-J]\s*\)|\b[A-J]\s*[.:)]|\b(?:or|and)\b|^\s*[,/]", re.IGNORECASE)
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")
_SENTENCE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}[,:]? +[A-Za-z]{2,}")
_NAMES = frozenset({"infinity", "sqrt", "sin", "cos", "tan", "log", "exp", "abc", "xyz"})


def gold_choice(reference: str) -> str | None:
    r"""The letter, if the gold answer is one of A to J: `B`, `(B)`, `\text{(B)}`."""
    letter = re.fullmatch(r"\(?([A-J])\)?\.?", plain(reference))
    return letter[1] if letter else None


def choice(answer: str) -> str | None:
    """The one letter that is chosen, upper case; its own text may stand behind it."""
    match = _CHOICE.fullmatch(plain(answer))
    if match is None or _ANOTHER.search(match["rest"]):
        return None
    return (match["enclosed"] or match["marked"] or match["bare"]).upper()


def gold_words(reference: str) -> str | None:
    r"""The words, if the gold answer is nothing else: `\text{no solution}`, `Monday`."""
    text = plain(reference)
    wrapped = _WRAPPER.search(reference) is not None
    if _WORDS.fullmatch(text) and (wrapped or len(text) > 3) and text.casefold() not in _NAMES:
        return words(reference)
    return None


def is_sentence(latex: str) -> bool:
    r"""Words side by side outside of `\text{}`: math-verify would multiply their letters."""
    return _SENTENCE.search(_WRAPPER.sub("", latex)) is not None


def words(answer: str) -> str:
    """Without fonts, case, quotes and double spaces."""
    return " ".join(plain(answer).casefold().strip("\"'.").split())


def plain(latex: str) -> str:
    r"""`\textbf{(B)}\ 12` → `(B) 12`."""
    text = _WRAPPER.sub(r"\1", latex)
    return re.sub(r"\\[,;:! ]|\s+", " ", text).strip(" .")
