"""Started by test_distributed.py with one or two processes: trains tiny students and saves their weights and logs."""

import json
import os
import sys
from pathlib import Path

import torch


MODES = {
    "plain": {}, "path": {"path_fraction": 0.7}, "hidden": {"hidden_weight": 1.0}, "on_policy": {"on_policy_fraction": 1.0, "max_new_tokens": 6},
    "minillm": {"objective": "minillm", "rollout_batch": 16, "inner_epochs": 1, "max_new_tokens": 6, "text_weight": 0.5},
    "answers": {"teacher_answers": True, "max_new_tokens": 6},
}


def main(folder, mode):
    import tiny
    from test_distill import rows, student_of

    from cbd_hub import ChainDistiller, ChainDistillerConfig

    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    teacher = tiny.llama()
    student, kept = student_of(teacher)
    config = ChainDistillerConfig(
        str(folder / "out" / mode), max_steps=3, per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2, learning_rate=1e-2,
        bf16=False, disable_tqdm=True, save_strategy="no", optim="sgd", lr_scheduler_type="constant", warmup_steps=0, logging_steps=1,
        ddp_backend="gloo" if processes > 1 else None, max_grad_norm=0.0, **MODES[mode],
    )
    student.generation_config.eos_token_id = list(range(4, 60))  # so that what is sampled differs in length
    trainer = ChainDistiller(
        model=student, teacher=teacher, args=config, train_dataset=rows(48), processing_class=tiny.tokenizer(), kept=kept,
        text_dataset=rows(16) if config.text_weight else None,
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
