"""Where the answer stands in a completion: behind the last `#`."""

from __future__ import annotations


def extract_answer(text: str) -> str | None:
    """The text behind the last `#`, stripped, without one pair of brackets around it.

    `2+9=11#[11]` → `11`. None when there is no `#`, or nothing behind it.
    """
    _, mark, answer = text.rpartition("#")
    if not mark:
        return None
    return strip_brackets(answer.strip()) or None


def strip_brackets(answer: str) -> str:
    """`[ 5 ]` → `5`; at most one pair."""
    if len(answer) >= 2 and answer[0] == "[" and answer[-1] == "]":
        return answer[1:-1].strip()
    return answer
