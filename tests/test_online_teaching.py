"""A teacher beside the loop: whom it reads, when it is waited for, what its word does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from online_fakes import ScriptedGenerator, TimedLearner, World, loop_settings, make_group
from pydantic import ValidationError

from posttrain.advantages import group_to_samples
from posttrain.online.teacher_settings import OnlineDistillationSettings
from posttrain.online.teaching import OnlineTeacher
from posttrain.packing import deal, pack
from posttrain.teaching.records import TokenSequence
from posttrain.types import DrawOutcome, PolicyVersion

ROLLOUT_LOGPROB = -0.5  # of every token that the fakes write


@dataclass
class ScriptedTeacher:
    """Call n takes `seconds(n)` and gives every token `logprob`."""

    seconds: Callable[[int], float] = lambda n: 0.0
    logprob: float = -0.25
    asked: list[Sequence[TokenSequence]] = field(default_factory=list)

    async def __call__(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        call = len(self.asked)
        self.asked.append(sequences)
        await asyncio.sleep(self.seconds(call))
        return [np.full(s.num_labels, self.logprob, dtype=np.float32) for s in sequences]


def world(teacher, *, marks=lambda n: "10", distillation=None, **parts):
    settings = OnlineDistillationSettings(**(distillation or {"weight": "constant"}))
    generator = parts.pop("generator", None) or ScriptedGenerator(marks)
    loop = loop_settings(**parts.pop("loop", {}))
    return World(loop, generator, teacher=OnlineTeacher(settings, teacher), **parts)


def trained(world, step=0):
    """All loss tokens of a step: their advantages and teacher log-probabilities."""
    micro = world.learner.batches[step].micro_batches
    masks = [m.loss_mask.astype(bool) for m in micro]
    return (
        np.concatenate([m.advantages[mask] for m, mask in zip(micro, masks, strict=True)]),
        np.concatenate([m.teacher_logprobs[mask] for m, mask in zip(micro, masks, strict=True)]),
    )


# --- whom it reads --------------------------------------------------------------------------------


def test_only_admitted_groups_are_read_and_each_once():
    teacher = ScriptedTeacher()
    # Every other group carries no signal.
    played = world(teacher, marks=lambda n: "10" if n % 2 else "11")
    played.run()
    num_trained = len(played.ledger.ids(DrawOutcome.TRAINED))
    num_unused = len(played.ledger.ids(DrawOutcome.UNUSED))
    assert num_trained == 8
    assert len(played.ledger.ids(DrawOutcome.ZERO_ADVANTAGE)) >= 8
    assert num_trained <= len(teacher.asked) <= num_trained + num_unused
    for sequences in teacher.asked:
        assert [s.token_ids.tolist() for s in sequences] == [[1, 2, 3, 3]] * 2
        assert [s.label_mask.tolist() for s in sequences] == [[False, False, True, True]] * 2


def test_its_word_reaches_the_learner_beside_the_rewards():
    played = world(
        ScriptedTeacher(logprob=-0.75), distillation={"weight": "constant", "coefficient": 0.3}
    )
    played.run()
    advantages, of_teacher = trained(played)
    np.testing.assert_allclose(np.sort(advantages), [-0.5] * 4 + [0.5] * 4)
    np.testing.assert_allclose(of_teacher, -0.75)
    assert {batch.teacher_weight for batch in played.learner.batches} == {0.3}
    metrics = played.records[0].metrics
    assert metrics["teacher/weight"] == 0.3
    assert metrics["teacher/late"] == 0
    assert metrics["teacher/gap"] == pytest.approx(-0.25)
    assert metrics["teacher/gap/right"] == pytest.approx(-0.25)
    assert metrics["teacher/gap/toy"] == pytest.approx(-0.25)
    assert metrics["teacher/gap/q0.9"] == pytest.approx(-0.25)


def test_without_a_teacher_nothing_of_it_is_there():
    played = World(loop_settings(), ScriptedGenerator(lambda n: "10"))
    summary = played.run()
    assert summary.teacher is None
    assert played.learner.batches[0].teacher_weight is None
    assert all(m.teacher_logprobs is None for m in played.learner.batches[0].micro_batches)
    assert not [name for name in played.records[0].metrics if name.startswith("teacher/")]


def test_pure_distillation_trains_groups_without_contrast_and_no_reward():
    played = world(
        ScriptedTeacher(),
        marks=lambda n: "11",
        distillation={"weight": "constant", "coefficient": 1.0, "reward_weight": 0.0},
    )
    played.run()
    assert len(played.ledger.ids(DrawOutcome.TRAINED)) == 8
    assert played.ledger.ids(DrawOutcome.ZERO_ADVANTAGE) == []
    advantages, of_teacher = trained(played)
    assert (advantages == 0).all()
    np.testing.assert_allclose(of_teacher, -0.25)


def test_pure_distillation_still_needs_scored_answers():
    played = world(
        ScriptedTeacher(),
        marks=lambda n: "1?" if n % 2 else "11",
        distillation={"weight": "constant", "reward_weight": 0.0},
    )
    played.run()
    assert played.ledger.ids(DrawOutcome.ERRORED)


# --- when it is waited for ------------------------------------------------------------------------


def seconds_of(teacher, **parts):
    """Of a loop that generates at its throughput, one group a second, and learns for a second."""
    generator = ScriptedGenerator(lambda n: "10", serial=True)
    learner = TimedLearner(lambda step: 1.0)
    loop = {"num_steps": 20, "max_lag": 2}
    if teacher is None:
        played = World(loop_settings(**loop), generator, learner=learner)
    else:
        played = world(teacher, generator=generator, learner=learner, loop=loop, **parts)
    return played.run(), played


def test_a_fast_teacher_costs_the_loop_nothing():
    alone, _ = seconds_of(None)
    taught, played = seconds_of(ScriptedTeacher(lambda n: 0.4))
    # Only the group that comes last before a step is ever waited for.
    assert taught.seconds <= alone.seconds + 0.4 * 20 + 1e-9
    assert taught.seconds == pytest.approx(alone.seconds, rel=0.2)
    assert taught.teacher.late_groups == 0
    assert played.records[5].metrics["teacher/wait_s"] <= 0.4 + 1e-9


def test_a_slow_teacher_is_left_behind_and_said_to_be():
    taught, played = seconds_of(
        ScriptedTeacher(lambda n: 1000.0), distillation={"weight": "constant", "deadline_s": 2.5}
    )
    assert taught.teacher.late_groups == 40
    assert 0 < taught.teacher.waited_seconds <= 20 * 2.5
    _, of_teacher = trained(played)
    assert np.isnan(of_teacher).all()
    metrics = played.records[3].metrics
    assert metrics["teacher/late"] == 2
    assert "teacher/gap" not in metrics


def test_a_group_that_is_late_trains_on_its_rewards_alone():
    teacher = ScriptedTeacher(lambda n: 1000.0 if n == 0 else 0.0)
    played = world(teacher, distillation={"weight": "constant", "deadline_s": 1.0})
    played.run()
    advantages, of_teacher = trained(played)
    assert np.isnan(of_teacher).sum() == 4
    assert (of_teacher[~np.isnan(of_teacher)] == -0.25).all()
    assert (advantages != 0).all()
    assert played.records[0].metrics["teacher/late"] == 1


def test_what_is_still_read_when_the_stage_ends_is_given_up():
    """`run_virtual` refuses a loop that leaves a task behind."""
    teacher = ScriptedTeacher(lambda n: 0.0 if n < 8 else 500.0)
    played = world(teacher, loop={"max_lag": 3}, generator=ScriptedGenerator(lambda n: "10"))
    summary = played.run()
    assert len(teacher.asked) > 8
    assert summary.seconds < 100


def test_a_teacher_that_fails_ends_the_run():
    async def broken(_):
        raise ConnectionError("no teacher")

    with pytest.raises(ConnectionError, match="no teacher"):
        world(broken).run()


# --- λ --------------------------------------------------------------------------------------------


def test_the_weight_follows_the_lead_on_right_answers():
    """Right answers are .25 nats a token likelier to the teacher; wrong ones do not count."""
    played = world(ScriptedTeacher(), distillation={"slope": 4.0, "memory": 0.0})
    played.run()
    weight = 1 / (1 + np.exp(-4.0 * 0.25))
    assert played.records[0].metrics["teacher/lead"] == pytest.approx(0.25)
    assert played.records[0].metrics["teacher/weight"] == pytest.approx(weight)
    assert played.learner.batches[0].teacher_weight == pytest.approx(weight)


def test_a_teacher_that_has_fallen_behind_is_let_go():
    played = world(ScriptedTeacher(logprob=-5.0), distillation={"memory": 0.0, "min_lead": 0.1})
    played.run()
    assert played.records[-1].metrics["teacher/weight"] == 0.1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weight": "constant", "slope": 1.0}, "constant does not read slope"),
        ({"coefficient": 0.1}, "dynamic does not read coefficient"),
    ],
)
def test_settings_that_nobody_would_read_are_refused(given, said):
    with pytest.raises(ValidationError, match=said):
        OnlineDistillationSettings(**given)


# --- samples and batches --------------------------------------------------------------------------


@pytest.mark.parametrize("share_prompts", [False, True])
def test_teacher_logprobs_stay_with_their_tokens_through_packing_and_dealing(share_prompts):
    groups = [make_group("10?", draw_id=f"d1-{i:07d}", length=i + 1) for i in range(5)]
    samples = []
    for number, group in enumerate(groups):
        heard = [
            np.full(number + 1, -(10.0 * number + rollout), dtype=np.float32)
            for rollout in range(3)
        ]
        late = number == 3
        samples += group_to_samples(group, "mean", teacher_logprobs=None if late else heard)
    assert len(samples) == 10  # an unscored answer leaves, and its teacher's word with it
    batch = pack(
        samples,
        row_tokens=9,
        micro_tokens=20,
        pad_token_id=0,
        current=PolicyVersion(1, 0),
        teacher_weight=0.2,
        share_prompts=share_prompts,
    )
    found = []
    for share in deal(batch, 3):
        assert share.teacher_weight == 0.2
        for micro in share.micro_batches:
            trained = micro.loss_mask.astype(bool)
            if micro.teacher_logprobs is None:
                assert not trained.any()
                continue
            assert np.isnan(micro.teacher_logprobs[~trained]).all()
            found += micro.teacher_logprobs[trained].tolist()
    wanted = [-(10.0 * n + r) for n in (0, 1, 2, 4) for r in (0, 1) for _ in range(n + 1)]
    assert sorted(x for x in found if not np.isnan(x)) == sorted(wanted)
    assert sum(np.isnan(found)) == 2 * 4


def test_reward_weight_scales_the_advantages():
    group = make_group("1000")
    full = [s.advantages[-1] for s in group_to_samples(group, "mean")]
    half = [s.advantages[-1] for s in group_to_samples(group, "mean", reward_weight=0.5)]
    np.testing.assert_allclose(full, [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(half, [0.375, -0.125, -0.125, -0.125])
