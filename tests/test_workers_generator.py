"""The pool's own logic: who gets a request, what becomes of it, what is loaded before serving.

Replicas are fakes here; real engines that are killed stand in test_workers_generator_survival.py.
"""

import asyncio
from dataclasses import dataclass, field

import pytest
from engine_models import request

from posttrain.errors import EngineError, MismatchError, ModelError
from posttrain.types import PolicyVersion
from posttrain.workers.agreement import ModelFacts
from posttrain.workers.generator import GeneratorPool
from posttrain.workers.replica import EngineLost
from posttrain.workers.settings import EngineSettings


@dataclass
class Weights:
    """Published weights of one step, in fp32."""

    step: int
    retired: bool = False
    fingerprint: dict = field(default_factory=lambda: {"w": "float32 [1] 0"})

    @property
    def version(self):
        return PolicyVersion(1, self.step)

    def retire(self):
        self.retired = True


class Answer(str):
    """In place of a rollout."""

    completion_token_ids = (1, 2)


class FakeReplica:
    """Answers a request when the test says so; is lost when the test says so."""

    def __init__(self, name="generator 0"):
        self.name = name
        self.outstanding = 0
        self.serving = True
        self.version = PolicyVersion(1, 0)
        self.facts = ModelFacts(vocab_size=10, tokenizer="a")
        self.asked = []  # (request id, version it was asked at)
        self.loaded = []
        self.scored = []
        self.dies_scoring = False
        self.restarts = 0
        self.restart_error = None
        self.load_error = None
        self.may_restart = asyncio.Event()
        self.may_load = asyncio.Event()
        self.may_load.set()
        self._open = {}

    async def generate(self, asked):
        assert self.serving
        self.asked.append((asked.request_id, self.version))
        answer = self._open[asked.request_id] = asyncio.get_running_loop().create_future()
        self.outstanding += asked.num_rollouts
        try:
            return await answer
        finally:
            self.outstanding -= asked.num_rollouts

    def answer(self, request_id, text):
        self._open.pop(request_id).set_result((Answer(text),))

    def lose(self):
        self.serving = False
        for answer in self._open.values():
            answer.set_exception(EngineLost(f"{self.name} died"))
        self._open.clear()

    async def restart(self):
        if self.restart_error:
            raise self.restart_error
        if not self.serving:
            await self.may_restart.wait()
            self.restarts += 1
            self.version = PolicyVersion(1, 0)

    async def load(self, weights):
        await self.may_load.wait()
        if self.load_error:
            raise self.load_error
        self.loaded.append(weights.step)
        self.version = weights.version
        return {"pause_s": 0.5 * len(self.loaded), "reprefilled_tokens": 10.0}

    def serve(self):
        self.serving = True

    async def score_tokens(self, sequences, label):
        if not self.serving:
            raise EngineLost("gone")
        self.scored.append(label)
        if self.dies_scoring:
            self.lose()
            raise EngineLost("died")
        return [[-1.0] * (len(s) - 1) for s in sequences]


def pool_of(*replicas, max_restarts=2):
    return GeneratorPool(replicas, EngineSettings(max_restarts=max_restarts))


def ask(pool, request_id, num_rollouts=1):
    asked = request(request_id, "the", num_rollouts=num_rollouts, max_tokens=8)
    return asyncio.create_task(pool.generate(asked))


async def settled():
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_request_goes_to_the_engine_with_least_to_do():
    first, second = FakeReplica("0"), FakeReplica("1")
    pool = pool_of(first, second)
    tasks = [ask(pool, name, n) for name, n in [("a", 4), ("b", 1), ("c", 1), ("d", 1)]]
    await settled()
    assert [name for name, _ in first.asked] == ["a"]
    assert [name for name, _ in second.asked] == ["b", "c", "d"]  # 3 are still fewer than 4
    first.answer("a", "done")
    await settled()
    tasks.append(ask(pool, "e"))
    await settled()
    assert [name for name, _ in first.asked] == ["a", "e"]  # as soon as one ends
    first.answer("e", "e")
    for name in "bcd":
        second.answer(name, name)
    assert [(await task)[0] for task in tasks] == ["done", "b", "c", "d", "e"]
    assert pool.tokens == 5 * 2


async def test_open_requests_of_a_lost_engine_are_asked_once_more_elsewhere():
    first, second = FakeReplica("0"), FakeReplica("1")
    pool = pool_of(first, second)
    tasks = [ask(pool, name, 1) for name in "abcd"]
    await settled()
    assert [name for name, _ in first.asked] == ["a", "c"]
    first.lose()
    await settled()
    assert [name for name, _ in second.asked] == ["b", "d", "a", "c"]  # each once, as before
    for name in "abcd":
        second.answer(name, f"{name} from 1")
    assert [(await task)[0] for task in tasks] == [f"{name} from 1" for name in "abcd"]
    assert first.restarts == 0  # nobody waited for it
    first.may_restart.set()
    await settled()
    assert (first.restarts, first.serving) == (1, True)


async def test_without_another_engine_a_request_waits_for_the_next_with_the_newest_weights():
    replica = FakeReplica()
    pool = pool_of(replica)
    await pool.update_weights(Weights(3))
    task = ask(pool, "a")
    await settled()
    replica.lose()
    late = ask(pool, "b")
    await settled()
    replica.may_restart.set()
    await settled()
    assert replica.loaded == [3, 3]
    assert replica.asked[1:] == [("a", PolicyVersion(1, 3)), ("b", PolicyVersion(1, 3))]
    replica.answer("a", "a")
    replica.answer("b", "b")
    assert (await task, await late) == (("a",), ("b",))


async def test_a_request_that_loses_every_engine_is_given_up():
    replica = FakeReplica()
    replica.may_restart.set()
    pool = pool_of(replica, max_restarts=2)
    task = ask(pool, "poison")
    for _ in range(3):
        await settled()
        replica.lose()
    with pytest.raises(
        EngineError, match=r"request poison was given to 3 engines .* each was lost"
    ):
        await task
    assert [name for name, _ in replica.asked] == ["poison"] * 3


async def test_weights_are_kept_until_the_next_are_confirmed():
    replica = FakeReplica()
    pool = pool_of(replica)
    one, two = Weights(1), Weights(2)
    report = await pool.update_weights(one)
    assert (report.pause_s, report.reprefilled_tokens, report.replaced_engines) == (0.5, 10.0, 0)
    replica.may_load.clear()
    update = asyncio.create_task(pool.update_weights(two))
    await settled()
    assert not one.retired
    replica.may_load.set()
    await update
    assert (one.retired, two.retired) == (True, False)


async def test_an_update_is_done_without_the_engine_that_it_loses():
    good, bad = FakeReplica("0"), FakeReplica("1")
    pool = pool_of(good, bad)

    async def dies(weights):
        bad.lose()
        raise EngineLost("1 died")

    bad.load, whole_load = dies, bad.load
    report = await pool.update_weights(Weights(1))
    assert (good.loaded, report.pause_s) == ([1], 0.5)
    bad.load = whole_load
    await pool.update_weights(Weights(2))  # it is still away
    bad.may_restart.set()
    await settled()
    assert (bad.loaded, bad.serving) == ([2], True)
    assert (await pool.update_weights(Weights(3))).replaced_engines == 1


async def test_an_engine_that_comes_back_during_an_update_catches_up_before_it_serves():
    good, lost = FakeReplica("0"), FakeReplica("1")
    pool = pool_of(good, lost)
    await pool.update_weights(Weights(1))
    lost.lose()
    lost.may_restart.set()
    lost.may_load.clear()
    task = ask(pool, "a")
    await settled()
    await pool.update_weights(Weights(2))  # while the other one is loading the first
    lost.may_load.set()
    await settled()
    assert (lost.loaded, lost.serving) == ([1, 1, 2], True)
    good.answer("a", "a")
    assert await task == ("a",)


async def test_an_engine_that_cannot_be_replaced_ends_the_run_at_the_next_publish():
    good, bad = FakeReplica("0"), FakeReplica("1")
    pool = pool_of(good, bad)
    bad.restart_error = EngineError("1 failed 3 times")
    bad.lose()
    task = ask(pool, "a")
    await settled()
    good.answer("a", "a")
    assert await task == ("a",)  # what the others can do is done
    with pytest.raises(EngineError, match="1 failed 3 times"):
        await pool.update_weights(Weights(1))


async def test_without_any_engine_left_whoever_waits_learns_why():
    replica = FakeReplica()
    replica.restart_error = EngineError("0 failed 3 times")
    pool = pool_of(replica)
    replica.lose()
    for waiting in (ask(pool, "a"), asyncio.create_task(pool.update_weights(Weights(1)))):
        with pytest.raises(EngineError, match="0 failed 3 times"):
            await waiting


async def test_weights_that_arrive_differently_end_the_run():
    replica = FakeReplica()
    pool = pool_of(replica)
    await pool.update_weights(good := Weights(1))
    replica.load_error = MismatchError("3 of 9 tensors")
    with pytest.raises(MismatchError, match="3 of 9 tensors"):
        await pool.update_weights(bad := Weights(2))
    assert (good.retired, bad.retired) == (False, True)  # what the engine holds is kept


async def test_only_engines_that_serve_are_compared():
    good, lost = FakeReplica("0"), FakeReplica("1")
    pool = pool_of(good, lost)
    assert await pool.score_tokens([[1, 2, 3]], "x") == [[[-1.0, -1.0]]] * 2
    lost.lose()
    assert await pool.score_tokens([[1, 2, 3]], "y") == [[[-1.0, -1.0]]]


async def test_fixed_tokens_that_lose_every_engine_are_given_up():
    replicas = [FakeReplica("0"), FakeReplica("1")]
    for replica in replicas:
        replica.dies_scoring = True
        replica.may_restart.set()
    with pytest.raises(
        EngineError, match=r"probe-1\.3 was given to all engines 3 times .*max_restarts"
    ):
        async with asyncio.timeout(10):
            await pool_of(*replicas, max_restarts=2).score_tokens([[1, 2, 3]], "probe-1.3")
    assert sum(len(replica.scored) for replica in replicas) >= 3


async def test_tokens_are_scored_once_by_the_engine_with_least_to_do_or_by_the_next():
    busy, dying, idle = FakeReplica("0"), FakeReplica("1"), FakeReplica("2")
    pool = pool_of(busy, dying, idle)
    busy.outstanding, idle.outstanding, dying.dies_scoring = 4, 1, True
    assert await pool.score_tokens_once([[1, 2, 3]], "x") == [[-1.0, -1.0]]
    assert (busy.scored, dying.scored, idle.scored) == ([], ["x"], ["x"])


async def test_weights_that_do_not_suit_the_engines_are_never_sent():
    replica = FakeReplica()
    weights = Weights(1, fingerprint={"w": "bfloat16 [1] 0"})
    with pytest.raises(ModelError, match=r"publishes bfloat16 weights .* computes in float32"):
        await pool_of(replica).update_weights(weights)
    assert replica.loaded == []


def test_engines_of_another_model_are_refused():
    pool = pool_of(FakeReplica("0"), FakeReplica("1"))
    pool.check_model(ModelFacts(vocab_size=10, tokenizer="a"))
    with pytest.raises(ModelError, match="vocabulary of 11 tokens and the engine's one of 10"):
        pool.check_model(ModelFacts(vocab_size=11, tokenizer="a"))
    with pytest.raises(ModelError, match="tokenizer gives other ids"):
        pool.check_model(ModelFacts(vocab_size=10, tokenizer="b"))
