"""How published weights reach an engine: as a file in shared memory where learner, driver and
engine are on one machine, through Ray's object store otherwise.

vLLM's own nccl transport would be a third `Delivery`, from device to device.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from posttrain.errors import EngineError
from posttrain.types import PolicyVersion
from posttrain.workers.fingerprint import Fingerprint
from posttrain.workers.weights import WEIGHTS, read_fingerprint, remove_weights

FileContent = NDArray[np.uint8]


class Delivery(Protocol):
    """What an engine's actor is sent: it knows how to get hold of the weights there."""

    def received(self) -> AbstractAsyncContextManager[Path]:
        """A safetensors file that every process on the engine's machine can open meanwhile."""
        ...


@dataclass(frozen=True)
class SharedMemory:
    """The published file itself."""

    file: Path

    @asynccontextmanager
    async def received(self) -> AsyncIterator[Path]:
        yield self.file


@dataclass(frozen=True)
class ObjectStore:
    """A copy, in memory that has no name on disk: it is gone with the process that made it."""

    content: Any

    @asynccontextmanager
    async def received(self) -> AsyncIterator[Path]:
        content: FileContent = await self.content
        descriptor = os.memfd_create("posttrain-weights")
        with os.fdopen(descriptor, "wb") as memory:
            await asyncio.to_thread(memory.write, content.data)
            memory.flush()
            yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")


class PublishedWeights:
    """One version's weights, kept until the next one is served, for engines that start meanwhile.

    What that costs: one copy of the weights in the driver's shared memory, or in the object store
    of the learner's node, between publishes, and two while one is under way; an engine on another
    machine holds one more while it loads.

    Args:
        directory: as `write_weights` left it on this machine, owned from now on; None if `content`
            holds the file.
        content: reference to the file's bytes in the object store.
        deadline_s: for bringing them there.
    """

    def __init__(
        self,
        version: PolicyVersion,
        published: Fingerprint,
        *,
        directory: Path | None = None,
        content: Any = None,
        deadline_s: float,
    ) -> None:
        assert (directory is None) != (content is None)
        self.version = version
        self.fingerprint = published
        self._directory = directory
        self._content = content
        self._deadline_s = deadline_s
        self._storing: asyncio.Task[Any] | None = None
        self._users = 0
        self._retired = False

    @classmethod
    async def staged(
        cls, directory: Path, version: PolicyVersion, node_id: str, *, deadline_s: float
    ) -> PublishedWeights:
        """What was just written to `directory` on the node `node_id`. EngineError if that node is
        gone, or has not brought it to the object store within `deadline_s`."""
        if node_id == this_node():
            published = read_fingerprint(directory)
            return cls(version, published, directory=directory, deadline_s=deadline_s)
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        published, content = (
            ray.remote(_take)
            .options(num_cpus=0, num_returns=2, scheduling_strategy=there)
            .remote(directory)
        )
        failed = f"the weights {version}, written on the learner's node {node_id}, are not fetched"
        async with _in_time(failed, deadline_s):
            return cls(version, await published, content=content, deadline_s=deadline_s)

    @asynccontextmanager
    async def delivery(self, node_id: str) -> AsyncIterator[Delivery]:
        """For an engine on `node_id`; the weights stay until the block ends, retired or not."""
        self._users += 1
        try:
            if self._directory is not None and node_id == this_node():
                yield SharedMemory(self._directory / WEIGHTS)
            else:
                yield ObjectStore(await self._stored())
        finally:
            self._users -= 1
            self._remove_if_done()

    def retire(self) -> None:
        """Newer weights are served: these go as soon as nobody is loading them."""
        self._retired = True
        self._remove_if_done()

    async def _stored(self) -> Any:
        if self._content is None:
            if self._storing is None:  # one copy, however many engines ask for it
                self._storing = asyncio.create_task(self._store())
            failed = f"the weights {self.version} are not stored for engines on other nodes"
            async with _in_time(failed, self._deadline_s):
                await asyncio.shield(self._storing)
        return self._content

    async def _store(self) -> None:
        assert self._directory is not None
        content = await asyncio.to_thread(_read, self._directory)
        self._content = await asyncio.to_thread(ray.put, content)

    def _remove_if_done(self) -> None:
        if not self._retired or self._users:
            return
        self._content = None
        if self._directory is not None:
            remove_weights(self._directory)
            self._directory = None


@asynccontextmanager
async def _in_time(failed: str, deadline_s: float) -> AsyncIterator[None]:
    """EngineError, which begins with `failed`, if Ray cannot do what stands in the block."""
    try:
        async with asyncio.timeout(deadline_s):
            yield
    except TimeoutError as error:
        raise EngineError(
            f"{failed} within {deadline_s:g} s (resources.rollout.engine.update_deadline_s); raise "
            "it if they only need longer"
        ) from error
    except RayError as error:
        raise EngineError(f"{failed}: {error}") from error


def this_node() -> str:
    """Ray's id of the node that this process runs on."""
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def _read(directory: Path) -> FileContent:
    return np.fromfile(directory / WEIGHTS, dtype=np.uint8)


def _take(directory: Path) -> tuple[Fingerprint, FileContent]:
    """Runs where the directory is, and leaves nothing there."""
    taken = read_fingerprint(directory), _read(directory)
    remove_weights(directory)
    return taken
