"""What each stage changed on held-out tasks: paired differences over prompts, for several runs.

    python tests/benchmarks/stage_gains.py runs/seed0 runs/seed1 runs/seed2

Reads the runs' `evals/`. A prompt's value is its mean over the runs, so an interval over prompts
does not take three seeds for three times as many prompts; single runs are shown beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from posttrain.evaluation import metric_values, paired_difference
from posttrain.pipeline import read_evaluation

COMPARISONS = (("start", "sft"), ("sft", "rl"), ("rl", "dpo"))
K = (1, 8)


def main() -> None:
    runs = [Path(argument) for argument in sys.argv[1:]]
    for before, after in COMPARISONS:
        print(f"\n{before} -> {after}")
        columns = [
            [metric_values(read_evaluation(run / "evals" / f"{s}.json"), K) for run in runs]
            for s in (before, after)
        ]
        for metric in columns[0][0]:
            first, second = (np.stack([values[metric] for values in column]) for column in columns)
            pooled = paired_difference(first.mean(axis=0), second.mean(axis=0))
            seeds = " ".join(f"{d:+.3f}" for d in (second - first).mean(axis=1))
            print(
                f"  {metric:18} {first.mean():7.3f} -> {second.mean():7.3f}   "
                f"{pooled.mean:+.3f} [{pooled.low:+.3f}, {pooled.high:+.3f}]   by run: {seeds}"
            )


if __name__ == "__main__":
    main()
