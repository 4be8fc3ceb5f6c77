import math

import pytest

from judges.ifd import ifd


def test_the_ratio_of_mean_negative_log_likelihoods():
    assert ifd([-0.5, -1.5], [-2.0, -3.0]) == pytest.approx(1.0 / 2.5)
    assert ifd([-3.0], [-2.0]) == pytest.approx(1.5)


def test_certain_answers():
    assert ifd([0.0, 0.0], [0.0, 0.0]) == 1.0
    assert ifd([-1.0], [0.0]) == math.inf


@pytest.mark.parametrize(("conditioned", "alone"), [([-1.0], [-1.0, -1.0]), ([], [])])
def test_other_tokens_are_refused(conditioned, alone):
    with pytest.raises(ValueError, match="the same answer tokens are needed"):
        ifd(conditioned, alone)
