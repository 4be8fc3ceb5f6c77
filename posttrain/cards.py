"""Cards beside what a run leaves: how it was made, from what, with which figures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from posttrain.atomic import write_atomically
from posttrain.run_dir import CARD_NAME, RunDir, still_asked_for
from posttrain.types import PreferencePair

TRAINED = {
    "screen": "screening by difficulty",
    "sft": "supervised fine-tuning on what screening kept",
    "rl": "asynchronous online RL",
    "dpo": "DPO on corner cases that the policy itself showed",
}
"""What a stage does, in words."""


def write_policy_card(run: RunDir, stage: str) -> None:
    """Beside the policy after `stage`, and beside the run's if it is the last: README.md. Cards
    are no part of what a directory's hash covers."""
    config = run.config()
    stages = still_asked_for(run.stages(), config["settings"])
    reported = {name: record.metrics for name, record in stages.items()}
    names = list(reported)
    upto = {name: reported[name] for name in names[: names.index(stage) + 1]}
    card = policy_card(config, upto, stage)
    for directory in (run.stage_dir(stage) / "policy", run.policy_dir):
        if directory.exists():
            write_atomically(directory / CARD_NAME, card)


def write_rollouts_card(
    run: RunDir, metrics: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Beside the answers of RL, if there are any; see `rollouts_card`."""
    if run.rollouts_dir.exists():
        write_atomically(run.rollouts_dir / CARD_NAME, rollouts_card(metrics, settings))


def policy_card(
    config: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]], stage: str
) -> str:
    """README.md of the policy after `stage`.

    Args:
        config: the content of the run's config.yaml.
        metrics: stage -> what it reported, in order, up to and with `stage`; `evaluation` in it is
            a `posttrain.evaluation.summarise`.
    """
    settings = config["settings"]
    base = settings["policy"]["model"]
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
        "tags": ["posttrain", *(name for name in metrics if name in TRAINED)],
    }
    done = [name for name in metrics if name in TRAINED]
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
            f"# {base}, after {' → '.join(done) or stage}",
            "",
            f"Made by posttrain {config['versions'].get('posttrain', '')} from `{base}`"
            f" (seed {settings['run']['seed']}):",
            "",
            *(f"{i}. {TRAINED[name]}: {_told(metrics[name])}" for i, name in enumerate(done, 1)),
            "",
            *_evaluations(metrics),
            "## Data",
            "",
            *_data(config),
            "",
            "## Settings",
            "",
            "```yaml",
            yaml.safe_dump({name: settings[name] for name in done if name in settings}).strip(),
            "```",
            "",
            f"Versions: {', '.join(f'{k} {v}' for k, v in config['versions'].items())}.",
            "",
        ]
    )


def pairs_card(pairs: Sequence[PreferencePair], policy: str) -> str:
    """README.md of the preference pairs; `policy` is the one that they were mined from."""
    header = {
        "configs": [{"config_name": "default", "data_files": "pairs.jsonl"}],
        "tags": ["posttrain", "preference"],
    }
    cases = Counter(pair.corner_case for pair in pairs)
    domains = Counter(pair.prompt.domain for pair in pairs)
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
            "# Preference pairs by corner case",
            "",
            f"{len(pairs):,} pairs, mined by posttrain from answers of `{policy}` and used for DPO"
            " with it as the reference. `prompt`, `chosen`, `rejected` are what TRL reads;"
            " `corner_case` says what a pair mends.",
            "",
            "| corner case | pairs | mean margin of the rewards |",
            "|---|---|---|",
            *(
                f"| {case} | {count:,} | {_mean_margin(pairs, case)} |"
                for case, count in cases.most_common()
            ),
            "",
            "| domain | pairs |",
            "|---|---|",
            *(f"| {domain} | {count:,} |" for domain, count in domains.most_common()),
            "",
        ]
    )


def rollouts_card(metrics: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """README.md of the groups that RL trained on or rejected; both arguments are of the stage."""
    header = {
        "configs": [{"config_name": "default", "data_files": "*.parquet"}],
        "tags": ["posttrain", "rollouts"],
    }
    ends = ", ".join(f"{name} {count:,}" for name, count in metrics["draws"].items())
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
            "# Answers of online RL",
            "",
            f"Every answer that RL trained on or rejected, groups of {settings['group_size']} at"
            f" temperature {settings['temperature']}, at most {settings['max_tokens']} tokens."
            " A row is one answer with its reward; `outcome` is what became of its group.",
            "",
            f"How draws ended: {ends}. Rows of an attempt beyond the checkpoint that a later one"
            " resumed from are here too, and not counted.",
            "",
        ]
    )


def _told(metrics: Mapping[str, Any]) -> str:
    """`rows 803, train_loss 0.202, …`"""
    return ", ".join(_flat({k: v for k, v in metrics.items() if k != "evaluation"})) or "done"


def _flat(metrics: Mapping[str, Any]) -> Iterator[str]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield f"{name.replace('_', ' ')} ({', '.join(_flat(value))})"
        elif value is not None:
            number = f"{value:.4g}" if isinstance(value, float) else str(value)
            yield f"{name.replace('_', ' ')} {number}"


def _evaluations(metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    summaries = {n: m["evaluation"] for n, m in metrics.items() if "evaluation" in m}
    if not summaries:
        return
    yield from ("## Held-out accuracy", "", "pass@1 with 95% intervals over prompts.", "")
    yield f"| domain | {' | '.join(summaries)} |"
    yield f"|---|{'---|' * len(summaries)}"
    domains = list(next(iter(summaries.values()))["domains"])
    for domain in (*domains, "all"):
        of = [
            s["all"] if domain == "all" else s["domains"].get(domain, {})
            for s in summaries.values()
        ]
        yield f"| {domain} | {' | '.join(_interval(found.get('pass@1')) for found in of)} |"
    yield ""


def _interval(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "–"
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _data(config: Mapping[str, Any]) -> Iterator[str]:
    tasks = config["settings"]["tasks"]
    for name in ("train", "held_out"):
        sources = "; ".join(map(_source, tasks[name]))
        yield f"- {name.replace('_', '-')} tasks: `{sources}`"
    sft = config["settings"].get("sft", {}).get("data")
    if sft is not None:
        yield f"- SFT rows: `{_source(sft)}`"
    prints = ", ".join(f"{name} `{value}`" for name, value in config["inputs"].items())
    yield f"- fingerprints: {prints}"


def _source(source: Mapping[str, Any]) -> str:
    """What was said of it, without what was left open."""
    return json.dumps({name: value for name, value in source.items() if value not in (None, {})})


def _mean_margin(pairs: Sequence[PreferencePair], case: str) -> str:
    margins = [p.margin for p in pairs if p.corner_case == case and p.margin is not None]
    return f"{sum(margins) / len(margins):.3f}" if margins else "–"
