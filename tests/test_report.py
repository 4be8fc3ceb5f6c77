"""The tables that a run ends with: right numbers, nothing cut, readable on a narrow terminal."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from posttrain.report import print_evaluation, print_report

STAGES = ("start", "sft", "rl", "dpo")
DOMAINS = ("number_theory", "strings")
METRICS = ("pass@1", "pass@8", "greedy", "unparsable", "truncated", "tokens")
INSTRUCTED = ("ignored/brief", "pass@1/brief")
SECONDS = {"start": 9.7, "screen": 61.0, "sft": 30.0, "rl": 200.4, "dpo": 59.0}


def estimate(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.011, "high": mean + 0.011}


def mean_of(stage: int, domain: int, metric: int) -> float:
    """A number of its own for every cell."""
    return 0.1 + 0.2 * stage + 0.04 * domain + 0.003 * metric


@pytest.fixture
def evaluations() -> dict[str, dict[str, Any]]:
    names = METRICS + INSTRUCTED

    def metrics(stage: int, domain: int) -> dict[str, Any]:
        found = {m: estimate(mean_of(stage, domain, j)) for j, m in enumerate(names)}
        return found | {"tokens": {"mean": 30.04 + stage, "low": 29.0, "high": 1000.0}}

    return {
        stage: {
            "all": metrics(i, 2),
            "domains": {d: metrics(i, j) for j, d in enumerate(DOMAINS)},
        }
        for i, stage in enumerate(STAGES)
    }


def render(
    evaluations: dict[str, Any],
    width: int = 160,
    policy: str = "/runs/x/policy",
    metrics: dict[str, Any] | None = None,
) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    print_report(evaluations, SECONDS, policy, console, metrics or {})
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows_of(text: str, title: str) -> dict[str, list[str]]:
    """Row label -> cells, of the table below `title`; columns are set apart by two blanks."""
    table = re.split(r"─ *\n", text[text.index(title) :], maxsplit=1)[1]
    rows: dict[str, list[str]] = {}
    for line in table.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) == 1 and cells[0]:  # what stands below the table
            break
        if cells[0]:
            rows[cells[0]] = cells[1:]
    return rows


def shown(mean: float) -> str:
    numbers = (f"{v:.3f}".removeprefix("0") for v in (mean, mean - 0.011, mean + 0.011))
    return "{} {}–{}".format(*numbers)


@pytest.mark.parametrize("metric", ["pass@1", "pass@8"])
def test_accuracy_by_domain_after_each_stage(evaluations: dict[str, Any], metric: str) -> None:
    rows = rows_of(render(evaluations), f"Held-out {metric}")
    column = METRICS.index(metric)
    for domain, name in enumerate((*DOMAINS, "all")):
        assert rows[name] == [shown(mean_of(stage, domain, column)) for stage in range(4)]
    assert list(rows) == [*DOMAINS, "all"]


def test_the_form_of_the_answers(evaluations: dict[str, Any]) -> None:
    rows = rows_of(render(evaluations), "Greedy accuracy and the form")
    assert list(rows) == [
        "greedy accuracy",
        "unparsable answers",
        "truncated answers",
        "tokens an answer",
        "instruction 'brief' ignored",
        "pass@1 under 'brief'",
    ]
    assert rows["greedy accuracy"] == [shown(mean_of(s, 2, 2)) for s in range(4)]
    assert rows["tokens an answer"][0] == "30.0 29.0–1000.0"
    assert rows["instruction 'brief' ignored"] == [shown(mean_of(s, 2, 6)) for s in range(4)]
    assert rows["pass@1 under 'brief'"] == [shown(mean_of(s, 2, 7)) for s in range(4)]


def test_stages_head_the_columns_in_their_order(evaluations: dict[str, Any]) -> None:
    headers = [line.split() for line in render(evaluations).splitlines() if "SFT" in line]
    assert ["domain", "start", "SFT", "RL", "DPO"] in headers


def test_time_and_where_the_policy_is(evaluations: dict[str, Any]) -> None:
    lines = render(evaluations, policy="/runs/[x]/policy").splitlines()
    assert (
        "Time: start 0:10 · screening 1:01 · SFT 0:30 · RL 3:20 · DPO 0:59 · in all 6:00" in lines
    )
    assert lines[-3:] == [
        "The policy: /runs/[x]/policy",
        "  transformers: AutoModelForCausalLM.from_pretrained('/runs/[x]/policy')",
        "  vLLM:         vllm serve /runs/[x]/policy",
    ]


@pytest.mark.parametrize("ks", [[1], [1, 2, 4, 8, 16]])
def test_nothing_is_cut_at_160_columns(evaluations: dict[str, Any], ks: list[int]) -> None:
    """However many k there are, and on one line a row."""
    for summary in evaluations.values():
        for metrics in (summary["all"], *summary["domains"].values()):
            metrics |= {f"pass@{k}": estimate(1.0) for k in ks}
    text = render(evaluations)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 160
    for k in ks:
        assert rows_of(text, f"Held-out pass@{k},")["all"][3] == "1.000 .989–1.011"


def test_80_columns_keep_every_number_whole(evaluations: dict[str, Any]) -> None:
    text = render(evaluations, width=80)
    tables = text[: text.index("Time:")]
    assert max(map(len, tables.splitlines())) <= 80
    assert "…" not in tables
    wide = render(evaluations, width=160)
    numbers = re.findall(r"\d*\.\d+(?:–\d*\.\d+)?", wide[: wide.index("Time:")])
    assert len(numbers) == 2 * 4 * (3 + 3 + 6)
    for number in numbers:
        assert number in tables


def test_a_long_domain_is_folded_not_cut(evaluations: dict[str, Any]) -> None:
    long = "an_unreasonably_long_name_of_a_domain_" * 3
    for summary in evaluations.values():
        summary["domains"][long] = summary["domains"].pop("strings")
    text = render(evaluations, width=80)
    assert "…" not in text
    assert long in "".join(line.split()[0] for line in text.splitlines() if line.strip())


def test_names_with_brackets_are_no_markup(evaluations: dict[str, Any]) -> None:
    for summary in evaluations.values():
        summary["domains"]["[bold]"] = summary["domains"].pop("strings")
        summary["all"]["ignored/[red]"] = estimate(0.5)
    text = render(evaluations)
    assert "[bold]" in text
    assert "instruction '[red]' ignored" in text


def test_what_could_not_be_measured_is_a_dash(evaluations: dict[str, Any]) -> None:
    del evaluations["rl"]["domains"]["strings"]["pass@8"]
    del evaluations["start"]["all"]["greedy"]
    text = render(evaluations)
    assert rows_of(text, "Held-out pass@8")["strings"][2] == "–"
    assert rows_of(text, "Greedy accuracy")["greedy accuracy"][0] == "–"


def test_one_evaluation_has_one_column(evaluations: dict[str, Any]) -> None:
    console = Console(width=80, file=io.StringIO())
    print_evaluation(evaluations["rl"], console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert rows_of(text, "Held-out pass@1")["strings"] == [shown(mean_of(2, 1, 0))]
    assert ["domain", "policy"] in [line.split() for line in text.splitlines()]
    assert "The policy:" not in text


def test_what_sft_kept_and_what_dpo_mended_is_said(evaluations: dict[str, Any]) -> None:
    saved = {"accuracy": 0.5, "reach": 0.9, "over_constrained": False}
    sft = {
        "kept_step": 8,
        "checkpoints": {
            "entered": {"accuracy": 0.4, "reach": 0.9},
            "4": saved,
            "8": saved,
            "12": saved | {"over_constrained": True},
        },
    }
    dpo = {
        "pairs": 52,
        "pairs_by_case": {"overlong": 12, "wrong": 40},
        "kept": False,
        "pass@1_change": -0.031,
    }
    text = render(evaluations, metrics={"sft": sft, "dpo": dpo})
    assert "SFT: step 8 of 4, 8, 12 was kept; over-constrained (pass@k fell): 12\n" in text
    assert "DPO: 52 pairs, by the corner case they mend: overlong 12 · wrong 40\n" in text
    assert "DPO: undone, for held-out pass@1 had changed by -0.031\n" in text
    light = render(evaluations, metrics={"sft": {"rows": 3}, "dpo": dpo | {"kept": True}})
    assert "SFT: step" not in light
    assert "undone" not in light


def test_an_adapter_is_served_on_its_base(evaluations: dict[str, Any], tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "someone/base", "r": 48}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    text = render(evaluations, policy=str(tmp_path))
    assert (
        f"vllm serve someone/base --enable-lora --max-lora-rank 64 --lora-modules policy={tmp_path}"
        in text
    )
