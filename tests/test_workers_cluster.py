"""Actors: placed in time or refused with reasons; what goes wrong inside arrives with its name."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError

from posttrain.data.prompts import make_prompt
from posttrain.errors import DataError, ModelError, PlacementError, SettingsError, StageError
from posttrain.inputs import STARTER_POLICY
from posttrain.types import Message, Outcome, PolicyVersion, Prompt, Rollout, VersionSpan
from posttrain.workers.cluster import (
    close_actor,
    create_actor,
    refuse_more_than_there_is,
    start_actor,
    stop_actor,
)
from posttrain.workers.demand import Demand
from posttrain.workers.generator_actor import GeneratorActor
from posttrain.workers.learner_ranks import start_learner
from posttrain.workers.placement import Reservation
from posttrain.workers.scoring import RewardWorkers
from posttrain.workers.settings import (
    ActorResources,
    EngineSettings,
    LearnerResources,
    LearnerSettings,
    RolloutPoolSettings,
)
from rewards.judged import JudgedSettings
from rewards.shaping import RewardSettings

pytest_plugins = ["engine_fixtures"]
pytestmark = pytest.mark.engine

SMALL = ActorResources(cpus=0.25)


def assert_ends(handle, method, seconds=30.0):
    """Whoever has an actor killed does not wait for it: its process may answer once more."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            ray.get(getattr(handle, method).remote(), timeout=seconds)
        except RayActorError:
            return
        except RayTaskError:
            continue
    pytest.fail(f"the actor lives after {seconds:g} s")


def test_an_actor_gets_its_arguments_and_its_environment(cluster):
    class Echo:
        def __init__(self, first, *, second):
            self._arguments = (first, second)

        def ready(self):
            self._arguments += (os.environ["POSTTRAIN_TEST"], os.getpid())

        def show(self):
            return self._arguments

    handle = start_actor(
        Echo,
        1,
        second=2,
        resources=SMALL,
        environment={"POSTTRAIN_TEST": "three"},
        deadline_s=60,
    )
    *arguments, pid = ray.get(handle.show.remote())
    stop_actor(handle)
    assert arguments == [1, 2, "three"]
    assert pid != os.getpid()


DEVICES = """
import os
import ray
from posttrain.workers.cluster import create_actor
from posttrain.workers.settings import ActorResources

class Seen:
    def devices(self):
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    def of_another(self, gpus):
        resources = ActorResources(cpus=0.25, gpus=gpus)
        other = create_actor(Seen, resources=resources, environment={})
        return ray.get(other.devices.remote())

ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
without = create_actor(Seen, resources=ActorResources(cpus=0.25), environment={})
print([ray.get(without.devices.remote()), *(ray.get(without.of_another.remote(g)) for g in (1, 0))])
"""


@pytest.mark.slow
def test_an_actor_sees_the_gpus_that_it_asked_for_and_no_other(tmp_path):
    """Also where one that has none starts it, as scorers start a judge's engines."""
    script = tmp_path / "devices.py"
    script.write_text(DEVICES)
    seen = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, check=True)
    assert seen.stdout == "['', '0', '']\n"


def test_an_actor_that_does_not_close_in_good_order_is_killed_all_the_same(cluster, capfd):
    class Stubborn:
        def close(self):
            raise AssertionError("nothing is open yet")

    handle = create_actor(Stubborn, resources=SMALL, environment={})
    ray.get(handle.__ray_ready__.remote())
    close_actor(handle)
    said = capfd.readouterr().err
    assert "did not close in good order and is killed" in said
    assert "nothing is open yet" in said
    assert_ends(handle, "close")


def test_an_engine_that_has_not_started_is_closed_without_a_word(cluster, capfd):
    """Its model is never loaded: RL may end while an engine is being started anew."""
    handle = create_actor(
        GeneratorActor,
        "nowhere",
        PolicyVersion(0, 0),
        EngineSettings(),
        resources=SMALL,
        environment={},
    )
    ray.get(handle.__ray_ready__.remote())
    close_actor(handle)
    assert "good order" not in capfd.readouterr().err
    assert_ends(handle, "close")


def test_what_cannot_be_placed_is_refused_within_its_deadline(cluster):
    class Greedy:
        def ready(self):
            pass

    everything = ray.cluster_resources()["CPU"]
    began = time.monotonic()
    with pytest.raises(PlacementError) as caught:
        start_actor(Greedy, resources=ActorResources(cpus=1000), environment={}, deadline_s=1.0)
    assert time.monotonic() - began < 10
    message = str(caught.value)
    assert "Greedy asked for 1000 CPUs and 0 GPUs" in message
    assert f"in all: {everything:g} CPUs" in message
    assert "resources" in message


def test_what_getting_ready_raises_arrives_as_it_is(cluster):
    class Broken:
        def ready(self):
            raise DataError("no such column: answer")

    with pytest.raises(DataError) as caught:
        start_actor(Broken, resources=SMALL, environment={}, deadline_s=60)
    assert type(caught.value) is DataError
    assert str(caught.value) == "no such column: answer"
    assert "in ready" in str(caught.value.__cause__)  # where it happened, for a bug report


def test_a_process_that_dies_while_it_starts_is_named(cluster):
    class Dying:
        def ready(self):
            os._exit(1)

    with pytest.raises(StageError, match="Dying died while it started"):
        start_actor(Dying, resources=SMALL, environment={}, deadline_s=60)


def test_an_unreadable_model_is_bad_input_and_names_its_path(cluster, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        start_learner(
            str(tmp_path),
            LearnerSettings(),
            temperature=1.0,
            max_age=1,
            max_tokens=40,
            num_steps=1,
            seed=0,
            lora=None,
            checkpoint=None,
            resources=LearnerResources(cpus=0.25),
            deadline_s=240,
        )
    assert caught.value.exit_code == 2
    assert str(tmp_path) in str(caught.value)


def answer(text):
    return Rollout(
        rollout_id="d/0",
        draw_id="d",
        prompt_token_ids=(1,),
        completion_token_ids=(2, 3),
        rollout_logprobs=(-0.5, -0.5),
        text=text,
        finish_reason="stop",
        version_spans=(VersionSpan(0, 2, PolicyVersion(1, 0)),),
    )


def reward_workers(settings):
    return RewardWorkers.start(
        settings,
        num_workers=1,
        judge=RolloutPoolSettings(actor=SMALL, engine=EngineSettings(max_model_len=512)),
        resources=ActorResources(cpus=0),
        deadline_s=120,
    )


async def test_mathematics_is_verified_inside_an_actor(cluster):
    """math-verify's own time limits raise off the main thread, where an actor's methods run."""
    prompt = Prompt(
        prompt_id="p",
        messages=(Message(role="user", content="1/2 + 1/4 as a decimal"),),
        reference=r"\frac{3}{4}",
        domain="maths",
        metadata={"verifier": "maths"},
    )
    workers = reward_workers(RewardSettings())
    texts = [r"so it is \boxed{0.75}", r"\boxed{\frac{6}{8}}", r"\boxed{0.7}", "<think>it is"]
    rewards = await workers.score(prompt, [answer(text) for text in texts], None)
    workers.stop()
    assert [reward.outcome for reward in rewards] == [
        Outcome.CORRECT,
        Outcome.CORRECT,
        Outcome.WRONG,
        Outcome.UNPARSABLE,
    ]
    assert [reward.value for reward in rewards] == [1.0, 1.0, 0.0, 0.0]


def engine_cores():
    running = psutil.Process().children(recursive=True)
    return {process for process in running if "EngineCore" in " ".join(process.cmdline())}


@pytest.mark.slow
async def test_a_judge_served_by_engines_of_the_run(cluster):
    """The starter cannot follow a rubric: what it says is no grade, so the answer is unscored."""
    judge = JudgedSettings(model=str(STARTER_POLICY), max_tokens=24, retries=1, template="{answer}")
    before = engine_cores()
    workers = reward_workers(RewardSettings(default_verifier="judge", judge=judge))
    prompt = make_prompt("?", reference=None, domain="chat")
    (reward,) = await workers.score(prompt, [answer("#4")], None)
    (engine,) = engine_cores() - before
    workers.stop()
    assert (reward.value, reward.outcome) == (None, Outcome.INFRASTRUCTURE)
    assert re.fullmatch(r"the judge's reply .* no JSON object \(2 attempts\)", reward.explanation)
    assert psutil.wait_procs([engine], timeout=20)[1] == []


def test_ranks_are_placed_together_or_not_at_all(cluster):
    class Here:
        def ready(self):
            pass

    began = time.monotonic()
    half = ActorResources(cpus=ray.cluster_resources()["CPU"] / 2)
    with pytest.raises(PlacementError) as caught:
        Reservation("three halves", half, count=3, deadline_s=1.0)
    assert time.monotonic() - began < 20
    assert f"three halves asked for {half.cpus:g} CPUs" in str(caught.value)
    assert "on 1 nodes" in str(caught.value)
    # Nothing is waiting any more for what could not be placed as a whole.
    reserved = Reservation("two", SMALL, count=2, deadline_s=60)
    handle = create_actor(Here, resources=SMALL, environment={}, place=reserved.place(1))
    assert ray.get(handle.ready.remote(), timeout=60) is None
    reserved.release()
    assert_ends(handle, "ready")


def test_more_than_the_whole_cluster_has_is_bad_input(cluster):
    asked = [Demand(role="rollout", count=3, each=ActorResources(cpus=1000))]
    with pytest.raises(SettingsError) as caught:
        refuse_more_than_there_is(asked)
    message = str(caught.value)
    assert "room for 0 of the 3 actors of rollout" in message
    assert f"{ray.cluster_resources()['CPU']:g} CPUs and 0 GPUs" in message
    refuse_more_than_there_is([Demand(role="rollout", count=1, each=SMALL)])


def test_a_ray_that_never_comes_up_is_not_waited_for():
    """Where a process of Ray's dies at the wrong moment, `ray.init` waits in code of its own."""
    script = """
import sys, time
import ray
from posttrain.workers.cluster import connect
ray.init = lambda **_: time.sleep(60)
connect(deadline_s=1.0)
print("never", flush=True)
"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=90
    )
    assert time.monotonic() - began < 45
    assert (done.returncode, done.stdout) == (3, "")
    assert "Ray on this machine was not up after 1 s" in done.stderr


def test_a_signal_reaches_the_handler_of_whoever_connects():
    """Ray would put its own there, which dumps a stack and may abort: no exit code 4."""
    script = """
import os, signal, sys, threading, time
def stop(number, _):
    print("stopped by", number, flush=True)
    raise SystemExit(0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
from posttrain.workers.cluster import connect, disconnect
connect()
assert signal.getsignal(signal.SIGINT) is stop
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
try:
    time.sleep(30)
finally:
    disconnect()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=90
    )
    assert done.stdout == f"stopped by {signal.SIGTERM.value}\n"
    assert "SIGTERM received" not in done.stderr
    assert done.returncode == 0
