"""What shared re-screening takes from rollouts: tokens a second with it and without, in turns.

    python tests/benchmarks/rescreen_cost.py DIR [rounds]

RL on the starter as in configs/quickstart.yaml; with re-screening, 64 prompts are judged by up to
16 answers each every ten steps, by the engine and weights that serve rollouts, as the defaults have
it. The steps are too short for that, so that it is judged all the time. Only the tokens of rollouts
count.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import fmean

from posttrain.metrics import read_metrics

STEPS, WARM_UP = 34, 4
ARMS = {
    "without": (),
    "with": ("rl.rescreen={every_steps: 10, prompts: 64}",),
}


def run(directory: Path, *overrides: str) -> float:
    """Rollout tokens a second after the warm-up."""
    command = [
        *(sys.executable, "-m", "posttrain.cli", "run", "configs/quickstart.yaml"),
        *("stages=[rl]", f"run.dir={directory.absolute()}", f"rl.num_steps={STEPS}"),
        *("tasks.held_out=[{source: starter, size: 16}]", *overrides),
    ]
    subprocess.run(command, check=True)
    steps = [r for r in read_metrics(directory / "metrics.jsonl") if "lag_max" in r][WARM_UP:]
    tokens = sum(r["generated_tokens_per_s"] * r["step_s"] for r in steps)
    return float(tokens / sum(r["step_s"] for r in steps))


def main() -> None:
    directory, rounds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3
    speeds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for index in range(rounds):
        for arm, overrides in ARMS.items():
            speeds[arm].append(run(directory / f"{arm}-{index}", *overrides))
    for arm, values in speeds.items():
        print(f"{arm}: {fmean(values):.0f} rollout tokens/s ({min(values):.0f}-{max(values):.0f})")
    print(f"{fmean(speeds['with']) / fmean(speeds['without']) - 1:+.1%}")


if __name__ == "__main__":
    main()
