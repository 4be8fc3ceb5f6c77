"""Text that two sets share, found by n-grams of words and signs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from posttrain.types import Prompt

WORDS = 13
"""Words and signs that must be equal in a row (Brown et al. 2020, appendix C)."""

_WORD = re.compile(r"\w+|[^\w\s]")


class TextIndex:
    """Every run of `n` words of the texts of one set. A text shorter than that is found as a whole
    only: single words say nothing. Case and blanks do not count.
    """

    def __init__(self, texts: Iterable[str], n: int = WORDS) -> None:
        self._n = n
        self._runs: set[int] = set()
        for text in texts:
            words = _words(text)
            if len(words) < n:
                self._runs.add(hash((None, *words)))
            else:
                self._runs.update(hash(run) for run in _runs(words, n))

    def shared(self, text: str) -> str | None:
        """What of `text` is in the set too: the first run of words, or all of a short text."""
        words = _words(text)
        if len(words) < self._n:
            return " ".join(words) if hash((None, *words)) in self._runs else None
        found = next((run for run in _runs(words, self._n) if hash(run) in self._runs), None)
        return None if found is None else " ".join(found)


def shared_texts(sets: Mapping[str, Sequence[Prompt]], n: int = WORDS) -> dict[str, int]:
    """How many prompts of a set share text with another, for every pair that does, as
    `"sft and held_out"`. Counted in the first set of a pair."""
    # The first, often the largest by far, is looked up in the others and needs no index.
    indexed = list(sets.items())[1:]
    indices = {name: TextIndex(map(_question, prompts), n) for name, prompts in indexed}
    counts = {
        f"{first} and {second}": sum(
            indices[second].shared(_question(prompt)) is not None for prompt in sets[first]
        )
        for first, second in itertools.combinations(sets, 2)
    }
    return {pair: count for pair, count in counts.items() if count}


def _question(prompt: Prompt) -> str:
    return "\n".join(m.content for m in prompt.messages if m.role == "user")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _runs(words: list[str], n: int) -> Iterable[tuple[str, ...]]:
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))
