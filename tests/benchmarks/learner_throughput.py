"""Tokens a second of the learner, as a run packs and otherwise, and of TRL's `GRPOTrainer`.

    python tests/benchmarks/learner_throughput.py [rounds]

The batch: 16 tasks, eight answers of the starter policy each, one thread, fp32, CISPO, AdamW. The
learner takes it packed into rows of 128 tokens, with a prompt once for its answers (shared) or once
for each (packed), and with one sequence a row as long as the longest (padded); micro-batches have
up to 2048 tokens each time. TRL gets micro-batches of as many rows and is asked for its loss alone,
so that neither its data loading nor its generation counts. Prompt and answer tokens of each
sequence count, whether they are shared or not, padding does not. Seconds are the process's own,
which with one thread are those of the clock as long as nothing else runs. All take turns round by
round; a first round is thrown away, and must give one loss.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from typing import Any

import numpy as np

from posttrain.data.chat import ChatFormat
from posttrain.inputs import STARTER_POLICY
from posttrain.packing import pack
from posttrain.starter.tasks import starter_prompts
from posttrain.types import PolicyVersion, TrainingBatch, TrainingSample
from posttrain.workers.settings import LearnerSettings

NUM_PROMPTS, NUM_ANSWERS, MAX_TOKENS = 16, 8, 96
ROW_TOKENS, MICRO_TOKENS = 128, 2048
RATE = 1e-6
OURS = ("shared", "packed", "padded")
COMPARED = (
    *(("shared", "packed"), ("shared", "padded"), ("shared", "trl")),
    *(("packed", "padded"), ("packed", "trl")),
)
CURRENT = PolicyVersion(1, 0)


def answers() -> list[TrainingSample]:
    """What the policy says; advantages and the engine's log-probabilities are made up."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    chat = ChatFormat(str(STARTER_POLICY))
    model = AutoModelForCausalLM.from_pretrained(STARTER_POLICY, dtype=torch.float32)
    rng = np.random.default_rng(0)
    samples = []
    for prompt in starter_prompts("train", NUM_PROMPTS, seed=0):
        ids = chat.encode(prompt, None)
        generated = model.generate(
            torch.tensor([ids] * NUM_ANSWERS),
            do_sample=True,
            max_new_tokens=MAX_TOKENS,
            pad_token_id=chat.pad_token_id,
            eos_token_id=chat.tokenizer.eos_token_id,
        )
        for row in generated.tolist():
            answer = row[len(ids) :]
            end = chat.tokenizer.eos_token_id
            length = answer.index(end) + 1 if end in answer else len(answer)
            mask = np.r_[np.zeros(len(ids)), np.ones(length)].astype(np.float32)
            samples.append(
                TrainingSample(
                    token_ids=np.array([*ids, *answer[:length]], dtype=np.int64),
                    loss_mask=mask,
                    rollout_logprobs=mask * np.float32(-0.5),
                    advantages=mask * np.float32(rng.normal()),
                    oldest_version=CURRENT,
                )
            )
    return samples


def packed(
    samples: list[TrainingSample], row_tokens: int, *, share_prompts: bool = False
) -> TrainingBatch:
    return pack(
        samples,
        row_tokens=row_tokens,
        micro_tokens=MICRO_TOKENS,
        pad_token_id=0,
        current=CURRENT,
        share_prompts=share_prompts,
    )


def padded(samples: list[TrainingSample]) -> TrainingBatch:
    """Every row as long as the longest sample."""
    longest = max(len(sample.token_ids) for sample in samples)
    filled = []
    for sample in samples:
        room = (0, longest - len(sample.token_ids))
        filled.append(
            TrainingSample(
                token_ids=np.pad(sample.token_ids, room),
                loss_mask=np.pad(sample.loss_mask, room),
                rollout_logprobs=np.pad(sample.rollout_logprobs, room),
                advantages=np.pad(sample.advantages, room),
                oldest_version=CURRENT,
            )
        )
    return packed(filled, row_tokens=1)


def ours(samples: list[TrainingSample], connection: Any) -> None:
    """Answers each name of `OURS` with (loss, seconds) of one step."""
    from posttrain.workers.learner import DeepSpeedLearner
    from posttrain.workers.learner_config import free_address

    learner = DeepSpeedLearner(
        str(STARTER_POLICY),
        LearnerSettings(learning_rate=RATE),
        temperature=1.0,
        max_age=1,
        max_tokens=MAX_TOKENS,
        num_steps=1000,
        seed=0,
        rank=0,
        num_ranks=1,
        address=free_address(),
    )
    layouts = (
        packed(samples, ROW_TOKENS, share_prompts=True),
        packed(samples, ROW_TOKENS),
        padded(samples),
    )
    batches = dict(zip(OURS, layouts, strict=True))
    connection.send("ready")
    while (order := connection.recv()) != "stop":
        began = time.process_time()
        loss = learner.step(batches[order])["loss"]
        connection.send((loss, time.process_time() - began))


def theirs(samples: list[TrainingSample], connection: Any) -> None:
    """Answers "trl" with (loss, seconds) of one step."""
    import torch

    torch.set_num_threads(1)
    trainer, model = trl_trainer()
    longest = max(len(sample.token_ids) for sample in samples)
    rows = MICRO_TOKENS // longest
    micro_batches = [
        trl_inputs(samples[start : start + rows], samples) for start in range(0, len(samples), rows)
    ]
    trainer.current_gradient_accumulation_steps = 1  # the denominator counts the whole batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    connection.send("ready")
    while connection.recv() != "stop":
        began, loss = time.process_time(), 0.0
        for inputs in micro_batches:
            part = trainer.compute_loss(model, inputs)
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        connection.send((loss, time.process_time() - began))


def trl_trainer() -> tuple[Any, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(STARTER_POLICY, dtype="float32")
    arguments = GRPOConfig(
        output_dir="/tmp/unused",
        use_cpu=True,
        bf16=False,  # its default; slow on a CPU, and the learner computes in fp32
        gradient_checkpointing=False,  # likewise: what the learner keeps would be computed twice
        report_to=[],
        loss_type="cispo",
        epsilon_high=5.0,
        beta=0.0,
        per_device_train_batch_size=NUM_ANSWERS,
        num_generations=NUM_ANSWERS,
        max_completion_length=MAX_TOKENS,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "1"}]),
        processing_class=AutoTokenizer.from_pretrained(STARTER_POLICY),
    )
    model.train()
    return trainer, model


def trl_inputs(micro: list[TrainingSample], batch: list[TrainingSample]) -> dict[str, Any]:
    """Prompts padded on the left, answers on the right, as TRL has them, to the batch's longest."""
    import torch

    prompt_lengths = [int((s.loss_mask == 0).sum()) for s in batch]
    prompt_room = max(prompt_lengths)
    answer_room = max(len(s.token_ids) - p for s, p in zip(batch, prompt_lengths, strict=True))
    shape = len(micro), prompt_room + answer_room
    ids, mask, rollout = (np.zeros(shape, dtype=d) for d in (np.int64, np.int64, np.float32))
    for row, sample in enumerate(micro):
        start = prompt_room - int((sample.loss_mask == 0).sum())
        here = slice(start, start + len(sample.token_ids))
        ids[row, here], mask[row, here] = sample.token_ids, 1
        rollout[row, here] = sample.rollout_logprobs
    split = {
        "prompt_ids": ids[:, :prompt_room],
        "prompt_mask": mask[:, :prompt_room],
        "completion_ids": ids[:, prompt_room:],
        "completion_mask": mask[:, prompt_room:],
        "old_per_token_logps": rollout[:, prompt_room:],
    }
    return {name: torch.from_numpy(array.copy()) for name, array in split.items()} | {
        "advantages": torch.tensor([float(s.advantages[-1]) for s in micro]),
        "num_items_in_batch": torch.tensor(float(sum(s.loss_mask.sum() for s in batch))),
    }


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    samples = answers()
    tokens = sum(len(sample.token_ids) for sample in samples)
    trained = int(sum(sample.loss_mask.sum() for sample in samples))
    print(f"{len(samples)} sequences, {tokens} tokens, {trained} of them of answers")
    context = multiprocessing.get_context("spawn")
    sides = {}
    for work, orders in ((ours, OURS), (theirs, ("trl",))):
        here, there = context.Pipe()
        context.Process(target=work, args=(samples, there), daemon=True).start()
        there.close()  # so that a process that died is noticed
        assert here.recv() == "ready"
        sides |= dict.fromkeys(orders, here)
    speeds: dict[str, list[float]] = {order: [] for order in sides}
    for index in range(rounds + 1):
        losses = {}
        for order, side in sides.items():
            side.send(order)
            losses[order], seconds = side.recv()
            if index:
                speeds[order].append(tokens / seconds)
        if index == 0:
            print({order: round(loss, 5) for order, loss in losses.items()})
            assert np.ptp(list(losses.values())) < 1e-3
        else:
            line = "   ".join(f"{order} {speeds[order][-1]:7.0f}" for order in sides)
            print(f"round {index}: {line}  tokens/s", flush=True)
    for side in set(sides.values()):
        side.send("stop")
    for one, other in COMPARED:
        ratios = [a / b for a, b in zip(speeds[one], speeds[other], strict=True)]
        print(
            f"median of {rounds}: {one} {statistics.median(speeds[one]):.0f}, "
            f"{other} {statistics.median(speeds[other]):.0f} tokens/s, "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
