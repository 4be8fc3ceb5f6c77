"""Tokens a second of judging against bare `LLM.generate`, in one run.

    python tests/benchmarks/judging_throughput.py [rounds]

The starter judges its own tasks, eight answers each, scored by their verifiers in the scorer pool;
bare vLLM gives as many answers to the same prompts with the same sampling parameters and
log-probabilities, and nobody scores them. The two take turns, as in generation_throughput.py, whose
other side this is.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import sys
import time

from generation_throughput import ENGINE, MAX_TOKENS, NUM_PROMPTS, NUM_ROLLOUTS, bare

from judges.judge import CriticJudge, JudgeSettings
from posttrain.data.chat import ChatFormat
from posttrain.inputs import STARTER_POLICY
from posttrain.starter.tasks import starter_prompts
from posttrain.types import PolicyVersion
from posttrain.workers.cluster import connect, disconnect
from posttrain.workers.engine import engine_environment
from posttrain.workers.generator import GeneratorPool
from posttrain.workers.heap import freeze_heap
from posttrain.workers.scoring import RewardWorkers
from posttrain.workers.settings import ActorResources, RolloutPoolSettings
from rewards.shaping import RewardSettings

SETTINGS = JudgeSettings(
    adaptive=False, max_samples=NUM_ROLLOUTS, max_tokens=MAX_TOKENS, concurrency=NUM_PROMPTS
)


async def compare(rounds: int) -> None:
    chat = ChatFormat(str(STARTER_POLICY))
    tasks = starter_prompts("held_out", NUM_PROMPTS, seed=0)
    pool = await GeneratorPool.start(
        str(STARTER_POLICY),
        PolicyVersion(0, 0),
        ENGINE,
        replicas=1,
        resources=ActorResources(),
        deadline_s=300,
    )
    scorer = RewardWorkers.start(
        RewardSettings(),
        num_workers=1,
        judge=RolloutPoolSettings(),
        resources=ActorResources(cpus=0),
        deadline_s=60,
    )
    freeze_heap()  # as Pools does
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=bare, args=(theirs,), daemon=True)
    process.start()
    assert ours.recv() == "ready"
    judged, generated = [], []
    for index in range(rounds + 1):
        judge = CriticJudge(pool, scorer, chat.encode, SETTINGS, critic="starter", template="")
        began = time.perf_counter()
        await judge.judge(tasks, on_verdict=lambda verdict: None)
        speed = judge.usage.completion_tokens / (time.perf_counter() - began)
        ours.send([chat.encode(prompt, None) for prompt in tasks])
        tokens, seconds = ours.recv()
        if index:
            judged.append(speed)
            generated.append(tokens / seconds)
    ours.send(None)
    process.join()
    scorer.stop()
    pool.stop()
    ratios = [a / b for a, b in zip(judged, generated, strict=True)]
    print(
        f"median of {rounds}: judging {statistics.median(judged):.0f}, bare "
        f"{statistics.median(generated):.0f} tokens/s, ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )


def main() -> None:
    os.environ.update(engine_environment(ENGINE))  # bare vLLM's process inherits it
    connect()
    asyncio.run(compare(int(sys.argv[1]) if len(sys.argv) > 1 else 7))
    disconnect()


if __name__ == "__main__":
    main()
