"""How a batch is laid out changes nothing: order, rows, padding, micro-batches, ranks."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_sequences import denominators, gradients, random_sequence, share_of
from torch import Tensor

from posttrain.losses.objective import OBJECTIVES
from posttrain.losses.settings import LossSettings

MAX_TOKENS = 30


class MicroBatch(NamedTuple):
    rows: list[list[int]]
    num_padding: int


@st.composite
def in_pieces(draw, items):
    """`items` in order, neighbours together or apart."""
    pieces = [[items[0]]]
    for item in items[1:]:
        if draw(st.booleans()):
            pieces.append([])
        pieces[-1].append(item)
    return pieces


@st.composite
def batches(draw):
    """Loss masks of a few sequences; and ranks of micro-batches of rows of their numbers."""
    # The second token of the first one is trained, else the batch would have no loss token.
    masks = draw(st.lists(st.lists(st.booleans(), max_size=7), min_size=1, max_size=7))
    masks = [[False, True, *masks[0]], *([False, *mask] for mask in masks[1:])]
    rows = draw(in_pieces(draw(st.permutations(range(len(masks))))))
    micro_batches = [MicroBatch(piece, draw(st.integers(0, 3))) for piece in draw(in_pieces(rows))]
    return masks, draw(in_pieces(micro_batches))


class Total(NamedTuple):
    """Of a whole batch: what its ranks' shares and their gradients add up to."""

    loss: Tensor
    gradients: list[Tensor]
    num_clipped: int
    ref_kl: float


def total(ranks, sequences, over, loss_settings):
    loss, sums, num_clipped, ref_kl = 0.0, [0.0] * len(sequences), 0, 0.0
    for rank in ranks:
        shares = [
            share_of(
                [[sequences[i] for i in row] for row in micro_batch.rows],
                over,
                loss_settings,
                num_padding=micro_batch.num_padding,
            )
            for micro_batch in rank
        ]
        of_rank = sum(share.loss for share in shares)
        loss += of_rank.detach()
        sums = [a + b for a, b in zip(sums, gradients(of_rank, sequences), strict=True)]
        num_clipped += sum(int(share.clipped.sum()) for share in shares)
        ref_kl += sum(float(share.ref_kl.sum()) for share in shares if share.ref_kl is not None)
    return Total(loss, sums, num_clipped, ref_kl)


@pytest.mark.parametrize("kind", OBJECTIVES)
@settings(max_examples=60)
@given(
    batch=batches(),
    seed=st.integers(0, 1000),
    kl_coefficient=st.sampled_from([0.0, 0.1]),
    tis_max=st.sampled_from([None, 2.0]),
)
def test_the_layout_changes_neither_loss_nor_gradient(kind, batch, seed, kl_coefficient, tis_max):
    masks, ranks = batch
    drift = {"cispo": 1.5, "gspo": 5e-4}.get(kind, 0.3)
    mismatch = drift if tis_max is None else 1.0
    sequences = [
        random_sequence(10 * seed + i, mask, drift=drift, mismatch=mismatch)
        for i, mask in enumerate(masks)
    ]
    over = denominators(sequences, MAX_TOKENS)
    loss_settings = LossSettings(kind=kind, kl_coefficient=kl_coefficient, tis_max=tis_max)
    found = total(ranks, sequences, over, loss_settings)

    one_by_one = [[MicroBatch([[i]], num_padding=0) for i in range(len(sequences))]]
    expected = total(one_by_one, sequences, over, loss_settings)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-9, atol=1e-12)
    for mine, reference in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)
        assert torch.isfinite(mine).all()
    assert any(gradient.any() for gradient in found.gradients) or found.num_clipped
    assert found.num_clipped == expected.num_clipped
    assert found.ref_kl == pytest.approx(expected.ref_kl)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_micro_batch_without_a_loss_token_has_a_share_of_nothing(kind):
    trained = random_sequence(0, [False, True, True], drift=0.1, mismatch=0.1)
    untrained = random_sequence(1, [False, False], drift=0.1, mismatch=0.1)
    over = denominators([trained, untrained], MAX_TOKENS)
    share = share_of([[untrained]], over, LossSettings(kind=kind, kl_coefficient=0.1))
    assert share.loss.item() == 0
    assert gradients(share.loss, [untrained])[0].tolist() == [0, 0]
    assert share.clipped.numel() == share.ref_kl.numel() == 0
