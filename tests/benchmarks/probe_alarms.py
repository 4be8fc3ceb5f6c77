"""How often the probe of a bf16 engine would alarm under a sound policy, by what it compares.

    python tests/benchmarks/probe_alarms.py RUN

RUN has been through SFT and RL. The first probe has answers of SFT's policy; a later one compares,
under RL's policy, the same answers or its own. fp32 and bf16 forward passes of transformers stand
for learner and engine. Sets of answers are drawn anew many times.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from posttrain.data.chat import ChatFormat
from posttrain.starter.tasks import starter_prompts
from posttrain.workers.probe import compare_logprobs

PROMPTS, DRAWS, MAX_TOKENS = 256, 2000, 96
Answers = list[tuple[int, Any]]
"""Prompt length and token ids `[1, T]` of each."""


def load(policy: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(policy, dtype=dtype)


def answers(model: Any, prompts: list[Any], pad: int) -> Answers:
    found = []
    for ids in prompts:
        prompt = torch.tensor([list(ids)])
        sampled = model.generate(
            prompt, do_sample=True, top_k=0, max_new_tokens=MAX_TOKENS, pad_token_id=pad
        )
        found.append((len(ids), sampled))
    return found


@torch.no_grad()
def logprobs(model: Any, found: Answers) -> list[Any]:
    result = []
    for start, ids in found:
        predicted = model(ids).logits[0, :-1].float().log_softmax(-1)
        result.append(predicted.gather(1, ids[0, 1:, None])[start - 1 :, 0].numpy())
    return result


def main(run: Path) -> None:
    torch.manual_seed(0)
    chat = ChatFormat(str(run / "sft" / "policy"))
    prompts = [chat.encode(p, None) for p in starter_prompts("held_out", PROMPTS, seed=0)]
    models = {
        stage: [load(run / stage / "policy", d) for d in (torch.float32, torch.bfloat16)]
        for stage in ("sft", "rl")
    }
    own = {s: answers(m[0], prompts, chat.pad_token_id) for s, m in models.items()}
    scores = {
        (by, of): [logprobs(model, own[of]) for model in models[by]]
        for by, of in (("sft", "sft"), ("rl", "sft"), ("rl", "rl"))
    }
    rng = np.random.default_rng(0)

    def probe(key: tuple[str, str], chosen: Any) -> dict[str, float]:
        learner, engine = scores[key]
        return compare_logprobs([learner[i] for i in chosen], [[engine[i] for i in chosen]])

    for key in (("rl", "sft"), ("rl", "rl")):
        for size in (16, 64):
            ratios: dict[str, list[float]] = {}
            for _ in range(DRAWS):
                chosen = rng.choice(PROMPTS, size, replace=False)
                later = chosen if key[1] == "sft" else rng.choice(PROMPTS, size, replace=False)
                first = probe(("sft", "sft"), chosen)
                for name, value in probe(key, later).items():
                    ratios.setdefault(name, []).append(value / first[name])
            print(f"{size} answers of {key[1]} under {key[0]}:", end="")
            for name, values in ratios.items():
                above = [f"{np.mean(np.array(values) > bound):.4f}" for bound in (3, 4)]
                print(f"  {name} above 3, 4 times the first {', '.join(above)}", end="")
            print(flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
