"""The recipe's claim, measured: SFT on the harder half, light SFT, and the same RL on top.

    python tests/benchmarks/pruned_sft.py run ARM --seed 0 --out DIR     # ARM: see ARMS
    python tests/benchmarks/pruned_sft.py compare DIR                  # of all runs in DIR/ARM/seed

Every arm screens the same prompts and trains RL for so few steps that their order still shows.
`tokens` takes as many steps on everything as there are tokens in the steps of `pruned`; it reads
them from that arm's run of the same seed, which therefore comes first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import numpy as np

from posttrain.config import load
from posttrain.data.chat import ChatFormat, sft_record
from posttrain.data.instructions import InstructionMix
from posttrain.evaluation import metric_values, paired_difference
from posttrain.inputs import load_inputs
from posttrain.metrics import read_metrics
from posttrain.pipeline import read_evaluation

CONFIG = Path("configs/quickstart.yaml")
LIGHT, HEAVY = 25, 300
RL_STEPS = 20
ARMS = {
    "none": "no SFT",
    "pruned": f"{LIGHT} steps on the harder half",
    "steps": f"{LIGHT} steps on everything",
    "tokens": "on everything, as many tokens as `pruned`",
    "heavy": f"{HEAVY} steps on everything",
    "heavy-pruned": f"{HEAVY} steps on the harder half",
}
REFERENCE = "pruned"
METRICS = ("pass@1", "pass@8", "greedy")


def run(arm: str, seed: int, out: Path) -> None:
    directory = out / arm / str(seed)
    steps = HEAVY if arm.startswith("heavy") else LIGHT
    if arm == "tokens":
        steps = round(steps * tokens_ratio(out / REFERENCE / str(seed)))
    overrides = [
        *(f"run.dir={directory.absolute()}", f"run.seed={seed}", f"rl.num_steps={RL_STEPS}"),
        f"stages=[screen,{'' if arm == 'none' else 'sft,'}rl]",
        f"screen.selection.drop_easiest={0.5 if arm.endswith('pruned') else 0.0}",
        f"sft.trainer.max_steps={steps}",
    ]
    command = [sys.executable, "-m", "posttrain.cli", "run", str(CONFIG), *overrides]
    subprocess.run(command, check=True)


def tokens_ratio(pruned: Path) -> float:
    """Mean tokens of a kept row over those of any row."""
    inputs = load_inputs(load(CONFIG, ["run.dir=unused"]))
    mix = InstructionMix(load(CONFIG, ["run.dir=unused"]).system_instructions, seed=0)
    kept = json.loads((pruned / "screen" / "kept_rows.json").read_text())["rows"]
    chat: ChatFormat = inputs.chat
    lengths = {}
    for row in inputs.sft_rows:
        record = sft_record(row, mix.resolve(row.system))
        messages = [*record["prompt"], *record["completion"]]
        lengths[row.row_id] = len(chat.tokenizer.apply_chat_template(messages)["input_ids"])
    return fmean(lengths[row_id] for row_id in kept) / fmean(lengths.values())


def compare(out: Path) -> None:
    runs = {arm: sorted((out / arm).iterdir()) for arm in ARMS if (out / arm).is_dir()}
    for arm, directories in runs.items():
        print(f"\n{arm} ({ARMS[arm]}), {len(directories)} seeds")
        for stage in ("sft", "rl") if arm != "none" else ("rl",):
            for metric in METRICS:
                mine, reference = (_values(runs[a], stage, metric) for a in (arm, REFERENCE))
                change = paired_difference(reference.mean(axis=0), mine.mean(axis=0))
                seeds = " ".join(f"{value:.3f}" for value in mine.mean(axis=1))
                print(
                    f"  after {stage:4}{metric:8} {mine.mean():.3f}   against {REFERENCE} "
                    f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]   {seeds}"
                )
        no_signal = [fmean(r["zero_advantage_share"] for r in _rl_records(d)) for d in directories]
        first = [_rl_records(directory)[0] for directory in directories]
        last = [_rl_records(directory)[-1] for directory in directories]
        print(
            f"  entropy at the first and last step of RL, nats a token: "
            f"{fmean(r['learner/entropy'] for r in first):.3f} "
            f"{fmean(r['learner/entropy'] for r in last):.3f}; groups without signal "
            f"{fmean(no_signal):.2f}"
        )


def _values(directories: list[Path], stage: str, metric: str) -> np.ndarray:
    return np.stack(
        [
            metric_values(read_evaluation(d / "evals" / f"{stage}.json"), (1, 8))[metric]
            for d in directories
        ]
    )


def _rl_records(directory: Path) -> list[dict[str, float]]:
    return [r for r in read_metrics(directory / "metrics.jsonl") if "lag_max" in r]


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
