"""What the policy is shown is what its own chat template renders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.data.chat import ChatFormat, conversation, dpo_record, sft_record
from posttrain.data.instructions import InstructionMix, InstructionSettings
from posttrain.data.prompts import make_prompt
from posttrain.errors import DataError, ModelError
from posttrain.types import PreferencePair, Prompt, SFTRow, SystemInstruction

BRIEF = SystemInstruction(name="brief", text="Answer only.")


@pytest.fixture(scope="module")
def chat(tiny_policy: Path) -> ChatFormat:
    return ChatFormat(str(tiny_policy))


@pytest.fixture
def damaged(tiny_policy: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_policy, tmp_path / "policy"))


def ask(question: str) -> Prompt:
    return make_prompt(question, reference="2", domain="maths")


@pytest.mark.parametrize("question", ["1+1=?", " two\n lines ", "<user>2<end>", "[~{|}]"])
def test_encode_is_the_template_rendered(chat: ChatFormat, question: str) -> None:
    plain = chat.tokenizer.convert_ids_to_tokens(chat.encode(ask(question), None))
    assert plain[0] == "<user>"
    assert plain[-1] == "<assistant>"
    assert chat.tokenizer.decode(chat.encode(ask(question), None)) == f"<user>{question}<assistant>"
    under = chat.encode(ask(question), BRIEF)
    rendered = chat.tokenizer.apply_chat_template(
        [
            {"role": "system", "content": BRIEF.text},
            {"role": "user", "content": question},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert rendered == f"<system>Answer only.<user>{question}<assistant>"
    assert chat.tokenizer.decode(under) == rendered
    assert under == tuple(chat.tokenizer(rendered)["input_ids"])
    assert len(under) - len(plain) == 1 + len(BRIEF.text)


def test_conversation_and_supervised_record() -> None:
    row = SFTRow(row_id="r", prompt=ask("1+1=?"), completion="#2", system="brief")
    user = {"role": "user", "content": "1+1=?"}
    assert conversation(row.prompt, None) == [user]
    assert sft_record(row, BRIEF) == {
        "prompt": [{"role": "system", "content": "Answer only."}, user],
        "completion": [{"role": "assistant", "content": "#2"}],
    }


def test_the_template_hash_follows_the_template(chat: ChatFormat, damaged: Path) -> None:
    assert ChatFormat(str(damaged)).template_hash == chat.template_hash
    template = damaged / "chat_template.jinja"
    template.write_text(template.read_text().replace("<assistant>", "<user>"))
    assert ChatFormat(str(damaged)).template_hash != chat.template_hash


def test_lengths_count_the_longest_system_message(chat: ChatFormat) -> None:
    # <user> 5 characters <assistant>, and <system> with 12 characters before them.
    prompts = [ask("1"), ask("1+1=?")]
    chat.check_lengths(prompts, [], 7)
    chat.check_lengths(prompts, [BRIEF], 20)
    for instructions, room, length in (([], 6, 7), ([BRIEF], 19, 20)):
        with pytest.raises(DataError) as caught:
            chat.check_lengths(prompts, instructions, room)
        message = str(caught.value)
        assert f"the prompt '1+1=?' has {length} tokens" in message
        assert f"policy.max_length leaves {room} beside the answer" in message


def test_a_default_system_message_counts_where_none_is_given(damaged: Path) -> None:
    template = damaged / "chat_template.jinja"
    default = "{%- if messages[0]['role'] != 'system' -%}<system>You are helpful.{%- endif -%}"
    template.write_text(default + template.read_text())
    chat = ChatFormat(str(damaged))
    short = SystemInstruction(name="short", text="Hi")
    assert len(chat.encode(ask("1"), None)) == 3 + 17
    chat.check_lengths([ask("1")], [short], 20)
    with pytest.raises(DataError, match="has 20 tokens"):
        chat.check_lengths([ask("1")], [short], 19)


def test_a_template_without_system_messages_is_refused_with_the_text(damaged: Path) -> None:
    template = damaged / "chat_template.jinja"
    refuse = (
        "{%- if messages[0]['role'] == 'system' -%}"
        "{{- raise_exception('no system role') -}}{%- endif -%}"
    )
    template.write_text(refuse + template.read_text())
    chat = ChatFormat(str(damaged))
    assert chat.encode(ask("1"), None)
    with pytest.raises(ModelError, match=r"the system message 'Answer only\.': no system role"):
        chat.encode(ask("1"), BRIEF)


def remove(*names: str) -> Callable[[Path], None]:
    def spoil(policy: Path) -> None:
        for name in names:
            (policy / name).unlink()

    return spoil


def overwrite(name: str, content: str) -> Callable[[Path], None]:
    def spoil(policy: Path) -> None:
        (policy / name).write_text(content)

    return spoil


def without_setting(name: str) -> Callable[[Path], None]:
    def spoil(policy: Path) -> None:
        path = policy / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in settings.items() if k != name}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (remove("tokenizer.json"), "no readable tokenizer"),
        (remove("tokenizer.json", "tokenizer_config.json"), "knows no text"),
        (overwrite("tokenizer.json", "{"), "no readable tokenizer"),
        (overwrite("tokenizer.json", "{}"), "no readable tokenizer"),
        (overwrite("tokenizer_config.json", "{"), "no readable tokenizer"),
        (remove("chat_template.jinja"), "has no chat_template"),
        (without_setting("eos_token"), "has no eos_token_id"),
        (without_setting("pad_token"), "has no pad_token_id"),
    ],
)
def test_a_tokenizer_that_cannot_be_used(
    damaged: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(damaged)
    with pytest.raises(ModelError) as caught:
        ChatFormat(str(damaged))
    assert str(caught.value).startswith("policy.model: ")
    assert said in str(caught.value)
    assert str(damaged) in str(caught.value)


def test_a_row_that_training_would_cut_is_refused(chat: ChatFormat) -> None:
    mix = InstructionMix([InstructionSettings(name="brief", text="Answer only.")], seed=0)
    plain = SFTRow(row_id="plain", prompt=ask("1+1=?"), completion="#2")
    instructed = SFTRow(row_id="brief", prompt=ask("1+1=?"), completion="#2", system="brief")
    # <user>1+1=?<assistant>#2<end>: 1 + 5 + 1 + 2 + 1 tokens; <system> and its text are 13 more.
    chat.check_rows([plain], mix, 10)
    with pytest.raises(DataError, match=r"row plain has 10 tokens.*9"):
        chat.check_rows([plain], mix, 9)
    chat.check_rows([plain, instructed], mix, 23)
    with pytest.raises(DataError, match=r"row brief has 23 tokens.*22"):
        chat.check_rows([plain, instructed], mix, 22)


TURNS = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "second"},
    {"role": "user", "content": "third"},
]


def with_template(policy: Path, template: str) -> ChatFormat:
    (policy / "chat_template.jinja").write_text(template)
    return ChatFormat(str(policy))


def test_what_is_rendered_is_what_was_said(chat: ChatFormat) -> None:
    chat.check_round_trip(TURNS, "fourth", "here")
    chat.check_round_trip(TURNS, " with <end> inside\n", "here")
    chat.check_instructions(ask("1+1=?"), [BRIEF])


SAY = "{{- '<' + m['role'] + '>' + m['content'] -}}"
STOP = "{%- if m['role'] == 'assistant' -%}{{- '<end>' -}}{%- endif -%}"
ASK = "{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        # Only the last question and its answer.
        (
            "{%- for m in messages[-2:] -%}" + SAY + STOP + "{%- endfor -%}" + ASK,
            r"drops or changes a turn: user says 'first'.*\(here\)",
        ),
        (
            "{%- for m in messages -%}{%- if m['role'] != 'assistant' or loop.last -%}"
            + SAY
            + STOP
            + "{%- endif -%}{%- endfor -%}"
            + ASK,
            "assistant says 'second'",
        ),
        # As templates do that hide what was thought.
        (
            "{%- for m in messages -%}{{- '<' + m['role'] + '>' + m['content'].split('=')[-1] -}}"
            + STOP
            + "{%- endfor -%}"
            + ASK,
            "assistant says '1=fourth'",
        ),
        (
            "{%- for m in messages -%}" + SAY + "{%- endfor -%}" + ASK,
            "does not end an answer: behind it stands ''",
        ),
        (
            "{%- if not add_generation_prompt -%}{{- '<system>' -}}{%- endif -%}"
            "{%- for m in messages -%}" + SAY + STOP + "{%- endfor -%}" + ASK,
            "renders a prompt otherwise than in front of its answer",
        ),
    ],
    ids=["first turns", "answers", "thoughts", "no end", "another beginning"],
)
def test_a_template_that_renders_something_else_is_refused(
    damaged: Path, template: str, said: str
) -> None:
    chat = with_template(damaged, template)
    with pytest.raises(ModelError, match=said) as caught:
        chat.check_round_trip(TURNS, "1=fourth", "here")
    assert str(caught.value).startswith("policy.model: its chat template ")


def test_a_template_that_ignores_system_messages_is_refused(damaged: Path) -> None:
    chat = with_template(
        damaged,
        "{%- for m in messages if m['role'] != 'system' -%}" + SAY + STOP + "{%- endfor -%}" + ASK,
    )
    with pytest.raises(
        ModelError, match=r"system says 'Answer only\.'.*system_instructions 'brief'"
    ):
        chat.check_instructions(ask("1+1=?"), [BRIEF])


def test_pairs_are_measured_and_rendered_like_rows(chat: ChatFormat) -> None:
    mix = InstructionMix([InstructionSettings(name="brief", text="Answer only.")], seed=0)
    pair = PreferencePair(
        prompt=ask("1+1=?"),
        system="brief",
        chosen="#2",
        rejected="#345",
        corner_case="wrong",
        margin=None,
    )
    assert dpo_record(pair, BRIEF)["rejected"] == [{"role": "assistant", "content": "#345"}]
    # 13 for the system message, 6 for the question, <assistant>, 4 characters, <end>.
    chat.check_pairs([pair], mix, 25)
    with pytest.raises(DataError, match=r"rejected of pair 1 has 25 tokens .* 24"):
        chat.check_pairs([pair], mix, 24)
