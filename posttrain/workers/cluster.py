"""Ray, as little of it as possible: connect, and start actors within a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from posttrain.errors import EngineError, PlacementError, SettingsError, StageError
from posttrain.progress import say
from posttrain.workers.demand import Demand, Node, why_too_small
from posttrain.workers.settings import ActorResources

CLOSE_DEADLINE_S = 30.0
CONNECT_DEADLINE_S = 180.0
OWN_DEVICES = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
"""In an actor's environment: hides all GPUs from one that asked for none, else all of these would
meet on the first. An actor that it starts may have some: no variable of CUDA's would do."""


def connect(deadline_s: float = CONNECT_DEADLINE_S) -> None:
    """Joins the cluster that a Ray job runs in, or starts one on this machine. On a cluster of
    several nodes all of them must see models and run directory under the same paths.

    Where Ray has neither come up nor given up within `deadline_s`, the process is ended with the
    exit code of a `PlacementError`: inside Ray's own code nothing can be raised.
    """
    if ray.is_initialized():
        return
    with _ended_after(deadline_s), _signal_handlers_kept():
        if "RAY_ADDRESS" in os.environ:
            ray.init(log_to_driver=False)
        else:
            # Ray's workers step back behind every other process (nice 15) unless told otherwise;
            # beside a busy browser a run on two cores would nearly stand still.
            os.environ.setdefault("RAY_worker_niceness", "0")
            # By its own choice Ray would join whatever cluster was last started here.
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )


@contextlib.contextmanager
def _ended_after(deadline_s: float) -> Iterator[None]:
    """A process of Ray's that dies at the wrong moment leaves `ray.init` waiting for ever."""

    def end() -> None:
        where = os.environ.get("RAY_ADDRESS", "this machine")
        say(
            f"posttrain: Ray on {where} was not up after {deadline_s:g} s; see `ray status`, or "
            "what /tmp/ray/session_latest/logs says, and run the same command again"
        )
        os._exit(PlacementError.exit_code)

    watchdog = threading.Timer(deadline_s, end)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Ray answers SIGTERM in its own way: it dumps its stack and may abort the process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def disconnect() -> None:
    ray.shutdown()


def start_actor(
    actor_class: Any,
    *arguments: Any,
    resources: ActorResources,
    environment: Mapping[str, str],
    deadline_s: float,
    **keywords: Any,
) -> Any:
    """A handle to an actor that is ready.

    The actor class has a method `ready`, which loads whatever can fail to load: what `ready` raises
    arrives as it is, what a constructor raises arrives as text.

    Raises:
        PlacementError: it could not be placed in time; says what was asked and what there is.
        StageError: its process died.
        Whatever `ready` raised.
    """
    handle = create_actor(
        actor_class, *arguments, resources=resources, environment=environment, **keywords
    )
    try:
        wait_until_ready([handle.ready.remote()], actor_class.__name__, resources, deadline_s)
    except BaseException:
        # Else it would hold its devices, or go on waiting for them.
        stop_actor(handle)
        raise
    return handle


def create_actor(
    actor_class: Any,
    *arguments: Any,
    resources: ActorResources,
    environment: Mapping[str, str],
    place: Any = None,
    calls_at_once: int | None = None,
    **keywords: Any,
) -> Any:
    """A handle to an actor that may not be placed yet; `place` is a scheduling strategy of Ray's
    (None: wherever there is room), `calls_at_once` how many calls it works on while further ones
    wait (None: Ray's own 1, and 1000 of an actor with async methods)."""
    return (
        ray.remote(actor_class)
        .options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            scheduling_strategy=place,
            max_concurrency=calls_at_once,
            runtime_env={"env_vars": {**OWN_DEVICES, **environment}},
        )
        .remote(*arguments, **keywords)
    )


def wait_until_ready(
    calls: Sequence[Any], name: str, resources: ActorResources, deadline_s: float
) -> list[Any]:
    """What the `calls` of actors called `name` return, as soon as all have or one has failed;
    raises as `start_actor`."""
    waiting, ends_at = list(calls), time.monotonic() + deadline_s
    try:
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, ends_at - time.monotonic()))
            if not done:
                raise not_ready(name, resources, deadline_s)
            ray.get(done)
        answers: list[Any] = ray.get(list(calls))
    except RayTaskError as error:
        raise error.cause from error
    except RayActorError as error:
        raise StageError(f"{name} died while it started: {error}") from error
    return answers


async def actor_ready(
    handle: Any, name: str, *, resources: ActorResources, deadline_s: float
) -> Any:
    """What the actor's `ready` returns, without blocking. Raises as `start_actor`, and has stopped
    the actor then."""
    try:
        async with asyncio.timeout(deadline_s):
            return await handle.ready.remote()
    except BaseException as error:
        stop_actor(handle)
        match error:
            case RayTaskError():
                raise error.cause from error
            case RayActorError():
                raise StageError(f"{name} died while it started: {error}") from error
            case TimeoutError():
                raise not_ready(name, resources, deadline_s) from error
        raise


def not_ready(name: str, resources: ActorResources, deadline_s: float) -> PlacementError:
    """What was asked for, and what there is."""
    return PlacementError(
        f"{name} asked for {resources.cpus:g} CPUs and {resources.gpus:g} GPUs and was not "
        f"ready after {deadline_s:g} s. Free now: {_devices(ray.available_resources())}; in "
        f"all: {_devices(ray.cluster_resources())} on {len(cluster_nodes())} nodes. Lower "
        "resources.* or start a larger cluster; raise resources.deadline_s if it only needs longer."
    )


def cluster_nodes() -> list[Node]:
    """The machines that are part of the cluster now."""
    return [
        Node.of(node["NodeManagerAddress"], node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def refuse_more_than_there_is(demands: Sequence[Demand]) -> None:
    """SettingsError at once if the cluster, were it free, could not hold `demands`."""
    reason = why_too_small(demands, cluster_nodes())
    if reason is not None:
        raise SettingsError(f"resources: {reason}. Lower resources.* or start a larger cluster")


def _devices(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"


async def answer(reference: Any, actor: str) -> Any:
    """What a remote call comes to, with errors under their own names.

    Raises:
        EngineError: the actor's process died.
        Whatever the call raised, as it was raised there.
    """
    try:
        return await reference
    except RayTaskError as error:
        raise error.cause from error
    except RayActorError as error:
        raise EngineError(f"{actor} died: {error}") from error


def close_actor(handle: Any) -> None:
    """Lets an actor end what it started, for a bounded time, then ends the actor itself. Whoever
    closes one is done with it: what it raises is said, and ends nothing else."""
    try:
        ray.get(handle.close.remote(), timeout=CLOSE_DEADLINE_S)
    except RayError as error:
        say(f"an actor did not close in good order and is killed: {error}")
    stop_actor(handle)


def stop_actor(handle: Any) -> None:
    ray.kill(handle)
