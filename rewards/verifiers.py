"""The verifiers by name, which one scores a prompt, and the check of references at load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from posttrain.errors import DataError
from posttrain.types import Prompt
from rewards import code, exact, expression, maths, reasoning_gym
from rewards.score import Verifier
from rewards.shaping import RewardSettings

VERIFIERS: dict[str, Verifier] = {
    "code": code.score,
    "exact": exact.score,
    "expression": expression.score,
    "maths": maths.score,
    "reasoning_gym": reasoning_gym.score,
}

REFERENCE_CHECKS: dict[str, Callable[[Prompt], None]] = {
    "code": code.check_reference,
    "exact": exact.check_reference,
    "expression": expression.check_reference,
    "maths": maths.check_reference,
    "reasoning_gym": reasoning_gym.check_reference,
}
"""Each raises DataError for a reference that its verifier cannot use."""


def verifier_name(prompt: Prompt, settings: RewardSettings) -> str:
    """The settings' choice for the domain, else the source's, else the default."""
    from_source: str = prompt.metadata.get("verifier", settings.default_verifier)
    return settings.verifiers.get(prompt.domain, from_source)


def verifier_of(
    prompt: Prompt, settings: RewardSettings, verifiers: Mapping[str, Verifier] = VERIFIERS
) -> Verifier:
    """With the settings that it reads, if any. Raises DataError for a name that is not among
    `verifiers`."""
    name = verifier_name(prompt, settings)
    if name not in verifiers:
        raise DataError(
            f"prompt {prompt.prompt_id} of domain {prompt.domain!r} asks for the verifier "
            f"{name!r}; there are {', '.join(sorted(verifiers))}"
        )
    verifier = verifiers[name]
    return partial(code.score, settings=settings.code) if verifier is code.score else verifier


def check_reference(
    prompt: Prompt, settings: RewardSettings, verifiers: Mapping[str, Verifier] = VERIFIERS
) -> None:
    """Raises DataError, naming the prompt, if its answers cannot be scored."""
    verifier_of(prompt, settings, verifiers)
    check = REFERENCE_CHECKS.get(verifier_name(prompt, settings))
    if check is None:
        return
    if check is code.check_reference:
        check = partial(code.check_reference, settings=settings.code)
    try:
        check(prompt)
    except DataError as error:
        raise DataError(
            f"prompt {prompt.prompt_id} of domain {prompt.domain!r}: {error}"
        ) from error


def check_references(
    prompts: Iterable[Prompt],
    settings: RewardSettings,
    verifiers: Mapping[str, Verifier] = VERIFIERS,
) -> None:
    """Checks every prompt; raises one DataError that counts the bad ones and shows the first, and
    SandboxError where programs are to be run and cannot be."""
    problems = []
    prompts = list(prompts)
    for prompt in prompts:
        try:
            check_reference(prompt, settings, verifiers)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(
            f"{len(problems)} prompts have references that cannot be used:\n  "
            + "\n  ".join(problems[:3])
        )
    if any(verifier_name(prompt, settings) == "code" for prompt in prompts):
        code.require_sandbox(settings.code)
