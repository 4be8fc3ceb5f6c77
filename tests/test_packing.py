"""Packing: nothing lost, nothing twice, sequences kept apart."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.packing import deal, pack
from posttrain.types import PolicyVersion, TrainingSample

PAD = 0
CURRENT = PolicyVersion(2, 10)


def sample(prompt_length, completion_length, identity=0, step=10):
    """Ids are unique per (identity, position) and never the padding's."""
    length = prompt_length + completion_length
    mask = np.r_[np.zeros(prompt_length), np.ones(completion_length)].astype(np.float32)
    return TrainingSample(
        token_ids=identity * 1000 + np.arange(1, length + 1),
        loss_mask=mask,
        rollout_logprobs=mask * np.float32(-0.1) * (identity + 1),
        advantages=mask * np.float32(identity - 2.5),
        oldest_version=PolicyVersion(1, step),
    )


def unpack(batch):
    """(ids, mask, rollout_logprobs, advantages, ages) of each sequence, padding included."""
    for micro in batch.micro_batches:
        for r, positions in enumerate(micro.position_ids):
            starts = [*np.flatnonzero(positions == 0), len(positions)]
            for start, end in itertools.pairwise(starts):
                assert positions[start:end].tolist() == list(range(end - start))
                fields = (micro.loss_mask, micro.rollout_logprobs, micro.advantages, micro.ages)
                ids = tuple(micro.token_ids[r, start:end].tolist())
                yield (ids, *(tuple(f[r, start:end].tolist()) for f in fields))


samples_strategy = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(4, 10)), min_size=1, max_size=40
).map(lambda shapes: [sample(p, c, i, step) for i, (p, c, step) in enumerate(shapes)])


@given(samples_strategy, st.integers(8, 100), st.integers(8, 400))
def test_every_sequence_once_with_its_own_values(samples, row_tokens, micro_tokens):
    batch = pack(
        samples,
        row_tokens=row_tokens,
        micro_tokens=micro_tokens,
        pad_token_id=PAD,
        current=CURRENT,
    )
    sequences = Counter(s for s in unpack(batch) if s[0][0] != PAD)
    assert sequences == Counter(
        (
            tuple(s.token_ids.tolist()),
            tuple(s.loss_mask.tolist()),
            tuple(s.rollout_logprobs.tolist()),
            tuple(s.advantages.tolist()),
            (10 - s.oldest_version.step,) * len(s.token_ids),
        )
        for s in samples
    )
    assert batch.num_sequences == len(samples)


@given(samples_strategy, st.integers(8, 100), st.integers(8, 400))
def test_padding_trains_nothing_and_bounds_hold(samples, row_tokens, micro_tokens):
    batch = pack(
        samples,
        row_tokens=row_tokens,
        micro_tokens=micro_tokens,
        pad_token_id=PAD,
        current=CURRENT,
    )
    for ids, *values in unpack(batch):
        if ids[0] == PAD:
            assert set(ids) == {PAD}
            assert all(set(field) == {0} for field in values)
    longest = max(len(s.token_ids) for s in samples)
    for micro in batch.micro_batches:
        rows, length = micro.token_ids.shape
        assert length % 8 == 0
        assert length < max(row_tokens, longest) + 8
        assert rows == 1 or rows * length <= micro_tokens
    masks = sum(micro.loss_mask.sum() for micro in batch.micro_batches)
    assert batch.num_loss_tokens == masks == sum(s.loss_mask.sum() for s in samples)


def shapes(batch):
    return [micro.token_ids.shape for micro in batch.micro_batches]


def test_first_fit_decreasing_by_hand():
    lengths = [4, 10, 6, 12, 3, 5]
    samples = [sample(1, n - 1, i) for i, n in enumerate(lengths)]
    batch = pack(samples, row_tokens=16, micro_tokens=32, pad_token_id=PAD, current=CURRENT)
    # Largest first: 12+4, 10+6, 5+3; the last row is cut to what it holds.
    rows = [
        [int(ids[0]) // 1000 for ids, *_ in unpack(batch) if ids[0] != PAD][i : i + 2]
        for i in (0, 2, 4)
    ]
    assert rows == [[3, 0], [1, 2], [5, 4]]
    assert shapes(batch) == [(2, 16), (1, 8)]


def test_an_outlier_lengthens_only_its_own_row():
    samples = [sample(1, 7, i) for i in range(8)] + [sample(10, 90, 8)]
    batch = pack(samples, row_tokens=16, micro_tokens=32, pad_token_id=PAD, current=CURRENT)
    assert shapes(batch) == [(1, 104), (2, 16), (2, 16)]


def test_a_row_smaller_than_a_micro_batch_keeps_at_least_one_row():
    batch = pack([sample(4, 28)], row_tokens=32, micro_tokens=8, pad_token_id=PAD, current=CURRENT)
    assert shapes(batch) == [(1, 32)]


def test_equal_lengths_keep_their_order():
    samples = [sample(2, 6, i) for i in range(6)]
    settings = {"row_tokens": 16, "micro_tokens": 64, "pad_token_id": PAD, "current": CURRENT}
    batch = pack(samples, **settings)
    assert [ids[0] // 1000 for ids, *_ in unpack(batch)] == [0, 1, 2, 3, 4, 5]
    again = pack(list(samples), **settings)
    for one, other in zip(batch.micro_batches, again.micro_batches, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)


def test_age_counts_steps_across_attempts():
    batch = pack(
        [sample(2, 3, step=7)], row_tokens=8, micro_tokens=8, pad_token_id=PAD, current=CURRENT
    )
    assert batch.micro_batches[0].ages.tolist() == [[3, 3, 3, 3, 3, 0, 0, 0]]


def test_a_sequence_that_would_train_its_first_token_is_refused():
    with pytest.raises(AssertionError, match="without a prompt"):
        pack([sample(0, 4)], row_tokens=8, micro_tokens=8, pad_token_id=PAD, current=CURRENT)


@given(samples_strategy, st.integers(8, 400), st.integers(1, 5))
def test_dealing_gives_every_rank_as_many_micro_batches_and_every_sequence_once(
    samples, micro_tokens, num_ranks
):
    batch = pack(
        samples, row_tokens=64, micro_tokens=micro_tokens, pad_token_id=PAD, current=CURRENT
    )
    shares = deal(batch, num_ranks)
    assert len(shares) == num_ranks
    assert len({len(share.micro_batches) for share in shares}) == 1
    assert {(share.num_loss_tokens, share.num_sequences) for share in shares} == {
        (batch.num_loss_tokens, batch.num_sequences)
    }
    dealt = Counter(s for share in shares for s in unpack(share) if s[0][0] != PAD)
    assert dealt == Counter(s for s in unpack(batch) if s[0][0] != PAD)
    # A micro-batch without a loss token stands only where nothing was left to halve.
    micro_batches = [m for share in shares for m in share.micro_batches]
    if any(m.loss_mask.sum() == 0 for m in micro_batches):
        assert all(len(m.token_ids) == 1 for m in micro_batches)


def test_dealing_halves_the_largest_and_meets_equals():
    samples = [sample(1, 31, i) for i in range(8)] + [sample(1, 7, 8)]
    batch = pack(samples, row_tokens=32, micro_tokens=256, pad_token_id=PAD, current=CURRENT)
    assert [m.token_ids.shape for m in batch.micro_batches] == [(8, 32), (1, 8)]
    shapes = [[m.token_ids.shape for m in share.micro_batches] for share in deal(batch, 3)]
    assert shapes == [[(4, 32)], [(4, 32)], [(1, 8)]]
    assert [len(share.micro_batches) for share in deal(batch, 1)] == [2]


def test_dealing_fills_up_with_micro_batches_without_a_loss_token():
    batch = pack([sample(1, 7)], row_tokens=32, micro_tokens=256, pad_token_id=PAD, current=CURRENT)
    first, second = deal(batch, 2)
    assert [m.token_ids.shape for m in (*first.micro_batches, *second.micro_batches)] == [
        (1, 8)
    ] * 2
    (empty,) = second.micro_batches
    assert empty.loss_mask.sum() == 0
    assert empty.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


# --- shared prompts ----------------------------------------------------------------------------


def answers(prompt, lengths, first=0):
    """Samples of one prompt, `prompt` its tokens; the ids of answers are unique, ages differ."""
    made = []
    for number, length in enumerate(lengths, start=first):
        one = sample(len(prompt), length, number, step=10 - number % 3)
        ids = np.r_[np.array(prompt, dtype=np.int64), one.token_ids[len(prompt) :]]
        made.append(dataclasses.replace(one, token_ids=ids))
    return made


def put_together(batch):
    """Of each sequence (ids, mask, rollout_logprobs, advantages, ages), its shared prompt included;
    each token must stand where its position says."""
    for micro in batch.micro_batches:
        for row in range(len(micro.token_ids)):
            numbers, positions = micro.sequence_ids[row], micro.position_ids[row]
            blocks = (positions == 0).cumsum()
            for number in np.unique(numbers[numbers >= 0]):
                own = np.flatnonzero(numbers == number)
                block = blocks[own[0]]
                prompt = np.flatnonzero((numbers < 0) & (blocks == block))
                places = np.r_[prompt, own]
                assert positions[places].tolist() == list(range(len(places)))
                assert not micro.loss_mask[row, prompt].any()
                fields = (micro.loss_mask, micro.rollout_logprobs, micro.advantages)
                yield (
                    tuple(micro.token_ids[row, places].tolist()),
                    *(tuple(f[row, places].tolist()) for f in fields),
                    set(micro.ages[row, own].tolist()),
                )


groups_strategy = st.lists(
    st.tuples(st.integers(1, 20), st.lists(st.integers(1, 40), min_size=1, max_size=8)),
    min_size=1,
    max_size=8,
).map(
    lambda groups: [
        sample
        for number, (prompt, lengths) in enumerate(groups)
        for sample in answers(range(90_000 + 100 * number, 90_000 + 100 * number + prompt), lengths)
    ]
)


@given(groups_strategy, st.integers(8, 200), st.integers(8, 400), st.integers(1, 3))
def test_a_shared_prompt_belongs_to_each_of_its_answers(
    samples, row_tokens, micro_tokens, num_ranks
):
    sizes = {"row_tokens": row_tokens, "micro_tokens": micro_tokens, "pad_token_id": PAD}
    batch = pack(samples, **sizes, current=CURRENT, share_prompts=True)
    found = Counter(
        (*fields, *ages)
        for share in deal(batch, num_ranks)
        for ids, *fields, ages in put_together(share)
        for fields in [(ids, *fields)]
        if ids[0] != PAD and any(fields[1])
    )
    assert found == Counter(
        (
            tuple(s.token_ids.tolist()),
            tuple(s.loss_mask.tolist()),
            tuple(s.rollout_logprobs.tolist()),
            tuple(s.advantages.tolist()),
            10 - s.oldest_version.step,
        )
        for s in samples
    )
    longest = max(len(s.token_ids) for s in samples)
    for micro in batch.micro_batches:
        rows, length = micro.token_ids.shape
        assert length < max(row_tokens, longest) + 8
        assert rows == 1 or rows * length <= micro_tokens


def test_a_prompt_stands_once_but_for_its_last_token():
    samples = answers([7, 8, 9], [3, 2]) + answers([5], [1, 1], first=2)
    (micro,) = pack(
        samples,
        row_tokens=16,
        micro_tokens=64,
        pad_token_id=PAD,
        current=CURRENT,
        share_prompts=True,
    ).micro_batches
    assert micro.token_ids.tolist() == [
        [7, 8, 9, 4, 5, 6, 9, 1004, 1005, 5, 2002, 5, 3002, PAD, PAD, PAD]
    ]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4, 0, 1, 0, 1, 0, 1, 2]]
    assert micro.sequence_ids.tolist() == [[-1, -1, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4]]
    assert micro.loss_mask.tolist() == [[0, 0, 0, 1, 1, 1, 0, 1, 1, 0, 1, 0, 1, 0, 0, 0]]


def test_answers_that_do_not_fit_beside_each_other_repeat_the_prompt():
    samples = answers(range(50, 60), [6, 6, 6, 6])
    batch = pack(
        samples,
        row_tokens=24,
        micro_tokens=48,
        pad_token_id=PAD,
        current=CURRENT,
        share_prompts=True,
    )
    # 9 shared tokens and 7 of each answer: two answers in 23.
    assert [m.token_ids.shape for m in batch.micro_batches] == [(2, 24)]
