"""What test_distributed.py runs with one and with two processes: tiny students are trained, their weights and logs saved."""

import json
import os
from contextlib import suppress

import tiny
import torch
from datasets import IterableDataset
from test_distill import rows, student_of
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, TrainerCallback
from transformers.distributed import DistributedConfig

from cbd_hub import ChainDistiller, ChainDistillerConfig
from cbd_hub.distill.cache_writing import write_cache
from cbd_hub.distill.wrapping import whole


MODES = {
    "plain": {}, "path": {"path_fraction": 0.7}, "hidden": {"hidden_weight": 1.0}, "on_policy": {"on_policy_fraction": 1.0, "max_new_tokens": 6},
    "minillm": {"objective": "minillm", "rollout_batch": 16, "inner_epochs": 1, "max_new_tokens": 6, "text_weight": 0.5},
    "answers": {"teacher_answers": True, "max_new_tokens": 6}, "cached": {}, "stream": {}, "flattened": {},
    "bridge": {"bridge": "span+vocab", "ce_weight": 0.5, "block_size": 24}, "bridge_hidden": {"bridge": "span", "hidden_weight": 1.0, "block_size": 24},
    "sharded": {}, "sharded_untied": {}, "sharded_hidden": {"hidden_weight": 1.0, "hidden_balance": True},
}


def sharded(model, folder):
    """The model loaded with every parameter split over the processes by FSDP2; whole with one process."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("RANK", "0")) == 0:
        model.save_pretrained(folder)
    if processes == 1:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.distributed.barrier()
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=DistributedConfig(fsdp_size=processes))
    assert all(isinstance(parameter, torch.distributed.tensor.DTensor) for parameter in made.parameters())
    assert sum(parameter.to_local().numel() for parameter in made.parameters()) < 0.6 * sum(parameter.numel() for parameter in made.parameters())
    return made


def held_out(mode, teacher, folder):
    """Evaluation sets of which no count divides by the batch: the last batches of two processes are filled up with rows that come again."""
    if "bridge" in MODES[mode]:
        return [[{"prompt": text[:9], "completion": text[9 : 12 + index]} for index, text in enumerate(tiny.texts(count, seed=9))] for count in (3, 9, 11)]
    sets = [rows(count, seed=9) for count in (3, 9, 11)]
    if mode == "cached":
        return [write_cache(teacher, held, folder / f"held{len(held)}_{os.environ.get('RANK', '0')}", top_k=24) for held in sets]
    return [*sets, IterableDataset.from_generator(lambda: iter(sets[-1]))]


def train(folder, mode):
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    teacher = tiny.llama(tied=not mode.endswith("untied"))
    student, kept = student_of(teacher)
    config = ChainDistillerConfig(
        str(folder / "out" / mode), max_steps=4, per_device_train_batch_size=4 // processes, per_device_eval_batch_size=4 // processes, gradient_accumulation_steps=2, learning_rate=1e-2,
        bf16=False, disable_tqdm=True, save_strategy="no", optim="sgd", lr_scheduler_type="constant", warmup_steps=0, logging_steps=1,
        ddp_backend="gloo" if processes > 1 else None, max_grad_norm=0.0, **MODES[mode],
    )
    student.generation_config.eos_token_id = list(range(4, 60))  # so that what is sampled differs in length
    if mode.startswith("sharded"):
        teacher, student = sharded(teacher, folder / f"{mode}_teacher"), sharded(student, folder / f"{mode}_student")
    cache = write_cache(teacher, rows(11), folder / f"cache{os.environ.get('RANK', '0')}", top_k=24) if mode == "cached" else None
    data = [{"text": text} for text in tiny.texts(11)] if config.bridge else rows(11)  # no multiple of the batch: an epoch's last batches are evened out
    if mode == "stream":
        data = IterableDataset.from_generator(lambda: iter(rows(11)))
    trainer = ChainDistiller(
        model=student, teacher=teacher, args=config, train_dataset=data, processing_class=tiny.tokenizer(), kept=kept, teacher_processing_class=tiny.tokenizer(),
        text_dataset=rows(16) if config.text_weight else None, teacher_cache=cache,
        **({"data_collator": DataCollatorWithFlattening()} if mode == "flattened" else {}),
    )
    trainer.train()
    evaluations = [trainer.evaluate(held)["eval_loss"] for held in held_out(mode, teacher, folder)]
    if mode.startswith("sharded") and processes > 1:
        for model in (trainer.model, trainer.teacher):
            assert all(isinstance(parameter, torch.distributed.tensor.DTensor) for parameter in model.parameters())
    module = trainer.accelerator.unwrap_model(trainer.model)
    weights = {name: whole(tensor) for name, tensor in module.named_parameters()}
    if trainer.is_world_process_zero():
        torch.save(weights, folder / f"{mode}.pt")
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / f"{mode}.json").write_text(json.dumps({"losses": losses, "evaluations": evaluations, "processes": trainer.accelerator.num_processes}))


def main(folder):
    for mode in MODES:
        train(folder, mode)


def trainer_of(folder, count, **options):
    """A trainer of these two processes on so many rows."""
    teacher = tiny.llama()
    student, kept = student_of(teacher)
    config = ChainDistillerConfig(
        str(folder), max_steps=4, per_device_train_batch_size=4, bf16=False, disable_tqdm=True, save_strategy="steps", save_steps=1, logging_steps=1, ddp_backend="gloo", **options
    )
    return ChainDistiller(model=student, teacher=teacher, args=config, train_dataset=rows(count), eval_dataset=rows(6, seed=5), processing_class=tiny.tokenizer(), kept=kept)


def best_weights(folder):
    """At the end every process has the best weights, not the last ones."""
    trainer = trainer_of(folder, 32, learning_rate=8.0, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, hidden_weight=1.0)
    trainer.train()
    assert trainer.state.best_global_step < 4
    assert abs(trainer.evaluate()["eval_loss"] - trainer.state.best_metric) < 1e-4


def gone_on_with(folder):
    """Killed in an epoch whose last batches are evened out, and gone on with: the same weights as never killed."""
    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise tiny.Killed

    whole = trainer_of(folder / "whole", 23, learning_rate=1e-2)
    whole.train()
    killed = trainer_of(folder / "killed", 23, learning_rate=1e-2)
    killed.add_callback(Kill())
    with suppress(tiny.Killed):
        killed.train()
    again = trainer_of(folder / "killed", 23, learning_rate=1e-2)
    again.train(resume_from_checkpoint=True)
    for (name, tensor), other in zip(whole.model.named_parameters(), again.model.parameters()):
        assert torch.equal(tensor, other), name
