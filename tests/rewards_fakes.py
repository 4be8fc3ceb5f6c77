"""A verifier that misbehaves on command. Imported by scorer processes, so it imports little."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

from posttrain.data.prompts import make_prompt
from posttrain.types import Outcome, PolicyVersion, Prompt, Reward, Rollout, VersionSpan
from rewards.pool import ScorerPool
from rewards.score import Score, failed, right
from rewards.shaping import RewardSettings

TASK = make_prompt("1+1?", reference="2", domain="sums")


def acting_settings(deadline_s: float) -> RewardSettings:
    return RewardSettings(default_verifier="acting", deadlines_s={"acting": deadline_s})


def hang() -> None:
    """In C, holding the interpreter lock: only a kill from outside ends it."""
    pow(9, 9**9)


def acting(prompt: Prompt, text: str) -> Score:
    """A verifier that does what the answer says."""
    command, _, argument = text.partition(" ")
    match command:
        case "hang":
            hang()
        case "sleep":
            time.sleep(float(argument))
        case "nice":
            return failed(Outcome.WRONG, str(os.nice(0)))
        case "sleep-and-nice":
            time.sleep(float(argument))
            return failed(Outcome.WRONG, str(os.nice(0)))
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "wait-to-be-killed-once":
            if not Path(argument).exists():
                Path(argument).write_text(str(os.getpid()))
                time.sleep(60)
        case "note-and-hang":
            Path(argument).write_text(str(os.getpid()))
            hang()
        case "session":
            return failed(Outcome.WRONG, str(os.getsid(0)))
        case "pid":
            return failed(Outcome.WRONG, str(os.getpid()))
        case "environment":
            loaded = "torch" in sys.modules
            return failed(Outcome.WRONG, f"{os.environ['OMP_NUM_THREADS']} {loaded}")
        case "devour":
            bytearray(64 << 30)
        case "print":
            print("to stdout")
    return right()


def rollout(text: str, num_tokens: int = 5, finish_reason: str = "stop") -> Rollout:
    return Rollout(
        rollout_id="r",
        draw_id="d",
        prompt_token_ids=(1, 2),
        completion_token_ids=(7,) * num_tokens,
        rollout_logprobs=(-0.5,) * num_tokens,
        text=text,
        finish_reason=finish_reason,
        version_spans=(VersionSpan(0, num_tokens, PolicyVersion(0, 0)),),
    )


def acting_pool(
    num_workers: int = 1,
    deadline_s: float = 20.0,
    *,
    spares: int = 8,
    patience_s: float = 0.5,
    answers_per_worker: int = 20_000,
) -> ScorerPool:
    return ScorerPool(
        num_workers,
        acting_settings(deadline_s),
        spares=spares,
        patience_s=patience_s,
        answers_per_worker=answers_per_worker,
        verifiers={"acting": acting},
    )


def score(pool: ScorerPool, *texts: str, prompt: Prompt = TASK) -> tuple[Reward, ...]:
    return asyncio.run(pool.score(prompt, [rollout(text) for text in texts], None))


def hang_in_a_pool(note: str) -> None:
    """Never returns."""
    with acting_pool(deadline_s=300) as pool:
        score(pool, f"note-and-hang {note}")
