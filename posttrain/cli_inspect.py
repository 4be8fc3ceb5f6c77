"""`posttrain inspect`: what happened in a run, and two runs compared."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.errors import RunDirError

if TYPE_CHECKING:
    from posttrain.inspect import Run


def inspect_command(
    run: Annotated[Path, typer.Argument(help="Directory of a run, also of one under way.")],
    other: Annotated[
        Path | None, typer.Argument(help="A run to compare it with: OTHER minus RUN.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the report there, as one file that opens offline.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")
    ] = False,
) -> None:
    """Show what happened in RUN: accuracy, difficulty, pruning, staleness, who waited for whom.

    What cannot be read of a damaged or unfinished run is named, the rest is shown.
    """
    from posttrain.inspect import load_runs
    from posttrain.inspect.compare import compare, last_common_stage
    from posttrain.inspect.run import distinct_names
    from posttrain.prune.history import is_prune_dir

    paths = [run] if other is None else [run, other]
    for path in paths:
        if is_prune_dir(path):
            raise RunDirError(
                f"{path} was made by `posttrain prune` and is no run: its README.md says what was"
                " kept, `posttrain audit` with --prompt why"
            )
    runs = load_runs(paths, on_error="collect")
    if html is not None:
        from posttrain.inspect.page import write_report

        write_report(runs[-1], html)
    differences = compare(runs[0], runs[1]) if other is not None else []
    if as_json:
        found: dict[str, Any] = {"runs": [_as_dict(found) for found in runs]}
        if other is not None:
            found["differences"] = [asdict(d) for d in differences]
        print(json.dumps(found))
        return
    from posttrain.console import stdout_console
    from posttrain.inspect.terminal import print_differences, print_run

    console = stdout_console()
    for loaded in runs:
        print_run(loaded, console)
    if other is not None:
        stage = last_common_stage(runs[0], runs[1])
        print_differences(distinct_names(runs), stage, differences, console)
    if html is not None:
        console.print(f"report: {html}", highlight=False, markup=False)


def _as_dict(run: Run) -> dict[str, Any]:
    from posttrain.inspect.findings import findings

    return {
        "name": run.name,
        "path": str(run.path),
        "stages": run.stages.drop("metrics").to_dicts(),
        "findings": [asdict(finding) for finding in findings(run)],
        "accuracy": run.accuracy.to_dicts(),
        "draws": dict(run.draws.group_by("outcome").len().rows()),
        "prompts": dict(run.prompts.drop_nulls("fate").group_by("fate").len().rows()),
        "problems": [
            {"source": str(problem.source), "message": problem.message} for problem in run.problems
        ],
    }
