"""Is RL sooner at the same accuracy from a co-distilled SFT start, the teacher's cost included?

    python tests/benchmarks/distilled_rl.py OUT [KEY=VALUE …] --seeds 0 1 2 --target 0.7

Each seed runs SFT, as light as the quickstart's, and RL twice: without a teacher, and with the
starter's in SFT.
The clock counts SFT as a whole, its pass over the rows with teacher and critic included, and RL's
steps; what both have in common beforehand (engines' start) is left out. Every `EVERY` steps the
policy is written down and measured afterwards, so that measuring costs no time; the target is
reached where the line through the points first crosses it. A run that is there is not run again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from wallclock_vs_trl import crossing

from posttrain.config import load
from posttrain.inputs import load_inputs
from posttrain.metrics import read_metrics
from posttrain.pipeline import evaluate_models
from posttrain.run_dir import RunDir

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
EVERY = 5
COMMON = (
    *("stages=[sft,rl]", "sft.data.size=800", f"rl.export_every={EVERY}"),
    "tasks.held_out=[{source: starter, size: 16}]",  # what is measured is measured afterwards
)
MEASURED = (
    "eval={k: [1], num_samples: 4, instruction_samples: 0, max_tokens: 96}",
    "resources.rollout.engine.threads=2",
)
KINDS: dict[str, tuple[str, ...]] = {
    "labels alone": (),
    "co-distilled": (
        "teacher.model=starter-teacher",
        "sft.distillation={weight: dynamic}",
        # Nothing else computes while the teacher does.
        *("resources.teacher.cpus=0.5", "resources.teacher.threads=2"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings for both kinds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=0.7)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    reached: dict[str, list[float | None]] = {kind: [] for kind in arguments.kinds}
    for seed in arguments.seeds:
        for kind in arguments.kinds:
            run = arguments.out.absolute() / f"{kind.replace(' ', '-')}-{seed}"
            command = [sys.executable, "-m", "posttrain.cli", "run", str(CONFIG)]
            overrides = [f"run.dir={run}", f"run.seed={seed}", *COMMON, *KINDS[kind]]
            subprocess.run([*command, *overrides, *arguments.overrides], check=True, cwd=ROOT)
            points = curve(RunDir(run))
            reached[kind].append(crossing(points, arguments.target))
            print(
                f"{kind}, seed {seed}: teacher and critic {teacher_seconds(RunDir(run)):.0f} s; "
                + " ".join(f"{t:.0f}s {a:.3f}" for t, a in points)
                + f"; {arguments.target} after {reached[kind][-1]} s",
                flush=True,
            )
    for kind, seconds in reached.items():
        there = [s for s in seconds if s is not None]
        mean = f"{fmean(there):.0f} s" if len(there) == len(seconds) else "not by every seed"
        print(f"{kind}: {mean}", flush=True)


def teacher_seconds(run: RunDir) -> float:
    """Spent on asking teacher and critic."""
    asked: dict[str, Any] = run.stages()["sft"].metrics.get("teacher", {})
    return float(sum(found["seconds"] for found in asked.values()))


def curve(run: RunDir) -> list[tuple[float, float]]:
    """Seconds of SFT and RL, and held-out pass@1: after SFT and of each policy written down."""
    elapsed = run.stages()["sft"].seconds
    assert elapsed is not None
    times, policies = [elapsed], [run.stage_dir("sft") / "policy"]
    for record in read_metrics(run.metrics_path):
        if record["stage"] == "rl" and "lag_max" in record:
            elapsed += record["step_s"]
            if record["step"] % EVERY == 0:
                times.append(elapsed)
                policies.append(run.stage_dir("rl") / f"export-{record['step']}")
    settings = load(CONFIG, [f"run.dir={run.path}", *MEASURED])
    summaries = evaluate_models(settings, load_inputs(settings), policies)
    return [(t, s["all"]["pass@1"]["mean"]) for t, s in zip(times, summaries, strict=True)]


if __name__ == "__main__":
    main()
