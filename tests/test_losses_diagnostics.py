"""How far learner, engine and reference are apart, by the age of the tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posttrain.losses.diagnostics import diagnostic_sums, summarise
from posttrain.losses.objective import LossShare


def sums_of(ratio, clipped, mask, ages, ref_kl=None, max_age=2):
    """`clipped` and `ref_kl` are of the loss tokens."""
    ratio = torch.tensor([ratio], dtype=torch.float64)
    return diagnostic_sums(
        ratio.log() - 1.0,
        torch.full_like(ratio, 0.25),
        {
            "rollout_logprobs": torch.full_like(ratio, -1.0),
            "loss_mask": torch.tensor([mask]),
            "ages": torch.tensor([ages]),
        },
        LossShare(
            loss=torch.tensor(0.0),
            clipped=torch.tensor(clipped),
            ref_kl=None if ref_kl is None else torch.tensor(ref_kl),
        ),
        max_age,
    )


def test_diagnostics_by_hand():
    # The third token is not trained; the last one is older than the last bin.
    sums = sums_of(
        [1.0, 2.0, 9.0, 0.5], [False, True, False], [1.0, 1.0, 0.0, 1.0], [0, 1, 1, 5], [1.0, 2, 6]
    )
    assert sums["tokens"].tolist() == [1, 1, 1]
    assert sums["clipped"].tolist() == [0, 1, 0]
    assert sums["ref_kl"].tolist() == [1, 2, 6]
    metrics = summarise(sums)
    assert metrics["ess"] == pytest.approx(3.5**2 / (3 * 5.25))
    k3 = [0.0, 1 - np.log(2), -0.5 + np.log(2)]
    assert metrics["k3"] == pytest.approx(np.mean(k3))
    assert metrics["k3_age_0"] == 0
    assert metrics["k3_age_2"] == pytest.approx(k3[2])
    assert metrics["clipped_fraction"] == pytest.approx(1 / 3)
    assert metrics["clipped_fraction_age_1"] == 1
    assert metrics["entropy"] == pytest.approx(0.25)
    assert metrics["ref_kl"] == 3


def test_diagnostics_add_up_over_micro_batches():
    ratio, clipped, ages = [1.0, 2.0, 0.5, 3.0], [False, True, False, True], [0, 0, 2, 2]
    ref_kl = [0.1, 0.2, 0.3, 0.4]
    whole = sums_of(ratio, clipped, [1.0] * 4, ages, ref_kl)
    halves = [
        sums_of(ratio[p], clipped[p], [1.0] * len(ratio[p]), ages[p], ref_kl[p])
        for p in (slice(0, 1), slice(1, 4))
    ]
    added = {name: halves[0][name] + halves[1][name] for name in whole}
    assert summarise(added) == pytest.approx(summarise(whole))
    assert "k3_age_1" not in summarise(whole)


def test_without_a_reference_there_is_no_divergence_from_it():
    assert "ref_kl" not in summarise(sums_of([1.0], [False], [1.0], [0]))
