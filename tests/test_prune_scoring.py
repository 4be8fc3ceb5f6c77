"""Grades and IFD with scripted log-probabilities: what is scored, stored, selected and refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from prune_fakes import FakeCritics, FakeEngine, model_of
from pydantic import ValidationError

from judges import grade, ifd
from judges.grade import GRADES
from posttrain.errors import DataError, ModelError, RunDirError, StageError
from posttrain.prune.history import history
from posttrain.prune.run import prune
from posttrain.prune.settings import PruneSettings

ROWS = [{"question": f"q{i}", "completion": "ab" + "c" * i} for i in range(8)]


class Script:
    """Log-probabilities by rule; remembers what it was shown, as text."""

    def __init__(self, policy: Path, rule: Any) -> None:
        self.model = model_of(policy)
        self.shown: list[list[str]] = []
        self._rule = rule

    async def __call__(self, sequences, label):
        texts = [self.model.chat.tokenizer.decode(s) for s in sequences]
        self.shown.append(texts)
        return [self._rule(text, len(s) - 1) for text, s in zip(texts, sequences, strict=True)]


def run(
    path: Path,
    script: Script,
    method: str,
    rows: Sequence[dict[str, Any]] = ROWS,
    **selection: Any,
) -> dict[str, Any]:
    source = path / "s.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = PruneSettings.model_validate(
        {
            "source": {"path": str(source)},
            "critic": {"model": "critic", "max_length": 512},
            "method": method,
            "selection": {"metric": method, **(selection or {"drop_easiest": 0.5})},
        }
    )
    critics = FakeCritics(FakeEngine(script.model.chat), script)
    report = prune(settings, path / "out", script.model, critics)
    return report | {"opened": critics.opened}


def annotated(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path / "out" / "data" / "annotated").to_pylist()


def ifd_rule(text: str, count: int) -> list[float]:
    """With the prompt an answer's tokens cost .3 nats each, alone as many as it has."""
    alone = "<assistant>" not in text
    return [-float(count + 1) if alone else -0.3] * count


def test_ifd_is_the_ratio_over_the_answers_tokens(tmp_path: Path, tiny_policy: Path) -> None:
    script = Script(tiny_policy, ifd_rule)
    report = run(tmp_path, script, "ifd")
    assert sorted(script.shown)[:2] == [
        ["<user>q0<assistant>ab", "ab"],
        ["<user>q1<assistant>abc", "abc"],
    ]
    rows = annotated(tmp_path)
    # The answer of row i has i+2 tokens and alone costs that many nats a token.
    assert [row["prune_value"] for row in rows] == pytest.approx([0.3 / (i + 2) for i in range(8)])
    assert [row["prune_action"] for row in rows] == ["keep"] * 4 + ["drop"] * 4
    assert rows[7]["prune_reason"] == (
        "ifd 0.033 is among the lowest 50% (the lowest kept has 0.060)"
    )
    assert {row["prune_label"] for row in rows} == {None}
    assert report["metric"] == "ifd"
    assert report["figures"]["histogram"][0]["from"] == pytest.approx(0.3 / 9, abs=1e-6)
    again = run(tmp_path, script, "ifd", drop_below=0.049)
    assert again["opened"] == 0
    assert [row["prune_action"] for row in annotated(tmp_path)] == ["keep"] * 5 + ["drop"] * 3
    assert again["cuts"] == {"all": 0.049}


def test_prompts_that_do_not_help_are_dropped(tmp_path: Path, tiny_policy: Path) -> None:
    def rule(text: str, count: int) -> list[float]:
        alone = "<assistant>" not in text
        return [(-1.0 if alone else -2.0 if "q3" in text else -0.5)] * count

    run(tmp_path, Script(tiny_policy, rule), "ifd", drop_easiest=0.0)
    rows = annotated(tmp_path)
    assert [row["prune_rule"] for row in rows] == [
        "ifd_above_1" if i == 3 else "drop_easiest" for i in range(8)
    ]
    assert rows[3]["prune_reason"] == (
        "ifd 2.000 is above 1: the prompt does not help to predict the answer"
    )


def grade_rule(text: str, count: int) -> list[float]:
    """The longer the answer, the better: row i gets grade 1 + i/2, by weights on two grades."""
    given = text[-1]
    length = len(text.split("Answer:\n")[1].split("\n")[0]) - 2
    low, share = divmod(length / 2, 1)
    weights = {str(int(low) + 1): 1 - share, str(int(low) + 2): share}
    return [-9.0] * (count - 1) + [math.log(0.9 * weights.get(given, 0.0) + 1e-12)]


def test_a_grade_is_the_expectation_over_the_grades(tmp_path: Path, tiny_policy: Path) -> None:
    script = Script(tiny_policy, grade_rule)
    run(tmp_path, script, "grade", drop_below=3.0)
    assert len(script.shown) == 8
    assert [text[-1] for text in script.shown[0]] == list(GRADES)
    first = script.shown[0][0]
    assert "Question:\nq0\n\nAnswer:\nab\n" in first
    assert first.endswith("nothing else.<assistant>1")
    rows = annotated(tmp_path)
    assert [row["prune_value"] for row in rows] == pytest.approx([1 + i / 2 for i in range(8)])
    assert [row["prune_action"] for row in rows] == ["drop"] * 4 + ["keep"] * 4
    assert rows[0]["prune_reason"] == "grade 1.000 is below 3"
    lines = history(tmp_path / "out", "1")
    assert any("scored from" in line and "mass 0.9" in line for line in lines)
    assert lines[-1] == "  dropped by drop_below: grade 1.000 is below 3"


@pytest.mark.parametrize(("method", "rule"), [("grade", grade_rule), ("ifd", ifd_rule)])
def test_what_another_version_scored_is_not_mixed_in(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch, method: str, rule: Any
) -> None:
    run(tmp_path, Script(tiny_policy, rule), method)
    others = {"grade": ifd, "ifd": grade}
    monkeypatch.setattr(others[method], "__file__", __file__)
    assert run(tmp_path, Script(tiny_policy, rule), method)["opened"] == 0
    monkeypatch.setattr({"grade": grade, "ifd": ifd}[method], "__file__", __file__)
    with pytest.raises(RunDirError, match=r"scored_by: '.*', now '.*--fresh"):
        run(tmp_path, Script(tiny_policy, rule), method)


def test_a_critic_that_does_not_grade_is_an_error(tmp_path: Path, tiny_policy: Path) -> None:
    script = Script(tiny_policy, lambda text, count: [-5.0] * count)
    rows = [{"question": f"q{i}", "completion": "abc"} for i in range(40)]
    with pytest.raises(StageError, match=r"probability of 0\.034 only .* follow the rubric"):
        run(tmp_path, script, "grade", rows)


def test_a_critic_that_does_not_grade_few_rows_is_an_error_too(
    tmp_path: Path, tiny_policy: Path
) -> None:
    script = Script(tiny_policy, lambda text, count: [-5.0] * count)
    for asked in (len(ROWS), len(ROWS)):  # again, when nothing is left to ask
        with pytest.raises(StageError, match=r"probability of 0\.034 only \(mean of all prompts"):
            run(tmp_path, script, "grade")
        assert len(script.shown) == asked
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_grades_of_earlier_calls_count(tmp_path: Path, tiny_policy: Path) -> None:
    """The first call ends early, the second has too few prompts left to tell by these alone."""
    rows = [{"question": f"q{i}", "completion": "abc"} for i in range(40)]
    for said in ("the first prompts", "all prompts"):
        script = Script(tiny_policy, lambda text, count: [-5.0] * count)
        with pytest.raises(StageError, match=rf"mean of {said}\): it does not follow the rubric"):
            run(tmp_path, script, "grade", rows)
    assert len(script.shown) < 32


def test_a_grade_must_be_one_token(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(tiny_policy, grade_rule)
    real = script.model.chat.tokenizer

    class Splitting:
        def __call__(self, text: str, **options: Any) -> Any:
            return {"input_ids": [1, 2]} if text == "3" else real(text, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    monkeypatch.setattr(script.model.chat, "tokenizer", Splitting())
    with pytest.raises(ModelError, match=r"writes '3' as 2 tokens"):
        run(tmp_path, script, "grade")


def test_answers_too_short_for_ifd_are_quarantined(tmp_path: Path, tiny_policy: Path) -> None:
    script = Script(tiny_policy, ifd_rule)
    with pytest.raises(DataError, match="the first: an answer of one token: IFD needs two"):
        run(tmp_path, script, "ifd", [{"question": "q", "completion": "a"}])


def test_a_metric_suits_its_method() -> None:
    content: dict[str, Any] = {"source": {"path": "s"}, "critic": {"model": "m"}, "method": "ifd"}
    with pytest.raises(ValidationError, match="method ifd has no pass@1 to select by"):
        PruneSettings.model_validate(content)
    content["selection"] = {"metric": "grade", "drop_easiest": 0.5}
    with pytest.raises(ValidationError, match="method ifd has no grade to select by"):
        PruneSettings.model_validate(content)
