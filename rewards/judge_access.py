"""Ways to a judge: an OpenAI-compatible endpoint, or an engine of the run."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import lru_cache
from typing import Any

from posttrain.errors import SettingsError, StageError
from posttrain.types import (
    GenerationRequest,
    Generator,
    Message,
    Outcome,
    Prompt,
    Rollout,
    Sampling,
    SystemInstruction,
)
from rewards.judged import NAME, Ask, EndpointSettings, JudgedSettings, JudgeUnavailable, grade
from rewards.loop_slots import LoopSlots
from rewards.score import Finding, failed

BACKOFF_S = 0.5
"""Before the second attempt; doubled before each further one."""

REPLY_BYTES = 1 << 20
"""An endpoint that says more is not believed."""

_WORTH_ANOTHER_TRY = {408, 409, 425, 429}

Access = Callable[[], AbstractAsyncContextManager[Ask]]
"""Opens the way to the judge for one group."""


class Judge:
    """Grades groups of answers, at most `settings.concurrency` questions under way per event loop:
    further callers wait."""

    def __init__(self, settings: JudgedSettings, access: Access) -> None:
        self._settings = settings
        self._access = access
        self._slots = LoopSlots(settings.concurrency)

    async def findings(
        self, prompt: Prompt, rollouts: Sequence[Rollout], system: SystemInstruction | None
    ) -> tuple[Finding, ...]:
        """One per rollout, in order. Nobody is asked about those that were cut off."""
        async with self._access() as ask:

            async def one(rollout: Rollout) -> Finding:
                if rollout.truncated:
                    return failed(Outcome.TRUNCATED, "cut off before its end")
                async with self._slots.here():
                    return await grade(
                        prompt, rollout.text, system, self._settings, bounded, _pause
                    )

            async def bounded(question: str, temperature: float) -> str:
                try:
                    async with asyncio.timeout(self._settings.deadline_s):
                        return await ask(question, temperature)
                except TimeoutError as error:
                    raise JudgeUnavailable(
                        f"no reply from the judge within {self._settings.deadline_s:g} s",
                        retry=True,
                    ) from error

            return tuple(await asyncio.gather(*map(one, rollouts)))


async def _pause(attempt: int) -> None:
    await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))


def longest_grade_s(settings: JudgedSettings) -> float:
    """Of one answer, once its turn has come."""
    pauses: float = BACKOFF_S * (2**settings.retries - 1)
    return (1 + settings.retries) * settings.deadline_s + pauses


def judge_of(settings: JudgedSettings, engine: Ask | None) -> Judge:
    """Raises SettingsError if the model to ask has no engine here, or the endpoint no key."""
    if settings.endpoint is not None:
        return Judge(settings, endpoint_access(settings, settings.endpoint))
    if engine is None:
        raise SettingsError(
            f"rewards.{NAME}.model: {settings.model} is served in a run only. Here, serve it with "
            f"`vllm serve` and set rewards.{NAME}.endpoint instead"
        )

    @asynccontextmanager
    async def access() -> AsyncIterator[Ask]:
        yield engine

    return Judge(settings, access)


def engine_ask(
    generator: Generator,
    encode: Callable[[Message], tuple[int, ...]],
    settings: JudgedSettings,
    *,
    max_length: int,
) -> Ask:
    """Asks an engine that the caller has placed, which takes `max_length` tokens of question and
    reply; `encode` renders one user turn with the judge model's own chat template, generation
    prompt included."""
    numbers = itertools.count()

    async def ask(question: str, temperature: float) -> str:
        token_ids = encode(Message(role="user", content=question))
        if len(token_ids) >= max_length:  # an engine refuses it by an error that ends a run
            raise JudgeUnavailable(
                f"the question has {len(token_ids)} tokens, the judge takes {max_length} with its "
                f"reply (resources.rewards.{NAME}.engine.max_model_len)",
                retry=False,
            )
        request = GenerationRequest(
            request_id=f"judged-{next(numbers)}",
            prompt_token_ids=token_ids,
            num_rollouts=1,
            sampling=Sampling(max_tokens=settings.max_tokens, temperature=temperature),
        )
        try:
            (reply,) = await generator.generate(request)
        except StageError as error:
            raise JudgeUnavailable(f"the judge's engine failed: {error}", retry=True) from error
        return reply.text

    return ask


def endpoint_access(settings: JudgedSettings, endpoint: EndpointSettings) -> Access:
    """One HTTP client per group: a client belongs to one event loop, and is closed with it."""
    headers = {}
    if endpoint.api_key_env is not None:
        key = os.environ.get(endpoint.api_key_env)
        if not key:
            raise SettingsError(
                f"rewards.{NAME}.endpoint.api_key_env: the variable {endpoint.api_key_env} is not "
                "set; export it"
            )
        headers["Authorization"] = f"Bearer {key}"
    url = endpoint.url.rstrip("/") + "/chat/completions"

    @asynccontextmanager
    async def access() -> AsyncIterator[Ask]:
        import httpx

        async with httpx.AsyncClient(
            headers=headers, timeout=settings.deadline_s, verify=_certificates()
        ) as client:

            async def ask(question: str, temperature: float) -> str:
                body = {
                    "model": endpoint.model,
                    "messages": [{"role": "user", "content": question}],
                    "temperature": temperature,
                    "max_tokens": settings.max_tokens,
                }
                return await _post(client, url, body)

            yield ask

    return access


async def _post(client: Any, url: str, body: dict[str, Any]) -> str:
    import httpx

    content = b""
    try:
        async with client.stream("POST", url, json=body) as response:
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > REPLY_BYTES:
                    raise JudgeUnavailable(f"{url} says more than {REPLY_BYTES} bytes", retry=True)
    except httpx.HTTPError as error:
        shown = f"{type(error).__name__}: {error}".rstrip(": ")
        raise JudgeUnavailable(f"{url} cannot be reached ({shown})", retry=True) from error
    if response.status_code != httpx.codes.OK:
        status = response.status_code
        raise JudgeUnavailable(
            f"{url} answers with status {status}: {content[:200].decode(errors='replace')}",
            retry=status in _WORTH_ANOTHER_TRY or status >= 500,
        )
    try:
        reply = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise JudgeUnavailable(f"{url} sends no chat completion", retry=True) from error
    return reply if isinstance(reply, str) else ""


@lru_cache(maxsize=1)
def _certificates() -> ssl.SSLContext:
    """Reading them takes longer than many a request."""
    return ssl.create_default_context()
