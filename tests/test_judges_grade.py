import math

import pytest

from judges.grade import GRADES, MIN_MASS, RUBRIC, Grade, read_grade


def test_a_grade_is_the_expectation_and_not_the_likeliest():
    # P = .1, .2, .3, .2, 0 of all: (1·.1 + 2·.2 + 3·.3 + 4·.2) / .8 = 2.2 / .8
    probabilities = [0.1, 0.2, 0.3, 0.2, 1e-300]
    grade = read_grade([math.log(p) for p in probabilities])
    assert grade.value == pytest.approx(2.75)
    assert grade.mass == pytest.approx(0.8)


def test_tiny_probabilities_keep_their_proportions():
    grade = read_grade([-1000.0, -1000.0, -2000.0, -2000.0, -2000.0])
    assert grade == Grade(1.5, 0.0)
    assert grade.mass < MIN_MASS


def test_a_sure_grade():
    assert read_grade([-50.0, -50.0, -50.0, -50.0, 0.0]).value == pytest.approx(5.0)
    assert GRADES == ("1", "2", "3", "4", "5")


def test_the_rubric_shows_question_and_answer():
    shown = RUBRIC.format(question="1+1?", answer="{2}")
    assert "Question:\n1+1?\n" in shown
    assert "Answer:\n{2}\n" in shown
