"""Preference pairs on disk: what DPO was trained on, and what each pair mends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from posttrain.atomic import write_atomically
from posttrain.data.pair_sets import pair_record
from posttrain.types import PreferencePair


def write_pairs(path: Path, pairs: Sequence[PreferencePair]) -> None:
    """One JSON line a pair (`posttrain.data.pair_sets.pair_record`): for inspection, and to be
    given as `dpo.data` again."""
    lines = (json.dumps(pair_record(pair), ensure_ascii=False) for pair in pairs)
    write_atomically(path, "".join(f"{line}\n" for line in lines))
