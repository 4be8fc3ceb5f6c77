"""A causal language model made ready for online training: loaded, checked, adapted, wrapped."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import ModelError, SettingsError
from posttrain.losses.logprobs import token_logprobs
from posttrain.progress import say
from posttrain.workers.gather import whole
from posttrain.workers.head_check import check_head, refuse_head_bias
from posttrain.workers.learner_config import common_config
from posttrain.workers.settings import LearnerSettings, LoraSettings

FINGERPRINT_ELEMENTS = 256
"""Of each tensor; online training moves every one of them."""


class PackedPolicy(nn.Module):
    """A causal language model whose forward pass gives log-probabilities instead of logits.

    They are part of the wrapped module, so that what DeepSpeed hooks onto it (ZeRO-3 fetches
    weights module by module) knows when the head's weight is needed, in the backward pass too.

    Raises:
        ModelError: the head has a bias.
    """

    def __init__(self, model: Any, chunk_tokens: int) -> None:
        super().__init__()
        refuse_head_bias(model)
        # Under these names DeepSpeed's presets for architectures look for layers and settings.
        self.model = model.base_model
        self.config = model.config
        self.head = _Head(model.get_output_embeddings().weight, chunk_tokens)

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        temperature: float,
        sequence_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`logprobs` and `entropy`, `[R, L]`, as `posttrain.losses.logprobs` defines them.

        `token_ids`, `position_ids` and `sequence_ids` are `[R, L]`, as a `MicroBatch` has them.
        Without shared prompts positions tell all: they start at 0 with each sequence.
        """
        hidden = self.model(
            input_ids=token_ids,
            position_ids=position_ids,
            attention_mask=_shared_prompt_mask(position_ids, sequence_ids),
            use_cache=False,  # with a cache, packed sequences would see each other
        ).last_hidden_state
        logprobs, entropy = self.head(hidden, token_ids, temperature)
        return logprobs, entropy


def _shared_prompt_mask(position_ids: Tensor, sequence_ids: Tensor | None) -> Tensor | None:
    """Which tokens each one attends to, `[R, 1, L, L]`: those before it of its own sequence, and of
    a prompt that it shares. None where nothing is shared: transformers knows that case itself."""
    if sequence_ids is None or not (sequence_ids < 0).any():
        return None
    block = (position_ids == 0).cumsum(dim=1)
    seen = sequence_ids[:, None, :]
    allowed = (seen < 0) | (seen == sequence_ids[:, :, None])
    allowed &= block[:, None, :] == block[:, :, None]
    return allowed.tril()[:, None]


def can_share_prompts(model: Any) -> bool:
    """Whether a mask and positions alone decide what a token of this model sees, so that sequences
    can share a prompt: full attention in every layer, rotary positions, nothing recurrent."""
    layers = getattr(model.config, "layer_types", None) or ["full_attention"]
    return (
        set(layers) == {"full_attention"}
        and getattr(model.config, "sliding_window", None) is None
        and getattr(model.config, "rope_parameters", None) is not None
        and not getattr(model.config, "alibi", False)
        and not getattr(model, "_is_stateful", False)
    )


class _Head(nn.Module):
    """Owns the output embedding beside the model, which is never asked for logits."""

    def __init__(self, weight: nn.Parameter, chunk_tokens: int) -> None:
        super().__init__()
        self.weight = weight
        self._chunk_tokens = chunk_tokens

    def forward(
        self, hidden: Tensor, token_ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        return token_logprobs(hidden, self.weight, token_ids, temperature, self._chunk_tokens)


def load_model(model_path: str, settings: LearnerSettings, **loading: Any) -> Any:
    """The model in `settings.dtype`, in training mode and without noise. Under ZeRO-3 all ranks
    load it at once and each keeps its part only. `loading` goes to `from_pretrained` unchanged.

    Raises:
        ModelError: transformers cannot load it, weights are missing, its tokenizer knows tokens
            that the model has no embedding for, or its logits are not what its head gives.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        vocabulary = AutoTokenizer.from_pretrained(model_path).get_vocab()
        with _divided_while_loading(settings):
            model, report = AutoModelForCausalLM.from_pretrained(
                model_path,
                dtype=getattr(torch, settings.dtype),
                attn_implementation="sdpa",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **loading,
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"transformers cannot load {model_path!r}: {error}") from error
    except RuntimeError as error:
        # Under ZeRO-3 a mismatch is raised all the same. What else is of this type comes from other
        # ranks that are gone, and is not the model's fault.
        if "size mismatch" not in str(error):
            raise
        raise ModelError(f"transformers cannot load {model_path!r}: {error}") from error
    _refuse_parts_that_do_not_fit(model_path, model, report, vocabulary)
    if settings.zero_stage == 3 and settings.dtype == "bfloat16":
        recompute_buffers(model)
    find_backbone(model)
    model.train()
    _switch_off_noise(model)
    check_head(model_path, model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _refuse_parts_that_do_not_fit(
    model_path: str, model: Any, report: Mapping[str, Any], vocabulary: Mapping[str, int]
) -> None:
    for tensor, found, wanted in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"transformers cannot load {model_path!r}: {tensor} has the size {list(found)}, and "
            f"by config.json it is {list(wanted)}; correct the one that is wrong"
        )
    if report["missing_keys"]:
        raise ModelError(
            f"{model_path!r} lacks {len(report['missing_keys'])} of the model's tensors, among "
            f"them {min(report['missing_keys'])}: take the whole checkpoint, or correct its "
            "config.json"
        )
    num_embeddings = model.get_input_embeddings().num_embeddings
    last_token = max(vocabulary, key=lambda token: vocabulary[token])
    if vocabulary[last_token] >= num_embeddings:
        raise ModelError(
            f"{model_path!r}: the tokenizer gives {last_token!r} the id {vocabulary[last_token]}, "
            f"but the model has {num_embeddings} embeddings; take the tokenizer that belongs to "
            "it, or resize the embeddings and train them first"
        )


@contextmanager
def _divided_while_loading(settings: LearnerSettings) -> Iterator[None]:
    if settings.zero_stage < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    # Transformers looks it up for as long as it lives.
    config = HfDeepSpeedConfig(common_config(settings))
    yield
    del config


def find_backbone(model: Any) -> None:
    """Lets `model.base_model` be what computes the hidden states. Transformers looks for that of
    Llama 4's text models under a name that only multimodal ones use, and gives the model itself."""
    if model.base_model is model:
        model.base_model_prefix = "model"


def recompute_buffers(model: Any) -> None:
    """While a model is divided DeepSpeed makes bf16 of whatever is made. Transformers keeps what it
    computes itself in fp32, and needs it: rotary frequencies in bf16 are another model's."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        computed = type(model)(model.config)  # transformers' own way would divide it again
    for name, module in computed.named_modules():
        for leaf in module._non_persistent_buffers_set:
            setattr(model.get_submodule(name), leaf, getattr(module, leaf))


def check_architecture(model_path: Path) -> None:
    """Raises ModelError as `load_model` and `PackedPolicy` do for an architecture; loads no
    weights, and makes up a small head in the place of the model's. What cannot compute without
    weights is left to them."""
    model = empty_model(model_path)
    find_backbone(model)
    refuse_head_bias(model)
    width = model.get_output_embeddings().weight.shape[-1]
    model.set_output_embeddings(nn.Linear(width, 8, bias=False))
    try:
        check_head(str(model_path), model)
    except RuntimeError as error:  # of tensors that have no content
        say(f"{model_path}: its head is checked only when its weights are loaded ({error})")


def empty_model(model_path: Path) -> Any:
    """The architecture without its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config)


NO_NOISE: Mapping[str, float | None] = {
    "attention_dropout": 0.0,
    "jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
    "moe_jitter_eps": None,
}
"""How transformers' modules call what they add in training alone, and what switches it off. What
is called `router_jitter_noise` in PhiMoE is a threshold that evaluation goes by, too."""


def _switch_off_noise(model: Any) -> None:
    """The engine samples without: with dropout or jitter, the ratio would measure noise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, off in NO_NOISE.items():
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, off)


def add_adapter(model: Any, settings: LoraSettings) -> Any:
    """Puts PEFT's layers into `model` itself, and returns PEFT's view of it.

    Raises:
        SettingsError: `target_modules` names nothing, an embedding, or routed experts.
    """
    from peft import get_peft_model
    from peft.tuners.lora.layer import ParamWrapper

    targets = settings.target_modules
    try:
        with warnings.catch_warnings():
            # Said of routed experts, which are refused below.
            message = "The following (rank|alpha)_pattern keys"
            warnings.filterwarnings("ignore", message, RuntimeWarning)
            adapted = get_peft_model(model, adapter_config(settings))
    except ValueError as error:
        raise SettingsError(f"policy.lora.target_modules = {targets!r}: {error}") from error
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        if hasattr(embedding, "base_layer"):
            raise SettingsError(
                f"policy.lora.target_modules = {targets!r} names an embedding or the head; "
                "name layers between them"
            )
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    if any(isinstance(layer, ParamWrapper) for layer in layers.values()):
        others = {
            name.rpartition(".")[2]
            for name, layer in layers.items()
            if not isinstance(layer, ParamWrapper)
        }
        raise SettingsError(
            f"policy.lora.target_modules = {targets!r} reaches routed experts, to which PEFT would "
            f"add in another way than engines can be given; name other layers: {sorted(others)}"
        )
    return adapted


def adapter_config(settings: LoraSettings) -> Any:
    """The same in PEFT's words."""
    from peft import LoraConfig

    targets = settings.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )


def model_fingerprint(model: Any) -> str:
    """SHA-256 (hex) of configuration, names, shapes and a part of each tensor's values; called by
    all ranks at once.

    It tells models apart, and policies of one model; it does not vouch for every weight.
    """
    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        with whole([tensor]):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            first = tensor.detach().flatten()[:FINGERPRINT_ELEMENTS]
            digest.update(first.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()
