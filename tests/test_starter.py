"""The starter policy: its tasks are right, its splits are apart, its tokenizer loses nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from posttrain.data.prompts import check_disjoint, split_of
from posttrain.starter import POLICY_DIR
from posttrain.starter.families import FAMILIES, LEVELS, Family, Task
from posttrain.starter.instructions import BRACKETS, BRIEF, STEPS
from posttrain.starter.tasks import (
    SYSTEM_INSTRUCTIONS,
    completion,
    starter_prompts,
    starter_sft_rows,
)
from posttrain.starter.tokenizer import VOCABULARY, build_tokenizer
from posttrain.starter.train import TrainSettings, batches, encode, learning_rate_factor
from posttrain.types import Outcome, Prompt, SFTRow
from rewards.shaping import RewardSettings
from rewards.verifiers import check_references, verifier_of

MAX_COMPLETION = 80
FAMILY_BY_NAME = {family.name: family for family in FAMILIES}
GOLDEN_HELD_OUT = {
    "d20a7a620bb09af8": "add 3 3",
    "7f055a75778894f0": "count a peoplestartatourwebsitewhich",
    "1b3d7b13a2220520": "hop 1 z bz zb",
    "928d2ea03e285618": "mod 442 6",
    "7d4f584cb70f86b0": "hop 6 e mj wp ve ew jv pm",
}
EVERY_LEVEL = [(family, level) for family in FAMILIES for level in LEVELS]


def tasks(family: Family, level: int, count: int = 12) -> list[Task]:
    rng = Random(7)
    return [family.make(rng, level) for _ in range(count)]


def solve(family: str, question: str) -> str:
    """The answer worked out from the question's text alone, independently of the generators."""
    words = question.split()
    match family:
        case "addition":
            return str(int(words[1]) + int(words[2]))
        case "multiplication":
            return str(int(words[1]) * int(words[2]))
        case "modulo":
            return str(int(words[1]) % int(words[2]))
        case "binary":
            return format(int(words[1]), "b")
        case "letter_count":
            return str(words[2].count(words[1]))
        case "kth_smallest":
            return sorted(words[2])[int(words[1]) - 1]
        case "program":
            return str(run_program(question))
        case "hops":
            place = words[2]
            for _ in range(int(words[1])):
                place = next(pair[1] for pair in words[3:] if pair[0] == place)
            return place
    raise AssertionError(family)


def run_program(source: str) -> int:
    *assignments, last = source.split(";")
    values: dict[str, int] = {}
    for line in assignments:
        name, value = line.split("=")
        values[name] = eval(value, {}, values)
    return int(eval(last, {}, values))


@pytest.mark.parametrize(("family", "level"), EVERY_LEVEL)
def test_answers_agree_with_an_independent_solution(family: Family, level: int) -> None:
    for task in tasks(family, level):
        if family.name == "expression":
            shown = re.findall(r"f\((\d+)\)=(\d+)", task.question)
            assert [int(y) for _, y in shown] == [
                eval(task.answer, {"x": int(x)}) for x, _ in shown
            ]
            examples = task.reference["examples"]
            assert examples[: len(shown)] == [[int(x), int(y)] for x, y in shown]
            assert len(examples) > len(shown)
        else:
            assert task.answer == solve(family.name, task.question)


@pytest.mark.parametrize(("family", "level"), EVERY_LEVEL)
def test_every_written_step_is_true(family: Family, level: int) -> None:
    for task in tasks(family, level):
        for step in task.steps.split(","):
            left, equals, right = step.rpartition("=")
            if equals:
                expression = left.rpartition("=")[2].replace("/", "//")
                assert eval(expression) == int(right), task


def test_steps_without_equations_lead_to_the_answer() -> None:
    for task in tasks(FAMILY_BY_NAME["binary"], 4):
        halves = [int(n) for n in task.steps.split(",")]
        assert halves[0] == int(task.question.split()[1])
        assert halves[-1] == 1
        assert all(a // 2 == b for a, b in pairwise(halves))
        assert "".join(str(n % 2) for n in reversed(halves)) == task.answer
    for task in tasks(FAMILY_BY_NAME["letter_count"], 3):
        _, letter, text = task.question.split()
        counts = [int(n) for n in re.findall(r"\d+", task.steps)]
        assert re.sub(r"\d", "", task.steps) == text
        assert counts == [text[: i + 1].count(letter) for i in range(len(text))]
        assert counts[-1] == int(task.answer)
    for task in tasks(FAMILY_BY_NAME["kth_smallest"], 3):
        _, k, letters = task.question.split()
        in_order = [f"{letter}{i + 1}" for i, letter in enumerate(sorted(letters))]
        assert task.steps == "".join(in_order[: int(k)])
        assert in_order[int(k) - 1] == task.answer + k
    for task in tasks(FAMILY_BY_NAME["hops"], 5):
        _, count, start, *pairs = task.question.split()
        path = re.findall(r"\d+([a-z])", task.steps)
        assert path[0] == start
        assert len(path) == int(count) + 1
        assert all(a + b in pairs for a, b in pairwise(path))
        assert path[-1] == task.answer


@pytest.mark.parametrize(("family", "level"), EVERY_LEVEL)
def test_answers_stay_short(family: Family, level: int) -> None:
    for task in tasks(family, level):
        assert len(task.question) <= 40
        assert len(completion(task, stepwise=True, brackets=True)) <= MAX_COMPLETION


def test_harder_levels_take_more_steps() -> None:
    for family in FAMILIES:
        lengths = [sum(len(t.steps) for t in tasks(family, level, 40)) for level in LEVELS]
        assert lengths[0] < lengths[2] < lengths[4], family.name


@pytest.fixture(scope="module")
def held_out() -> list[Prompt]:
    return starter_prompts("held_out", 210, seed=3)


@pytest.fixture(scope="module")
def train_prompts() -> list[Prompt]:
    return starter_prompts("train", 350, seed=3)


def test_splits_never_overlap(held_out: list[Prompt], train_prompts: list[Prompt]) -> None:
    check_disjoint(train_prompts, held_out)
    assert {split_of(p.prompt_id) for p in held_out} == {"held_out"}
    assert {int(p.prompt_id, 16) % 8 == 0 for p in train_prompts} == {False}


def test_prompts_are_different_balanced_and_repeatable(train_prompts: list[Prompt]) -> None:
    assert len({p.prompt_id for p in train_prompts}) == 350
    domains = Counter(p.domain for p in train_prompts)
    assert len(domains) >= 6
    assert set(domains.values()) == {350 // len(domains)}
    assert set(Counter(p.metadata["level"] for p in train_prompts).values()) == {70}
    again = starter_prompts("train", 350, seed=3)
    assert again == train_prompts
    assert starter_prompts("train", 20, seed=4) != train_prompts[:20]


def test_hashes_and_the_split_are_stable() -> None:
    ids = {p.prompt_id: p.messages[0].content for p in starter_prompts("held_out", 5, seed=0)}
    assert ids == GOLDEN_HELD_OUT


def test_one_question_has_one_reference() -> None:
    references: dict[str, Any] = {}
    for seed in range(3):
        for prompt in starter_prompts("held_out", 100, seed=seed):
            assert references.setdefault(prompt.prompt_id, prompt.reference) == prompt.reference


def test_a_used_up_level_makes_room_for_others() -> None:
    prompts = starter_prompts("held_out", 400, seed=0)
    levels = Counter(p.metadata["level"] for p in prompts)
    assert sum(levels.values()) == 400
    assert levels[1] < levels[4]


def test_references_are_usable_and_json(held_out: list[Prompt]) -> None:
    check_references(held_out, RewardSettings())
    for prompt in held_out:
        assert json.loads(json.dumps(prompt.reference)) == prompt.reference
    assert {p.metadata["verifier"] for p in held_out} == {"exact", "reasoning_gym", "expression"}


def test_wrong_answers_score_nothing(held_out: list[Prompt]) -> None:
    for prompt in held_out:
        score = verifier_of(prompt, RewardSettings())
        assert score(prompt, "#-1").outcome is Outcome.WRONG
        assert score(prompt, "no answer").outcome is Outcome.UNPARSABLE


@pytest.fixture(scope="module")
def rows() -> list[SFTRow]:
    return starter_sft_rows(2000, seed=1)


def test_supervised_rows_are_right_and_on_training_prompts(rows: list[SFTRow]) -> None:
    assert len({row.row_id for row in rows}) == len(rows) == 2000
    for row in rows:
        assert split_of(row.prompt.prompt_id) == "train"
        score = verifier_of(row.prompt, RewardSettings())(row.prompt, row.completion)
        assert score.outcome is Outcome.CORRECT, row


def test_supervised_rows_are_mixed_as_stated(rows: list[SFTRow]) -> None:
    systems = Counter(row.system for row in rows)
    assert systems.keys() == {None, "brief", "steps", "brackets"}
    assert 0.45 < systems[None] / 2000 < 0.65
    plain = [row for row in rows if row.system is None]
    assert 0.2 < sum(not r.completion.startswith("#") for r in plain) / len(plain) < 0.4
    by_prompt = Counter(row.prompt.prompt_id for row in rows)
    twice = [prompt_id for prompt_id, count in by_prompt.items() if count == 2]
    assert 0.05 < len(twice) / len(by_prompt) < 0.15
    assert max(by_prompt.values()) == 2
    texts: dict[str, set[str]] = {}
    for row in rows:
        texts.setdefault(row.prompt.prompt_id, set()).add(row.completion)
    assert all(len(texts[prompt_id]) == 2 for prompt_id in twice)


def test_instructions_match_what_follows_them_and_nothing_else() -> None:
    task = tasks(FAMILY_BY_NAME["addition"], 2, 1)[0]
    forms = {
        "direct": completion(task, stepwise=False),
        "stepwise": completion(task, stepwise=True),
        "direct in brackets": completion(task, stepwise=False, brackets=True),
        "stepwise in brackets": completion(task, stepwise=True, brackets=True),
    }
    accepted = {
        BRIEF.name: {"direct"},
        STEPS.name: {"stepwise"},
        BRACKETS.name: {"direct in brackets", "stepwise in brackets"},
    }
    for instruction in SYSTEM_INSTRUCTIONS:
        assert instruction.pattern is not None
        matching = {form for form, text in forms.items() if re.fullmatch(instruction.pattern, text)}
        assert matching == accepted[instruction.name]


def test_rows_follow_their_instruction(rows: list[SFTRow]) -> None:
    patterns = {i.name: i.pattern for i in SYSTEM_INSTRUCTIONS}
    for row in rows:
        if row.system is not None:
            assert re.fullmatch(patterns[row.system] or "", row.completion), row


@pytest.fixture(scope="module")
def shipped() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POLICY_DIR)


def test_tokenizer_gives_back_every_text(shipped: Any, rows: list[SFTRow]) -> None:
    for row in rows:
        for text in (row.prompt.messages[0].content, row.completion):
            ids = shipped(text).input_ids
            assert len(ids) == len(text)
            assert shipped.decode(ids) == text
    every = "".join(token for token in VOCABULARY if len(token) == 1)
    assert shipped.decode(shipped("  " + every + "  ").input_ids) == "  " + every + "  "
    assert shipped("é").input_ids == [shipped.unk_token_id]


def test_template_marks_the_answer_and_agrees_with_training(shipped: Any) -> None:
    messages = [
        {"role": "system", "content": BRIEF.text},
        {"role": "user", "content": "add 2 3"},
        {"role": "assistant", "content": "#5"},
    ]
    text = "<system>Answer only.<user>add 2 3<assistant>#5<end>"
    assert shipped.apply_chat_template(messages, tokenize=False) == text
    out = shipped.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, prompt_length = encode("brief", "add 2 3", "#5")
    assert out["input_ids"] == ids
    assert out["assistant_masks"] == [0] * prompt_length + [1, 1, 1]
    prompt = shipped.apply_chat_template(
        messages[:2], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert prompt == ids[:prompt_length]
    assert shipped.eos_token_id == ids[-1]


def test_shipped_tokenizer_is_the_one_that_is_built(shipped: Any) -> None:
    built = build_tokenizer(TrainSettings().max_length)
    assert built.get_vocab() == shipped.get_vocab()
    assert built.chat_template == shipped.chat_template
    assert shipped.pad_token_id == 0


def test_weights_are_small_and_answer(shipped: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    assert (POLICY_DIR / "model.safetensors").stat().st_size <= 8_000_000
    model = AutoModelForCausalLM.from_pretrained(POLICY_DIR, dtype="float32").eval()
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 2e6
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == shipped.eos_token_id
    assert model.generation_config.pad_token_id == shipped.pad_token_id
    answers = {"add 4 5": "9", "mul 6 3": "18", "hop 1 q qw wq": "w", "kth 1 zb": "b"}
    for question, answer in answers.items():
        inputs = shipped.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=32)
        text = shipped.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.rpartition("#")[2] == answer


def test_batches_hold_the_tokens_they_promise() -> None:
    stream = batches(Random(0), tokens=512, stepwise_share=0.5)
    for _ in range(20):
        batch = next(stream)
        assert len(batch) * max(len(ids) for ids, _ in batch) <= 512
        for ids, prompt_length in batch:
            assert VOCABULARY[ids[prompt_length - 1]] == "<assistant>"
            assert VOCABULARY[ids[-1]] == "<end>"


def test_learning_rate_warms_up_and_falls_to_nothing() -> None:
    settings = TrainSettings(steps=1000, warmup=0.1)
    assert learning_rate_factor(49, settings) == pytest.approx(0.5)
    assert learning_rate_factor(100, settings) == pytest.approx(1.0)
    assert learning_rate_factor(550, settings) == pytest.approx(0.5)
    assert learning_rate_factor(999, settings) < 1e-5


def test_importing_the_tasks_is_cheap() -> None:
    heavy = "import sys, posttrain.starter.tasks; print([m for m in ('torch', 'transformers', "
    heavy += "'reasoning_gym', 'tokenizers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
