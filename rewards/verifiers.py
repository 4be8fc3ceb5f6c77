"""The verifiers by name, which of them score a prompt, and the check of references at load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from posttrain.errors import DataError, SettingsError
from posttrain.types import Prompt
from rewards import code, custom, exact, expression, judged, maths, reasoning_gym, reward_model
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
    """The settings' choice for the domain, else the source's, else the default: the verifier that
    decides about correctness and outcome."""
    from_source: str = prompt.metadata.get("verifier", settings.default_verifier)
    return settings.verifiers.get(prompt.domain, from_source)


def verifier_names(prompt: Prompt, settings: RewardSettings) -> tuple[str, ...]:
    """All that score the prompt, the deciding one first."""
    return (verifier_name(prompt, settings), *settings.added.get(prompt.domain, ()))


def remote_names(settings: RewardSettings) -> set[str]:
    """Verifiers that are asked about a whole group, outside of the scorer processes."""
    remote = {judged.NAME: settings.judge, reward_model.NAME: settings.reward_model}
    return {name for name, configured in remote.items() if configured is not None}


def known_names(
    settings: RewardSettings, verifiers: Mapping[str, Verifier] = VERIFIERS
) -> list[str]:
    return sorted({*verifiers, *settings.custom, *remote_names(settings)})


def verifier_of(
    prompt: Prompt, settings: RewardSettings, verifiers: Mapping[str, Verifier] = VERIFIERS
) -> Verifier:
    """The deciding one; raises as `named_verifier` does."""
    return named_verifier(verifier_name(prompt, settings), prompt, settings, verifiers)


def named_verifier(
    name: str,
    prompt: Prompt,
    settings: RewardSettings,
    verifiers: Mapping[str, Verifier] = VERIFIERS,
) -> Verifier:
    """With the settings that it reads, if any. Raises DataError for a name that is not there,
    SettingsError for a custom one that cannot be used or for one that only a pool can ask."""
    check_name(name, prompt, settings, verifiers)
    if name in settings.custom:
        return custom.load(name, settings.custom[name])
    if name not in verifiers:
        raise SettingsError(
            f"the verifier {name!r} is asked by a ScorerPool only; score through one"
        )
    verifier = verifiers[name]
    return partial(code.score, settings=settings.code) if verifier is code.score else verifier


def check_name(
    name: str,
    prompt: Prompt,
    settings: RewardSettings,
    verifiers: Mapping[str, Verifier] = VERIFIERS,
) -> None:
    """Raises DataError for a verifier that is not there."""
    if name not in (known := known_names(settings, verifiers)):
        to_do = f"; set rewards.{name}" if name in (judged.NAME, reward_model.NAME) else ""
        raise DataError(
            f"prompt {prompt.prompt_id} of domain {prompt.domain!r} asks for the verifier "
            f"{name!r}; there are {', '.join(known)}{to_do}"
        )


def check_custom(settings: RewardSettings, verifiers: Mapping[str, Verifier] = VERIFIERS) -> None:
    """Raises SettingsError for a custom verifier that cannot be used or takes another's name."""
    for name, path in settings.custom.items():
        if name in {*verifiers, judged.NAME, reward_model.NAME}:
            raise SettingsError(f"rewards.custom.{name}: there is a verifier of that name already")
        custom.load(name, path)


def check_reference(
    prompt: Prompt, settings: RewardSettings, verifiers: Mapping[str, Verifier] = VERIFIERS
) -> None:
    """Raises DataError, naming the prompt, if its answers cannot be scored."""
    for name in verifier_names(prompt, settings):
        check_name(name, prompt, settings, verifiers)
        try:
            _check_one(name, prompt, settings, verifiers)
        except DataError as error:
            raise DataError(
                f"prompt {prompt.prompt_id} of domain {prompt.domain!r}: {error}"
            ) from error


def _check_one(
    name: str, prompt: Prompt, settings: RewardSettings, verifiers: Mapping[str, Verifier]
) -> None:
    if name == judged.NAME and settings.judge is not None:
        judged.check_reference(prompt, settings.judge)
    elif name == "code":
        code.check_reference(prompt, settings.code)
    elif name in REFERENCE_CHECKS:
        REFERENCE_CHECKS[name](prompt)
    elif name not in remote_names(settings):
        named_verifier(name, prompt, settings, verifiers)


def check_references(
    prompts: Iterable[Prompt],
    settings: RewardSettings,
    verifiers: Mapping[str, Verifier] = VERIFIERS,
) -> None:
    """Checks every prompt; raises one DataError that counts the bad ones and shows the first,
    SettingsError for a custom verifier that cannot be used, and SandboxError where programs are to
    be run and cannot be."""
    check_custom(settings, verifiers)
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
    if any("code" in verifier_names(prompt, settings) for prompt in prompts):
        code.require_sandbox(settings.code)
