"""`posttrain teach` on the command line: its options become settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

FROM_A_RUN = ("policy", "system_instructions", "teacher", "resources")
"""Sections of a run's settings that say how its rows are seen."""


def teach_command(
    source: Annotated[str, typer.Argument(help="JSON lines with question and completion.")],
    teacher: Annotated[str, typer.Option(help="Checkpoint directory or hub name.")],
    out: Annotated[Path, typer.Option(help="The store; the same again goes on.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Other settings.", metavar="KEY.SUB=VALUE")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="The policy that is to learn (default: the teacher).")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A run's settings: policy, instructions, targets.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="The first so many rows only.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Ask a teacher about the rows of SOURCE, once, and store what it says for SFT.

    What is not an option is a setting: teacher.targets.temperature=2, resources.teacher.gpus=1, …
    Give a run `teacher.store=OUT` and its SFT finds everything there.
    """
    from posttrain.config import compose
    from posttrain.stages.teach import TeachSettings, teach

    content = _content(source, teacher, out, policy, config, size)
    report = teach(compose(TeachSettings, content, overrides or [], "posttrain teach"))
    if as_json:
        print(json.dumps(report))
        return
    print(f"store                       {report['store']}")
    for who in ("targets", "critic"):
        found = report[who]
        each = found["bytes_per_label"]
        print(
            f"{who:28}{found['hits']} of {found['sequences']} sequences were stored "
            f"({found['hit_rate']:.0%}), {found['labels']} tokens"
            + ("" if each is None else f", {each:.1f} bytes a token")
            + f"; {found['seconds']:.1f} s, {found['seconds_saved']:.1f} s saved"
        )


def _content(
    source: str,
    teacher: str,
    out: Path,
    policy: str | None,
    config: Path | None,
    size: int | None,
) -> dict[str, Any]:
    """The settings that the options state, over those of a run."""
    from posttrain.config import read_yaml
    from posttrain.inputs import STARTER_TEACHER, STARTER_TEACHER_DIR

    run = {} if config is None else read_yaml(config)
    content: dict[str, Any] = {name: run[name] for name in FROM_A_RUN if name in run}
    pools = content.get("resources", {})
    content["resources"] = {k: pools[k] for k in ("teacher", "deadline_s") if k in pools}
    content["data"] = {"source": source} | ({} if size is None else {"size": size})
    content["teacher"] = content.get("teacher", {}) | {"model": teacher, "store": str(out)}
    # As a policy the teacher that ships goes by its directory.
    itself = str(STARTER_TEACHER_DIR) if teacher == STARTER_TEACHER else teacher
    content.setdefault("policy", {"model": itself})
    if policy is not None:
        content["policy"]["model"] = policy
    return content
