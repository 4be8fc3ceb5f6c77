import asyncio
from collections import Counter

import numpy as np
import pytest

from judges.judge import CriticJudge, JudgeSettings, Selected
from judges.labels import LabelSettings
from judges.sampling import Sampler
from judges.schedule import Schedule
from judges.selection import SelectionSettings
from judges.stopping import FixedN
from posttrain.errors import EngineError, StageError
from posttrain.types import (
    Label,
    Message,
    Outcome,
    PolicyVersion,
    Prompt,
    Reward,
    Rollout,
    Sampling,
    SystemInstruction,
    VersionSpan,
)

REWARDS = {
    "+": Reward(value=1.0, correctness=1.0, outcome=Outcome.CORRECT),
    "-": Reward(value=0.0, correctness=0.0, outcome=Outcome.WRONG),
    "t": Reward(value=0.0, correctness=0.0, outcome=Outcome.TRUNCATED),
    "?": Reward(
        value=None, correctness=None, outcome=Outcome.INFRASTRUCTURE, explanation="worker gone"
    ),
}


def prompt(prompt_id: str) -> Prompt:
    message = Message(role="user", content=prompt_id)
    return Prompt(prompt_id=prompt_id, messages=(message,), reference=None, domain="d")


class Script:
    """Answers to each prompt in order, one character an answer, repeated without end."""

    def __init__(self, answers: dict[str, str], delays: dict[str, float] | None = None) -> None:
        self.answers = answers
        self.delays = delays or {}
        self.requests = []
        self.given = Counter()
        self.in_flight = 0
        self.most_in_flight = 0
        self.systems = []

    async def generate(self, request):
        self.requests.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        prompt_id = request.request_id.split("-")[1]
        await asyncio.sleep(self.delays.get(prompt_id, 0.0))
        self.in_flight -= 1
        script = self.answers[prompt_id]
        start = self.given[prompt_id]
        self.given[prompt_id] += request.num_rollouts
        return tuple(
            self.rollout(request, i, script[(start + i) % len(script)])
            for i in range(request.num_rollouts)
        )

    def rollout(self, request, i, text):
        return Rollout(
            rollout_id=f"{request.request_id}-{i}",
            draw_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            completion_token_ids=(1, 2, 3),
            rollout_logprobs=(0.0, 0.0, 0.0),
            text=text,
            finish_reason="stop",
            version_spans=(VersionSpan(0, 3, PolicyVersion(0, 0)),),
        )

    async def score(self, prompt, rollouts, system):
        self.systems.append(system)
        return tuple(REWARDS[r.text] for r in rollouts)


def judge_of(script: Script, system=None, **settings) -> CriticJudge:
    return CriticJudge(
        script,
        script,
        lambda prompt, system: (7, len(prompt.prompt_id)),
        JudgeSettings(**settings),
        critic="f00",
        template="7e1",
        system=system,
    )


def run(script: Script, prompts: list[str], **settings):
    seen = []
    judge = judge_of(script, **settings)
    verdicts = asyncio.run(judge.judge(map(prompt, prompts), on_verdict=seen.append))
    assert sorted(v.prompt_id for v in seen) == sorted(v.prompt_id for v in verdicts)
    return judge, verdicts, seen


def test_each_prompt_stops_when_its_label_is_decided():
    script = Script({"easy": "+", "half": "+-", "rare": "+-----", "never": "-"})
    judge, verdicts, _ = run(script, ["easy", "half", "rare", "never"], round_size=1)
    found = [(v.num_samples, v.num_correct, v.label, v.decided_by) for v in verdicts]
    assert found == [
        (13, 13, Label.EASY, "confidence"),
        (5, 3, Label.MEDIUM, "confidence"),
        (16, 3, Label.MEDIUM, "cap"),
        (16, 0, Label.UNSOLVED, "cap"),
    ]
    assert [v.posterior for v in verdicts] == [(13.5, 0.5), (3.5, 2.5), (3.5, 13.5), (0.5, 16.5)]
    assert judge.usage.samples == 13 + 5 + 16 + 16
    assert judge.usage.completion_tokens == 3 * 50
    assert judge.usage.prompts == 4


def test_rounds_end_at_the_cap_and_cost_less_than_fixed_n():
    answers = {"easy": "+", "half": "+-", "never": "-"}
    script = Script(answers)
    adaptive, verdicts, _ = run(script, list(answers), round_size=4, max_samples=14)
    assert [v.num_samples for v in verdicts] == [14, 8, 14]
    half = [r for r in script.requests if "half" in r.request_id]
    assert [r.request_id for r in half] == ["judge-half-0", "judge-half-1"]
    easy = [r.num_rollouts for r in script.requests if "easy" in r.request_id]
    assert easy == [4, 4, 4, 2]
    fixed, verdicts, _ = run(Script(answers), list(answers), adaptive=False, max_samples=14)
    assert [v.num_samples for v in verdicts] == [14, 14, 14]
    assert {v.decided_by for v in verdicts} == {"fixed n"}
    assert adaptive.usage.samples == 36 < fixed.usage.samples == 42


def test_a_prompt_is_asked_until_that_is_known_which_it_is_judged_for():
    easy, hard = [f"e{i}" for i in range(6)], [f"h{i}" for i in range(6)]
    script = Script({**dict.fromkeys([*easy, "rl"], "+"), **dict.fromkeys([*hard, "both"], "-")})
    seen, decided = [], []
    verdicts = asyncio.run(
        judge_of(script, round_size=4).judge(
            map(prompt, [*easy, "rl", "both", *hard]),
            on_verdict=seen.append,
            on_decided=lambda: decided.append(len(seen)),
            selected=Selected(
                selection=SelectionSettings(drop_easiest=0.5),
                domains=dict.fromkeys([*easy, *hard, "both"], "d"),
                labelled={"rl", "both"},
            ),
        )
    )
    found = {v.prompt_id: (v.num_samples, v.label, v.decided_by) for v in verdicts}
    assert [v.prompt_id for v in verdicts] == [*easy, "rl", "both", *hard]
    assert {found[name] for name in hard} == {(4, Label.UNSOLVED, "cut")}
    assert {found[name] for name in easy} <= {(n, Label.MEDIUM, "cut") for n in (4, 8)}
    assert found["rl"] == (16, Label.EASY, "confidence")
    assert found["both"] == (16, Label.UNSOLVED, "cap")
    assert (seen[0].prompt_id, len(seen), len(decided)) == ("rl", 14, 14)


def test_fixed_n_asks_once_and_labels_at_n():
    script = Script({"half": "+-"})
    _, [verdict], _ = run(script, ["half"], adaptive=False, max_samples=6)
    assert [r.num_rollouts for r in script.requests] == [6]
    assert (verdict.num_correct, verdict.label) == (3, Label.MEDIUM)


def test_infrastructure_errors_leave_the_denominator_and_are_counted():
    script = Script({"p": "+?-t"})
    judge, [verdict], _ = run(script, ["p"], adaptive=False, max_samples=6)
    # Of 6 answers two were unscored, so two more are asked for.
    assert [r.num_rollouts for r in script.requests] == [6, 2]
    assert (verdict.num_samples, verdict.num_correct) == (6, 2)
    assert verdict.outcomes == {
        Outcome.CORRECT: 2,
        Outcome.INFRASTRUCTURE: 2,
        Outcome.WRONG: 2,
        Outcome.TRUNCATED: 2,
    }
    assert verdict.posterior == (2.5, 4.5)
    assert judge.usage.outcomes[Outcome.INFRASTRUCTURE] == 2
    assert judge.usage.samples == 8


def test_one_lost_round_is_retried():
    _, [verdict], _ = run(Script({"p": "????" + "+" * 50}), ["p"], round_size=4)
    assert (verdict.num_samples, verdict.label) == (16, Label.EASY)
    assert verdict.outcomes[Outcome.INFRASTRUCTURE] == 4


def test_a_prompt_that_loses_two_rounds_is_given_up_and_the_others_go_on():
    script = Script({"p": "?", "a": "+", "q": "+++?????????", "b": "+-"})
    judge, verdicts, _ = run(script, ["p", "a", "q", "b"], round_size=4, concurrency=1)
    assert [v.prompt_id for v in verdicts] == ["a", "b"]
    assert sum("-p-" in r.request_id for r in script.requests) == 2
    assert judge.usage.prompts == 2


def test_some_given_up_running_are_an_error_that_says_so():
    poison = dict.fromkeys("pqr", "?")
    script = Script({**poison, "slow": "+"}, delays={"slow": 60.0})
    with pytest.raises(StageError, match=r"to 3 prompts running, the last ., could .*worker gone"):
        run(script, [*poison, "slow"], round_size=4)
    # With answers in between it is the prompts, however many there are.
    script = Script({**dict.fromkeys("pqrstu", "?"), **dict.fromkeys("abcdef", "+-")})
    _, verdicts, _ = run(script, list("paqbrcsdteuf"), round_size=4, concurrency=1)
    assert [v.prompt_id for v in verdicts] == list("abcdef")


def test_nothing_that_could_be_scored_is_an_error_too():
    with pytest.raises(
        StageError, match=r"no answer to any prompt could be scored \(worker gone\)"
    ):
        run(Script({"p": "?", "q": "?"}), ["p", "q"])


def test_what_the_engine_raises_passes_through():
    class Dead(Script):
        async def generate(self, request):
            raise EngineError("generator 0 died")

    with pytest.raises(EngineError, match="generator 0 died"):
        run(Dead({}), ["a", "b"])


async def test_prompts_flow_without_a_batch_barrier():
    names = [f"p{i}" for i in range(8)]
    script = Script(dict.fromkeys(names, "+-"), delays={"p0": 0.2})
    finished = []
    judge = judge_of(script, concurrency=3)
    verdicts = await judge.judge(map(prompt, names), on_verdict=finished.append)
    assert [v.prompt_id for v in verdicts] == names
    assert finished[-1].prompt_id == "p0"
    assert script.most_in_flight == 3


async def test_the_engine_does_not_wait_for_the_scorer():
    class SlowScorer(Script):
        scoring = most_scoring = 0

        async def score(self, prompt, rollouts, system):
            self.scoring += 1
            self.most_scoring = max(self.most_scoring, self.scoring)
            at_engine.append(self.in_flight)
            await asyncio.sleep(0.01)
            self.scoring -= 1
            return await super().score(prompt, rollouts, system)

    at_engine = []
    names = [f"p{i}" for i in range(60)]
    script = SlowScorer(dict.fromkeys(names, "+-"), delays=dict.fromkeys(names, 0.002))
    judge = judge_of(script, concurrency=3, adaptive=False, max_samples=2)
    await judge.judge(map(prompt, names), on_verdict=lambda v: None)
    assert script.most_in_flight == 3
    # What is being scored leaves its place at the engine, but does not pile up there.
    assert 3 < script.most_scoring <= 9


async def test_a_seed_gives_each_answer_its_own_however_requests_are_split():
    def sampler(script, seed):
        sampling = Sampling(max_tokens=9, seed=seed)
        return Sampler(script, script, lambda p, s: (7,), sampling=sampling, concurrency=2)

    async def seeds(sizes, seed=5):
        """Of each answer, when requests take `sizes` answers one after the other."""
        found, asked = [], 0
        for size in sizes:
            script = Script({"p": "+", "q": "+"})
            counts = np.array([asked, asked])
            schedule = Schedule(
                *(counts, counts, counts, np.zeros(2, int), FixedN()),
                round_size=size,
                cap=asked + size,
            )
            prompts = [prompt("p"), prompt("q")]
            await sampler(script, seed).run(schedule, prompts.__getitem__, lambda a: None)
            found += [
                (r.request_id.split("-")[1], r.sampling.seed + i)
                for r in script.requests
                for i in range(r.num_rollouts)
            ]
            asked += size
        return sorted(found)

    whole = await seeds([8])
    assert len(set(whole)) == 16
    assert await seeds([3, 4, 1]) == whole
    assert set(await seeds([8], seed=6)).isdisjoint(whole)


def test_verdict_says_what_it_holds_for():
    system = SystemInstruction(name="brief", text="Answer briefly.")
    script = Script({"p": "+-"})
    _, [verdict], _ = run(script, ["p"], system=system, temperature=0.7, max_tokens=99)
    assert verdict.sampling == {
        "temperature": 0.7,
        "max_tokens": 99,
        "template": "7e1",
        "system": "brief",
    }
    assert (verdict.judge, verdict.critic) == ("critic", "f00")
    request = script.requests[0]
    assert request.prompt_token_ids == (7, 1)
    assert (request.sampling.temperature, request.sampling.max_tokens) == (0.7, 99)
    assert request.sampling.top_p == 1.0
    assert set(script.systems) == {system}


def test_label_settings_reach_the_stopping_rule():
    labels = LabelSettings(confidence=0.8)
    _, [verdict], _ = run(Script({"p": "+"}), ["p"], round_size=1, labels=labels)
    assert verdict.num_samples == 8


def test_no_prompts_no_verdicts():
    _, verdicts, seen = run(Script({}), [])
    assert verdicts == seen == []
