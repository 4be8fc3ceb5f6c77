"""Whether engines and learner compute the same: log-probabilities of answers, compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.errors import MismatchError
from posttrain.types import PolicyVersion, Rollout
from posttrain.workers.settings import PublishSettings

MAX_K3 = 0.01
"""What 16 bits may cost. A bf16 engine under the fp32 starter policy has 4e-5 nats; weights from
before its RL have 0.08, a head from another checkpoint about 1."""


@dataclass(frozen=True)
class ProbeSequence:
    """A prompt and an answer to it, as tokens. Only the answer is compared: what a policy would not
    write is unlikely to it, and there 16 bits cost ten times as much."""

    token_ids: tuple[int, ...]
    num_prompt_tokens: int

    @classmethod
    def of(cls, rollout: Rollout, max_length: int) -> ProbeSequence:
        """An engine of `max_length` scores a sequence only with room for one more token."""
        sequence = rollout.prompt_token_ids + rollout.completion_token_ids
        return cls(sequence[: max_length - 1], len(rollout.prompt_token_ids))


class Probe:
    """When engines and learner are compared, and how far apart they may be: in 16 bits not much
    further than at first, when the weights were the same as well."""

    def __init__(self, settings: PublishSettings) -> None:
        self._settings = settings
        self._published = 0
        self._first: dict[str, float] | None = None

    def due(self) -> bool:
        """Whether to compare after this publish; to be asked once after each."""
        self._published += 1
        first = self._published <= self._settings.probe_first
        return first or self._published % self._settings.probe_every == 0

    def check(self, mismatch: dict[str, float], version: PolicyVersion, *, exact: bool) -> None:
        """Raises MismatchError if an engine does not serve the weights that the learner trains.

        Args:
            mismatch: as `compare_logprobs` gives it.
            exact: engines and learner both compute in fp32.
        """
        if exact:
            most = self._settings.max_mismatch
            bounds = {"mismatch_max": (most, f"rl.publish.max_mismatch = {most:g}")}
        else:
            # The mean is held to what it was at first: a few unlikely tokens make the largest
            # difference and most of k3, and they are other ones each time.
            self._first = self._first or mismatch
            growth = self._settings.max_growth
            rule = f"rl.publish.max_growth = {growth:g} over the first probe's"
            bounds = {
                "mismatch_mean": (self._first["mismatch_mean"] * growth, rule),
                "mismatch_k3": (MAX_K3, f"the {MAX_K3:g} that 16 bits may cost"),
            }
        for name, (bound, rule) in bounds.items():
            if mismatch[name] > bound:
                raise MismatchError(
                    f"after publishing {version} an engine's log-probabilities differ from the "
                    f"learner's: {name} is {mismatch[name]:.3g} nats, more than {bound:.3g} "
                    f"({rule}). The engine does not serve the weights that the learner trains; "
                    "nothing trained after this is sound."
                )


def compare_answers(
    sequences: Sequence[ProbeSequence],
    learner: Sequence[Sequence[float]],
    engines: Sequence[Sequence[Sequence[float]]],
) -> dict[str, float]:
    """`compare_logprobs` of the answers alone; scores are `[T-1]` for each sequence."""

    def answers(scores: Sequence[Sequence[float]]) -> list[Sequence[float]]:
        return [
            of_sequence[sequence.num_prompt_tokens - 1 :]
            for of_sequence, sequence in zip(scores, sequences, strict=True)
        ]

    return compare_logprobs(answers(learner), [answers(scores) for scores in engines])


def compare_logprobs(
    reference: Sequence[Sequence[float]], answers: Sequence[Sequence[Sequence[float]]]
) -> dict[str, float]:
    """Differences d in nats over all engines, sequences, tokens: the largest, the mean of |d|, and
    the mean k3 = e^d − d − 1.

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
        "mismatch_mean": _worst(float(np.mean(np.abs(differences)))),
        "mismatch_k3": _worst(float(np.mean(np.expm1(differences) - differences))),
    }


def _worst(value: float) -> float:
    return float("inf") if value != value else value
