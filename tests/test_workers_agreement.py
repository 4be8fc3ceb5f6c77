"""Engine and learner must mean the same by a token id, and compute in types that suit."""

import json

import pytest
from engine_models import build_tokenizer, save_policy

from posttrain.errors import ModelError
from posttrain.workers.agreement import (
    check_dtype,
    check_same_model,
    facts_of_checkpoint,
    tokenizer_fingerprint,
)

SCALED = {"type": "linear", "factor": 2.0}
WINDOWS = ["sliding_attention", "full_attention"]


def test_facts_of_a_checkpoint(tmp_path):
    facts = facts_of_checkpoint(save_policy(tmp_path, tied=True))
    assert facts.vocab_size == 128
    assert facts.tokenizer == tokenizer_fingerprint(build_tokenizer())
    with pytest.raises(ModelError, match=r"nowhere.* cannot be read"):
        facts_of_checkpoint(tmp_path / "nowhere")


def test_a_tokenizer_is_told_by_its_ids_and_special_tokens():
    same, added, special = build_tokenizer(), build_tokenizer(), build_tokenizer()
    assert tokenizer_fingerprint(same) == tokenizer_fingerprint(build_tokenizer())
    added.add_tokens(["zebra"])
    special.add_special_tokens({"sep_token": "the"})
    prints = {tokenizer_fingerprint(t) for t in (same, added, special)}
    assert len(prints) == 3


def change_config(policy, **changes):
    """A key without a value is left out."""
    file = policy / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_parameters = .*500000.* has .*10000",
        ),
        (
            {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": SCALED},
            "rope_parameters = .*linear.* has .*default",
        ),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05 and .* has 1e-06"),
        (
            {"use_sliding_window": True, "sliding_window": 16, "layer_types": WINDOWS},
            "layer_types = .*sliding_attention.* has .*full_attention",
        ),
        ({"hidden_act": "gelu"}, "hidden_act = gelu and .* has silu"),
        ({"hidden_size": 32}, "hidden_size = 32 and .* has 64"),
    ],
)
def test_weights_of_one_shape_may_be_of_two_models(tmp_path, changes, named):
    """An engine that changed from one's weights to the other's would compute neither."""
    policy, other = (save_policy(tmp_path / name, tied=True) for name in ("policy", "other"))
    check_same_model(other, policy)
    change_config(other, **changes)
    with pytest.raises(ModelError, match=rf"{other} has {named}.*checkpoints of the same model"):
        check_same_model(other, policy)


def test_a_configuration_that_an_older_version_wrote_is_the_same(tmp_path):
    policy, other = (save_policy(tmp_path / name, tied=True) for name in ("policy", "other"))
    change_config(other, rope_parameters=None, rope_theta=10_000)
    check_same_model(other, policy)
    for directory in (policy, other):
        change_config(
            directory, rope_parameters={"rope_theta": 1e4, "rope_type": "linear"} | SCALED
        )
    change_config(policy, rope_parameters=None, rope_theta=10_000, rope_scaling=SCALED)
    check_same_model(other, policy)


@pytest.mark.parametrize(
    ("published", "engine"),
    [
        ("float32", "float32"),
        ("float32", "bfloat16"),
        ("float32", "float16"),
        ("bfloat16", "bfloat16"),
    ],
)
def test_types_that_suit(published, engine):
    check_dtype(published, engine)


@pytest.mark.parametrize(
    ("published", "engine"),
    [("bfloat16", "float32"), ("bfloat16", "float16"), ("float16", "bfloat16")],
)
def test_types_that_do_not_suit(published, engine):
    with pytest.raises(
        ModelError, match=f"publishes {published} weights .* computes in {engine}: .*engine.dtype"
    ):
        check_dtype(published, engine)
