"""What answers that hang their verifier cost the learner: one in a hundred, in a real RL stage.

    python tests/benchmarks/hanging_answers.py DIR

Trained tokens a second with every answer scored in microseconds, and with one answer in a hundred
(by the hash of its text) keeping its scorer process busy in C code until the deadline kills it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import reasoning_gym  # noqa: F401  (its verifiers import it when first called: see rewards.custom)

from posttrain.metrics import read_metrics
from posttrain.starter.families import FAMILIES
from posttrain.types import Prompt
from rewards.verifiers import VERIFIERS

STEPS, WARM_UP = 24, 4
ONE_IN = 100
DEADLINES_S = (1.0, 10.0)


def sound(prompt: Prompt, text: str) -> float:
    """What the task's own verifier says."""
    return VERIFIERS[prompt.metadata["verifier"]](prompt, text).correctness


def hanging(prompt: Prompt, text: str) -> float:
    digest = hashlib.sha256(f"{prompt.prompt_id} {text}".encode()).digest()
    if int.from_bytes(digest[:4], "big") % ONE_IN == 0:
        pow(9, 9**9)
    return sound(prompt, text)


def run(directory: Path, verifier: str, deadline_s: float) -> float:
    """Trained tokens a second after the warm-up."""
    chosen = ", ".join(f"{domain}: own" for domain in sorted({f.domain for f in FAMILIES}))
    overrides = (
        *("stages=[rl]", f"run.dir={directory.absolute()}", f"rl.num_steps={STEPS}"),
        *(
            f"rewards.custom.own={Path(__file__).stem}:{verifier}",
            f"rewards.verifiers={{{chosen}}}",
        ),
        *("tasks.held_out=[{source: starter, size: 16}]", f"rewards.deadlines_s.own={deadline_s}"),
    )
    command = (sys.executable, "-m", "posttrain.cli", "run", "configs/quickstart.yaml")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([*command, *overrides], check=True, env={**os.environ, "PYTHONPATH": path})
    steps = [r for r in read_metrics(directory / "metrics.jsonl") if "lag_max" in r][WARM_UP:]
    return sum(r["trained_tokens"] for r in steps) / sum(r["step_s"] for r in steps)


def main() -> None:
    directory = Path(sys.argv[1])
    base = run(directory / "sound", "sound", 10.0)
    print(f"none hangs: {base:.0f} trained tokens/s")
    for deadline_s in DEADLINES_S:
        speed = run(directory / f"hanging-{deadline_s:g}", "hanging", deadline_s)
        print(
            f"one in {ONE_IN} hangs, deadline {deadline_s:g} s: {speed:.0f} trained tokens/s, "
            f"{speed / base - 1:+.1%}"
        )


if __name__ == "__main__":
    main()
