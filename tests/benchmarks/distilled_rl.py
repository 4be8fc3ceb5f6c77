"""Is RL sooner at the same accuracy from a co-distilled SFT start, the teacher's cost included?

    python tests/benchmarks/distilled_rl.py OUT --seeds 0 1 2 --target 0.7

Each seed runs SFT and RL of the quickstart twice, without a teacher and with the starter's in SFT.
The clock counts SFT as a whole, its pass over the rows with teacher and critic included, and RL's
steps until held-out pass@1 first reaches the target; what both have in common beforehand (engines'
start, evaluation of the start) is left out. A run that is there is not run again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.metrics import read_metrics
from posttrain.run_dir import RunDir

ROOT = Path(__file__).parents[2]
EVERY_STEPS = 3
COMMON = (
    "stages=[sft,rl]",
    "sft.checkpoints.count=1",
    f"rl.evaluation={{every_steps: {EVERY_STEPS}, prompts: 192, num_samples: 2, max_tokens: 96}}",
)
KINDS: dict[str, tuple[str, ...]] = {
    "labels alone": (),
    "co-distilled": (
        "teacher.model=starter-teacher",
        "sft.distillation={weight: dynamic}",
        "resources.teacher.cpus=0.5",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=0.7)
    parser.add_argument("overrides", nargs="*", help="settings for both kinds")
    arguments = parser.parse_args()
    print("| start | seed | SFT s | of it teacher s | pass@1 after SFT | steps | s to target |")
    print("|---|---|---|---|---|---|---|")
    for kind, settings in KINDS.items():
        reached = []
        for seed in arguments.seeds:
            run = arguments.out / f"{kind.replace(' ', '-')}-{seed}"
            subprocess.run(
                [
                    *(sys.executable, "-m", "posttrain.cli", "run", "configs/quickstart.yaml"),
                    *(f"run.dir={run.absolute()}", f"run.seed={seed}"),
                    *(*COMMON, *settings, *arguments.overrides),
                ],
                check=True,
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
            )
            cells = row(RunDir(run), arguments.target)
            reached.append(cells[-1])
            shown = ["–" if c is None else f"{c:.3g}" for c in cells]
            print(f"| {kind} | {seed} | " + " | ".join(shown) + " |", flush=True)
        if None not in reached:
            print(f"| {kind} | mean | | | | | {fmean(reached):.0f} |", flush=True)


def row(run: RunDir, target: float) -> list[float | None]:
    """Seconds of SFT, those of its teacher and critic, pass@1 after it, steps and seconds until RL
    first reaches the target (None: never)."""
    sft = run.stages()["sft"]
    assert sft.seconds is not None
    asked: dict[str, Any] = sft.metrics.get("teacher", {})
    accuracy = sft.metrics["evaluation"]["all"]["pass@1"]["mean"]
    steps, seconds = first_reached(read_metrics(run.metrics_path), target)
    return [
        sft.seconds,
        sum(found["seconds"] for found in asked.values()),
        accuracy,
        steps,
        None if seconds is None else sft.seconds + seconds,
    ]


def first_reached(records: list[dict[str, Any]], target: float) -> tuple[int | None, float | None]:
    """The first evaluated step at the target, and the seconds of all steps until then."""
    of_rl = [record for record in records if record.get("stage") == "rl"]
    seconds = {r["step"]: r["step_s"] for r in of_rl if "step_s" in r}
    for record in of_rl:
        if record.get("event") == "evaluation" and record["all"]["pass@1"]["mean"] >= target:
            step = record["step"]
            return step, sum(s for at, s in seconds.items() if at <= step)
    return None, None


if __name__ == "__main__":
    main()
