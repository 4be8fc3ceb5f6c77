"""A run as tidy frames, from its files alone, also while it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import polars as pl

from posttrain.errors import DataError, RunDirError
from posttrain.inspect.columns import DRAWS, EVALS, FRAMES, PAIRS, PROMPTS, VERDICTS
from posttrain.inspect.fates import add_fates
from posttrain.inspect.file_frames import (
    PROMPT_SCHEMA,
    answer_files,
    check_answers,
    read_evaluation,
    read_pairs,
    read_prompts,
    scan_answers,
)
from posttrain.inspect.ledger_frames import read_ledger
from posttrain.inspect.metric_frames import (
    accuracy_frame,
    rescreens_frame,
    stages_frame,
    steps_frame,
)
from posttrain.inspect.problems import OnError, Problem, Problems
from posttrain.metrics import read_metrics, surviving
from posttrain.run_dir import RunDir, StageRecord, still_asked_for
from posttrain.stage_order import START


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of a run. Each frame's columns: `posttrain.inspect.describe("draws")`.

    `answers` is lazy, because it is large: filter, then `.collect()`. `settings` are the resolved
    ones, empty if config.yaml could not be read. `problems` lists what was left out, with
    `on_error="collect"`.
    """

    name: str
    path: Path
    settings: Mapping[str, Any]
    stages: pl.DataFrame
    prompts: pl.DataFrame
    verdicts: pl.DataFrame
    draws: pl.DataFrame
    steps: pl.DataFrame
    rescreens: pl.DataFrame
    evals: pl.DataFrame
    accuracy: pl.DataFrame
    pairs: pl.DataFrame
    answers: pl.LazyFrame = field(repr=False)
    problems: tuple[Problem, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Nothing was recorded yet."""
        return self.stages.is_empty() and self.verdicts.is_empty() and self.draws.is_empty()

    def to_pandas(self) -> dict[str, Any]:
        """Every frame but `answers`, by name, as pandas DataFrames; pandas must be installed."""
        frames = {name: getattr(self, name) for name in FRAMES if name != "answers"}
        return {name: frame.to_pandas() for name, frame in frames.items()}

    def _repr_html_(self) -> str:
        from posttrain.inspect.page import run_summary

        return run_summary(self)


def load_run(path: str | Path, *, on_error: OnError = "raise") -> Run:
    """Everything that a run directory holds.

    A run under way is read as it is now: the ledger in one moment of it, metrics up to the last
    whole line. What a resumed run did again or went back behind is left out, and of stages,
    evaluations and accuracy those of a stage that its settings no longer name, or that comes behind
    one that is not done: they are of before a change.

    Args:
        on_error: `raise` stops at the first file or line that cannot be read; `collect` leaves it
            out and lists it in `problems`.

    Raises:
        RunDirError: there is no run at `path`, or it is of another version.
        DataError: a file of it is damaged.
    """
    path = Path(path)
    _check_is_run(path)
    run_dir = RunDir(path)
    problems = Problems(on_error)
    config: dict[str, Any] = problems.reading(run_dir.config_path, run_dir.config, {})
    settings = config.get("settings") or {}
    none: dict[str, StageRecord] = {}
    begun = problems.reading(run_dir.manifest_path, lambda: _manifest(run_dir), none)
    stages = _as_they_stand(begun, settings)
    records = surviving(_metrics(run_dir.metrics_path, problems))
    draws, verdicts = problems.reading(
        run_dir.ledger_path,
        lambda: read_ledger(run_dir.ledger_path),
        (DRAWS.empty(), VERDICTS.empty()),
    )
    steps = steps_frame(records)
    evals = _evals(run_dir.evals_dir, stages if begun else None, problems)
    known = problems.reading(
        run_dir.prompts_path,
        lambda: read_prompts(run_dir.prompts_path),
        pl.DataFrame(schema=PROMPT_SCHEMA),
    )
    prompts = _prompts(known, verdicts, draws, evals)
    return Run(
        name=path.resolve().name,
        path=path,
        settings=settings,
        stages=stages_frame(stages, steps),
        prompts=prompts,
        verdicts=_with_domains(verdicts, prompts),
        draws=draws,
        steps=steps,
        rescreens=rescreens_frame(records),
        evals=evals,
        accuracy=accuracy_frame(records, stages, steps),
        pairs=_with_domains(
            problems.reading(
                run_dir.pairs_path, lambda: read_pairs(run_dir.pairs_path), PAIRS.empty()
            ),
            prompts,
        ),
        answers=_answers(run_dir.rollouts_dir, problems),
        problems=tuple(problems.found),
    )


def load_runs(paths: Sequence[str | Path], *, on_error: OnError = "raise") -> list[Run]:
    """Runs to be seen side by side: `stacked` and the charts of several runs take them."""
    return [load_run(path, on_error=on_error) for path in paths]


def stacked(runs: Sequence[Run], frame: str) -> pl.DataFrame:
    """One frame of several runs below one another, with a first column `run`.

    >>> stacked([], "draws").columns[:2]
    ['run', 'draw_id']
    """
    found: list[pl.DataFrame] = [getattr(run, frame).lazy().collect() for run in runs]
    frames = [FRAMES[frame].empty(), *found]
    names = ["", *distinct_names(runs)]
    return pl.concat(
        [
            part.select(pl.lit(name).alias("run"), pl.all())
            for name, part in zip(names, frames, strict=True)
        ],
        how="diagonal",
    )


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names; their paths where two have the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _check_is_run(path: Path) -> None:
    if not path.is_dir():
        what = "is a file" if path.exists() else "is not there"
        raise RunDirError(f"{path} {what}: give the directory of a run")
    run_dir = RunDir(path)
    parts = (run_dir.config_path, run_dir.manifest_path, run_dir.metrics_path, run_dir.ledger_path)
    if not any(part.exists() for part in parts):
        raise RunDirError(
            f"{path} is no run: it holds none of {', '.join(part.name for part in parts)}"
        )


def _manifest(run_dir: RunDir) -> dict[str, StageRecord]:
    try:
        return run_dir.stages()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{run_dir.manifest_path} was not written by this version of posttrain, or is damaged:"
            f" {error!r}"
        ) from error


def _as_they_stand(
    begun: Mapping[str, StageRecord], settings: Mapping[str, Any]
) -> dict[str, StageRecord]:
    """Those that the settings name, up to the first that is not done and measured: what is
    recorded of later ones rests on a policy that is being replaced."""
    named, asked = still_asked_for(begun, settings), settings.get("stages")
    order = [START, *map(str, asked)] if isinstance(asked, list) else list(named)
    finished = {
        name
        for name, record in named.items()
        if record.state == "done" and (name == "screen" or "evaluation" in record.metrics)
    }
    upto = len(list(takewhile(finished.__contains__, order))) + 1
    return {name: named[name] for name in order[:upto] if name in named}


def _metrics(path: Path, problems: Problems) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return read_metrics(path, on_bad_line=lambda error: problems.note(path, error))


def _evals(
    directory: Path, stages: Mapping[str, StageRecord] | None, problems: Problems
) -> pl.DataFrame:
    """After those of `stages` that were measured; None if nothing says which of the files count."""
    files = sorted(directory.glob("*.json"))
    if stages is not None:
        measured = [name for name, record in stages.items() if "evaluation" in record.metrics]
        files = [file for name in measured for file in files if file.stem == name]
    frames = [problems.reading(f, lambda f=f: read_evaluation(f), EVALS.empty()) for f in files]  # type: ignore[misc]
    return pl.concat([EVALS.empty(), *frames])


def _answers(directory: Path, problems: Problems) -> pl.LazyFrame:
    files = [
        problems.reading(file, lambda file=file: check_answers(file), None)  # type: ignore[misc]
        for file in answer_files(directory)
    ]
    return scan_answers([file for file in files if file is not None])


def _prompts(
    known: pl.DataFrame, verdicts: pl.DataFrame, draws: pl.DataFrame, evals: pl.DataFrame
) -> pl.DataFrame:
    """Prompts of the table, then those of which only the ledger or an evaluation knows."""
    held_out = evals.select("prompt_id", "domain", pl.lit(value=True).alias("in_held_out"))
    seen = pl.concat(
        [known, draws.select("prompt_id", "domain"), held_out, verdicts.select("prompt_id")],
        how="diagonal",
    ).unique("prompt_id", keep="first", maintain_order=True)
    judged = verdicts.group_by("prompt_id").agg(
        pl.col("pass_rate").filter(pl.col("step").is_null()).last().alias("screened_rate"),
        pl.col("label").last(),
    )
    joined = seen.join(judged, on="prompt_id", how="left", maintain_order="left")
    return add_fates(joined, draws, verdicts).select(PROMPTS.names)


def _with_domains(frame: pl.DataFrame, prompts: pl.DataFrame) -> pl.DataFrame:
    domains = prompts.select("prompt_id", "domain")
    return (
        frame.drop("domain")
        .join(domains, on="prompt_id", how="left", maintain_order="left")
        .select(frame.columns)
    )
