import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from posttrain.atomic import recover, write_atomically
from posttrain.errors import ModelError, RunDirError
from posttrain.run_dir import (
    RunDir,
    fingerprint_directory,
    staged_directory,
    still_asked_for,
)

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "stages": ["screen", "rl"],
    "run": {"dir": "runs/a", "seed": 7},
    "rl": {"group_size": 8, "lr": 1e-05, "gate": {"kind": "spread"}},
    "log": {"wandb": False},
}

F1 = {"rl.lr": 1e-05, "data.train": "ab12"}


def changed(**sections):
    return {key: {**SETTINGS[key], **new} for key, new in sections.items()}


def start(code, *arguments):
    """A second process, in which `code` runs; it tells of its progress on stdout."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def run(tmp_path):
    with RunDir.create_or_open(tmp_path / "run", SETTINGS, fresh=False) as run:
        yield run


class TestSettings:
    def test_are_written_with_versions_and_inputs(self, tmp_path):
        inputs = {"train.jsonl": "ab12"}
        with RunDir.create_or_open(tmp_path / "r", SETTINGS, fresh=False, inputs=inputs) as run:
            config = yaml.safe_load(run.config_path.read_text())
        assert config["settings"] == SETTINGS
        assert config["inputs"] == inputs
        assert config["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
        assert RunDir(tmp_path / "r").config() == config

    def test_the_latest_settings_and_inputs_are_the_ones_on_disk(self, tmp_path):
        other = {**SETTINGS, **changed(rl={"lr": 2e-05})}
        for settings, inputs in ((SETTINGS, {"a": "1"}), (other, {"a": "2"})):
            with RunDir.create_or_open(tmp_path / "r", settings, False, inputs) as run:
                run.begin_stage("rl", {"rl.lr": 1})
            config = RunDir(tmp_path / "r").config()
            assert (config["settings"], config["inputs"]) == (settings, inputs)
        assert RunDir(tmp_path / "r").stages()["rl"].depends_on == {"rl.lr": 1}

    def test_a_refused_run_is_not_kept_locked(self, tmp_path):
        RunDir.create_or_open(tmp_path / "r", SETTINGS, fresh=False).close()
        config = tmp_path / "r" / "config.yaml"
        whole = config.read_text()
        config.write_text(whole.replace("posttrain run 3", "posttrain run 1"))
        with pytest.raises(RunDirError, match="not written by this version"):
            RunDir.create_or_open(tmp_path / "r", {}, fresh=False)
        config.write_text(whole)
        RunDir.create_or_open(tmp_path / "r", SETTINGS, fresh=False).close()

    def test_a_damaged_config_is_named(self, tmp_path):
        RunDir.create_or_open(tmp_path / "r", SETTINGS, fresh=False).close()
        config = tmp_path / "r" / "config.yaml"
        config.write_text(config.read_text() + "\n: [")
        with pytest.raises(RunDirError, match=r"config\.yaml is no YAML"):
            RunDir(tmp_path / "r").config()


class TestFresh:
    def test_deletes_a_run_of_ours(self, tmp_path):
        path = tmp_path / "r"
        with RunDir.create_or_open(path, SETTINGS, fresh=False) as run:
            run.begin_stage("screen", F1)
            (path / "rl" / "checkpoint-3").mkdir(parents=True)
            (path / "rl" / "checkpoint-3" / "weights").write_text("old")
        with RunDir.create_or_open(path, {"run": {"seed": 8}}, fresh=True) as run:
            assert run.stages() == {}
            assert run.config()["settings"] == {"run": {"seed": 8}}
        assert {p.name for p in path.iterdir()} == {"config.yaml", "manifest.json", "lock"}

    @pytest.mark.parametrize("fresh", [False, True])
    @pytest.mark.parametrize("name", ["thesis.tex", "config.yaml", "manifest.json", "lock.txt"])
    def test_leaves_what_is_not_ours_alone(self, tmp_path, fresh, name):
        (tmp_path / name).write_text("mine: all mine")
        with pytest.raises(RunDirError, match="no run of posttrain"):
            RunDir.create_or_open(tmp_path, SETTINGS, fresh=fresh)
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "mine: all mine")]

    def test_a_file_is_no_run(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(RunDirError, match="no run of posttrain"):
            RunDir.create_or_open(tmp_path / "file", SETTINGS, fresh=True)

    @pytest.mark.parametrize("below", ["file/run", "file/a/b"])
    def test_a_path_that_cannot_be_written_is_named(self, tmp_path, below):
        (tmp_path / "file").write_text("")
        with pytest.raises(RunDirError, match=r"run\.dir: nothing can be written to .*file"):
            RunDir.create_or_open(tmp_path / below, SETTINGS, fresh=False)

    def test_a_read_only_place_is_named_and_nothing_is_left(self, tmp_path):
        with pytest.raises(RunDirError, match=r"nothing can be written to /proc "):
            RunDir.create_or_open(Path("/proc/posttrain/run"), SETTINGS, fresh=False)
        RunDir(tmp_path / "a" / "b").check_usable()
        assert list(tmp_path.iterdir()) == []

    def test_an_interrupted_deletion_can_only_be_repeated(self, tmp_path):
        path = tmp_path / "r"
        RunDir.create_or_open(path, SETTINGS, fresh=False).close()
        (path / "config.yaml").unlink()
        with pytest.raises(RunDirError, match="--fresh"):
            RunDir.create_or_open(path, SETTINGS, fresh=False)
        RunDir.create_or_open(path, SETTINGS, fresh=True).close()

    def test_a_driver_killed_at_the_very_start_leaves_nothing_in_the_way(self, tmp_path):
        (tmp_path / "lock").write_text("")
        (tmp_path / ".config.yaml.partial").write_text("format: po")
        RunDir.create_or_open(tmp_path, SETTINGS, fresh=False).close()
        assert not (tmp_path / ".config.yaml.partial").exists()


DRIVER = """
    import sys, time
    from pathlib import Path
    from posttrain.run_dir import RunDir
    run = RunDir.create_or_open(Path(sys.argv[1]), {}, fresh=False)
"""


class TestLease:
    def test_refuses_a_second_driver_and_names_the_first(self, tmp_path):
        with start(DRIVER + "    print('up', flush=True); time.sleep(60)", tmp_path) as first:
            assert first.stdout.readline() == "up\n"
            for fresh in (False, True):
                with pytest.raises(RunDirError) as caught:
                    RunDir.create_or_open(tmp_path, {}, fresh=fresh)
                assert f"pid {first.pid} on host {socket.gethostname()}" in str(caught.value)
            assert (tmp_path / "config.yaml").exists()
            first.kill()
            first.wait()
        RunDir.create_or_open(tmp_path, {}, fresh=False).close()

    def test_is_not_inherited_by_an_orphan(self, tmp_path):
        code = """
    import os
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""
        with start(DRIVER + code, tmp_path) as first:
            orphan = int(first.stdout.readline())
            with pytest.raises(RunDirError, match=f"pid {first.pid} "):
                RunDir.create_or_open(tmp_path, {}, fresh=False)
            first.kill()
            first.wait()
            try:
                os.kill(orphan, 0)
                RunDir.create_or_open(tmp_path, {}, fresh=False).close()
            finally:
                os.kill(orphan, signal.SIGKILL)

    def test_holds_within_one_process_too(self, run):
        with pytest.raises(RunDirError, match=f"pid {os.getpid()} "):
            RunDir.create_or_open(run.path, SETTINGS, fresh=False)


class TestManifest:
    def test_a_stage_is_begun_finished_and_trusted(self, run):
        assert run.stage_done("screen", F1) is False
        run.begin_stage("screen", F1)
        assert run.stages()["screen"].state == "running"
        assert run.stages()["screen"].seconds is None
        assert run.stage_done("screen", F1) is False
        run.begin_stage("screen", F1)  # after an interruption
        kept = run.path / "screen" / "kept.jsonl"
        kept.parent.mkdir()
        kept.write_text("[1]\n")
        run.finish_stage("screen", [kept], {"kept": 3, "loss": float("nan")}, 1.5)
        assert run.stage_done("screen", F1) is True
        record = RunDir(run.path).stages()["screen"]
        assert record.artifacts == {"screen/kept.jsonl": hashlib.sha256(b"[1]\n").hexdigest()}
        assert record.metrics == {"kept": 3, "loss": None, "non_finite": ["loss"]}
        assert (record.state, record.seconds, record.depends_on) == ("done", 1.5, F1)

    def test_the_seconds_of_a_stage_that_goes_on_add_up(self, run):
        run.begin_stage("rl", {"rl.num_steps": 3})
        run.finish_stage("rl", [], {}, 1.5)
        results = run.path / "evals.json"
        results.write_text("[]")
        run.record_evaluation("rl", F1, artifact=results, summary={}, seconds=0.5)
        for _ in range(2):  # the first attempt at more steps is killed
            run.begin_stage("rl", {"rl.num_steps": 4})
            assert (run.stages()["rl"].state, run.stages()["rl"].seconds) == ("running", 2.0)
        run.finish_stage("rl", [], {}, 4.0)
        assert run.stages()["rl"].seconds == 6.0
        run.set_aside("rl")
        run.begin_stage("rl", F1)
        assert run.stages()["rl"].seconds is None

    def test_stages_keep_their_order(self, run):
        for name in ("screen", "sft", "rl"):
            run.begin_stage(name, F1)
            run.finish_stage(name, [], {}, 0.0)
        run.begin_stage("dpo", F1)
        states = {"screen": "done", "sft": "done", "rl": "done", "dpo": "running"}
        manifest = json.loads(run.manifest_path.read_text())
        assert [(n, s["state"]) for n, s in manifest["stages"].items()] == list(states.items())

    def test_of_what_was_begun_the_settings_name_what_counts_and_its_order(self, run):
        for name in ("start", "sft", "dpo", "screen", "rl"):  # rl was done again
            run.begin_stage(name, F1)
        asked = {"stages": ["screen", "sft", "rl", "later"]}
        assert list(still_asked_for(run.stages(), asked)) == ["start", "screen", "sft", "rl"]
        for odd in ({}, {"stages": None}, {"stages": [["rl"]]}):
            assert still_asked_for(run.stages(), odd) == run.stages()

    @pytest.mark.parametrize(
        ("harm", "what"),
        [
            (lambda policy: (policy / "model.safetensors").write_bytes(b"\1"), "was changed"),
            (lambda policy: (policy / "more").write_bytes(b""), "was changed"),
            (lambda policy: (policy / "config.json").unlink(), "was changed"),
            (lambda policy: policy.rename(policy.with_name("gone")), "is missing"),
        ],
    )
    def test_a_changed_artifact_is_reported(self, run, harm, what):
        with staged_directory(run.policy_dir) as policy:
            (policy / "config.json").write_text("{}")
            (policy / "model.safetensors").write_bytes(b"\0")
        run.begin_stage("sft", F1)
        run.finish_stage("sft", [run.policy_dir], {}, 2.0)
        assert run.stage_done("sft", F1)
        harm(run.policy_dir)
        with pytest.raises(RunDirError, match=f"policy.* stage sft, {what}"):
            run.stage_done("sft", F1)

    @pytest.mark.parametrize("finished", [False, True])
    def test_what_rested_on_something_else_is_not_done(self, run, finished):
        run.begin_stage("sft", F1)
        if finished:
            run.finish_stage("sft", [], {}, 2.0)
        assert run.stage_done("sft", {"rl.lr": 2}) is False
        assert run.stage_done("sft", F1) is finished

    def test_an_evaluation_has_a_rest_of_its_own(self, run):
        run.begin_stage("sft", F1)
        run.finish_stage("sft", [], {"rows": 3}, 2.0)
        assert run.evaluation_done("sft", {"eval.k": 1}) is False
        results = run.path / "evals.json"
        for k, seconds in ((1, 5.0), (2, 7.5)):
            results.write_text(f"[{k}]")
            run.record_evaluation(
                "sft", {"eval.k": k}, artifact=results, summary={"all": k}, seconds=seconds - 2.0
            )
            assert run.evaluation_done("sft", {"eval.k": k})
            assert run.stage_done("sft", F1)
            record = run.stages()["sft"]
            assert record.metrics == {"rows": 3, "evaluation": {"all": k}}
        assert record.seconds == 2.0 + 3.0 + 5.5
        assert run.evaluation_done("sft", {"eval.k": 1}) is False

    def test_an_evaluation_is_forgotten_before_its_file_is_replaced(self, run):
        run.begin_stage("sft", F1)
        policy, results = run.path / "policy.txt", run.path / "evals.json"
        for file in (policy, results):
            file.write_text("old")
        run.finish_stage("sft", [policy], {"rows": 3}, 2.0)
        table = {"eval.k": 1}
        run.record_evaluation("sft", table, artifact=results, summary={"all": 1}, seconds=1.0)
        run.forget_evaluation("sft", results)
        results.write_text("new, and its driver was killed")
        assert run.stage_done("sft", F1)
        assert run.evaluation_done("sft", table) is False
        record = run.stages()["sft"]
        assert (list(record.artifacts), record.metrics) == (["policy.txt"], {"rows": 3})

    def test_what_is_set_aside_makes_room_and_keeps_its_numbers(self, run):
        assert run.set_aside("rl") is None
        for number in (1, 2):
            run.begin_stage("rl", F1)
            run.stage_dir("rl").mkdir()
            (run.stage_dir("rl") / "weights").write_text(str(number))
            target = run.set_aside("rl")
            assert target == run.path / "superseded" / f"rl-{number}"
            assert (target / "weights").read_text() == str(number)
            assert not run.stage_dir("rl").exists()
            assert run.stages() == {}

    @pytest.mark.parametrize("begun", [False, True])
    def test_what_rl_answered_is_set_aside_with_it(self, run, begun):
        if begun:
            run.stage_dir("rl").mkdir()
        run.rollouts_dir.mkdir()
        (run.rollouts_dir / "001-00000.parquet").write_text("old")
        assert run.set_aside("dpo") is None
        target = run.set_aside("rl")
        assert target == run.path / "superseded" / "rl-1"
        assert (target / "rollouts" / "001-00000.parquet").read_text() == "old"
        assert not run.rollouts_dir.exists()
        assert not run.stage_dir("rl").exists()

    def test_artifacts_lie_in_the_run(self, run, tmp_path):
        run.begin_stage("sft", F1)
        with pytest.raises(ValueError, match="not in the subpath"):
            run.finish_stage("sft", [tmp_path / "elsewhere"], {}, 2.0)
        assert run.stages()["sft"].state == "running"


class TestAtomicWrites:
    def test_a_failed_write_leaves_the_old_content(self, tmp_path):
        path = tmp_path / "f"
        write_atomically(path, "old")
        with pytest.raises(UnicodeEncodeError):
            write_atomically(path, "new \ud800")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_text_comes_in_parts(self, tmp_path):
        path = tmp_path / "f"
        write_atomically(path, (f"{i}\n" for i in range(3)))
        assert path.read_text() == "0\n1\n2\n"
        with pytest.raises(ZeroDivisionError):
            write_atomically(path, (f"{1 // i}\n" for i in (1, 0)))
        assert path.read_text() == "0\n1\n2\n"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_staged_directory_appears_when_it_is_whole(self, tmp_path):
        target = tmp_path / "deep" / "policy"
        for content in ("one", "two"):
            with staged_directory(target) as directory:
                assert list(directory.iterdir()) == []
                (directory / "sub").mkdir()
                (directory / "sub" / "f").write_text(content)
                assert not target.exists() or content == "two"
            assert (target / "sub" / "f").read_text() == content
        assert list(target.parent.iterdir()) == [target]

    def test_a_failed_staging_leaves_the_old_directory(self, tmp_path):
        target = tmp_path / "policy"
        with staged_directory(target) as directory:
            (directory / "f").write_text("old")
        with pytest.raises(KeyboardInterrupt), staged_directory(target) as directory:
            (directory / "f").write_text("new")
            raise KeyboardInterrupt
        assert (target / "f").read_text() == "old"
        assert list(tmp_path.iterdir()) == [target]

    @pytest.mark.parametrize(
        ("moment", "expected"),
        [
            ("filling", "old"),
            ("fsync_path", "old"),
            ("before rename 1", "old"),
            ("before rename 2", "old"),
            ("after rename 2", "new"),
            ("rmtree", "new"),
        ],
    )
    def test_a_kill_at_any_moment_leaves_one_whole_directory(self, tmp_path, moment, expected):
        target = tmp_path / "rl" / "checkpoint-8"
        with staged_directory(target) as directory:
            (directory / "a").write_text("old")
            (directory / "b").write_text("old")
        code = """
            import os, shutil, signal, sys
            from pathlib import Path
            from posttrain import atomic
            target, moment = Path(sys.argv[1]), sys.argv[2]
            renames = 0
            rename = Path.rename

            def die(*_):
                os.kill(os.getpid(), signal.SIGKILL)

            def counted(self, to):
                global renames
                renames += 1
                if moment == f"before rename {renames}":
                    die()
                rename(self, to)
                if moment == f"after rename {renames}":
                    die()

            Path.rename = counted
            if moment == "fsync_path":
                atomic.fsync_path = die
            with atomic.staged_directory(target) as directory:
                (directory / "a").write_text("new")
                if moment == "filling":
                    die()
                (directory / "b").write_text("new")
                if moment == "rmtree":
                    shutil.rmtree = lambda path: ((path / "a").unlink(), die())
        """
        with start(code, target, moment) as process:
            process.wait()
        assert process.returncode == -signal.SIGKILL
        assert len(list(target.parent.iterdir())) == 2
        recover(tmp_path)
        assert [p.name for p in target.parent.iterdir()] == ["checkpoint-8"]
        assert {p.name: p.read_text() for p in target.iterdir()} == {"a": expected, "b": expected}

    def test_staging_again_recovers_by_itself(self, tmp_path):
        target = tmp_path / "policy"
        (tmp_path / ".policy.partial").mkdir()
        (tmp_path / ".policy.partial" / "half").write_text("x")
        (tmp_path / ".policy.previous").mkdir()
        with pytest.raises(ZeroDivisionError), staged_directory(target) as directory:
            assert list(directory.iterdir()) == []
            assert target.exists()
            1 / 0  # noqa: B018
        assert list(tmp_path.iterdir()) == [target]


class TestFingerprint:
    def fill(self, path, order):
        files = {
            "config.json": b"{}",
            "model.safetensors": b"\0\1",
            "chat_template.jinja": b"{{ messages }}",
        }
        path.mkdir()
        for name in order:
            (path / name).write_bytes(files[name])
        return path

    def test_is_of_names_and_contents(self, tmp_path):
        names = ["config.json", "model.safetensors", "chat_template.jinja"]
        path = self.fill(tmp_path / "a", names)
        (path / "README.md").write_text("a model card does not make another model")
        sha = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
        lines = "".join(f"{name}\0{sha[name]}\n" for name in sorted(names))
        expected = hashlib.sha256(lines.encode()).hexdigest()
        assert fingerprint_directory(path) == expected
        assert fingerprint_directory(self.fill(tmp_path / "b", reversed(names))) == expected
        (path / "model.safetensors").write_bytes(b"\0\2")
        assert fingerprint_directory(path) != expected

    def test_a_directory_without_a_model_is_refused(self, tmp_path):
        with pytest.raises(ModelError, match="holds no model"):
            fingerprint_directory(tmp_path)
        with pytest.raises(ModelError, match="nowhere holds no model"):
            fingerprint_directory(tmp_path / "nowhere")


def test_opening_a_run_clears_up_after_a_killed_driver(tmp_path):
    with start(
        DRIVER
        + """
    from posttrain.run_dir import staged_directory
    with staged_directory(run.path / "rl" / "checkpoint-1") as directory:
        (directory / "half").write_text("x")
        print("up", flush=True); time.sleep(60)
""",
        tmp_path,
    ) as driver:
        driver.stdout.readline()
        driver.kill()
        driver.wait()
    assert (tmp_path / "rl" / ".checkpoint-1.partial" / "half").exists()
    RunDir.create_or_open(tmp_path, {}, fresh=False).close()
    assert list((tmp_path / "rl").iterdir()) == []
