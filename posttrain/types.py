"""Frozen records and Protocols that flow through every part of posttrain.

This module imports nothing of ours and nothing heavy. Each step of the pipeline makes a *new*
type (`Prompt` → `Rollout` → `RolloutGroup` → `TrainingSample` → `TrainingBatch`), so that a
missing reward or advantage cannot be represented.

Four log-probabilities stay apart by name everywhere: `rollout_logprobs` (the engine's, at
sampling time), `old_logprobs` (the learner's when a step starts), `logprobs` (the learner's, with
gradient) and `ref_logprobs` (a frozen reference). All are natural logarithms (nats).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float32]
    IntArray = NDArray[np.int64]


class Outcome(StrEnum):
    """What became of one scored answer. All but `INFRASTRUCTURE` are the answer's own doing."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    TRUNCATED = "truncated"
    LIMIT = "limit"
    INFRASTRUCTURE = "infrastructure"


class DrawOutcome(StrEnum):
    """How a draw ended. A draw without one is in flight."""

    TRAINED = "trained"
    ZERO_ADVANTAGE = "zero_advantage"
    STALE = "stale"
    ERRORED = "errored"
    CANCELLED = "cancelled"
    UNUSED = "unused"


class Label(StrEnum):
    """How difficult a prompt is for a critic. `UNSOLVED` never means impossible."""

    EASY = "easy"
    MEDIUM = "medium"
    HARD = "hard"
    UNSOLVED = "unsolved"


class Action(StrEnum):
    """What selection does with a prompt."""

    KEEP = "keep"
    DROP = "drop"
    RETEST = "retest"


class PolicyVersion(NamedTuple):
    """(attempt, step): never reused, ordered, `step` counts optimizer steps of the RL stage."""

    attempt: int
    step: int

    def __str__(self) -> str:
        return f"{self.attempt}.{self.step}"

    @classmethod
    def parse(cls, text: str) -> PolicyVersion:
        """Inverse of `str`; raises ValueError on anything else."""
        attempt, _, step = text.partition(".")
        return cls(int(attempt), int(step))


class VersionSpan(NamedTuple):
    """Completion tokens `[start, end)` were written by `version`."""

    start: int
    end: int
    version: PolicyVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A task. `prompt_id` is the hash of `messages`; `reference` is never shown to the policy.

    `metadata["verifier"]` names the verifier that scores answers, when the task's source sets it.
    """

    prompt_id: str
    messages: tuple[Message, ...]
    reference: Any
    domain: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemInstruction:
    """A system message that a group may be drawn with. `name` is recorded, `text` is shown;
    an answer that follows it matches the regular expression `pattern` in full (None: unchecked).
    """

    name: str
    text: str
    weight: float = 1.0
    pattern: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTRow:
    """One supervised example. Several rows may share a prompt."""

    row_id: str
    prompt: Prompt
    completion: str
    system: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn. Training samples keep `top_p=1`: else the ratio is biased."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """`num_rollouts` completions of one tokenised prompt. `request_id` is unique in a run."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    num_rollouts: int
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One completion: P prompt tokens, C completion tokens (an end-of-turn token included)."""

    rollout_id: str
    draw_id: str
    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    version_spans: tuple[VersionSpan, ...]

    @property
    def truncated(self) -> bool:
        """The engine stopped it for length, not the policy."""
        return self.finish_reason == "length"

    @property
    def oldest_version(self) -> PolicyVersion:
        return min(span.version for span in self.version_spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A score. `correctness` is the raw verifier score in [0, 1] that difficulty and gates read;
    `value` is what trains: correctness and shaping terms combined. Both are None exactly when the
    outcome is `INFRASTRUCTURE` (unscored).
    """

    value: float | None
    correctness: float | None
    outcome: Outcome
    components: Mapping[str, float] = field(default_factory=dict)
    explanation: str = ""

    def __post_init__(self) -> None:
        unscored = self.outcome is Outcome.INFRASTRUCTURE
        if (self.value is None) != unscored or (self.correctness is None) != unscored:
            raise ValueError(f"value and correctness are None exactly when unscored, got {self}")

    @property
    def correct(self) -> bool:
        return self.outcome is Outcome.CORRECT


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """G completions of one draw with their G rewards, and the system instruction they saw."""

    draw_id: str
    prompt: Prompt
    system: str | None
    sampling: Sampling
    rollouts: tuple[Rollout, ...]
    rewards: tuple[Reward, ...]

    def __post_init__(self) -> None:
        if len(self.rollouts) != len(self.rewards):
            raise ValueError(f"{len(self.rollouts)} rollouts with {len(self.rewards)} rewards")

    @property
    def num_scored(self) -> int:
        return sum(r.value is not None for r in self.rewards)

    @property
    def num_correct(self) -> int:
        return sum(r.correct for r in self.rewards)

    @property
    def oldest_version(self) -> PolicyVersion:
        return min(rollout.oldest_version for rollout in self.rollouts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a critic's answers say about a prompt's difficulty. `posterior` is Beta(a, b).

    `critic` is the checkpoint's fingerprint, `sampling` what the samples were drawn with
    (temperature, max_tokens, template hash, system instruction). `num_samples` leaves out
    infrastructure errors; `outcomes` counts every sample, those included.
    """

    prompt_id: str
    judge: str
    critic: str
    num_samples: int
    num_correct: int
    outcomes: Mapping[Outcome, int]
    posterior: tuple[float, float]
    label: Label
    decided_by: str
    sampling: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What selection did with a prompt, by which rule, resting on which verdict."""

    prompt_id: str
    action: Action
    rule: str
    reason: str
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingSample:
    """One sequence for the learner, every array `[T]` (prompt and completion tokens).

    `loss_mask` is 1 on completion tokens. `rollout_logprobs` and `advantages` are 0 where it is 0.
    `teacher_logprobs` are NaN there; None where no teacher was asked, or none answered in time.
    """

    token_ids: IntArray
    loss_mask: FloatArray
    rollout_logprobs: FloatArray
    advantages: FloatArray
    oldest_version: PolicyVersion
    teacher_logprobs: FloatArray | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """R packed rows of L tokens, every array `[R, L]`.

    `sequence_ids` number the sequences of the micro-batch; padding forms one of its own at the end
    of a row. Sequences with the same prompt may share its tokens, which have no sequence (-1): but
    for the last one, they stand once before those that share them. `position_ids` count from the
    start of the prompt, so they are 0 where a sequence starts that shares nothing, or a shared
    prompt. Token t's log-probability, mask and advantage stand at index t (not shifted).
    `teacher_logprobs` are NaN where there are none; None without a teacher.
    """

    token_ids: IntArray
    position_ids: IntArray
    sequence_ids: IntArray
    loss_mask: FloatArray
    rollout_logprobs: FloatArray
    advantages: FloatArray
    ages: IntArray
    teacher_logprobs: FloatArray | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingBatch:
    """What one optimizer step trains on. `num_loss_tokens` is the denominator of every
    micro-batch's loss, fixed before the split, so that the split changes nothing.
    `teacher_weight` λ weighs log q − log π_θ beside the advantages; None without a teacher."""

    micro_batches: tuple[MicroBatch, ...]
    num_loss_tokens: int
    num_sequences: int
    teacher_weight: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Chosen against rejected completion of one prompt; `corner_case` says what it mends, `margin`
    by how much the chosen one was rewarded more (None: they were not scored)."""

    prompt: Prompt
    system: str | None
    chosen: str
    rejected: str
    corner_case: str
    margin: float | None


class Generator(Protocol):
    """Answers prompts. Never waits for training; weights may change under running requests."""

    async def generate(self, request: GenerationRequest) -> tuple[Rollout, ...]: ...


class ObservedGenerator(Generator, Protocol):
    """One that can say how far it is."""

    async def tokens_written(self, request_id: str) -> int | None:
        """Of the longest completion of a request that is being answered; None if none is."""
        ...


class Scorer(Protocol):
    """Scores the answers to one prompt, in order. An answer that could not be scored comes back
    with outcome `INFRASTRUCTURE`; it never raises for what an answer contains."""

    async def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], system: SystemInstruction | None
    ) -> tuple[Reward, ...]: ...


class Learner(Protocol):
    """Owns the policy's training weights."""

    async def step(self, batch: TrainingBatch) -> Mapping[str, float]:
        """One optimizer step; returns its metrics."""
        ...


class Publisher(Protocol):
    """Brings the learner's current weights to every generator."""

    async def publish(self, version: PolicyVersion) -> Mapping[str, float]:
        """Returns metrics (pause seconds, …) once every generator has confirmed `version`."""
        ...


class Curriculum(Protocol):
    """Picks what to draw next and learns from what became of it."""

    def next_batch(self) -> list[str]:
        """The domain of each group of the next batch that is planned."""
        ...

    def gated(self, domain: str, *, trainable: bool) -> None:
        """Learns whether a draw from `domain` came to a group that can be trained."""
        ...

    def instead_of(self, domain: str) -> str:
        """The domain to draw from after a draw from `domain` ended untrained; mostly the same."""
        ...

    def draw(self, domain_name: str) -> Prompt: ...

    def observe(self, prompt_id: str, num_scored: int, num_correct: int, step: int) -> None: ...

    def pool(self) -> dict[str, dict[str, int]]:
        """Domain -> difficulty bucket, or `dropped` -> how many prompts."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
