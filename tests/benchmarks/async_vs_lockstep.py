"""Trained tokens a second: asynchronous against our own lock-step mode, on both cores.

    python tests/benchmarks/async_vs_lockstep.py DIR

Lock-step gives both cores first to the engine, then to the learner; asynchronously each has one.
With t_g and t_l the seconds a step that lock-step spends on generating and on learning, the
asynchronous loop is to train at least 0.9 · (t_g + t_l) / max(t_g, t_l) times as many tokens.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import fmean

from posttrain.metrics import read_metrics

STEPS, WARM_UP = 24, 4
LOCK_STEP = ("rl.max_lag=0", "resources.rollout.engine.threads=2", "rl.learner.threads=2")
ASYNCHRONOUS = ("rl.max_lag=1",), ("rl.max_lag=2",)


def run(directory: Path, *overrides: str) -> dict[str, float]:
    """Means over the steps after the warm-up, in seconds and tokens a second."""
    command = [
        *(sys.executable, "-m", "posttrain.cli", "run", "configs/quickstart.yaml"),
        *("stages=[rl]", f"run.dir={directory.absolute()}", f"rl.num_steps={STEPS}"),
        *("tasks.held_out=[{source: starter, size: 16}]", *overrides),
    ]
    subprocess.run(command, check=True)
    steps = [r for r in read_metrics(directory / "metrics.jsonl") if "lag_max" in r][WARM_UP:]
    seconds = sum(r["step_s"] for r in steps)
    return {
        "tokens_per_s": sum(r["trained_tokens"] for r in steps) / seconds,
        "generating_s": fmean(r["learner_idle_share"] * r["step_s"] for r in steps),
        "learning_s": fmean(r["learner_busy_share"] * r["step_s"] for r in steps),
        "step_s": fmean(r["step_s"] for r in steps),
    }


def main() -> None:
    directory = Path(sys.argv[1])
    lock_step = run(directory / "lock-step", *LOCK_STEP)
    generating, learning = lock_step["generating_s"], lock_step["learning_s"]
    goal = 0.9 * (generating + learning) / max(generating, learning)
    print(f"lock-step: {lock_step['tokens_per_s']:.0f} trained tokens/s, t_g {generating:.2f} s,")
    print(f"  t_l {learning:.2f} s, so {goal:.2f} times as many are to be reached")
    for overrides in ASYNCHRONOUS:
        name = overrides[0].partition("=")[2]
        result = run(directory / f"lag-{name}", *overrides)
        ratio = result["tokens_per_s"] / lock_step["tokens_per_s"]
        print(f"lag {name}: {result['tokens_per_s']:.0f} trained tokens/s, {ratio:.2f} times;")
        print(f"  step {result['step_s']:.2f} s, learner busy {result['learning_s']:.2f} s")


if __name__ == "__main__":
    main()
