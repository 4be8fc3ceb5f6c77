"""Charts of a run as functions that return Altair charts: `charts.idle_shares(run).save("x.html")`.

Each says in its title what it shows; where a run has no data for it, it says that instead.
"""

from posttrain.inspect.charts.accuracy import accuracy_by_time, domain_accuracy
from posttrain.inspect.charts.difficulty import (
    bucket_moves,
    calibration,
    difficulty_by_step,
    pass_rate_histogram,
    pool_by_bucket,
    pruned_by_domain,
)
from posttrain.inspect.charts.loop import (
    distillation_weights,
    idle_shares,
    staleness,
    trainable_share,
    where_prompts_went,
)

__all__ = [
    "accuracy_by_time",
    "bucket_moves",
    "calibration",
    "difficulty_by_step",
    "distillation_weights",
    "domain_accuracy",
    "idle_shares",
    "pass_rate_histogram",
    "pool_by_bucket",
    "pruned_by_domain",
    "staleness",
    "trainable_share",
    "where_prompts_went",
]
