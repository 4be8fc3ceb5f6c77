"""How much SFT and DPO train, in TRL's words, and when that is no longer light."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.workers.trainer_settings import TrainerSettings

TRL_BATCH_SIZE = 8
"""TRL's default for `per_device_train_batch_size`."""
HEAVY_PASSES = 2.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """`passes` over the rows, and what TRL is told: `num_train_epochs` or `max_steps`."""

    passes: float
    trainer: Mapping[str, Any]


def plan_budget(settings: TrainerSettings, *, rows: int, tokens: int, ranks: int) -> Budget:
    """Of `rows` rows with `tokens` tokens in all, prompts included.

    A budget in tokens is a part of a pass or several of them: TRL rounds it up to a whole step, and
    says afterwards how many tokens it were. Passes of a budget in steps are counted from the rows
    of a step; packing puts about `max_length` tokens where there was a row.
    """
    trainer, budget = settings.trainer, settings.budget
    steps = budget.steps if budget is not None else int(trainer.get("max_steps", -1))
    if steps is not None and steps > 0:
        per_step = _rows_per_step(trainer, rows, tokens) * ranks
        return Budget(passes=steps * per_step / rows, trainer={"max_steps": steps})
    if budget is not None and budget.tokens is not None:
        passes = budget.tokens / tokens
    elif budget is not None and budget.epochs is not None:
        passes = budget.epochs
    else:
        passes = float(trainer.get("num_train_epochs", 1.0))
    return Budget(passes=passes, trainer={"num_train_epochs": passes})


def _rows_per_step(trainer: Mapping[str, Any], rows: int, tokens: int) -> float:
    """Those of one rank."""
    sequences = int(trainer.get("per_device_train_batch_size", TRL_BATCH_SIZE))
    sequences *= int(trainer.get("gradient_accumulation_steps", 1))
    if not trainer.get("packing"):
        return float(sequences)
    packed = math.ceil(tokens / int(trainer["max_length"]))
    return sequences * rows / packed


def heavy(stage: str, budget: Budget, *, rows: int, rl_answers: int | None) -> str | None:
    """What is heavy about a budget, or None. `rl_answers` is how many answers online RL trains on
    in the same run, None without it.

    Heavy SFT and DPO over-constrain a policy and take away the exploration that RL lives on.
    """
    if budget.passes > HEAVY_PASSES:
        return (
            f"{stage}: {budget.passes:.1f} passes over {rows} rows are heavy: the policy learns "
            f"them by heart and stops exploring. Set {stage}.budget to {{epochs: 1}}, or watch "
            "pass@8 closely"
        )
    seen = round(budget.passes * rows)
    if rl_answers is not None and seen > rl_answers:
        return (
            f"{stage}: {seen} sequences are heavy beside the {rl_answers} answers that online RL "
            f"trains on, which is to carry the weight. Lower {stage}.budget, or raise rl.num_steps"
        )
    return None
