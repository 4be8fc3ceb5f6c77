"""Tensors that arrive as they were sent, and all ways in which they may not."""

import pytest
import torch
from safetensors.torch import save_file

from posttrain.errors import MismatchError
from posttrain.workers.fingerprint import check_arrival, fingerprint, main_dtype

STATE = {
    "a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b.weight": torch.ones(4, dtype=torch.bfloat16),
    "c.scalar": torch.tensor(1.5),
}


@pytest.fixture
def sent(tmp_path):
    return tmp_path / "model.safetensors"


def test_a_fingerprint_is_of_type_shape_and_bytes():
    lines = fingerprint(STATE.items())
    assert lines["a.weight"].startswith("float32 [2, 3] ")
    assert lines["b.weight"].startswith("bfloat16 [4] ")
    assert lines["c.scalar"].startswith("float32 [] ")
    # XXH3-128 of nothing, as its specification's test vectors have it
    nothing = fingerprint([("nothing", torch.empty(0))])
    assert nothing == {"nothing": "float32 [0] 99aa06d3014798d86001c324468d497f"}
    assert main_dtype(lines) == "float32"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s["a.weight"].view(torch.int32)[1, 2].bitwise_xor_(1), "1 of 3 .*a.weight"),
        (lambda s: s.pop("c.scalar"), r"1 of 3 .*c.scalar: sent float32.*arrived None"),
        (lambda s: s.update(d=torch.zeros(1)), "1 of 3 .*d: sent None"),
        (lambda s: s.update({"b.weight": s["b.weight"].float()}), "sent bfloat16.*arrived float32"),
        (lambda s: s.update({"a.weight": s["a.weight"].view(3, 2)}), r"\[2, 3\].*\[3, 2\]"),
    ],
    ids=["one bit", "lost", "added", "another type", "another shape"],
)
def test_what_arrives_differently_is_named(sent, change, named):
    state = {name: tensor.clone() for name, tensor in STATE.items()}
    save_file(state, sent)
    check_arrival(sent, fingerprint(STATE.items()))
    change(state)
    save_file(state, sent)
    with pytest.raises(MismatchError, match=named):
        check_arrival(sent, fingerprint(STATE.items()))


def test_a_file_that_was_cut_is_named(sent):
    save_file(STATE, sent)
    sent.write_bytes(sent.read_bytes()[:-3])
    with pytest.raises(MismatchError, match="unreadable file"):
        check_arrival(sent, fingerprint(STATE.items()))


def test_a_router_may_keep_another_type():
    state = {"w": torch.ones(1).bfloat16(), "v": torch.ones(1).bfloat16(), "bias": torch.ones(1)}
    assert main_dtype(fingerprint(state.items())) == "bfloat16"
