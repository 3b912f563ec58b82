"""Started by test_distributed.py with one or two processes: trains tiny students and saves their weights and logs."""

import json
import os
import sys
from pathlib import Path

import torch


MODES = {"plain": {}, "path": {"path_fraction": 0.7}, "hidden": {"hidden_weight": 1.0}, "cached": {}}


def main(folder, mode):
    import tiny
    from test_distill import rows, student_of

    from cbd_hub import ChainDistiller, ChainDistillerConfig
    from cbd_hub.distill.teacher_cache import write_cache

    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    teacher = tiny.llama()
    student, kept = student_of(teacher)
    config = ChainDistillerConfig(
        str(folder / "out"), max_steps=3, per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2, learning_rate=1e-2,
        bf16=False, disable_tqdm=True, save_strategy="no", optim="sgd", lr_scheduler_type="constant", warmup_steps=0, logging_steps=1,
        ddp_backend="gloo" if processes > 1 else None, max_grad_norm=0.0, **MODES[mode],
    )
    cache = write_cache(teacher, rows(48), folder / f"cache{os.environ.get('RANK', '0')}", top_k=24) if mode == "cached" else None
    trainer = ChainDistiller(
        model=student, teacher=teacher, args=config, train_dataset=rows(48), processing_class=tiny.tokenizer(), kept=kept, teacher_cache=cache,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        weights = {name: tensor.detach().clone() for name, tensor in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
        torch.save(weights, folder / f"{mode}.pt")
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / f"{mode}.json").write_text(json.dumps({"losses": losses, "processes": trainer.accelerator.num_processes}))


if __name__ == "__main__":
    for mode in MODES:
        main(Path(sys.argv[1]), mode)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # a process that ends with gloo's threads alive may abort
