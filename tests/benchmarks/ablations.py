"""What each part of the online loop is worth: RL on the starter without it, at equal steps.

    python tests/benchmarks/ablations.py run ARM --seed 0 --out DIR      # ARM: see ARMS
    python tests/benchmarks/ablations.py compare DIR                  # of all runs in DIR/ARM/seed

Every arm runs the stages screen and rl of configs/quickstart.yaml. Differences from the whole loop
are paired over held-out prompts, a prompt's value being its mean over the seeds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean

import numpy as np

from posttrain.evaluation import metric_values, paired_difference
from posttrain.metrics import read_metrics
from posttrain.online import controller
from posttrain.online.gate import Ended, classify
from posttrain.pipeline import read_evaluation
from posttrain.types import DrawOutcome, RolloutGroup

RESCREEN = "rl.rescreen={every_steps: 10, prompts: 64, samples: 16}"
WHOLE = "whole"
NO_GATE = "no-gate"
ARMS: dict[str, tuple[str, ...]] = {
    WHOLE: (RESCREEN,),
    "no-curriculum": ("rl.curriculum.kind=uniform",),  # which re-screening needs
    NO_GATE: (RESCREEN,),
    "no-rescreening": (),
    "lock-step": (
        *(RESCREEN, "rl.max_lag=0"),
        *("resources.rollout.engine.threads=2", "rl.learner.threads=2"),
    ),
}
METRICS = ("pass@1", "pass@8")
SHARE = "zero_advantage_share"
"""Absent from a step for which no group came to the gate: all its own had come before."""


def ungated(group: RolloutGroup, *, needs_contrast: bool) -> Ended | None:
    """Groups without signal are trained as well: they take the place of others in the batch."""
    ended = classify(group, needs_contrast=needs_contrast)
    return None if ended and ended.outcome is DrawOutcome.ZERO_ADVANTAGE else ended


def run(arm: str, seed: int, out: Path) -> None:
    from posttrain.cli import main

    if arm == NO_GATE:
        controller.classify = ungated
    directory = (out / arm / str(seed)).absolute()
    overrides = ("stages=[screen,rl]", f"run.dir={directory}", f"run.seed={seed}", *ARMS[arm])
    sys.argv = ["posttrain", "run", "configs/quickstart.yaml", *overrides]
    main()


def compare(out: Path) -> None:
    runs = {arm: sorted((out / arm).iterdir()) for arm in ARMS if (out / arm).is_dir()}
    values = {
        arm: [metric_values(read_evaluation(d / "evals" / "rl.json"), (1, 8)) for d in directories]
        for arm, directories in runs.items()
    }
    for arm, directories in runs.items():
        print(f"\n{arm}: {len(directories)} seeds")
        for metric in METRICS:
            mine, whole = (
                np.stack([evaluation[metric] for evaluation in values[a]]).mean(axis=0)
                for a in (arm, WHOLE)
            )
            change = paired_difference(whole, mine)
            seeds = " ".join(f"{evaluation[metric].mean():.3f}" for evaluation in values[arm])
            print(
                f"  {metric:8} {mine.mean():.3f}   against the whole {change.mean:+.3f} "
                f"[{change.low:+.3f}, {change.high:+.3f}]   by seed: {seeds}"
            )
        steps = [
            record
            for directory in directories
            for record in read_metrics(directory / "metrics.jsonl")
            if "lag_max" in record
        ]
        print(
            f"  {fmean(r['step_s'] for r in steps):.2f} s a step, groups without signal "
            f"{fmean(r[SHARE] for r in steps if SHARE in r):.2f}"
            if arm != NO_GATE
            else f"  {fmean(r['step_s'] for r in steps):.2f} s a step"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("arm", choices=ARMS)
    one.add_argument("--seed", type=int, required=True)
    one.add_argument("--out", type=Path, required=True)
    all_of_them = commands.add_parser("compare")
    all_of_them.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.arm, arguments.seed, arguments.out)
    else:
        compare(arguments.out)


if __name__ == "__main__":
    main()
