"""What is added to vLLM's own worker class, and runs in the process that holds the model."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


PR_SET_PDEATHSIG = 1


class PublishedWeightsLoader:
    """Mixed into vLLM's worker by name (`worker_extension_cls`); `self` is that worker."""

    model_runner: Any
    device: Any
    reload_weights: Any

    def die_with(self, starter: int) -> None:
        """From now on this process ends when the process `starter` does, however that ends: the
        kernel sees to it where this is the engine core. Where several devices share an engine, each
        has a worker under the core, and the core would go on without its starter: so a worker ends
        it, and the kernel the workers with it. Ray sees to all that too, unless Ray itself is
        killed."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        core = os.getppid()
        # Workers that vLLM has Ray start have a parent of Ray's, which must not be ended.
        if core != starter and _parent_of(core) == starter:
            watch = os.pidfd_open(starter)
            threading.Thread(target=_end_after, args=(watch, core), daemon=True).start()

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


def _parent_of(process: int) -> int:
    # Its name, in brackets, may hold anything.
    _, _, fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")
    return int(fields.split()[1])


def _end_after(watch: int, core: int) -> None:
    """Ends the process `core`, which lives as long as this one, once that behind `watch` ends."""
    ended = select.poll()
    ended.register(watch, select.POLLIN)
    ended.poll()
    os.kill(core, signal.SIGKILL)


def _tensors(file: str) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        for name in tensors.offset_keys():
            yield name, tensors.get_tensor(name)
