"""One of TRL's trainers under DeepSpeed inside Ray Train, on any number of ranks.

SFT and DPO differ only in the trainer's class and the shape of the records. What a job writes lies
in the stage's directory, which all ranks see:

    data/                   the records, and what TRL makes of them (tokens, reference log-probs)
    checkpoints/step-N/     policy (Hugging Face's format) and, with an adapter, adapter (PEFT's)
    trainer/                TRL's own output; its checkpoints, if `trainer.save_strategy` says so
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from posttrain.atomic import write_atomically
from posttrain.errors import PosttrainError, StageError
from posttrain.stages.trl_log import Record, followed
from posttrain.stages.trl_rank import LOG, OUTCOME, RankJob, train_rank
from posttrain.workers.cluster import OWN_DEVICES, refuse_more_than_there_is
from posttrain.workers.demand import Demand
from posttrain.workers.settings import LearnerResources

START_DEADLINE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a job came to: TRL's own metrics, one record for each step that it logged, and where
    the policies lie, by step."""

    metrics: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    policies: Mapping[int, Path]


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's trainer without its answer to Ctrl-C, which ends the process with 0."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def run_job(
    job: RankJob,
    records: Sequence[Mapping[str, Any]],
    *,
    resources: LearnerResources,
    deadline_s: float,
    on_record: Callable[[Record], None],
) -> Trained:
    """Trains on `records`. `deadline_s` is how long the ranks may take until they are placed.
    `on_record` gets what TRL logs, as soon as it does.

    Raises:
        SettingsError: the cluster has fewer devices than the ranks need.
        StageError: a rank failed, the ranks were not placed in time, or TRL did not train under
            DeepSpeed.
    """
    refuse_more_than_there_is([Demand(role="learner", count=resources.ranks, each=resources)])
    directory = Path(job.directory)
    _prepare(job, records)
    trainer = _Trainer(
        train_rank,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=resources.ranks,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus, "GPU": resources.gpus},
        ),
        torch_config=TorchConfig(backend="nccl" if resources.gpus > 0 else "gloo"),
        run_config=RunConfig(
            name=job.kind,
            storage_path=str(directory / "ray"),
            worker_runtime_env={"env_vars": _environment(job, resources)},
            # Else devices that are never free are asked for again and again, without a word.
            failure_config=FailureConfig(controller_failure_limit=0),
        ),
    )
    try:
        with (
            _environment_variable(START_DEADLINE, str(deadline_s)),
            followed(directory / "trainer" / LOG, on_record),
        ):
            trainer.fit()
    except Exception as error:
        raise _named(job.kind, error) from error
    outcome = json.loads((directory / "trainer" / OUTCOME).read_text())
    saved = (directory / "checkpoints").glob("step-*")
    steps = sorted(int(path.name.partition("-")[2]) for path in saved)
    return Trained(
        metrics=outcome["metrics"],
        history=outcome["history"],
        policies={step: directory / "checkpoints" / f"step-{step}" / "policy" for step in steps},
    )


def keep_checkpoint(job: RankJob, step: int) -> None:
    """Makes that checkpoint the stage's result, and removes the others."""
    directory = Path(job.directory)
    _not_gone_on_with(directory)
    for part in (directory / "checkpoints" / f"step-{step}").iterdir():
        target = directory / part.name
        shutil.rmtree(target, ignore_errors=True)  # left by an interrupted attempt
        part.rename(target)
    shutil.rmtree(directory / "checkpoints")


def remove_checkpoints(directory: Path) -> None:
    """Where none of them is the stage's result."""
    _not_gone_on_with(directory)
    shutil.rmtree(directory / "checkpoints")


def _not_gone_on_with(directory: Path) -> None:
    """An attempt that is killed from here on starts anew: behind its last step a trainer saves no
    policy any more."""
    _marker(directory).unlink(missing_ok=True)


def _marker(directory: Path) -> Path:
    """Names the job that the other files in the directory are of."""
    return directory / "data" / "job.sha256"


def _prepare(job: RankJob, records: Sequence[Mapping[str, Any]]) -> None:
    """The records as a file, because all ranks must find the same data under the same name: what
    TRL makes of it, once, lies beside it. What another job left is removed; an interrupted attempt
    at this one goes on."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    directory = Path(job.directory)
    content = json.dumps([asdict(job), records], sort_keys=True, default=repr)
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    marker = _marker(directory)
    if marker.is_file() and marker.read_text() == fingerprint:
        return
    for part in ("data", "trainer", "checkpoints"):
        shutil.rmtree(directory / part, ignore_errors=True)
    disable_progress_bar()
    Dataset.from_list([dict(record) for record in records]).save_to_disk(str(directory / "data"))
    write_atomically(marker, fingerprint)


def _environment(job: RankJob, resources: LearnerResources) -> dict[str, str]:
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "OMP_NUM_THREADS": str(job.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
        # TRL would tell its makers of every run.
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if resources.gpus == 0:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment | OWN_DEVICES


@contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    """Ray Train reads it when it starts and hands it to its controller."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _named(kind: str, error: Exception) -> StageError:
    """What a rank raised, under its own name; else what Ray Train says."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    causes = {rank: getattr(failure, "_base_exc", failure) for rank, failure in failures.items()}
    for rank, cause in causes.items():
        if isinstance(cause, PosttrainError):
            return StageError(f"{kind}, rank {rank}: {cause}")
    for rank, cause in causes.items():
        # Where it was raised stands in Ray's logs.
        return StageError(f"{kind}, rank {rank}: {type(cause).__name__}: {cause}")
    return StageError(f"{kind} training failed: {error}")
