"""The trainer: token-exact losses, path training by the plans of from_chain, checkpoints that are whole, resuming bit for bit."""

import dataclasses
import json
import os

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import ONE_FAMILY
from datasets import Dataset, DatasetDict
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from cbd_hub import ChainDistiller, ChainDistillerConfig
from cbd_hub.chain import ChainBuilder
from cbd_hub.cut import Cut, cut_model, measure_importance
from cbd_hub.distill.path import path_plan
from cbd_hub.errors import ArchitectureError, ArgumentError, DataError, TrainingError, VocabularyMismatchError
from cbd_hub.evaluation import Documents
from cbd_hub.hub import open_chain
from cbd_hub.interpolation.live import Between, check_head
from cbd_hub.links import plain_link
from cbd_hub.manifest import Blend
from cbd_hub.plans import plan_in
from cbd_hub.precision import has_bf16
from cbd_hub.shapes import shape_of


def rows(count=16, seed=0):
    """Rows of unequal length with masked labels, so that a mean of means would be wrong."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = draw.integers(4, tiny.VOCAB, size=draw.integers(5, 24)).tolist()
        labels = [-100 if draw.random() < 0.3 else token for token in ids]
        made.append({"input_ids": ids, "labels": labels})
    return Dataset.from_list(made)


def student_of(teacher, shape=None):
    documents = Documents.packed(tiny.texts(20), tiny.tokenizer(), 32, 256)
    importance = measure_importance(teacher, documents, bf16=False)
    shape = shape or {"layers": 2, "ffn": 24}
    cut = Cut.of(teacher, shape_of(teacher.config).model_copy(update=shape), importance, "teacher")
    return cut_model(teacher, cut.plan), cut.kept


def trainer_for(family, folder, dataset=None, shape=None, eval_dataset=None, **options):
    teacher = tiny.FAMILIES[family]()
    student, kept = student_of(teacher, shape)
    arguments = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "bf16": False, "disable_tqdm": True,
        "save_strategy": "no", "optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1, **options,
    }
    return ChainDistiller(
        model=student, teacher=teacher, args=ChainDistillerConfig(**arguments), train_dataset=dataset or rows(), eval_dataset=eval_dataset,
        processing_class=tiny.tokenizer(), kept=kept,
    )


def weights(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}


def dense_loss(student, teacher, batch, temperature, kd, ce):
    """The loss with everything spelt out on full logits."""
    ours, theirs = (model(batch["input_ids"], attention_mask=batch.get("attention_mask")).logits[:, :-1].double() for model in (student, teacher))
    labels = batch["labels"][:, 1:]
    keep = labels != -100
    p, q = (theirs / temperature).softmax(-1), (ours / temperature).log_softmax(-1)
    divergence = temperature**2 * (p * (p.log() - q)).sum(-1)[keep].sum()
    return (kd * divergence + ce * F.cross_entropy(ours.transpose(1, 2), labels, reduction="sum")) / keep.sum()


def test_the_loss_is_the_dense_reference(family, tmp_path):
    trainer = trainer_for(family, tmp_path, temperature=2.0, kd_weight=0.7, ce_weight=0.3)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    trainer.model.train()
    value = trainer.compute_loss(trainer.model, batch)
    expected = dense_loss(trainer.model, trainer.teacher, batch, 2.0, 0.7, 0.3)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    names, parameters = zip(*trainer.model.named_parameters())
    for name, got, want in zip(names, torch.autograd.grad(value, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-3, atol=1e-6, msg=name)


@ONE_FAMILY
@pytest.mark.parametrize("options", [{}, {"ce_weight": 0.5, "temperature": 2.0}, {"hidden_weight": 1.0}, {"path_fraction": 0.7}])
def test_eight_by_one_is_one_by_eight(family, tmp_path, options):
    """Accumulating eight batches of one row makes the same update as one batch of eight."""
    whole = trainer_for(family, tmp_path / "a", **options)
    pieces = trainer_for(family, tmp_path / "b", **options, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    whole.train()
    pieces.train()
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(pieces)[name], rtol=1e-4, atol=1e-6, msg=name)
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, pieces)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_padding_changes_nothing(family, tmp_path):
    trainer = trainer_for(family, tmp_path)
    trainer.model.eval()
    row = trainer.train_dataset[0]
    alone = trainer.compute_loss(trainer.model, trainer.data_collator([row]))
    padded = {key: F.pad(value, (0, 7), value={"labels": -100}.get(key, 0)) for key, value in trainer.data_collator([{**row, "attention_mask": [1] * len(row["input_ids"])}]).items()}
    torch.testing.assert_close(trainer.compute_loss(trainer.model, padded), alone)


def chain_of(trainer, folder):
    """Teacher and student of a trainer as a chain of which nothing was measured."""
    segment = trainer._segment
    builder = ChainBuilder(folder, "chain")
    for name, model in (("large", trainer.teacher), ("small", trainer.model)):
        tiny.save(model, builder.anchor_folder(name))
    large, small = builder.record("large", origin="source"), builder.record("small", origin="cut", parent="large", maps=builder.save_kept("small", segment.kept))
    builder.finish([large, small], [plain_link(small, large, segment.order, Blend())], None)
    return folder


def test_path_training_uses_the_plans_of_from_chain(family, tmp_path):
    """With path_fraction 1 the loss is that of the chain's plan of a size drawn from seed and step alone."""
    trainer = trainer_for(family, tmp_path, path_fraction=1.0)
    files = open_chain(chain_of(trainer, tmp_path / "chain"))
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    seen = set()
    for step in range(12):
        trainer.state.global_step = step
        plan, again = trainer._path_plan(), trainer._path_plan()
        if plan is None:
            continue
        assert plan.summary() == again.summary()
        seen.add(plan.parameters)
        low, high = trainer._segment.sizes
        assert low < plan.parameters < high
        expected_plan = plan_in(files, plan.parameters)
        assert (plan.shape, plan.strategy) == (expected_plan.shape, expected_plan.strategy)
        names = {"student": expected_plan.small, "teacher": expected_plan.large}
        ours = {key: [dataclasses.replace(term, anchor=names[term.anchor]) for term in terms] for key, terms in plan.tensors.items()}
        assert repr(ours) == repr({key: list(terms) for key, terms in expected_plan.tensors.items()})
        output = Between({"student": trainer.model, "teacher": trainer.teacher}).run(plan)(batch["input_ids"])
        logits, target = output.hidden @ output.head.weight.T, trainer.teacher(batch["input_ids"]).logits
        keep = batch["labels"][:, 1:] != -100
        p = target[:, :-1][keep].softmax(-1)
        expected = (p * (p.log() - logits[:, :-1][keep].log_softmax(-1))).sum() / keep.sum()
        torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=1e-4, atol=1e-6)
    assert len(seen) > 6


def test_path_training_of_depth_is_module_replacing(tmp_path):
    """Where only layers differ the in-between models are patches: whole blocks put back."""
    trainer = trainer_for("llama", tmp_path, shape={"layers": 2, "ffn": 48}, path_fraction=1.0)
    plans = [path_plan(trainer._segment, size) for size in range(*trainer._segment.sizes, 500)]
    assert {None if plan is None else plan.strategy for plan in plans} == {None, "patch"}  # None: nearest to student or teacher itself
    trainer.train()


def test_evaluation_measures_the_student_not_the_path(family, tmp_path):
    trainer = trainer_for(family, tmp_path, path_fraction=1.0)
    trainer.eval_dataset = rows(4, seed=5)
    first = trainer.evaluate()["eval_loss"]
    trainer.args.path_fraction = 0.0
    assert trainer.evaluate()["eval_loss"] == first


def test_hidden_term_matches_the_end_of_each_block(tmp_path):
    trainer = trainer_for("llama", tmp_path, hidden_weight=3.0, hidden_loss="mse")
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    value = trainer.compute_loss(trainer.model, batch)
    ours = trainer.model(batch["input_ids"], output_hidden_states=True).hidden_states
    theirs = trainer.teacher(batch["input_ids"], output_hidden_states=True).hidden_states
    kept = [int(layer) for layer in trainer.kept.layers]
    ends = [kept[1] - 1, 3]
    keep = torch.zeros_like(batch["labels"], dtype=torch.bool)
    keep[:, :-1] = batch["labels"][:, 1:] != -100
    term = 0
    for state, end in zip(ours[1:], ends):
        a, b = state[keep], theirs[end + 1][keep]
        term += ((a - b).square().mean(-1) / b.square().mean(-1)).mean() / 2
    plain = dense_loss(trainer.model, trainer.teacher, batch, 1.0, 1.0, 0.0)
    torch.testing.assert_close(value.double(), plain + 3.0 * term.double(), rtol=1e-5, atol=1e-6)


def test_all_terms_take_one_pass_and_no_dense_logits(tmp_path, monkeypatch):
    """Divergence, cross-entropy and hidden states on a CPU: the value is the dense one, each model runs once, and no tensor has more rows of logits than a block."""
    monkeypatch.setattr("cbd_hub.losses.head.block_rows", lambda *_: 4)
    trainer = trainer_for("llama", tmp_path, kd_weight=0.7, ce_weight=0.3, temperature=2.0, hidden_weight=0.5, hidden_loss="mse")
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    trainer.model.train()
    passes = []
    for model in (trainer.model, trainer.teacher):
        model.get_input_embeddings().register_forward_hook(lambda *_, model=model: passes.append(model))

    watch = tiny.Widest()
    with watch:
        value = trainer.compute_loss(trainer.model, batch)
        value.backward()
    assert passes == [trainer.model, trainer.teacher] or passes == [trainer.teacher, trainer.model]
    keep = torch.zeros_like(batch["labels"], dtype=torch.bool)
    keep[:, :-1] = batch["labels"][:, 1:] != -100
    assert int(keep.sum()) > 64
    assert 0 < watch.rows <= 32  # 32 rows of V are the head's own gradient, (V, H) transposed
    ours, theirs = (model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True).hidden_states for model in (trainer.model, trainer.teacher))
    ends = [int(trainer.kept.layers[1]) - 1, 3]
    hidden = sum(((a[keep] - theirs[end + 1][keep]).square().mean(-1) / theirs[end + 1][keep].square().mean(-1)).mean() / 2 for a, end in zip(ours[1:], ends))
    expected = dense_loss(trainer.model, trainer.teacher, batch, 2.0, 0.7, 0.3) + 0.5 * hidden.double()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_it_is_a_transformers_trainer(tmp_path):
    """Its arguments, callbacks and logs are those of transformers, and what it saves is loaded by transformers."""
    seen = []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((state.global_step, args is trainer.args, kwargs["model"] is trainer.model))

    trainer = trainer_for("llama", tmp_path / "out")
    assert isinstance(trainer, Trainer)
    assert isinstance(trainer.args, TrainingArguments)
    trainer.add_callback(Note())
    done = trainer.train()
    assert seen == [(1, True, True), (2, True, True)]
    assert done.training_loss == pytest.approx(np.mean([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]), rel=1e-4)
    trainer.save_model(tmp_path / "saved")
    assert tiny.same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), trainer.model)


def test_the_teacher_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("cbd_hub.distill.config.has_bf16", lambda device: True)
    trainer = trainer_for("llama", tmp_path, bf16=True)
    teacher = tiny.llama()
    for name, tensor in trainer._between._models["teacher"].named_parameters():
        assert torch.equal(tensor, teacher.get_parameter(name))
    trainer.train()
    assert trainer.teacher.dtype == trainer.teacher.config.dtype == torch.bfloat16
    assert trainer.teacher.base_model.rotary_emb.inv_freq.dtype == torch.float32, "as where transformers loads one in bf16"
    assert trainer.model.dtype == torch.float32


def resumed(family, folder, stop, **options):
    """Weights after six steps, stopped after ``stop`` and resumed from the last checkpoint."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "lr_scheduler_type": "cosine", "per_device_train_batch_size": 3, **options}
    return weights(tiny.stopped_and_resumed(lambda: trainer_for(family, folder, **options), folder, stop))


def test_cross_entropy_alone_does_not_run_the_teacher(tmp_path):
    runs = []
    for weight in (0.0, 0.5):
        trainer = trainer_for("llama", tmp_path, kd_weight=weight, ce_weight=1.0)
        trainer.teacher.model.register_forward_hook(lambda *_: runs[-1].append(1))
        runs.append([])
        trainer.train()
    assert [len(found) for found in runs] == [0, 2]


@ONE_FAMILY
@pytest.mark.parametrize("stop", [3, 5])
def test_stopped_and_resumed_equals_never_stopped(family, tmp_path, stop):
    whole, again = resumed(family, tmp_path / "a", 0, path_fraction=0.5), resumed(family, tmp_path / "b", stop, path_fraction=0.5)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    """Killed while it writes a checkpoint, the trainer leaves only the older one, and the next save works."""
    trainer = trainer_for("llama", tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    real = trainer._save_rng_state
    monkeypatch.setattr(trainer, "_save_rng_state", lambda folder: real(folder) if trainer.state.global_step == 2 else (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert get_last_checkpoint(tmp_path).endswith("checkpoint-2")
    again = trainer_for("llama", tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=get_last_checkpoint(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "metrics.jsonl"]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4


def test_checkpoints_of_a_longer_run_before_are_the_ones_that_go(tmp_path):
    trainer_for("llama", tmp_path, max_steps=8, save_strategy="steps", save_steps=4).train()
    os.utime(tmp_path / "checkpoint-8", (0, 0))
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))

    trainer = trainer_for("llama", tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.add_callback(Look())
    trainer.train()
    assert seen == [["checkpoint-2"], ["checkpoint-4"]]


@pytest.mark.parametrize("every", sorted(tiny.EVERY))
def test_the_tokens_of_a_step_are_those_that_are_predicted(every, tmp_path):
    """A row's first token is predicted by nothing, whatever transformers thinks of an architecture's loss."""
    given = [{"input_ids": row["input_ids"][:4]} for row in rows(4)]
    config = ChainDistillerConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=4, bf16=False, disable_tqdm=True, logging_steps=1, save_strategy="no")
    student, teacher = tiny.EVERY[every](layers=2, seed=5), tiny.EVERY[every](layers=2, seed=6)
    trainer = ChainDistiller(model=student, teacher=teacher, args=config, train_dataset=Dataset.from_list(given))
    expected = float(dense_loss(student.eval(), trainer.teacher, trainer.data_collator(given), 1.0, 1.0, 0.0))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_step_in_which_nothing_counts_is_one_of_loss_zero(tmp_path):
    given = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, -100, -100]}] * 8)
    trainer = trainer_for("llama", tmp_path, dataset=given, max_steps=1)
    before = weights(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0.0
    assert all(torch.equal(before[name], after) for name, after in weights(trainer).items())


def test_text_columns_are_packed(tmp_path):
    trainer = trainer_for("llama", tmp_path, dataset=Dataset.from_dict({"text": tiny.texts(30)}), block_size=16)
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {16}
    trainer.train()


@pytest.mark.parametrize(("options", "looked_for"), [({}, None), ({"path_fraction": 0.5}, True), ({"kd_weight": 0.0, "ce_weight": 0.0, "hidden_weight": 1.0}, True), ({"path_fraction": 0.5, "ddp_find_unused_parameters": False}, False)])
def test_processes_look_for_weights_that_a_step_leaves_out(tmp_path, options, looked_for):
    """Also with gradient checkpointing, where the Trainer would not."""
    assert ChainDistillerConfig(str(tmp_path), gradient_checkpointing=True, **options).ddp_find_unused_parameters is looked_for


def test_a_path_through_two_dtypes_is_refused_or_autocast(tmp_path):
    teacher = tiny.llama()
    student, kept = student_of(teacher)
    teacher.to(torch.bfloat16)
    config = {"max_steps": 1, "path_fraction": 1.0, "per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True}
    with pytest.raises(ArgumentError, match=r"torch\.bfloat16, with the student's, torch\.float32.*load both in one dtype"):
        ChainDistiller(model=student, teacher=teacher, args=ChainDistillerConfig(str(tmp_path), **config), train_dataset=rows(), kept=kept)


def test_wrong_calls_are_named(tmp_path):
    teacher = tiny.llama()
    config = ChainDistillerConfig(str(tmp_path), max_steps=1)
    with pytest.raises(ArgumentError, match="needs kept="):
        ChainDistiller(model=tiny.llama(), teacher=teacher, args=ChainDistillerConfig(str(tmp_path), path_fraction=0.5), train_dataset=rows())
    other = tiny.llama()
    other.resize_token_embeddings(300)
    with pytest.raises(VocabularyMismatchError, match="300 and the teacher of 260"):
        ChainDistiller(model=other, teacher=teacher, args=config, train_dataset=rows())
    other.resize_token_embeddings(200)
    with pytest.raises(VocabularyMismatchError, match="tokenizer needs 260 rows.*bridge"):
        ChainDistiller(model=other, teacher=teacher, args=config, train_dataset=rows(), processing_class=tiny.tokenizer())
    with pytest.raises(DataError, match="columns words but no tokenizer"):
        ChainDistiller(model=tiny.llama(), teacher=teacher, args=config, train_dataset=Dataset.from_dict({"words": ["a"]}))


@pytest.mark.parametrize(("field", "value"), [("divergence", "kl"), ("temperature", 0.0), ("beta", 1.0), ("kd_weight", -1.0), ("path_fraction", 1.5), ("hidden_loss", "l1"), ("block_size", 1)])
def test_config_refuses_values_outside_their_range(field, value, tmp_path):
    with pytest.raises(ArgumentError, match=field):
        ChainDistillerConfig(str(tmp_path), **{field: value})


def test_cut_keeps_the_most_important_units(family):
    """What a cut drops is what calibration text says matters least, and the kept neurons are a prefix of the order."""
    teacher = tiny.FAMILIES[family]()
    documents = Documents.packed(tiny.texts(30), tiny.tokenizer(), 32, 512)
    importance = measure_importance(teacher, documents, bf16=False)
    kept = importance.kept(shape_of(teacher.config).model_copy(update={"layers": 2, "ffn": 24}))
    assert set(kept.layers) == set(np.argsort(-importance.layers)[:2])
    for layer in range(4):
        assert np.all(np.diff(importance.ffn[layer][kept.ffn[layer]]) <= 0)
    whole = Cut.of(teacher, shape_of(teacher.config), importance, "t")
    same = cut_model(teacher, whole.plan)
    ids = torch.randint(4, 260, (1, 12))
    torch.testing.assert_close(same(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-5)


def test_importance_is_its_definition(family):
    """Root mean square of the activation x output norm, and 1 - cosine of a layer's input and output, by hand on one batch."""
    teacher = tiny.FAMILIES[family]()
    documents = Documents.packed(tiny.texts(30), tiny.tokenizer(), 16, 64)
    importance = measure_importance(teacher, documents, bf16=False)
    ids = torch.stack(documents.ids)
    states = teacher(ids, output_hidden_states=True).hidden_states
    influence = 1 - F.cosine_similarity(states[1], states[2], dim=-1).mean()
    assert importance.layers[1] == pytest.approx(float(influence.detach()), rel=1e-4)
    block = teacher.base_model.layers[1] if family == "llama" else teacher.base_model.h[1]
    caught = {}
    down = block.mlp.down_proj if family == "llama" else block.mlp.c_proj
    hook = down.register_forward_pre_hook(lambda module, inputs: caught.update(x=inputs[0]))
    teacher(ids)
    hook.remove()
    norm = down.weight.norm(dim=0 if family == "llama" else 1)
    expected = caught["x"].square().mean((0, 1)).sqrt() * norm
    np.testing.assert_allclose(importance.ffn[1], expected.detach().numpy(), rtol=1e-4)


def test_padded_vocabularies_are_cut_to_the_tokenizer(tmp_path, caplog):
    """Heads padded to 300 and 280 rows are compared on the tokenizer's 260, and padded rows get no gradient."""
    student, teacher = tiny.llama(seed=1), tiny.llama()
    student.resize_token_embeddings(300)
    teacher.resize_token_embeddings(280)
    config = ChainDistillerConfig(str(tmp_path), max_steps=1, bf16=False, disable_tqdm=True)
    with caplog.at_level("INFO", "cbd_hub.distill.wiring"):
        trainer = ChainDistiller(model=student, teacher=teacher, args=config, train_dataset=rows(), processing_class=tiny.tokenizer())
    assert "260" in caplog.text
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    value = trainer.compute_loss(student, batch)
    ours, theirs = (model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1, :260] for model in (student, teacher))
    keep = batch["labels"][:, 1:] != -100
    p = theirs[keep].softmax(-1)
    torch.testing.assert_close(value, (p * (p.log() - ours[keep].log_softmax(-1))).sum() / keep.sum(), rtol=1e-4, atol=1e-5)
    value.backward()
    assert not student.lm_head.weight.grad[260:].any()
    teacher.resize_token_embeddings(320)
    assert ChainDistiller(model=student, teacher=teacher, args=config, train_dataset=rows(), processing_class=tiny.tokenizer(gap=10))._vocab_size == 270, "its highest token is 269"


def test_a_loss_that_is_no_number_stops_with_the_batch_named(tmp_path):
    trainer = trainer_for("llama", tmp_path)
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"nan at step 0 on the batch that begins with tokens \["):
        trainer.train()


def test_metrics_are_written_line_by_line_also_after_a_resume(tmp_path):
    resumed("llama", tmp_path / "a", 0)
    resumed("llama", tmp_path / "b", 3)
    first, second = ((tmp_path / name / "metrics.jsonl").read_text() for name in "ab")
    assert first == second
    lines = [json.loads(line) for line in first.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "learning_rate", "grad_norm"} <= line.keys() for line in lines)


@pytest.mark.parametrize("options", [{"save_strategy": "epoch", "logging_steps": 3}, {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "logging_steps": 5}])
def test_metrics_are_the_same_after_a_resume_wherever_checkpoints_are_made(tmp_path, options):
    """Also where the end of an epoch or an evaluation decides on them, between two log lines."""
    for name, stop in (("a", 0), ("b", 5)):
        resumed("llama", tmp_path / name, stop, per_device_train_batch_size=8, eval_dataset=rows(8, seed=1), **options)
    first, second = ((tmp_path / name / "metrics.jsonl").read_text() for name in "ab")
    assert first == second
    assert json.loads(first.splitlines()[0])["step"] == 2


def lora(**more):
    from peft import LoraConfig
    return LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **more)


def adapted(family, folder, peft_config, **options):
    teacher = tiny.FAMILIES[family]()
    config = ChainDistillerConfig(str(folder), max_steps=2, bf16=False, disable_tqdm=True, save_strategy="no", **options)
    return ChainDistiller(model=tiny.FAMILIES[family](layers=2, seed=3), teacher=teacher, args=config, train_dataset=rows(), processing_class=tiny.tokenizer(), peft_config=peft_config)


def test_lora_students_learn_and_nothing_else_moves(family, tmp_path):
    trainer = adapted(family, tmp_path, lora(target_modules={"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}[family], fan_in_fan_out=family == "gpt2"))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    trainer.model.eval()
    expected = dense_loss(trainer.model, trainer.teacher, batch, 1.0, 1.0, 0.0)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch).double(), expected, rtol=1e-4, atol=1e-6)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_trainer_that_cannot_be_made_leaves_no_adapter(tmp_path):
    model = tiny.llama(layers=2)
    names = set(model.state_dict())
    with pytest.raises(DataError, match="does not fill one block"):
        ChainDistiller(
            model=model, teacher=tiny.llama(), args=ChainDistillerConfig(str(tmp_path), block_size=64), train_dataset=Dataset.from_list([{"text": "few"}]),
            processing_class=tiny.tokenizer(), peft_config=lora(target_modules=["q_proj"]),
        )
    assert set(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("tied", "targets", "path", "message"), [
    (False, ["q_proj", "lm_head"], 0.0, "adapter is on the output head"), (True, ["q_proj", "embed_tokens"], 0.0, "changes the embedding, whose weights the output head shares"),
    (True, ["q_proj"], 0.5, "path_fraction trains the student's own weights, and this student trains an adapter"),
])
def test_a_student_that_comes_with_an_adapter_is_looked_at_too(tmp_path, tied, targets, path, message):
    from peft import get_peft_model
    teacher = tiny.llama(tied=tied)
    student, kept = student_of(teacher)
    student = get_peft_model(student, lora(target_modules=targets))
    with pytest.raises(ArgumentError, match=message):
        ChainDistiller(model=student, teacher=teacher, args=ChainDistillerConfig(str(tmp_path), path_fraction=path, bf16=False), train_dataset=rows(), kept=kept)


def test_adapters_that_the_loss_cannot_follow_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match="output head"):
        adapted("llama", tmp_path, lora(target_modules=["q_proj", "lm_head"]))
    teacher = tiny.llama()
    student, kept = student_of(teacher)
    with pytest.raises(ArgumentError, match="path_fraction"):
        ChainDistiller(model=student, teacher=teacher, args=ChainDistillerConfig(str(tmp_path), path_fraction=0.5), train_dataset=rows(), kept=kept, peft_config=lora(target_modules=["q_proj"]))


def test_gradient_checkpointing_changes_no_update(family, tmp_path):
    plain, saving = (trainer_for(family, tmp_path / name, gradient_checkpointing=on, path_fraction=0.5) for name, on in (("a", False), ("b", True)))
    plain.train()
    saving.train()
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(tensor, weights(saving)[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("path", [0.0, 1.0])
def test_gradient_checkpointing_keeps_less_on_the_path_too(tmp_path, path):
    kept = {}
    for on in (False, True):
        trainer = trainer_for("llama", tmp_path / str(on), shape={"layers": 3, "ffn": 24}, gradient_checkpointing=on, path_fraction=path)
        if on:
            trainer.model.gradient_checkpointing_enable()
        trainer.model.train()
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
        own, found = {parameter.untyped_storage().data_ptr() for model in (trainer.model, trainer._neighbour or trainer.teacher) for parameter in model.parameters()}, {}

        def note(tensor, own=own, found=found):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = trainer.compute_loss(trainer.model, batch)
        kept[on] = sum(found.values()), loss
    assert kept[True][0] < 0.7 * kept[False][0]
    torch.testing.assert_close(kept[True][1], kept[False][1])


def test_evaluation_is_a_mean_per_kept_token(tmp_path):
    """Of batches of unequal numbers of kept tokens, and of several sets by name."""
    held = rows(11, seed=5)
    trainer = trainer_for("llama", tmp_path, per_device_eval_batch_size=4)
    batch = trainer.data_collator([held[index] for index in range(11)])
    expected = float(dense_loss(trainer.model.eval(), trainer.teacher, batch, 1.0, 1.0, 0.0))
    assert trainer.evaluate(held)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.predict(held).metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
    found = trainer.evaluate({"a": held, "b": Dataset.from_dict({"text": tiny.texts(9)})})
    assert found["eval_a_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["eval_b_loss"] > 0
    with pytest.raises(DataError, match="no token of the evaluation set counts"):
        trainer.evaluate([{"input_ids": [5, 6], "labels": [-100, -100]}])


def test_evaluation_sets_by_name_are_packed_like_the_training_set(tmp_path):
    arguments = ChainDistillerConfig(str(tmp_path), max_steps=1, bf16=False, block_size=16, save_strategy="no", eval_strategy="steps", eval_steps=1, disable_tqdm=True)
    sets = {"texts": [{"text": text} for text in tiny.texts(5)], "rows": rows(3)}
    trainer = ChainDistiller(model=tiny.llama(layers=2), teacher=tiny.llama(), args=arguments, train_dataset=rows(), eval_dataset=sets, processing_class=tiny.tokenizer())
    trainer.train()
    assert {"eval_texts_loss", "eval_rows_loss"} <= {key for entry in trainer.state.log_history for key in entry}


@pytest.mark.parametrize(("row", "message"), [
    ({"text": 5}, "row 1: text is no text but int"), ({"text": None}, "row 1: text is no text but None"), ({"words": "a"}, "row 1: a row has the columns words"),
    ({"messages": [{"role": "user"}]}, r"row 1: messages\[0\] has no content"), ({"prompt": "a", "completion": None}, "row 1: completion is no text but None"),
])
def test_wrong_rows_are_named_by_number_and_column(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        trainer_for("llama", tmp_path, dataset=[{"text": "a"}, row])


def test_rows_beyond_the_models_positions_are_refused(family, tmp_path):
    with pytest.raises(ArgumentError, match="block_size=300 is more than the model's 256 positions"):
        trainer_for(family, tmp_path, dataset=[{"text": "word " * 200}], block_size=300)
    trainer = trainer_for(family, tmp_path, dataset=Dataset.from_list([{"input_ids": [5] * 260}]))
    with pytest.raises(ArgumentError, match="a row of 260 tokens is more than the model's 256 positions"):
        trainer.train()


def test_what_would_never_be_called_is_refused(tmp_path):
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "model_init"):
        with pytest.raises(ArgumentError, match=f"{name} would never be called"):
            ChainDistiller(model=tiny.llama(), teacher=tiny.llama(), args=ChainDistillerConfig(str(tmp_path)), train_dataset=rows(), **{name: len})


def test_teachers_that_cannot_be_one_are_said(tmp_path):
    from peft import PromptTuningConfig, get_peft_model
    student, teacher = tiny.llama(layers=2, seed=3), tiny.llama()
    for pair, message in (
        ((student, get_peft_model(tiny.llama(), lora())), "teacher has an adapter.*merge_and_unload"), ((teacher, teacher), "student and teacher are one model"),
        ((get_peft_model(teacher, lora()), teacher), "student and teacher are one model"),
        ((get_peft_model(student, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), tiny.llama()), "prompt learning changes the sequence"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ChainDistiller(model=pair[0], teacher=pair[1], args=ChainDistillerConfig(str(tmp_path), max_steps=1), train_dataset=rows())


def test_what_cannot_be_trained_is_said(tmp_path, caplog):
    def made(student=None, dataset=None):
        config = ChainDistillerConfig(str(tmp_path), max_steps=1, bf16=False)
        return ChainDistiller(model=student or tiny.llama(layers=2), teacher=tiny.llama(), args=config, train_dataset=rows() if dataset is None else dataset)

    with pytest.raises(DataError, match="has no rows"):
        made(dataset=[])
    config = tiny.llama(layers=2).config
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    with pytest.raises(ArgumentError, match="meta device"):
        made(student=empty)
    with pytest.raises(ArgumentError, match="is no checkpoint of a trainer"):
        made().train(resume_from_checkpoint=str(tmp_path / "none"))
    made(student=tiny.llama(layers=2).to(torch.bfloat16))
    assert "weights are in bfloat16, whose rounding loses small steps" in caplog.text


def test_bare_texts_are_no_rows(tmp_path):
    with pytest.raises(DataError, match="rows are no mappings but str; give some such as"):
        ChainDistiller(model=tiny.llama(layers=2), teacher=tiny.llama(), args=ChainDistillerConfig(str(tmp_path)), train_dataset=tiny.texts(3), processing_class=tiny.tokenizer())


def test_splits_are_no_data_to_train_on(tmp_path):
    with pytest.raises(ArgumentError, match=r"has the splits train, test; pass one of them, such as train_dataset\["):
        ChainDistiller(model=tiny.llama(), teacher=tiny.llama(), args=ChainDistillerConfig(str(tmp_path)), train_dataset=DatasetDict(train=rows(), test=rows()))


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_a_push_of_the_optimiser_is_refused(tmp_path, strategy):
    with pytest.raises(ArgumentError, match=f"hub_strategy={strategy} would push the optimiser's state"):
        ChainDistillerConfig(str(tmp_path), push_to_hub=True, hub_strategy=strategy)


def test_a_student_that_is_no_model_is_refused(tmp_path):
    for model in (None, "org/student"):
        with pytest.raises(ArgumentError, match=rf"model is a {type(model).__name__}; pass a loaded student"):
            ChainDistiller(model=model, teacher=tiny.llama(), args=ChainDistillerConfig(str(tmp_path)), train_dataset=rows())


def test_without_a_checkpoint_a_resume_starts_anew(tmp_path, caplog):
    trainer = trainer_for("llama", tmp_path / "out")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert "no whole checkpoint" in caplog.text


def test_an_adapters_card_says_what_it_belongs_on(tmp_path):
    from huggingface_hub import ModelCard

    student = tiny.llama(layers=2, seed=3)
    student.config._name_or_path = "org/student"
    config = ChainDistillerConfig(str(tmp_path), max_steps=2, bf16=False, disable_tqdm=True, save_strategy="no")
    trainer = ChainDistiller(model=student, teacher=tiny.llama(), args=config, train_dataset=rows(), peft_config=lora(target_modules=["q_proj"]))
    card = ModelCard(trainer._card("org/adapter"))
    assert (card.data.library_name, card.data.base_model, card.data["base_model_relation"]) == ("peft", "org/student", "adapter")
    assert "An adapter of 512 parameters for org/student" in card.text
    assert "ordinary" not in card.text
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/student"), "org/adapter")' in card.text


def test_a_device_without_float64_gets_none(monkeypatch, tmp_path):
    """The loss with fp32 as the widest type makes no float64 tensor at all."""
    from cbd_hub.losses import head

    class Narrow(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            assert not isinstance(made, torch.Tensor) or made.dtype != torch.float64, func
            return made

    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8)
    labels = torch.arange(5)
    whole = head.distillation_loss(hidden, weight, hidden.detach() + 1, weight, labels, ce_weight=1.0)
    monkeypatch.setattr(head, "widest", lambda device: torch.float32)
    with Narrow():
        narrow = head.distillation_loss(hidden, weight, hidden.detach() + 1, weight, labels, ce_weight=1.0)
        narrow.backward()
    torch.testing.assert_close(narrow, whole)


@pytest.mark.parametrize("kind", ["granite", "cohere", "hyperclovax"])
def test_scaled_logits_are_the_models_own(kind):
    shape = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    field = "logit_scale" if kind == "cohere" else "logits_scaling"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **{field: 3.0}, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    check_head(model)
    setattr(model.config, field, 1.5)
    if kind != "cohere":  # which keeps its own copy of the factor
        check_head(model)
    else:
        with pytest.raises(ArchitectureError, match="its logits are not what its output head makes"):
            check_head(model)


def test_a_model_that_does_more_to_its_logits_is_refused(tmp_path):
    class Louder(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = 3 * found.logits
            return found

    student = tiny.llama(layers=2)
    teacher = Louder(tiny.llama().config)
    with pytest.raises(ArchitectureError, match="Louder: its logits"):
        ChainDistiller(model=student, teacher=teacher, args=ChainDistillerConfig(str(tmp_path)), train_dataset=rows())


def test_a_trained_model_writes_with_its_cache_and_generates_as_its_teacher(tmp_path):
    """The Trainer switches use_cache off in the config, which is saved with the model; a cut takes over the teacher's way of generating."""
    teacher = tiny.llama()
    teacher.generation_config.update(eos_token_id=[2, 5], temperature=0.6, top_p=0.9, do_sample=True)
    student, kept = student_of(teacher)
    args = ChainDistillerConfig(str(tmp_path), max_steps=1, bf16=False, disable_tqdm=True)
    trainer = ChainDistiller(model=student, teacher=teacher, args=args, train_dataset=rows(), processing_class=tiny.tokenizer(), kept=kept)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    for folder in (tmp_path / "saved", get_last_checkpoint(str(tmp_path))):
        found = AutoModelForCausalLM.from_pretrained(folder)
        assert found.config.use_cache is True
        assert (sorted(found.generation_config.eos_token_id), found.generation_config.temperature, found.generation_config.top_p) == ([2, 5], 0.6, 0.9)
        assert found.generation_config.use_cache is not False


def test_a_cut_takes_over_no_way_of_generating_that_could_not_be_saved():
    teacher = tiny.llama()
    teacher.generation_config.temperature = 0.6  # without sampling
    student, _ = student_of(teacher)
    assert student.generation_config.temperature != 0.6


def test_one_process_beside_several_accelerators_trains_on_one(tmp_path, monkeypatch, caplog):
    """The Trainer would hand parts of a batch to DataParallel, and the count of its kept tokens as one number each."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: self.__dict__.get("_n_gpu") or 2))
    trainer = trainer_for("llama", tmp_path)
    assert "accelerate launch" in caplog.text
    assert trainer.args.n_gpu == 1
    trainer.train()


def test_a_finished_run_that_is_resumed_has_its_best_weights_again(tmp_path):
    """Which is not the last one: here the first evaluation is made to count as the best."""
    def make():
        options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
        return trainer_for("llama", tmp_path, eval_dataset=rows(4, seed=1), **options)

    first, again = make(), make()
    first.train()
    assert first.state.best_model_checkpoint.endswith("checkpoint-2")
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(first).items())


@pytest.mark.skipif(not has_bf16("cpu"), reason="without bf16 instructions training is in fp32, which leaves attention as it is")
def test_steps_on_the_path_have_the_short_attention_of_the_others(tmp_path):
    trainer, seen = trainer_for("llama", tmp_path, bf16=True, path_fraction=1.0), []
    run = trainer._between.run

    def watched(plan):
        seen.extend(model.config._attn_implementation for model in trainer._between._models.values())
        return run(plan)

    trainer._between.run = watched
    trainer.train()
    assert set(seen) == {"eager"}
    assert trainer._neighbour.config._attn_implementation == "sdpa"
