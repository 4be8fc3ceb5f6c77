"""Which stages a run has, and in which orders they make sense."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Literal, get_args

StageName = Literal["screen", "sft", "rl", "dpo"]
STAGES: tuple[StageName, ...] = get_args(StageName)
READ_SCREENING = ("sft", "rl")
START = "start"
"""The evaluation of the policy that comes in, recorded like a stage."""


def check_stages(stages: Sequence[str], own_model: Collection[str] = ()) -> None:
    """Raises ValueError for stages of which one would work for nobody.

    Any subset in any order is fine as long as each stage comes once and what it leaves is used:
    screening by a later SFT or RL (alone it is a measurement), a policy by the next stage that
    takes one. `own_model` names the stages that start from a checkpoint of their own.
    """
    if not stages or len(set(stages)) < len(stages):
        raise ValueError(
            f"stages: each of {', '.join(STAGES)} at most once and at least one; got {list(stages)}"
        )
    if "screen" in stages and len(stages) > 1:
        after = stages[stages.index("screen") + 1 :]
        if not any(name in after for name in READ_SCREENING):
            raise ValueError(
                f"stages: {list(stages)} screens for nobody: what screening finds is read by sft "
                "and rl, so put screen before one of them or leave it out"
            )
    trained = [name for name in stages if name != "screen"]
    for before, name in itertools.pairwise(trained):
        if name in own_model:
            raise ValueError(
                f"{name}.model: {name} would start from it, and nobody would use the policy that "
                f"{before} leaves; drop {name}.model, or {before} from stages"
            )
