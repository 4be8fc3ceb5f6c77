"""Is a judged pass rate right? On tasks whose difficulty is known by how they are made.

    python tests/benchmarks/judge_calibration.py [--prompts 24] [--model starter] [--json]

The critic judges `prompts` tasks of each level of the starter's nine families, adaptively, up to 16
answers. Then it gives 64 fresh answers to each. Two things are asked: do the judged means fall with
the level (Spearman's rank correlation of level means), and does the posterior's 95% beta-binomial
interval hold the count of successes among the fresh answers? Starts a real engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from judges.estimators import predictive_interval
from judges.judge import CriticJudge, JudgeSettings
from posttrain.data.prompts import make_prompt
from posttrain.prune.settings import PruneSettings
from posttrain.stages.prune import critic_model, critic_opener
from posttrain.starter.families import FAMILIES, LEVELS
from posttrain.types import Prompt, Verdict

JUDGED, FRESH = 16, 64
MAX_TOKENS, MAX_LENGTH = 96, 192


def tasks(prompts: int, seed: int) -> dict[str, Prompt]:
    """Different prompts by id, `prompts` of each family and level as far as there are so many."""
    found: dict[str, Prompt] = {}
    for family in FAMILIES:
        for level in LEVELS:
            rng = Random(f"calibration {seed} {family.name} {level}")
            drawn: dict[str, Prompt] = {}
            for _ in range(50 * prompts):
                task = family.make(rng, level)
                prompt = make_prompt(
                    task.question,
                    reference=task.reference,
                    domain=family.name,
                    metadata={"level": level, "verifier": task.verifier},
                )
                if prompt.prompt_id not in found:
                    drawn.setdefault(prompt.prompt_id, prompt)
                if len(drawn) == prompts:
                    break
            found |= drawn
    return found


async def judge(
    prompts: list[Prompt], settings: PruneSettings
) -> tuple[list[Verdict], list[Verdict]]:
    """Verdicts from an adaptive pass and from fresh answers."""
    model = critic_model(settings.critic.model, settings.critic.max_length)
    async with critic_opener(settings, Path.cwd() / "judge-calibration")() as critic:
        passes = []
        for adaptive, samples in ((True, JUDGED), (False, FRESH)):
            asked = JudgeSettings(adaptive=adaptive, max_samples=samples, max_tokens=MAX_TOKENS)
            judging = CriticJudge(
                critic.generator,
                critic.scorer,
                model.chat.encode,
                asked,
                critic=model.fingerprint,
                template=model.chat.template_hash,
            )
            passes.append(await judging.judge(prompts, on_verdict=lambda _: None))
    return passes[0], passes[1]


def report(prompts: list[Prompt], judged: list[Verdict], fresh: list[Verdict]) -> dict[str, Any]:
    families: dict[str, Any] = {}
    for name in [family.name for family in FAMILIES]:
        means = [
            np.mean(
                [
                    v.posterior[0] / sum(v.posterior)
                    for p, v in zip(prompts, judged, strict=True)
                    if p.domain == name and p.metadata["level"] == level
                ]
            )
            for level in LEVELS
        ]
        families[name] = {
            "mean_by_level": [round(float(m), 3) for m in means],
            "spearman": round(spearman(np.array(LEVELS), np.array(means)), 3),
        }
    covered: dict[str, list[bool]] = {"all": [], "never right": [], "always right": []}
    for verdict, after in zip(judged, fresh, strict=True):
        low, high = predictive_interval(*verdict.posterior, after.num_samples)
        holds = low <= after.num_correct <= high
        covered["all"].append(holds)
        if verdict.num_correct == 0:
            covered["never right"].append(holds)
        if verdict.num_correct == verdict.num_samples:
            covered["always right"].append(holds)
    return {
        "prompts": len(prompts),
        "judged_samples": sum(v.num_samples for v in judged),
        "families": families,
        "coverage": {
            name: {"share": round(float(np.mean(hits)), 4), "of": len(hits)}
            for name, hits in covered.items()
            if hits
        },
    }


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation; ties do not occur among means of this many prompts."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    prompts = list(tasks(arguments.prompts, arguments.seed).values())
    settings = PruneSettings.model_validate(
        {
            "source": {"path": "none"},
            "critic": {"model": arguments.model, "max_length": MAX_LENGTH},
            "judge": {"max_tokens": MAX_TOKENS},
        }
    )
    result = report(prompts, *asyncio.run(judge(prompts, settings)))
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result['prompts']} prompts, judged with {result['judged_samples']} answers")
    for name, found in result["families"].items():
        means = " ".join(f"{m:.3f}" for m in found["mean_by_level"])
        print(f"  {name:16} levels 1 to 5: {means}   Spearman {found['spearman']:+.2f}")
    for name, found in result["coverage"].items():
        print(f"  95% intervals hold {found['share']:.1%} of {found['of']} prompts ({name})")


if __name__ == "__main__":
    main()
