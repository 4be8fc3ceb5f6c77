"""What is asked of a teacher, and what it says, as arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    IntArray = NDArray[np.int64]
    BoolArray = NDArray[np.bool_]
    Array = NDArray[np.generic]

KEY_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenSequence:
    """Token ids `[T]`, and a mask `[T]` of those that are labels: what stands before them is the
    context that they are predicted from. The first token can be no label."""

    token_ids: IntArray
    label_mask: BoolArray

    def __post_init__(self) -> None:
        assert self.token_ids.shape == self.label_mask.shape
        assert not self.label_mask[:1].any(), "nothing predicts the first token"

    @property
    def key(self) -> bytes:
        """Of this content: equal sequences have equal keys in every run and process."""
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        digest.update(np.ascontiguousarray(self.token_ids, dtype="<i8").tobytes())
        digest.update(np.packbits(self.label_mask).tobytes())
        return digest.digest()

    @property
    def num_labels(self) -> int:
        return int(self.label_mask.sum())

    @classmethod
    def of_labels(
        cls, token_ids: Sequence[int] | IntArray, labels: Sequence[int] | IntArray
    ) -> TokenSequence:
        """From a trainer's row: `labels` are −100 where nothing is learnt."""
        mask = np.asarray(labels) != -100
        mask[:1] = False
        return cls(token_ids=np.asarray(token_ids, dtype=np.int64), label_mask=mask)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """What is stored of one sequence, in the order of its n labels.

    - `per_label`: arrays `[n]` by name. All kinds: `label_logprobs` (nats, τ = 1). Targets:
      `entropy` (nats, of q^τ), `num_ids`; top-k also `tail`, the mass outside the ids.
    - `per_id`: arrays `[m]`, m the sum of `num_ids`, label after label. `ids`, and `counts` of
      sampled ids or `weights`, the probabilities of top-k.
    """

    per_label: Mapping[str, Array]
    per_id: Mapping[str, Array] = field(default_factory=dict)


def smallest_unsigned(largest: int) -> np.dtype[np.unsignedinteger]:
    """The narrowest type that holds `largest`: ids take most of a store's room."""
    return np.min_scalar_type(largest)


def padded_targets(records: Sequence[Record], samples: int | None) -> dict[str, Array]:
    """Records one behind the other, as rectangles for the loss: `ids` and `weights` `[N, K]`, K the
    most ids of any label, `entropy`, `label_logprobs` and, of top-k, `tail` `[N]`.

    `samples` is how many were drawn, None for top-k. Where a label has fewer ids, the rest is id 0
    with the weight 0.
    """
    per_label = {
        name: np.concatenate([record.per_label[name] for record in records])
        for name in records[0].per_label
    }
    widths = per_label.pop("num_ids").astype(np.int64)
    ids = np.concatenate([record.per_id["ids"] for record in records])
    if samples is None:
        weights = np.concatenate([record.per_id["weights"] for record in records])
    else:
        counts = np.concatenate([record.per_id["counts"] for record in records])
        weights = counts.astype(np.float32) / np.float32(samples)
    here = np.arange(widths.max(initial=1))[None] < widths[:, None]
    wide_ids = np.zeros(here.shape, dtype=np.int64)
    wide_weights = np.zeros(here.shape, dtype=np.float32)
    wide_ids[here] = ids
    wide_weights[here] = weights
    return {"ids": wide_ids, "weights": wide_weights, **per_label}
