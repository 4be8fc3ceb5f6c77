import json

import numpy as np
import pytest

from posttrain.errors import DataError
from posttrain.metrics import AGAIN, MetricsLog, read_metrics, to_json


def test_what_is_appended_is_read_back_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"stage": "rl", "step": 1, "loss": 0.5})
        assert read_metrics(path) == [{"stage": "rl", "step": 1, "loss": 0.5}]
        log.append({"stage": "rl", "step": 2, "trained": True})
    with MetricsLog(path) as log:
        log.append({"step": 3})
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    assert read_metrics(path)[1]["trained"] is True


def test_numbers_that_are_not_finite_become_null_and_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    record = {
        "loss": float("nan"),
        "kl": float("-inf"),
        "reward": {"maths": 0.25, "code": np.float32("inf")},
        "times": [1.0, float("nan")],
    }
    with MetricsLog(path) as log:
        log.append(record)

    def reject(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(path.read_text(), parse_constant=reject) == {
        "loss": None,
        "kl": None,
        "reward": {"maths": 0.25, "code": None},
        "times": [1.0, None],
        "non_finite": ["loss", "kl", "reward.code", "times.1"],
    }


def test_numpy_scalars_become_plain_numbers():
    plain = to_json({"a": np.float32(0.5), "b": np.int64(7), "c": "text", "d": None})
    assert plain == {"a": 0.5, "b": 7, "c": "text", "d": None}
    assert type(plain["a"]) is float
    assert type(plain["b"]) is int


def test_what_json_cannot_hold_is_refused_and_leaves_no_trace(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        with pytest.raises(TypeError):
            log.append({"loss": object()})
        log.append({"step": 1})
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2}', '{"step"' + "x" * 200_000])
def test_a_torn_last_line_is_left_out_and_later_cut_off(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + torn)
    assert read_metrics(path) == [{"step": 1}]
    with MetricsLog(path) as log:
        log.append({"step": 2, "again": 1})
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "again": 1}]


def test_a_file_that_is_one_torn_line_starts_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"st')
    MetricsLog(path).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ["{not json}", "[1, 2]"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_what_a_stage_recorded_before_it_ran_again_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sft, old, new = ({"stage": "sft", "step": 1}, {"stage": "rl", "step": 1}, {"stage": "rl"})
    again = {"stage": "rl", "event": AGAIN, "changed": "rl.num_steps"}
    with MetricsLog(path) as log:
        for record in (sft, old, old, again, new):
            log.append(record)
    assert read_metrics(path) == [sft, again, new]
