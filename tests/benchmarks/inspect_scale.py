"""A run of a million draws: seconds and memory of loading it and drawing its charts.

    python tests/benchmarks/inspect_scale.py [DRAWS …]

Each size runs in a process of its own, on a ledger of as many draws over a tenth as many prompts,
each judged once, and the answers of all of them, eight a draw. Seconds are by the clock and, which
tells more on a busy machine, of the processor; memory is the process's peak, and what it was after
the imports.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from posttrain.ledger import Ledger
from posttrain.ledger_schema import VERDICT_COLUMNS
from posttrain.run_dir import FORMAT

SIZES = (100_000, 1_000_000)
GROUP = 8
BATCH = 64
CHUNK = 50_000


def build(path: Path, num_draws: int) -> None:
    num_prompts = num_draws // 10
    settings = {"rl": {"advantage": "mean"}, "eval": {"k": [1]}}
    (path / "config.yaml").write_text(yaml.safe_dump({"format": FORMAT, "settings": settings}))
    rng = np.random.default_rng(0)
    rates = rng.beta(0.7, 0.7, num_prompts)
    prompts = [f"{i:016x}" for i in range(num_prompts)]
    pl.DataFrame(
        {
            "prompt_id": prompts,
            "domain": [f"domain {i % 6}" for i in range(num_prompts)],
            "text": [f"user: question {i}" for i in range(num_prompts)],
            "reference": "1",
            "in_train": True,
            "in_held_out": False,
            "in_sft": False,
        }
    ).write_parquet(path / "prompts.parquet")
    right = rng.binomial(GROUP, rates[np.arange(num_draws) % num_prompts])
    _ledger(path / "ledger.sqlite", prompts, right, rng.binomial(8, rates))
    _answers(path / "rollouts", prompts, right)


def _ledger(path: Path, prompts: list[str], right: Any, judged: Any) -> None:
    with Ledger(path) as ledger:
        ledger.open_attempt("rl", 0)
    num_draws, num_prompts = len(right), len(prompts)
    connection = sqlite3.connect(path)
    with connection:
        connection.executemany(
            f"INSERT INTO verdicts (seq, {VERDICT_COLUMNS}, at) VALUES"
            " (?, ?, 'critic', 'c0', 8, ?, ?, ?, ?, 'medium', 'fixed n', '{}', ?)",
            (
                (i, prompts[i], int(c), f'{{"correct": {c}}}', c + 0.5, 8.5 - c, 1e9 + i)
                for i, c in enumerate(judged)
            ),
        )
        base = num_prompts
        connection.executemany(
            "INSERT INTO draws (seq, draw_id, attempt, prompt_id, domain, drawn_at_step, at)"
            " VALUES (?, ?, 1, ?, ?, ?, ?)",
            (
                (
                    *(base + 2 * n, f"d1-{n:07d}", prompts[n % num_prompts]),
                    *(f"domain {n % num_prompts % 6}", n // BATCH, 1e9 + n),
                )
                for n in range(num_draws)
            ),
        )
        connection.executemany(
            "INSERT INTO outcomes (seq, draw_id, attempt, outcome, step, as_of_step, num_scored,"
            " num_correct, reason, at) VALUES (?, ?, 1, ?, ?, ?, ?, ?, ?, ?)",
            (
                (
                    *(base + 2 * n + 1, f"d1-{n:07d}", _end(c)[0], n // BATCH + 1),
                    *(n // BATCH + 1, GROUP, int(c), _end(c)[1], 1e9 + n),
                )
                for n, c in enumerate(right)
            ),
        )
    connection.close()


def _end(right: int) -> tuple[str, str]:
    if right in (0, GROUP):
        return "zero_advantage", "all_correct" if right else "none_correct"
    return "trained", ""


def _answers(directory: Path, prompts: list[str], right: Any) -> None:
    directory.mkdir()
    for number, start in enumerate(range(0, len(right), CHUNK)):
        draws = np.repeat(np.arange(start, min(start + CHUNK, len(right))), GROUP)
        place = np.tile(np.arange(GROUP), len(draws) // GROUP)
        correct = place < right[draws]
        versions = pl.Series([f"1.{step}" for step in draws // BATCH])
        pl.DataFrame(
            {
                "draw_id": [f"d1-{n:07d}" for n in draws],
                "prompt_id": [prompts[n % len(prompts)] for n in draws],
                "domain": [f"domain {n % len(prompts) % 6}" for n in draws],
                "system": pl.Series([None] * len(draws), dtype=pl.String),
                "outcome": "trained",
                "text": [f"the answer to {n}, in some words" for n in draws],
                "num_tokens": 12,
                "finish_reason": "stop",
                "reward": correct.astype(float),
                "correctness": correct.astype(float),
                "reward_outcome": np.where(correct, "correct", "wrong"),
                "components": "{}",
                "oldest_version": versions,
                "newest_version": versions,
                "version_spans": '[[0, 12, "1.0"]]',
                "sampling": '{"max_tokens": 64, "temperature": 1.0, "top_p": 1.0, "seed": null}',
            }
        ).write_parquet(directory / f"001-{number:05d}.parquet")


def measure(path: Path) -> None:
    """In a process of its own; prints one JSON object."""
    from posttrain.inspect import charts, load_run

    before = _peak()
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began, began_cpu = time.perf_counter(), time.process_time()
        result = work()
        found[f"{name}_s"] = time.perf_counter() - began
        found[f"{name}_cpu_s"] = time.process_time() - began_cpu
        found[f"{name}_peak_mb"] = _peak()
        return result

    run = timed("load_run", lambda: load_run(path))
    timed("histogram", lambda: charts.pass_rate_histogram(run).to_json())
    timed("signal", lambda: charts.trainable_share(run).to_json())
    timed("prompts", lambda: charts.where_prompts_went(run).to_json())
    timed("staleness", lambda: charts.staleness(run).to_json())
    print(json.dumps({"draws": len(run.draws), "before_mb": before} | found))


def _peak() -> float:
    """MB since the process began; getrusage would count what its parent had when it forked."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmHWM in /proc/self/status")


def main(sizes: list[int]) -> None:
    for size in sizes:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory)
            build(path, size)
            files = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 2**20
            command = [sys.executable, __file__, "--measure", directory]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            print(f"{found.pop('draws'):,} draws, {files:,.0f} MB on disk")
            for name, value in found.items():
                print(f"  {name:24}{value:10,.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]))
    else:
        main([int(size) for size in sys.argv[1:]] or list(SIZES))
