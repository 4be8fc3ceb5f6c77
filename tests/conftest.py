"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from posttrain.starter.tokenizer import END, PAD, VOCABULARY, build_tokenizer

# An example has no time to keep: two processes share the machine with engines.
settings.register_profile("beside-engines", deadline=None)
settings.load_profile("beside-engines")


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights and the starter's tokenizer and chat template."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

    directory = tmp_path_factory.mktemp("tiny-policy")
    set_seed(0)
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(END),
        pad_token_id=VOCABULARY.index(PAD),
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    build_tokenizer(max_length=256).save_pretrained(directory)
    return directory
