"""Names of the losses, apart from their code so that settings can be read without torch."""

from __future__ import annotations

from typing import Literal

LossKind = Literal["cispo", "grpo"]
