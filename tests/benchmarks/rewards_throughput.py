"""Answers a second through the pool of scorer processes, by verifier, and beside some that hang.

    python tests/benchmarks/rewards_throughput.py

Groups of eight, one worker. CPU time is that of everything that takes part; it is the same on a
busy machine, the wall-clock is not. Programs in the sandbox: see sandbox_throughput.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import reasoning_gym

from posttrain.data.prompts import make_prompt
from posttrain.inputs import STARTER_POLICY
from posttrain.starter.tasks import starter_prompts
from posttrain.types import PolicyVersion, Prompt, Rollout, VersionSpan
from rewards.pool import ScorerPool
from rewards.reward_model import RewardModelSettings
from rewards.shaping import RewardSettings

GROUPS = 125
GROUP_SIZE = 8
HANGING = 10
DEADLINE_S = 5.0


def cpu_seconds(pid: int) -> float:
    """Of a process, of those that it has waited for, and of its living children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    lists = Path(f"/proc/{pid}/task").glob("*/children")  # each thread has its own
    children = [int(child) for path in lists for child in path.read_text().split()]
    return own + sum(map(cpu_seconds, children))


def rollout(text: str) -> Rollout:
    return Rollout(
        rollout_id="r",
        draw_id="d",
        prompt_token_ids=(1,),
        completion_token_ids=(7,),
        rollout_logprobs=(-0.5,),
        text=text,
        finish_reason="stop",
        version_spans=(VersionSpan(0, 1, PolicyVersion(0, 0)),),
    )


def tasks(verifier: str) -> list[tuple[Prompt, str]]:
    """Prompts, each with a right answer; no two alike, since libraries cache."""
    if verifier == "exact":
        found = [(str(n), f"so it is #{n}") for n in range(GROUPS)]
    elif verifier == "maths":
        found = [
            (rf"\\frac{{{n}}}{{7}} + x", rf"\boxed{{x + \frac{{{2 * n}}}{{14}}}}")
            for n in range(1, GROUPS + 1)
        ]
        found = [(gold.replace("\\\\", "\\"), text) for gold, text in found]
    else:
        entries = reasoning_gym.create_dataset("countdown", size=GROUPS, seed=1)
        references = [
            {"family": "countdown", "entry": json.loads(json.dumps(dict(entry), default=str))}
            for entry in entries
        ]
        return [
            (_prompt(i, reference, verifier), f"<answer>{reference['entry']['answer']}</answer>")
            for i, reference in enumerate(references)
        ]
    return [(_prompt(i, gold, verifier), text) for i, (gold, text) in enumerate(found)]


def _prompt(number: int, reference: object, verifier: str) -> Prompt:
    return make_prompt(
        f"task {number}", reference=reference, domain="d", metadata={"verifier": verifier}
    )


def hang(prompt: Prompt, text: str) -> float:
    """A verifier of one's own that never ends, busy in C code."""
    if text == "hang":
        pow(9, 9**9)
    return 1.0


async def seconds(pool: ScorerPool, work: list[tuple[Prompt, str]]) -> float:
    started = time.perf_counter()
    groups = await asyncio.gather(
        *(pool.score(prompt, [rollout(text)] * GROUP_SIZE, None) for prompt, text in work)
    )
    took = time.perf_counter() - started
    wrong = [reward for rewards in groups for reward in rewards if not reward.correct]
    assert not wrong, wrong[0]
    return took


async def by_verifier() -> None:
    for verifier in ("exact", "maths", "reasoning_gym"):
        work = tasks(verifier)
        with ScorerPool(1, RewardSettings()) as pool:
            await pool.score(work[0][0], [rollout(work[0][1])], None)  # imports
            cpu = cpu_seconds(os.getpid())
            took = await seconds(pool, work)
            cpu = cpu_seconds(os.getpid()) - cpu
        count = GROUPS * GROUP_SIZE
        print(f"{verifier:16}{count / took:8.0f} a second{1e3 * cpu / count:8.2f} ms CPU each")


async def beside_hanging() -> None:
    settings = RewardSettings(
        default_verifier="own",
        custom={"own": f"{Path(__file__).stem}:hang"},
        deadlines_s={"own": DEADLINE_S},
    )
    work = [(make_prompt(f"{n}", reference=None, domain="d"), "good") for n in range(GROUPS)]
    for num_hanging in (0, HANGING):
        with ScorerPool(1, settings, spares=HANGING) as pool:
            await pool.score(work[0][0], [rollout("good")], None)
            stuck = [
                asyncio.create_task(pool.score(work[0][0], [rollout("hang")], None))
                for _ in range(num_hanging)
            ]
            await asyncio.sleep(0)
            took = await seconds(pool, work)
            await asyncio.gather(*stuck)
        print(f"{GROUPS * GROUP_SIZE} good answers behind {num_hanging:2} that hang: {took:6.2f} s")


async def reward_model() -> None:
    """The starter with a fresh scalar head, in the pool's process for it."""
    from transformers import AutoModelForSequenceClassification

    tasks = starter_prompts("held_out", GROUPS, seed=0)
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(STARTER_POLICY, directory, dirs_exist_ok=True)
        net = AutoModelForSequenceClassification.from_pretrained(STARTER_POLICY, num_labels=1)
        net.save_pretrained(directory)
        settings = RewardSettings(
            default_verifier="reward_model",
            verifiers={task.domain: "reward_model" for task in tasks},
            reward_model=RewardModelSettings(model=directory, batch_size=32),
        )
        answers = [rollout(f"1+1=2,2+2=4#{n}") for n in range(GROUP_SIZE)]
        with ScorerPool(1, settings) as pool:
            await pool.score(tasks[0], answers, None)  # loads it
            started = time.perf_counter()
            await asyncio.gather(*(pool.score(task, answers, None) for task in tasks))
            took = time.perf_counter() - started
    print(f"reward_model    {GROUPS * GROUP_SIZE / took:8.0f} a second, 1.5 million parameters")


if __name__ == "__main__":
    asyncio.run(by_verifier())
    asyncio.run(reward_model())
    asyncio.run(beside_hanging())
