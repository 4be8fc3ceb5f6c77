"""How long an engine stands still for new weights, against the time to copy their bytes.

    python tests/benchmarks/publish_time.py [publishes]

Random policies of several sizes; requests run all the while. The copy is of the same tensors in
this process, once from memory to memory, right after each publish, so that whatever else the
machine does falls on both. The pause is what generation loses; writing the file and checking its
fingerprint happen beside it.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from posttrain.inputs import STARTER_POLICY
from posttrain.types import GenerationRequest, PolicyVersion, Sampling
from posttrain.workers.cluster import connect, disconnect
from posttrain.workers.generator import GeneratorPool
from posttrain.workers.settings import ActorResources, EngineSettings
from posttrain.workers.transport import PublishedWeights, this_node
from posttrain.workers.weights import SHARED_MEMORY, read_checkpoint, write_weights

SIZES = {"small": (192, 4), "medium": (512, 8), "large": (1024, 12)}
"""Name -> hidden size, layers."""
NUM_RUNNING, NUM_ROLLOUTS, MAX_TOKENS = 4, 8, 120


def save_model(directory: Path, hidden: int, layers: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(STARTER_POLICY)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def copy_seconds(state: dict[str, Tensor], target: dict[str, Tensor]) -> float:
    began = time.perf_counter()
    for name, tensor in state.items():
        target[name].copy_(tensor)
    return time.perf_counter() - began


async def keep_busy(pool: GeneratorPool, worker: int) -> None:
    for index in itertools.count():
        request = GenerationRequest(
            request_id=f"{worker}-{index}",
            prompt_token_ids=(5, 20, 30, 8),
            num_rollouts=NUM_ROLLOUTS,
            sampling=Sampling(max_tokens=MAX_TOKENS),
        )
        await pool.generate(request)


async def measure(name: str, scratch: Path, publishes: int) -> None:
    save_model(scratch / "policy", *SIZES[name])
    state = read_checkpoint(scratch / "policy")
    target = {key: tensor.clone() for key, tensor in state.items()}
    pool = await GeneratorPool.start(
        str(scratch / "policy"),
        PolicyVersion(0, 0),
        EngineSettings(max_model_len=192),
        replicas=1,
        resources=ActorResources(),
        deadline_s=300,
    )
    load = [asyncio.create_task(keep_busy(pool, worker)) for worker in range(NUM_RUNNING)]
    rows = []
    for step in range(publishes + 2):  # the first two are thrown away
        await asyncio.sleep(0.3)
        began = time.perf_counter()
        version = PolicyVersion(1, step)
        write_weights(state, scratch / str(version))
        written = time.perf_counter()
        weights = await PublishedWeights.staged(
            scratch / str(version), version, this_node(), deadline_s=pool.update_deadline_s
        )
        report = await pool.update_weights(weights)
        done = time.perf_counter()
        assert report.pause_s is not None
        copied = copy_seconds(state, target)
        rows.append(
            (written - began, done - written, report.pause_s, copied, report.reprefilled_tokens)
        )
    for task in load:
        task.cancel()
    await asyncio.gather(*load, return_exceptions=True)
    pool.stop()
    written, updated, paused, copied, again = (
        statistics.median(column) for column in zip(*rows[2:], strict=True)
    )
    megabytes = sum(tensor.nbytes for tensor in state.values()) / 1e6
    print(
        f"{name:7} {megabytes:7.1f} MB   write {1e3 * written:6.0f} ms   update "
        f"{1e3 * updated:6.0f} ms   of which pause {1e3 * paused:6.0f} ms   copy "
        f"{1e3 * copied:6.1f} ms   pause − copy {1e3 * (paused - copied):6.0f} ms   "
        f"prefilled again {again:.0f} tokens",
        flush=True,
    )


def main() -> None:
    publishes = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    torch.set_num_threads(1)
    connect()
    for name in SIZES:
        scratch = Path(tempfile.mkdtemp(prefix="posttrain-benchmark-", dir=SHARED_MEMORY))
        try:
            asyncio.run(measure(name, scratch, publishes))
        finally:
            shutil.rmtree(scratch)
    disconnect()


if __name__ == "__main__":
    main()
