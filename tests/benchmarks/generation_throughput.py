"""Tokens a second through our pool against bare `LLM.generate`, in one run.

    python tests/benchmarks/generation_throughput.py [rounds]

The starter policy answers its own tasks' prompts, eight completions each, with the same sampling
parameters and log-probabilities on both sides, one thread each. Bare vLLM runs in a process of its
own with the engine inside it, which is its fastest way on CPU. The two take turns round by round,
so that whatever else the machine does falls on both; a first round of each is thrown away. Twice:
as they are (about 10 tokens an answer), and under «Show steps.» (about 20, as RL comes to write).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import sys
import time
from typing import Any

from posttrain.data.chat import ChatFormat
from posttrain.inputs import STARTER_POLICY
from posttrain.starter.instructions import STEPS
from posttrain.starter.tasks import starter_prompts
from posttrain.types import GenerationRequest, PolicyVersion, Sampling
from posttrain.workers.cluster import connect, disconnect
from posttrain.workers.engine import engine_environment
from posttrain.workers.generator import GeneratorPool
from posttrain.workers.heap import freeze_heap
from posttrain.workers.settings import ActorResources, EngineSettings

NUM_PROMPTS, NUM_ROLLOUTS, MAX_TOKENS = 256, 8, 96
ENGINE = EngineSettings(max_model_len=192)


def bare(connection: Any) -> None:
    """Answers each list of prompts with (tokens, seconds)."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(STARTER_POLICY),
        dtype=ENGINE.dtype,
        max_model_len=ENGINE.max_model_len,
        max_num_seqs=ENGINE.max_num_seqs,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        enforce_eager=True,
        block_size=32,  # as our engines have it on CPU: with vLLM's own 128 it would be slower
        disable_log_stats=True,
    )
    parameters = SamplingParams(
        n=NUM_ROLLOUTS,
        max_tokens=MAX_TOKENS,
        temperature=1.0,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
    )
    connection.send("ready")
    while prompts := connection.recv():
        began = time.perf_counter()
        outputs = llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts], parameters, use_tqdm=False
        )
        seconds = time.perf_counter() - began
        connection.send((sum(len(c.token_ids) for o in outputs for c in o.outputs), seconds))


async def pooled(
    pool: GeneratorPool, prompts: list[tuple[int, ...]], label: str
) -> tuple[int, float]:
    sampling = Sampling(max_tokens=MAX_TOKENS)
    began = time.perf_counter()
    groups = await asyncio.gather(
        *(
            pool.generate(
                GenerationRequest(
                    request_id=f"{label}-{index}",
                    prompt_token_ids=ids,
                    num_rollouts=NUM_ROLLOUTS,
                    sampling=sampling,
                )
            )
            for index, ids in enumerate(prompts)
        )
    )
    seconds = time.perf_counter() - began
    return sum(len(r.completion_token_ids) for group in groups for r in group), seconds


async def compare(workloads: dict[str, list[tuple[int, ...]]], rounds: int) -> None:
    pool = await GeneratorPool.start(
        str(STARTER_POLICY),
        PolicyVersion(0, 0),
        ENGINE,
        replicas=1,
        resources=ActorResources(),
        deadline_s=300,
    )
    freeze_heap()  # as Pools does
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=bare, args=(theirs,), daemon=True)
    process.start()
    assert ours.recv() == "ready"
    for name, prompts in workloads.items():
        speeds: dict[str, list[float]] = {"pool": [], "bare": []}
        for index in range(rounds + 1):
            tokens, seconds = await pooled(pool, prompts, f"{name}-{index}")
            ours.send(prompts)
            bare_tokens, bare_seconds = ours.recv()
            if index:
                speeds["pool"].append(tokens / seconds)
                speeds["bare"].append(bare_tokens / bare_seconds)
        ratios = [a / b for a, b in zip(speeds["pool"], speeds["bare"], strict=True)]
        length = tokens / NUM_PROMPTS / NUM_ROLLOUTS
        print(
            f"{name}: {length:.0f} tokens an answer; median of {rounds}: "
            f"pool {statistics.median(speeds['pool']):.0f}, "
            f"bare {statistics.median(speeds['bare']):.0f} tokens/s, "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )
    ours.send(None)
    process.join()
    pool.stop()


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    os.environ.update(engine_environment(ENGINE))  # bare vLLM's process inherits it
    chat = ChatFormat(str(STARTER_POLICY))
    tasks = starter_prompts("held_out", NUM_PROMPTS, seed=0)
    workloads = {
        "plain": [chat.encode(prompt, None) for prompt in tasks],
        "steps": [chat.encode(prompt, STEPS) for prompt in tasks],
    }
    connect()
    asyncio.run(compare(workloads, rounds))
    disconnect()


if __name__ == "__main__":
    main()
