"""What the dynamic weight of a teacher has learnt, kept with the trainer's own checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from posttrain.atomic import write_atomically
from posttrain.errors import StageError
from posttrain.losses.teacher_weight import Lead, Reliability

FILE = "teacher_weight.json"


class WeightState(TrainerCallback):  # type: ignore[misc]
    """A training that goes on from a checkpoint goes on with its λ and π as well."""

    def __init__(self, lead: Lead, reliability: Reliability) -> None:
        self._lead = lead
        self._reliability = reliability

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.is_world_process_zero:
            learnt = {"gap": self._lead.gap, "by_domain": dict(self._reliability.by_domain)}
            write_atomically(_file(args, state), json.dumps(learnt) + "\n")

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Raises StageError if the checkpoint does not say."""
        if state.global_step == 0:
            return
        file = _file(args, state)
        try:
            learnt = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StageError(
                f"SFT goes on from {file.parent}, which does not say how the teacher was weighed "
                f"({error}); remove that directory to start from the one before"
            ) from error
        self._lead.go_on_from(learnt["gap"])
        self._reliability.go_on_from(learnt["by_domain"])


def _file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / FILE
