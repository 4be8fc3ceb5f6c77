"""How answers that are programs are read, compared and scored."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewards_fakes import rollout
from sandbox_helpers import FORBIDDEN, close_all, open_or_skip

from posttrain.data.prompts import make_prompt
from posttrain.errors import DataError, SandboxError
from posttrain.types import Outcome, Prompt
from rewards import code
from rewards.code import CodeSettings, extract_program, same_output, same_value
from rewards.pool import ScorerPool
from rewards.sandbox import Sandbox
from rewards.sandbox_client import Execution, Program
from rewards.sandbox_launcher import SandboxSettings
from rewards.score import Score
from rewards.scorer import score_rollouts
from rewards.shaping import RewardSettings
from rewards.verifiers import check_reference, check_references

CORRECT, WRONG, UNPARSABLE, LIMIT = (
    Outcome.CORRECT,
    Outcome.WRONG,
    Outcome.UNPARSABLE,
    Outcome.LIMIT,
)


@pytest.fixture(scope="module", autouse=True)
def _closed_at_the_end() -> Iterator[None]:
    yield
    close_all()


def prompt(reference: Any) -> Prompt:
    metadata = {"verifier": "code"}
    return make_prompt("a task", reference=reference, domain="programs", metadata=metadata)


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nDone."


SQUARES = {"cases": [{"input": f"{n}\n", "output": f"{n * n}\n"} for n in (2, 3, 4)]}
SQUARE = {"function": "f", "cases": [{"args": [n], "expected": n * n} for n in (2, 3, 4)]}


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("```py\na\n\nb\n```\n", "a\n\nb\n"),
        ("```Python3 title=x\na\n```", "a\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("  ```python\n  a\n  ```", "a\n"),
        ("1. So:\n\t```python\n\tif a:\n\t\tb\n\n\t```", "if a:\n\tb\n\n"),
        ('  ```python\n\n  a = """\n b\n   c"""\n  ```', '\na = """\nb\n c"""\n'),
        ("    ```python\nif a:\n  if b:\n    c\n    ```", "if a:\n  if b:\n    c\n"),
        ("```python\n  a\n```", "  a\n"),
        ("````python\na = '''\n```\n'''\n````", "a = '''\n```\n'''\n"),
        ("```python\nfirst\n```\n```python\nlast\n```", "last\n"),
        ("```python\na\n```\nExample output:\n```\n120\n```", "a\n"),
        ("```\n5\n```\n```py\na\n```\n```\n120\n```", "a\n"),
        ("```\nfirst\n```\n```\nlast\n```", "last\n"),
        ("```python\na\n```\n```bash\nrun\n```", "a\n"),
        ("```python\na\n```\n```text\n5\n```\n", "a\n"),
        ("```python\na\n```\n```python\nnever closed", "a\n"),
        ("<think>```python\ndraft\n```</think>```x", None),
        ("<think>\n```python\ndraft\n```\n</think>\n```python\na\n```", "a\n"),
        ("<think>\n```python\ndraft\n```\n", None),
        ("```python\nprint(1)", None),
        ("print(1)", None),
        ("``python\na\n``", None),
        ("```js\na\n```", None),
        ("```python\n```", "\n"),
        ("", None),
    ],
)
def test_extract_program(text: str, program: str | None) -> None:
    assert extract_program(text) == program


@pytest.mark.parametrize("line", ["```", "```a", "~~~\n```", "`" * 50, "```python\nx", "<think>"])
def test_extraction_is_linear(line: str) -> None:
    began = time.perf_counter()
    extract_program(f"{line}\n" * 100_000)
    assert time.perf_counter() - began < 10.0  # quadratic, it would be minutes


@pytest.mark.parametrize(
    ("given_text", "expected", "same"),
    [
        ("5\n", "5", True),
        ("5 \r\n\n\n", "5", True),
        ("1 2\n3", "1 2\n3\n", True),
        ("1  2", "1 2", True),
        ("", "\n", True),
        ("a\n\nb", "a\n\nb", True),
        ("a\nb", "a\n\nb", False),
        ("1 2 3", "1 2\n3", False),
        ("5", "6", False),
        ("5.0", "5", False),
        ("05", "5", False),
        ("1000000000000001", "1000000000000002", False),
        ("0.333333334", "0.3333333333", True),
        ("0.3334", "0.3333333333", False),
        ("5", "5.0", True),
        ("1e0", "1.00", True),
        ("nan", "0.5", False),
        ("inf", "1.5", False),
        ("1_0.0", "10.0", False),
        ("٥.0", "5.0", False),
        ("9" * 1000, "1.5", False),
        ("YES", "yes", False),
        ("a b c", "a b", False),
    ],
)
def test_same_output(given_text: str, expected: str, same: bool) -> None:
    assert same_output(given_text, expected) is same


@pytest.mark.parametrize(
    ("given_value", "expected", "same"),
    [
        (5, 5, True),
        (5.0, 5, True),
        (True, 1, True),
        (5.0000000001, 5, False),
        (0.1 + 0.2, 0.3, True),
        (0.31, 0.3, False),
        (10**400, 1.5, False),
        (float("nan"), 1.5, False),
        ([1, [2.0000000001]], [1, [2.0]], True),
        ([1, 2], [1, 2, 3], False),
        ({"a": 1.0}, {"a": 1}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ("5", 5, False),
        (None, 0, False),
        ([], None, False),
        ("", [], False),
    ],
)
def test_same_value(given_value: Any, expected: Any, same: bool) -> None:
    assert same_value(given_value, expected) is same


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(JSON)
def test_a_value_equals_itself_after_its_way_through_json(value: Any) -> None:
    assert same_value(json.loads(json.dumps(value)), value)


@given(st.text())
def test_an_output_equals_itself(text: str) -> None:
    assert same_output(text, text) and same_output(text + " \n\n", text)


def execution(stdout: str = "", result: str = "", **changes: Any) -> Execution:
    usual: dict[str, Any] = {"exit_code": 0, "timed_out": False, "file_full": False}
    usual |= {"wall_s": 0.1, "cpu_s": 0.1, "stderr": b""}
    return Execution(**(usual | changes), stdout=stdout.encode(), result=result.encode())


def replay(*executions: Execution, reference: Any = SQUARES, **options: Any) -> tuple[Score, int]:
    """The score when the cases end like this, and how many were run."""
    left = list(executions)
    score = code.score_with(
        lambda program, wall_s: left.pop(0), prompt(reference), fenced("x"), CodeSettings(**options)
    )
    return score, len(executions) - len(left)


GOOD = [execution("4"), execution("9"), execution("16")]
LATE = execution(timed_out=True)


def test_all_or_nothing() -> None:
    assert replay(*GOOD) == (Score(correctness=1.0, outcome=CORRECT), 3)
    score, runs = replay(GOOD[0], execution("8"), GOOD[2])
    assert (score.correctness, score.outcome, runs) == (0.0, WRONG, 2)
    assert score.explanation == "case 2 of 3: printed '8'"
    score, runs = replay(LATE, *GOOD[1:])
    assert (score.correctness, score.outcome, runs) == (0.0, LIMIT, 1)


def test_partial_credit() -> None:
    assert replay(*GOOD, partial_credit=True)[0] == Score(correctness=1.0, outcome=CORRECT)
    score, runs = replay(execution("5"), LATE, GOOD[2], partial_credit=True)
    assert (score.correctness, score.outcome, runs) == (1 / 3, WRONG, 3)
    assert score.explanation == "1 of 3 cases; case 1 of 3: printed '5'"


@pytest.mark.parametrize(
    ("run", "outcome"),
    [
        (execution("4", exit_code=1), LIMIT),
        (execution("4", exit_code=-11), LIMIT),
        (execution("4", file_full=True), LIMIT),
        (execution("4", exit_code=65, stderr=b"SyntaxError: bad"), UNPARSABLE),
        (execution(""), WRONG),
    ],
)
@pytest.mark.parametrize("partial_credit", [False, True])
def test_outcomes(run: Execution, outcome: Outcome, partial_credit: bool) -> None:
    score, _ = replay(run, run, run, partial_credit=partial_credit)
    assert (score.correctness, score.outcome) == (0.0, outcome)


def test_results_of_calls() -> None:
    def outcome(result: str) -> Outcome:
        good = [execution(result="9"), execution(result="16")]
        return replay(execution(result=result), *good, reference=SQUARE)[0].outcome

    assert outcome("4") is CORRECT
    assert outcome("4.0") is CORRECT
    for wrong in ("5", "", '"4"', "[4]", "NaN", "4 4", "[" * 99_999, "9" * 9_999, "null"):
        assert outcome(wrong) is WRONG


def test_an_answer_has_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second case gets what the first has left, and the third nothing."""
    waits: list[float] = []
    now = 100.0
    reference = {"cases": [{"input": "", "output": "1"}] * 3}

    def slow(program: Program, wall_s: float) -> Execution:
        nonlocal now
        waits.append(wall_s)
        now += 0.05 if len(waits) == 1 else wall_s + 0.01
        return execution("1")

    monkeypatch.setattr(code.time, "monotonic", lambda: now)
    score = code.score_with(slow, prompt(reference), fenced("x"), CodeSettings(answer_s=0.2))
    assert score.outcome is LIMIT and "case 3 was not begun" in score.explanation
    assert waits == pytest.approx([0.2, 0.15])


def test_expected_outputs_are_not_sent() -> None:
    sent: list[Program] = []

    def note(program: Program, wall_s: float) -> Execution:
        sent.append(program)
        return execution("4213", result="4213")

    for reference in (
        {"cases": [{"input": "1", "output": "4213"}]},
        {"function": "f", "cases": [{"args": [1], "expected": 4213}]},
    ):
        code.score_with(note, prompt(reference), fenced("x"), CodeSettings())
    assert sent == [
        Program(source="x\n", stdin="1"),
        Program(source="x\n", function="f", arguments=(1,)),
    ]


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ({"cases": []}, "no cases"),
        ({"function": "f", "cases": []}, "no cases"),
        ({"cases": "x"}, "the reference must be"),
        ({}, "the reference must be"),
        ("5", "the reference must be"),
        (None, "the reference must be"),
        ([{"input": "", "output": ""}], "the reference must be"),
        ({"cases": [{"input": "1"}]}, "case 1: it must be two strings"),
        ({"cases": [{"input": "1", "output": "1"}, {}]}, "case 2"),
        ({"cases": [{"input": 1, "output": "1"}]}, "two strings"),
        ({"cases": [{"input": "1", "output": "1", "timeout": 5}]}, "two strings"),
        ({"cases": [{"args": [1], "expected": 1}]}, "two strings"),
        ({"tests": [], "cases": [{"input": "1", "output": "1"}]}, "the reference must be"),
        ({"function": "f", "cases": [{"input": "1", "output": "1"}]}, "a list `args`"),
        ({"function": "f", "cases": [{"args": 1, "expected": 1}]}, "a list `args`"),
        ({"function": "f", "cases": [{"args": [1]}]}, "a list `args`"),
        ({"function": "f(", "cases": [{"args": [1], "expected": 1}]}, "must be a name"),
        ({"function": "", "cases": [{"args": [1], "expected": 1}]}, "must be a name"),
        ({"function": 5, "cases": [{"args": [1], "expected": 1}]}, "must be a name"),
        ({"function": "f", "cases": [{"args": [], "expected": float("nan")}]}, "no value equals"),
        ({"function": "f", "cases": [{"args": [], "expected": {1}}]}, "JSON cannot hold it"),
        ({"function": "f", "cases": [{"args": [b"x"], "expected": 1}]}, "JSON cannot hold it"),
        ({"cases": [{"input": "", "output": "x" * (17 << 20)}]}, "longer than a program may write"),
    ],
)
def test_references_that_cannot_be_used(reference: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        code.check_reference(prompt(reference))


@pytest.mark.parametrize("reference", [SQUARES, SQUARE])
def test_references_that_can(reference: Any) -> None:
    code.check_reference(prompt(reference))


# With the rest of the rewards.


def test_without_a_sandbox_a_run_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SandboxSettings] = []

    def refuse(settings: SandboxSettings) -> Sandbox:
        asked.append(settings)
        return Sandbox(settings, launchers=[FORBIDDEN])

    monkeypatch.setattr(code, "Sandbox", refuse)
    chosen = SandboxSettings(memory_mb=99)
    rewards = RewardSettings(code=CodeSettings(sandbox=chosen))
    check_references([make_prompt("?", reference="1", domain="sums")], rewards)
    assert asked == []
    with pytest.raises(DataError, match="1 prompts have references"):
        check_references([prompt({"cases": []})], rewards)
    assert asked == []
    with pytest.raises(SandboxError, match="unshare: not permitted"):
        check_references([prompt(SQUARE)], rewards)
    assert asked == [chosen]


def test_a_sandbox_that_fails_leaves_answers_unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(settings: SandboxSettings) -> Sandbox:
        return Sandbox(settings, launchers=[FORBIDDEN])

    monkeypatch.setattr(code, "shared_sandbox", refuse)
    (reward,) = score_rollouts(prompt(SQUARE), [rollout(fenced("x"))], None, RewardSettings())
    assert (reward.value, reward.outcome) == (None, Outcome.INFRASTRUCTURE)
    assert "unshare: not permitted" in reward.explanation


ANSWERS = {
    "def f(n): return n * n": (CORRECT, 1.0),
    "def f(n): return 4": (WRONG, 1 / 3),
    "def f(n): return n * n if n < 4 else 1 // 0": (LIMIT, 2 / 3),
    "def f(n):\n    while n == 4: pass\n    return n * n": (LIMIT, 2 / 3),
    "def g(n): return n": (LIMIT, 0.0),
    "def f(n)": (UNPARSABLE, 0.0),
}


@pytest.mark.parametrize("partial_credit", [False, True])
def test_in_a_pool_of_workers(partial_credit: bool) -> None:
    """The settings reach the sandbox in the worker process, and every answer its own outcome."""
    open_or_skip("own")
    sandbox = SandboxSettings(cpu_s=1)
    code = CodeSettings(partial_credit=partial_credit, sandbox=sandbox)
    rewards = RewardSettings(code=code, deadlines_s={"code": 60})
    with ScorerPool(1, rewards) as pool:
        rollouts = [rollout(fenced(program)) for program in ANSWERS]
        scored = asyncio.run(pool.score(prompt(SQUARE), rollouts, None))
    for reward, (program, (outcome, share)) in zip(scored, ANSWERS.items(), strict=True):
        whole = float(outcome is CORRECT)
        assert (reward.outcome, reward.correctness) == (
            outcome,
            pytest.approx(share if partial_credit else whole),
        ), (program, reward.explanation)


def test_a_reference_is_checked_against_the_settings_own_limits() -> None:
    rewards = RewardSettings(code=CodeSettings(sandbox=SandboxSettings(file_mb=1)))
    task = prompt({"cases": [{"input": "", "output": "x" * (2 << 20)}]})
    check_reference(task, RewardSettings())
    with pytest.raises(DataError, match=r"rewards\.code\.sandbox\.file_mb"):
        check_reference(task, rewards)
