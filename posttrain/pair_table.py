"""Preference pairs on disk: what TRL trains on, and why each pair is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.types import PreferencePair

PAIRS_NAME = "pairs.jsonl"


def write_pairs(
    directory: Path, pairs: Sequence[PreferencePair], records: Sequence[Mapping[str, Any]]
) -> None:
    """One line a pair into `directory`/pairs.jsonl: `prompt_id`, `domain`, `system` (null for
    none), `corner_case`, `margin`, and the keys of its record (`prompt`, `chosen`, `rejected`)."""
    with (directory / PAIRS_NAME).open("w", encoding="utf-8") as file:
        for pair, record in zip(pairs, records, strict=True):
            about = {
                "prompt_id": pair.prompt.prompt_id,
                "domain": pair.prompt.domain,
                "system": pair.system,
                "corner_case": pair.corner_case,
                "margin": pair.margin,
            }
            file.write(json.dumps(about | dict(record)) + "\n")
