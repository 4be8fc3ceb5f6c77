"""Sequences of many lengths into rows without much padding, rows into micro-batches.

Several short rows instead of one long one, because dense attention costs the square of a row's
length where no kernel for packed sequences exists (SDPA on CPU). A group's answers have one prompt,
which is computed once for as many of them as fit into a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from posttrain.types import MicroBatch, PolicyVersion, TrainingBatch, TrainingSample

_LENGTH_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class _Segment:
    """Samples that start with the same `shared` tokens, which are laid out once."""

    samples: list[TrainingSample]
    shared: int

    @property
    def length(self) -> int:
        return self.shared + sum(_length(sample) - self.shared for sample in self.samples)


Row = list[_Segment]


def pack(
    samples: Sequence[TrainingSample],
    *,
    row_tokens: int,
    micro_tokens: int,
    pad_token_id: int,
    current: PolicyVersion,
    teacher_weight: float | None = None,
    share_prompts: bool = False,
) -> TrainingBatch:
    """Pack `samples` by first-fit-decreasing; the same samples always give the same batch.

    A row holds up to `row_tokens` tokens; a longer sample has a row of its own. With
    `share_prompts`, samples of one prompt lie behind it, longest first, as many as a row holds.
    A micro-batch takes rows of similar length up to `micro_tokens` tokens, but at least one; its L
    is the longest of them, rounded up to a multiple of 8, so micro-batches differ in shape. `ages`
    are `current.step` minus the step of the sample's oldest token, on all of its own tokens, and 0
    on padding and shared prompts.

    The split changes neither loss nor gradient: `num_loss_tokens` and `num_sequences` count the
    whole batch, and no sequence spans two micro-batches.

    With a `teacher_weight`, the samples' `teacher_logprobs` are packed too.
    """
    assert samples, "an optimizer step needs at least one sample"
    # The log-probability of a sequence's first token would come from the sequence before it.
    assert all(sample.loss_mask[0] == 0 for sample in samples), "a sample starts without a prompt"
    segments = [_Segment([sample], 0) for sample in samples]
    if share_prompts:
        segments = list(_by_prompt(samples, row_tokens))
    rows = _first_fit_decreasing(segments, row_tokens)
    return TrainingBatch(
        micro_batches=tuple(
            _micro_batch(group, pad_token_id, current, taught=teacher_weight is not None)
            for group in _group_rows(rows, micro_tokens)
        ),
        num_loss_tokens=int(sum(sample.loss_mask.sum() for sample in samples)),
        num_sequences=len(samples),
        teacher_weight=teacher_weight,
    )


def deal(batch: TrainingBatch, num_ranks: int) -> tuple[TrainingBatch, ...]:
    """One share per rank, all with the same number of micro-batches, since ranks meet after each.

    Micro-batches that stand at one place of their shares are about equally large. Where their
    number is no multiple of `num_ranks` the largest are halved between rows, and where no more
    rows are left, micro-batches without a loss token fill up. Denominators stay the whole batch's.
    """
    micro_batches = list(batch.micro_batches)
    while len(micro_batches) % num_ranks:
        largest = max(micro_batches, key=lambda m: (len(m.token_ids) > 1, m.token_ids.size))
        if len(largest.token_ids) == 1:
            micro_batches.append(_empty_micro_batch())
            continue
        middle = len(largest.token_ids) // 2
        position = next(i for i, m in enumerate(micro_batches) if m is largest)
        halves = [_rows(largest, slice(None, middle)), _rows(largest, slice(middle, None))]
        micro_batches[position : position + 1] = halves
    micro_batches.sort(key=lambda m: m.token_ids.size, reverse=True)
    return tuple(
        TrainingBatch(
            micro_batches=tuple(micro_batches[rank::num_ranks]),
            num_loss_tokens=batch.num_loss_tokens,
            num_sequences=batch.num_sequences,
            teacher_weight=batch.teacher_weight,
        )
        for rank in range(num_ranks)
    )


def _rows(batch: MicroBatch, rows: slice) -> MicroBatch:
    chosen: dict[str, Any] = {}
    for name in (f.name for f in fields(MicroBatch)):
        array = getattr(batch, name)
        chosen[name] = None if array is None else array[rows]
    return MicroBatch(**chosen)


def _by_prompt(samples: Sequence[TrainingSample], row_tokens: int) -> Iterator[_Segment]:
    """Of each prompt the longest answers first, as many together as a row holds."""
    groups: dict[bytes, list[TrainingSample]] = {}
    for sample in samples:
        prompt = sample.token_ids[: _shareable(sample) + 1]
        groups.setdefault(prompt.tobytes(), []).append(sample)
    for group in groups.values():
        shared = _shareable(group[0])
        together: list[TrainingSample] = []
        for sample in sorted(group, key=_length, reverse=True):
            if together and _behind(shared, [*together, sample]).length > row_tokens:
                yield _behind(shared, together)
                together = []
            together.append(sample)
        yield _behind(shared, together)


def _behind(shared: int, samples: list[TrainingSample]) -> _Segment:
    """One sample shares with nobody."""
    return _Segment(samples, shared if len(samples) > 1 else 0)


def _shareable(sample: TrainingSample) -> int:
    """The prompt but its last token: from there the log-probability of the answer's first comes,
    so each answer has it before it."""
    return int(sample.loss_mask.argmax()) - 1 if sample.loss_mask.any() else 0


def _first_fit_decreasing(segments: Sequence[_Segment], row_tokens: int) -> list[Row]:
    """Rows from the fullest to the emptiest."""
    rows: list[Row] = []
    free: list[int] = []
    for segment in sorted(segments, key=lambda s: s.length, reverse=True):
        length = segment.length
        index = next((i for i, room in enumerate(free) if room >= length), len(rows))
        if index == len(rows):
            rows.append([])
            free.append(row_tokens)
        rows[index].append(segment)
        free[index] -= length
    return sorted(rows, key=_row_length, reverse=True)


def _group_rows(rows: Sequence[Row], micro_tokens: int) -> Iterator[Sequence[Row]]:
    start = 0
    while start < len(rows):
        end = start + max(1, micro_tokens // _round_up(_row_length(rows[start])))
        yield rows[start:end]
        start = end


def _micro_batch(
    rows: Sequence[Row], pad_token_id: int, current: PolicyVersion, *, taught: bool
) -> MicroBatch:
    shape = (len(rows), _round_up(max(_row_length(row) for row in rows)))
    token_ids = np.full(shape, pad_token_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    sequence_ids = np.full(shape, -1, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=np.float32)
    rollout_logprobs = np.zeros(shape, dtype=np.float32)
    advantages = np.zeros(shape, dtype=np.float32)
    ages = np.zeros(shape, dtype=np.int64)
    teacher_logprobs = np.full(shape, np.nan, dtype=np.float32) if taught else None
    number = 0
    for r, row in enumerate(rows):
        start = 0
        for sample, own in (pair for segment in row for pair in _laid_out(segment)):
            here = slice(start, start + own.stop - own.start)
            token_ids[r, here] = sample.token_ids[own]
            position_ids[r, here] = np.arange(own.start, own.stop)
            start = here.stop
            if own.stop < _length(sample):
                continue  # a prompt that several share
            sequence_ids[r, here] = number
            loss_mask[r, here] = sample.loss_mask[own]
            rollout_logprobs[r, here] = sample.rollout_logprobs[own]
            advantages[r, here] = sample.advantages[own]
            ages[r, here] = current.step - sample.oldest_version.step
            if teacher_logprobs is not None and sample.teacher_logprobs is not None:
                teacher_logprobs[r, here] = sample.teacher_logprobs[own]
            number += 1
        position_ids[r, start:] = np.arange(shape[1] - start)
        sequence_ids[r, start:] = number
        number += 1
    return MicroBatch(
        token_ids=token_ids,
        position_ids=position_ids,
        sequence_ids=sequence_ids,
        loss_mask=loss_mask,
        rollout_logprobs=rollout_logprobs,
        advantages=advantages,
        ages=ages,
        teacher_logprobs=teacher_logprobs,
    )


def _laid_out(segment: _Segment) -> Iterator[tuple[TrainingSample, slice]]:
    """Which tokens of which sample come one after the other."""
    if segment.shared:
        yield segment.samples[0], slice(0, segment.shared)
    for sample in segment.samples:
        yield sample, slice(segment.shared, _length(sample))


def _empty_micro_batch() -> MicroBatch:
    shape = (1, _LENGTH_MULTIPLE)
    nothing = np.zeros(shape, dtype=np.float32)
    return MicroBatch(
        token_ids=np.zeros(shape, dtype=np.int64),
        position_ids=np.arange(_LENGTH_MULTIPLE, dtype=np.int64)[None],
        sequence_ids=np.zeros(shape, dtype=np.int64),
        loss_mask=nothing,
        rollout_logprobs=nothing,
        advantages=nothing,
        ages=np.zeros(shape, dtype=np.int64),
    )


def _length(sample: TrainingSample) -> int:
    return len(sample.token_ids)


def _row_length(row: Row) -> int:
    return sum(segment.length for segment in row)


def _round_up(length: int) -> int:
    return -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
