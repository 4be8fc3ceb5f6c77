"""Engines that die or hang in mid-work: nobody who waits for them loses anything."""

import asyncio
import itertools
import os
import signal
import time

import pytest
from engine_models import MAX_MODEL_LEN, PROBES, TEMPERATURE, request
from engine_processes import gone, processes

from posttrain.workers.probe import compare_logprobs

pytest_plugins = ["engine_fixtures"]
pytestmark = [
    pytest.mark.engine,
    pytest.mark.parametrize("stack", ["tied"], indirect=True),
]

HANG_DEADLINE_S = 6.0


class Load:
    """Requests that never stop coming, and what became of them."""

    def __init__(self, stack, label):
        self._stack = stack
        self._label = label
        self._stopped = False
        self.answered = []
        self.since = stack.generators._weights.version

    async def _ask(self, worker):
        for index in itertools.count():
            if self._stopped:
                break
            asked = request(
                f"{self._label}-{worker}-{index}",
                "the",
                num_rollouts=8,
                max_tokens=MAX_MODEL_LEN - 8,
            )
            self.answered.append((asked, await self._stack.generators.generate(asked)))

    async def __aenter__(self):
        self._workers = [asyncio.create_task(self._ask(worker)) for worker in range(6)]
        while not self.answered:  # some are under way, of different lengths
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, kind, error, traceback):
        self._stopped = True
        await asyncio.gather(*self._workers)

    def check(self):
        """Every request was answered, once, by weights at least as new as when it was asked."""
        for asked, rollouts in self.answered:
            expected = [f"{asked.request_id}/{i}" for i in range(asked.num_rollouts)]
            assert [rollout.rollout_id for rollout in rollouts] == expected
            assert min(rollout.oldest_version for rollout in rollouts) >= self.since
        ids = [asked.request_id for asked, _ in self.answered]
        assert len(set(ids)) == len(ids)


async def goes_on(stack):
    """The engine serves what the learner holds, and takes what it publishes next."""
    learned, served = await stack.scores(PROBES)
    assert compare_logprobs(learned, [served])["mismatch_max"] < 1e-4
    rollouts = await stack.generators.generate(
        request(str(stack.next_version()), "the", num_rollouts=8, max_tokens=32)
    )
    await stack.train_on(rollouts)
    metrics = await stack.publisher().publish(stack.next_version())
    assert metrics["mismatch_max"] < 1e-4
    return metrics


@pytest.mark.slow
async def test_a_killed_engine_core_is_replaced_and_its_requests_are_answered(stack, capfd):
    before = (await stack.publisher().publish(stack.next_version()))["replaced_engines"]
    (replica,) = stack.generators._replicas
    pids = processes(replica._actor)
    async with Load(stack, "kill") as load:
        done = len(load.answered)
        os.kill(pids["VLLM::EngineCor"], signal.SIGKILL)
        assert await gone(pids.values())
    load.check()
    assert len(load.answered) > done
    metrics = await goes_on(stack)
    assert metrics["replaced_engines"] == before + 1
    assert "generator 0 died; another engine takes its place" in capfd.readouterr().err


@pytest.mark.slow
async def test_an_actor_that_is_killed_while_it_is_sent_weights_comes_back_with_them(stack):
    class Killer:
        def __init__(self):
            self.node_id = stack.learner.node_id
            self.score_tokens = stack.learner.score_tokens

        async def write_weights(self, directory):
            seconds = await stack.learner.write_weights(directory)
            (replica,) = stack.generators._replicas
            os.kill(processes(replica._actor)["actor"], signal.SIGKILL)
            return seconds

    rollouts = await stack.generators.generate(
        request("dies", "the", num_rollouts=8, max_tokens=32, temperature=TEMPERATURE)
    )
    await stack.train_on(rollouts)
    version = stack.next_version()
    async with Load(stack, "publish") as load:
        metrics = await stack.publisher(Killer()).publish(version)
        assert metrics["mismatch_max"] < 1e-4
        assert "pause_s" not in metrics
        fresh = await stack.generators.generate(
            request("fresh", "the", num_rollouts=2, max_tokens=4)
        )
        assert {span.version for r in fresh for span in r.version_spans} == {version}
    load.check()
    await goes_on(stack)
    assert len(list(stack.scratch.iterdir())) == 1


@pytest.mark.slow
async def test_a_hung_engine_is_found_and_replaced(stack, monkeypatch, capfd):
    (replica,) = stack.generators._replicas
    await stack.publisher().publish(stack.next_version())
    pids = processes(replica._actor)
    soon = replica._settings.model_copy(update={"hang_deadline_s": HANG_DEADLINE_S})
    monkeypatch.setattr(replica, "_settings", soon)
    replica._watch.cancel()  # it still goes by the old deadline
    await asyncio.sleep(0)
    async with Load(stack, "hang") as load:
        os.kill(pids["VLLM::EngineCor"], signal.SIGSTOP)
        stopped_at = time.monotonic()
        assert await gone(pids.values(), within_s=4 * HANG_DEADLINE_S)
        assert time.monotonic() - stopped_at > HANG_DEADLINE_S
        monkeypatch.undo()  # the next one has yet to warm up
    load.check()
    await goes_on(stack)
    said = capfd.readouterr().err
    assert f"did not answer a health check within {HANG_DEADLINE_S:g} s; another" in said
