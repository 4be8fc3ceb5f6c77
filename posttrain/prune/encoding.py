"""What the critic is shown, as token ids."""

from __future__ import annotations

from judges.grade import GRADES, RUBRIC
from posttrain.data.chat import ChatFormat
from posttrain.errors import ModelError
from posttrain.prune.columns import Task
from posttrain.prune.settings import PruneSettings
from posttrain.types import Message, Prompt, SystemInstruction

TokenIds = tuple[int, ...]


class Encoding:
    """Implements `judges.sampling.Encode` and says what fits: of `room` tokens, those that the
    critic adds are taken off."""

    def __init__(self, chat: ChatFormat, settings: PruneSettings) -> None:
        text = settings.critic.system
        self._chat = chat
        self._method = settings.method
        self._system = None if text is None else SystemInstruction(name="critic.system", text=text)
        added = settings.judge.max_tokens if settings.method == "critic" else 1
        self.room = settings.critic.max_length - added

    def prompt(self, prompt: Prompt, system: SystemInstruction | None = None) -> TokenIds:
        """With the critic's own system message, unless the prompt has one. ModelError if the
        template cannot render it."""
        assert system is None, "the system message is the critic's own"
        has_one = prompt.messages[0].role == "system"
        return self._chat.encode(prompt, None if has_one else self._system)

    def answer(self, task: Task) -> TokenIds:
        """The row's own answer, without an end of turn."""
        encoded = self._chat.tokenizer(task.completion, add_special_tokens=False)
        return tuple(encoded["input_ids"])

    def sequences(self, task: Task) -> list[TokenIds]:
        """What is scored for a judge that looks once. Grade: the rubric's prompt with each of
        `GRADES` behind it. IFD: the answer behind its prompt, and alone."""
        if self._method == "ifd":
            answer = self.answer(task)
            return [self.prompt(task.prompt) + answer, answer]
        rubric = self.prompt(_rubric(task))
        return [(*rubric, token) for token in self._grade_tokens()]

    def length(self, task: Task) -> int:
        """Tokens that are shown of a task, at most."""
        if self._method == "critic":
            return len(self.prompt(task.prompt))
        if self._method == "ifd":
            return len(self.prompt(task.prompt)) + len(self.answer(task))
        return len(self.prompt(_rubric(task)))

    def _grade_tokens(self) -> list[int]:
        tokens = []
        for grade in GRADES:
            encoded = self._chat.tokenizer(grade, add_special_tokens=False)["input_ids"]
            if len(encoded) != 1:
                raise ModelError(
                    f"the critic's tokenizer writes {grade!r} as {len(encoded)} tokens; a grade "
                    "must be one: take another critic, or another way of judging"
                )
            tokens.append(int(encoded[0]))
        return tokens


def _rubric(task: Task) -> Prompt:
    turns = [f"{m.role}: {m.content}" for m in task.prompt.messages]
    question = task.prompt.messages[0].content if len(turns) == 1 else "\n".join(turns)
    text = RUBRIC.format(question=question, answer=task.completion)
    return Prompt(
        prompt_id=task.task_id,
        messages=(Message(role="user", content=text),),
        reference=None,
        domain=task.prompt.domain,
    )
