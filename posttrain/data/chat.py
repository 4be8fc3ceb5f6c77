"""Prompts as token ids, through the chat template of the policy's own tokenizer."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from posttrain.data.instructions import InstructionMix
from posttrain.errors import DataError, ModelError
from posttrain.types import PreferencePair, Prompt, SFTRow, SystemInstruction


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
        self._path = Path(tokenizer_path)
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

    def length(self, messages: Sequence[Mapping[str, str]]) -> int:
        """How many tokens a finished conversation has."""
        rendered = self.tokenizer.apply_chat_template(list(messages), return_dict=True)
        return len(rendered["input_ids"])

    def check_round_trip(
        self, prompt: Sequence[Mapping[str, str]], answer: str, place: str
    ) -> None:
        """Raises ModelError if what is rendered is not what was said: a turn is missing, the prompt
        alone reads otherwise than in front of its answer, or nothing ends the answer.

        The policy would be trained on other text than it is shown, or would never learn to stop.
        """
        answered = [*prompt, {"role": "assistant", "content": answer}]
        whole = self._render(answered, add_generation_prompt=False)
        asked = self._render(prompt, add_generation_prompt=True)
        rest = _squeezed(whole)
        for message in answered:
            said = _squeezed(message["content"])
            position = rest.find(said)
            if position < 0:
                raise self._template_error(
                    place,
                    f"drops or changes a turn: {message['role']} says "
                    f"{reprlib.repr(message['content'])}, which is not in what it renders",
                )
            rest = rest[position + len(said) :]
        if not whole.startswith(asked):
            raise self._template_error(
                place,
                "renders a prompt otherwise than in front of its answer: "
                f"{asked[-40:]!r} is no beginning of {reprlib.repr(whole)}",
            )
        if not any(_squeezed(token) in rest for token in self._ends):
            raise self._template_error(
                place,
                f"does not end an answer: behind it stands {rest!r} and none of {self._ends}",
            )

    def _render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except TemplateError as error:
            raise ModelError(
                f"policy.model: its chat template cannot render {reprlib.repr(messages)}: {error}"
            ) from error

    @cached_property
    def _ends(self) -> list[str]:
        """Tokens at which generation stops."""
        from transformers import GenerationConfig

        ids: list[int] = []
        if (self._path / "generation_config.json").is_file():
            try:
                named = GenerationConfig.from_pretrained(self._path).eos_token_id
            except (OSError, ValueError) as error:
                raise ModelError(f"policy.model: {self._path} cannot be read: {error}") from error
            ids = named if isinstance(named, list) else [] if named is None else [named]
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        return list(dict.fromkeys([str(self.tokenizer.eos_token), *tokens]))

    def _template_error(self, place: str, what: str) -> ModelError:
        return ModelError(f"policy.model: its chat template {what} ({place}). Mend the template")

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

    def check_instructions(
        self, prompt: Prompt, instructions: Collection[SystemInstruction]
    ) -> None:
        """Raises ModelError as `check_round_trip` does, for a prompt under each of them."""
        for system in [None, *instructions]:
            place = (
                "a prompt"
                if system is None
                else f"a prompt under system_instructions {system.name!r}"
            )
            self.check_round_trip(conversation(prompt, system), "1", place)

    def check_rows(self, rows: Sequence[SFTRow], mix: InstructionMix, max_length: int) -> None:
        """Raises DataError if a supervised row is longer than `max_length` tokens: its end, and
        the end-of-turn token with it, would be cut off in training. ModelError as
        `check_round_trip` does."""
        for row in rows:
            record = sft_record(row, mix.resolve(row.system))
            self.check_round_trip(record["prompt"], row.completion, f"sft.data, row {row.row_id}")
            length = self.length([*record["prompt"], *record["completion"]])
            if length > max_length:
                raise DataError(
                    f"sft.data: row {row.row_id} has {length} tokens, more than policy.max_length "
                    f"= {max_length}. Raise it or remove the row."
                )

    def check_pairs(
        self, pairs: Sequence[PreferencePair], mix: InstructionMix, max_length: int
    ) -> None:
        """As `check_rows`, for both answers of each pair."""
        for number, pair in enumerate(pairs, start=1):
            record = dpo_record(pair, mix.resolve(pair.system))
            for column in ("chosen", "rejected"):
                place = f"dpo.data, {column} of pair {number}"
                self.check_round_trip(record["prompt"], record[column][0]["content"], place)
                length = self.length([*record["prompt"], *record[column]])
                if length > max_length:
                    raise DataError(
                        f"{place} has {length} tokens with its prompt, more than policy.max_length "
                        f"= {max_length}. Raise it or remove the pair."
                    )


def _squeezed(text: str) -> str:
    """Without white space, which templates add and take away around a turn and its parts."""
    return "".join(text.split())


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


def dpo_record(pair: PreferencePair, system: SystemInstruction | None) -> dict[str, Any]:
    """A pair in TRL's conversational preference format."""
    return {
        "prompt": conversation(pair.prompt, system),
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }
