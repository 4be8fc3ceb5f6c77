"""The store of teacher targets: content-addressed, resumable, shared, and never silently mixed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import ValidationError
from teaching_fakes import IDENTITY, CountingTeacher, record_of, sequence

from posttrain.errors import StoreError
from posttrain.teaching import acquire as acquire_module
from posttrain.teaching import store as store_module
from posttrain.teaching.acquire import acquire, wait_for
from posttrain.teaching.identity import Teaching
from posttrain.teaching.records import Record, TokenSequence, padded_targets
from posttrain.teaching.settings import TargetSettings
from posttrain.teaching.store import TargetStore

ROOT = Path(__file__).parents[1]
MANY = [sequence(1, 2, i) for i in range(3, 40)]


def same(one: Record, other: Record) -> None:
    for kind in ("per_label", "per_id"):
        assert getattr(one, kind).keys() == getattr(other, kind).keys()
        for name, array in getattr(one, kind).items():
            np.testing.assert_array_equal(array, getattr(other, kind)[name])
            assert array.dtype == getattr(other, kind)[name].dtype


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(acquire_module, "SHARD_SEQUENCES", 10)


# --- keys -----------------------------------------------------------------------------------------


def test_a_key_is_of_the_ids_and_of_what_is_learnt():
    assert sequence(1, 2, 3).key == sequence(1, 2, 3).key
    others = [sequence(1, 2, 4), sequence(1, 2, 3, 0), sequence(1, 2, 3, prompt=2)]
    assert len({s.key for s in [sequence(1, 2, 3), *others]}) == 4


def test_a_key_is_the_same_in_every_process():
    """Stores outlive processes, and machines with other number formats."""
    assert sequence(5, 6, 7).key.hex() == "4a87a3afeaa1cb7a87526438cc1d3cb8"


def test_labels_say_what_is_learnt_and_the_first_token_never_is():
    row = TokenSequence.of_labels([4, 5, 6, 7], [4, -100, 6, 7])
    assert row.label_mask.tolist() == [False, False, True, True]
    assert row.num_labels == 2


@settings(max_examples=50)
@given(
    ids=arrays.arrays(np.int64, st.integers(1, 30), elements=st.integers(0, 200_000)),
    data=st.data(),
)
def test_different_masks_have_different_keys(ids, data):
    masks = arrays.arrays(np.bool_, len(ids))
    one, other = data.draw(masks), data.draw(masks)
    one[0] = other[0] = False
    keys = [TokenSequence(token_ids=ids, label_mask=mask).key for mask in (one, other)]
    assert (keys[0] == keys[1]) == bool((one == other).all())


# --- what is written is read ----------------------------------------------------------------------


def test_records_come_back_as_they_were_written(tmp_path):
    store = TargetStore(tmp_path / "s", IDENTITY)
    store.write({s.key: record_of(s) for s in MANY[:20]}, seconds=4.0)
    store.write({s.key: record_of(s) for s in MANY[20:]}, seconds=1.0)
    again = TargetStore(tmp_path / "s", IDENTITY)
    for reader in (store, again):
        assert len(reader) == len(MANY)
        for s in MANY:
            same(reader.read(s.key), record_of(s))
    assert again.num_labels == 2 * len(MANY)
    files = sum(f.stat().st_size for f in (tmp_path / "s").glob("*.safetensors"))
    assert again.bytes_per_label == files / (2 * len(MANY))
    assert again.seconds_paid([s.key for s in MANY[:5]]) == pytest.approx(1.0)
    with pytest.raises(KeyError):
        again.read(sequence(9, 9).key)


def test_a_critics_records_have_no_ids(tmp_path):
    store = TargetStore(tmp_path, IDENTITY)
    logprobs = {"label_logprobs": np.array([-1.5, -0.25], dtype=np.float32)}
    store.write({sequence(1, 2, 3).key: Record(per_label=logprobs)}, seconds=1.0)
    same(TargetStore(tmp_path, IDENTITY).read(sequence(1, 2, 3).key), Record(per_label=logprobs))


def test_records_become_rectangles():
    targets = padded_targets([record_of(sequence(0, 2, 5)), record_of(sequence(0, 4))], samples=50)
    np.testing.assert_array_equal(targets["ids"], [[2, 0], [5, 99], [4, 0]])
    np.testing.assert_array_equal(targets["weights"], [[0.5, 0], [0.5, 0.5], [0.5, 0]])
    np.testing.assert_array_equal(targets["label_logprobs"], [-2, -5, -4])
    assert "num_ids" not in targets


# --- paid for once --------------------------------------------------------------------------------


def test_a_second_pass_asks_nobody(tmp_path):
    first, second = CountingTeacher(seconds=0.1), CountingTeacher()
    report = acquire(MANY, TargetStore(tmp_path, IDENTITY), first.load, "teacher")
    assert (report.hits, report.hit_rate, report.sequences) == (0, 0.0, len(MANY))
    again = acquire(MANY, TargetStore(tmp_path, IDENTITY), second.load, "teacher")
    assert (second.num_loads, second.asked) == (0, [])
    assert (again.hits, again.hit_rate) == (len(MANY), 1.0)
    assert 0.1 <= again.seconds_saved <= report.seconds
    assert again.bytes_per_label == report.bytes_per_label


def test_only_new_sequences_are_asked_and_each_once(tmp_path):
    acquire(MANY[:10], TargetStore(tmp_path, IDENTITY), CountingTeacher().load, "teacher")
    teacher = CountingTeacher()
    nothing_learnt = sequence(1, 2, prompt=2)
    wanted = [*MANY[:13], *MANY[10:13], nothing_learnt]
    report = acquire(wanted, TargetStore(tmp_path, IDENTITY), teacher.load, "teacher")
    assert teacher.asked == [s.key for s in MANY[10:13]]
    assert (report.sequences, report.hits) == (13, 10)


def test_a_pass_that_died_goes_on_behind_its_last_shard(tmp_path, small_shards):
    with pytest.raises(ConnectionError):
        acquire(MANY, TargetStore(tmp_path, IDENTITY), CountingTeacher(dies_at=2).load, "teacher")
    teacher = CountingTeacher()
    report = acquire(MANY, TargetStore(tmp_path, IDENTITY), teacher.load, "teacher")
    assert report.hits == 20
    assert teacher.asked == [s.key for s in MANY[20:]]


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from teaching_fakes import IDENTITY, record_of, sequence
from posttrain.teaching.store import TargetStore
store = TargetStore(Path(sys.argv[1]), IDENTITY)
for i in range(10**9):
    batch = [sequence(1, 2 + i % 200, j) for j in range(200)]
    store.write({s.key: record_of(s) for s in batch}, seconds=1.0)
    print(i, flush=True)
"""


def test_sigkill_leaves_whole_shards_only(tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    written = [writer.stdout.readline() for _ in range(8)]
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    store = TargetStore(tmp_path, IDENTITY)
    assert store.damaged == []
    assert len(store) >= 200 * len(written)
    for i in range(len(written)):
        same(store.read(sequence(1, 2 + i, 7).key), record_of(sequence(1, 2 + i, 7)))


def test_readers_and_writers_share_a_store(tmp_path):
    """Two runs at once: each takes in what the other has added."""
    one, other = TargetStore(tmp_path, IDENTITY), TargetStore(tmp_path, IDENTITY)
    one.write({s.key: record_of(s) for s in MANY[:10]}, seconds=1.0)
    other.write({s.key: record_of(s) for s in MANY[5:20]}, seconds=1.0)
    assert MANY[0].key not in other
    other.refresh()
    one.refresh()
    for store in (one, other):
        assert len(store) == 20
        same(store.read(MANY[7].key), record_of(MANY[7]))


def test_another_rank_waits_until_all_is_there(tmp_path):
    TargetStore(tmp_path, IDENTITY)
    writer = (
        "import sys, time; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "from teaching_fakes import IDENTITY, record_of, sequence\n"
        "from posttrain.teaching.store import TargetStore\n"
        f"store = TargetStore(Path({str(tmp_path)!r}), IDENTITY)\n"
        "for i in (3, 4):\n"
        "    time.sleep(0.2)\n"
        "    store.write({sequence(1, 2, i).key: record_of(sequence(1, 2, i))}, seconds=1.0)\n"
    )
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", writer], cwd=ROOT)
    store = TargetStore(tmp_path, IDENTITY)
    wait_for([sequence(1, 2, 3), sequence(1, 2, 4)], store, poll_s=0.05)
    assert time.monotonic() - began > 0.4
    assert len(store) == 2
    assert process.wait() == 0


# --- what is not trusted --------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_shard_is_made_anew(tmp_path, small_shards, harm):
    acquire(MANY, TargetStore(tmp_path, IDENTITY), CountingTeacher().load, "teacher")
    shards = sorted(tmp_path.glob("*.safetensors"))
    broken = shards[1]
    content = bytearray(broken.read_bytes())
    content[-3] ^= 1
    broken.write_bytes({"flip": bytes(content), "cut": content[:-9], "empty": b""}[harm])
    store = TargetStore(tmp_path, IDENTITY)
    assert store.damaged == [broken]
    lost = [s.key for s in MANY if s.key not in store]
    assert 0 < len(lost) <= 10
    teacher = CountingTeacher()
    report = acquire(MANY, store, teacher.load, "teacher")
    assert teacher.asked == lost
    assert report.damaged_shards == 1
    healed = TargetStore(tmp_path, IDENTITY)
    assert healed.damaged == []
    for s in MANY:
        same(healed.read(s.key), record_of(s))


def test_a_damaged_shard_that_another_writer_removes_meanwhile_is_no_error(
    tmp_path, small_shards, monkeypatch
):
    acquire(MANY, TargetStore(tmp_path, IDENTITY), CountingTeacher().load, "teacher")
    first, second, *others = sorted(tmp_path.glob("*.safetensors"))
    digest_of = store_module._digest_of

    def meanwhile(path):
        if path == first:
            second.unlink()
        return digest_of(path)

    monkeypatch.setattr(store_module, "_digest_of", meanwhile)
    store = TargetStore(tmp_path, IDENTITY)
    assert store.damaged == []
    assert set(store._shards) == {first, *others}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"teacher": "t2"}, "teacher 't1', now 't2'"),
        ({"temperature": 2.0}, r"temperature 1\.0, now 2\.0"),
        ({"template": "x"}, "template None, now 'x'"),
    ],
)
def test_a_store_of_something_else_is_refused(tmp_path, changed, named):
    TargetStore(tmp_path, IDENTITY)
    with pytest.raises(StoreError, match=named):
        TargetStore(tmp_path, IDENTITY | changed)
    TargetStore(tmp_path, IDENTITY)


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="no store"):
        TargetStore(tmp_path, IDENTITY)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_an_identity_that_cannot_be_read_is_refused(tmp_path):
    TargetStore(tmp_path, IDENTITY)
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        TargetStore(tmp_path, IDENTITY)


def test_of_two_that_claim_a_store_at_once_the_first_one_counts(tmp_path, monkeypatch):
    link = os.link

    def slow(source, target):
        Path(target).write_text(json.dumps({"teacher": "faster"}))
        link(source, target)

    monkeypatch.setattr(os, "link", slow)
    with pytest.raises(StoreError, match="faster"):
        TargetStore(tmp_path, IDENTITY)


def test_a_store_that_somebody_claims_while_one_looks_is_theirs(tmp_path, monkeypatch):
    TargetStore(tmp_path, IDENTITY)
    loads, looks = json.loads, iter([True])

    def not_yet(text):
        if next(looks, False):
            raise FileNotFoundError
        return loads(text)

    monkeypatch.setattr("posttrain.teaching.store.json.loads", not_yet)
    TargetStore(tmp_path, IDENTITY)
    with pytest.raises(StopIteration):
        next(looks)


def teaching(tmp_path, **changed):
    given = {
        "teacher": "/models/t",
        "teacher_fingerprint": "t" * 64,
        "critic": "/models/c",
        "critic_fingerprint": "c" * 64,
        "tokenizer": "k",
        "template": "m",
        "dtype": "float32",
        "targets": TargetSettings(),
        "store": tmp_path,
    }
    return Teaching(**(given | changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"teacher_fingerprint": "u" * 64},
        {"tokenizer": "l"},
        {"template": "n"},
        {"dtype": "bfloat16"},
        {"targets": TargetSettings(temperature=2.0)},
        {"targets": TargetSettings(samples=49)},
        {"targets": TargetSettings(kind="top_k")},
    ],
)
def test_a_teachers_store_names_all_that_targets_depend_on(tmp_path, changed):
    teaching(tmp_path).open_targets()
    teaching(tmp_path, teacher="/elsewhere/t", critic_fingerprint="d" * 64).open_targets()
    with pytest.raises(StoreError, match="now"):
        teaching(tmp_path, **changed).check_store()
    with pytest.raises(StoreError, match="now"):
        teaching(tmp_path, **changed).open_targets()


def test_each_critic_has_a_store_of_its_own(tmp_path):
    one, other = teaching(tmp_path), teaching(tmp_path, critic_fingerprint="d" * 64)
    one.open_targets()
    logprobs = {"label_logprobs": np.array([-1.0], dtype=np.float32)}
    one.open_critic().write({sequence(1, 2).key: Record(per_label=logprobs)}, seconds=1.0)
    assert len(one.open_critic()) == 1
    assert len(other.open_critic()) == len(other.open_targets()) == 0


def test_settings_of_targets_that_nobody_reads_are_refused():
    assert TargetSettings().samples == 50
    assert TargetSettings(kind="top_k").k == 32
    with pytest.raises(ValidationError, match="sampled does not read k"):
        TargetSettings(k=5)
    with pytest.raises(ValidationError, match="top_k does not read samples"):
        TargetSettings(kind="top_k", samples=5)
