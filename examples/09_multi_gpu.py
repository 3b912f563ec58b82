r"""One student distilled from one teacher on one process or many: DDP, FSDP2 or ZeRO-3, with the teacher sharded like the student.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/09_multi_gpu.py \
        --student ./student --kept ./student --teacher HuggingFaceTB/SmolLM2-135M-Instruct --text "text/*.txt" --output_dir ./anchor --max_steps 100 --bf16
    python examples/09_multi_gpu.py --smoke

Configurations: ddp.yaml, fsdp2.yaml, zero3.yaml; on CPUs alone `torchrun --nproc_per_node 2 examples/09_multi_gpu.py ...`, over gloo. Every field of
`ChainDistillerConfig` is an option. Run again, it goes on from the last checkpoint.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass, field
from pathlib import Path

import smoke
import torch
from accelerate import PartialState
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from cbd_hub import ChainDistiller, ChainDistillerConfig


@dataclass
class Models:
    """What is trained, from what, on what."""

    student: str = field(metadata={"help": "Hub id or folder of the student."})
    teacher: str = field(metadata={"help": "Hub id or folder of the teacher."})
    text: str = field(metadata={"help": "Files of text, documents apart by blank lines."})
    kept: str | None = field(default=None, metadata={"help": "Folder or Hub id of what cbd cut wrote, where the student began as that cut of this teacher: what it kept is saved with the student, for cbd assemble."})


def smoke_options() -> list[str]:
    """Tiny models, two steps, on one process."""
    return [
        "--student", smoke.model(layers=4, ffn=96, seed=1), "--teacher", smoke.model(), "--text", smoke.text(), "--output_dir", str(smoke.folder()),
        "--max_steps", "2", "--block_size", "32", "--per_device_train_batch_size", "4", "--bf16", "false", "--disable_tqdm", "true",
    ]


def main() -> None:
    """Train and save."""
    models: Models
    args: ChainDistillerConfig
    options = smoke_options() if sys.argv[1:] == ["--smoke"] else sys.argv[1:]
    models, args = HfArgumentParser((Models, ChainDistillerConfig)).parse_args_into_dataclasses(options)
    trainer = ChainDistiller(
        model=AutoModelForCausalLM.from_pretrained(models.student, dtype=torch.float32),
        teacher=AutoModelForCausalLM.from_pretrained(models.teacher, dtype=torch.bfloat16 if args.bf16 else torch.float32),
        args=args, train_dataset=load_dataset("text", data_files=models.text, sample_by="paragraph", split="train"),
        processing_class=AutoTokenizer.from_pretrained(models.student), kept=models.kept,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None)
    trainer.save_model()


if __name__ == "__main__":
    main()
    gc.collect()  # whatever still holds the process group, before it goes: torch may hang in the other order
    PartialState().destroy_process_group()
