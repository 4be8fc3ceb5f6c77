"""A pruning pass with a critic that needs no engine: what is asked, kept, reused and refused."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
import pytest
from prune_fakes import BROKEN, FakeCritics, FakeEngine, model_of, question

from posttrain.errors import DataError, RunDirError, StageError
from posttrain.prune.critic import CriticModel
from posttrain.prune.decisions import decide
from posttrain.prune.estimate import estimate
from posttrain.prune.history import history
from posttrain.prune.judging import open_tasks
from posttrain.prune.output import row_table
from posttrain.prune.run import prune
from posttrain.prune.settings import PruneSettings
from posttrain.prune.store import Store

RATES = [0.0, 0.1, 0.3, 0.5, 0.5, 0.7, 0.9, 1.0, 1.0, 1.0]


def rows(count: int = 40) -> list[dict[str, Any]]:
    return [
        {"question": question(i, RATES[i % 10]), "answer": "1", "domain": "ab"[i % 2], "n": i}
        for i in range(count)
    ]


class Bench:
    """A source, a directory, and what is asked of the critic."""

    def __init__(self, path: Path, policy: Path) -> None:
        self.source = path / "source.jsonl"
        self.out = path / "out"
        self.model: CriticModel = model_of(policy)
        self.engine = FakeEngine(self.model.chat)

    def write(self, records: list[Any]) -> None:
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        self.source.write_text("".join(f"{line}\n" for line in lines))

    def settings(self, **changes: Any) -> PruneSettings:
        content: dict[str, Any] = {
            "source": {"path": str(self.source)},
            "critic": {"model": "critic", "max_length": 64},
            "judge": {"seed": 0, "max_tokens": 16, "concurrency": 8},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                content.setdefault(section, {})[name] = value
            else:
                content[section] = value
        return PruneSettings.model_validate(content)

    def prune(self, *, fresh: bool = False, top_up: bool = False, **changes: Any) -> dict[str, Any]:
        """With an engine of its own, so that what it was asked is this call's."""
        self.engine = FakeEngine(self.model.chat)
        self.critics = FakeCritics(self.engine)
        settings = self.settings(**changes)
        return prune(settings, self.out, self.model, self.critics, fresh=fresh, top_up=top_up)

    def annotated(self) -> list[dict[str, Any]]:
        return pq.read_table(self.out / "data" / "annotated").to_pylist()

    def kept(self) -> list[dict[str, Any]]:
        return pq.read_table(self.out / "data" / "kept").to_pylist()

    def quarantined(self) -> list[dict[str, Any]]:
        lines = (self.out / "quarantine.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def bench(tmp_path: Path, tiny_policy: Path) -> Bench:
    bench = Bench(tmp_path, tiny_policy)
    bench.write(rows())
    return bench


def test_the_easier_half_goes_and_the_rest_stays_as_it_was(bench: Bench) -> None:
    report = bench.prune()
    kept = bench.kept()
    assert kept == [row for row in rows() if row in kept]  # every column, in order
    assert len(kept) == 20
    assert {0, 1} <= {row["n"] % 10 for row in kept} <= {0, 1, 2, 3, 4, 5}
    annotated = bench.annotated()
    assert [{k: row[k] for k in rows()[0]} for row in annotated] == rows()
    assert [row["prune_row"] for row in annotated] == list(range(1, 41))
    assert [row["n"] for row in annotated if row["prune_action"] == "keep"] == [
        row["n"] for row in kept
    ]
    for row in annotated:
        assert 0 <= row["prune_correct"] <= row["prune_samples"] <= 16
        mean = (row["prune_correct"] + 0.5) / (row["prune_samples"] + 1)
        assert row["prune_value"] == pytest.approx(mean)
        assert row["prune_low"] < mean < row["prune_high"]
        assert row["prune_reason"].startswith(f"pass@1 {mean:.3f} ({row['prune_correct']} of ")
    figures = report["figures"]
    assert figures["rows"] == {
        "read": 40,
        "judged": 40,
        "kept": 20,
        "dropped": 20,
        "held_out": 0,
        "quarantined": 0,
    }
    assert figures["answers"] == bench.engine.samples == sum(r["prune_samples"] for r in annotated)
    assert sum(b["kept"] for b in figures["histogram"]) == 20
    assert bench.engine.most_in_flight == 8


def test_what_is_asked_follows_the_selection(bench: Bench) -> None:
    spent = {}
    for name, changes in {
        "quantile": {"selection__drop_easiest": 0.5},
        "threshold": {"selection__easy_above": 0.9},
        "fixed": {"judge__adaptive": False},
    }.items():
        bench.prune(**changes, fresh=True)
        spent[name] = {r["n"] % 10: r["prune_samples"] for r in bench.annotated()}
    assert set(spent["fixed"].values()) == {16}
    # Never and always right: far from the middle, and only one of them far from .9.
    assert (spent["quantile"][0], spent["quantile"][7]) == (4, 4)
    assert (spent["threshold"][0], spent["threshold"][7]) == (4, 16)
    assert spent["quantile"][3] == 16 > spent["threshold"][3]


def test_the_same_command_again_asks_nothing_and_writes_the_same(bench: Bench) -> None:
    first = bench.prune()
    data = {p: p.read_bytes() for p in sorted((bench.out / "data").rglob("*.*"))}
    again = bench.prune()
    assert bench.critics.opened == 0
    assert again == first
    assert {p: p.read_bytes() for p in sorted((bench.out / "data").rglob("*.*"))} == data


def test_a_raised_cap_reuses_what_is_there(bench: Bench) -> None:
    bench.prune(judge__max_samples=8, judge__adaptive=False)
    assert bench.engine.samples == 40 * 8
    bench.prune(judge__max_samples=12, judge__adaptive=False)
    assert bench.engine.samples == 40 * 4
    assert {row["prune_samples"] for row in bench.annotated()} == {12}
    # The seeds go on where they were: as if it had been asked at once.
    found = [row["prune_correct"] for row in bench.annotated()]
    bench.prune(judge__max_samples=12, judge__adaptive=False, fresh=True)
    assert [row["prune_correct"] for row in bench.annotated()] == found


def test_another_selection_tops_up_only_on_request(bench: Bench) -> None:
    bench.prune(selection__drop_easiest=0.5)
    report = bench.prune(selection__easy_above=0.9)
    assert bench.critics.opened == 0
    undecided = report["figures"]["undecided"]
    open_rows = [row for row in bench.annotated() if row["prune_undecided"]]
    assert undecided["rows"] == len(open_rows) > 0
    assert undecided["at_cap_prompts"] < undecided["prompts"]
    (advice,) = report["advice"]
    assert f"{len(open_rows)} rows are undecided under this selection" in advice
    assert "--top-up" in advice
    topped_up = bench.prune(selection__easy_above=0.9, top_up=True)
    asked = set(bench.engine.requests)
    assert asked == {r["prune_id"] for r in open_rows if r["prune_samples"] < 16}
    left = topped_up["figures"]["undecided"]
    assert left["prompts"] == left["at_cap_prompts"]
    # Back again: what is there suffices.
    bench.prune(selection__drop_easiest=0.5)
    assert bench.critics.opened == 0


def test_new_rows_under_another_selection_cost_only_themselves(bench: Bench) -> None:
    bench.prune(selection__drop_easiest=0.5)
    bench.write(rows(41))
    other = bench.settings(selection__drop_easiest=0.9)
    guessed = estimate(other, bench.out, bench.model, FakeCritics(FakeEngine(bench.model.chat)))
    assert guessed["prompts_to_judge"] == 1
    report = bench.prune(selection__drop_easiest=0.9)
    assert set(bench.engine.requests) == {bench.annotated()[40]["prune_id"]}
    undecided = report["figures"]["undecided"]
    assert undecided["at_cap_prompts"] < undecided["prompts"]
    assert "--top-up" in report["advice"][0]
    # That is no pass over all of them: what is open is still asked about only on request.
    bench.prune(selection__drop_easiest=0.9)
    assert bench.critics.opened == 0
    left = bench.prune(selection__drop_easiest=0.9, top_up=True)["figures"]["undecided"]
    assert bench.engine.samples > 0
    assert left["prompts"] == left["at_cap_prompts"]


def test_an_interrupted_pass_over_new_rows_is_gone_on_with(bench: Bench) -> None:
    bench.prune(selection__drop_easiest=0.5)
    bench.write(rows(60))
    other = bench.settings(selection__drop_easiest=0.9)

    def still_open() -> tuple[list[bool], list[bool]]:
        """Of the tasks, and of those that were asked about at all."""
        with closing(Store(bench.out / "store.sqlite")) as store:
            tasks = store.tasks()
            needing = open_tasks(tasks, other)
            return needing.tolist(), (needing & ~tasks.unjudged).tolist()

    critics = FakeCritics(FakeEngine(bench.model.chat, fail_after=30))
    with pytest.raises(RuntimeError):
        prune(other, bench.out, bench.model, critics)
    assert any(still_open()[1][40:])
    bench.prune(selection__drop_easiest=0.9)
    new = {row["prune_id"] for row in bench.annotated()[40:]}
    assert set(bench.engine.requests) <= new
    needing, _ = still_open()
    assert any(needing[:40]) and not any(needing[40:])


def test_an_interrupted_pass_is_gone_on_with(bench: Bench) -> None:
    critics = FakeCritics(FakeEngine(bench.model.chat, fail_after=60))
    with pytest.raises(RuntimeError) as caught:
        prune(bench.settings(), bench.out, bench.model, critics)
    assert caught.value is BROKEN
    assert not (bench.out / "manifest.json").exists()
    bench.prune()
    recorded = sum(row["prune_samples"] for row in bench.annotated())
    assert recorded == critics.engine.samples + bench.engine.samples
    # Under another selection too: it was never finished for any.
    critics = FakeCritics(FakeEngine(bench.model.chat, fail_after=60))
    with pytest.raises(RuntimeError):
        prune(bench.settings(), bench.out, bench.model, critics, fresh=True)
    bench.prune(selection__easy_above=0.9)
    assert bench.engine.samples > 0


OTHERS = {
    "sampling.temperature": {"judge__temperature": 0.7},
    "sampling.max_tokens": {"judge__max_tokens": 17},
    "sampling.seed": {"judge__seed": 1},
    "system": {"critic__system": "Be brief."},
    "verifier.settings.instruction_weight": {"rewards__instruction_weight": 1.0},
    "method": {"method": "ifd", "selection": {"metric": "ifd", "drop_easiest": 0.5}},
    "engine.dtype": {"resources__rollout": {"engine": {"dtype": "bfloat16"}}},
}


@pytest.mark.parametrize("what", OTHERS)
def test_answers_of_another_kind_are_never_mixed(bench: Bench, what: str) -> None:
    bench.prune()
    with pytest.raises(RunDirError, match=f"judged with something else .*{what}: .*--fresh"):
        bench.prune(**OTHERS[what])
    assert bench.critics.opened == 0


def test_another_critic_template_or_verifier_is_refused(
    bench: Bench, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.prune()
    bench.model = model_of(tiny_policy, fingerprint="beef")
    with pytest.raises(RunDirError, match=r"critic\.fingerprint: 'f00d.*', now 'beef'"):
        bench.prune()
    bench.prune(fresh=True)
    assert bench.engine.samples > 0
    bench.model.chat.tokenizer.chat_template += " "
    with pytest.raises(RunDirError, match="template: "):
        bench.prune()
    bench.model = model_of(tiny_policy, fingerprint="beef")
    bench.model = CriticModel(name="elsewhere", fingerprint="beef", chat=bench.model.chat)
    bench.prune()  # the same critic in another place
    monkeypatch.setattr("posttrain.prune.identity.verifier_version", lambda: "2")
    with pytest.raises(RunDirError, match=r"verifier\.version: .*, now '2'"):
        bench.prune()


def test_a_verifier_of_ones_own_that_changed_is_another(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "changing_reward.py"
    module.write_text("def score(prompt, text):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = {"rewards__custom": {"mine": "changing_reward:score"}}
    bench.prune(**mine)
    bench.prune(**mine)
    assert bench.critics.opened == 0
    module.write_text("def score(prompt, text):\n    return 0.0\n")
    with pytest.raises(RunDirError, match=r"verifier\.custom\.mine: '.*', now '.*--fresh"):
        bench.prune(**mine)


def test_a_judge_counts_by_its_weights_and_not_by_how_it_is_asked(
    bench: Bench, tmp_path: Path
) -> None:
    judge = tmp_path / "judge"
    judge.mkdir()
    (judge / "model.safetensors").write_bytes(b"1")
    asked: dict[str, Any] = {"rewards__judge": {"model": str(judge)}}
    bench.prune(**asked)
    moved = judge.rename(tmp_path / "moved")
    bench.prune(rewards__judge={"model": str(moved), "concurrency": 3, "retries": 0})
    assert bench.critics.opened == 0
    (moved / "model.safetensors").write_bytes(b"2")
    with pytest.raises(RunDirError, match=r"verifier\.models\.judge: '.*', now '"):
        bench.prune(rewards__judge={"model": str(moved)})
    with pytest.raises(RunDirError, match=r"verifier\.settings\.judge\.max_tokens: "):
        bench.prune(rewards__judge={"model": str(moved), "max_tokens": 9})


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"dtype": "bfloat16"}, r"verifier\.judge_engine\.dtype: 'float32', now 'bfloat16'"),
        ({"extra": {"quantization": "fp8"}}, r"judge_engine\.extra\.quantization: None, now 'fp8'"),
    ],
)
def test_a_judge_of_another_arithmetic_is_another(
    bench: Bench, tmp_path: Path, engine: dict[str, Any], said: str
) -> None:
    other = {"resources__rewards": {"judge": {"engine": engine}}}
    bench.prune()
    bench.prune(**other)  # nobody is asked
    assert bench.critics.opened == 0
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").touch()
    asked: dict[str, Any] = {"rewards__judge": {"model": str(tmp_path / "judge")}}
    bench.prune(**asked, fresh=True)
    with pytest.raises(RunDirError, match=said):
        bench.prune(**asked, **other)


def test_nothing_is_written_into_the_source(bench: Bench, tmp_path: Path) -> None:
    inside = tmp_path / "set"
    inside.mkdir()
    bench.source.rename(inside / "a.jsonl")
    bench.source, bench.out = inside, inside / "pruned"
    with pytest.raises(RunDirError, match="lies in the source"):
        bench.prune()
    with pytest.raises(RunDirError, match="lies in the source"):
        estimate(bench.settings(), bench.out, bench.model, FakeCritics(bench.engine))
    assert [path.name for path in inside.iterdir()] == ["a.jsonl"]


def test_what_is_read_is_not_deleted(bench: Bench, tmp_path: Path) -> None:
    bench.prune()
    (part,) = (bench.out / "data" / "kept").iterdir()
    (tmp_path / "link").symlink_to(part.parent)
    before = part.read_bytes()
    given = bench.source
    said = r"kept.* lies in --out .*out, where it would be replaced or deleted; give another --out"
    for source in (part, part.parent):
        bench.source = source
        for fresh in (False, True):
            with pytest.raises(RunDirError, match=said):
                bench.prune(fresh=fresh)
        with pytest.raises(RunDirError, match=said):
            estimate(bench.settings(), bench.out, bench.model, FakeCritics(bench.engine))
    bench.source = given
    for kind in ("held_out", "compare"):
        with pytest.raises(RunDirError, match="link lies in --out"):
            bench.prune(overlap={kind: [str(tmp_path / "link")]}, fresh=True)
    assert part.read_bytes() == before


def test_a_fixed_number_must_suffice_for_its_metric(bench: Bench) -> None:
    few = {"selection": {"metric": "pass@k", "k": 32, "drop_easiest": 0.5}}
    with pytest.raises(ValueError, match="pass@32 cannot be estimated from the fixed number"):
        bench.settings(judge__adaptive=False, **few)
    bench.settings(judge__adaptive=False, judge__max_samples=32, **few)


def test_a_directory_that_is_not_ours_is_left_alone(bench: Bench) -> None:
    bench.out.mkdir()
    (bench.out / "thesis.txt").write_text("years of work")
    with pytest.raises(RunDirError, match="was not made by `posttrain prune`"):
        bench.prune(fresh=True)
    assert (bench.out / "thesis.txt").exists()


def test_rows_that_share_a_prompt_are_judged_once(bench: Bench) -> None:
    base = rows(10)
    copies = [{**row, "n": 100 + row["n"]} for row in base]
    other_answer = {**base[7], "answer": "0", "n": 200}
    bench.write([*base, *copies, other_answer])
    report = bench.prune(selection__drop_easiest=0.5)
    assert report["figures"]["prompts"]["judged"] == 11
    annotated = {row["n"]: row for row in bench.annotated()}
    for row in base:
        mine, copy = annotated[row["n"]], annotated[100 + row["n"]]
        assert {k: v for k, v in mine.items() if k not in ("n", "prune_row")} == {
            k: v for k, v in copy.items() if k not in ("n", "prune_row")
        }
    assert annotated[7]["prune_correct"] == annotated[7]["prune_samples"]
    assert annotated[200]["prune_correct"] == 0  # the same question, and another right answer
    verdicts = pq.read_table(bench.out / "data" / "verdicts").to_pylist()
    assert sorted(v["num_rows"] for v in verdicts) == [1] + [2] * 10
    assert len({v["prompt_id"] for v in verdicts}) == 10
    assert sum(v["samples"] for v in verdicts) == bench.engine.samples


def test_more_rows_cost_only_themselves(bench: Bench) -> None:
    bench.prune(source__limit=30, judge__adaptive=False)
    bench.prune(judge__adaptive=False)
    assert bench.engine.samples == 10 * 16
    bench.write([*rows(), {**rows(41)[40], "new": "column"}])
    bench.prune(judge__adaptive=False)
    assert bench.engine.samples == 16
    assert bench.annotated()[40]["new"] == "column"
    bench.write(rows(20))
    report = bench.prune(judge__adaptive=False)
    assert bench.critics.opened == 0
    assert report["figures"]["prompts"]["judged"] == 20


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("change", ["swapped", "garbled", "shortened"])
def test_nothing_is_written_of_a_source_that_changed_meanwhile(
    bench: Bench, form: str, change: str
) -> None:
    bench.prune(format=form, source__limit=30)
    before = {p: p.read_bytes() for p in sorted((bench.out / "data").rglob("*.*"))}
    critics = FakeCritics(FakeEngine(bench.model.chat))
    changed: list[Any] = {
        "swapped": rows()[::-1],
        "garbled": [*rows()[:-1], "{"],
        "shortened": rows(5),
    }[change]

    async def generate_and_change(request: Any) -> Any:
        bench.write(changed)
        return await FakeEngine.generate(critics.engine, request)

    critics.engine.generate = generate_and_change  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"source\.jsonl was changed after it was taken in"):
        prune(bench.settings(format=form), bench.out, bench.model, critics)
    assert not (bench.out / "manifest.json").exists()
    assert {p: p.read_bytes() for p in sorted((bench.out / "data").rglob("*.*"))} == before
    found = bench.prune(format=form)["figures"]["rows"]
    assert (found["read"], found["quarantined"]) == (len(changed), int(change == "garbled"))


def test_a_sample_is_random_and_stays_the_same(bench: Bench) -> None:
    bench.prune(source__sample=10)
    first = [row["n"] for row in bench.annotated()]
    assert len(first) == 10
    assert first == sorted(first) != list(range(10))
    bench.prune(source__sample=10)
    assert [row["n"] for row in bench.annotated()] == first
    bench.prune(source__sample=10, seed=1)
    assert [row["n"] for row in bench.annotated()] != first


def test_what_cannot_be_used_is_quarantined_and_nothing_is_lost(bench: Bench) -> None:
    good = rows(6)
    missing = {**good[0], "answer": None}
    long = {**good[0], "question": "x" * 60 + ":50?"}
    misfit = {**good[0], "answer": "1#2"}
    unknown = {**good[0], "verifier": "none"}
    bench.write([good[0], "{not json", *good[1:3], missing, long, misfit, unknown, *good[3:]])
    report = bench.prune()
    found = [(entry["row"], entry["reason"].partition(":")[0]) for entry in bench.quarantined()]
    assert found[:2] == [(2, bench.quarantined()[0]["reason"]), (5, "the answer is missing")]
    assert found[2][0] == 6
    assert "tokens are too many; 48 fit into critic.max_length" in found[2][1]
    assert [row for row, _ in found] == [2, 5, 6, 7, 8]
    assert found[3][1].startswith("the reference '1#2' can never be answered")
    assert found[4][1].startswith("prompt ")
    assert bench.quarantined()[0]["content"] == "{not json"
    assert report["figures"]["rows"]["quarantined"] == 5
    annotated = bench.annotated()
    # All that can be read is annotated; only the broken line has no columns.
    assert [row["prune_row"] for row in annotated] == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    in_quarantine = [row for row in annotated if row["prune_action"] == "quarantined"]
    assert [row["prune_row"] for row in in_quarantine] == [5, 6, 7, 8]
    assert in_quarantine[0]["prune_reason"] == "the answer is missing: column 'answer' is empty"
    assert in_quarantine[0]["prune_value"] is None
    total = report["figures"]["rows"]
    assert total["read"] == 11 == total["judged"] + total["quarantined"]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_quarantine_of_long_rows_stays_small(bench: Bench, kind: str) -> None:
    bad = [{**r, "answer": None, "question": r["question"] + "n" * 100_000} for r in rows(3)]
    bench.write([*rows(1), *bad])
    if kind == "parquet":
        table = pa.json.read_json(bench.source)
        bench.source = bench.source.with_suffix(".parquet")
        pq.write_table(table, bench.source)
    bench.prune()
    shown = [entry["content"] for entry in bench.quarantined()]
    assert [len(text) for text in shown] == [2000] * 3
    assert shown[1].startswith('{"question": "1:10?nnn')
    with closing(Store(bench.out / "store.sqlite")) as store:
        notes = row_table(store, store.tasks()).notes
    assert list(notes) == [1, 2, 3]
    assert len({id(reason) for reason in notes.values()}) == 1


def test_tables_over_tasks_stay_narrow(bench: Bench) -> None:
    """Sets of millions fit: 40 bytes a task for what is known and 13 for what is decided."""
    bench.write(rows(10))
    bench.prune()
    with closing(Store(bench.out / "store.sqlite")) as store:
        tasks = store.tasks()
        ids = store.task_ids(tasks.key[::-1])
    assert ids == [row["prune_id"] for row in bench.annotated()][::-1]
    decided = decide(tasks, bench.settings())
    for table, width in ((tasks, 40), (decided, 13)):
        arrays = [getattr(table, field.name) for field in fields(table)]
        assert sum(a.itemsize for a in arrays if isinstance(a, np.ndarray)) == width


def test_a_turn_that_the_template_cannot_render_is_quarantined(bench: Bench) -> None:
    turn = {"role": "user", "content": question(1, 0.5)}
    odd = {"messages": [turn, {**turn, "role": "tool"}], "answer": "1"}
    bench.write([{"messages": [turn], "answer": "1"}, odd])
    report = bench.prune()
    (reason,) = report["figures"]["quarantine"]
    assert reason == "its chat template cannot render a prompt with no system message"
    assert bench.quarantined()[0]["reason"].endswith("unknown role tool")


def test_a_prompt_that_cannot_be_scored_is_set_aside_and_asked_again(
    bench: Bench, tmp_path: Path
) -> None:
    """Four of them: at the next start only they are asked, which does not make a broken scorer."""
    poison = {row["question"] for row in rows(40)[::10]}

    def prune_with(poison: set[str], **changes: Any) -> dict[str, Any]:
        critics = FakeCritics(FakeEngine(bench.model.chat))
        critics.engine.poison = poison
        bench.engine = critics.engine
        return prune(bench.settings(**changes), bench.out, bench.model, critics)

    first = prune_with(poison, judge__concurrency=1)
    assert first["figures"]["quarantine"] == {"no answer could be scored": 4}
    assert first["figures"]["rows"]["judged"] == 36
    entry = bench.quarantined()[1]
    assert (entry["file"], entry["row"]) == (str(bench.source), 11)
    assert entry["reason"] == "no answer could be scored (no sandbox)"
    annotated = bench.annotated()
    assert annotated[10]["prune_action"] == "quarantined"
    assert annotated[10]["prune_reason"] == entry["reason"]
    assert {row["n"] for row in bench.kept()}.isdisjoint({0, 10, 20, 30})
    assert "no answer could be scored" in history(bench.out, "11")[0]
    asked = set(bench.engine.requests)
    again = prune_with(poison)
    assert again["figures"]["quarantine"] == first["figures"]["quarantine"]
    assert len(bench.engine.requests) == 4 < len(asked)
    guess = estimate(bench.settings(), bench.out, bench.model, FakeCritics(bench.engine))
    assert guess["prompts_to_judge"] == 4
    mended = prune_with(set())
    assert (mended["figures"]["quarantine"], mended["figures"]["rows"]["judged"]) == ({}, 40)


def test_what_is_held_out_stays_so_where_no_answer_can_be_scored(
    bench: Bench, tmp_path: Path
) -> None:
    bench.engine.poison = {rows()[4]["question"]}
    bench.write([*rows(6), {**rows(6)[4], "completion": "the secret of a test"}])
    tests = tmp_path / "tests.jsonl"
    tests.write_text(json.dumps({"question": "the secret of a test"}) + "\n")
    critics = FakeCritics(bench.engine)
    settings = bench.settings(overlap={"held_out": [str(tests)]})
    report = prune(settings, bench.out, bench.model, critics)
    assert [entry["row"] for entry in bench.quarantined()] == [5]
    assert (report["figures"]["rows"]["held_out"], bench.annotated()[6]["prune_rule"]) == (
        1,
        "held_out",
    )


def test_a_broken_scorer_ends_the_pass(bench: Bench) -> None:
    bench.engine.poison = {row["question"] for row in rows()}
    with pytest.raises(StageError, match=r"no answer to 3 prompts running, .*\(no sandbox\): mend"):
        prune(bench.settings(), bench.out, bench.model, FakeCritics(bench.engine))
    bench.write(rows(2))
    for _ in range(2):
        with pytest.raises(StageError, match="no answer to any prompt could be scored"):
            prune(bench.settings(), bench.out, bench.model, FakeCritics(bench.engine), fresh=True)


def test_strict_stops_at_the_first_bad_row(bench: Bench) -> None:
    bench.write([*rows(3), {"question": "x"}, "{"])
    with pytest.raises(DataError, match=r"source\.jsonl, row 4: the answer is missing"):
        bench.prune(strict=True)
    assert bench.critics.opened == 0
    bench.prune()
    with pytest.raises(DataError, match="row 4"):  # what was taken in before does not hide it
        bench.prune(strict=True)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("place", [0, 1100])  # among the rows whose columns are looked at first?
def test_columns_of_our_own_names_are_refused_before_anything_is_asked(
    bench: Bench, form: str, place: int
) -> None:
    records = rows(1200)
    records[place]["prune_label"] = "mine"
    bench.write(records)
    with pytest.raises(DataError, match="already has the column 'prune_label': rename or remove"):
        bench.prune(format=form)
    assert bench.critics.opened == 0


def test_nothing_usable_is_an_error_that_shows_the_first(bench: Bench) -> None:
    bench.write([{"question": "x"}, {"question": "y"}])
    with pytest.raises(DataError, match=r"none of 2 rows of source can be used; the first: the an"):
        bench.prune()
    bench.source.write_text("")
    with pytest.raises(DataError, match="no column holds a prompt"):
        bench.prune()


def test_held_out_rows_go_unasked_and_shared_ones_are_counted(bench: Bench, tmp_path: Path) -> None:
    tests, rl = tmp_path / "tests.jsonl", tmp_path / "rl.jsonl"
    tests.write_text(json.dumps({"question": rows()[3]["question"].upper()}) + "\n")
    rl.write_text("".join(json.dumps({"question": r["question"]}) + "\n" for r in rows(5)))
    report = bench.prune(overlap={"held_out": [str(tests)], "compare": [str(rl)]})
    annotated = bench.annotated()
    assert (annotated[3]["prune_action"], annotated[3]["prune_rule"]) == ("drop", "held_out")
    assert annotated[3]["prune_reason"] == f"shares '3 : 50 ?' with {tests}"
    assert annotated[3]["prune_samples"] is None
    assert report["figures"]["overlaps"] == {str(tests): 1, str(rl): 5}
    assert report["figures"]["rows"]["held_out"] == 1
    assert report["figures"]["rows"]["judged"] == 39
    assert len(bench.kept()) == 20
    # The prompts' own answers count too: a test question may hide in a completion.
    bench.write([*rows(4), {**rows(5)[4], "completion": rows()[3]["question"]}])
    bench.prune(overlap={"held_out": [str(tests)]})
    assert [row["prune_rule"] == "held_out" for row in bench.annotated()] == [False] * 3 + [
        True
    ] * 2


def test_a_held_out_set_that_cannot_be_read_stops_it(bench: Bench, tmp_path: Path) -> None:
    tests = tmp_path / "tests.jsonl"
    tests.write_text('{"question": "a"}\n{"question": 7}\n')
    with pytest.raises(DataError, match=r"tests\.jsonl, row 2: column 'question' must be a text"):
        bench.prune(overlap={"held_out": [str(tests)]})


def test_what_is_held_out_is_so_in_whatever_split_it_is(bench: Bench, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    def saved(test_question: str) -> str:
        path = tmp_path / "tests"
        splits = {
            "train": Dataset.from_list([{"question": rows()[1]["question"]}]),
            "test": Dataset.from_list([{"task": test_question, "input": "ignored"}]),
        }
        splits["test"] = splits["test"].rename_column("task", "prompt")
        DatasetDict(splits).save_to_disk(str(path))
        return str(path)

    def held_out() -> list[int]:
        return [r["n"] for r in bench.annotated() if r["prune_rule"] == "held_out"]

    tests = saved(rows()[3]["question"])
    bench.prune(overlap={"held_out": [tests]})
    assert held_out() == [1, 3]
    bench.prune(overlap={"held_out": [{"path": tests, "split": "test"}]})
    assert held_out() == [3]
    named = {"path": tests, "split": "test", "columns": {"prompt": "input"}}
    bench.prune(overlap={"held_out": [named]})
    assert held_out() == []
    saved(rows()[5]["question"])
    bench.prune(overlap={"held_out": [tests]})
    assert held_out() == [1, 5]
    with pytest.raises(DataError, match=r"no column 'x' \(overlap, .*tests: columns\.prompt\)"):
        bench.prune(overlap={"held_out": [{"path": tests, "columns": {"prompt": "x"}}]})


def test_domains_shares_and_minimum(bench: Bench) -> None:
    hard = [{**r, "domain": "hard"} for r in rows(40) if r["n"] % 10 < 2]
    easy = [{**r, "domain": "easy"} for r in rows(40) if r["n"] % 10 > 6]
    bench.write([*hard, *easy])
    report = bench.prune(selection__drop_easiest=0.5, selection__by_domain=True)
    domains = report["figures"]["domains"]
    assert {name: d["kept"] for name, d in domains.items()} == {"easy": 6, "hard": 4}
    assert set(report["cuts"]) == {"easy", "hard"}
    report = bench.prune(selection__easy_above=0.5, selection__min_per_domain=3, top_up=True)
    assert {n: d["kept"] for n, d in report["figures"]["domains"].items()} == {"easy": 3, "hard": 8}
    rules = {row["prune_rule"] for row in bench.annotated() if row["prune_action"] == "keep"}
    assert rules == {"easy_above", "min_per_domain"}


def test_what_is_never_answered_right_is_reported_and_dropped_above_ninety_percent(
    bench: Bench,
) -> None:
    report = bench.prune(selection__drop_easiest=0.5)
    assert report["figures"]["unsolved_share_of_kept"] == pytest.approx(
        np.mean([row["prune_correct"] == 0 for row in bench.annotated() if row["n"] in kept(bench)])
    )
    report = bench.prune(selection__drop_easiest=0.95, top_up=True)
    assert report["figures"]["unsolved_share_of_kept"] == 0.0
    unsolved = [row for row in bench.annotated() if row["prune_correct"] == 0]
    assert {row["prune_rule"] for row in unsolved} == {"drop_unsolved"}
    assert {row["prune_samples"] for row in unsolved} == {16}
    report = bench.prune(selection={"drop_easiest": 0.95, "drop_unsolved": False})
    assert report["figures"]["unsolved_share_of_kept"] == 1.0


def kept(bench: Bench) -> set[int]:
    return {row["n"] for row in bench.kept()}


def test_pass_at_k_prunes_what_pass_at_1_keeps(bench: Bench) -> None:
    bench.prune(selection__easy_above=0.9, judge__adaptive=False)
    by_rate = kept(bench)
    report = bench.prune(
        selection={"metric": "pass@k", "k": 8, "easy_above": 0.9}, judge__adaptive=False
    )
    assert kept(bench) < by_rate
    assert report["metric"] == "pass@8"
    rates = report["figures"]["pass_rates"]
    # Unbiased, because n was fixed: the mean of c/16.
    annotated = bench.annotated()
    expected = np.mean([row["prune_correct"] / 16 for row in annotated])
    assert rates["pass@1"]["all"]["mean"] == pytest.approx(expected)
    assert rates["pass@1"]["all"]["low"] < expected < rates["pass@1"]["all"]["high"]
    assert set(rates["pass@8"]["domains"]) == {"a", "b"}
    assert rates["pass@8"]["kept"]["mean"] < rates["pass@8"]["all"]["mean"]


def test_a_systems_message_is_shown_unless_the_row_has_one(bench: Bench) -> None:
    turns = [{"role": "system", "content": "Own."}, {"role": "user", "content": question(1, 0.5)}]
    bench.write([{"messages": turns, "answer": "1"}, {"messages": turns[1:], "answer": "1"}])
    bench.prune(critic__system="Given.")
    shown = {text.split("1:50")[0] for text in bench.engine.prompts}
    assert shown == {"Own.", "Given."}


def test_the_estimate_is_near_and_leaves_nothing(bench: Bench) -> None:
    bench.write(rows(400))
    critics = FakeCritics(FakeEngine(bench.model.chat, delay_s=0.001))
    guessed = estimate(bench.settings(), bench.out, bench.model, critics)
    assert not bench.out.exists()
    assert guessed["prompts_to_judge"] == guessed["prompts"] == 400
    assert guessed["probed_prompts"] == 64
    assert guessed["seconds"] > 0
    bench.prune()
    assert guessed["answers"] == pytest.approx(bench.engine.samples, rel=0.35)
    assert guessed["completion_tokens"] == 3 * guessed["answers"]
    # `prompt` + 5 to 7 characters + roles, once a request.
    requests = sum(bench.engine.requests.values())
    assert guessed["prompt_tokens"] == pytest.approx(9 * requests, rel=0.4)
    before = Store(bench.out / "store.sqlite").usage()
    left = estimate(bench.settings(), bench.out, bench.model, critics)
    assert (left["prompts_to_judge"], left["answers"], left["seconds"]) == (0, 0, 0.0)
    more = bench.settings(judge__max_samples=64)
    left = estimate(more, bench.out, bench.model, critics)
    assert 0 < left["prompts_to_judge"] < 400
    assert Store(bench.out / "store.sqlite").usage() == before


def test_the_estimate_is_of_what_the_same_command_would_do(bench: Bench) -> None:
    bench.write(rows(400))
    critics = FakeCritics(FakeEngine(bench.model.chat))
    bench.prune()
    other = bench.settings(selection={"drop_easiest": 0.8})
    guessed = estimate(other, bench.out, bench.model, critics)
    assert (guessed["prompts_to_judge"], guessed["answers"], critics.opened) == (0, 0, 0)
    guessed = estimate(other, bench.out, bench.model, critics, top_up=True)
    assert guessed["prompts_to_judge"] > 0
    hotter = bench.settings(judge__temperature=0.5)
    with pytest.raises(RunDirError, match="judged with something else"):
        estimate(hotter, bench.out, bench.model, critics)
    guessed = estimate(hotter, bench.out, bench.model, critics, fresh=True)
    assert guessed["prompts_to_judge"] == 400
    assert bench.prune()["figures"]["prompts"]["judged"] == 400  # nothing was deleted


def test_too_few_open_prompts_to_estimate_from(bench: Bench) -> None:
    """Whether what is never right stays open depends on how much is too easy, among all."""
    easy = [{"question": question(i, 1.0), "answer": "1"} for i in range(1000)]
    never = [{"question": question(i, 0.0), "answer": "1"} for i in range(1000, 1002)]
    bench.write([*easy, *never])
    cut = {"selection": {"easy_above": 0.9}}
    bench.prune(judge__adaptive=False, judge__max_samples=16, **cut)
    critics = FakeCritics(bench.engine)
    guessed = estimate(
        bench.settings(judge__max_samples=32, **cut), bench.out, bench.model, critics, top_up=True
    )
    assert (guessed["prompts_to_judge"], guessed["answers"]) == (2, 32)
    assert guessed["seconds"] is None
    assert critics.opened == 0
