"""prompts.parquet: what the prompts of a run are, so that an id can be read by a person."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from posttrain.atomic import PARTIAL
from posttrain.types import Prompt, SFTRow


def write_prompts(
    path: Path, *, train: Iterable[Prompt], held_out: Iterable[Prompt], sft_rows: Iterable[SFTRow]
) -> None:
    """A row is one prompt: `prompt_id`, `domain`, `text` (the turns, each as `role: content`, on
    lines of their own), `reference` (JSON), and whether it is among those `in_train`,
    `in_held_out` and `in_sft`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sets = {
        "in_train": list(train),
        "in_held_out": list(held_out),
        "in_sft": [row.prompt for row in sft_rows],
    }
    members = {name: {p.prompt_id for p in prompts} for name, prompts in sets.items()}
    every = {p.prompt_id: p for prompts in sets.values() for p in prompts}
    rows = [
        {
            "prompt_id": prompt_id,
            "domain": prompt.domain,
            "text": "\n".join(f"{m.role}: {m.content}" for m in prompt.messages),
            "reference": json.dumps(prompt.reference, default=str),
            **{name: prompt_id in ids for name, ids in members.items()},
        }
        for prompt_id, prompt in every.items()
    ]
    partial = path.with_name(f".{path.name}{PARTIAL}")
    pq.write_table(pa.Table.from_pylist(rows), partial)
    partial.rename(path)
