"""Whether engines and learner compute the same: log-probabilities of fixed tokens, compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.errors import MismatchError
from posttrain.types import PolicyVersion
from posttrain.workers.settings import PublishSettings

MAX_K3_AT_FIRST = 0.01
"""What 16 bits may cost. A bf16 engine under the fp32 starter policy has 2e-5 nats; a head from
another checkpoint about 1."""


@dataclass(frozen=True)
class ProbeSequence:
    """A prompt and an answer to it, as tokens. Only the answer is compared: what a policy was never
    trained to write is unlikely to it, and there 16 bits cost ten times as much."""

    token_ids: tuple[int, ...]
    num_prompt_tokens: int


class Probe:
    """Fixed sequences, and what their log-probabilities have to be like after each publish: in 16
    bits as they were after the first one, when the weights were the same as well."""

    def __init__(self, sequences: Sequence[ProbeSequence], settings: PublishSettings) -> None:
        self._sequences = sequences
        self._settings = settings
        self._published = 0
        self._first: dict[str, float] | None = None

    def due(self) -> bool:
        """Whether to compare after this publish; to be asked once after each."""
        self._published += 1
        first = self._published <= self._settings.probe_first
        return first or self._published % self._settings.probe_every == 0

    @property
    def token_ids(self) -> list[list[int]]:
        """What engine and learner are to score."""
        return [list(sequence.token_ids) for sequence in self._sequences]

    def compare(
        self, learner: Sequence[Sequence[float]], engines: Sequence[Sequence[Sequence[float]]]
    ) -> dict[str, float]:
        """`compare_logprobs` of the answers alone; scores are `[T-1]` for each sequence."""
        return compare_logprobs(self._answers(learner), [self._answers(e) for e in engines])

    def _answers(self, scores: Sequence[Sequence[float]]) -> list[Sequence[float]]:
        return [
            of_sequence[sequence.num_prompt_tokens - 1 :]
            for of_sequence, sequence in zip(scores, self._sequences, strict=True)
        ]

    def check(self, mismatch: dict[str, float], version: PolicyVersion, *, exact: bool) -> None:
        """Raises MismatchError if an engine does not serve the weights that the learner trains.

        Args:
            mismatch: as `compare_logprobs` gives it.
            exact: engines and learner both compute in fp32.
        """
        if exact:
            bounds = {"mismatch_max": self._settings.max_mismatch}
            rule = f"rl.publish.max_mismatch = {self._settings.max_mismatch:g}"
        elif self._first is None:
            self._first = mismatch
            bounds = {"mismatch_k3": MAX_K3_AT_FIRST}
            rule = f"the {MAX_K3_AT_FIRST:g} that 16 bits may cost"
        else:
            bounds = {k: v * self._settings.max_growth for k, v in self._first.items()}
            rule = f"rl.publish.max_growth = {self._settings.max_growth:g} over the first probe's"
        for name, bound in bounds.items():
            if mismatch[name] > bound:
                raise MismatchError(
                    f"after publishing {version} an engine's log-probabilities differ from the "
                    f"learner's: {name} is {mismatch[name]:.3g} nats, more than {bound:.3g} "
                    f"({rule}). The engine does not serve the weights that the learner trains; "
                    "nothing trained after this is sound."
                )


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
    # A NaN on either side must count as disagreement: max() would pass it on as NaN.
    return {
        "mismatch_max": _worst(float(np.max(np.abs(differences)))),
        "mismatch_k3": _worst(float(np.mean(np.expm1(differences) - differences))),
    }


def _worst(value: float) -> float:
    return float("inf") if value != value else value
