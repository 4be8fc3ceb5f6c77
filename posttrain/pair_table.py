"""Preference pairs on disk: what DPO was trained on, and what each pair mends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from posttrain.atomic import write_atomically
from posttrain.types import PreferencePair


def write_pairs(path: Path, pairs: Sequence[PreferencePair]) -> None:
    """One JSON line a pair: `prompt` (its turns), `chosen`, `rejected`, `corner_case`, `margin`,
    and `system` where the pair has a system instruction."""
    lines = [
        {
            "prompt": [message.as_dict() for message in pair.prompt.messages],
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "corner_case": pair.corner_case,
            "margin": pair.margin,
        }
        | ({} if pair.system is None else {"system": pair.system})
        for pair in pairs
    ]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
