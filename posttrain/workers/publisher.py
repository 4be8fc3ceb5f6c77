"""Brings the learner's weights to the engines, and checks that they compute the same.

Weights go through files in shared memory; only their directory's name passes through here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from posttrain.errors import MismatchError
from posttrain.types import PolicyVersion
from posttrain.workers.generator import GeneratorPool
from posttrain.workers.learner_ranks import RemoteLearner
from posttrain.workers.settings import PublishSettings
from posttrain.workers.weights import remove_weights


class SharedMemoryPublisher:
    """Implements `posttrain.types.Publisher` for engines on the learner's host.

    Args:
        scratch: a directory in shared memory that belongs to this run.
        probe_sequences: token ids that engine and learner are compared on.
    """

    def __init__(
        self,
        learner: RemoteLearner,
        generators: GeneratorPool,
        scratch: Path,
        probe_sequences: Sequence[Sequence[int]],
        settings: PublishSettings,
    ) -> None:
        self._learner = learner
        self._generators = generators
        self._scratch = scratch
        self._probe_sequences = [list(sequence) for sequence in probe_sequences]
        self._settings = settings
        self._published = 0

    async def publish(self, version: PolicyVersion) -> Mapping[str, float]:
        """Returns `write_s`, `pause_s` (the longest of the engines'), `publish_s` and, when the
        probe ran, `mismatch_max` and `mismatch_k3`.

        Raises:
            MismatchError: an engine's log-probabilities differ from the learner's.
        """
        began = time.perf_counter()
        directory = self._scratch / str(version)
        write_s = await self._learner.write_weights(directory)
        pauses = await self._generators.update_weights(str(directory), version)
        remove_weights(directory)
        metrics = {
            "write_s": write_s,
            "pause_s": max(pauses),
            "publish_s": time.perf_counter() - began,
        }
        self._published += 1
        due = self._published % self._settings.probe_every == 0
        if due or self._published <= self._settings.probe_first:
            metrics |= await self.probe(version)
        return metrics

    async def probe(self, version: PolicyVersion) -> dict[str, float]:
        """Compares engines and learner on the probe's tokens."""
        reference = await self._learner.score_tokens(self._probe_sequences)
        answers = await self._generators.score_tokens(self._probe_sequences, f"probe-{version}")
        mismatch = compare_logprobs(reference, answers)
        if mismatch["mismatch_max"] > self._settings.max_mismatch:
            raise MismatchError(
                f"after publishing {version} an engine's log-probabilities differ from the "
                f"learner's by up to {mismatch['mismatch_max']:.3g} nats, more than "
                f"rl.publish.max_mismatch = {self._settings.max_mismatch:.3g}. The engine does not "
                "serve the weights that the learner trains; nothing trained after this is sound."
            )
        return mismatch


def compare_logprobs(
    reference: Sequence[Sequence[float]], answers: Sequence[Sequence[Sequence[float]]]
) -> dict[str, float]:
    """Largest difference in nats and mean k3 = e^d − d − 1 over all engines, sequences, tokens.

    Args:
        reference: the learner's, `[T-1]` for each sequence.
        answers: the same for each engine.
    """
    import numpy as np

    expected = np.concatenate([np.asarray(s, dtype=np.float64) for s in reference])
    differences = np.stack(
        [np.concatenate([np.asarray(s, dtype=np.float64) for s in a]) - expected for a in answers]
    )
    return {
        # A NaN on either side must count as disagreement: max() would pass it on as NaN.
        "mismatch_max": float(np.max(np.nan_to_num(np.abs(differences), nan=np.inf))),
        "mismatch_k3": float(np.mean(np.expm1(differences) - differences)),
    }
