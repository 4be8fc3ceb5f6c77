"""Pairs from groups that RL left: only what the policy of today might have written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ledger_entries import draw, end
from online_fakes import make_group

from posttrain.data.chat import ChatFormat
from posttrain.data.instructions import InstructionMix, InstructionSettings
from posttrain.data.pairs import MiningSettings
from posttrain.data.prompts import make_prompt
from posttrain.ledger import Ledger
from posttrain.rollout_log import RolloutLog, newest_groups
from posttrain.run_dir import RunDir
from posttrain.stages import pair_mining
from posttrain.stages.stored_pairs import stored_pairs
from posttrain.types import (
    DrawOutcome,
    Outcome,
    PolicyVersion,
    Prompt,
    Reward,
    Rollout,
    RolloutGroup,
    Sampling,
    VersionSpan,
)

PROMPTS = [make_prompt(f"{n}+1=?", reference=str(n + 1), domain="sums") for n in range(4)]
END = 2


def group(prompt: Prompt, *answers: tuple[str, Outcome], draw: str) -> RolloutGroup:
    return RolloutGroup(
        draw_id=draw,
        prompt=prompt,
        system=None,
        sampling=Sampling(max_tokens=8),
        rollouts=tuple(
            Rollout(
                rollout_id=f"{draw}/{number}",
                draw_id=draw,
                prompt_token_ids=(3, 4),
                completion_token_ids=(*range(5, 5 + len(text)), END),
                rollout_logprobs=(-1.0,) * (len(text) + 1),
                text=text,
                finish_reason="stop",
                version_spans=(VersionSpan(0, len(text) + 1, PolicyVersion(1, 2)),),
            )
            for number, (text, _) in enumerate(answers)
        ),
        rewards=tuple(
            Reward(
                value=float(outcome is Outcome.CORRECT),
                correctness=float(outcome is Outcome.CORRECT),
                outcome=outcome,
            )
            for _, outcome in answers
        ),
    )


class Engine:
    """Finds answers with a 9 in them unlikely: -5 nats for each such token, -1 for others."""

    def __init__(self, nine: int) -> None:
        self.nine = nine
        self.scored = 0

    async def score_tokens_once(self, sequences: Any, label: str) -> Any:
        self.scored += len(sequences)
        assert max(map(len, sequences)) < 64  # vLLM refuses a sequence that leaves no room
        return [[-5.0 if t == self.nine else -1.0 for t in ids[1:]] for ids in sequences]


@pytest.fixture
def context(tmp_path: Path, tiny_policy: Path) -> Any:
    return SimpleNamespace(
        run=RunDir(tmp_path),
        settings=SimpleNamespace(policy=SimpleNamespace(max_length=64)),
        ledger=SimpleNamespace(surviving_ends=lambda: {(draw, 1) for draw in "abcd"}),
        chat=ChatFormat(str(tiny_policy)),
        train=PROMPTS[:3],
        instruction_mix=lambda salt: InstructionMix([], salt),
    )


async def test_a_stored_pair_counts_where_both_answers_are_likely_now(context: Any) -> None:
    log = RolloutLog(context.run.rollouts_dir, attempt=1)
    right, wrong = Outcome.CORRECT, Outcome.WRONG
    log.append(group(PROMPTS[0], ("#1", right), ("#2", wrong), draw="a"), DrawOutcome.TRAINED)
    log.append(group(PROMPTS[1], ("#2", right), ("#9", wrong), draw="b"), DrawOutcome.TRAINED)
    log.append(group(PROMPTS[2], ("#9", right), ("#4", wrong), draw="c"), DrawOutcome.TRAINED)
    # Not among the tasks any more.
    log.append(group(PROMPTS[3], ("#4", right), ("#5", wrong), draw="d"), DrawOutcome.TRAINED)
    log.flush()
    engine = Engine(context.chat.tokenizer.convert_tokens_to_ids("9"))
    fresh = [group(PROMPTS[0], *[("#1", right)] * 8, draw="new")]
    settings = MiningSettings(stored_groups=8, cases=["wrong"])
    pairs = await stored_pairs(context, engine, settings, fresh)
    assert [(p.prompt, p.chosen, p.rejected, p.corner_case) for p in pairs] == [
        (PROMPTS[0], "#1", "#2", "wrong")
    ]
    newest = await stored_pairs(
        context, engine, settings.model_copy(update={"stored_groups": 3}), fresh
    )
    assert newest == []


async def test_a_prompt_has_its_pairs_once_however_often_it_was_answered(
    context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = Outcome.CORRECT, Outcome.WRONG
    log = RolloutLog(context.run.rollouts_dir, attempt=1)
    for name, answer in (("a", "#3"), ("b", "#4"), ("c", "#5")):
        stored = group(PROMPTS[0], ("#1", right), (answer, wrong), draw=name)
        log.append(stored, DrawOutcome.TRAINED)
    log.append(group(PROMPTS[1], ("#2", right), ("#3", wrong), draw="d"), DrawOutcome.TRAINED)
    log.flush()
    engine = Engine(context.chat.tokenizer.convert_tokens_to_ids("9"))

    async def serving(model: str) -> Engine:
        return engine

    async def sample(*_: Any) -> list[RolloutGroup]:
        return [group(PROMPTS[0], ("#1", right), ("#2", wrong), draw="new")]

    context.pools = SimpleNamespace(serving=serving)
    monkeypatch.setattr(pair_mining, "_sample", sample)
    settings = MiningSettings(stored_groups=8, cases=["wrong"], pairs_per_prompt=2)
    pairs = await pair_mining.mine(context, Path("policy"), settings)
    assert [(pair.prompt, pair.rejected) for pair in pairs] == [
        (PROMPTS[0], "#2"),  # what it answers now comes first, then the newest
        (PROMPTS[1], "#3"),
        (PROMPTS[0], "#5"),
    ]
    assert engine.scored == 2 + 2 * 4  # two fresh answers, and both of four pairs
    one = settings.model_copy(update={"pairs_per_prompt": 1})
    pairs = await pair_mining.mine(context, Path("policy"), one)
    assert [pair.rejected for pair in pairs] == ["#2", "#3"]
    assert engine.scored == 10 + 2 + 2 * 1  # nothing that would be left out is scored


async def test_groups_under_a_system_instruction_that_is_gone_are_passed_over_and_counted(
    context: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = ("#1", Outcome.CORRECT), ("#2", Outcome.WRONG)
    log = RolloutLog(context.run.rollouts_dir, attempt=1)
    for name, prompt, system in (("a", 0, None), ("b", 1, "brief"), ("c", 2, "gone")):
        stored = replace(group(PROMPTS[prompt], *answers, draw=name), system=system)
        log.append(stored, DrawOutcome.TRAINED)
    log.append(group(PROMPTS[3], *answers, draw="d"), DrawOutcome.TRAINED)  # no task any more
    log.flush()
    brief = InstructionSettings(name="brief", text="Be brief.")
    context.instruction_mix = lambda salt: InstructionMix([brief], salt)
    engine = Engine(context.chat.tokenizer.convert_tokens_to_ids("9"))
    fresh = [group(PROMPTS[0], *answers, draw="new")]
    settings = MiningSettings(stored_groups=8, cases=["wrong"])
    pairs = await stored_pairs(context, engine, settings, fresh)
    assert [(pair.prompt, pair.system) for pair in pairs] == [
        (PROMPTS[1], "brief"),
        (PROMPTS[0], None),
    ]
    assert "dpo: 1 of 3 groups that RL left are passed over" in capsys.readouterr().err


async def test_groups_of_steps_that_never_happened_teach_nothing(context: Any) -> None:
    answers = ("#1", Outcome.CORRECT), ("#2", Outcome.WRONG)
    with Ledger(context.run.ledger_path) as ledger:
        for attempt in (1, 2):
            assert ledger.open_attempt("rl", 0) == attempt  # the second begins again
            log = RolloutLog(context.run.rollouts_dir, attempt)
            draw(ledger, "a", attempt, at=0)
            log.append(group(PROMPTS[attempt - 1], *answers, draw="a"), DrawOutcome.TRAINED)
            end(ledger, "a", 1)
            log.flush()
        context.ledger = ledger
        engine = Engine(context.chat.tokenizer.convert_tokens_to_ids("9"))
        settings = MiningSettings(stored_groups=8, cases=["wrong"])
        fresh = [group(PROMPTS[2], *answers, draw="new")]
        pairs = await stored_pairs(context, engine, settings, fresh)
    assert [pair.prompt for pair in pairs] == [PROMPTS[1]]


async def test_what_fills_the_whole_context_is_not_scored(context: Any) -> None:
    answers = ("#1", Outcome.CORRECT), ("#2", Outcome.WRONG)
    prompt = context.chat.length([{"role": "user", "content": "0+1=?"}])
    log = RolloutLog(context.run.rollouts_dir, attempt=1)
    log.append(group(PROMPTS[0], *answers, draw="a"), DrawOutcome.TRAINED)
    too_long = ("#1", Outcome.CORRECT), ("#" + "2" * (64 - prompt), Outcome.WRONG)
    log.append(group(PROMPTS[1], *too_long, draw="b"), DrawOutcome.TRAINED)
    log.flush()
    engine = Engine(context.chat.tokenizer.convert_tokens_to_ids("9"))
    settings = MiningSettings(stored_groups=8, cases=["wrong"])
    fresh = [group(PROMPTS[2], ("#3", Outcome.CORRECT), ("3" * 61, Outcome.WRONG), draw="new")]
    pairs = await stored_pairs(context, engine, settings, fresh)
    assert [pair.prompt for pair in pairs] == [PROMPTS[0]]
    assert engine.scored == 1 + 2
    assert await stored_pairs(context, engine, settings, []) == []


def test_the_newest_groups_come_first(tmp_path: Path) -> None:
    for attempt in (1, 2):
        log = RolloutLog(tmp_path, attempt=attempt)
        for number in range(3):
            log.append(make_group("01", draw_id=f"d{attempt}-{number}"), DrawOutcome.TRAINED)
            log.flush()
    everything = {(f"d{a}-{number}", a) for a in (1, 2) for number in range(3)}
    found = newest_groups(tmp_path, 4, everything)
    assert [rows[0]["draw_id"] for rows in found] == ["d2-2", "d2-1", "d2-0", "d1-2"]
    assert [row["text"] for row in found[0]] == ["0", "1"]
    assert len(newest_groups(tmp_path, 99, everything)) == 6
    assert newest_groups(tmp_path / "none", 1, everything) == []
    void = {("d2-2", 2), ("d1-2", 1)}
    found = newest_groups(tmp_path, 3, everything - void)
    assert [rows[0]["draw_id"] for rows in found] == ["d2-1", "d2-0", "d1-1"]
