"""The starter policy's tokenizer: one token a character, one special token for each role."""

from __future__ import annotations

from typing import Any

PAD, UNKNOWN, END = "<pad>", "<unk>", "<end>"
ROLES = ("system", "user", "assistant")
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
VOCABULARY = (PAD, UNKNOWN, END, *(f"<{role}>" for role in ROLES), *CHARACTERS)

# `generation` marks what assistant-only losses train on: the answer and its end-of-turn token.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<assistant>' -}}"
    "{%- generation -%}{{- message['content'] + '<end>' -}}{%- endgeneration -%}"
    "{%- elif message['role'] in ['system', 'user'] -%}"
    "{{- '<' + message['role'] + '>' + message['content'] -}}"
    "{%- else -%}"
    "{{- raise_exception('unknown role ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)


def build_tokenizer(max_length: int) -> Any:
    """A `PreTrainedTokenizerFast` whose ids are positions in `VOCABULARY`.

    Decoding gives back the exact text. Characters outside the vocabulary become `<unk>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[f"<{role}>" for role in ROLES],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
