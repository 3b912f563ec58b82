r"""Distil one student from one teacher, on one process or many.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_anchor.py \
        --student ./student --teacher HuggingFaceTB/SmolLM2-135M-Instruct --text "text/*.txt" --output_dir ./anchor --max_steps 100 --bf16

Configurations: ddp.yaml, fsdp2.yaml, zero3.yaml; on CPUs alone `torchrun --nproc_per_node 2 examples/train_anchor.py ...`, over gloo. Every field of `ChainDistillerConfig` is an option. Run again, it goes on from the last checkpoint.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from cbd_hub import ChainDistiller, ChainDistillerConfig
from cbd_hub.texts import read_texts


@dataclass
class Models:
    """What is trained, from what, on what."""

    student: str = field(metadata={"help": "Hub id or folder of the student."})
    teacher: str = field(metadata={"help": "Hub id or folder of the teacher."})
    text: str = field(metadata={"help": "Files of text."})


def main() -> None:
    """Train and save."""
    models: Models
    args: ChainDistillerConfig
    models, args = HfArgumentParser((Models, ChainDistillerConfig)).parse_args_into_dataclasses()
    trainer = ChainDistiller(
        model=AutoModelForCausalLM.from_pretrained(models.student, dtype=torch.float32),
        teacher=AutoModelForCausalLM.from_pretrained(models.teacher, dtype=torch.bfloat16 if args.bf16 else torch.float32),
        args=args, train_dataset=Dataset.from_dict({"text": read_texts(models.text)}),
        processing_class=AutoTokenizer.from_pretrained(models.student),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None)
    trainer.save_model()


if __name__ == "__main__":
    main()
    gc.collect()  # whatever still holds the process group, before it goes: torch may hang in the other order
    PartialState().destroy_process_group()
