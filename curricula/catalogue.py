"""The prompts of a curriculum as numbers 0..N-1, with their domains and a lookup by id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.errors import DataError
from posttrain.types import Prompt


class PromptCatalogue:
    """Numbers a fixed sequence of prompts.

    `domains` are the domain names, sorted; `domain [N]` int16 holds each prompt's place among
    them. Ids are kept as sorted 64-bit hashes, 12 bytes a prompt, where a dict takes over 100.
    Raises DataError for no prompts at all or for two with the same id.
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        if not prompts:
            raise DataError("a curriculum needs prompts, got none: check the task sources")
        self.prompts = prompts
        fingerprint = hashlib.sha256()
        hashes = bytearray()
        codes: dict[str, int] = {}
        domain = np.empty(len(prompts), np.int16)
        for index, prompt in enumerate(prompts):
            hashes += _hash(prompt.prompt_id)
            domain[index] = codes.setdefault(prompt.domain, len(codes))
            fingerprint.update(f"{prompt.prompt_id}\0{prompt.domain}\0".encode())
        self.fingerprint = fingerprint.hexdigest()[:16]
        self.domains = tuple(sorted(codes))
        rank = np.array([self.domains.index(name) for name in codes], np.int16)
        self.domain: NDArray[np.int16] = rank[domain]
        unsorted = np.frombuffer(bytes(hashes), np.uint64)
        self._order = np.argsort(unsorted, kind="stable").astype(np.int32)
        self._hashes = unsorted[self._order]
        self._check_unique()

    def __len__(self) -> int:
        return len(self.prompts)

    def index_of(self, prompt_id: str) -> int:
        """Raises DataError for an id that is not here."""
        index = int(self.indices_of([prompt_id])[0])
        if index < 0:
            raise DataError(f"prompt {prompt_id} is not among the {len(self)} of this curriculum")
        return index

    def indices_of(self, prompt_ids: Iterable[str]) -> NDArray[np.int64]:
        """The number of each id, -1 for those that are not here."""
        wanted = np.frombuffer(b"".join(map(_hash, prompt_ids)), np.uint64)
        places = np.minimum(np.searchsorted(self._hashes, wanted), len(self) - 1)
        found = self._hashes[places] == wanted
        return np.where(found, self._order[places], -1).astype(np.int64)

    def sizes(self) -> dict[str, int]:
        """How many prompts each domain has."""
        counts = np.bincount(self.domain, minlength=len(self.domains))
        return dict(zip(self.domains, counts.tolist(), strict=True))

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises DataError if `state["fingerprint"]` is that of other prompts."""
        if str(state["fingerprint"]) != self.fingerprint:
            raise DataError(
                f"curriculum state belongs to another prompt set ({state['fingerprint']}, this is "
                f"{self.fingerprint}): resume with the tasks it was saved with, or start afresh"
            )

    def _check_unique(self) -> None:
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        if same.size:
            first, second = (self.prompts[self._order[same[0] + i]] for i in (0, 1))
            raise DataError(
                f"{same.size} prompts have an id that another has, e.g. {first.prompt_id} in "
                f"{first.domain} and {second.prompt_id} in {second.domain}: remove the duplicates"
            )


def _hash(prompt_id: str) -> bytes:
    return hashlib.blake2b(prompt_id.encode(), digest_size=8).digest()
