"""What a run does about a reward actor that is alive and answers nothing. Those that work stand in
test_workers_cluster.py."""

import asyncio
from types import SimpleNamespace

import pytest
from online_fakes import make_rollout

from posttrain.data.prompts import make_prompt
from posttrain.errors import EngineError
from posttrain.types import PolicyVersion
from posttrain.workers import scoring
from posttrain.workers.scoring import RewardWorkers
from rewards.judged import JudgedSettings
from rewards.pool import longest_s
from rewards.reward_model import RewardModelSettings
from rewards.shaping import RewardSettings

PROMPT = make_prompt("?", reference="1", domain="toy")


@pytest.fixture
def workers(monkeypatch):
    """An answer comes as many seconds after the question as the question has `rollouts` tenths."""
    monkeypatch.setattr(scoring, "longest_s", lambda *_: 0.5)

    async def score(prompt, rollouts, system):
        assert {rollout.rollout_logprobs for rollout in rollouts} == {()}  # nobody reads them
        await asyncio.sleep(len(rollouts) / 10)
        return tuple(rollout.text for rollout in rollouts)

    actor = SimpleNamespace(score=SimpleNamespace(remote=score))
    return RewardWorkers(actor, RewardSettings())


def answers(texts):
    return [make_rollout("d", i, text, PolicyVersion(1, 0)) for i, text in enumerate(texts)]


async def test_a_reward_actor_that_answers_nothing_ends_the_run(workers):
    with pytest.raises(EngineError, match=r"scored nothing for 0\.5 s.*it is stuck"):
        async with asyncio.timeout(10):
            await workers.score(PROMPT, answers("1" * 6000), None)


async def test_a_group_waits_for_others_as_long_as_they_are_answered(workers):
    """Those that were given up meanwhile are among what the actor works on."""
    last = asyncio.create_task(workers.score(PROMPT, answers("abcdefghi"), None))
    given_up = asyncio.create_task(workers.score(PROMPT, answers("abcde"), None))
    await asyncio.sleep(0.1)
    given_up.cancel()
    assert await workers.score(PROMPT, answers("ab"), None) == ("a", "b")
    assert await last == tuple("abcdefghi")


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        ({}, 4 * 8 * 3 * 10),
        ({"added": {"toy": {"maths": 0.5}}, "deadlines_s": {"maths": 5}}, 4 * 8 * 3 * 15),
        # Two rounds of four questions, after those that are under way, three attempts each.
        (
            {"added": {"toy": {"judge": 0.5}}, "judge": JudgedSettings(model="m", concurrency=4)},
            3 * (3 * 60 + 1.5) + 4 * 8 * 3 * 10,
        ),
        (
            {"default_verifier": "reward_model", "reward_model": RewardModelSettings(model="m")},
            2 * (600 + RewardModelSettings(model="m").deadline_s) + 4 * 8 * 3 * 10,
        ),
    ],
)
def test_how_long_a_group_may_take_adds_up_from_the_deadlines(settings, seconds):
    assert longest_s(PROMPT, 8, RewardSettings(**settings)) == pytest.approx(60 + seconds)
