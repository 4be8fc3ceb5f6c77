"""Task families of the starter policy: question, worked steps, answer and how it is checked.

Every family has five levels, from trivial to out of reach. Questions are a few characters, steps
are an algorithm that a tiny transformer can carry out: each step needs only what stands nearby.
Families with an `rg_name` take their problem and answer from that reasoning-gym data set and are
scored by its own `score_answer`; the question is rendered in our own short form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

LEVELS = (1, 2, 3, 4, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One problem. `steps` is the written working that leads to `answer`, without the `#`."""

    question: str
    steps: str
    answer: str
    verifier: str
    reference: Any


@dataclass(frozen=True, slots=True)
class Family:
    """A named generator of tasks: `make(rng, level)` with level in `LEVELS`."""

    name: str
    domain: str
    make: Callable[[Random, int], Task]


def _exact(question: str, steps: list[str], answer: object) -> Task:
    text = str(answer)
    return Task(
        question=question, steps=",".join(steps), answer=text, verifier="exact", reference=text
    )


def _from_gym(name: str, entry: dict[str, Any], question: str, steps: str) -> Task:
    return Task(
        question=question,
        steps=steps,
        answer=entry["answer"],
        verifier="reasoning_gym",
        reference={"family": name, "entry": entry},
    )


@cache
def _gym(name: str, **config: int | bool) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=1, **config)


def _gym_entry(rng: Random, name: str, **config: int | bool) -> dict[str, Any]:
    """An entry of a reasoning-gym data set, picked by `rng`: entry i depends on seed + i alone.

    Where in the data set it stood is left out, so that one question has one reference.
    """
    entry: dict[str, Any] = _gym(name, **config)[rng.getrandbits(40)]
    for key in ("source_index", "difficulty"):
        del entry["metadata"][key]
    return entry


def addition(rng: Random, level: int) -> Task:
    """`add 47 85`; steps go column by column from the right: `7+5+0=12,4+8+1=13`."""
    digits = (1, 2, 3, 4, 6)[level - 1]
    while True:
        entry = _gym_entry(
            rng, "chain_sum", min_terms=2, max_terms=2, min_digits=digits, max_digits=digits
        )
        if "+" in entry["metadata"]["expression"]:
            break
    a, b = entry["metadata"]["expression"].split(" + ")
    steps, carry = [], 0
    for x, y in zip(reversed(a), reversed(b), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return _from_gym("chain_sum", entry, f"add {a} {b}", ",".join(steps))


def multiplication(rng: Random, level: int) -> Task:
    """`mul 347 8`; steps go digit by digit from the right: `7*8+0=56,4*8+5=37,3*8+3=27`."""
    digits = (1, 2, 3, 4, 6)[level - 1]
    a = rng.randint(10 ** (digits - 1), 10**digits - 1)
    b = rng.randint(2, 9)
    steps, carry = [], 0
    for x in reversed(str(a)):
        total = int(x) * b + carry
        steps.append(f"{x}*{b}+{carry}={total}")
        carry = total // 10
    return _exact(f"mul {a} {b}", steps, a * b)


def modulo(rng: Random, level: int) -> Task:
    """`mod 347 6`; steps are long division, remainders only: `3%6=3,34%6=4,47%6=5`."""
    digits = (1, 2, 3, 5, 8)[level - 1]
    n = rng.randint(10 ** (digits - 1), 10**digits - 1)
    m = rng.choice((3, 4, 6, 7, 8, 9))
    steps, rest = [], 0
    for digit in str(n):
        head = 10 * rest + int(digit)
        rest = head % m
        steps.append(f"{head}%{m}={rest}")
    return _exact(f"mod {n} {m}", steps, rest)


def binary(rng: Random, level: int) -> Task:
    """`bin 37`; steps halve down to 1, the answer is their parities from the right:
    `37,18,9,4,2,1`."""
    low, high = ((1, 31), (32, 127), (128, 511), (512, 2047), (4096, 32767))[level - 1]
    while True:
        entry = _gym_entry(
            rng, "base_conversion", min_base=2, max_base=10, min_value=low, max_value=high
        )
        if (entry["metadata"]["source_base"], entry["metadata"]["target_base"]) == (10, 2):
            break
    n = entry["metadata"]["decimal_value"]
    steps = [str(n >> i) for i in range(n.bit_length())]
    return _from_gym("base_conversion", entry, f"bin {n}", ",".join(steps))


def letter_count(rng: Random, level: int) -> Task:
    """`count e seventeen`; steps spell with a running count: `s0e1v1e2n2t2e3e4n4`."""
    words = (1, 2, 3, 4, 6)[level - 1]
    shortest, longest = ((2, 6), (6, 10), (10, 15), (15, 20), (24, 30))[level - 1]
    wanted = rng.randint(1, (2, 3, 4, 5, 6)[level - 1])
    while True:
        entry = _gym_entry(rng, "letter_counting", min_words=words, max_words=words)
        text = "".join(entry["metadata"]["span"])
        if (
            text.isascii()
            and text.isalpha()
            and text.islower()
            and shortest <= len(text) <= longest
            and entry["answer"] == str(wanted)
        ):
            break
    # The question shows one word, so the entry does too: else one question had several references.
    entry["question"] = entry["question"].replace(" ".join(entry["metadata"]["span"]), text)
    entry["metadata"] |= {"span": [text], "span_length": 1}
    letter = entry["metadata"]["target_letter"]
    steps = "".join(f"{c}{text[: i + 1].count(letter)}" for i, c in enumerate(text))
    return _from_gym("letter_counting", entry, f"count {letter} {text}", steps)


def kth_smallest(rng: Random, level: int) -> Task:
    """`kth 3 qhzmb` (third letter in order); steps list the letters in order: `b1h2m3`."""
    size = (2, 4, 6, 9, 16)[level - 1]
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", size)
    k = rng.randint(1, size)
    in_order = sorted(letters)[:k]
    steps = "".join(f"{letter}{i + 1}" for i, letter in enumerate(in_order))
    return _exact(f"kth {k} {''.join(letters)}", [steps], in_order[-1])


def _operation(rng: Random, value: int, earlier: dict[str, int], limit: int) -> tuple[str, int]:
    """An operator and right operand for `value` whose result stays in [0, limit]."""
    while True:
        op = rng.choice("+-*")
        names = [name for name in earlier if limit > 99 or earlier[name] <= 20]
        if op != "*" and names and rng.random() < 0.4:
            right = rng.choice(names)
            number = earlier[right]
        else:
            number = rng.randint(2, 5 if op == "*" else 9)
            right = str(number)
        result = {"+": value + number, "-": value - number, "*": value * number}[op]
        if 0 <= result <= limit:
            return f"{op}{right}", result


def program(rng: Random, level: int) -> Task:
    """`a=3;b=a*4;b-5`: the value of the last line; steps run it: `b=3*4=12,12-5=7`."""
    num_operations = (1, 2, 3, 4, 5)[level - 1]
    limit = 60 if level < 5 else 999
    value = rng.randint(1, 9) if level < 5 else rng.randint(11, 99)
    lines, steps, current = [f"a={value}"], [], "a"
    values: dict[str, int] = {}
    for i in range(num_operations):
        operation, result = _operation(rng, value, values, limit)
        values[current] = value
        name = "abcdef"[i + 1]
        right = str(values.get(operation[1:], operation[1:]))
        last = i == num_operations - 1
        lines.append(f"{current}{operation}" if last else f"{name}={current}{operation}")
        steps.append(f"{'' if last else name + '='}{value}{operation[0]}{right}={result}")
        current, value = name, result
    return _exact(";".join(lines), steps, value)


def expression(rng: Random, level: int) -> Task:
    """`f(2)=7 f(5)=16`: an expression in x, here `3*x+1`; checked by running it.

    Steps take differences: `16-7=9,5-2=3,9/3=3,3*2=6,7-6=1`. The top level is quadratic.
    """
    if level == 5:
        return _quadratic(rng)
    top = (9, 5, 6, 9)[level - 1]
    a, b = rng.randint(1, top), rng.randint(0, 9)
    x1 = (0, 1, rng.randint(1, 3), rng.randint(1, 5))[level - 1]
    x2 = x1 + (1, 1, rng.randint(2, 3), rng.randint(2, 4))[level - 1]
    y1, y2 = a * x1 + b, a * x2 + b
    rise, run = y2 - y1, x2 - x1
    steps = [
        f"{y2}-{y1}={rise}",
        f"{x2}-{x1}={run}",
        f"{rise}/{run}={a}",
        f"{a}*{x1}={a * x1}",
        f"{y1}-{a * x1}={b}",
    ]
    shown = [x1, x2]
    return _expression_task(shown, lambda x: a * x + b, steps, f"{a}*x+{b}")


def _quadratic(rng: Random) -> Task:
    a, b, c = rng.randint(1, 5), rng.randint(0, 9), rng.randint(0, 9)
    y1, y2, y3 = (a * x * x + b * x + c for x in (1, 2, 3))
    p, q = y2 - y1, y3 - y2
    steps = [
        f"{y2}-{y1}={p}",
        f"{y3}-{y2}={q}",
        f"{q}-{p}={q - p}",
        f"{q - p}/2={a}",
        f"{p}-{3 * a}={b}",
        f"{y1}-{a + b}={c}",
    ]
    return _expression_task([1, 2, 3], lambda x: a * x * x + b * x + c, steps, f"{a}*x*x+{b}*x+{c}")


def _expression_task(
    shown: list[int], function: Callable[[int], int], steps: list[str], answer: str
) -> Task:
    hidden = [x for x in (0, 4, 7, 11, -3) if x not in shown]
    return Task(
        question=" ".join(f"f({x})={function(x)}" for x in shown),
        steps=",".join(steps),
        answer=answer,
        verifier="expression",
        reference={"variable": "x", "examples": [[x, function(x)] for x in shown + hidden]},
    )


def hops(rng: Random, level: int) -> Task:
    """`hop 3 a cf ab bd fa dc`: from a, three hops along pairs; steps count: `0a1b2d3c`."""
    size = (2, 4, 5, 6, 8)[level - 1]
    low, high = ((1, 1), (2, 3), (3, 5), (5, 8), (12, 19))[level - 1]
    cycle = rng.sample("abcdefghijklmnopqrstuvwxyz", size)
    pairs = [cycle[i] + cycle[(i + 1) % size] for i in range(size)]
    rng.shuffle(pairs)
    count = rng.randint(low, high)
    path = [cycle[i % size] for i in range(count + 1)]
    steps = "".join(f"{i}{letter}" for i, letter in enumerate(path))
    return _exact(f"hop {count} {cycle[0]} {' '.join(pairs)}", [steps], path[-1])


FAMILIES: tuple[Family, ...] = (
    Family("addition", "arithmetic", addition),
    Family("multiplication", "arithmetic", multiplication),
    Family("modulo", "number_theory", modulo),
    Family("binary", "number_theory", binary),
    Family("letter_count", "strings", letter_count),
    Family("kth_smallest", "sorting", kth_smallest),
    Family("program", "programs", program),
    Family("expression", "expressions", expression),
    Family("hops", "logic", hops),
)
