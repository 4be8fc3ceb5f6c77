"""Engine and learner must mean the same by a token id, and compute in types that suit."""

import pytest
from engine_models import build_tokenizer, save_policy

from posttrain.errors import ModelError
from posttrain.workers.agreement import check_dtype, facts_of_checkpoint, tokenizer_fingerprint


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
