"""When engine and learner are compared, and how far apart they may be."""

import numpy as np
import pytest
from online_fakes import make_group

from posttrain.errors import MismatchError
from posttrain.types import PolicyVersion
from posttrain.workers.probe import Probe, ProbeSequence, compare_answers, compare_logprobs
from posttrain.workers.settings import PublishSettings

VERSION = PolicyVersion(1, 7)


def mismatch(largest, k3, mean=1e-3):
    return {"mismatch_max": largest, "mismatch_mean": mean, "mismatch_k3": k3}


def test_the_probe_runs_after_the_first_publishes_and_then_now_and_then():
    probe = Probe(PublishSettings(probe_first=2, probe_every=5))
    assert [probe.due() for _ in range(11)] == [
        *(True, True, False, False, True),
        *(False, False, False, False, True, False),
    ]


def test_in_fp32_the_bound_is_absolute():
    probe = Probe(PublishSettings(max_mismatch=1e-4))
    probe.check(mismatch(1e-4, 1.0), VERSION, exact=True)
    with pytest.raises(
        MismatchError, match=r"after publishing 1\.7 .*mismatch_max is 0\.00011 nats.*max_mismatch"
    ):
        probe.check(mismatch(1.1e-4, 0.0), VERSION, exact=True)
    with pytest.raises(MismatchError, match="is inf nats"):
        probe.check(mismatch(float("inf"), float("inf")), VERSION, exact=True)


def test_in_16_bits_the_bound_is_relative_to_the_first_probe():
    probe = Probe(PublishSettings(max_growth=4.0))
    probe.check(mismatch(0.01, 1e-5, 0.002), VERSION, exact=False)
    probe.check(mismatch(0.9, 9e-3, 0.008), VERSION, exact=False)  # of one unlikely token
    with pytest.raises(
        MismatchError, match=r"mismatch_mean is 0\.0081 .*more than 0\.008 .*max_growth"
    ):
        probe.check(mismatch(0.01, 1e-5, 0.0081), VERSION, exact=False)


def test_in_16_bits_every_probe_must_be_plausible_by_itself():
    with pytest.raises(MismatchError, match=r"mismatch_k3 is 0\.02 nats, more than 0\.01"):
        Probe(PublishSettings()).check(mismatch(0.5, 0.02), VERSION, exact=False)


def test_log_probabilities_are_compared_over_all_engines_and_tokens():
    reference = [[-1.0, -2.0], [-3.0]]
    same = [[-1.0, -2.0], [-3.0]]
    off = [[-1.0, -2.5], [-3.0]]
    assert compare_logprobs(reference, [same]) == mismatch(0.0, 0.0, 0.0)
    compared = compare_logprobs(reference, [same, off])
    assert compared["mismatch_max"] == 0.5
    assert compared["mismatch_mean"] == 0.5 / 6
    # k3 = e^d − d − 1 at d = −0.5, on one of six tokens
    assert compared["mismatch_k3"] == pytest.approx((np.exp(-0.5) - 0.5) / 6)


@pytest.mark.parametrize("side", ["reference", "answer"])
def test_a_log_probability_that_is_no_number_is_the_largest_mismatch(side):
    good, bad = [[-1.0, -2.0]], [[-1.0, float("nan")]]
    reference, answers = (bad, [good]) if side == "reference" else (good, [bad])
    assert compare_logprobs(reference, answers) == mismatch(*[float("inf")] * 3)


def test_only_answers_are_compared():
    sequences = [ProbeSequence((1, 2, 3), 2), ProbeSequence((4, 5), 1)]
    learner, engine = [[-9.0, -1.0], [-2.0]], [[-1.0, -1.5], [-2.0]]
    compared = compare_answers(sequences, learner, [engine])
    assert compared["mismatch_max"] == 0.5
    assert compared["mismatch_k3"] == pytest.approx((np.exp(-0.5) - 0.5) / 2)


def test_a_sequence_leaves_an_engine_room_for_one_more_token():
    rollout = make_group("1").rollouts[0]
    whole = rollout.prompt_token_ids + rollout.completion_token_ids
    assert ProbeSequence.of(rollout, len(whole) + 1).token_ids == whole
    cut = ProbeSequence.of(rollout, len(whole))
    assert cut == ProbeSequence(whole[:-1], len(rollout.prompt_token_ids))
