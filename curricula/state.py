"""What is known about each prompt's pass rate: a Beta posterior that forgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curricula.catalogue import PromptCatalogue
from posttrain.types import Verdict

PRIOR = 0.5  # a₀ = b₀, Jeffreys
NEVER = -1  # in `last_step`: not observed yet

Indices = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]


class PosteriorState:
    """Beta(a, b) per prompt in flat arrays `[N]`: `a`, `b` float32, `last_step` int32 (policy
    step of the last observation).

    `forgetting` λ in (0, 1]: an observation a group ago counts λ, two groups ago λ², so old
    evidence is worth at most 1/(1−λ) groups.
    """

    def __init__(self, catalogue: PromptCatalogue, forgetting: float) -> None:
        self.a = np.full(len(catalogue), PRIOR, np.float32)
        self.b = np.full(len(catalogue), PRIOR, np.float32)
        self.last_step = np.full(len(catalogue), NEVER, np.int32)
        self._catalogue = catalogue
        self._forgetting = forgetting

    def warm_start(self, verdicts: Sequence[Verdict], strength: float) -> None:
        """Starts from a judge's verdicts, each worth at most `strength` answers: a critic is not
        the policy, whose own rollouts decide. Verdicts on other prompts are passed over; of two
        on the same prompt the later one counts.
        """
        verdicts = [v for v in verdicts if v.num_samples > 0]
        indices = self._catalogue.indices_of(v.prompt_id for v in verdicts)
        samples = np.array([v.num_samples for v in verdicts], np.float64)
        correct = np.array([v.num_correct for v in verdicts], np.float64)
        worth = np.minimum(samples, strength) / samples
        known = indices >= 0
        self.a[indices[known]] = (PRIOR + worth * correct)[known]
        self.b[indices[known]] = (PRIOR + worth * (samples - correct))[known]

    def observe(self, index: int, num_scored: int, num_correct: int, step: int) -> None:
        """a ← λa + (1−λ)a₀ + c and likewise b, for c of n answers correct. An observation without
        a scored answer says nothing and changes nothing. Raises ValueError unless 0 ≤ c ≤ n.
        """
        if not 0 <= num_correct <= num_scored:
            raise ValueError(f"{num_correct} correct of {num_scored} scored answers")
        if num_scored == 0:
            return
        # In this form a prior that was never touched stays exactly the prior, which `rate` reads.
        kept = self._forgetting
        self.a[index] = PRIOR + kept * (float(self.a[index]) - PRIOR) + num_correct
        self.b[index] = PRIOR + kept * (float(self.b[index]) - PRIOR) + num_scored - num_correct
        # A judge may have answered with weights that are older than what was observed since.
        self.last_step[index] = max(int(self.last_step[index]), step)

    def mean(self, indices: Indices) -> Floats:
        """E[p] = a/(a+b)."""
        a, b = self._beta(indices)
        return a / (a + b)

    def signal(self, indices: Indices, group_size: int) -> tuple[Floats, Floats]:
        """E[p(1−p)] = ab/((a+b)(a+b+1)), the expected variance of one answer's correctness; and
        E[p^G + (1−p)^G], the chance that G answers are all correct or all wrong."""
        a, b = self._beta(indices)
        both = a + b
        i = np.arange(group_size, dtype=np.float64)[:, None]
        total = both + i
        all_correct = np.multiply.reduce((a + i) / total)
        all_wrong = np.multiply.reduce((b + i) / total)
        return a * b / (both * (both + 1.0)), all_correct + all_wrong

    def rate(self, indices: Indices) -> Floats:
        """Correct share of the answers still remembered, without the prior: 0 is never solved,
        1 always solved, and .5 stands for a prompt without answers."""
        a, b = self._beta(indices)
        correct, scored = a - PRIOR, a + b - 2 * PRIOR
        rate = np.full(scored.shape, 0.5)
        np.divide(correct, scored, out=rate, where=scored > 0)
        return rate

    def state_dict(self) -> dict[str, Any]:
        return {
            "fingerprint": np.array(self._catalogue.fingerprint),
            "a": self.a.copy(),
            "b": self.b.copy(),
            "last_step": self.last_step.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises DataError for the state of another prompt set."""
        self._catalogue.check_state(state)
        self.a = np.array(state["a"], np.float32)
        self.b = np.array(state["b"], np.float32)
        self.last_step = np.array(state["last_step"], np.int32)

    def _beta(self, indices: Indices) -> tuple[Floats, Floats]:
        return self.a[indices].astype(np.float64), self.b[indices].astype(np.float64)
