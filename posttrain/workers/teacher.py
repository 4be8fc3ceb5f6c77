"""A frozen causal language model that says how likely tokens are: a teacher, or the critic.

A plain class. With tensor parallelism all ranks call the same methods in the same order with the
same arguments, and get the same answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from posttrain.errors import ModelError
from posttrain.teaching.records import Record, TokenSequence, smallest_unsigned
from posttrain.teaching.settings import TargetSettings
from posttrain.workers.learner_config import device, prepare_process
from posttrain.workers.policy_model import load_model
from posttrain.workers.settings import LearnerSettings, TeacherPoolSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float32]


class _Batch(NamedTuple):
    """R sequences of up to L tokens, padded on the right, where causal attention never looks;
    `numbers` says which of those asked for they are."""

    numbers: list[int]
    token_ids: Tensor
    label_mask: Tensor


class CausalTeacher:
    """Owns this rank's part of the model.

    Args:
        model_path: a checkpoint directory or hub name that transformers loads.
        rank: of `settings.tensor_parallel`, which meet at `address` (host:port).

    Raises:
        ModelError: the model cannot be loaded, or cannot be divided over so many devices.
    """

    def __init__(
        self, model_path: str, settings: TeacherPoolSettings, *, rank: int, address: str
    ) -> None:
        self._settings = settings
        loading = LearnerSettings(dtype=settings.dtype, threads=settings.threads)
        ranks = settings.tensor_parallel
        if ranks > 1:
            prepare_process(loading, rank=rank, num_ranks=ranks, address=address, seed=0)
            self._model = _divided(model_path, loading, ranks)
        else:
            torch.set_num_threads(settings.threads)
            self._model = load_model(model_path, loading).to(device())
        self._model.requires_grad_(False).eval()
        # Some models have more embeddings than tokens; a policy need not have the same surplus.
        self._num_ids = 1 + max(AutoTokenizer.from_pretrained(model_path).get_vocab().values())

    @torch.inference_mode()
    def targets(self, sequences: Sequence[TokenSequence], settings: TargetSettings) -> list[Record]:
        """What is stored of each sequence, in order. What is drawn depends on the sequence alone,
        so that targets made anew are the ones that were lost."""
        make = {"sampled": _sampled, "top_k": _top_k}[settings.kind]
        records: list[Record | None] = [None] * len(sequences)
        for number, labels, logits in self._logits(sequences):
            logprobs = logits.log_softmax(dim=-1)
            soft = (logits / settings.temperature).log_softmax(dim=-1)
            per_label, per_id = make(soft, settings, sequences[number].key)
            entropy = -(soft.exp() * soft).nan_to_num(nan=0.0).sum(dim=-1)
            of_labels = logprobs.gather(-1, labels[:, None]).squeeze(-1)
            records[number] = Record(
                per_label={
                    "label_logprobs": _array(of_labels),
                    "entropy": _array(entropy),
                    **per_label,
                },
                per_id=per_id,
            )
        return [record for record in records if record is not None]

    @torch.inference_mode()
    def label_logprobs(
        self, sequences: Sequence[TokenSequence], temperature: float
    ) -> list[FloatArray]:
        """log q of each sequence's n labels at the given temperature, `[n]` nats, in order; NaN for
        a label of an embedding that stands for no token, which an engine may sample."""
        answers: list[FloatArray | None] = [None] * len(sequences)
        for number, labels, logits in self._logits(sequences):
            logprobs = (logits / temperature).log_softmax(dim=-1)
            known = labels < self._num_ids
            of_labels = logprobs.gather(-1, (labels * known)[:, None]).squeeze(-1)
            answers[number] = _array(of_labels.where(known, torch.nan))
        return [answer for answer in answers if answer is not None]

    def _logits(self, sequences: Sequence[TokenSequence]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number, labels `[n]` and logits `[n, V]` (fp32) of each sequence, in no given order."""
        for batch in _batches(sequences, self._settings.batch_tokens):
            ids = batch.token_ids.to(device())
            # An engine may sample an embedding of the policy's that the teacher does not have.
            known = ids.clamp(max=self._model.get_input_embeddings().num_embeddings - 1)
            hidden = self._model.base_model(input_ids=known, use_cache=False).last_hidden_state
            # What is known of token t stands in the hidden state before it.
            rows, columns = (i.to(device()) for i in batch.label_mask[:, 1:].nonzero(as_tuple=True))
            labels = ids[rows, columns + 1]
            counts = batch.label_mask.sum(dim=1).tolist()
            starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).tolist()
            for first, last in _chunks(counts, self._settings.chunk_tokens):
                here = slice(starts[first], starts[last] + counts[last])
                head = self._model.get_output_embeddings()
                logits = head(hidden[rows[here], columns[here]])[:, : self._num_ids].float()
                sizes = counts[first : last + 1]
                yield from zip(
                    batch.numbers[first : last + 1],
                    torch.split(labels[here], sizes),
                    torch.split(logits, sizes),
                    strict=True,
                )


def _divided(model_path: str, loading: LearnerSettings, ranks: int) -> Any:
    """Over the devices of all ranks, by the plan that transformers has for the architecture."""
    from transformers.distributed import DistributedConfig

    config = AutoConfig.from_pretrained(model_path).get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) % ranks:
            raise ModelError(
                f"{model_path!r} has {name} = {getattr(config, name)}, which "
                f"resources.teacher.tensor_parallel = {ranks} does not divide; take a number that "
                "does, or 1"
            )
    return load_model(model_path, loading, distributed_config=DistributedConfig(tp_size=ranks))


def _batches(sequences: Sequence[TokenSequence], batch_tokens: int) -> Iterator[_Batch]:
    """Similar lengths together, the longest first; a sequence longer than the limit is alone."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].token_ids), reverse=True)
    start = 0
    while start < len(order):
        length = len(sequences[order[start]].token_ids)
        numbers = order[start : start + max(1, batch_tokens // length)]
        token_ids = torch.zeros(len(numbers), length, dtype=torch.int64)
        mask = torch.zeros(len(numbers), length, dtype=torch.bool)
        for row, number in enumerate(numbers):
            sequence = sequences[number]
            # Arrays that came through Ray are read-only views; torch wants memory it may write.
            token_ids[row, : len(sequence.token_ids)] = torch.tensor(sequence.token_ids)
            mask[row, : len(sequence.label_mask)] = torch.tensor(sequence.label_mask)
        yield _Batch(numbers, token_ids, mask)
        start += len(numbers)


def _chunks(counts: Sequence[int], chunk_tokens: int) -> Iterator[tuple[int, int]]:
    """First and last row of each run of rows with up to `chunk_tokens` labels, or of one row."""
    first, total = 0, 0
    for row, count in enumerate(counts):
        if row > first and total + count > chunk_tokens:
            yield first, row - 1
            first, total = row, 0
        total += count
    if counts:
        yield first, len(counts) - 1


def _sampled(
    soft: Tensor, settings: TargetSettings, key: bytes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Distinct ids among `samples` draws from each row of `soft` `[n, V]`, and how often each."""
    assert settings.samples is not None
    generator = torch.Generator(device=soft.device)
    generator.manual_seed(int.from_bytes(key[:7], "little"))
    drawn = torch.multinomial(soft.exp(), settings.samples, replacement=True, generator=generator)
    ordered = drawn.sort(dim=-1).values.cpu().numpy()
    begins = np.ones(ordered.shape, dtype=bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    counts = np.diff(np.append(np.flatnonzero(begins), begins.size))
    return (
        {"num_ids": begins.sum(axis=1).astype(smallest_unsigned(settings.samples))},
        {
            "ids": ordered[begins].astype(smallest_unsigned(soft.shape[-1] - 1)),
            "counts": counts.astype(smallest_unsigned(settings.samples)),
        },
    )


def _top_k(
    soft: Tensor, settings: TargetSettings, _: bytes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `k` likeliest ids of each row with their probabilities, and the mass of all others."""
    assert settings.k is not None
    k = min(settings.k, soft.shape[-1])
    kept, ids = soft.topk(k, dim=-1)
    others = soft.scatter(-1, ids, -torch.inf).exp().sum(dim=-1)
    return (
        {
            "num_ids": np.full(len(soft), k, dtype=smallest_unsigned(k)),
            "tail": _array(others),
        },
        {
            "ids": ids.cpu().numpy().astype(smallest_unsigned(soft.shape[-1] - 1)).ravel(),
            "weights": _array(kept.exp()).ravel(),
        },
    )


def _array(values: Tensor) -> FloatArray:
    return values.float().cpu().numpy()
