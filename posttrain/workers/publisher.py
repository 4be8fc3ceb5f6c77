"""Brings the learner's weights to the engines, and checks that they compute the same."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from posttrain.types import PolicyVersion
from posttrain.workers.agreement import facts_of_checkpoint
from posttrain.workers.fingerprint import main_dtype
from posttrain.workers.generator import GeneratorPool
from posttrain.workers.probe import Probe, ProbeSequence, compare_answers
from posttrain.workers.settings import PublishSettings
from posttrain.workers.transport import PublishedWeights


class WeightSource(Protocol):
    """What publishing asks of the learner, however many ranks it has."""

    async def node_id(self) -> str:
        """Ray's id of the node on which `write_weights` writes."""
        ...

    async def write_weights(self, directory: Path) -> float:
        """Writes the current weights with `posttrain.workers.weights`; returns the seconds."""
        ...

    async def score_tokens(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token but the first, at temperature 1: `[T-1]` per sequence."""
        ...


class WeightPublisher:
    """Implements `posttrain.types.Publisher`.

    Args:
        model: the checkpoint that the learner started from.
        scratch: a directory in shared memory that belongs to this run.
        probes: what engine and learner are compared on, read anew each time: answers that the
            policy of today might write.
    """

    def __init__(
        self,
        learner: WeightSource,
        generators: GeneratorPool,
        *,
        model: Path,
        scratch: Path,
        probes: Sequence[ProbeSequence],
        settings: PublishSettings,
    ) -> None:
        self._learner = learner
        self._generators = generators
        self._model = model
        self._scratch = scratch
        self._probes = probes
        self._probe = Probe(settings)
        self._node_id: str | None = None

    async def publish(self, version: PolicyVersion) -> Mapping[str, float]:
        """Returns once every engine that serves has confirmed `version`.

        Returns: `write_s`, `publish_s`, `reprefilled_tokens`, `replaced_engines` (since the engines
            were first started), `pause_s` (the longest of the engines', unless all were lost), and,
            when the probe ran, what `compare_answers` gives.

        Raises:
            ModelError: at first: engines and learner differ in vocabulary, tokenizer or data type.
            MismatchError: the weights did not arrive as they were sent, or an engine's
                log-probabilities differ from the learner's.
            EngineError: an engine was lost and could not be replaced, or the learner's node with
                the weights was.
        """
        if self._node_id is None:
            self._generators.check_model(facts_of_checkpoint(self._model))
            self._node_id = await self._learner.node_id()
        began = time.perf_counter()
        directory = self._scratch / str(version)
        write_s = await self._learner.write_weights(directory)
        weights = await PublishedWeights.staged(
            directory, version, self._node_id, deadline_s=self._generators.update_deadline_s
        )
        report = await self._generators.update_weights(weights)
        metrics = {
            "write_s": write_s,
            "publish_s": time.perf_counter() - began,
            "reprefilled_tokens": report.reprefilled_tokens,
            "replaced_engines": float(report.replaced_engines),
        }
        if report.pause_s is not None:
            metrics["pause_s"] = report.pause_s
        if self._probe.due():
            metrics |= await self._compare(version, main_dtype(weights.fingerprint))
        return metrics

    async def _compare(self, version: PolicyVersion, dtype: str) -> dict[str, float]:
        sequences = list(self._probes)
        token_ids = [list(sequence.token_ids) for sequence in sequences]
        learner = await self._learner.score_tokens(token_ids)
        engines = await self._generators.score_tokens(token_ids, f"probe-{version}")
        mismatch = compare_answers(sequences, learner, engines)
        exact = dtype == self._generators.dtype == "float32"
        self._probe.check(mismatch, version, exact=exact)
        return mismatch
