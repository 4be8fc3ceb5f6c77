"""What Python's garbage collector need not look at again."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Puts aside all that is in memory, for a process that has started and now serves requests.

    Libraries as large as torch, transformers and vLLM leave hundreds of thousands of objects that
    stay for good. A full collection walks over them all: a tenth of a second and more, every few
    thousand answers, in which no request is handed on.
    """
    gc.collect()
    gc.freeze()
