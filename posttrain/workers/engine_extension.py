"""What is added to vLLM's own worker class, and runs in the process that holds the model."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


PR_SET_PDEATHSIG = 1


class PublishedWeightsLoader:
    """Mixed into vLLM's worker by name (`worker_extension_cls`); `self` is that worker."""

    model_runner: Any
    device: Any
    reload_weights: Any

    def die_with_parent(self) -> None:
        """From now on the kernel ends this process when the one that started it ends, however it
        does. Ray sees to that too, unless Ray itself is killed."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")

    def load_published(self, file: str) -> None:
        """Loads one safetensors file into the model in place, in whatever layout the kernels want.

        On CPU vLLM packs experts for its grouped matrix product when it builds the layer's kernel,
        and only then: a reload would leave them unpacked under a kernel that expects them packed.
        Without a kernel they are packed again and a new one is built. On a GPU the kernel must
        stay, because captured graphs hold its addresses, and vLLM copies into place by itself.
        """
        if self.device.type == "cpu":
            for module in self.model_runner.get_model().modules():
                method = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None  # type: ignore[union-attr]
        self.reload_weights(weights_iterator=_tensors(file))


def _tensors(file: str) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        for name in tensors.offset_keys():
            yield name, tensors.get_tensor(name)
