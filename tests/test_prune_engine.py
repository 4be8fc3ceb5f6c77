"""`posttrain prune` as a user starts it: the starter policy on a real engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.starter.tasks import starter_sft_rows

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
NUM = 48


@pytest.mark.slow
def test_the_starter_prunes_a_set_and_goes_on(tmp_path: Path) -> None:
    rows = [row for row in starter_sft_rows(200, seed=0) if isinstance(row.prompt.reference, str)]
    source = tmp_path / "s.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for row in rows[:NUM]:
            turns = [
                {"role": "user", "content": row.prompt.messages[0].content},
                {"role": "assistant", "content": row.completion},
            ]
            level = row.prompt.metadata["level"]
            record = {"messages": turns, "answer": row.prompt.reference, "level": level}
            file.write(json.dumps({**record, "domain": row.prompt.domain}) + "\n")

    def prune(*extra: str) -> dict[str, object]:
        command = [sys.executable, "-m", "posttrain.cli", "prune", str(source), "--json"]
        command += ["--model", "starter", "--out", str(tmp_path / "out"), "--max-length", "192"]
        done = subprocess.run(
            [*command, "--max-tokens", "96", *extra],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        report: dict[str, object] = json.loads(done.stdout)
        return report

    first = prune("--max-samples", "8")
    figures = first["figures"]
    assert figures["rows"]["judged"] == NUM
    prompts = figures["prompts"]["judged"]
    # Half of the prompts are kept; most of those of level 1 are among the others.
    assert figures["prompts"]["kept"] == prompts - prompts // 2
    assert 4 * prompts <= figures["answers"] <= 8 * prompts
    assert 0.1 < figures["pass_rates"]["pass@1"]["all"]["mean"] < 0.9
    again = prune("--max-samples", "8", "--drop-easiest", "0.25")
    assert again["figures"]["answers"] == figures["answers"]
    assert again["figures"]["prompts"]["kept"] == prompts - prompts // 4
