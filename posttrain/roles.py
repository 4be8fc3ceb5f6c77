"""Who works for a run, on what devices."""

from __future__ import annotations

from posttrain.config import Settings
from posttrain.workers.demand import Demand


def demands(settings: Settings) -> list[Demand]:
    """The actors that are up at the same time at most. Engines stay up from stage to stage, so a
    stage that trains needs its devices beside theirs."""
    resources = settings.resources
    roles = [
        Demand(role="rollout", count=resources.rollout.replicas, each=resources.rollout.actor),
        Demand(role="rewards", count=1, each=resources.rewards.actor),
    ]
    if set(settings.stages) - {"screen"}:
        learner = resources.learner
        roles.append(Demand(role="learner", count=learner.ranks, each=learner))
    if settings.taught_stages:
        teacher = resources.teacher
        copies = teacher.replicas * teacher.tensor_parallel
        roles.append(Demand(role="teacher", count=copies, each=teacher))
    if has_own_critic(settings):
        judge = resources.judge
        roles.append(Demand(role="judge", count=judge.replicas, each=judge.actor))
    judged = settings.rewards.judge
    if judged is not None and judged.model is not None:
        pool = resources.rewards.judge
        roles.append(Demand(role="rewards.judge", count=pool.replicas, each=pool.actor))
    return roles


def has_own_critic(settings: Settings) -> bool:
    """Whether RL re-screens with engines beside those that generate."""
    rescreen = settings.rl.rescreen
    return "rl" in settings.stages and rescreen is not None and rescreen.placement == "dedicated"
