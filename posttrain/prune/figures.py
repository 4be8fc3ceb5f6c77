"""What a pruning pass came to, in numbers: for the manifest, the dataset card and the terminal."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from judges.passrates import pass_rate, pass_rates
from posttrain.prune.decisions import LABELS, Decisions
from posttrain.prune.output import HELD_OUT, RowTable
from posttrain.prune.settings import PruneSettings
from posttrain.prune.store import Store, TaskTable

BINS = 10
EXAMPLES = 2
EXAMPLE_CHARACTERS = 160


def figures(
    store: Store, tasks: TaskTable, rows: RowTable, decided: Decisions, settings: PruneSettings
) -> dict[str, Any]:
    """Plain values. Shares are of the rows that were judged; `None` where there are none."""
    weight = tasks.num_rows
    kept_rows = int(weight[decided.kept].sum())
    taken, quarantined = store.counts()
    result = {
        "rows": {
            "read": taken,
            "judged": int(weight.sum()),
            "kept": kept_rows,
            "dropped": int(weight.sum()) - kept_rows,
            "held_out": int((rows.task == HELD_OUT).sum()),
            "quarantined": quarantined,
        },
        "prompts": {
            "judged": len(tasks),
            "kept": int(decided.kept.sum()),
            "dropped": int((~decided.kept).sum()),
        },
        "undecided": {
            "rows": int(weight[decided.undecided].sum()),
            "prompts": int(decided.undecided.sum()),
            "at_cap_prompts": int(decided.at_cap.sum()),
        },
        "quarantine": dict(
            Counter(_kind(details["reason"]) for _, _, details in store.quarantined()).most_common()
        ),
        "overlaps": dict(Counter(other for _, other, _, _ in store.overlaps())),
        "histogram": _histogram(decided, weight, rates=settings.selection.is_rate),
        "domains": _domains(tasks, decided),
        "answers": int(tasks.asked.sum()),
    }
    if settings.method == "critic":
        result |= _rates(tasks, decided, settings)
    return result


def _kind(reason: str) -> str:
    """Reasons alike but for their numbers and names count together."""
    return reason.partition(":")[0].partition("(")[0].strip()


def _histogram(
    decided: Decisions, weight: NDArray[np.int32], *, rates: bool
) -> list[dict[str, Any]]:
    """Rows by the metric, from its lowest to its highest; rates always from 0 to 1."""
    finite = decided.value[np.isfinite(decided.value)]
    low, high = (0.0, 1.0) if rates else (float(finite.min()), float(finite.max()))
    value = np.minimum(decided.value, high)  # an infinite IFD stands with the highest
    kept, edges = np.histogram(value, BINS, (low, high), weights=weight * decided.kept)
    both, _ = np.histogram(value, BINS, (low, high), weights=weight)
    return [
        {
            "from": round(float(edges[i]), 6),
            "to": round(float(edges[i + 1]), 6),
            "kept": int(kept[i]),
            "dropped": int(both[i] - kept[i]),
        }
        for i in range(BINS)
    ]


def _domains(tasks: TaskTable, decided: Decisions) -> dict[str, dict[str, Any]]:
    result = {}
    for code, name in sorted(enumerate(tasks.domains), key=lambda item: item[1]):
        mine = tasks.domain == code
        weight = tasks.num_rows[mine]
        kept = int(weight[decided.kept[mine]].sum())
        result[name] = {
            "rows": int(weight.sum()),
            "kept": kept,
            "dropped_share": 1 - kept / int(weight.sum()),
            "mean": float(np.average(decided.value[mine], weights=weight)),
            "unsolved_share_of_kept": _unsolved_share(tasks, decided.kept & mine),
        }
    return result


def _unsolved_share(tasks: TaskTable, chosen: NDArray[np.bool_]) -> float | None:
    """Of rows: those whose prompt was answered and never right."""
    total = int(tasks.num_rows[chosen].sum())
    unsolved = chosen & (tasks.scored > 0) & (tasks.correct == 0)
    return int(tasks.num_rows[unsolved].sum()) / total if total else None


def _rates(tasks: TaskTable, decided: Decisions, settings: PruneSettings) -> dict[str, Any]:
    """pass@1, and pass@k where that is the metric, with 95% intervals over prompts."""
    n, c, kept = tasks.scored, tasks.correct, decided.kept
    equally_many = not settings.judge.adaptive and bool((n == n[0]).all())
    rates = {}
    for k in sorted({1, settings.selection.k or 1}):
        fixed = equally_many and k <= n[0]  # answers that could not be scored may be lacking
        estimates = {"all": asdict(pass_rate(n, c, k, fixed_n=fixed))}
        if kept.any():
            estimates["kept"] = asdict(pass_rate(n[kept], c[kept], k, fixed_n=fixed))
        by_domain = pass_rates(n, c, tasks.domain, tasks.domains, k, fixed_n=fixed)
        estimates["domains"] = {name: asdict(rate) for name, rate in sorted(by_domain.items())}
        rates[f"pass@{k}"] = estimates
    labels = {
        label: {
            "kept": int(tasks.num_rows[kept & (decided.label == code)].sum()),
            "dropped": int(tasks.num_rows[~kept & (decided.label == code)].sum()),
        }
        for code, label in enumerate(LABELS)
    }
    return {
        "pass_rates": rates,
        "labels": labels,
        "unsolved_share_of_kept": _unsolved_share(tasks, kept),
    }


def examples(store: Store, tasks: TaskTable, decided: Decisions) -> list[dict[str, Any]]:
    """Some prompts of each label (of a judge that looks once: the lowest and the highest)."""
    if (decided.label < 0).all():
        order = np.argsort(decided.value, kind="stable")
        buckets = {"lowest": order[:EXAMPLES], "highest": order[-EXAMPLES:]}
    else:
        buckets = {
            str(label): np.flatnonzero(decided.label == code)[:EXAMPLES]
            for code, label in enumerate(LABELS)
        }
    return [
        {
            "bucket": name,
            "prompt": _shortened(store.task(int(tasks.key[index])).prompt.messages[-1].content),
            "value": float(decided.value[index]),
            "correct": int(tasks.correct[index]),
            "samples": int(tasks.scored[index]),
            "kept": bool(decided.kept[index]),
        }
        for name, indices in buckets.items()
        for index in indices
    ]


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXAMPLE_CHARACTERS else f"{line[: EXAMPLE_CHARACTERS - 1]}…"
