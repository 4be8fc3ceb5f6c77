"""A run directory whose every event is known, written by the parts that write real ones."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from online_fakes import make_reward, make_rollout

from posttrain.ledger import Ledger
from posttrain.metrics import MetricsLog
from posttrain.prompt_table import write_prompts
from posttrain.rollout_log import RolloutLog
from posttrain.run_dir import FORMAT, RunDir, StageRecord
from posttrain.types import (
    Action,
    Decision,
    DrawOutcome,
    Label,
    Message,
    Outcome,
    PolicyVersion,
    Prompt,
    RolloutGroup,
    Sampling,
    SFTRow,
    Verdict,
)

RECORDED = Path(__file__).parents[1] / "curricula" / "recorded_run"
DOMAINS = {"a1": "sums", "a2": "sums", "s1": "words", "s2": "words", "h1": "sums", "h2": "words"}
SETTINGS = {
    "stages": ["screen", "rl", "dpo"],
    "run": {"dir": "runs/known", "seed": 3},
    "policy": {"model": "starter"},
    "tasks": {"train": [{"source": "t.jsonl"}], "held_out": [{"source": "h.jsonl"}]},
    "rl": {"advantage": "mean", "group_size": 4},
    "eval": {"k": [1, 2]},
}


def prompt(prompt_id: str) -> Prompt:
    return Prompt(
        prompt_id=prompt_id,
        messages=(Message(role="user", content=f"What is {prompt_id}?"),),
        reference=prompt_id.upper(),
        domain=DOMAINS[prompt_id],
    )


def verdict(
    prompt_id: str, correct: int, samples: int, label: Label, critic: str = "c0"
) -> Verdict:
    return Verdict(
        prompt_id=prompt_id,
        judge="critic",
        critic=critic,
        num_samples=samples,
        num_correct=correct,
        outcomes={Outcome.CORRECT: correct, Outcome.WRONG: samples - correct},
        posterior=(correct + 0.5, samples - correct + 0.5),
        label=label,
        decided_by="fixed n",
        sampling={},
    )


def group(draw_id: str, prompt_id: str, marks: str, *versions: str) -> RolloutGroup:
    """Answers as `online_fakes.make_reward` reads them, one version each or the same for all."""
    written = [PolicyVersion.parse(v) for v in versions] * (len(marks) // len(versions))
    return RolloutGroup(
        draw_id=draw_id,
        prompt=prompt(prompt_id),
        system=None,
        sampling=Sampling(max_tokens=8),
        rollouts=tuple(make_rollout(draw_id, i, m, written[i]) for i, m in enumerate(marks)),
        rewards=tuple(make_reward(m) for m in marks),
    )


def write_known_run(path: Path) -> RunDir:
    """Screening of four prompts; an RL attempt that is killed after step 2 with a checkpoint of
    step 1, and one that resumes from there; a re-screening after step 2."""
    path.mkdir(parents=True)
    run = RunDir(path)
    config = {"format": FORMAT, "settings": SETTINGS, "inputs": {}, "versions": {"python": "3"}}
    run.config_path.write_text(yaml.safe_dump(config, sort_keys=False))
    write_prompts(
        run.prompts_path,
        train=[prompt(p) for p in ("a1", "a2", "s1", "s2")],
        held_out=[prompt(p) for p in ("h1", "h2")],
        sft_rows=[SFTRow(row_id=p, prompt=prompt(p), completion="#1") for p in ("a1", "a2")],
    )
    _write_ledger(run)
    _write_metrics(run)
    run.evals_dir.mkdir()
    for stage, right in (("start", 1), ("rl", 3)):
        write_evaluation(run, stage, {"h1": right, "h2": 1})
    write_manifest(run, start_evaluation=_summary(0.25), rl_evaluation=_summary(0.5))
    return run


def write_long_run(path: Path, last_step: int) -> Path:
    """The recorded run with its steps of RL over and over, up to `last_step`; a teacher's weight
    falls from 1 to 0 meanwhile."""
    shutil.copytree(RECORDED, path)
    metrics = RunDir(path).metrics_path
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [r for r in records if r["stage"] == "rl" and "event" not in r]
    others = [r for r in records if r not in steps]
    repeated = zip(range(1, last_step + 1), itertools.cycle(steps), strict=False)
    long = [r | {"step": n, "teacher/lambda": 1 - n / last_step} for n, r in repeated]
    metrics.write_text("".join(f"{json.dumps(r)}\n" for r in [*long, *others]))
    return path


def write_manifest(
    run: RunDir, start_evaluation: Mapping[str, Any], rl_evaluation: Mapping[str, Any]
) -> None:
    stages = {
        "start": record(seconds=10.0, metrics={"evaluation": start_evaluation}),
        "screen": record(seconds=5.0, metrics={"samples": 32}),
        "rl": record(seconds=20.0, metrics={"evaluation": rl_evaluation}),
        "dpo": record(state="running"),
    }
    run.manifest_path.write_text(json.dumps({"format": FORMAT, "stages": stages}, indent=2))


def record(**known: Any) -> dict[str, Any]:
    """A stage in the manifest."""
    empty = {field.name: None for field in fields(StageRecord)}
    return empty | {"state": "done", "artifacts": {}, "metrics": {}} | known


def write_evaluation(run: RunDir, stage: str, right: Mapping[str, int], samples: int = 4) -> None:
    results = [
        {
            "prompt_id": prompt_id,
            "domain": DOMAINS[prompt_id],
            "n": samples,
            "correct": correct,
            "greedy_correct": correct > 1,
            "outcomes": {"correct": correct, "wrong": samples - correct},
            "tokens": 10 * samples,
            "instructions": {},
        }
        for prompt_id, correct in right.items()
    ]
    (run.evals_dir / f"{stage}.json").write_text(json.dumps(results))


def _summary(mean: float) -> dict[str, Any]:
    estimate = {"pass@1": {"mean": mean, "low": mean - 0.125, "high": mean + 0.125}}
    domains = {"sums": {"pass@1": {"mean": mean * 2, "low": mean, "high": mean * 2}}}
    return {"all": estimate, "domains": {**domains, "words": estimate}}


def _write_ledger(run: RunDir) -> None:
    screened = [
        verdict("a1", 8, 8, Label.EASY),
        verdict("a2", 4, 8, Label.MEDIUM),
        verdict("s1", 0, 8, Label.UNSOLVED),
        verdict("s2", 2, 8, Label.MEDIUM),
    ]
    with Ledger(run.ledger_path) as ledger:
        ledger.record_verdicts(screened)
        ledger.record_decisions(
            "sft",
            [
                decide(screened[0], Action.DROP, "drop_easiest", "the easiest"),
                decide(screened[1], Action.KEEP, "drop_easiest", "not the easiest"),
            ],
        )
        log = RolloutLog(run.rollouts_dir, attempt=ledger.open_attempt("rl", 0))
        _play(ledger, log, "d1-0", "a2", 0, "1110", 1, DrawOutcome.TRAINED, versions=("1.0",))
        _play(
            *(ledger, log, "d1-1", "s1", 0, "0000", 1, DrawOutcome.ZERO_ADVANTAGE),
            versions=("1.0",),
            reason="none_correct",
        )
        _play(ledger, log, "d1-2", "s2", 1, "1111", 2, DrawOutcome.TRAINED, versions=("1.1",))
        log.flush()
        ledger.commit_step(1)
        log = RolloutLog(run.rollouts_dir, attempt=ledger.open_attempt("rl", 1))
        # Two of the answers were written before a publish: the group's lag counts from those.
        _play(
            *(ledger, log, "d2-0", "s2", 1, "1000", 3, DrawOutcome.TRAINED),
            versions=("2.1", "2.1", "2.2", "2.2"),
        )
        log.flush()
        again = verdict("a1", 16, 16, Label.EASY, critic="rl:2.2")
        ledger.record_decisions(
            "rl", [decide(again, Action.DROP, "re-screening", "easy at step 2")]
        )
        _open(ledger, "d2-1", "a2", at=3)


def decide(judged: Verdict, action: Action, rule: str, reason: str) -> Decision:
    return Decision(
        prompt_id=judged.prompt_id, action=action, rule=rule, reason=reason, verdict=judged
    )


def _open(ledger: Ledger, draw_id: str, prompt_id: str, at: int) -> None:
    ledger.open_draw(
        draw_id=draw_id,
        prompt_id=prompt_id,
        domain=DOMAINS[prompt_id],
        system=None,
        attempt=int(draw_id[1]),
        drawn_at_step=at,
    )


def _play(
    ledger: Ledger,
    log: RolloutLog,
    draw_id: str,
    prompt_id: str,
    at: int,
    marks: str,
    step: int,
    outcome: DrawOutcome,
    *,
    versions: Sequence[str],
    reason: str = "",
) -> None:
    _open(ledger, draw_id, prompt_id, at)
    log.append(group(draw_id, prompt_id, marks, *versions), outcome)
    ledger.close_draw(
        draw_id,
        outcome,
        step=step,
        num_scored=len(marks),
        num_correct=marks.count("1"),
        reason=reason,
    )


def _write_metrics(run: RunDir) -> None:
    def step(number: int, attempt: int, **metrics: float) -> dict[str, Any]:
        return {"stage": "rl", "step": number, "attempt": attempt, **metrics}

    with MetricsLog(run.metrics_path) as log:
        log.append({"stage": "screen", "event": "done", "seconds": 5.0})
        log.append(step(1, 1, step_s=2.0, learner_idle_share=0.5, rollout_idle_share=0.0))
        log.append({"stage": "rl", "event": "evaluation", "step": 1} | _summary(0.375))
        log.append(
            step(2, 1, step_s=8.0, learner_idle_share=1.0)
        )  # killed with the checkpoint of 1
        pool = {"pool/sums/1": 1, "pool/sums/dropped": 1, "pool/words/(0, .25]": 2}
        log.append(
            step(2, 2, step_s=4.0, learner_idle_share=0.125, rollout_idle_share=0.25)
            | {"learner/ess": 0.5, "learner/clipped_fraction_age_1": 0.25, "lag_mean": 1.0}
            | {"lag_max": 1.0, "learner/k3_age_1": 0.5}
            | pool
        )
        log.append(
            {"stage": "rl", "event": "rescreen", "step": 2, "prompts": 1, "samples": 16}
            | {"discarded": 2, "dropped": 1, "restored": 0, "labels": {"easy": 1}}
        )
