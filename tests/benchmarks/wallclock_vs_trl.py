"""Wall-clock to the same held-out accuracy: our RL stage against TRL's `GRPOTrainer`.

    python tests/benchmarks/wallclock_vs_trl.py run ours --lr 2e-4 --seed 0 --out DIR
    python tests/benchmarks/wallclock_vs_trl.py run trl --lr 1e-4 --seed 0 --out DIR
    python tests/benchmarks/wallclock_vs_trl.py run trl-continuous --lr 1e-4 --seed 0 --out DIR
    python tests/benchmarks/wallclock_vs_trl.py evaluate DIR ...

Same starter policy, prompts, reward (correctness alone, no system instructions), group size 8, 128
completions of at most 96 tokens a step, temperature 1, both cores. Every `EVERY` steps the policy
is written down; the seconds since training began, without the writing, stand in `times.json`.
`evaluate` measures each of them afterwards on the same 256 held-out prompts with 8 samples each,
and reports when the line through the points first crosses TARGET, which was fixed before any run.
Starting engines, learner and trainer counts for neither side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TARGET = 0.70
EVERY = 5
GROUP_SIZE, GROUPS, MAX_TOKENS = 8, 16, 96
TRAIN_PROMPTS, HELD_OUT_PROMPTS = 1600, 256
CONFIG = "configs/quickstart.yaml"
DATA = (
    "stages=[rl]",
    f"tasks.train=[{{source: starter, size: {TRAIN_PROMPTS}}}]",
    f"tasks.held_out=[{{source: starter, size: {HELD_OUT_PROMPTS}}}]",
    "system_instructions=[]",
    "rewards.instruction_weight=0.0",
)


def run_ours(lr: float, seed: int, out: Path, steps: int, max_lag: int) -> None:
    """`posttrain run` with the stage rl alone; time is the sum of its steps."""
    command = [
        *(sys.executable, "-m", "posttrain.cli", "run", CONFIG, *DATA),
        *(f"run.dir={out.absolute()}", f"run.seed={seed}", f"rl.num_steps={steps}"),
        *(
            f"rl.max_lag={max_lag}",
            f"rl.export_every={EVERY}",
            "rl.learner.loss.kl_coefficient=0.0",
        ),
        *(f"rl.learner.learning_rate={lr}", f"rl.checkpoint_every={10 * steps}"),
    ]
    subprocess.run(command, check=True)
    from posttrain.metrics import read_metrics

    records = [
        r for r in read_metrics(out / "metrics.jsonl") if r["stage"] == "rl" and "lag_max" in r
    ]
    elapsed, times = 0.0, {}
    for record in records:
        elapsed += record["step_s"]
        if record["step"] % EVERY == 0:
            times[record["step"]] = elapsed
    write_times(out, {str(out / "rl" / f"export-{step}"): t for step, t in times.items()})


def run_trl(lr: float, seed: int, out: Path, steps: int, *, continuous: bool) -> None:
    """TRL's trainer with its own defaults for everything that is not named above."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import GRPOConfig, GRPOTrainer

    from posttrain.config import load
    from posttrain.inputs import STARTER_POLICY, load_inputs
    from rewards.verifiers import VERIFIERS

    torch.set_num_threads(2)
    set_seed(seed)
    inputs = load_inputs(load(Path(CONFIG), [f"run.dir={out}", *DATA]))
    by_id = {prompt.prompt_id: prompt for prompt in inputs.train}

    def correctness(completions: list[Any], prompt_id: list[str], **_: Any) -> list[float]:
        return [
            VERIFIERS[by_id[p].metadata["verifier"]](by_id[p], c[0]["content"]).correctness
            for p, c in zip(prompt_id, completions, strict=True)
        ]

    class Exports(TrainerCallback):  # type: ignore[misc]
        """Writes the policy down, and takes the time that this costs out of the account."""

        def __init__(self) -> None:
            self.times: dict[str, float] = {}
            self.writing = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, _: Any, state: Any, __: Any, **keywords: Any) -> None:
            if state.global_step % EVERY:
                return
            now = time.perf_counter()
            target = out / f"export-{state.global_step}"
            keywords["model"].save_pretrained(target)
            tokenizer.save_pretrained(target)
            self.times[str(target)] = now - self.began - self.writing
            self.writing += time.perf_counter() - now

    tokenizer = AutoTokenizer.from_pretrained(STARTER_POLICY)
    exports = Exports()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(STARTER_POLICY, dtype=torch.float32),
        reward_funcs=correctness,
        args=GRPOConfig(
            output_dir=str(out / "trainer"),
            seed=seed,
            learning_rate=lr,
            lr_scheduler_type="constant",
            max_steps=steps,
            per_device_train_batch_size=GROUPS * GROUP_SIZE,
            num_generations=GROUP_SIZE,
            max_completion_length=MAX_TOKENS,
            temperature=1.0,
            use_transformers_continuous_batching=continuous,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=EVERY,
        ),
        train_dataset=Dataset.from_list(
            [
                {"prompt": [m.as_dict() for m in p.messages], "prompt_id": p.prompt_id}
                for p in inputs.train
            ]
        ),
        processing_class=tokenizer,
        callbacks=[exports],
    )
    trainer.train()
    write_times(out, exports.times)


def write_times(out: Path, times: dict[str, float]) -> None:
    (out / "times.json").write_text(json.dumps(times, indent=1))


def evaluate(directories: list[Path]) -> None:
    from posttrain.config import load
    from posttrain.inputs import load_inputs
    from posttrain.pipeline import evaluate_models

    settings = load(Path(CONFIG), ["run.dir=unused", *DATA])
    inputs = load_inputs(settings)
    for directory in directories:
        times = json.loads((directory / "times.json").read_text())
        summaries = evaluate_models(settings, inputs, [inputs.model, *map(Path, times)])
        accuracy = [summary["all"]["pass@1"]["mean"] for summary in summaries]
        curve = list(zip([0.0, *times.values()], accuracy, strict=True))
        reached = crossing(curve, TARGET)
        print(f"{directory.name}: " + " ".join(f"{t:.0f}s {a:.3f}" for t, a in curve))
        print(f"{directory.name}: {TARGET} " + (f"after {reached:.1f} s" if reached else "never"))


def crossing(curve: list[tuple[float, float]], target: float) -> float | None:
    """When the line through the points first reaches the target."""
    for (t0, a0), (t1, a1) in itertools.pairwise(curve):
        if a1 >= target:
            return t0 + (t1 - t0) * (target - a0) / (a1 - a0) if a1 > a0 else t0
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("kind", choices=["ours", "trl", "trl-continuous"])
    run.add_argument("--lr", type=float, required=True)
    run.add_argument("--seed", type=int, required=True)
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--steps", type=int, default=40)
    run.add_argument("--max-lag", type=int, default=1)
    measure = commands.add_parser("evaluate")
    measure.add_argument("directories", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "evaluate":
        evaluate(arguments.directories)
        return
    arguments.out.mkdir(parents=True)
    lr, seed, out, steps = arguments.lr, arguments.seed, arguments.out, arguments.steps
    if arguments.kind == "ours":
        run_ours(lr, seed, out, steps, arguments.max_lag)
    else:
        run_trl(lr, seed, out, steps, continuous=arguments.kind == "trl-continuous")


if __name__ == "__main__":
    main()
