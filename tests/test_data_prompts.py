"""Prompts are known by what the policy is shown; held-out ones are not trained on."""

from __future__ import annotations

import hashlib

import pytest

from posttrain.data.prompts import (
    check_disjoint,
    content_hash,
    make_prompt,
    spread_over_domains,
)
from posttrain.errors import DataError
from posttrain.types import Message, Prompt


def ask(question: str, reference: str = "1", domain: str = "maths") -> Prompt:
    return make_prompt(question, reference=reference, domain=domain)


def test_the_id_is_the_hash_of_the_messages_alone() -> None:
    canonical = '[{"content": "1+1=?", "role": "user"}]'
    assert ask("1+1=?").prompt_id == hashlib.sha256(canonical.encode()).hexdigest()[:16]
    other = make_prompt("1+1=?", reference="3", domain="strings", metadata={"level": 2})
    assert other.prompt_id == ask("1+1=?").prompt_id
    assert other.metadata == {"level": 2}
    assert ask("1+1= ?").prompt_id != ask("1+1=?").prompt_id


@pytest.mark.parametrize(
    ("count", "chosen"), [(1, "a"), (3, "abd"), (6, "abcdef"), (8, "abcdefgh"), (99, "abcdefgh")]
)
def test_a_few_prompts_are_of_every_domain(count: int, chosen: str) -> None:
    prompts = [ask(name, domain="sums" if name in "abch" else "words") for name in "abcdefgh"]
    assert "".join(p.messages[0].content for p in spread_over_domains(prompts, count)) == chosen


def test_roles_and_system_messages_are_part_of_the_id() -> None:
    user = Message(role="user", content="x")
    variants = [
        (user,),
        (Message(role="assistant", content="x"),),
        (Message(role="system", content="Be brief."), user),
        (user, user),
    ]
    assert len({content_hash(messages) for messages in variants}) == 4


def test_questions_outside_ascii_have_ids_of_their_own() -> None:
    assert ask("Größe?").prompt_id != ask("Grosse?").prompt_id


def test_sets_that_share_nothing_pass() -> None:
    check_disjoint([ask("a"), ask("b")], [ask("c")])
    check_disjoint([], [ask("c")])


def test_contamination_is_counted_and_shown() -> None:
    train = [ask(letter) for letter in "abcdef"]
    held_out = [ask(letter, reference="another") for letter in "zfedcba"]
    with pytest.raises(DataError) as caught:
        check_disjoint(train, held_out)
    assert str(caught.value).startswith(
        "tasks.held_out: 6 of its prompts are also in tasks.train, sft.data or dpo.data, e.g. 'f', "
        "'e', 'd'."
    )
