"""One vLLM engine: answers requests, scores fixed tokens, takes new weights in flight.

A plain class, so that it runs in a Ray actor, in a test, or in a process of its own. On CPU it must
not share a process with a learner: vLLM binds threads and patches `torch.set_num_threads`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import EngineError, ModelError
from posttrain.types import GenerationRequest, PolicyVersion, Rollout, VersionSpan
from posttrain.workers.agreement import ModelFacts, tokenizer_fingerprint
from posttrain.workers.fingerprint import Fingerprint, check_arrival
from posttrain.workers.process_log import ProcessLog
from posttrain.workers.settings import EngineSettings

SHOWN_REASON = 500
"""Characters: vLLM lists every architecture that it knows when it does not know one."""


def engine_environment(settings: EngineSettings) -> dict[str, str]:
    """What must stand in the environment before vLLM is imported.

    On CPU the worker lives in the engine core's process (`uni`, see `_engine_args`), which saves an
    import and a hop per step. vLLM allows that only with its multiprocessing switched off by name,
    because it wants to bind threads itself; here `OMP_NUM_THREADS` does it.
    """
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "OMP_NUM_THREADS": str(settings.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _engine_args(model: str, settings: EngineSettings) -> Any:
    import torch
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments: dict[str, Any] = {
        "model": model,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel,
        "worker_extension_cls": "posttrain.workers.engine_extension.PublishedWeightsLoader",
        # The ratio of the loss needs the distribution that was sampled from, temperature included.
        "logprobs_mode": "processed_logprobs",
        # Sampling settings come with each request; a checkpoint's defaults would bias the ratio.
        "generation_config": "vllm",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if not torch.cuda.is_available():
        backend = "uni" if settings.tensor_parallel == 1 else "mp"
        arguments |= {
            "enforce_eager": True,
            "distributed_executor_backend": backend,
            # A prompt in pieces winds a seeded generator back, which a CPU generator cannot do.
            "enable_chunked_prefill": False,
            # Of vLLM's 128 its attention computes all, however short a sequence is.
            "block_size": 32,
        }
    return AsyncEngineArgs(**(arguments | settings.extra))


class VllmEngine:
    """Owns one `AsyncLLM`. Create it with `await VllmEngine.start(...)`."""

    def __init__(self, llm: Any, settings: EngineSettings) -> None:
        self._llm = llm
        self._tokenizer = llm.get_tokenizer()
        self._settings = settings
        self._update_lock = asyncio.Lock()
        self._progress: dict[str, int] = {}
        self._progressed_at = time.monotonic()

    @classmethod
    async def start(
        cls, model: str, version: PolicyVersion, settings: EngineSettings
    ) -> VllmEngine:
        """Loads a checkpoint directory or hub name and serves it as `version`.

        Raises:
            ModelError: vLLM cannot load the model; carries vLLM's own reason.
        """
        os.environ.update(engine_environment(settings))
        from vllm.v1.engine.async_llm import AsyncLLM

        log = ProcessLog()
        try:
            llm = AsyncLLM.from_engine_args(_engine_args(model, settings))
        except Exception as error:
            reason = (log.last_error() or str(error))[:SHOWN_REASON]
            raise ModelError(f"vLLM cannot load {model!r}: {reason}") from error
        await llm.collective_rpc("die_with", args=(os.getpid(),))
        await llm.update_weight_version(str(version))
        return cls(llm, settings)

    def facts(self) -> ModelFacts:
        return ModelFacts(
            vocab_size=self._llm.model_config.get_vocab_size(),
            tokenizer=tokenizer_fingerprint(self._tokenizer),
        )

    async def generate(self, request: GenerationRequest) -> tuple[Rollout, ...]:
        """`num_rollouts` completions with the engine's log-probabilities of their own tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        parameters = SamplingParams(
            n=request.num_rollouts,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            logprobs=0,
            flat_logprobs=True,
            # Text is decoded once at the end; streaming it costs a third of the throughput.
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._final_output(request.prompt_token_ids, parameters, request.request_id)
        return tuple(self._rollout(request, completion) for completion in output.outputs)

    async def score_tokens(
        self, sequences: Sequence[Sequence[int]], label: str
    ) -> list[list[float]]:
        """Log-probability of each token but the first, at temperature 1: `[T-1]` per sequence."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

        async def score(index: int, token_ids: Sequence[int]) -> list[float]:
            output = await self._final_output(token_ids, parameters, f"{label}-{index}")
            return [
                entry[token].logprob
                for token, entry in zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)
            ]

        return list(await asyncio.gather(*(score(i, s) for i, s in enumerate(sequences))))

    async def update_weights(
        self, file: Path, version: PolicyVersion, published: Fingerprint
    ) -> dict[str, float]:
        """Serves the safetensors in `file` as `version`, running requests included.

        The file must name tied weights twice (`lm_head.weight` beside the embedding): vLLM keeps
        the old head otherwise. It is checked while generation goes on. The prefix cache is cleared,
        it belongs to the old weights; what the running requests had in it is computed again.

        Returns:
            `pause_s`: seconds that generation stood still.
            `reprefilled_tokens`: prompt and completion tokens of the requests that were being
            answered, which all go through the model once more (a prefix that several of them share
            counts each time).

        Raises:
            MismatchError: the file is not what was published; nothing was loaded.
        """
        async with self._update_lock:
            await asyncio.to_thread(check_arrival, file, published)
            began = time.perf_counter()
            await self._llm.pause_generation(mode="keep", clear_cache=True)
            reprefilled = self._tokens_in_flight()
            await self._llm.collective_rpc("load_published", args=(str(file),))
            await self._llm.update_weight_version(str(version))
            await self._llm.resume_generation()
            pause_s = time.perf_counter() - began
            return {"pause_s": pause_s, "reprefilled_tokens": float(reprefilled)}

    async def stalled_s(self) -> float:
        """Seconds since a token was written, while requests wait for one and no update is under
        way. Does not return while the engine core is stuck: it answers between two steps. During an
        update it is not asked, because it may take longer to load weights than to be stuck.

        Looks at what has changed since the last call, so it is as fine as the calls are frequent.
        """
        if self._update_lock.locked():
            self._progressed_at = time.monotonic()
            return 0.0
        await self._llm.get_weight_version()
        progress = {
            request_id: state.detokenizer.num_output_tokens()
            for request_id, state in self._request_states().items()
        }
        if not progress or progress != self._progress or self._update_lock.locked():
            self._progress = progress
            self._progressed_at = time.monotonic()
        return time.monotonic() - self._progressed_at

    def tokens_written(self, request_id: str) -> int | None:
        """As `posttrain.types.ObservedGenerator` says. Completions that have ended while others of
        their request have not do not count: vLLM has no record of them any more."""
        states = self._request_states()
        written = [
            states[own_id].detokenizer.num_output_tokens()
            for own_id in self._llm.output_processor.external_req_ids.get(request_id, ())
            if own_id in states
        ]
        return max(written, default=None)

    def close(self) -> None:
        self._llm.shutdown()

    def _tokens_in_flight(self) -> int:
        lengths = (
            (state.prompt_len, state.detokenizer.num_output_tokens())
            for state in self._request_states().values()
        )
        return sum(prompt + written for prompt, written in lengths if written)

    def _request_states(self) -> dict[str, Any]:
        """vLLM's own record of each completion under way."""
        states: dict[str, Any] = self._llm.output_processor.request_states
        return states

    async def _final_output(self, token_ids: Sequence[int], parameters: Any, label: str) -> Any:
        final = None
        try:
            async with asyncio.timeout(self._settings.deadline_s):
                stream = self._llm.generate(
                    {"prompt_token_ids": list(token_ids)}, parameters, label
                )
                async for output in stream:
                    final = output
        except TimeoutError as error:
            raise EngineError(
                f"request {label} was not answered within {self._settings.deadline_s:g} s "
                "(resources.rollout.engine.deadline_s)"
            ) from error
        assert final is not None and final.finished
        return final

    def _rollout(self, request: GenerationRequest, completion: Any) -> Rollout:
        token_ids = tuple(completion.token_ids)
        return Rollout(
            rollout_id=f"{request.request_id}/{completion.index}",
            draw_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            completion_token_ids=token_ids,
            rollout_logprobs=tuple(completion.logprobs.logprobs),
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True),
            finish_reason=completion.finish_reason,
            version_spans=_spans(completion.weight_versions),
        )


def _spans(reported: Sequence[Any]) -> tuple[VersionSpan, ...]:
    return tuple(
        VersionSpan(span.start, span.end, PolicyVersion.parse(span.version)) for span in reported
    )
