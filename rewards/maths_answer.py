r"""Which part of a completion is its mathematical answer.

Behind the reasoning section, in this order: the last `\boxed{}` (nothing else counts once there is
one), the line behind the last `#`, what follows the last "answer is" unless that is a whole
solution, the last formula, the number at the end. It is one piece of text; whether it holds one
value is for the comparison to judge.
"""

from __future__ import annotations

import re

from rewards.answer import extract_answer
from rewards.maths_number_words import FACTOR_WORD
from rewards.reasoning_section import after_reasoning

SEARCHED = 2000
"""Characters at the end of a completion in which an answer without box or mark is looked for."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?P<brace>\{)?")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_PHRASE = re.compile(
    r"\b(?P<noun>answer|result|solution)\b[\s*]*(?:is|are|:|=)[\s*:=]*(?:equal to\b)?",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.;]\s|\n")
_MATHS = re.compile(r"[0-9$]|\\[(\[]")
_ANNOUNCEMENT = re.compile(
    r"as follows|the following|(?:given|shown|found|worked out) below|let(?:['’]?s)?\b|we\b|step\b",
    re.IGNORECASE,
)
# Two words side by side and no value at the end, unlike "5 apples" and "the larger one, 6".
_PROSE = re.compile(r"[A-Za-z][A-Za-z'’-]*,?\s+[A-Za-z](?!.*[0-9$)}\]][*.\s]*\Z)")
_HEDGE = re.compile(r"\b(?:not|no|never|cannot|neither|either|or)\b|n['’]t\b", re.IGNORECASE)
_OPENING = re.compile(r"(?:[-*•]|1[.)])[ \t]+[*]*|(?:\$\$|\\[(\[])\s*")
_SUM = re.compile(r"(?:\\[A-Za-z]+|[^A-Za-z=])*[0-9)}]\s*=")
_AFTERTHOUGHT = re.compile(r",?\s+(?:because|since|as|so|which|where|when)\b.*|[.;]\s.*")
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
# With what else stands on its last line. A single dollar may be a price.
_BLOCK = re.compile(
    r"(?:\$\$(.+?)\$\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|```\w*\n(.+?)\n```)(?P<behind>[^\n]*)",
    re.DOTALL,
)
_ANOTHER = re.compile(r"[\s,;]*(?:(?:or|and)\b|\$|\\[(\[]|```)")
_NUMBER = re.compile(
    r"[-+−–]?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]+|[⁰¹²³⁴-⁹]+|\s?[¼-¾⅐-⅞]|/[0-9]+|\s?%|!|\^\S*[0-9])?"
    rf"(?:\s{FACTOR_WORD})*"
)
_WORD = re.compile(r"(?<![A-Za-z\\])(?!(?:sin|cos|tan|log|ln|exp|sqrt|pi)\b)[A-Za-z]{2,}")
_FACTOR = re.compile(rf"(?:\s{FACTOR_WORD})+")
_BULLET = re.compile(r"^\s*[-*•]\s+")


def final_answer(text: str) -> str | None:
    """The answer in `text`, stripped; None if there is none, also when the last box is empty or
    never closes: an earlier one was not the last word."""
    section = after_reasoning(text)
    if section is None:
        return None
    boxes = list(_BOX.finditer(section))
    if boxes:
        return _inside(section, boxes[-1])
    marked = extract_answer(section)
    # Markdown headings begin with `#` too, but other lines follow them.
    if marked is not None and "\n" not in marked:
        return _after_phrase(marked) or marked
    end = section.strip()[-SEARCHED:]
    return _after_phrase(end) or _at_the_end(end)


def boxed_answer(text: str) -> str | None:
    r"""What the last `\boxed{}` of `text` holds; None without one, or if it is empty or open."""
    boxes = list(_BOX.finditer(text))
    return _inside(text, boxes[-1]) if boxes else None


def _inside(text: str, box: re.Match[str]) -> str | None:
    r"""What the box holds, `\boxed 5` included; None if it is empty or does not close."""
    if box["brace"] is None:
        first = text[box.end() :].split(maxsplit=1)[:1]
        return first[0].strip("$.,") or None if first else None
    depth = 1
    for brace in _BRACE.finditer(text, box.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[box.end() : brace.start()].strip() or None
    return None


def _after_phrase(text: str) -> str | None:
    phrases = list(_PHRASE.finditer(text))
    if not phrases:
        return None
    stated = text[phrases[-1].end() :].strip()
    if _opens_an_account(phrases[-1], stated):
        return None
    block = _BLOCK.match(stated)
    if block and "\n" in block[0]:
        return _in_block(block, stated)
    line, *_ = stated.split("\n", 1)
    return _AFTERTHOUGHT.sub("", line).strip(" *.") or None


def _in_block(block: re.Match[str], stated: str) -> str | None:
    """What stands between delimiters on lines of their own; with another such block behind it, all
    that is stated, since the first is not the answer then."""
    if _ANOTHER.match(stated, block.start("behind")):
        return stated
    formula = next(part for part in block.groups() if part is not None).strip()
    return (formula + _AFTERTHOUGHT.sub("", block["behind"])).strip(" *.") or None


def _opens_an_account(phrase: re.Match[str], stated: str) -> bool:
    """Whether the phrase stands over a solution that is told (`**Solution:**`, "The solution is as
    follows."), so that its answer comes at the end. Never where no number or formula follows what
    the phrase states, nor where that is a value, or says what is not one."""
    heads = phrase["noun"].casefold() == "solution" and "\n" in phrase[0]
    opening = _OPENING.match(stated) if heads else None
    sentence, *more = _SENTENCE_END.split(stated[opening.end() if opening else 0 :], maxsplit=1)
    if not (more and _MATHS.search(more[0])) or _HEDGE.search(sentence):
        return False
    if _ANNOUNCEMENT.match(sentence):
        return True
    has_maths = _MATHS.search(sentence) is not None
    if heads and has_maths and (_WORD.match(sentence) or _SUM.match(sentence)):
        return True
    if ":" not in phrase[0] or not _PROSE.match(sentence):
        return False
    # Names and other answers in words are short: "The Great Wall".
    return len(_WORD.findall(sentence)) >= (3 if has_maths else 5)


def _at_the_end(text: str) -> str | None:
    formulas = list(_FORMULA.finditer(text))
    behind = text[formulas[-1].end() :] if formulas else text
    numbers = _NUMBER.findall(behind)
    if formulas and not numbers:
        formula = next(part for part in formulas[-1].groups() if part is not None).strip()
        factor = _FACTOR.match(behind)  # $5$ million
        return (formula + factor[0] if factor else formula) or None
    *_, line = behind.rstrip().split("\n")
    if not _WORD.search(line):
        return _BULLET.sub("", line).strip(" *.") or None
    return numbers[-1] if numbers else None
