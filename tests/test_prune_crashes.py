"""SIGKILL at random moments, then the same command: nothing asked twice, the same comes out."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from prune_fakes import question

from posttrain.prune.judging import open_tasks
from posttrain.prune.settings import PruneSettings
from posttrain.prune.store import Store

KILLS = 5
NUM = 160
FAKES = Path(__file__).parent / "prune_fakes.py"


class Attempts:
    """A process that forks one attempt after the other."""

    def __init__(self, settings: PruneSettings, out: Path, policy: Path, log: Path) -> None:
        arguments = [settings.model_dump_json(), str(out), str(policy), str(log)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(FAKES), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def attempt(self, killed_after: str = "") -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{killed_after}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __enter__(self) -> Attempts:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def closed_tasks(store_path: Path, settings: PruneSettings) -> set[str]:
    """Tasks that have all the answers that they need."""
    with closing(Store(store_path)) as store:
        tasks = store.tasks()
        done = ~open_tasks(tasks, settings)
        return set(store.task_ids(tasks.key[done]))


def asked(log: Path) -> Counter[str]:
    return Counter(log.read_text().split()) if log.exists() else Counter()


@pytest.mark.slow
def test_killed_five_times_it_comes_to_the_same(tmp_path: Path, tiny_policy: Path) -> None:
    rng = random.Random(0)
    rows = [
        {"question": question(i, rng.random()), "answer": "1", "n": i, "tags": [i] * (i % 3)}
        for i in range(NUM)
    ]
    source = tmp_path / "s.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    # By a threshold, how often a prompt is asked depends on its own answers alone.
    settings = PruneSettings.model_validate(
        {
            "source": {"path": str(source)},
            "critic": {"model": "critic", "max_length": 64},
            "judge": {"seed": 0, "max_tokens": 16, "concurrency": 4},
            "selection": {"easy_above": 0.6},
        }
    )
    logs = {name: tmp_path / f"{name}.log" for name in ("whole", "killed")}
    outs = {name: tmp_path / name for name in logs}
    store_path = outs["killed"] / "store.sqlite"
    with Attempts(settings, outs["whole"], tiny_policy, logs["whole"]) as whole:
        assert whole.attempt() == 0
    done: set[str] = set()
    with Attempts(settings, outs["killed"], tiny_policy, logs["killed"]) as killed:
        for _ in range(KILLS):
            before = asked(logs["killed"])
            assert killed.attempt(str(rng.randrange(60))) == -signal.SIGKILL
            assert done.isdisjoint(asked(logs["killed"]) - before)
            done = closed_tasks(store_path, settings) if store_path.exists() else set()
        assert 0 < len(done) < NUM
        before = asked(logs["killed"])
        assert killed.attempt() == 0
        assert done.isdisjoint(asked(logs["killed"]) - before)

    # What was under way at a kill is asked again, and nothing else.
    again = asked(logs["killed"]) - asked(logs["whole"])
    assert sum(again.values()) <= KILLS * settings.judge.concurrency
    assert not asked(logs["whole"]) - asked(logs["killed"])
    files = sorted(
        p.relative_to(outs["whole"]) for p in (outs["whole"] / "data").rglob("*.parquet")
    )
    assert len(files) == 3
    for file in files:
        assert (outs["killed"] / file).read_bytes() == (outs["whole"] / file).read_bytes()
    assert pq.read_table(outs["killed"] / "data" / "annotated").num_rows == NUM


def test_killed_while_it_writes_it_writes_again(tmp_path: Path, tiny_policy: Path) -> None:
    rows = [{"question": question(i, i % 2), "answer": "1", "text": "x" * 500} for i in range(1000)]
    source = tmp_path / "s.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = PruneSettings.model_validate(
        {
            "source": {"path": str(source)},
            "critic": {"model": "critic", "max_length": 64},
            "judge": {
                "seed": 0,
                "max_tokens": 16,
                "concurrency": 256,
                "adaptive": False,
                "max_samples": 1,
            },
        }
    )
    out, log = tmp_path / "out", tmp_path / "log"
    with Attempts(settings, out, tiny_policy, log) as attempts:
        assert attempts.attempt() == 0
        first = {p: p.read_bytes() for p in sorted((out / "data").rglob("*.parquet"))}
        for _ in range(3):
            assert attempts.attempt("writing") == -signal.SIGKILL
            assert not (out / "manifest.json").exists()
        assert attempts.attempt() == 0
    assert sum(asked(log).values()) == 1000
    assert {p: p.read_bytes() for p in sorted((out / "data").rglob("*.parquet"))} == first
    names = sorted(path.name for path in out.iterdir() if "store" not in path.name)
    assert names == ["README.md", "data", "lock", "manifest.json", "quarantine.jsonl"]
