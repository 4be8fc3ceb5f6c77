"""What a pruning pass writes: `datasets` loads it, TRL trains on it, nothing is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prune_fakes import FakeCritics, FakeEngine, model_of, question

from posttrain.errors import DataError
from posttrain.prune import shards
from posttrain.prune.card import describe_selection
from posttrain.prune.run import prune
from posttrain.prune.settings import PruneSettings

NUM = 24


def conversations() -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": question(i, (i % 4) / 3)},
                {"role": "assistant", "content": "#1"},
            ],
            "tags": [i, None] if i % 2 else [],
            "score": 1.5 * i,
            "deep": {"x": {"y": None if i % 3 else "z"}},
        }
        for i in range(NUM)
    ]


def pruned(source: Path, policy: Path, engine: FakeEngine | None = None, **changes: Any) -> Path:
    model = model_of(policy)
    settings = PruneSettings.model_validate(
        {
            "source": {"path": str(source)},
            "critic": {"model": "critic", "max_length": 64},
            "judge": {"seed": 0, "max_tokens": 16},
            **changes,
        }
    )
    out = source.parent / "out"
    prune(settings, out, model, FakeCritics(engine or FakeEngine(model.chat)))
    return out


def loaded(out: Path, name: str | None = None) -> Any:
    from datasets import load_dataset

    data = load_dataset(str(out), name, cache_dir=str(out.parent / "cache"))
    assert list(data) == ["train"]
    return data["train"]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_datasets_loads_what_was_kept_and_what_was_decided(
    tmp_path: Path, tiny_policy: Path, form: str
) -> None:
    out = pruned(write_jsonl(tmp_path / "s.jsonl", conversations()), tiny_policy, format=form)
    annotated = loaded(out, "annotated").to_list()
    assert [{k: r[k] for k in conversations()[0]} for r in annotated] == conversations()
    wanted = [row["prune_row"] - 1 for row in annotated if row["prune_action"] == "keep"]
    assert len(wanted) == NUM // 2
    assert loaded(out).to_list() == [conversations()[i] for i in wanted]
    verdicts = loaded(out, "verdicts").to_list()
    assert {v["id"]: v["kept"] for v in verdicts} == {
        r["prune_id"]: r["prune_action"] == "keep" for r in annotated
    }
    assert json.loads(verdicts[0]["outcomes"]).keys() <= {"correct", "wrong"}


def test_json_lines_stay_byte_for_byte(tmp_path: Path, tiny_policy: Path) -> None:
    lines = [
        f'{{"question":  "{question(i, i % 2)}", "answer": "1", "é": {i}.0}}' for i in range(NUM)
    ]
    source = tmp_path / "s.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = pruned(source, tiny_policy, format="jsonl")
    kept = (out / "data" / "kept" / "part-00000.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(kept) == NUM // 2
    assert kept == [line for line in lines if line in kept]


def test_mixed_rows_of_json_stay_where_json_is_asked_for(tmp_path: Path, tiny_policy: Path) -> None:
    rows = [{"question": question(i, i % 2), "answer": "1", "n": i} for i in range(8)]
    rows[2]["n"] = rows[5]["n"] = {"deep": []}
    source = write_jsonl(tmp_path / "s.jsonl", rows)
    out = pruned(source, tiny_policy)
    in_parquet = pq.read_table(out / "data" / "annotated")["prune_row"].to_pylist()
    assert in_parquet == [1, 2, 4, 5, 7, 8]
    out = pruned(source, tiny_policy, format="jsonl")
    lines = (out / "data" / "annotated" / "part-00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in lines] == [row["n"] for row in rows]
    assert (out / "quarantine.jsonl").read_text() == ""


@pytest.mark.parametrize("kind", ["directory", "parquet"])
def test_a_data_set_keeps_its_features(tmp_path: Path, tiny_policy: Path, kind: str) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    kinds = {
        "prompt": Value("string"),
        "answer": Value("string"),
        "where": ClassLabel(names=["a", "b"]),
    }
    features = Features({**kinds, "ids": List(Value("int32"))})
    rows = [
        {"prompt": question(i, (i % 4) / 3), "answer": "1", "where": i % 2, "ids": [i]}
        for i in range(NUM)
    ]
    data = Dataset.from_list(rows, features=features)
    if kind == "directory":
        data.save_to_disk(str(tmp_path / "set"))
    else:
        data.to_parquet(str(tmp_path / "set.parquet"))
    out = pruned(tmp_path / ("set" if kind == "directory" else "set.parquet"), tiny_policy)
    assert loaded(out).features == features
    annotated = loaded(out, "annotated")
    assert {name: annotated.features[name] for name in features} == features
    assert [{k: r[k] for k in features} for r in annotated.to_list()] == rows


@pytest.mark.parametrize("kind", ["conversation", "prompt and completion"])
def test_trl_trains_on_it_unchanged(tmp_path: Path, tiny_policy: Path, kind: str) -> None:
    from trl import SFTConfig, SFTTrainer

    rows = conversations()
    if kind != "conversation":
        rows = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in rows]
    out = pruned(write_jsonl(tmp_path / "s.jsonl", rows), tiny_policy)
    trainer = SFTTrainer(
        str(tiny_policy),
        args=SFTConfig(
            output_dir=str(tmp_path / "trained"),
            max_steps=1,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=loaded(out),
    )
    result = trainer.train()
    assert result.global_step == 1
    assert 0 < result.training_loss < 10
    assert trainer.train_dataset.num_rows == NUM // 2


def test_the_manifest_says_what_was_done_with_what(tmp_path: Path, tiny_policy: Path) -> None:
    out = pruned(write_jsonl(tmp_path / "s.jsonl", conversations()), tiny_policy)
    manifest = json.loads((out / "manifest.json").read_text())
    identity = manifest["judged_with"]
    assert identity["critic"] == {"model": str(tiny_policy), "fingerprint": "f00d" * 16}
    assert identity["template"] == model_of(tiny_policy).chat.template_hash
    assert identity["sampling"] == {"temperature": 1.0, "max_tokens": 16, "seed": 0}
    assert "math-verify " in identity["verifier"]["version"]
    assert manifest["settings"]["selection"]["drop_easiest"] == 0.5
    assert manifest["source"]["columns"] == ["messages", "tags", "score", "deep"]
    assert len(manifest["source"]["fingerprint"]) == 16
    assert 0 < manifest["cuts"]["all"] < 1
    figures = manifest["figures"]
    assert figures["rows"]["kept"] == NUM // 2
    assert figures["answers"] * 3 == manifest["usage"]["completion_tokens"]
    card = (out / "README.md").read_text()
    assert f"{NUM // 2} of {NUM} rows of `{tmp_path / 's.jsonl'}`" in card
    assert card.count("█") > 0
    assert "| s | 24 | 12 | 50% |" in card


def test_a_set_of_which_nothing_is_kept_says_so(tmp_path: Path, tiny_policy: Path) -> None:
    rows = [{"question": question(i, 1.0), "answer": "1"} for i in range(4)]
    model = model_of(tiny_policy)
    content = {
        "source": {"path": str(write_jsonl(tmp_path / "s.jsonl", rows))},
        "critic": {"model": "critic", "max_length": 64},
        "judge": {"seed": 0, "max_tokens": 16, "max_samples": 8},
        "selection": {"easy_above": 0.5},
    }
    critics = FakeCritics(FakeEngine(model.chat))
    report = prune(PruneSettings.model_validate(content), tmp_path / "out", model, critics)
    assert report["advice"] == ["nothing is kept; move the cut, or give the critic harder prompts"]
    kept = pq.read_table(tmp_path / "out" / "data" / "kept")
    assert (kept.num_rows, kept.column_names) == (0, ["question", "answer"])
    assert report["figures"]["unsolved_share_of_kept"] is None


def test_objects_of_other_keys_stay_as_they_are_or_are_refused(
    tmp_path: Path, tiny_policy: Path
) -> None:
    answers = [{"alice": "knight", "bob": "knave"}, {"carol": "knave"}]
    rows = [
        {"question": question(i, 0.5), "answer": "1", "answers": a} for i, a in enumerate(answers)
    ]
    source = write_jsonl(tmp_path / "s.jsonl", rows)
    engine = FakeEngine(model_of(tiny_policy).chat)
    with pytest.raises(
        DataError, match=r"row 2: objects in 'answers' have other keys than before .*--format jsonl"
    ):
        pruned(source, tiny_policy, engine)
    assert engine.samples == 0
    out = pruned(source, tiny_policy, format="jsonl", selection={"easy_above": 0.99})
    assert (out / "data/kept/part-00000.jsonl").read_text() == source.read_text()


def test_what_a_format_cannot_hold_is_said(tmp_path: Path, tiny_policy: Path) -> None:
    rows = [{"question": question(1, 0.5), "answer": "1", "meta": {}}]
    source = write_jsonl(tmp_path / "s.jsonl", rows)
    engine = FakeEngine(model_of(tiny_policy).chat)
    with pytest.raises(DataError, match=r"Cannot write struct type 'meta'.*--format jsonl"):
        pruned(source, tiny_policy, engine)
    assert engine.samples == 0
    out = pruned(source, tiny_policy, format="jsonl")
    assert json.loads((out / "data/annotated/part-00000.jsonl").read_text())["meta"] == {}
    dates = pa.table(
        {"question": [question(1, 0.5)], "answer": ["1"], "at": pa.array([0], pa.date32())}
    )
    pq.write_table(dates, tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"date is not JSON serializable.*--format parquet"):
        pruned(tmp_path / "d.parquet", tiny_policy, format="jsonl")
    notes = pa.array([b"caf\xe9"]).view(pa.string())
    pq.write_table(dates.set_column(2, "notes", notes), tmp_path / "n.parquet")
    with pytest.raises(DataError, match=r"b'caf\\xe9' is no UTF-8 text.*--format parquet"):
        pruned(tmp_path / "n.parquet", tiny_policy, format="jsonl")
    out = pruned(tmp_path / "n.parquet", tiny_policy)
    assert pq.read_table(out / "data" / "annotated")["notes"].cast(pa.binary())[0].as_py()


def test_large_sets_come_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 10)
    monkeypatch.setattr(shards, "GROUP_ROWS", 4)
    schema = pa.schema([("x", pa.int64())])
    with shards.ParquetShards(tmp_path / "parquet", schema) as tables:
        for start in range(0, 30, 3):
            tables.write(pa.table({"x": range(start, start + 3)}, schema))
    with shards.LineShards(tmp_path / "jsonl") as lines:
        for start in range(0, 30, 3):
            lines.write([str(x) for x in range(start, start + 3)])
    for form in ("parquet", "jsonl"):
        files = sorted((tmp_path / form).iterdir())
        assert [f.stem for f in files] == ["part-00000", "part-00001", "part-00002"]
    assert pq.read_table(tmp_path / "parquet")["x"].to_pylist() == list(range(30))
    sizes = [pq.read_metadata(f).num_rows for f in sorted((tmp_path / "parquet").iterdir())]
    assert sizes == [12, 12, 6]
    written = "".join(f.read_text() for f in sorted((tmp_path / "jsonl").iterdir()))
    assert written.split() == [str(x) for x in range(30)]


@pytest.mark.parametrize(
    ("method", "selection", "words"),
    [
        ("critic", {"drop_easiest": 0.5}, "the easiest 50% by pass@1 dropped"),
        ("grade", {"drop_below": 3}, "rows with grade (experimental) below 3 dropped"),
        ("ifd", {"drop_easiest": 0.2}, "the lowest 20% by ifd (experimental) dropped"),
    ],
)
def test_card_and_summary_say_which_judgements_are_experimental(
    method: str, selection: dict[str, float], words: str
) -> None:
    metric = "pass@1" if method == "critic" else method
    settings = PruneSettings.model_validate(
        {
            "source": {"path": "rows.jsonl"},
            "critic": {"model": "critic"},
            "method": method,
            "selection": {"metric": metric} | selection,
        }
    )
    assert describe_selection(settings.model_dump()) == words
