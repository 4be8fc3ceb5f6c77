"""Difficulty buckets: never solved, four quarters, always solved."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

BUCKETS = ("0", "(0, .25]", "(.25, .5]", "(.5, .75]", "(.75, 1)", "1")

_UPPER_EDGES = np.array([0.0, 0.25, 0.5, 0.75, np.nextafter(1.0, 0.0)])


def bucket_of(rate: ArrayLike) -> NDArray[np.int64]:
    """Place in `BUCKETS` of pass rates in [0, 1], any shape.

    >>> bucket_of([0.0, 0.25, 0.9, 1.0]).tolist()
    [0, 1, 4, 5]
    """
    return np.asarray(np.searchsorted(_UPPER_EDGES, rate, side="left"))
