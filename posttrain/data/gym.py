"""Tasks of a reasoning-gym family, made as they are asked for."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from posttrain.data.prompts import Split, make_prompt, split_of
from posttrain.errors import DataError
from posttrain.progress import say
from posttrain.types import Prompt
from rewards.reasoning_gym import check_reference

SIZE = 20_000
"""Of every data set, however many tasks are asked for, since the entries of acre depend on it. Most
families make entries beyond it; word_ladder takes no larger one."""

MAX_MISSES = 2000
"""So many entries in a row that are known, unusable or of the other split: it is used up."""


ORDERED_BY_HASH = frozenset(
    {
        *("isomorphic_strings", "ransom_note", "polynomial_multiplication"),
        *("knight_swap", "list_functions", "word_ladder"),
    }
)
"""Families that go through a Python set: their entries are other ones in each process, unless its
hashes are fixed. A run that goes on must find the tasks that it began with."""

FIXED_HASHES = {"PYTHONHASHSEED": "0"}

REFUSED = {
    "composite": "is a mixture of others; make each of them a source of its own",
    "codeio": "runs code from the web in this process, which reads the clock and global random "
    "numbers, so that its entries are others in every process and some have no solution; take "
    "another family",
}


class _Unusable(Exception):
    """An entry that cannot be made, written as JSON, or scored."""


def gym_prompts(
    family: str, settings: Mapping[str, Any], split: Split, size: int, seed: int
) -> list[Prompt]:
    """`size` different prompts of a split; the domain is the family's name. Unusable entries are
    left out and counted on stderr: they come from the library, so nobody could mend them.

    Raises:
        DataError: no such family, settings that it does not take, fewer prompts than asked for.
    """
    if family in ORDERED_BY_HASH and not FIXED_HASHES.items() <= os.environ.items():
        entries = _entries_of_another_process(family, settings, split, size, seed)
        return [_prompt(entries, index, family, settings) for index in range(len(entries))]
    return _gym_prompts(family, settings, split, size, seed)


def _entries_of_another_process(*asked: Any) -> list[Any]:
    """Raises DataError as `gym_prompts`."""
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.data.gym"],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **FIXED_HASHES},
    )
    found = json.loads(done.stdout)
    if isinstance(found, str):
        raise DataError(found)
    return list(found)


def _gym_prompts(
    family: str, settings: Mapping[str, Any], split: Split, size: int, seed: int
) -> list[Prompt]:
    entries = _data_set(family, settings, seed)
    prompts: dict[str, Prompt] = {}
    misses = num_unusable = 0
    unusable = ""
    for index in itertools.count():
        misses += 1
        try:
            prompt = _prompt(entries, index, family, settings)
        except _Unusable as error:
            num_unusable += 1
            unusable = f"{num_unusable} of {index + 1} entries cannot be used, the last: {error}"
        else:
            if prompt.prompt_id not in prompts and split_of(prompt.prompt_id) == split:
                prompts[prompt.prompt_id] = prompt
                misses = 0
        if len(prompts) == size:
            break
        if misses == MAX_MISSES:
            raise DataError(
                f"the reasoning-gym family {family!r} with settings {dict(settings)} has only "
                f"{len(prompts)} {split} prompts, {size} were asked for; lower the size or widen "
                f"its settings{unusable and '. '}{unusable}"
            )
    if unusable:
        say(f"the reasoning-gym family {family!r}, left out: {unusable}")
    return list(prompts.values())


def _prompt(entries: Any, index: int, family: str, settings: Mapping[str, Any]) -> Prompt:
    """Raises _Unusable."""
    try:
        # References travel as JSON, to files and to other processes; so they start as JSON.
        entry = json.loads(json.dumps(entries[index]))
    except Exception as error:  # each family has bugs of its own
        raise _Unusable(f"{type(error).__name__}: {error}") from error
    prompt = make_prompt(
        entry["question"],
        reference={"family": family, "settings": dict(settings), "entry": entry},
        domain=family,
        metadata={"verifier": "reasoning_gym"},
    )
    try:
        check_reference(prompt)
    except DataError as error:
        raise _Unusable(str(error)) from error
    return prompt


def _data_set(family: str, settings: Mapping[str, Any], seed: int) -> Any:
    """Entry i depends on the settings, `seed` and i alone."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        raise DataError(
            f"reasoning-gym has no family {family!r}; there are {', '.join(sorted(DATASETS))}"
        )
    if family in REFUSED:
        raise DataError(f"the reasoning-gym family {family!r} {REFUSED[family]}")
    try:
        return reasoning_gym.create_dataset(family, seed=seed, size=SIZE, **settings)
    except Exception as error:  # each family checks its settings in its own way
        raise DataError(
            f"the reasoning-gym family {family!r} does not take the settings {dict(settings)}: "
            f"{error!r}"
        ) from error


def _main() -> None:
    """What `_entries_of_another_process` asks on stdin, as JSON on stdout; a text is an error."""
    try:
        prompts = _gym_prompts(*json.load(sys.stdin))
    except DataError as error:
        found: Any = str(error)
    else:
        found = [prompt.reference["entry"] for prompt in prompts]
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
