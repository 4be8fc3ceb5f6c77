"""What a pruning pass would cost, from a probe: nothing is written where it would be."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.prune.critic import CriticModel, OpenCritic
from posttrain.prune.directory import STORE_NAME, PruneDir, refuse_overlap
from posttrain.prune.encoding import Encoding
from posttrain.prune.identity import claim, identity
from posttrain.prune.intake import take_in
from posttrain.prune.judging import judge, num_open, open_tasks, tasks_to_ask
from posttrain.prune.reading import make_reader
from posttrain.prune.settings import PruneSettings
from posttrain.prune.store import Store, TaskTable

PROBE_PROMPTS = 64


def estimate(
    settings: PruneSettings,
    out: Path,
    model: CriticModel,
    open_critic: OpenCritic,
    *,
    fresh: bool = False,
    top_up: bool = False,
) -> dict[str, Any]:
    """Prompts that `prune` would judge, and about how many answers, tokens and seconds they take.

    A random part of them is judged by the same rule in a copy of the store that is thrown away. The
    seconds leave out the engine's start, and are rather too many: a few prompts do not keep an
    engine as busy as all of them. Where the open prompts are too few to stand for themselves,
    answers are those that they take at most, and tokens and seconds None. Raises as `prune` does.
    """
    refuse_overlap(settings.source.path, settings.overlap.paths, out)
    with tempfile.TemporaryDirectory(prefix="posttrain-prune-") as scratch:
        path = Path(scratch) / STORE_NAME
        if (out / STORE_NAME).exists() and not fresh:
            with PruneDir(out, fresh=False) as directory:
                original = Store(directory.store_path)
                original.copy_to(path)
                original.close()
        store = Store(path)
        try:
            claim(store, identity(settings, model))
            encoding = Encoding(model.chat, settings)
            take_in(store, settings, make_reader(settings, encoding))
            tasks = store.tasks()
            asked = tasks_to_ask(store, tasks, settings, top_up=top_up)
            left = num_open(tasks, settings, asked)
            result = {
                "rows": int(tasks.num_rows.sum()),
                "quarantined": store.counts()[1],
                "prompts": len(tasks),
                "prompts_to_judge": left,
            }
            return result | _probe(store, tasks, asked, open_critic, encoding, settings)
        finally:
            store.close()


def _probe(
    store: Store,
    tasks: TaskTable,
    asked: NDArray[np.bool_],
    open_critic: OpenCritic,
    encoding: Encoding,
    settings: PruneSettings,
) -> dict[str, Any]:
    left = num_open(tasks, settings, asked)
    if not left:
        return {"answers": 0, "prompt_tokens": 0, "completion_tokens": 0, "seconds": 0.0}
    chosen = _sample(tasks, settings, asked)
    probe = tasks.take(chosen)
    probed = num_open(probe, settings, asked[chosen])
    if not probed:  # the cut that leaves them open is made among all
        scored = tasks.scored[open_tasks(tasks, settings) & asked]
        most = int((settings.judge.max_samples - scored).sum())
        return {"answers": most, "prompt_tokens": None, "completion_tokens": None, "seconds": None}
    before = store.usage()
    seconds = asyncio.run(_timed(store, probe, open_critic, encoding, settings, asked[chosen]))
    requests, tokens = (now - then for now, then in zip(store.usage(), before, strict=True))
    answers = int((store.tasks().take(chosen).asked - probe.asked).sum())
    lengths = [encoding.length(store.task(key)) for key in probe.key.tolist()]
    scale = left / probed
    return {
        "answers": round(answers * scale),
        "prompt_tokens": round(requests * fmean(lengths) * scale),
        "completion_tokens": round(tokens * scale),
        "seconds": round(seconds * scale, 1),
        "probed_prompts": len(chosen),
    }


def _sample(
    tasks: TaskTable, settings: PruneSettings, asked: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Random tasks, decided ones too: the cut is made among all of them. If none of these is open,
    open ones."""
    rng = np.random.default_rng(settings.seed)
    size = max(PROBE_PROMPTS, settings.judge.concurrency)

    def some(among: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.sort(rng.choice(among, min(size, len(among)), replace=False))

    chosen = some(np.arange(len(tasks)))
    if num_open(tasks.take(chosen), settings, asked[chosen]):
        return chosen
    return some(np.flatnonzero(open_tasks(tasks, settings) & asked))


async def _timed(
    store: Store,
    probe: TaskTable,
    open_critic: OpenCritic,
    encoding: Encoding,
    settings: PruneSettings,
    asked: NDArray[np.bool_],
) -> float:
    async with open_critic() as critic:
        began = time.perf_counter()
        await judge(store, probe, critic, encoding, settings, asked)
        return time.perf_counter() - began
