import pytest

from posttrain.data.overlap import WORDS, TextIndex, shared_texts
from posttrain.data.prompts import make_prompt

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def test_a_run_of_words_is_found_anywhere():
    index = TextIndex([LONG])
    assert WORDS == 13
    assert index.shared(f"before, {LONG} after") == " ".join(LONG.split()[:13])
    assert index.shared(" ".join(LONG.split()[1:])) == " ".join(LONG.split()[1:])
    assert index.shared(" ".join(LONG.split()[2:])) is None  # twelve words
    assert index.shared(" ".join(reversed(LONG.split()))) is None


def test_case_and_blanks_do_not_count_but_signs_do():
    index = TextIndex(["12 + 35 = ?", "Name it!"], n=5)
    assert index.shared("12+35=?") == "12 + 35 = ?"
    assert index.shared("say: 12  +  35 =? now") == "12 + 35 = ?"
    assert index.shared("12-35=?") is None
    assert index.shared("NAME  it!") == "name it !"


def test_short_texts_are_found_as_a_whole_only():
    index = TextIndex(["What is 1+1?"])
    assert index.shared("what is 1+1?") == "what is 1 + 1 ?"
    assert index.shared("Tell me: what is 1+1?") is None
    assert index.shared("1+1?") is None


@pytest.mark.parametrize("text", ["", "   ", LONG])
def test_nothing_is_shared_with_an_empty_set(text):
    assert TextIndex([]).shared(text) is None


def test_n_can_be_chosen():
    index = TextIndex(["a b c d"], n=3)
    assert index.shared("x b c d y") == "b c d"
    assert index.shared("x b c y d") is None


def test_the_sets_of_a_run_are_compared_pair_by_pair():
    def prompts(*questions):
        return [make_prompt(q, reference="1", domain="d") for q in questions]

    sets = {
        "sft": prompts("a?", "b?", f"{LONG} and more"),
        "rl": prompts("b?", "c?", "a?"),
        "held_out": prompts("d?", LONG),
    }
    assert shared_texts(sets) == {"sft and rl": 2, "sft and held_out": 1}
    assert shared_texts({"sft": prompts("a?"), "rl": []}) == {}
