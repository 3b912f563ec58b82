"""The hidden-state term of the trainer: projectors between unlike widths, which no export holds, and its balance."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import ONE_FAMILY
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_distill import lora, rows, weights
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer
from transformers.trainer_utils import get_last_checkpoint

from cbd_hub import ChainDistiller, ChainDistillerConfig
from cbd_hub.distill.hidden import FILE, matched_layers
from cbd_hub.errors import ArgumentError
from cbd_hub.interpolation.plan import Kept
from cbd_hub.losses.hidden import hidden_loss


STUDENTS = {"llama": lambda: tiny.llama(layers=2, hidden=16, heads=2, kv_heads=1, ffn=24, seed=3), "gpt2": lambda: tiny.gpt2(layers=2, hidden=16, heads=2, ffn=24, seed=3)}


def trainer_of(family, folder, peft_config=None, eval_dataset=None, **options):
    arguments = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "bf16": False, "disable_tqdm": True,
        "save_strategy": "no", "optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1, "hidden_weight": 1.0,
        "hidden_loss": "mse", **options,
    }
    return ChainDistiller(
        model=STUDENTS[family](), teacher=tiny.FAMILIES[family](), args=ChainDistillerConfig(**arguments), train_dataset=rows(32), eval_dataset=eval_dataset,
        processing_class=tiny.tokenizer(), peft_config=peft_config,
    )


def test_layers_are_matched_by_what_was_kept_or_evenly():
    assert matched_layers(3, 12, None) == [3, 7, 11]
    assert matched_layers(4, 4, None) == [0, 1, 2, 3]
    assert matched_layers(12, 24, None)[0] == 1
    kept = Kept(np.array([0, 4, 9]), np.tile(np.arange(8), (12, 1)))
    assert matched_layers(3, 12, kept) == [3, 8, 11], "each block's last layer"


def test_projectors_start_closed_form_learn_and_are_never_exported(family, tmp_path):
    trainer = trainer_of(family, tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    trainer._start_hidden()
    start = [projector.weight.clone() for projector in trainer.hidden.projectors]
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(32)])
    ours, theirs = (model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True).hidden_states[1:] for model in (trainer.model, trainer.teacher))
    keep = torch.zeros_like(batch["labels"], dtype=torch.bool)
    keep[:, :-1] = batch["labels"][:, 1:] != -100
    ends = matched_layers(2, 4, None)
    projected = [projector(state) for projector, state in zip(trainer.hidden.projectors, ours)]
    fitted = hidden_loss(projected, [theirs[end] for end in ends], keep, kind="mse")
    # never worse than the best constant, whose error is the variance
    constant = [theirs[end][keep].mean(0).expand_as(theirs[end]) for end in ends]
    assert fitted < hidden_loss(constant, [theirs[end] for end in ends], keep, kind="mse")
    trainer.train()
    assert any(not torch.equal(projector.weight, before) for projector, before in zip(trainer.hidden.projectors, start))
    assert not any("projector" in name for name, _ in trainer.model.named_parameters())
    checkpoint = tmp_path / "checkpoint-3"
    assert not any("projector" in name for name in load_file(checkpoint / "model.safetensors"))
    assert any("projector" in name for name in load_file(checkpoint / FILE))
    trainer.save_model(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".safetensors") == ["model.safetensors"]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(tensor, trainer.model.get_parameter(name)) for name, tensor in model.named_parameters())


@ONE_FAMILY
@pytest.mark.parametrize("options", [{}, {"hidden_balance": True}, {"hidden_balance": True, "hidden_loss": "cosine", "hidden_layers": [1]}])
def test_accumulation_changes_nothing(family, tmp_path, options):
    whole = trainer_of(family, tmp_path / "a", max_steps=3, **options)
    pieces = trainer_of(family, tmp_path / "b", max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
    whole._start_hidden()
    pieces._start_hidden()
    whole.train()
    pieces.train()
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(pieces)[name], rtol=1e-4, atol=1e-5, msg=name)
    assert whole.hidden.scale == pytest.approx(pieces.hidden.scale, rel=1e-4)


def test_balance_weighs_the_terms_alike(tmp_path):
    """The scale is the ratio of the running means; with hidden_weight 1 the scaled term is as large as the others."""
    trainer = trainer_of("llama", tmp_path, hidden_balance=True, max_steps=4, learning_rate=1e-4)
    trainer.train()
    logs = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in logs:
        other = line["loss"] / 2
        assert line["hidden_loss"] * line["hidden_scale"] == pytest.approx(other, rel=0.2)
    assert trainer.hidden.scale != logs[0]["hidden_scale"]


def test_evaluations_of_a_balanced_run_are_of_one_kind(tmp_path):
    """Nothing is learned here, so that every evaluation finds the same loss, also those before training and after a resume."""
    options = {"hidden_balance": True, "learning_rate": 0.0, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    trainer = trainer_of("llama", tmp_path, eval_dataset=rows(8, seed=1), **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.hidden.scale != trainer.hidden.first_scale
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    again = trainer_of("llama", tmp_path, eval_dataset=rows(8, seed=1), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [*losses, again.evaluate()["eval_loss"]] == pytest.approx([before] * 4, rel=1e-6)


def test_deepspeed_which_loads_a_model_by_itself_brings_the_term_back_too(tmp_path, monkeypatch):
    trainer = trainer_of("llama", tmp_path, hidden_balance=True, save_strategy="steps", save_steps=1)
    trainer.train()
    again = trainer_of("llama", tmp_path, hidden_balance=True)
    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: None)
    for enabled in (False, True):
        again.is_deepspeed_enabled = enabled
        again._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-2"))
        assert again.hidden.ready == enabled
    assert again.hidden.first_scale == trainer.hidden.first_scale


def test_a_checkpoint_without_the_first_balance_goes_on(tmp_path):
    trainer_of("llama", tmp_path, hidden_balance=True, save_strategy="steps", save_steps=1).train()
    path = tmp_path / "checkpoint-2" / FILE
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    del tensors["first_balance"]
    save_file(tensors, path, metadata=metadata)
    trainer = trainer_of("llama", tmp_path, hidden_balance=True, max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.hidden.first_scale == pytest.approx(tensors["balance"][0].item() / tensors["balance"][1].item())


def test_hidden_states_alone_are_learned_from(tmp_path):
    trainer = trainer_of("llama", tmp_path, kd_weight=0.0, max_steps=20, learning_rate=1e-3, optim="adamw_torch")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5])
    for options in ({"hidden_balance": True}, {"path_fraction": 0.5}):
        with pytest.raises(ArgumentError, match=f"both 0, so that {next(iter(options))} has no other term"):
            trainer_of("llama", tmp_path, kd_weight=0.0, **options)


@pytest.mark.parametrize("collator", [DataCollatorForSeq2Seq(tiny.tokenizer()), DataCollatorWithFlattening(return_flash_attn_kwargs=True)])
def test_the_start_is_measured_on_what_the_steps_read(tmp_path, collator):
    """Columns that no step reads reach no collator, and what a collator makes beside tensors is let be."""
    scales = []
    for own in (None, collator):
        trainer = trainer_of("llama", tmp_path, hidden_balance=True)
        trainer.train_dataset = [{**row, "attention_mask": [1] * len(row["input_ids"]), "source": "a file"} for row in rows()]
        trainer.data_collator = own or trainer.data_collator
        trainer._start_hidden()
        scales.append(trainer.hidden.scale)
    assert scales[1] == pytest.approx(scales[0], rel=1e-4)


@ONE_FAMILY
@pytest.mark.parametrize("balance", [False, True])
def test_stopped_and_resumed_equals_never_stopped(family, tmp_path, balance):
    def run(folder, stop):
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "hidden_balance": balance, "per_device_train_batch_size": 3, "logging_steps": 3}
        trainer = tiny.stopped_and_resumed(lambda: trainer_of(family, folder, **options), folder, stop)
        return weights(trainer), [projector.weight.clone() for projector in trainer.hidden.projectors], (folder / "metrics.jsonl").read_text()

    (whole, maps, log), (again, other, same) = run(tmp_path / "a", 0), run(tmp_path / "b", 5)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert all(torch.equal(first, second) for first, second in zip(maps, other))
    assert log == same


def test_an_optimizer_that_would_leave_projectors_out_is_refused(tmp_path):
    student, teacher = tiny.llama(layers=2, hidden=24, heads=3, kv_heads=3, seed=3), tiny.llama()
    given = {"model": student, "teacher": teacher, "args": ChainDistillerConfig(str(tmp_path), hidden_weight=1.0, bf16=False), "train_dataset": [{"input_ids": [5, 6, 7]}]}
    with pytest.raises(ArgumentError, match="does not hold the projectors .* pass optimizer_cls_and_kwargs="):
        ChainDistiller(**given, optimizers=(torch.optim.SGD(student.parameters(), lr=0.1), None))
    assert ChainDistiller(**given, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1})).hidden.projectors


def test_adapters_train_with_projectors(tmp_path):
    trainer = trainer_of("llama", tmp_path, peft_config=lora(target_modules=["q_proj"]))
    before = weights(trainer)
    trainer.train()
    moved = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_a_checkpoint_without_the_term_is_refused(tmp_path):
    trainer = trainer_of("llama", tmp_path, hidden_weight=0.0, save_strategy="steps", save_steps=1)
    trainer.train()
    other = trainer_of("llama", tmp_path, max_steps=4)
    with pytest.raises(ArgumentError, match="without this hidden-state term"):
        other.train(resume_from_checkpoint=True)


def test_wrong_options_are_named(tmp_path):
    with pytest.raises(ArgumentError, match="hidden_layers names layer 2, and the student has layers 0 to 1"):
        trainer_of("llama", tmp_path, hidden_layers=[2])
    with pytest.raises(ArgumentError, match="hidden_balance=True but hidden_weight=0"):
        trainer_of("llama", tmp_path, hidden_weight=0.0, hidden_balance=True)


def test_evaluation_before_training_has_the_term(tmp_path):
    """Projectors take their start from the training text then, the one that training would give them."""
    trainer, plain = trainer_of("llama", tmp_path / "a"), trainer_of("llama", tmp_path / "b", hidden_weight=0.0)
    loss = trainer.evaluate(rows(4))["eval_loss"]
    again = trainer_of("llama", tmp_path / "c")
    again._start_hidden()
    assert loss == again.evaluate(rows(4))["eval_loss"] > plain.evaluate(rows(4))["eval_loss"]


def test_paths_and_epochs_resume_right(tmp_path, monkeypatch):
    """A checkpoint given as a path is the last one too; more epochs go on; the best checkpoint is found by a relative output folder."""
    monkeypatch.chdir(tmp_path)
    trainer = trainer_of("llama", "./out", save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, save_total_limit=1, hidden_weight=0.0, learning_rate=30.0, eval_dataset=rows(4))
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).is_dir()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)
    again = trainer_of("llama", "./out", save_strategy="no", hidden_weight=0.0)
    last = tmp_path / get_last_checkpoint("./out")
    assert again.train(resume_from_checkpoint=last).global_step == 2
    few = trainer_of("llama", "few", max_steps=-1, num_train_epochs=1, save_strategy="epoch")
    few.train()
    more = trainer_of("llama", "few", max_steps=-1, num_train_epochs=2, save_strategy="epoch")
    assert more.train(resume_from_checkpoint=True).global_step == 2 * few.state.global_step


def test_the_best_models_projectors_come_back_with_it(tmp_path):
    """The learning rate is so high that later steps are worse: what evaluates afterwards is the best checkpoint, projectors included."""
    trainer = trainer_of(
        "llama", tmp_path, eval_dataset=rows(8, seed=5), max_steps=4, learning_rate=1.0, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, save_total_limit=None,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = Path(trainer.state.best_model_checkpoint)
    assert min(losses) < losses[-1]
    kept = load_file(best / FILE)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in trainer.hidden._parameters().items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_a_resume_with_other_layers_is_refused(tmp_path):
    trainer_of("llama", tmp_path, hidden_layers=[0], save_strategy="steps", save_steps=1).train()
    with pytest.raises(ArgumentError, match="matched the layers 0 to 1 and these are 0 to 1, 1 to 3"):
        trainer_of("llama", tmp_path, max_steps=3, hidden_layers=[0, 1]).train(resume_from_checkpoint=True)


def test_a_student_in_bf16_is_projected_in_the_projectors_own_precision(tmp_path):
    """transformers loads a checkpoint in the dtype that it is stored in."""
    trainer = trainer_of("llama", tmp_path, max_steps=1)
    trainer.model.to(torch.bfloat16)
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])
