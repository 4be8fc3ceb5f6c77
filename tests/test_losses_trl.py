"""Every policy loss that TRL has too, against the code of TRL's own `GRPOTrainer`.

Where the conventions differ on purpose:
- TRL's ratio is against `old_per_token_logps`, which it recomputes or takes for π_θ; ours is
  against the engine's, which TRL is handed here in that place. With `tis_max` both keep a π_old.
- TRL's grpo, bnpo and dr_grpo divide by what a micro-batch holds and average the micro-batches.
  Ours divide by counts of the whole batch. Equal while all micro-batches are equally large.
- TRL multiplies what it masks by 0, ours never looks at it. TRL gets zeros there.
- `epsilon_high` of TRL's cispo is our `c_max`; its gspo is `importance_sampling_level="sequence"`.
"""

from __future__ import annotations

from collections import defaultdict
from importlib import import_module
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from loss_sequences import denominators, gradients, random_sequence, share_of
from torch.nn.utils.rnn import pad_sequence

from posttrain.losses.settings import LossSettings

MAX_TOKENS = 20
LENGTHS = [3, 9, 1, 14, 6, 6, 11, 4]
IN_TRL = {
    "cispo": {"loss_type": "cispo"},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}


@pytest.fixture(scope="module")
def trainer_class():
    with pytest.MonkeyPatch.context() as patch:
        # TRL would import vLLM for its own generation, and warns of its version.
        patch.setattr(import_module("trl.import_utils"), "is_vllm_available", lambda **_: False)
        return import_module("trl.trainer.grpo_trainer").GRPOTrainer


def trl_trainer(trainer_class, settings, accumulation, **changes):
    """A `GRPOTrainer` with what `_compute_loss` reads, and no model or data."""
    trainer = trainer_class.__new__(trainer_class)
    attributes = {
        "args": SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=accumulation
        ),
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        "current_gradient_accumulation_steps": accumulation,
        "max_completion_length": MAX_TOKENS,
        "importance_sampling_level": "token",
        "epsilon_low": settings.eps_low,
        "epsilon_high": settings.c_max or settings.eps_high,
        "beta": settings.kl_coefficient,
        "use_vllm": settings.tis_max is not None,
        "vllm_importance_sampling_correction": True,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list)},
    }
    for name, value in (attributes | IN_TRL[settings.kind] | changes).items():
        setattr(trainer, name, value)
    return trainer


def trl_loss(trainer, sequences, settings, num_loss_tokens):
    """What TRL's `_compute_loss` makes of one micro-batch of completions `[B, T]`."""

    def padded(field):
        rows = [getattr(s, field).where(s.loss_mask.bool(), 0.0) for s in sequences]
        return pad_sequence(rows, batch_first=True)

    mask = padded("loss_mask")
    logprobs, old, rollout = padded("logprobs"), padded("old_logprobs"), padded("rollout_logprobs")
    entropies = torch.zeros_like(logprobs)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, entropies, None)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :0],
        "prompt_mask": ids[:, :0],
        "completion_ids": ids,
        "completion_mask": mask,
        # A sequence has one advantage; completions start with a token that is trained.
        "advantages": torch.stack([s.advantages[s.loss_mask.bool()][0] for s in sequences]),
        "old_per_token_logps": rollout if settings.tis_max is None else old,
        "ref_per_token_logps": padded("ref_logprobs"),
        "num_items_in_batch": torch.tensor(float(num_loss_tokens)),
    }
    if settings.tis_max is not None:
        # As `_generate_and_score_completions` has it in the mode token_truncate.
        inputs["importance_sampling_ratio"] = torch.exp(old - rollout).clamp(max=settings.tis_max)
    return trainer._compute_loss(None, inputs)


def random_batch(settings):
    """Sequences some of whose ratios meet the bounds, those of π_old and π_rollout too."""
    drift = {"cispo": 1.5, "gspo": 3e-3}.get(settings.kind, 0.3)
    return [
        random_sequence(
            seed,
            [False] * 2 + [True] * length,
            drift=drift,
            mismatch=drift if settings.tis_max is None else 1.0,
        )
        for seed, length in enumerate(LENGTHS)
    ]


def assert_equal(ours, theirs, sequences):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    found = gradients(ours, sequences)
    for mine, reference in zip(found, gradients(theirs, sequences), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-6)
    assert max(gradient.abs().max() for gradient in found) > 1e-3


@pytest.mark.parametrize(
    ("kind", "kl_coefficient", "tis_max", "accumulation"),
    list(product(IN_TRL, [0.0, 0.04], [None, 2.0], [1, 2])),
)
def test_loss_and_gradient_are_those_of_trl(
    trainer_class, kind, kl_coefficient, tis_max, accumulation
):
    settings = LossSettings(kind=kind, kl_coefficient=kl_coefficient, tis_max=tis_max)
    sequences = random_batch(settings)
    over = denominators(sequences, MAX_TOKENS)
    share = share_of([sequences[:3], sequences[3:]], over, settings)
    assert 0 < share.clipped.sum() < over.num_loss_tokens
    trainer = trl_trainer(trainer_class, settings, accumulation)
    theirs = sum(
        trl_loss(trainer, micro_batch, settings, over.num_loss_tokens)
        for micro_batch in (sequences[i::accumulation] for i in range(accumulation))
    )
    assert share.loss.dtype is torch.float64
    assert_equal(share.loss, theirs, sequences)


def test_other_bounds_are_those_of_trl(trainer_class):
    for settings in (
        LossSettings(c_max=1.5),
        LossSettings(kind="grpo", eps_low=0.05, eps_high=0.1),
        LossSettings(kind="gspo", eps_low=1e-3, eps_high=1e-4),
    ):
        sequences = random_batch(settings)
        over = denominators(sequences, MAX_TOKENS)
        theirs = trl_loss(
            trl_trainer(trainer_class, settings, 1), sequences, settings, over.num_loss_tokens
        )
        assert_equal(share_of([sequences], over, settings).loss, theirs, sequences)


def test_trls_clip_ratios_are_our_clipped_tokens(trainer_class):
    settings = LossSettings(kind="dapo")
    sequences = random_batch(settings)
    over = denominators(sequences, MAX_TOKENS)
    trainer = trl_trainer(trainer_class, settings, 1)
    trl_loss(trainer, sequences, settings, over.num_loss_tokens)
    (theirs,) = trainer._metrics["train"]["clip_ratio/region_mean"]
    assert share_of([sequences], over, settings).clipped.double().mean().item() == pytest.approx(
        theirs, abs=1e-6
    )


def test_bnpo_is_dapo_until_the_batch_is_split(trainer_class):
    """TRL's bnpo is a token mean per micro-batch, so a token's weight depends on its neighbours."""
    settings = LossSettings(kind="dapo")
    sequences = random_batch(settings)
    over = denominators(sequences, MAX_TOKENS)
    whole = trl_trainer(trainer_class, settings, 1, loss_type="bnpo")
    ours = share_of([sequences], over, settings).loss
    assert_equal(ours, trl_loss(whole, sequences, settings, over.num_loss_tokens), sequences)

    parts = trl_trainer(trainer_class, settings, 2, loss_type="bnpo")
    split = [
        trl_loss(parts, part, settings, over.num_loss_tokens)
        for part in (sequences[:3], sequences[3:])
    ]
    assert abs(sum(split) - ours) > 1e-3


def test_a_grpo_split_in_unequal_parts_changes_trls_loss_and_not_ours(trainer_class):
    settings = LossSettings(kind="grpo")
    sequences = random_batch(settings)
    over = denominators(sequences, MAX_TOKENS)
    parts = (sequences[:1], sequences[1:])
    ours = share_of([sequences], over, settings).loss
    torch.testing.assert_close(sum(share_of([part], over, settings).loss for part in parts), ours)
    trainer = trl_trainer(trainer_class, settings, 2)
    theirs = sum(trl_loss(trainer, part, settings, over.num_loss_tokens) for part in parts)
    assert abs(theirs - ours) > 1e-3
