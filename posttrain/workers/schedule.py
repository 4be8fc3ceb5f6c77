"""The learning rate of each optimizer step."""

from __future__ import annotations

import math

from posttrain.workers.settings import Schedule


def learning_rate(
    step: int, *, peak: float, schedule: Schedule, warmup_steps: int, num_steps: int
) -> float:
    """That of the optimizer step with index `step`, counted from 0, of `num_steps`.

    It rises linearly over `warmup_steps` steps, none of which is at 0, and reaches `peak` with the
    step after them. From there it stays (`constant`), or falls to 0, which the step after the last
    would have: linearly, or along half a cosine (Loshchilov and Hutter 2017).
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * (1 + math.cos(math.pi * progress)) / 2
