"""`posttrain prune`: take in, judge what is open, select, write. Each step goes on where it was."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.atomic import staged_directory, write_atomically
from posttrain.progress import say
from posttrain.prune.card import dataset_card
from posttrain.prune.critic import CriticModel, OpenCritic
from posttrain.prune.decisions import Decisions, decide
from posttrain.prune.directory import PruneDir, refuse_overlap
from posttrain.prune.encoding import Encoding
from posttrain.prune.figures import examples, figures
from posttrain.prune.identity import claim, identity
from posttrain.prune.intake import check_unchanged, take_in
from posttrain.prune.judging import judge, note_pass, num_open, tasks_to_ask
from posttrain.prune.output import Annotator, row_table, write_rows
from posttrain.prune.reading import make_reader
from posttrain.prune.scoring import check_grades
from posttrain.prune.settings import PruneSettings
from posttrain.prune.source import Source
from posttrain.prune.store import Store, TaskTable
from posttrain.prune.verdicts import write_verdicts

FORMAT = "posttrain prune 1"


def prune(
    settings: PruneSettings,
    out: Path,
    model: CriticModel,
    open_critic: OpenCritic,
    *,
    fresh: bool = False,
    top_up: bool = False,
) -> dict[str, Any]:
    """Judges, selects and writes; returns the manifest with examples.

    The same call again goes on where it was interrupted, or only selects anew: with another
    selection, prompts that were judged for the old one get more answers only with `top_up`; rows
    that are new are judged.

    Raises:
        DataError: the source cannot be read, or nothing in it can be used.
        RunDirError: `out` is not ours, in use, or was judged with something else.
        StageError: judging failed.
    """
    refuse_overlap(settings.source.path, settings.overlap.paths, out)
    with PruneDir(out, fresh=fresh) as directory:
        store = Store(directory.store_path)
        try:
            claim(store, identity(settings, model))
            encoding = Encoding(model.chat, settings)
            source = take_in(store, settings, make_reader(settings, encoding))
            tasks = store.tasks()
            asked = tasks_to_ask(store, tasks, settings, top_up=top_up)
            given_up: dict[int, str] = {}
            if num_open(tasks, settings, asked):
                judging = _judge(store, tasks, open_critic, encoding, settings, asked)
                given_up = asyncio.run(judging)
                tasks = store.tasks()
            note_pass(store, tasks, settings, asked)
            if given_up:
                store.set_aside(given_up, settings.source.path)
                tasks = store.tasks()
            if settings.method == "grade":
                check_grades(store)
            decided = decide(tasks, settings)
            manifest = _write(directory, store, source, tasks, decided, settings)
            return manifest | {
                "out": str(out),
                "examples": examples(store, tasks, decided),
                "advice": _advice(manifest, settings),
            }
        finally:
            store.close()


async def _judge(
    store: Store,
    tasks: TaskTable,
    open_critic: OpenCritic,
    encoding: Encoding,
    settings: PruneSettings,
    asked: NDArray[np.bool_],
) -> dict[int, str]:
    async with open_critic() as critic:
        return await judge(store, tasks, critic, encoding, settings, asked)


def _write(
    directory: PruneDir,
    store: Store,
    source: Source,
    tasks: TaskTable,
    decided: Decisions,
    settings: PruneSettings,
) -> dict[str, Any]:
    """Everything that others read; the manifest, gone meanwhile, comes last."""
    directory.manifest_path.unlink(missing_ok=True)
    rows = row_table(store, tasks)
    say(f"prune: writing to {directory.path}")
    with staged_directory(directory.data_path) as staged:
        annotator = Annotator(store, tasks, rows, decided, settings)
        try:
            write_rows(staged, source, rows, annotator, decided.kept, form=settings.format)
        finally:  # whatever rows that are not those that were judged made of it
            check_unchanged(source, settings)
        write_verdicts(staged / "verdicts", store, tasks, decided, settings)
    lines = (json.dumps(details, ensure_ascii=False) for _, _, details in store.quarantined())
    write_atomically(directory.quarantine_path, (f"{line}\n" for line in lines))
    requests, tokens = store.usage()
    manifest = {
        "format": FORMAT,
        "metric": settings.selection.metric_name,
        "source": {
            "path": settings.source.path,
            "stem": source.stem,
            "fingerprint": source.fingerprint,
            "columns": list(source.columns),
        },
        "judged_with": store.meta("judged_with"),
        "settings": settings.model_dump(mode="json"),
        "cuts": _cuts(tasks, decided, settings),
        "usage": {"requests": requests, "completion_tokens": tokens},
        "figures": figures(store, tasks, rows, decided, settings),
    }
    write_atomically(directory.card_path, dataset_card(manifest))
    write_atomically(directory.manifest_path, json.dumps(manifest, indent=2) + "\n")
    return manifest


def _cuts(tasks: TaskTable, decided: Decisions, settings: PruneSettings) -> dict[str, float | None]:
    """In terms of the metric, by domain if each has its own."""
    sign = 1 if settings.selection.is_rate else -1
    names = tasks.domains if settings.selection.by_domain else ["all"]
    return {
        name: None if cut is None else sign * cut
        for name, cut in zip(names, decided.cuts, strict=True)
    }


def _advice(manifest: dict[str, Any], settings: PruneSettings) -> list[str]:
    """What the numbers ask for."""
    found = manifest["figures"]["undecided"]
    advice = []
    if not manifest["figures"]["rows"]["kept"]:
        advice.append("nothing is kept; move the cut, or give the critic harder prompts")
    short = found["prompts"] - found["at_cap_prompts"]
    if short:
        advice.append(
            f"{found['rows']:,} rows are undecided under this selection at confidence"
            f" {settings.judge.labels.confidence:g}; --top-up asks for more answers to {short:,} of"
            f" their {found['prompts']:,} prompts"
        )
    elif found["prompts"]:
        advice.append(
            f"{found['rows']:,} rows lie too near the cut to be sure after"
            f" {settings.judge.max_samples} answers; a larger --max-samples would tell more apart"
        )
    return advice
