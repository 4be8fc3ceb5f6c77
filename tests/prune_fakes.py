"""A critic without an engine: how often it is right stands in the question, and its answers follow
from their seeds. As a script, it prunes in processes that can be killed."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from posttrain.data.chat import ChatFormat
from posttrain.prune.critic import Critic, CriticModel
from posttrain.prune.run import prune
from posttrain.prune.settings import PruneSettings
from posttrain.types import Outcome, PolicyVersion, Reward, Rollout, VersionSpan
from rewards.scorer import score_rollouts
from rewards.shaping import RewardSettings

LOGGED_BYTES = 17
"""A task's id and a line's end."""

BROKEN = RuntimeError("the engine died")


def question(name: int, rate: float) -> str:
    """The starter's tokenizer knows these characters."""
    return f"{name}:{round(rate * 100)}?"


class FakeEngine:
    """Answers `#1` as often as the question says, each answer decided by its seed."""

    def __init__(
        self,
        chat: ChatFormat,
        fail_after: int | None = None,
        delay_s: float = 0.0,
        log: Path | None = None,
    ) -> None:
        self.requests: Counter[str] = Counter()
        self.samples = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.poison: set[str] = set()
        self.prompts: list[str] = []
        self.scored: list[list[tuple[int, ...]]] = []
        self._chat = chat
        self._fail_after = fail_after
        self._delay_s = delay_s
        self._log = log

    async def generate(self, request):
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(self._delay_s)
        self.in_flight -= 1
        if self._fail_after is not None and self.samples >= self._fail_after:
            raise BROKEN
        text = self._chat.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=True)
        self.prompts.append(text)
        task_id = request.request_id.split("-")[1]
        self.requests[task_id] += 1
        if self._log is not None:
            with self._log.open("a") as log:
                log.write(f"{task_id}\n")
        self.samples += request.num_rollouts
        rate = int(text.split(":")[1].split("?")[0]) / 100
        seed = request.sampling.seed
        if seed is None:
            seed = random.getrandbits(31)
        return tuple(
            self._rollout(request, i, "#1" if chance(seed + i) < rate else "#0")
            for i in range(request.num_rollouts)
        )

    def _rollout(self, request, index, text):
        return Rollout(
            rollout_id=f"{request.request_id}/{index}",
            draw_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            completion_token_ids=(5, 6, 7),
            rollout_logprobs=(0.0, 0.0, 0.0),
            text=text,
            finish_reason="stop",
            version_spans=(VersionSpan(0, 3, PolicyVersion(0, 0)),),
        )

    async def score(self, prompt, rollouts, system):
        if prompt.messages[-1].content in self.poison:
            return (unscored("no sandbox"),) * len(rollouts)
        return score_rollouts(prompt, rollouts, system, RewardSettings())


def unscored(why: str) -> Reward:
    return Reward(value=None, correctness=None, outcome=Outcome.INFRASTRUCTURE, explanation=why)


def chance(seed: int) -> float:
    digest = hashlib.sha256(str(seed).encode()).digest()
    return int.from_bytes(digest[:4]) / 2**32


class FakeCritics:
    """Opens a critic around an engine and counts how often that was needed."""

    def __init__(self, engine: FakeEngine, score_tokens: Any = None) -> None:
        self.engine = engine
        self.opened = 0
        self._score_tokens = score_tokens

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Critic]:
        self.opened += 1
        yield Critic(generator=self.engine, scorer=self.engine, score_tokens=self._score_tokens)


def model_of(policy: Path, fingerprint: str = "f00d" * 16) -> CriticModel:
    return CriticModel(name=str(policy), fingerprint=fingerprint, chat=ChatFormat(str(policy)))


def killed_again_and_again(settings: PruneSettings, out: Path, policy: Path, log: Path) -> None:
    """One line on stdin is one attempt, killed by SIGKILL after `NUMBER` more requests or once it
    is `writing`; an empty one lives as long as it needs. Answers each with its exit status.

    Attempts are forks, because imports cost more than they do.
    """
    import pandas  # noqa: F401 (pyarrow wants it; each attempt would import it anew)
    import pyarrow.parquet  # noqa: F401

    model = model_of(policy)
    for line in sys.stdin:
        until = _reached(line.strip(), out, log)
        child = os.fork()
        if child == 0:
            prune(settings, out, model, FakeCritics(FakeEngine(model.chat, delay_s=0.01, log=log)))
            os._exit(0)
        ended = (0, 0)
        while until is not None and not until() and not ended[0]:
            time.sleep(0.001)
            ended = os.waitpid(child, os.WNOHANG)
        if not ended[0]:
            if until is not None:
                time.sleep(random.uniform(0, 0.03))
                os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(ended[1]), flush=True)


def _reached(moment: str, out: Path, log: Path) -> Callable[[], bool] | None:
    if not moment:
        return None
    if moment == "writing":
        return (out / ".data.partial").exists
    target = _size(log) + int(moment) * LOGGED_BYTES
    return lambda: _size(log) >= target


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


if __name__ == "__main__":
    content, *paths = sys.argv[1:]
    killed_again_and_again(PruneSettings.model_validate_json(content), *map(Path, paths))
