"""The maths verifier called directly inside a Ray actor, where signals and time limits fail."""

import threading

import pytest
import ray

from posttrain.data.prompts import make_prompt
from posttrain.types import Outcome
from posttrain.workers.cluster import start_actor, stop_actor
from posttrain.workers.settings import ActorResources

pytest_plugins = ["engine_fixtures"]
pytestmark = pytest.mark.engine


def test_a_correct_answer_is_correct_inside_an_actor(cluster):
    class Verifier:
        def ready(self):
            pass

        async def score(self, gold, text):
            """An async method runs on an event loop's thread, which is not the main one."""
            from rewards import maths

            assert threading.current_thread() is not threading.main_thread()
            return maths.score(make_prompt("?", reference=gold, domain="d"), text)

    actor = start_actor(
        Verifier, resources=ActorResources(cpus=0.25), environment={}, deadline_s=60
    )
    texts = [r"so \boxed{0.75}", r"\boxed{\frac{6}{8}}", r"\boxed{0.7}", r"\boxed{9^{9^{9^9}}}"]
    scores = ray.get([actor.score.remote(r"\frac{3}{4}", text) for text in texts], timeout=60)
    stop_actor(actor)
    assert [score.outcome for score in scores] == [
        Outcome.CORRECT,
        Outcome.CORRECT,
        Outcome.WRONG,
        Outcome.LIMIT,
    ]
