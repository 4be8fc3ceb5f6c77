"""Tiny random policies with a small BPE tokenizer, for tests that touch real engines."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)

from posttrain.types import GenerationRequest, Sampling

PAD, END = 0, 2
MAX_MODEL_LEN = 256
VOCAB_SIZE = 128
CORPUS = (
    "the quick brown fox jumps over the lazy dog while the other foxes watch the same dog sleep "
    "in the shade of an old oak and think that nothing in this world is better than a long nap"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over lower-case letters and the blank. Most texts have several token sequences: `the` is
    one token, and `t`, `h`, `e` or `th`, `e` decode to the same text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<unk>", "<end>"],
        initial_alphabet=list(" abcdefghijklmnopqrstuvwxyz"),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        clean_up_tokenization_spaces=False,
    )


def save_policy(directory: Path, *, tied: bool, seed: int = 0) -> Path:
    """A random Qwen3 of 100 k parameters whose samples are far from uniform."""
    set_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_MODEL_LEN,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        initializer_range=0.2,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def save_moe_policy(directory: Path, *, seed: int = 0) -> Path:
    """A random Qwen3-MoE of four experts, two of which see each token."""
    set_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_MODEL_LEN,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        initializer_range=0.2,
        dtype="float32",
    )
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def request(
    request_id: str, text: str, *, num_rollouts: int, max_tokens: int, temperature: float = 1.0
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=tuple(build_tokenizer()(text)["input_ids"]),
        num_rollouts=num_rollouts,
        sampling=Sampling(max_tokens=max_tokens, temperature=temperature),
    )
