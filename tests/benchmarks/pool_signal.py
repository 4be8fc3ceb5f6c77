"""Groups that carry signal, by curriculum, from a pool that is bad on purpose.

    python tests/benchmarks/pool_signal.py DIR

Half of the prompts accept nearly any answer, a tenth of them none; the rest are the starter's own.
The same policy, seed and number of steps under the difficulty curriculum, fed by screening, and
under uniform sampling. A group carries signal if its answers differ in correctness.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from posttrain.metrics import read_metrics
from posttrain.starter.tasks import starter_prompts
from posttrain.types import Prompt
from rewards.exact import score as exact

STEPS, WARM_UP = 24, 2
SIZE = 1600
TRIVIAL, IMPOSSIBLE = "trivial", "impossible"


def made(prompt: Prompt, text: str) -> float:
    """0.98 of all answers to a trivial prompt are right, chosen by their hash."""
    if prompt.reference == TRIVIAL:
        digest = hashlib.sha256(f"{prompt.prompt_id} {text}".encode()).digest()
        return float(digest[0] >= 5)
    return 0.0 if prompt.reference == IMPOSSIBLE else exact(prompt, text).correctness


def write_tasks(path: Path) -> None:
    """Of ten prompts, all of them checked by `exact`, five trivial and one impossible."""
    prompts = [p for p in starter_prompts("train", 3 * SIZE, 0) if isinstance(p.reference, str)]
    kinds = [TRIVIAL] * 5 + [IMPOSSIBLE] + [None] * 4
    with path.open("w") as lines:
        for number, prompt in enumerate(prompts[:SIZE]):
            record = {
                "question": prompt.messages[0].content,
                "answer": kinds[number % 10] or prompt.reference,
                "domain": prompt.domain,
                "verifier": "made",
            }
            lines.write(json.dumps(record) + "\n")


def run(directory: Path, tasks: Path, kind: str) -> None:
    overrides = (
        *("stages=[screen,rl]", f"run.dir={directory.absolute()}", f"rl.num_steps={STEPS}"),
        *(f"tasks.train=[{{source: {tasks.absolute()}}}]", f"rl.curriculum.kind={kind}"),
        *("tasks.held_out=[{source: starter, size: 16}]", "system_instructions=[]"),
        f"rewards.custom.made={Path(__file__).stem}:made",
    )
    command = (sys.executable, "-m", "posttrain.cli", "run", "configs/quickstart.yaml")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([*command, *overrides], check=True, env={**os.environ, "PYTHONPATH": path})


def report(directory: Path, kind: str) -> float:
    steps = [r for r in read_metrics(directory / "metrics.jsonl") if "lag_max" in r][WARM_UP:]
    ended: Counter[str] = Counter()
    for record in steps:
        ended.update({k: v for k, v in record.items() if k.startswith(("trained/", "ended/"))})
    trained = sum(count for name, count in ended.items() if name.startswith("trained/"))
    empty = sum(
        count
        for name, count in ended.items()
        if name.startswith(("ended/all_correct/", "ended/none_correct/"))
    )
    share = trained / (trained + empty)
    print(f"{kind}: {share:.3f} of {trained + empty:.0f} groups carry signal; trained by domain:")
    print("  " + ", ".join(f"{n[8:]} {c:.0f}" for n, c in ended.items() if n[:8] == "trained/"))
    return share


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True)
    tasks = directory / "tasks.jsonl"
    write_tasks(tasks)
    shares = {}
    for kind in ("uniform", "difficulty"):
        run(directory / kind, tasks, kind)
        shares[kind] = report(directory / kind, kind)
    print(f"{shares['difficulty'] / shares['uniform']:.2f} times as many")


if __name__ == "__main__":
    main()
