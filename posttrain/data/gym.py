"""Tasks of a reasoning-gym family, made as they are asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from posttrain.data.prompts import Split, make_prompt, split_of
from posttrain.errors import DataError
from posttrain.types import Prompt

MAX_MISSES = 2000
"""So many entries in a row that are known or of the other split: the family is used up."""


def gym_prompts(
    family: str, settings: Mapping[str, Any], split: Split, size: int, seed: int
) -> list[Prompt]:
    """`size` different prompts of a split; the domain is the family's name.

    Raises:
        DataError: no such family, settings that it does not take, fewer prompts than asked for.
    """
    entries = _data_set(family, settings, seed)
    prompts: dict[str, Prompt] = {}
    index = misses = 0
    while len(prompts) < size:
        # References travel as JSON, to files and to other processes; so they start as JSON.
        entry = json.loads(json.dumps(entries[index]))
        index += 1
        prompt = make_prompt(
            entry["question"],
            reference={"family": family, "settings": dict(settings), "entry": entry},
            domain=family,
            metadata={"verifier": "reasoning_gym"},
        )
        if prompt.prompt_id not in prompts and split_of(prompt.prompt_id) == split:
            prompts[prompt.prompt_id] = prompt
            misses = 0
            continue
        misses += 1
        if misses == MAX_MISSES:
            raise DataError(
                f"the reasoning-gym family {family!r} with settings {dict(settings)} has only "
                f"{len(prompts)} {split} prompts, {size} were asked for; lower the size or widen "
                "its settings"
            )
    return list(prompts.values())


def _data_set(family: str, settings: Mapping[str, Any], seed: int) -> Any:
    """Entry i depends on seed + i alone, so it may be asked for beyond the data set's size."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        raise DataError(
            f"reasoning-gym has no family {family!r}; there are {', '.join(sorted(DATASETS))}"
        )
    try:
        return reasoning_gym.create_dataset(family, seed=seed, size=1, **settings)
    except Exception as error:  # each family checks its settings in its own way
        raise DataError(
            f"the reasoning-gym family {family!r} does not take the settings {dict(settings)}: "
            f"{error!r}"
        ) from error
