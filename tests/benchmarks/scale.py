"""Curriculum and ledger at a million: what DESIGN asks of both.

python tests/benchmarks/scale.py
"""

from __future__ import annotations

import gc
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from curricula.sampler import CurriculumSettings, build_curriculum
from posttrain.audit import audit, prompt_history
from posttrain.ledger import Ledger
from posttrain.types import DrawOutcome, Message, Prompt

MILLION = 1_000_000
BATCH = 64


def main() -> None:
    curriculum()
    with tempfile.TemporaryDirectory() as directory:
        ledger(Path(directory) / "ledger.sqlite")


def curriculum() -> None:
    message, metadata = (Message(role="user", content="?"),), {}
    prompts = [
        Prompt(
            prompt_id=f"{i:016x}",
            messages=message,
            reference=None,
            domain=f"d{i % 6}",
            metadata=metadata,
        )
        for i in range(MILLION)
    ]
    before = _resident()
    sampler = build_curriculum(prompts, [], CurriculumSettings(), 8, 0, BATCH)
    print(f"curriculum: {(_resident() - before) / MILLION:.0f} bytes a prompt beside the prompts")
    rng = np.random.default_rng(0)
    seconds = []
    for step in range(200):
        began = time.perf_counter()
        drawn = [sampler.draw(domain) for domain in sampler.next_batch()]
        seconds.append(time.perf_counter() - began)
        for prompt in drawn:
            sampler.observe(prompt.prompt_id, 8, int(rng.integers(9)), step)
    print(f"curriculum: {1e3 * np.median(seconds):.1f} ms for a batch of {BATCH}")
    began = time.perf_counter()
    buffer = io.BytesIO()
    np.savez(buffer, **sampler.state_dict())
    saved = time.perf_counter() - began
    print(f"curriculum: checkpoint {saved:.2f} s, {buffer.tell() / MILLION:.0f} bytes a prompt")


def ledger(path: Path) -> None:
    """A million draws of 10,000 prompts."""
    with Ledger(path) as book:
        attempt = book.open_attempt("rl", 0)
        began = time.perf_counter()
        for number in range(MILLION):
            draw_id, step = f"d1-{number:07d}", number // BATCH
            book.open_draw(
                draw_id=draw_id,
                prompt_id=f"p{number % 10_000}",
                domain="d",
                system=None,
                attempt=attempt,
                drawn_at_step=step,
            )
            book.close_draw(
                draw_id, DrawOutcome.TRAINED, step=step + 1, num_scored=8, num_correct=4
            )
        book.flush()
        print(f"ledger: {MILLION / (time.perf_counter() - began):,.0f} draws a second, both ends")
    began = time.perf_counter()
    events = prompt_history(path, "p1234")
    print(f"ledger: history of one prompt, {len(events)} events, {_ms_since(began):.1f} ms")
    began = time.perf_counter()
    assert audit(path).ok
    print(f"ledger: audit of {MILLION:,} draws {_ms_since(began) / 1e3:.1f} s")


def _ms_since(began: float) -> float:
    return 1e3 * (time.perf_counter() - began)


def _resident() -> int:
    """Bytes."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    main()
