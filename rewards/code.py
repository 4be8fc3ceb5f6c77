"""The answer is a Python program, run in the sandbox against tests.

`prompt.reference` is one of

    {"cases": [{"input": "5\\n", "output": "120\\n"}, …]}              stdin against stdout
    {"function": "f", "cases": [{"args": [5], "expected": 120}, …]}    calls; also "Solution.f"

Every case is a process of its own, which is told its input and nothing else: outputs are compared
here. So no program can pass by leaving early, by changing what is built in, or by looking around;
to print what was expected it has to compute it.

Outcomes: `UNPARSABLE` without a program that compiles; `LIMIT` when the program fails on its own
(an uncaught exception, a non-zero exit code, a signal, the deadline, a broken limit); `WRONG` when
it ends well and says something else. All three score 0; a sandbox that cannot be started or dies
raises SandboxError, so that the answer stays unscored.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from posttrain.errors import DataError
from posttrain.types import Outcome, Prompt
from rewards.reasoning_section import after_reasoning
from rewards.sandbox import Sandbox, shared_sandbox
from rewards.sandbox_client import Execution, Program
from rewards.sandbox_launcher import SandboxSettings
from rewards.score import Score, failed, quote

TOLERANCE = 1e-6
"""Relative, and absolute below 1, for numbers that are expected with a decimal point."""

Run = Callable[[Program, float], Execution]
"""(program, seconds that it may still take) -> how it ended."""


class CodeSettings(BaseModel):
    """How programs are scored. `sandbox` bounds one case, `answer_s` all cases of an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    partial_credit: bool = Field(
        default=False, description="the share of passed cases instead of all or nothing"
    )
    answer_s: float = Field(
        default=8.0, gt=0, description="seconds for one answer; below the scorer's own deadline"
    )
    sandbox: SandboxSettings = SandboxSettings()


DEFAULTS = CodeSettings()

_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*")
_PYTHON = ("python", "python3", "py")
_FRACTION = re.compile(r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def score(prompt: Prompt, text: str, settings: CodeSettings = DEFAULTS) -> Score:
    """Runs the program in `text` on every case. Raises SandboxError; never for what it does."""
    return score_with(shared_sandbox(settings.sandbox).run, prompt, text, settings)


def require_sandbox(settings: CodeSettings) -> None:
    """Raises SandboxError, saying what to do, where no program could be run."""
    Sandbox(settings.sandbox).close()


def score_with(run: Run, prompt: Prompt, text: str, settings: CodeSettings) -> Score:
    """As `score`, with `run` in the place of the sandbox."""
    source = extract_program(text)
    if source is None:
        return failed(Outcome.UNPARSABLE, "no closed ```python block behind the reasoning section")
    cases: list[Mapping[str, Any]] = prompt.reference["cases"]
    function: str | None = prompt.reference.get("function")
    deadline = time.monotonic() + settings.answer_s
    passed = 0
    first: tuple[Outcome, str] | None = None
    for number, case in enumerate(cases, start=1):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            first = first or (Outcome.LIMIT, f"case {number} was not begun: out of time")
            break
        execution = run(_program(source, function, case), left_s)
        if not execution.compiled:
            return failed(Outcome.UNPARSABLE, execution.last_words)
        failure = _verdict(execution, function, case)
        if failure is None:
            passed += 1
            continue
        first = first or (failure[0], f"case {number} of {len(cases)}: {failure[1]}")
        if not settings.partial_credit:
            break
    return _total(passed, len(cases), first, settings)


def _total(
    passed: int, num_cases: int, first: tuple[Outcome, str] | None, settings: CodeSettings
) -> Score:
    """`first` is the first case that failed: what became of it is what became of the answer."""
    if first is None:
        return Score(correctness=1.0, outcome=Outcome.CORRECT)
    outcome, explanation = first
    if not settings.partial_credit:
        return failed(outcome, explanation)
    return Score(
        correctness=passed / num_cases,
        outcome=outcome,
        explanation=f"{passed} of {num_cases} cases; {explanation}",
    )


def extract_program(text: str) -> str | None:
    """The last closed fenced block of Python behind the reasoning; where there is none, the last of
    no stated language, which beside Python is rather what the program prints."""
    answer = after_reasoning(text)
    if answer is None:
        return None
    programs: dict[str, str] = {}
    fence, margin, language, lines = "", 0, "", list[str]()
    for line in answer.split("\n"):
        match = _FENCE.fullmatch(line)
        if not fence:
            if match:
                fence, margin, language, lines = match[2], len(match[1]), match[3].lower(), []
        elif match and match[2].startswith(fence) and not match[3]:
            programs["python" if language in _PYTHON else language] = _without_margin(lines, margin)
            fence = ""
        else:
            lines.append(line)
    return programs.get("python", programs.get(""))


def _without_margin(lines: list[str], margin: int) -> str:
    """A block in a list is indented as a whole; at most as its fence, and as its first line, is."""
    first = next((line for line in lines if line.strip()), "")
    margin = min(margin, _indentation(first))
    return "".join(f"{line[min(margin, _indentation(line)) :]}\n" for line in lines) or "\n"


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))


def _program(source: str, function: str | None, case: Mapping[str, Any]) -> Program:
    if function is None:
        return Program(source=source, stdin=case["input"])
    return Program(source=source, function=function, arguments=tuple(case["args"]))


def _verdict(
    execution: Execution, function: str | None, case: Mapping[str, Any]
) -> tuple[Outcome, str] | None:
    """None for a case that passed."""
    if execution.failure is not None:
        return Outcome.LIMIT, execution.failure
    if function is None:
        output = execution.stdout.decode(errors="replace")
        if same_output(output, case["output"]):
            return None
        return Outcome.WRONG, f"printed {quote(output)}"
    if not execution.result:
        return Outcome.WRONG, "ended before the function returned"
    try:
        value = json.loads(execution.result)
    except (ValueError, RecursionError):  # the program wrote to the result itself
        return Outcome.WRONG, "a result that cannot be read"
    if same_value(value, case["expected"]):
        return None
    return Outcome.WRONG, f"returned {quote(execution.result.decode(errors='replace'))}"


def same_output(given: str, expected: str) -> bool:
    """Line by line, blanks at the ends of lines and lines at the end of the text apart; where a
    number with a decimal point is expected, within `TOLERANCE`."""
    given_lines, expected_lines = _lines(given), _lines(expected)
    if len(given_lines) != len(expected_lines):
        return False
    return all(map(_same_line, given_lines, expected_lines))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _same_line(given: str, expected: str) -> bool:
    if given == expected:
        return True
    given_words, expected_words = given.split(), expected.split()
    if len(given_words) != len(expected_words):
        return False
    return all(map(_same_word, given_words, expected_words))


def _same_word(given: str, expected: str) -> bool:
    if given == expected:
        return True
    if not _FRACTION.fullmatch(expected) or not re.fullmatch(r"[0-9.eE+-]{1,400}", given):
        return False
    try:
        return _close(float(given), float(expected))
    except ValueError:
        return False


def same_value(given: Any, expected: Any) -> bool:
    """JSON values; as in Python 1 == 1.0 == True, and an expected fraction within `TOLERANCE`."""
    match given, expected:
        case list(), list():
            return len(given) == len(expected) and all(map(same_value, given, expected))
        case dict(), dict():
            return given.keys() == expected.keys() and all(
                same_value(given[key], expected[key]) for key in expected
            )
        case int() | float(), float():
            try:
                return _close(float(given), expected)
            except OverflowError:  # an integer beyond every float
                return False
        case _:
            return bool(given == expected)


def _close(given: float, expected: float) -> bool:
    return math.isclose(given, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def check_reference(prompt: Prompt, settings: CodeSettings = DEFAULTS) -> None:
    """Raises DataError unless the reference has tests that some program could pass."""
    reference: Any = prompt.reference
    match reference:
        case {"cases": [_, *_] as cases, **other} if set(other) <= {"function"}:
            pass
        case {"cases": []}:
            raise DataError("the reference has no cases; a program without tests cannot be scored")
        case _:
            raise DataError(
                'the reference must be {"cases": [{"input", "output"}, …]} or {"function": name, '
                f'"cases": [{{"args", "expected"}}, …]}}, got {quote(str(reference))}'
            )
    function = reference.get("function")
    if function is not None and not _is_name(function):
        raise DataError(
            f"the function must be a name such as 'solve' or 'Solution.solve', got {function!r}"
        )
    for number, case in enumerate(cases, start=1):
        problem = _call_problem(case) if function is not None else _stdin_problem(case)
        if problem is not None:
            raise DataError(f"case {number}: {problem}, got {quote(str(case))}")
        limit = settings.sandbox.file_mb << 20
        if len(json.dumps(case)) > limit:
            raise DataError(
                f"case {number} is longer than a program may write ({settings.sandbox.file_mb} "
                "MiB); raise rewards.code.sandbox.file_mb or leave the case out"
            )


def _is_name(function: Any) -> bool:
    return isinstance(function, str) and all(part.isidentifier() for part in function.split("."))


def _stdin_problem(case: Any) -> str | None:
    match case:
        case {"input": str(), "output": str(), **other} if not other:
            return None
        case _:
            return "it must be two strings, `input` and `output`"


def _call_problem(case: Any) -> str | None:
    match case:
        case {"args": list(args), "expected": expected, **other} if not other:
            pass
        case _:
            return "it must be a list `args` and a value `expected`"
    try:
        same = same_value(json.loads(json.dumps(expected)), expected)
        json.dumps(args)
    except (TypeError, ValueError, RecursionError) as error:
        return f"JSON cannot hold it ({error})"
    return None if same else "no value equals `expected`"
