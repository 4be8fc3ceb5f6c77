"""What a decision about difficulty costs: samples spent against agreement with 256 samples.

    python tests/benchmarks/judging_cost.py [--prompts 2000] [--repeats 4] [--json]

Prompts have true pass rates from an easy, a mixed and a hard set, and answers are drawn from these:
no engine. The truth is what is decided after 256 samples. Each rule spends more as its cap rises;
*fixed n* gives every prompt the same. `gain` is the agreement beyond that of fixed n at the same
cost (± its standard error over repeats), `needed` what fixed n has to spend for the same agreement,
and × how many times that is of what was spent (both – where fixed n's curve is flat there). The
rules run through the scheduler that judging uses, with 64 requests in flight.

*range* asks whether p is above .9, below .25 or between, by the mean; its rule goes to the cap
without a success, to tell the unsolved. SPRT (Wald 1945), for comparison, tests p ≥ .95 against
p ≤ .85 with error rates of 1 − confidence.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from judges.estimators import by_counts, posterior
from judges.labels import LabelSettings
from judges.schedule import Schedule
from judges.selection import SelectionSettings, choose, easiness_of
from judges.stopping import Cell, CutRule, LabelRule, Population, StoppingRule

Counts = NDArray[np.int64]
Rates = NDArray[np.float64]
Decide = Callable[[Counts, Counts], NDArray[Any]]

TRUTH = 256
IN_FLIGHT = 64
ROUND = 4
CAPS = (4, 8, 16, 32, 64)
CONFIDENCES = (0.8, 0.9, 0.95)
FIXED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)

SETS: dict[str, tuple[float, float]] = {
    "easy": (4.0, 0.5),
    "mixed": (0.6, 0.6),
    "hard": (0.4, 3.0),
}
"""True pass rates are drawn from these Beta distributions."""


class Sprt:
    """Sequential probability ratio test of p₁ against p₀ ."""

    breadth_first = False

    def __init__(self, p0: float, p1: float, error: float) -> None:
        self._success, self._failure = math.log(p1 / p0), math.log((1 - p1) / (1 - p0))
        self._bound = math.log((1 - error) / error)

    def is_open(self, cell: Cell) -> bool:
        score = cell.c * self._success + (cell.n - cell.c) * self._failure
        return abs(score) < self._bound

    def follow(self, population: Population) -> None:
        pass


def sample(
    rates: Rates, rule: StoppingRule, cap: int, rng: np.random.Generator
) -> tuple[Counts, Counts]:
    """(scored, correct) of every prompt once the rule has enough; requests end in the order they
    began."""
    none = np.zeros(len(rates), dtype=np.int64)
    schedule = Schedule(none, none, none, none, rule, round_size=min(ROUND, cap), cap=cap)
    in_flight: deque[Any] = deque()
    while True:
        while len(in_flight) < IN_FLIGHT and (ask := schedule.next()) is not None:
            in_flight.append(ask)
        if not in_flight:
            return schedule.scored.astype(np.int64), schedule.correct.astype(np.int64)
        ask = in_flight.popleft()
        right = int(rng.binomial(ask.size, rates[ask.index]))
        schedule.record(ask.index, asked=ask.size, scored=ask.size, correct=right)


def by_selection(selection: SelectionSettings, ties: NDArray[np.uint64]) -> Decide:
    """Kept or dropped."""

    def decide(n: Counts, c: Counts) -> NDArray[Any]:
        easiness = by_counts(n, c, lambda n, c: easiness_of(*posterior(n, c), selection))
        none = np.zeros(len(n), dtype=np.int64)
        return choose(easiness, none.astype(bool), none, ties, selection).kept

    return decide


def by_range(n: Counts, c: Counts) -> NDArray[Any]:
    """Easy, medium or hard by the posterior mean."""
    bounds = LabelSettings()
    mean = (c + 0.5) / (n + 1.0)
    return np.digitize(mean, [bounds.hard_below, bounds.easy_above])


def questions(
    ties: NDArray[np.uint64],
) -> dict[str, tuple[Decide, Callable[[float], StoppingRule]]]:
    """Name -> how a decision is made, and the rule that stops at a confidence."""
    half, tail = (SelectionSettings(drop_easiest=share) for share in (0.5, 0.8))
    above = SelectionSettings(easy_above=0.9)
    return {
        "range": (by_range, lambda confidence: LabelRule(LabelSettings(confidence=confidence))),
        "threshold .9": (by_selection(above, ties), lambda c: CutRule(above, c)),
        "threshold .9, SPRT": (by_selection(above, ties), lambda c: Sprt(0.85, 0.95, 1 - c)),
        "easiest 50%": (by_selection(half, ties), lambda c: CutRule(half, c)),
        "easiest 80%": (by_selection(tail, ties), lambda c: CutRule(tail, c)),
    }


def measure(prompts: int, repeats: int, seed: int = 0) -> list[dict[str, Any]]:
    """One record a set, question, confidence and cap, over all repeats."""
    found: dict[tuple[Any, ...], list[tuple[float, float, float]]] = {}
    curves: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    for repeat in range(repeats):
        for set_name, shape in SETS.items():
            rng = np.random.default_rng([seed, repeat, *map(ord, set_name)])
            rates = rng.beta(*shape, prompts)
            ties = rng.integers(0, 2**63, prompts, dtype=np.uint64)
            for question, (decide, make_rule) in questions(ties).items():
                truth = decide(np.full(prompts, TRUTH), rng.binomial(TRUTH, rates))
                fixed = fixed_curve(rates, decide, truth, rng)
                curves.setdefault((set_name, question), []).append(fixed)
                for confidence in CONFIDENCES:
                    for cap in CAPS:
                        n, c = sample(rates, make_rule(confidence), cap, rng)
                        spent, agreed = float(n.mean()), float((decide(n, c) == truth).mean())
                        gain = agreed - float(np.interp(np.log(spent), np.log(FIXED), fixed))
                        key = (set_name, question, confidence, cap)
                        found.setdefault(key, []).append((spent, agreed, gain))
    return [
        summarised(key, np.array(values), np.mean(curves[key[:2]], axis=0))
        for key, values in found.items()
    ]


def summarised(
    key: tuple[Any, ...], values: NDArray[np.float64], curve: NDArray[np.float64]
) -> dict[str, Any]:
    spent, agreed, gain = values.mean(axis=0)
    need = needed(float(agreed), curve)
    error = values[:, 2].std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
    return {
        **dict(zip(("set", "question", "confidence", "cap"), key, strict=True)),
        "spent": round(float(spent), 2),
        "agreement": round(float(agreed), 4),
        "gain": round(float(gain), 4),
        "error": None if error is None else round(float(error), 4),
        "needed": None if need is None else round(need, 1),
        "saving": None if need is None else round(need / float(spent), 2),
    }


def fixed_curve(
    rates: Rates, decide: Decide, truth: NDArray[Any], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Agreement at each of `FIXED`, averaged over draws."""
    draws = 5
    curve = np.zeros(len(FIXED))
    for i, n in enumerate(FIXED):
        count = np.full(len(rates), n)
        for _ in range(draws):
            curve[i] += (decide(count, rng.binomial(n, rates)) == truth).mean() / draws
    return curve


def needed(agreement: float, curve: NDArray[np.float64]) -> float | None:
    """Samples a prompt with which fixed n agrees as much; None beyond the ends of its curve, or
    where it gains less than .01 by twice the samples."""
    rising = np.maximum.accumulate(curve)
    if not rising[0] < agreement < rising[-1]:
        return None
    n = float(np.exp(np.interp(agreement, rising, np.log(FIXED))))
    twice, half = np.interp(np.log([2 * n, n / 2]), np.log(FIXED), rising)
    return n if twice - half >= 0.02 else None


def show(records: list[dict[str, Any]]) -> None:
    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    print(
        f"{'set':7}{'question':20}{'conf':>5}{'cap':>5}{'spent':>8}{'agree':>8}"
        f"{'gain':>8}{'±':>7}{'needed':>8}{'×':>7}"
    )
    for r in records:
        print(
            f"{r['set']:7}{r['question']:20}{r['confidence']:5}{r['cap']:5}{r['spent']:8.1f}"
            f"{r['agreement']:8.3f}{r['gain']:+8.3f}{number(r['error'], 3):>7}"
            f"{number(r['needed'], 1):>8}{number(r['saving'], 2):>7}"
        )
    for question in dict.fromkeys(r["question"] for r in records):
        mine = [r for r in records if r["question"] == question]
        worst = min(mine, key=lambda r: r["gain"])
        best = max(mine, key=lambda r: r["saving"] or 0)
        print(
            f"{question}: worst gain {worst['gain']:+.3f} ± {number(worst['error'], 3)} "
            f"({worst['set']}, {worst['confidence']}, cap {worst['cap']}); most saved "
            f"×{best['saving']} ({best['set']}, {best['confidence']}, cap {best['cap']})"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    records = measure(arguments.prompts, arguments.repeats)
    if arguments.json:
        print(json.dumps(records))
    else:
        show(records)


if __name__ == "__main__":
    main()
