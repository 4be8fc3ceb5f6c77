"""Samplers: a batch's domains by quota, then prompts; and what is learned from a group."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from curricula.buckets import BUCKETS, bucket_of
from curricula.catalogue import PromptCatalogue
from curricula.mixture import DomainMixture, check_quotas
from curricula.pool import DROPPED, BucketedPool
from curricula.state import PosteriorState
from posttrain.types import Prompt, Verdict

# How readily a bucket gives candidates: p(1-p) at its middle; at its ends E[p(1-p)] after 8 answers
# that are all wrong or all correct.
_BUCKET_SIGNAL = np.array([0.047, 0.109, 0.234, 0.234, 0.109, 0.047])

# How many prompts are looked at for each one that is judged again.
_CHOICE = 4
_BLOCK = 65_536


class CurriculumSettings(BaseModel):
    """How prompts are drawn. All but `kind` and the quotas concern the difficulty sampler.

    - `quotas`: share of the trained groups for each domain; None: as many as it has prompts.
    - `fixed_quotas`: they hold whatever it takes; else a domain that hardly ever carries a signal
      gets less than its share, so that it does not take all the effort.
    - `forgetting`: what the evidence of a group is worth one group of the same prompt later.
    - `prior_strength`: how many answers of the policy a judge's verdict counts for, at most.
    - `candidates`: drawn and ranked for each draw.
    - `floor`: share of the draws that each difficulty bucket of a domain gets whatever it promises.
    - `max_no_signal`: candidates are skipped whose chance of a group without signal is above this.
    - `cooldown`: draws before the same prompt comes again, while others are available.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["difficulty", "uniform"] = "difficulty"
    quotas: dict[str, Annotated[float, Field(ge=0)]] | None = None
    fixed_quotas: bool = False
    forgetting: float = Field(default=0.9, gt=0, le=1)
    prior_strength: float = Field(default=8.0, ge=0)
    candidates: int = Field(default=32, gt=0, le=1024)
    floor: float = Field(default=0.01, ge=0.01, le=0.1)
    max_no_signal: float = Field(default=0.8, gt=0, le=1)
    cooldown: int = Field(default=128, ge=0)


class _OfDomains:
    """What every sampler says of domains is its mixture's word."""

    _mixture: DomainMixture

    def next_batch(self) -> list[str]:
        return self._mixture.next_batch()

    def instead_of(self, domain: str) -> str:
        return self._mixture.instead_of(domain)

    def quotas(self) -> dict[str, float]:
        """As they are now, by domain; they sum to 1."""
        return self._mixture.shares()

    def gated(self, domain: str, *, trainable: bool) -> None:
        self._mixture.observe(domain, trainable=trainable)


class DifficultySampler(_OfDomains):
    """Draws where a group promises the most signal, and never gives a prompt up.

    Most draws rank a few candidates: those drawn lately and those that would hardly give a signal
    are passed over, one of the best quarter by E[p(1−p)] is taken. The rest explore: a bucket at
    random, a prompt of it at random, whatever it promises. Costs do not grow with the pool.
    """

    def __init__(
        self,
        catalogue: PromptCatalogue,
        mixture: DomainMixture,
        posterior: PosteriorState,
        settings: CurriculumSettings,
        *,
        group_size: int,
        seed: int,
    ) -> None:
        self._catalogue = catalogue
        self._mixture = mixture
        self._posterior = posterior
        self._pool = BucketedPool(
            catalogue.domain, _buckets(posterior, len(catalogue)), len(catalogue.domains)
        )
        self._settings = settings
        self._group_size = group_size
        self._rng = np.random.default_rng(seed)
        self._num_draws = 0
        # Number of the draw that last took a prompt, counted from 1; 0: none has.
        self._drawn_at = np.zeros(len(catalogue), np.int32)
        self._cooldown = min(settings.cooldown, len(catalogue) // 2)

    def draw(self, domain_name: str) -> Prompt:
        domain = self._catalogue.domains.index(domain_name)
        counts = self._pool.counts(domain)
        (filled,) = np.nonzero(counts)
        chance, which = self._rng.random(2)
        if chance < self._settings.floor * len(filled):
            weights = np.zeros(len(BUCKETS))
            weights[filled[int(which * len(filled))]] = 1.0
            index = self._any(self._candidates(domain, weights))
        else:
            # A bucket with few prompts gives few candidates: else they would come all the time.
            weights = _BUCKET_SIGNAL * counts / (counts + self._settings.candidates)
            index = self._most_promising(self._candidates(domain, weights))
        self._num_draws += 1
        self._drawn_at[index] = self._num_draws
        return self._catalogue.prompts[index]

    def observe(self, prompt_id: str, num_scored: int, num_correct: int, step: int) -> None:
        """Learns that `num_correct` of `num_scored` answers were correct at policy step `step`.

        Raises DataError for a prompt that is not of this curriculum.
        """
        self._learn(prompt_id, num_scored, num_correct, step)

    def observe_verdict(self, verdict: Verdict, step: int) -> None:
        """Learns from a judge's answers."""
        self._learn(verdict.prompt_id, verdict.num_samples, verdict.num_correct, step)

    def _learn(self, prompt_id: str, num_scored: int, num_correct: int, step: int) -> None:
        index = self._catalogue.index_of(prompt_id)
        self._posterior.observe(index, num_scored, num_correct, step)
        if not self._pool.is_dropped(index):
            self._pool.move(index, self._bucket(index))

    def rescreen_slice(self, size: int, retest_share: float) -> list[Prompt]:
        """Those of a random few whose last observation is oldest: what is drawn often is known
        from the policy's own answers, what is passed over is known from nobody's. The share holds
        on average over slices, however small they are: else what was dropped would never return."""
        retested = int(size * retest_share + self._rng.random())
        dropped = self._spread(retested, dropped=True)
        active = self._spread(_CHOICE * (size - len(dropped)), dropped=False)
        oldest = active[np.argsort(self._posterior.last_step[active], kind="stable")]
        chosen = np.concatenate([oldest[: size - len(dropped)], dropped])
        return [self._catalogue.prompts[index] for index in chosen]

    def drop(self, prompt_id: str) -> None:
        """Not the last one of a domain: it would have nothing to draw."""
        index = self._catalogue.index_of(prompt_id)
        if self._pool.counts(int(self._catalogue.domain[index])).sum() > 1:
            self._pool.move(index, DROPPED)

    def restore(self, prompt_id: str) -> None:
        index = self._catalogue.index_of(prompt_id)
        self._pool.move(index, self._bucket(index))

    def is_dropped(self, prompt_id: str) -> bool:
        return self._pool.is_dropped(self._catalogue.index_of(prompt_id))

    def pool(self) -> dict[str, dict[str, int]]:
        return {
            name: dict(zip(BUCKETS, self._pool.counts(domain).tolist(), strict=True))
            | {"dropped": self._pool.num_dropped(domain)}
            for domain, name in enumerate(self._catalogue.domains)
        }

    def state_dict(self) -> dict[str, Any]:
        """Numpy arrays without objects, so that `numpy.savez` stores them unpickled."""
        return {
            **self._posterior.state_dict(),
            **self._pool.state_dict(),
            **self._mixture.state_dict(),
            "drawn_at": self._drawn_at.copy(),
            "num_draws": np.array(self._num_draws),
            "rng": _rng_state(self._rng),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Draws go on as they would have. Raises DataError for the state of other prompts."""
        self._posterior.load_state_dict(state)
        self._pool.load_state_dict(state)
        self._mixture.load_state_dict(state)
        self._drawn_at = np.array(state["drawn_at"], np.int32)
        self._num_draws = int(state["num_draws"])
        _restore_rng(self._rng, state["rng"])

    def _bucket(self, index: int) -> int:
        return int(bucket_of(self._posterior.rate(np.array([index])))[0])

    def _spread(self, size: int, *, dropped: bool) -> NDArray[np.int32]:
        """Up to `size` distinct prompts of all domains in proportion to what each has."""
        domains = range(len(self._catalogue.domains))
        cells = np.array(
            [
                [0] * len(BUCKETS) + [self._pool.num_dropped(d)]
                if dropped
                else [*self._pool.counts(d), 0]
                for d in domains
            ],
            np.float64,
        )
        if size == 0 or cells.sum() == 0:
            return np.empty(0, np.int32)
        upto = np.cumsum(cells.ravel())
        cells_at, fractions = self._rng.random((2, size))
        cell = np.searchsorted(upto, cells_at * upto[-1], side="right")
        picked = [
            self._pool.pick(int(c // cells.shape[1]), np.array([c % cells.shape[1]]), f[None])
            for c, f in zip(cell, fractions, strict=True)
        ]
        return np.unique(np.concatenate(picked))

    def _candidates(self, domain: int, weights: NDArray[np.float64]) -> NDArray[np.int32]:
        """Distinct prompts of a domain, buckets by weight; those drawn lately only if all were,
        and then the one that waits longest."""
        upto = np.cumsum(weights)
        buckets_at, fractions = self._rng.random((2, self._settings.candidates))
        buckets = np.searchsorted(upto, buckets_at * upto[-1], side="right")
        candidates = np.unique(self._pool.pick(domain, buckets, fractions))
        drawn_at = self._drawn_at[candidates]
        fresh = (drawn_at == 0) | (self._num_draws - drawn_at >= self._cooldown)
        if not fresh.any():
            fresh = drawn_at == drawn_at.min()
        allowed: NDArray[np.int32] = candidates[fresh]
        return allowed

    def _any(self, candidates: NDArray[np.int32]) -> int:
        return int(candidates[self._rng.integers(len(candidates))])

    def _most_promising(self, candidates: NDArray[np.int32]) -> int:
        signal, no_signal = self._posterior.signal(candidates, self._group_size)
        passed = no_signal <= self._settings.max_no_signal
        if not passed.any():
            return int(candidates[no_signal.argmin()])
        candidates, signal = candidates[passed], signal[passed]
        ties_broken, which = self._rng.random(len(candidates)), self._rng.random()
        best = np.lexsort((ties_broken, -signal))[: max(1, len(candidates) // 4)]
        upto = np.cumsum(signal[best])
        return int(candidates[best[np.searchsorted(upto, which * upto[-1], side="right")]])


class UniformSampler(_OfDomains):
    """The baseline: each domain's prompts in shuffled passes, whatever their difficulty."""

    def __init__(self, catalogue: PromptCatalogue, mixture: DomainMixture, *, seed: int) -> None:
        self._catalogue = catalogue
        self._mixture = mixture
        self._rng = np.random.default_rng(seed)
        # Prompts by domain; each domain's part is reshuffled whenever it has been gone through.
        self._order = np.argsort(catalogue.domain, kind="stable").astype(np.int32)
        sizes = list(catalogue.sizes().values())
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._drawn = np.array(sizes)

    def draw(self, domain_name: str) -> Prompt:
        domain = self._catalogue.domains.index(domain_name)
        part = self._order[self._starts[domain] : self._starts[domain + 1]]
        if self._drawn[domain] == len(part):
            self._rng.shuffle(part)
            self._drawn[domain] = 0
        index = int(part[self._drawn[domain]])
        self._drawn[domain] += 1
        return self._catalogue.prompts[index]

    def observe(
        self,
        prompt_id: str,
        num_scored: int,  # noqa: ARG002 (difficulty is nothing to it)
        num_correct: int,  # noqa: ARG002
        step: int,  # noqa: ARG002
    ) -> None:
        """Learns nothing about prompts. Raises DataError for one that is not of this curriculum."""
        self._catalogue.index_of(prompt_id)

    def pool(self) -> dict[str, dict[str, int]]:
        """Nothing is known of any prompt's difficulty."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Numpy arrays without objects, so that `numpy.savez` stores them unpickled."""
        return {
            **self._mixture.state_dict(),
            "fingerprint": np.array(self._catalogue.fingerprint),
            "order": self._order.copy(),
            "drawn": self._drawn.copy(),
            "rng": _rng_state(self._rng),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Draws go on as they would have. Raises DataError for the state of other prompts."""
        self._catalogue.check_state(state)
        self._mixture.load_state_dict(state)
        self._order = np.array(state["order"], np.int32)
        self._drawn = np.array(state["drawn"], np.int64)
        _restore_rng(self._rng, state["rng"])


def build_curriculum(
    prompts: Sequence[Prompt],
    verdicts: Sequence[Verdict],
    settings: CurriculumSettings,
    group_size: int,
    seed: int,
    batch_size: int = 1,
) -> DifficultySampler | UniformSampler:
    """The curriculum that the settings name, started from a judge's verdicts.

    Every batch of `batch_size` groups is within one of its domain quotas. Raises SettingsError for
    quotas that do not fit the prompts, DataError for no prompts or duplicates among them.
    """
    catalogue = PromptCatalogue(prompts)
    sizes = catalogue.sizes()
    quotas = settings.quotas if settings.quotas is not None else sizes
    check_quotas(quotas, sizes)
    mixture = DomainMixture(quotas, batch_size, fixed=settings.fixed_quotas)
    if settings.kind == "uniform":
        return UniformSampler(catalogue, mixture, seed=seed)
    posterior = PosteriorState(catalogue, settings.forgetting)
    posterior.warm_start(verdicts, settings.prior_strength)
    return DifficultySampler(
        catalogue, mixture, posterior, settings, group_size=group_size, seed=seed
    )


def _buckets(posterior: PosteriorState, size: int) -> NDArray[np.int8]:
    """Of all prompts, in blocks: at once this would take more memory than all that is kept."""
    buckets = np.empty(size, np.int8)
    for start in range(0, size, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, size))
        buckets[block] = bucket_of(posterior.rate(block))
    return buckets


def _rng_state(rng: np.random.Generator) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(rng.bit_generator.state).encode(), np.uint8)


def _restore_rng(rng: np.random.Generator, state: NDArray[np.uint8]) -> None:
    rng.bit_generator.state = json.loads(state.tobytes())
