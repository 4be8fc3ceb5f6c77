"""One step's record, by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from online_fakes import make_group

from posttrain.online.lag import lag_of
from posttrain.online.metrics import Interval, StepTimes, answer_metrics, step_metrics
from posttrain.types import DrawOutcome, PolicyVersion

TIMES = StepTimes(interval=4.0, waiting=1.0, learning=2.0, publishing=0.5)


def test_answers_of_rejected_groups_count() -> None:
    groups = [
        make_group("1100", domain="sums", length=3),
        make_group("1111", domain="sums", length=5),
        make_group("00ut", domain="words", length=10),
        make_group("1???", domain="words", length=2),
    ]
    expected = {
        "reward_mean": 7 / 13,
        "reward/sums": 6 / 8,
        "reward/words": 1 / 5,
        "pass@1": 7 / 13,
        "pass@1/sums": 6 / 8,
        "pass@1/words": 1 / 5,
        "pass@2": (5 / 6 + 1 + 0) / 3,
        "pass@2/sums": (5 / 6 + 1) / 2,
        "pass@2/words": 0.0,  # of one group; the other has unscored answers
        "pass@4": 2 / 3,
        "pass@4/sums": 1.0,
        "pass@4/words": 0.0,
        "unparsable_share": 1 / 13,
        "truncated_share": 1 / 13,
        "unscored_share": 3 / 16,
        "completion_length_mean": 5.0,
    }
    assert answer_metrics(groups) == pytest.approx(expected)


def test_instruction_following_by_system() -> None:
    groups = [
        make_group("10", system="brief", components={"instruction": 1.0}),
        make_group("10", system="brief", components={"instruction": 0.0}),
        make_group("10", system="boxed", components={"instruction": 1.0}),
        make_group("10", system="free"),
        make_group("10", components={"instruction": 0.0}),
    ]
    metrics = answer_metrics(groups)
    assert {k: v for k, v in metrics.items() if k.startswith("instruction/")} == {
        "instruction/boxed": 1.0,
        "instruction/brief": 0.5,
    }


def test_what_is_unknown_is_absent() -> None:
    assert answer_metrics([]) == {}
    assert answer_metrics([make_group("??")]) == {
        "unscored_share": 1.0,
        "completion_length_mean": 2.0,
    }


def test_lag_is_measured_from_the_oldest_token_across_attempts() -> None:
    group = make_group("10", version=PolicyVersion(1, 7))
    assert lag_of(group, PolicyVersion(1, 9)) == 2


def test_step_record() -> None:
    trained = [
        make_group("10", version=PolicyVersion(1, 5)),
        make_group("10", version=PolicyVersion(1, 4)),
        make_group("10", version=PolicyVersion(1, 5)),
        make_group("10", version=PolicyVersion(1, 5)),
    ]
    interval = Interval(
        groups=[*trained[:2], make_group("11"), make_group("00"), make_group("?1")],
        ended=Counter(
            {
                (DrawOutcome.TRAINED, "", "sums"): 3,
                (DrawOutcome.TRAINED, "", "words"): 1,
                (DrawOutcome.ZERO_ADVANTAGE, "all_correct", "sums"): 1,
                (DrawOutcome.ZERO_ADVANTAGE, "none_correct", "sums"): 1,
                (DrawOutcome.ERRORED, "unscored", "words"): 1,
                (DrawOutcome.STALE, "deadline", "words"): 1,
            }
        ),
        seats_passed_on=2,
    )
    metrics = step_metrics(
        interval,
        trained=trained,
        current=PolicyVersion(1, 5),
        num_loss_tokens=16,
        times=TIMES,
        queues={"generating": 2, "scoring": 1, "ready": 4},
        learner={"loss": 0.5},
        publish={"pause_s": 0.25},
        teacher={"weight": 0.125},
    )
    assert metrics == {
        **answer_metrics(interval.groups),
        "zero_advantage_share": 2 / 5,
        "signal_share": 2 / 5,  # one group could not be scored
        "lag_max": 1,
        "lag_mean": 0.25,
        "lag/0": 3,
        "lag/1": 1,
        "trained_tokens": 16,
        "trained_tokens_per_s": 4.0,
        "generated_tokens_per_s": 5.0,
        "learner_busy_share": 0.5,
        "learner_idle_share": 0.25,
        "publish_s": 0.5,
        "step_s": 4.0,
        "queue/generating": 2,
        "queue/scoring": 1,
        "queue/ready": 4,
        "seats_passed_on": 2,
        "draws/errored": 1,
        "draws/stale": 1,
        "draws/trained": 4,
        "draws/zero_advantage": 2,
        "ended/all_correct/sums": 1,
        "ended/deadline/words": 1,
        "ended/none_correct/sums": 1,
        "ended/unscored/words": 1,
        "trained/sums": 3,
        "trained/words": 1,
        "learner/loss": 0.5,
        "publish/pause_s": 0.25,
        "teacher/weight": 0.125,
    }


def test_a_step_whose_groups_all_came_earlier_has_no_pass_rate() -> None:
    metrics = step_metrics(
        Interval(ended=Counter({(DrawOutcome.TRAINED, "", "toy"): 1})),
        trained=[make_group("10")],
        current=PolicyVersion(1, 0),
        num_loss_tokens=4,
        times=TIMES,
        queues={},
        learner={},
        publish={},
        teacher={},
    )
    assert "pass@1" not in metrics
    assert not {"zero_advantage_share", "signal_share"} & metrics.keys()
    assert metrics["generated_tokens_per_s"] == pytest.approx(0.0)
