"""Prompts as token ids, through the chat template of the policy's own tokenizer."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Collection, Sequence
from typing import Any

from posttrain.data.instructions import InstructionMix
from posttrain.errors import DataError, ModelError
from posttrain.types import Prompt, SFTRow, SystemInstruction


class ChatFormat:
    """The tokenizer of a policy, used for rendering prompts only.

    Text is tokenised here once; afterwards token ids travel, and what an engine produced is never
    tokenised again.

    `setting` is the one that named the tokenizer, for the errors.

    Raises:
        ModelError: no tokenizer there, or one without a chat template or end-of-turn token, or (at
            the first prompt) one whose template cannot render it.
    """

    def __init__(self, tokenizer_path: str, setting: str = "policy.model") -> None:
        from transformers import AutoTokenizer

        self._setting = setting
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                tokenizer_path, trust_remote_code=False
            )
        except Exception as error:  # a damaged file raises whatever its parser stumbles over
            raise ModelError(
                f"{setting}: no readable tokenizer in {tokenizer_path!r}: {error}"
            ) from error
        if not self.tokenizer("1")["input_ids"]:  # what transformers makes up where there is none
            raise ModelError(f"{setting}: the tokenizer in {tokenizer_path!r} knows no text")
        for what in ("chat_template", "eos_token_id", "pad_token_id"):
            if getattr(self.tokenizer, what) is None:
                raise ModelError(f"{setting}: the tokenizer in {tokenizer_path!r} has no {what}")

    @property
    def pad_token_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def template_hash(self) -> str:
        template = str(self.tokenizer.chat_template)
        return hashlib.sha256(template.encode()).hexdigest()[:16]

    def encode(self, prompt: Prompt, system: SystemInstruction | None) -> tuple[int, ...]:
        """Token ids of a prompt under a system instruction, generation prompt included."""
        from jinja2 import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(
                conversation(prompt, system), add_generation_prompt=True, return_dict=True
            )
        except TemplateError as error:
            shown = "no system message" if system is None else f"the system message {system.text!r}"
            raise ModelError(
                f"{self._setting}: its chat template cannot render a prompt with {shown}: {error}"
            ) from error
        return tuple(rendered["input_ids"])

    def check_lengths(
        self,
        prompts: Sequence[Prompt],
        instructions: Collection[SystemInstruction],
        max_prompt_tokens: int,
    ) -> None:
        """Raises DataError if a prompt, under the longest system instruction, leaves no room for
        an answer; nothing is cut in silence."""
        # Some templates add a default system message, so that none can be the longest.
        longest = max([None, *instructions], key=lambda i: len(self.encode(prompts[0], i)))
        for prompt in prompts:
            length = len(self.encode(prompt, longest))
            if length > max_prompt_tokens:
                raise DataError(
                    f"the prompt {reprlib.repr(prompt.messages[-1].content)} has {length} tokens "
                    f"with its system message; policy.max_length leaves {max_prompt_tokens} beside "
                    "the answer. Raise it, lower the max_tokens of answers or remove the prompt."
                )

    def check_rows(self, rows: Sequence[SFTRow], mix: InstructionMix, max_length: int) -> None:
        """Raises DataError if a supervised row is longer than `max_length` tokens: its end, and
        the end-of-turn token with it, would be cut off in training."""
        for row in rows:
            record = sft_record(row, mix.resolve(row.system))
            rendered = self.tokenizer.apply_chat_template(
                [*record["prompt"], *record["completion"]], return_dict=True
            )
            length = len(rendered["input_ids"])
            if length > max_length:
                raise DataError(
                    f"sft.data: row {row.row_id} has {length} tokens, more than policy.max_length "
                    f"= {max_length}. Raise it or remove the row."
                )


def conversation(prompt: Prompt, system: SystemInstruction | None) -> list[dict[str, str]]:
    """The messages that the policy is shown."""
    messages = [message.as_dict() for message in prompt.messages]
    return messages if system is None else [{"role": "system", "content": system.text}, *messages]


def sft_record(row: SFTRow, system: SystemInstruction | None) -> dict[str, Any]:
    """A row in TRL's conversational prompt-completion format."""
    return {
        "prompt": conversation(row.prompt, system),
        "completion": [{"role": "assistant", "content": row.completion}],
    }
