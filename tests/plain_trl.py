"""TRL by itself: no Ray, no DeepSpeed, nothing of ours. `python plain_trl.py SPEC` reads a JSON
file with `kind`, `model`, `records`, `trainer`, `lora` and writes TRL's log to `history` beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

CLASSES = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer)}


def main(spec_file: Path) -> None:
    spec = json.loads(spec_file.read_text())
    config_class, trainer_class = CLASSES[spec["kind"]]
    torch.set_num_threads(1)
    set_seed(0)
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
        args=config_class(
            output_dir=str(spec_file.parent / "output"),
            seed=0,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **spec["trainer"],
        ),
        train_dataset=Dataset.from_list(spec["records"]),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        peft_config=LoraConfig(**spec["lora"]) if spec["lora"] else None,
    )
    trainer.train()
    (spec_file.parent / "history").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
