"""A distillation step against TRL's and Model-Optimizer's: tokens a second, and peak memory above weights, gradients and optimiser state.

    python benchmarks/step.py --teacher demo/chain/anchors/135M --student demo/chain/anchors/99M

`ChainDistiller`; TRL 1.16 ``experimental.gkd.GKDTrainer`` with lmbda 0 and beta 0 (forward KL on the data); Model-Optimizer 0.47 ``KDTrainer`` (forward KL of the logits; left
out where nvidia-modelopt is not installed). The same models, batches and optimiser (AdamW); bf16 autocast and a teacher in bf16 for all where the device is quick at bf16, else fp32 for
all. A step is forward, backward and the optimiser's update; runs take turns, medians of seven after one round that does not count. Memory is anonymous memory, each in a process of its
own. Needs trl; writes benchmarks/results/step.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measuring import Peak, in_turns, medians, write
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from cbd_hub import ChainDistiller, ChainDistillerConfig
from cbd_hub.distill.wrapping import short_attention
from cbd_hub.precision import best_device, has_bf16


Step = Callable[[int, int], None]


def batch_of(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens, all kept."""
    ids = torch.randint(10, 40_000, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def stepper_of_batches(trainer: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    """One optimiser step of a trainer on a batch."""
    trainer.create_optimizer()

    ours = isinstance(trainer, ChainDistiller)

    def step(batch: dict[str, torch.Tensor]) -> None:
        with short_attention(trainer.args, trainer.model, trainer.teacher) if ours else nullcontext():  # as its `train` does
            trainer.training_step(trainer.model, batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum())
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=False)  # gradients stay allocated, so that both are measured above them
    return step


def stepper(trainer: Any) -> Step:
    """One optimiser step of a trainer on rows x length tokens."""
    step = stepper_of_batches(trainer)
    return lambda rows, length: step(batch_of(rows, length))


def models(teacher: str, student: str) -> tuple[Any, Any]:
    """The student in fp32, and the teacher in what the device is quick at."""
    dtype = torch.bfloat16 if BF16 else torch.float32
    return AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32), AutoModelForCausalLM.from_pretrained(teacher, dtype=dtype)


def ours(teacher: str, student: str, folder: str) -> Step:
    """`ChainDistiller` with its defaults."""
    args = ChainDistillerConfig(folder, max_steps=1, bf16=BF16, disable_tqdm=True, save_strategy="no")
    model, above = models(teacher, student)
    return stepper(ChainDistiller(
        model=model, teacher=above, args=args, train_dataset=Dataset.from_list([{"input_ids": [5] * 8}]), processing_class=AutoTokenizer.from_pretrained(student),
    ))


def trl(teacher: str, student: str, folder: str) -> Step:
    """TRL's GKDTrainer."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = GKDConfig(
        folder, max_steps=1, bf16=BF16, disable_tqdm=True, save_strategy="no", lmbda=0.0, beta=0.0, temperature=1.0, gradient_checkpointing=False,
        use_cpu=not torch.accelerator.is_available(), report_to="none", learning_rate=4e-4,
    )
    model, above = models(teacher, student)
    return stepper(GKDTrainer(
        model=model, teacher_model=above, args=args, train_dataset=Dataset.from_list([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]),
        processing_class=AutoTokenizer.from_pretrained(student),
    ))


def modelopt(teacher: str, student: str, folder: str) -> Step:
    """Model-Optimizer's KDTrainer."""
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    args = TrainingArguments(
        folder, max_steps=1, bf16=BF16, disable_tqdm=True, save_strategy="no", use_cpu=not torch.accelerator.is_available(), report_to="none", learning_rate=4e-4,
    )
    model, above = models(teacher, student)
    return stepper(KDTrainer(
        model=model, args=args, train_dataset=Dataset.from_list([{"input_ids": [5] * 8, "labels": [5] * 8}]), processing_class=AutoTokenizer.from_pretrained(student),
        distill_args={"distill": True, "teacher_model": above.to(model.device), "temperature": 1.0},
    ))


BF16 = has_bf16(best_device().type)
MAKERS = {"cbd_hub": ours, "TRL GKDTrainer": trl, **({"Model-Optimizer KDTrainer": modelopt} if find_spec("modelopt") else {})}


def main() -> None:
    """Time and weigh both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step.json"))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        if options.peak:
            step = MAKERS[options.peak](options.teacher, options.student, folder)
            step(1, 8)  # makes gradients and optimiser state
            with Peak() as peak:
                step(8, 512)
            print(peak.bytes / 2**20)
            return
        steps = {name: make(options.teacher, options.student, folder) for name, make in MAKERS.items()}
        seconds = in_turns({name: lambda step=step: step(8, 128) for name, step in steps.items()}, options.repeats)  # type: ignore[misc]
    memory = {}
    for name in MAKERS:
        command = [sys.executable, __file__, "--teacher", options.teacher, "--student", options.student, "--peak", name]
        memory[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    middle = medians(seconds)
    table = Table("", "tokens/s at 8 x 128", "its time to ours", "peak MiB at 8 x 512", "ours to its")
    for name, value in middle.items():
        table.add_row(name, f"{8 * 128 / value:,.0f}", f"{value / middle['cbd_hub']:.2f}x", f"{memory[name]:,.0f}", f"{memory['cbd_hub'] / memory[name]:.2f}x")
    Console(width=100).print(table)
    write(options.out, {
        "threads": 2, "dtype": "fp32 student and AdamW, bf16 teacher, bf16 autocast" if BF16 else "fp32 for all", "seconds": middle, "all_seconds": seconds, "peak_mib": memory,
    })


if __name__ == "__main__":
    main()
