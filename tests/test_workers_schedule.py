"""Learning rates: hand-computed, and equal to transformers' after its own warm-up."""

import pytest
import torch
from transformers import get_scheduler

from posttrain.workers.schedule import learning_rate


def rates(schedule, *, warmup_steps, num_steps):
    return [
        learning_rate(
            step, peak=8.0, schedule=schedule, warmup_steps=warmup_steps, num_steps=num_steps
        )
        for step in range(num_steps)
    ]


def test_rates_computed_by_hand():
    assert rates("constant", warmup_steps=3, num_steps=6) == [2, 4, 6, 8, 8, 8]
    assert rates("linear", warmup_steps=1, num_steps=5) == [4, 8, 6, 4, 2]
    assert rates("cosine", warmup_steps=0, num_steps=4) == pytest.approx(
        [8, 4 * (1 + 2**-0.5), 4, 4 * (1 - 2**-0.5)]
    )


def test_beyond_the_last_step_nothing_is_learnt():
    for schedule in ("linear", "cosine"):
        rate = learning_rate(7, peak=1.0, schedule=schedule, warmup_steps=2, num_steps=5)
        assert rate == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine"])
def test_after_the_warm_up_it_is_that_of_transformers(schedule):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=8.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=4, num_training_steps=20)
    expected = []
    for _ in range(20):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = rates(schedule.removesuffix("_with_warmup"), warmup_steps=4, num_steps=20)
    assert ours[4:] == pytest.approx(expected[4:])
