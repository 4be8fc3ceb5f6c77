"""What light DPO does about malformed and overlong answers, on a policy that has both.

    python tests/benchmarks/corner_cases.py OUT [--seeds 0 1 2]

After RL the starter has hardly any, so each seed spoils it first: SFT on its own rows, of which a
fifth give the answer without its mark and a fifth write their steps three times. Then DPO mines
pairs of these two cases only. Shown are paired differences over the held-out prompts (see
`stage_gains.py`) and how many pairs named which case. `thrice` is the share of answers with steps
that write them three times; mean lengths also depend on how often steps are written at all.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

from posttrain.config import load
from posttrain.evaluation import metric_values, paired_difference
from posttrain.inputs import load_inputs
from posttrain.pipeline import read_evaluation
from posttrain.run_dir import RunDir
from posttrain.starter.evaluate import generate
from posttrain.starter.tasks import starter_sft_rows

ROOT = Path(__file__).parents[2]
SIZE = 1600
MOST_STEPS = 40
"""Characters: three times as many still fit beside a prompt."""
METRICS = ("pass@1", "pass@8", "greedy", "unparsable", "truncated", "tokens")


def spoiled(completion: str, rng: random.Random) -> str:
    kind = rng.random()
    steps, mark, answer = completion.rpartition("#")
    if kind < 0.2:
        return steps + answer
    if kind < 0.4 and steps and len(steps) <= MOST_STEPS:
        return ",".join([steps] * 3) + mark + answer
    return completion


def write_rows(target: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = [
        {
            "question": row.prompt.messages[-1].content,
            "completion": spoiled(row.completion, rng),
            **({"system": row.system} if row.system else {}),
        }
        for row in starter_sft_rows(SIZE, seed)
    ]
    target.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def run(directory: Path, *overrides: str) -> Path:
    command = [sys.executable, "-m", "posttrain.cli", "run", "configs/quickstart.yaml"]
    subprocess.run([*command, f"run.dir={directory}", *overrides], cwd=ROOT, check=True)
    return directory


def spoil_and_mend(out: Path, seed: int) -> Path:
    """The run of the DPO stage."""
    out.mkdir(parents=True, exist_ok=True)
    rows = out / f"rows-{seed}.jsonl"
    write_rows(rows, seed)
    before = run(
        out / f"spoiled-{seed}",
        "stages=[sft]",
        f"run.seed={seed}",
        f"sft.data={{source: {rows}}}",
        "sft.trainer.learning_rate=3.0e-4",
    )
    return run(
        out / f"mended-{seed}",
        "stages=[dpo]",
        f"run.seed={seed}",
        f"policy.model={before / 'policy'}",
        "dpo.mining.cases=[malformed, overlong]",
        "dpo.mining.instructed_share=0",
    )


def thrice(policy: Path, samples: int = 8) -> np.ndarray:
    """`[N]` over held-out prompts: of the answers with steps, how many write them three times; NaN
    where none has steps."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    inputs = load_inputs(load(ROOT / "configs" / "quickstart.yaml", ["run.dir=unused"]))
    written = generate(
        AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(policy),
        [[m.as_dict() for m in prompt.messages] for prompt in inputs.held_out],
        samples,
    )
    found = []
    for texts in written:
        steps = [s for s in (text.rpartition("#")[0] for text in texts) if s]
        found.append(np.mean([is_thrice(s) for s in steps]) if steps else np.nan)
    return np.array(found)


def is_thrice(steps: str) -> bool:
    """Whether a text is `x,x,x`."""
    third = (len(steps) - 2) // 3
    return bool(third) and steps == ",".join([steps[:third]] * 3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    runs = [spoil_and_mend(arguments.out.absolute(), seed) for seed in arguments.seeds]
    for directory in runs:
        dpo = RunDir(directory).stages()["dpo"].metrics
        print(f"{directory.name}: {dpo['pairs_by_case']}, kept: {dpo['kept']}")
    before, after = (
        [metric_values(read_evaluation(r / "evals" / f"{name}.json"), (1, 8)) for r in runs]
        for name in ("start", "dpo")
    )
    for metric in METRICS:
        show(metric, *(np.stack([values[metric] for values in c]) for c in (before, after)))
    policies = ((r.parent / r.name.replace("mended", "spoiled"), r) for r in runs)
    shares = [[thrice(directory / "policy") for directory in pair] for pair in policies]
    show("thrice", *(np.stack(of) for of in zip(*shares, strict=True)))


def show(metric: str, first: np.ndarray, second: np.ndarray) -> None:
    """Both `[runs, N]`; a prompt counts if it has a value in each run, before and after."""
    there = ~np.isnan(first + second).any(axis=0)
    first, second = first[:, there], second[:, there]
    pooled = paired_difference(first.mean(axis=0), second.mean(axis=0))
    seeds = " ".join(f"{d:+.3f}" for d in (second - first).mean(axis=1))
    print(
        f"  {metric:12} {first.mean():7.3f} -> {second.mean():7.3f}   {pooled.mean:+.3f} "
        f"[{pooled.low:+.3f}, {pooled.high:+.3f}]   by run: {seeds}"
    )


if __name__ == "__main__":
    main()
