"""Does a dynamic weight of the teacher beat constant ones, and cross-entropy alone?

    python tests/benchmarks/codistillation.py --seeds 0 1 --out DIR            # development
    python tests/benchmarks/codistillation.py --seeds 10 11 12 --out DIR       # reported once

SFT of the starter policy with the starter teacher, by the trainer that a run uses, in this process:
the same rows, number of steps and held-out tasks for every method of a seed. A corrupted teacher is
wrong in a share of the rows, all through the answer and with full confidence: its distributions
there have their digits and letters exchanged, each row's in another way.

`ce longer` gets as many steps more as fit into the processor's seconds that teacher and critic took
(set OMP_NUM_THREADS=1, so that they are those of an idle machine). Every method with a teacher pays
for the same targets, once. Results are appended to DIR/runs.jsonl; what
is there is not run again. `--report` prints the tables of what is there.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig

from posttrain.data.chat import ChatFormat, sft_record
from posttrain.evaluation import estimate, paired_difference
from posttrain.inputs import STARTER_POLICY, STARTER_TEACHER_DIR, teaching_of
from posttrain.losses.distillation_settings import DistillationSettings
from posttrain.stages.sft_distill import DistillingTrainer
from posttrain.stages.teaching import DistillationJob, Teachers
from posttrain.starter.evaluate import generate
from posttrain.starter.instructions import SYSTEM_INSTRUCTIONS
from posttrain.starter.tasks import starter_prompts, starter_sft_rows
from posttrain.starter.tokenizer import VOCABULARY
from posttrain.teaching.settings import TeacherSettings
from posttrain.types import Outcome
from posttrain.workers.settings import TeacherPoolSettings
from posttrain.workers.teacher import CausalTeacher
from rewards.shaping import RewardSettings
from rewards.verifiers import verifier_of

CORRUPTIONS = (0.0, 0.2, 0.4)
METHODS: dict[str, dict[str, Any]] = {
    "ce": {"weight": "ce_only"},
    "alpha .25": {"weight": "constant", "alpha": 0.25},
    "alpha .5": {"weight": "constant", "alpha": 0.5},
    "alpha .9": {"weight": "constant", "alpha": 0.9},
    "dynamic": {"weight": "dynamic"},
    "ce longer": {"weight": "ce_only"},
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was run, and what came of it. `correct` counts each held-out prompt's right samples;
    `told` is what the trainer said of its weights at the end; seconds are the processor's, and a
    teacher's count for every method that heard it, though its targets were stored."""

    method: str
    corruption: float
    seed: int
    correct: list[int]
    samples: int
    stepwise: float
    steps: int
    train_s: float
    teacher_s: float
    told: dict[str, float]

    @property
    def key(self) -> tuple[str, float, int]:
        return self.method, self.corruption, self.seed

    @property
    def accuracy(self) -> np.ndarray:
        return np.array(self.correct) / self.samples


class CorruptedTeacher(CausalTeacher):
    """Wrong in a `share` of the sequences, which their keys choose."""

    def __init__(self, *arguments: Any, share: float, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._share = share

    def _logits(self, sequences: Any) -> Iterator[tuple[int, Any, Any]]:
        for number, labels, logits in super()._logits(sequences):
            key = sequences[number].key
            exchanged = is_corrupted(key, self._share)
            yield number, labels, logits[:, exchange(key)] if exchanged else logits


def is_corrupted(key: bytes, share: float) -> bool:
    return random.Random(key.hex()).random() < share


def exchange(key: bytes) -> list[int]:
    """Which id's probability each id gets: digits and letters go round among themselves."""
    rng = random.Random(key.hex() + "exchange")
    ids = list(range(len(VOCABULARY)))
    for kind in (string.digits, string.ascii_lowercase):
        places = [VOCABULARY.index(c) for c in kind]
        turn = rng.randrange(1, len(places))
        for i, place in enumerate(places):
            ids[place] = places[(i + turn) % len(places)]
    return ids


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTeachers(Teachers):
    """Asks in this process, a teacher that is wrong in a share of the rows; the critic never is.
    `spent` gets the processor's seconds that asking took."""

    share: float
    spent: list[float]

    @contextmanager
    def _models(self) -> Iterator[Callable[[str], Any]]:
        def load(model: str) -> CorruptedTeacher:
            share = self.share if model == self.teaching.teacher else 0.0
            return CorruptedTeacher(model, self.pool, rank=0, address="", share=share)

        began = time.process_time()
        yield load
        self.spent.append(time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--corruptions", type=float, nargs="*", default=list(CORRUPTIONS))
    parser.add_argument("--set", nargs="*", default=[], help="of the dynamic weight: slope=8 …")
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--prompts", type=int, default=384)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    log = arguments.out / "runs.jsonl"
    runs = {run.key: run for run in read(log)}
    for seed in () if arguments.report else arguments.seeds:
        for corruption in arguments.corruptions:
            for method in arguments.methods:
                # Without a teacher there is nothing to corrupt.
                at = 0.0 if METHODS[method]["weight"] == "ce_only" else corruption
                name = " ".join([method, *arguments.set]) if method == "dynamic" else method
                if (name, at, seed) in runs:
                    continue
                run = once(name, METHODS[method], at, seed, arguments, runs)
                runs[run.key] = run
                with log.open("a") as file:
                    file.write(json.dumps(asdict(run)) + "\n")
                print(f"{run.key}: {run.accuracy.mean():.3f}, {run.train_s:.0f} s", flush=True)
    print(table(list(runs.values())))


def read(log: Path) -> list[Run]:
    return [Run(**json.loads(line)) for line in log.open()] if log.exists() else []


def once(
    name: str,
    weighing: dict[str, Any],
    corruption: float,
    seed: int,
    arguments: argparse.Namespace,
    runs: dict[tuple[str, float, int], Run],
) -> Run:
    changed = dict(pair.split("=") for pair in arguments.set) if "dynamic" in name else {}
    settings = DistillationSettings(**weighing | changed)
    rows = starter_sft_rows(arguments.rows, 100 + seed)
    texts = {i.name: i for i in SYSTEM_INSTRUCTIONS}
    records = [
        sft_record(row, texts[row.system] if row.system else None) | {"domain": row.prompt.domain}
        for row in rows
    ]
    chat = ChatFormat(str(STARTER_POLICY))
    store = arguments.out / "stores" / f"{seed}-{corruption:g}"
    teacher, dtype = TeacherSettings(store=str(store)), TeacherPoolSettings().dtype
    teaching = teaching_of(STARTER_TEACHER_DIR, STARTER_POLICY, chat, teacher, dtype, Path.cwd())
    taught = settings.weight != "ce_only"
    teachers = LocalTeachers(
        teaching=teaching, pool=TeacherPoolSettings(), deadline_s=1.0, share=corruption, spent=[]
    )
    epochs = arguments.epochs
    if name == "ce longer":
        epochs *= longer(seed, runs)
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(STARTER_POLICY, dtype="float32")
    trainer = DistillingTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(arguments.out / "trainer"),
            seed=seed,
            max_length=192,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            gradient_checkpointing=False,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(STARTER_POLICY),
        distillation=DistillationJob(settings=settings, teachers=teachers if taught else None),
    )
    began = time.process_time()
    trainer.train()
    train_s = time.process_time() - began
    stored = [r.teacher_s for r in runs.values() if (r.seed, r.corruption) == (seed, corruption)]
    correct, stepwise = measure(model.eval(), seed, arguments)
    told = [r for r in trainer.state.log_history if "loss" in r]
    return Run(
        method=name,
        corruption=corruption,
        seed=seed,
        correct=correct,
        samples=arguments.samples,
        stepwise=stepwise,
        steps=trainer.state.global_step,
        train_s=train_s,
        teacher_s=max(stored, default=0.0) + sum(teachers.spent) if taught else 0.0,
        told=_told(told, len(told) // 2) | found_out(trainer, corruption),
    )


def longer(seed: int, runs: dict[tuple[str, float, int], Run]) -> float:
    """How many times the steps of `ce` take as long as a dynamic run with its teacher."""
    plain = runs["ce", 0.0, seed]
    taught = next(r for k, r in runs.items() if k[0].startswith("dynamic") and k[2] == seed)
    return (taught.teacher_s + taught.train_s) / plain.train_s


def _told(records: Sequence[dict[str, Any]], last: int) -> dict[str, float]:
    """Means of the weights over the last records, where they settle."""
    names = {n for r in records for n in r if n.startswith("distill/")}
    told = {n: [r[n] for r in records[-last:] if n in r] for n in sorted(names)}
    return {n.removeprefix("distill/"): float(np.mean(v)) for n, v in told.items() if v}


def found_out(trainer: DistillingTrainer, corruption: float) -> dict[str, float]:
    """Mean responsibility of rows with a right teacher and with a wrong one, at the priors that
    were learnt: how much of the corruption the gate sees."""
    if trainer._reliability is None or trainer._targets is None or trainer._critic is None:
        return {}
    weights: dict[bool, list[float]] = {True: [], False: []}
    for row in trainer._rows:
        key = row.sequence.key
        prior = trainer._reliability.prior(row.domain)
        q = trainer._targets.read(key).per_label["label_logprobs"]
        p0 = trainer._critic.read(key).per_label["label_logprobs"]
        weight = 1 / (1 + np.exp(p0 - q - trainer._job.settings.margin) * (1 - prior) / prior)
        weights[is_corrupted(key, corruption)] += weight.tolist()
    return {
        f"responsibility/{'wrong' if wrong else 'right'}": float(np.mean(found))
        for wrong, found in weights.items()
        if found
    }


def measure(model: Any, seed: int, arguments: argparse.Namespace) -> tuple[list[int], float]:
    """Right samples of each held-out prompt, and the share of samples that show steps."""
    tokenizer = AutoTokenizer.from_pretrained(STARTER_POLICY)
    prompts = starter_prompts("held_out", arguments.prompts, seed)
    torch.manual_seed(seed)
    chats = [[m.as_dict() for m in prompt.messages] for prompt in prompts]
    written = generate(model, tokenizer, chats, arguments.samples)
    rewards = RewardSettings()
    correct = [
        sum(verifier_of(p, rewards)(p, text).outcome is Outcome.CORRECT for text in texts)
        for p, texts in zip(prompts, written, strict=True)
    ]
    stepwise = [not text.startswith("#") for texts in written for text in texts]
    return correct, float(np.mean(stepwise))


def table(runs: Sequence[Run]) -> str:
    """By corruption and method: pass@1 over all seeds, and paired over prompts against the plain
    cross-entropy and the best constant α, chosen on these very runs."""
    lines = [
        "| corrupted | method | seeds | pass@1 | against ce | against the best constant | stepwise "
        "| steps | train s | teacher s | α | λ |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for corruption in sorted({run.corruption for run in runs}):
        here = [r for r in runs if r.corruption == corruption or r.method.startswith("ce")]
        of = {name: _by_seed(here, name) for name in dict.fromkeys(r.method for r in here)}
        constants = [name for name in of if name.startswith("alpha")]
        best = max(constants, key=lambda n: _accuracy(of[n]).mean(), default=None)
        for name, found in of.items():
            told = [_all(found, what) for what in ("alpha", "lambda")]
            cells = [
                f"{corruption:.0%}",
                name,
                str(len(found)),
                f"{_accuracy(found).mean():.3f} ± {_half(found):.3f}",
                _against(found, of.get("ce")),
                _against(found, of[best]) if best else "–",
                f"{np.mean([r.stepwise for r in found.values()]):.2f}",
                f"{np.mean([r.steps for r in found.values()]):.0f}",
                f"{np.mean([r.train_s for r in found.values()]):.0f}",
                f"{np.mean([r.teacher_s for r in found.values()]):.0f}",
                *(f"{np.mean(values):.2f}" if values else "–" for values in told),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_seed(runs: Sequence[Run], method: str) -> dict[int, Run]:
    return {run.seed: run for run in runs if run.method == method}


def _accuracy(found: dict[int, Run]) -> np.ndarray:
    return np.concatenate([run.accuracy for run in found.values()])


def _half(found: dict[int, Run]) -> float:
    whole = estimate(_accuracy(found))
    return (whole.high - whole.low) / 2


def _all(found: dict[int, Run], name: str) -> list[float]:
    return [run.told[name] for run in found.values() if name in run.told]


def _against(found: dict[int, Run], other: dict[int, Run] | None) -> str:
    seeds = sorted(found.keys() & (other or {}).keys())
    if other is None or not seeds:
        return "–"
    pairs = [np.concatenate([runs[seed].accuracy for seed in seeds]) for runs in (other, found)]
    d = paired_difference(*pairs)
    return f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"


if __name__ == "__main__":
    main()
