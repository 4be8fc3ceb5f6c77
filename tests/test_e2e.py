"""The whole pipeline as a user starts it: real vLLM, DeepSpeed, TRL and Ray on the starter policy,
every stage a few steps long."""

import hashlib
import importlib.util
import itertools
import math
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.audit import audit
from posttrain.inspect import load_run
from posttrain.ledger import Ledger
from posttrain.metrics import read_metrics
from posttrain.run_dir import RunDir, hash_path
from posttrain.stages.rl_checkpoint import RLCheckpoints, read_state
from posttrain.starter import POLICY_DIR
from posttrain.workers.weights import read_checkpoint, scratch_directory

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[1]
DEADLINE_S = 480
NUM_STEPS, GROUPS_PER_STEP, MAX_LAG = 3, 8, 1
SMALL = (
    "tasks.train=[{source: starter, size: 64}]",
    "tasks.held_out=[{source: starter, size: 16}]",
    "sft.data.size=64",
    f"rl.num_steps={NUM_STEPS}",
    f"rl.groups_per_step={GROUPS_PER_STEP}",
    f"rl.max_lag={MAX_LAG}",
    "rl.publish.probe_every=1",
    "dpo.mining.num_prompts=32",
    "dpo.guard.max_fall=1",  # of 16 held-out prompts one more may well be missed
)


@dataclass(frozen=True)
class Finished:
    """A command that has ended; `survivors` are those of its processes that have not."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    survivors: list[psutil.Process]


def posttrain_run(run_dir, logs, *overrides, stop_when=lambda: False, stop_by=signal.SIGTERM):
    """`posttrain run` on the quickstart's settings, made small; `stop_by` once `stop_when()`."""
    command = [sys.executable, "-m", "posttrain.cli", "run", "configs/quickstart.yaml"]
    began = time.monotonic()
    with (logs / "stdout").open("w+") as stdout, (logs / "stderr").open("w+") as stderr:
        process = psutil.Popen(
            [*command, f"run.dir={run_dir}", *SMALL, *overrides],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
        started = {process}
        stopped = False
        while process.poll() is None and time.monotonic() - began < DEADLINE_S:
            # Again and again, because what loses its parent is nobody's child afterwards.
            started |= set(process.children(recursive=True))
            if not stopped and stop_when():
                process.send_signal(stop_by)
                stopped = True
            time.sleep(0.2)
        seconds = time.monotonic() - began
        _, survivors = psutil.wait_procs(started, timeout=10)
        for survivor in survivors:
            survivor.kill()
        return Finished(
            process.wait(),
            *((logs / name).read_text() for name in ("stdout", "stderr")),
            seconds,
            survivors,
        )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("e2e") / "run"


def scratch_of(run_dir):
    """Where a run's weights pass through shared memory."""
    return scratch_directory(hashlib.sha256(str(run_dir).encode()).hexdigest()[:12])


@pytest.fixture(scope="module")
def scratch(run_dir):
    """Shared memory as a killed driver of the same run would have left it."""
    directory = scratch_of(run_dir)
    (directory / "1.3").mkdir(parents=True)
    (directory / "1.3" / "model.safetensors").write_bytes(b"torn")
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def finished(run_dir, scratch):
    done = posttrain_run(run_dir, run_dir.parent)
    assert done.code == 0, done.stderr[-5000:]
    return done


def test_every_stage_is_done_and_measured(finished, run_dir):
    stages = RunDir(run_dir).stages()
    assert list(stages) == ["start", "screen", "sft", "rl", "dpo"]
    for name, record in stages.items():
        assert record.state == "done"
        assert record.seconds > 0
        for artifact, digest in record.artifacts.items():
            assert hash_path(run_dir / artifact) == digest, (name, artifact)
    assert stages["screen"].metrics["samples"] == 64 * 4
    assert stages["sft"].metrics["rows"] == stages["screen"].metrics["sft_rows_kept"] > 0
    assert stages["dpo"].metrics["pairs"] > 0


def test_the_table_stands_on_stdout_and_progress_on_stderr(finished, run_dir):
    assert "pass@1" in finished.stdout
    assert "pass@8" in finished.stdout
    for heading in ("start", "SFT", "RL", "DPO"):
        assert heading in finished.stdout
    accuracy = RunDir(run_dir).stages()["dpo"].metrics["evaluation"]["all"]["pass@1"]["mean"]
    assert f"{accuracy:.3f}".lstrip("0") in finished.stdout
    assert str(RunDir(run_dir).policy_dir) in finished.stdout
    assert "rl 3/3" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_run_can_be_looked_at_and_its_artifacts_say_what_they_are(finished, run_dir):
    run = load_run(run_dir)
    assert run.prompts["in_held_out"].sum() == 16
    assert run.verdicts["domain"].null_count() == 0
    assert run.steps.filter(run.steps["stage"] == "rl")["rollout_idle_share"].null_count() == 0
    assert len(run.pairs) == RunDir(run_dir).stages()["dpo"].metrics["pairs"]
    for card in ("sft/policy", "rl/policy", "policy", "rollouts", "dpo"):
        assert (run_dir / card / "README.md").read_text().startswith("---\n"), card
    assert "| all |" in (run_dir / "policy" / "README.md").read_text()
    if importlib.util.find_spec("vl_convert"):
        assert (run_dir / "report.html").read_text().startswith("<!DOCTYPE html>")
    else:
        assert "no report" in finished.stderr


def test_nothing_outlives_the_run(finished, scratch):
    assert finished.survivors == []
    assert not scratch.exists()


def test_every_training_stage_changed_the_policy_and_the_last_is_the_result(finished, run_dir):
    run = RunDir(run_dir)
    stages = [run.stage_dir(name) / "policy" for name in ("sft", "rl", "dpo")]
    weights = [read_checkpoint(path) for path in (POLICY_DIR, *stages, run.policy_dir)]
    for before, after in itertools.pairwise(weights[:4]):
        assert before.keys() == after.keys()
        assert all(tensor.isfinite().all() for tensor in after.values())
        assert any(not torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert all(torch.equal(weights[3][name], weights[4][name]) for name in weights[3])

    model = AutoModelForCausalLM.from_pretrained(run.policy_dir, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(run.policy_dir)
    assert model.dtype is torch.float32
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "add 1 2"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    text = tokenizer.decode(model.generate(**ids, do_sample=False, max_new_tokens=40)[0])
    assert "#" in text  # it still answers in its own form
    assert text.rstrip().endswith(tokenizer.eos_token)


def test_every_draw_ended_once_and_those_trained_are_the_steps_groups(finished, run_dir):
    report = audit(RunDir(run_dir).ledger_path)
    assert report.ok, report.describe()
    assert report.num_attempts == 1
    assert report.counts["trained"] == NUM_STEPS * GROUPS_PER_STEP
    assert report.counts["in_flight"] == 0
    assert report.num_provisional == 0
    ended = RunDir(run_dir).stages()["rl"].metrics["draws"]
    assert {name: count for name, count in report.counts.items() if count} == ended


def test_each_step_left_one_sound_record(finished, run_dir):
    records = [r for r in read_metrics(RunDir(run_dir).metrics_path) if r["stage"] == "rl"]
    steps = [r for r in records if "step" in r]
    assert [r["step"] for r in steps] == [1, 2, 3]
    for record in steps:
        assert "non_finite" not in record
        assert math.isfinite(record["learner/loss"])
        assert record["learner/grad_norm"] > 0
        assert record["learner/skipped_steps"] == 0
        assert 0 <= record["lag_max"] <= MAX_LAG
        assert 0 <= record["rollout_idle_share"] < 1
        assert record["draws/trained"] == GROUPS_PER_STEP
        assert 0 < record["publish/mismatch_max"] <= 1e-4
        # On-policy tokens have the learner's own probability; older ones only nearly.
        assert record.get("learner/k3_age_0", 0.0) < 1e-8
    assert "learner/k3_age_0" in steps[0]  # nothing can be older than the first weights


def test_the_same_command_again_finds_everything_done(finished, run_dir, tmp_path):
    manifest = RunDir(run_dir).manifest_path.read_bytes()
    again = posttrain_run(run_dir, tmp_path)
    assert again.code == 0, again.stderr
    assert again.seconds < 30  # no engine was started
    assert "is done" in again.stderr
    assert again.stdout == finished.stdout
    assert again.survivors == []
    assert RunDir(run_dir).manifest_path.read_bytes() == manifest


def test_a_change_is_told_beforehand_and_a_dry_run_leaves_everything(finished, run_dir, tmp_path):
    manifest = RunDir(run_dir).manifest_path.read_bytes()
    told = posttrain_run(run_dir, tmp_path, "rl.learner.learning_rate=1.0e-5", "--dry-run")
    assert told.code == 0, told.stderr
    assert "sft: done before" in told.stdout
    assert "rl: runs again (rl.learner.learning_rate: 0.0002 → 1e-05)" in told.stdout
    assert "dpo: runs again (the stage rl before it)" in told.stdout
    assert RunDir(run_dir).manifest_path.read_bytes() == manifest


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_command(tmp_path):
    run = RunDir(tmp_path / "run")

    def one_step_is_done():
        return run.metrics_path.exists() and '"step": 1' in run.metrics_path.read_text()

    stopped = posttrain_run(run.path, tmp_path, "stages=[rl]", stop_when=one_step_is_done)
    assert stopped.code == 4, stopped.stderr[-5000:]
    assert "SIGTERM" in stopped.stderr.splitlines()[-1]
    assert stopped.survivors == []
    assert not scratch_of(run.path).exists()
    states = {name: record.state for name, record in run.stages().items()}
    assert states == {"start": "done", "rl": "running"}
    assert audit(run.ledger_path).ok
    steps = [r["step"] for r in read_metrics(run.metrics_path) if "step" in r]
    checkpoint = RLCheckpoints(run.stage_dir("rl"), keep=2).latest()
    assert read_state(checkpoint).step == max(steps)  # rl.checkpoint_every is 20
    assert f"with a checkpoint of step {max(steps)}" in stopped.stderr.splitlines()[-1]

    done = posttrain_run(run.path, tmp_path, "stages=[rl]")
    assert done.code == 0, done.stderr[-5000:]
    assert "start: done before" in done.stderr
    assert f"rl: goes on from step {max(steps)}" in done.stderr
    steps = [r["step"] for r in read_metrics(run.metrics_path) if "step" in r]
    assert steps == list(range(1, NUM_STEPS + 1))  # none of them twice
    report = audit(run.ledger_path)
    assert report.ok, report.describe()
    assert report.num_attempts == 2
    assert report.counts["trained"] == NUM_STEPS * GROUPS_PER_STEP
    assert report.num_provisional == 0


@pytest.mark.slow
def test_a_changed_setting_runs_what_rests_on_it_again(tmp_path):
    run = RunDir(tmp_path / "run")
    first = posttrain_run(run.path, tmp_path, "stages=[rl,dpo]", "dpo.mining.num_prompts=64")
    assert first.code == 0, first.stderr[-5000:]
    before = run.stages()
    again = posttrain_run(
        run.path,
        tmp_path,
        *("stages=[rl,dpo]", "dpo.mining.num_prompts=64", "rl.num_steps=4", "run.seed=0"),
    )
    assert again.code == 0, again.stderr[-5000:]
    assert "rl: goes on with rl.num_steps: 3 → 4" in again.stderr
    assert "rl: goes on from step 3" in again.stderr
    assert "dpo: runs again, for this has changed: the stage rl before it" in again.stderr
    assert (run.superseded_dir / "dpo-1" / "policy" / "model.safetensors").exists()
    after = run.stages()
    assert after["start"] == before["start"]
    assert after["rl"].artifacts["rl/policy"] != before["rl"].artifacts["rl/policy"]
    report = audit(run.ledger_path)
    assert report.ok, report.describe()
    assert report.counts["trained"] == 4 * GROUPS_PER_STEP


@pytest.mark.slow
def test_ctrl_c_while_ray_train_is_at_work_ends_with_4(tmp_path):
    """Ray Train has an answer of its own to Ctrl-C, which would end the process with 0."""
    run = RunDir(tmp_path / "run")

    def a_rank_is_at_work():
        running = psutil.process_iter(["cmdline"])
        return any("RayTrainWorker" in " ".join(p.info["cmdline"] or ()) for p in running)

    stopped = posttrain_run(
        run.path, tmp_path, "stages=[sft]", stop_when=a_rank_is_at_work, stop_by=signal.SIGINT
    )
    assert stopped.code == 4, stopped.stderr[-5000:]
    assert "SIGINT" in stopped.stderr.splitlines()[-1]
    assert stopped.survivors == []
    assert run.stages()["sft"].state == "running"


@pytest.mark.slow
def test_a_critic_of_its_own_judges_beside_training(tmp_path):
    """Two engines and a learner; held-out tasks are measured beside them."""
    run = RunDir(tmp_path / "run")
    done = posttrain_run(
        run.path,
        tmp_path,
        "stages=[rl]",
        "rl.num_steps=12",
        "rl.rescreen={placement: dedicated, every_steps: 3, prompts: 6, samples: 13}",
        "rl.evaluation={every_steps: 6, prompts: 6, k: [1], num_samples: 2, max_tokens: 96}",
        "resources.judge.actor.cpus=0.25",
    )
    assert done.code == 0, done.stderr[-5000:]
    slices = load_run(run.path).rescreens.sort("step")
    due = slices["step"].to_list()
    assert len(due) >= 2 and set(due) <= {3, 6, 9, 12}
    # Its weights stand still while it judges: no answer was written by two versions.
    assert slices["discarded"].to_list() == [0] * len(due)
    assert slices["prompts"].to_list() == [6] * len(due)
    with Ledger.open_readonly(run.ledger_path) as ledger:
        judged = Counter(v.critic for v in ledger.verdicts() if v.critic.startswith("rl:"))
    assert judged == {f"rl:1.{step}": 6 for step in due}
    records = read_metrics(run.metrics_path)
    steps = [r for r in records if "judge_tokens_per_s" in r]
    assert len(steps) == 12
    assert sum(r["judge_tokens_per_s"] for r in steps) > 0
    idle = [r["judge_idle_share"] for r in steps]
    assert 0 <= min(idle) < max(idle) <= 1
    measured = [r for r in records if r.get("event") == "evaluation"]
    assert [r["step"] for r in measured][:1] == [6]
    assert 0 <= measured[0]["all"]["pass@1"]["mean"] <= 1
    assert audit(run.ledger_path).ok
    assert done.survivors == []
    assert not scratch_of(run.path).exists()
