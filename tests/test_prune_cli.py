"""`posttrain prune` and `posttrain audit` on its directory, as they are called."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prune_fakes import FakeCritics, FakeEngine, question

from posttrain.cli import main
from posttrain.cli_prune import _content
from posttrain.prune.settings import OtherChoice, PruneSettings
from posttrain.run_dir import fingerprint_directory


class Done(NamedTuple):
    code: Any
    out: str
    err: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["posttrain", *map(str, arguments)])
        code: Any = 0
        try:
            main()
        except SystemExit as done:
            code = done.code or 0
        return Done(code, *capfd.readouterr())

    return call


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """In place of Ray and vLLM; all that were opened."""
    opened: list[FakeEngine] = []

    def opener(settings: PruneSettings, out: Path) -> FakeCritics:
        from posttrain.data.chat import ChatFormat

        opened.append(FakeEngine(ChatFormat(settings.critic.model)))
        return FakeCritics(opened[-1])

    monkeypatch.setattr("posttrain.stages.prune.critic_opener", opener)
    return opened


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [{"question": question(i, i % 4 / 3), "answer": "1", "n": i} for i in range(24)]
    path = tmp_path / "s.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, {"question": "x"}]))
    return path


def usual(source: Path, policy: Path, out: Path) -> list[object]:
    return [source, "--model", policy, "--out", out, "--max-length", 64, "--max-tokens", 16]


def test_prune_prints_a_summary_or_one_object(
    call: Callable[..., Done],
    engines: list[FakeEngine],
    source: Path,
    tiny_policy: Path,
    tmp_path: Path,
) -> None:
    arguments = usual(source, tiny_policy, tmp_path / "out")
    done = call("prune", *arguments)
    assert done.code == 0, done.err
    assert done.out.startswith("12 of 24 rows kept: the easiest 50% by pass@1 dropped\n")
    assert "█" in done.out
    assert "1  the answer is missing" in done.out
    assert "never answered right: " in done.out
    assert f"datasets.load_dataset('{tmp_path / 'out'}')" in done.out
    again = call("prune", *arguments, "--json")
    report = json.loads(again.out)
    assert report["figures"]["rows"]["kept"] == 12
    assert engines[1].samples == 0
    assert {e["bucket"] for e in report["examples"]} <= {"easy", "medium", "hard", "unsolved"}


def test_a_dry_run_estimates(
    call: Callable[..., Done],
    engines: list[FakeEngine],
    source: Path,
    tiny_policy: Path,
    tmp_path: Path,
) -> None:
    arguments = usual(source, tiny_policy, tmp_path / "out")
    done = call("prune", *arguments, "--dry-run")
    assert done.code == 0, done.err
    assert "prompts to judge" in done.out
    assert not (tmp_path / "out").exists()
    estimate = json.loads(call("prune", *arguments, "--dry-run", "--json").out)
    assert (estimate["rows"], estimate["quarantined"]) == (24, 1)


def test_audit_tells_why_a_row_was_kept_or_dropped(
    call: Callable[..., Done],
    engines: list[FakeEngine],
    source: Path,
    tiny_policy: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    # Adaptively, the order in which answers arrive decides whether four of them suffice.
    arguments = [*usual(source, tiny_policy, out), "--fixed", "--max-samples", 4]
    assert call("prune", *arguments).code == 0
    row = call("audit", out, "--prompt", 4)  # always right
    assert row.code == 0, row.err
    assert f"  user: {question(3, 1.0)}\n  reference: '1'\n" in row.out
    assert "4 of 4 answers right: correct …'#1', correct …'#1'" in row.out
    assert "posterior Beta(4.5, 0.5): pass@1 0.900, 95% 0.555 to 1.000, medium" in row.out
    assert "dropped by drop_easiest: pass@1 0.900 (4 of 4 correct) is among" in row.out
    assert "fingerprint " in row.out
    task_id = row.out.split()[1].rstrip(",")
    assert call("audit", out, "--prompt", task_id).out == row.out
    bad = call("audit", out, "--prompt", 25)
    assert (
        bad.out == f"row 25 ({source}, row 25): the answer is missing: column 'answer' is empty\n"
    )
    unknown = call("audit", out, "--prompt", "feedfeedfeedfeed")
    assert (unknown.code, unknown.out) == (2, "")
    assert "has no row, task or prompt of that name" in unknown.err
    assert "give --prompt" in call("audit", out).err


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--drop-easiest", "0.5", "--easy-above", "0.9"], "set exactly one of drop_easiest and"),
        (["--metric", "recall"], "--metric recall: write pass@1, or pass@K for a number K"),
        (["--limit", "3", "--sample", "3"], "limit and sample exclude one another"),
        (["--max-tokens", "64"], "judge.max_tokens = 64 leaves no room for a prompt"),
        (["judge.concurency=3"], "judge.concurency: unknown setting. Did you mean judge.concurren"),
        (["--format", "csv"], "format: Input should be 'parquet' or 'jsonl'"),
        (["source.columns.prompt=task"], "there is no column 'task' (source.columns.prompt)"),
        (["--held-out", "{path: a"], "'{path: a': the value is no YAML"),
        (["--held-out", "{path: a, splits: b}"], "overlap.held_out.0.splits: unknown setting"),
        (["--held-out", "a", "--compare", "a"], "a is named 2 times; once is enough"),
        (["--reward", "none"], "none of 25 rows of s can be used; the first: prompt"),
    ],
)
def test_bad_options_end_with_2(
    call: Callable[..., Done],
    engines: list[FakeEngine],
    source: Path,
    tiny_policy: Path,
    tmp_path: Path,
    extra: list[str],
    said: str,
) -> None:
    done = call("prune", *usual(source, tiny_policy, tmp_path / "out"), *extra)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert not any(engine.samples for engine in engines)


def test_a_model_that_is_none(call: Callable[..., Done], source: Path, tmp_path: Path) -> None:
    done = call("prune", source, "--model", tmp_path, "--out", tmp_path / "out")
    assert done.code == 2
    assert done.err.startswith(f"posttrain: --model: {tmp_path} is no readable checkpoint")


def test_options_are_settings() -> None:
    names = {
        "split": "test",
        "limit": 5,
        "easy_above": 0.8,
        "method": "critic",
        "max_samples": 32,
        "confidence": 0.95,
        "held_out": [
            "h.jsonl",
            "{path: h, subset: main, split: test, columns: {prompt: task}}",
        ],
        "reward": "maths",
        "output_format": "jsonl",
    }
    given = dict.fromkeys(_given_names()) | names
    given |= {"source": "s", "model": "m", "metric": "pass@8", "fixed": True, "seed": 3}
    given |= {"by_domain": False, "min_per_domain": 2, "strict": True}
    settings = PruneSettings.model_validate(_content(given))
    assert (settings.source.split, settings.source.limit) == ("test", 5)
    selection = settings.selection
    assert (selection.easy_above, selection.drop_easiest, selection.k) == (0.8, None, 8)
    assert (selection.metric, selection.min_per_domain) == ("pass@k", 2)
    judge = settings.judge
    assert (judge.max_samples, judge.adaptive, judge.labels.confidence) == (32, False, 0.95)
    first, second = settings.overlap.held_out
    assert first == OtherChoice(path="h.jsonl")
    assert (second.path, second.split, second.name) == ("h", "test", "h (main, test)")
    assert second.columns.prompt == "task"
    assert (settings.seed, settings.strict) == (3, True)
    assert (settings.rewards.default_verifier, settings.format) == ("maths", "jsonl")
    graded = given | {"method": "grade", "metric": None, "easy_above": None, "drop_below": 3.0}
    settings = PruneSettings.model_validate(_content(graded))
    assert (settings.selection.metric, settings.selection.drop_below) == ("grade", 3.0)


@pytest.mark.parametrize(
    ("override", "cut"),
    [
        ("selection.easy_above=.9", {"easy_above": 0.9}),
        ("selection.drop_easiest=.2", {"drop_easiest": 0.2}),
        ("judge.max_samples=8", {"drop_easiest": 0.5}),
    ],
)
def test_a_cut_that_is_given_as_a_setting_stands_alone(
    call: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
    source: Path,
    tiny_policy: Path,
    tmp_path: Path,
    override: str,
    cut: dict[str, float],
) -> None:
    seen: list[PruneSettings] = []

    def keep(settings: PruneSettings, *others: Any, **options: Any) -> dict[str, Any]:
        seen.append(settings)
        return {}

    monkeypatch.setattr("posttrain.prune.run.prune", keep)
    done = call("prune", *usual(source, tiny_policy, tmp_path / "out"), override, "--json")
    assert done.code == 0, done.err
    cuts = seen[0].selection.model_dump(include={"drop_easiest", "easy_above", "drop_below"})
    assert {name: value for name, value in cuts.items() if value is not None} == cut


def test_a_critic_that_is_given_as_a_setting_is_the_one_that_is_named(
    call: Callable[..., Done],
    engines: list[FakeEngine],
    source: Path,
    tiny_policy: Path,
    tmp_path: Path,
) -> None:
    other = shutil.copytree(tiny_policy, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    arguments = usual(source, tiny_policy, tmp_path / "out")
    done = call("prune", *arguments, f"critic.model={other}", "--json")
    assert done.code == 0, done.err
    critic = json.loads(done.out)["judged_with"]["critic"]
    assert critic == {"model": str(other), "fingerprint": fingerprint_directory(other)}
    assert critic["fingerprint"] != fingerprint_directory(tiny_policy)


def _given_names() -> list[str]:
    import inspect

    from posttrain.cli_prune import prune_command

    return list(inspect.signature(prune_command).parameters)
