"""Whether engines and learner compute the same: log-probabilities of fixed tokens, compared."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.errors import MismatchError
from posttrain.types import PolicyVersion
from posttrain.workers.settings import PublishSettings

MAX_K3_AT_FIRST = 0.01
"""What 16 bits may cost. Wrong weights show from about 0.1 on; a tiny random model in bf16 has
about 1e-6 and a head that was not updated about 1."""


class Probe:
    """Judges each comparison, in 16 bits against the first one, which is at equal weights too."""

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
            bounds = {"mismatch_max": self._settings.max_mismatch}
            rule = f"rl.publish.max_mismatch = {self._settings.max_mismatch:g}"
        elif self._first is None:
            self._first = mismatch
            bounds = {"mismatch_k3": MAX_K3_AT_FIRST}
            rule = f"the {MAX_K3_AT_FIRST:g} that 16 bits may cost"
        else:
            bounds = {k: v * self._settings.max_growth for k, v in self._first.items()}
            rule = (
                f"rl.publish.max_growth = {self._settings.max_growth:g} times that of the first "
                "probe"
            )
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
