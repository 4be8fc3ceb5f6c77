"""A critic's grade for an answer: the expectation over what it would write, not what it wrote.

Experimental: it is worth as much as the critic's ability to follow the rubric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

GRADES = ("1", "2", "3", "4", "5")

RUBRIC = """\
Grade how much a model would learn from the answer below: is it correct, complete, clear and to \
the point of the question?
5: excellent in every respect
4: good, with a small flaw
3: acceptable, with flaws
2: poor, of little use
1: wrong or useless

Question:
{question}

Answer:
{answer}

Reply with one digit from 1 to 5 and nothing else."""

MIN_MASS = 0.5
"""Probability on the grades together. A critic that mostly says something else does not grade."""


@dataclass(frozen=True, slots=True)
class Grade:
    """`value` in [1, 5]; `mass` is the probability that the critic gave to any grade at all."""

    value: float
    mass: float


def read_grade(logprobs: Sequence[float]) -> Grade:
    """From the log-probabilities (nats) of `GRADES` as the reply's first token: Σ g·P(g) / Σ P(g)
    (Liu et al. 2023, arXiv:2303.16634, eq. 1)."""
    most = max(logprobs)
    weights = [math.exp(value - most) for value in logprobs]
    total = sum(weights)
    expected = sum(int(grade) * w for grade, w in zip(GRADES, weights, strict=True)) / total
    return Grade(expected, total * math.exp(most))
