"""DPO's loss is TRL's: what a `dpo.trainer` table makes it of known pairs, against numbers computed
independently. A TRL that counts otherwise shows here and not in what a run has trained."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.stages.trl_settings import trainer_classes


def dpo_loss(directory: Path, table: dict[str, Any], gains: list[tuple[float, int]]) -> float:
    """Of one pair. `gains`: for chosen and rejected, by how many nats it is likelier than under the
    reference, and its tokens after a prompt of two."""
    config, trainer_class = trainer_classes("dpo")
    arguments = config(output_dir=str(directory), use_cpu=True, report_to=[], **table)
    width = 2 + max(tokens for _, tokens in gains)
    mask = torch.zeros(2, width, dtype=torch.long)
    logprobs = torch.zeros(2, width - 1)
    for row, (gain, tokens) in enumerate(gains):
        mask[row, 2 : 2 + tokens] = 1
        logprobs[row, 1 : 1 + tokens] = gain / tokens - 0.5
    reference = torch.tensor([-0.5 * tokens for _, tokens in gains])
    trainer = trainer_class.__new__(trainer_class)
    trainer.args = arguments
    trainer.model = SimpleNamespace(training=False)
    trainer.accelerator = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    trainer.aux_loss_enabled, trainer.precompute_ref_logps = False, True
    trainer._metrics, trainer._total_train_tokens = {"eval": defaultdict(list)}, 0
    # As its constructor does, which would start a model and read data.
    trainer.beta, trainer.ld_alpha = arguments.beta, arguments.ld_alpha
    trainer.loss_types = arguments.loss_type
    trainer.loss_weights = arguments.loss_weights or [1.0] * len(arguments.loss_type)
    trainer.f_divergence_type = arguments.f_divergence_type
    trainer.use_weighting = arguments.use_weighting
    zeros = torch.zeros_like(logprobs)
    outputs = SimpleNamespace(
        log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference[:1],
        "ref_rejected_logps": reference[1:],
    }
    return float(trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False))


@pytest.mark.parametrize(
    ("table", "gains", "expected"),
    [
        # beta is 0.1 unless the table says otherwise, and h = 1.5 + 0.5 nats.
        ({}, [(1.5, 3), (-0.5, 5)], 0.598139),
        # By the token: 1.5 / 3 and 0 / 5; (0.5 - 1 / 0.2)².
        ({"loss_type": "ipo", "beta": 0.1}, [(1.5, 3), (0.0, 5)], 20.25),
    ],
)
def test_the_loss_of_a_pair_is_the_one_that_is_known(
    tmp_path: Path, table: dict[str, Any], gains: list[tuple[float, int]], expected: float
) -> None:
    assert dpo_loss(tmp_path, table, gains) == pytest.approx(expected, abs=1e-6)
