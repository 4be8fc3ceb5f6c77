"""Ray, as little of it as possible: connect, and start actors within a deadline."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from posttrain.errors import PlacementError, StageError
from posttrain.workers.settings import ActorResources


def connect() -> None:
    """Joins the cluster that a Ray job runs in, or starts one on this machine."""
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
        return
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")


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
    """A handle to an actor whose constructor has finished.

    The actor class has a `ready` method.

    Raises:
        PlacementError: it could not be placed in time; says what was asked and what there is.
        Whatever its constructor raised.
    """
    handle = (
        ray.remote(actor_class)
        .options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            runtime_env={"env_vars": dict(environment)},
        )
        .remote(*arguments, **keywords)
    )
    try:
        ray.get(handle.ready.remote(), timeout=deadline_s)
    except GetTimeoutError as error:
        raise PlacementError(
            f"{actor_class.__name__} asked for {resources.cpus} CPUs and {resources.gpus} GPUs and "
            f"was not ready after {deadline_s:.0f} s. Free now: {ray.available_resources()}; in "
            f"all: {ray.cluster_resources()}. Lower resources.* or start a larger cluster."
        ) from error
    except RayActorError as error:
        raise StageError(f"{actor_class.__name__} died while it started: {error}") from error
    return handle


def stop_actor(handle: Any) -> None:
    ray.kill(handle)
