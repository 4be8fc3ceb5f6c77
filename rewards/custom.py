"""A reward of one's own: one Python function, named in the settings as `module:function`.

    def concise(prompt: Prompt, text: str) -> float:    # `text` is the whole completion
        return 1.0 if len(text) < 400 else 0.0

It returns a number in [0, 1], of which 1 is correct and anything below is wrong, or a
`rewards.score.Score`. It runs in scorer processes under its verifier's deadline, so it may hang or
die without harm; what it raises, and a number out of range, leave the answer unscored. What it
needs is imported at the top of its module: an import within the function would count in the time
of an answer, and again in each process that takes the place of one that was killed.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from posttrain.errors import SettingsError
from posttrain.types import Outcome, Prompt
from rewards.score import Score, Verifier, right


@lru_cache(maxsize=64)
def load(name: str, path: str) -> Verifier:
    """The verifier `name` at `path`. Raises SettingsError if it cannot be imported or cannot be
    called with a prompt and a text."""
    place = f"rewards.custom.{name} = {path}"
    module_name, separator, function_name = path.partition(":")
    if not separator or not module_name or not function_name:
        raise SettingsError(f"{place}: write it as module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise whatever it likes
        raise SettingsError(
            f"{place}: {module_name} cannot be imported ({type(error).__name__}: {error}); put its "
            "directory on PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise SettingsError(f"{place}: {module_name} has no function {function_name!r}")
    if inspect.iscoroutinefunction(function):
        raise SettingsError(f"{place}: it must be a plain function, not an async one")
    try:
        inspect.signature(function).bind("prompt", "text")
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{place}: it is called with (prompt, text); {error}") from error
    return partial(_score, function)


def source_hash(name: str, path: str) -> str:
    """Of the module's file (16 hex digits): what else that imports does not count. Raises as `load`
    does, and for what is a part of Python itself."""
    load(name, path)
    module = path.partition(":")[0]
    file = getattr(sys.modules[module], "__file__", None)
    if file is None:
        raise SettingsError(
            f"rewards.custom.{name} = {path}: {module} has no file; name a function in one"
        )
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _score(function: Any, prompt: Prompt, text: str) -> Score:
    found = function(prompt, text)
    if isinstance(found, Score):
        return found
    if not isinstance(found, int | float) or not 0 <= found <= 1:
        raise ValueError(f"a number in [0, 1] or a Score was expected, got {found!r}")
    if found == 1:
        return right()
    return Score(correctness=float(found), outcome=Outcome.WRONG)
