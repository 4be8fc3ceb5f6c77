"""A tiny random reward model, through transformers in a process of its own."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rewards_fakes import rollout
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from posttrain.data.prompts import make_prompt
from posttrain.errors import ModelError
from posttrain.types import Outcome, Reward, SystemInstruction
from rewards.pool import ScorerPool
from rewards.reward_model import RewardModelSettings, score_texts
from rewards.score import Score, Unscored
from rewards.shaping import RewardSettings

LETTERS = ["<end>", *"abcdefghijklmnopqrstuvwxyz ?.|"]
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}|{{ m['content'] }}<end>{% endfor %}"  # no bos
TASK = make_prompt("which?", reference=None, domain="chat")
TEXTS = ["yes", "no", "a much longer answer than the other two", "maybe so.", "z"]


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    letters = Tokenizer(WordLevel({text: i for i, text in enumerate(LETTERS)}, unk_token="?"))
    letters.pre_tokenizer = Split("", "isolated")
    # It pads with what ends a turn, as many do.
    made = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>", pad_token="<end>")
    made.chat_template = template
    return made


def config(**more: Any) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(LETTERS) + 2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
        **more,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("reward_model")
    Qwen3ForSequenceClassification(config(num_labels=1)).save_pretrained(path)
    tokenizer(TEMPLATE).save_pretrained(path)
    return path


def outputs(model: Path, system: str = "") -> list[float]:
    """Each text by itself: no batch, no padding."""
    net = AutoModelForSequenceClassification.from_pretrained(model)
    found = []
    for text in TEXTS:
        ids = tokenizer(None)(f"{system}u|which?<end>a|{text}<end>")["input_ids"]
        with torch.inference_mode():
            found.append(float(net(torch.tensor([ids])).logits))
    return found


def correctness(findings: tuple[Any, ...]) -> list[float]:
    assert all(isinstance(finding, Score) for finding in findings)
    return [finding.correctness for finding in findings]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_batch_scores_as_each_answer_by_itself(model: Path, batch_size: int) -> None:
    settings = RewardModelSettings(
        model=str(model), batch_size=batch_size, centre=0.5, scale=2.0, success_from=0.4
    )
    findings = score_texts(TASK, TEXTS, None, settings)
    expected = [1 / (1 + math.exp(-(output - 0.5) / 2)) for output in outputs(model)]
    assert len(set(expected)) == len(TEXTS)
    assert correctness(findings) == pytest.approx(expected, abs=1e-5)
    for finding in findings:
        assert isinstance(finding, Score)
        success = finding.correctness >= 0.4
        assert finding.outcome is (Outcome.CORRECT if success else Outcome.WRONG)


def test_the_system_instruction_is_part_of_the_conversation(model: Path) -> None:
    settings = RewardModelSettings(model=str(model))
    brief = SystemInstruction(name="brief", text="be brief.")
    expected = [1 / (1 + math.exp(-o)) for o in outputs(model, "s|be brief.<end>")]
    assert correctness(score_texts(TASK, TEXTS, brief, settings)) == pytest.approx(
        expected, abs=1e-5
    )


def test_what_does_not_fit_is_unscored_and_never_cut(model: Path) -> None:
    settings = RewardModelSettings(model=str(model), max_length=24)
    findings = score_texts(TASK, TEXTS, None, settings)
    assert [type(finding) for finding in findings] == [Score, Score, Unscored, Score, Score]
    assert isinstance(findings[2], Unscored)
    assert findings[2].why == "51 tokens, the reward model takes 24"


def test_in_a_pool_it_has_a_process_of_its_own(model: Path) -> None:
    settings = RewardSettings(
        verifiers={"chat": "reward_model"},
        reward_model=RewardModelSettings(model=str(model)),
        added={"sums": {"reward_model": 0.5}},
    )
    sums = make_prompt("which?", reference="yes", domain="sums")

    async def both(pool: ScorerPool) -> tuple[tuple[Reward, ...], tuple[Reward, ...]]:
        rollouts = [*map(rollout, TEXTS), rollout("#yes")]
        return await pool.score(TASK, rollouts, None), await pool.score(sums, rollouts, None)

    with ScorerPool(1, settings, spares=0) as pool:
        chat, mixed = asyncio.run(both(pool))
    expected = [1 / (1 + math.exp(-output)) for output in outputs(model)]
    assert [reward.value for reward in chat[:-1]] == pytest.approx(expected, abs=1e-5)
    assert [reward.value for reward in mixed[:-1]] == pytest.approx(
        [0.5 * value for value in expected], abs=1e-5
    )
    assert mixed[-1].correctness == 1.0
    assert mixed[-1].value == pytest.approx(1 + 0.5 * mixed[-1].components["reward_model"])


def test_what_is_no_reward_model_is_refused(model: Path, tmp_path: Path) -> None:
    two, untrained = tmp_path / "two", tmp_path / "untrained"
    Qwen3ForSequenceClassification(config(num_labels=2)).save_pretrained(two)
    Qwen3ForCausalLM(config()).save_pretrained(untrained)
    for path in (two, untrained):
        tokenizer(TEMPLATE).save_pretrained(path)
    for path, message in (
        (two, "has 2 outputs"),
        (untrained, r"lacks \['score.weight'\]"),
        (tmp_path / "nowhere", "cannot be loaded"),
    ):
        settings = RewardModelSettings(model=str(path))
        with pytest.raises(ModelError, match=message):
            score_texts(TASK, TEXTS, None, settings)
