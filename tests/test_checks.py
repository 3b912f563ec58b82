"""A recipe checked as a whole before it trains, corrected in between, and kept to one process."""

import json

import numpy as np
import pytest
import tiny
import torch
import yaml
from conftest import recipe as make_recipe
from safetensors.torch import load_file
from typer.testing import CliRunner

from cbd_hub import Chain, ChainDistillerConfig, distill_chain
from cbd_hub.cli import app
from cbd_hub.distill import recipe as recipe_module
from cbd_hub.distill.cache_command import cache_text
from cbd_hub.distill.dry_run import dry_run
from cbd_hub.distill.schema import Recipe
from cbd_hub.distill.stages import CALIBRATION_TOKENS, calibration_of, read_parts
from cbd_hub.errors import ArgumentError, CBDError, DataError, RecipeError, StorageError
from cbd_hub.evaluation import Documents, document_losses
from cbd_hub.files import held
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.shapes import parameter_count


ANCHORS = [{"layers": 3, "ffn": 24}, {"layers": 2, "ffn": 24}]
LAST = "layers=2,ffn=24"


def written(tmp_path, plain):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain, sort_keys=False))
    return path


def line_of(path, word):
    return max(number for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip().startswith(word))


@pytest.mark.parametrize(("own", "message"), [
    ({"hidden_layers": [5], "hidden_weight": 1.0}, "hidden_layers names layer 5, and the student has layers 0 to 1"),
    ({"rollout_batch": 7, "objective": "minillm"}, "rollout_batch=7 is no multiple of the 4 responses"),
    ({"auto_find_batch_size": True, "objective": "minillm"}, "auto_find_batch_size changes the responses of a step"),
    ({"eval_strategy": "steps"}, "eval_strategy=steps needs an evaluation set"),
    ({"eval_on_start": True}, "eval_on_start=True needs an evaluation set"),
    ({"num_train_epochs": 1.0}, "num_train_epochs is no setting of a recipe: a stage has max_steps"),
    ({"save_only_model": True}, "save_only_model is no setting of a recipe"), ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint is no setting of a recipe"),
    ({"seed": 1}, "seed is no setting of a recipe: a recipe has one"), ({"output_dir": "x"}, "output_dir is no setting of a recipe"),
    ({"include_num_input_tokens_seen": False}, "include_num_input_tokens_seen is no setting of a recipe"),
    ({"save_strategy": "best"}, "metric_for_best_model"),
    ({"teacher_cache": "/no/cache"}, "is no teacher cache"),
    ({"kd_weight": 0.0, "ce_weight": 0.0}, "kd_weight, ce_weight and hidden_weight are all 0"),
    ({"kd_weight": float("inf")}, "kd_weight=inf is no finite number"), ({"temperature": "2"}, "temperature='2' is no number"),
    ({"push_to_hub": True}, "push_to_hub is no setting of a recipe"), ({"save_steps": 0}, "save_steps=0 makes no checkpoint|save_steps=0 is refused"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1 is refused"), ({"gradient_checkpointing_kwargs": {"foo": 1}}, "gradient_checkpointing_kwargs has foo"),
    ({"neftune_noise_alpha": "5"}, "neftune_noise_alpha='5' is no number"), ({"learning_rate": -1.0}, "learning_rate=-1.0 is refused: Invalid learning rate"),
    ({"optim": "magic"}, "optim='magic' is refused: .*magic"), ({"lr_scheduler_type": "sideways"}, "lr_scheduler_type='sideways' is refused"), ({"logging_steps": 0}, "logging_steps=0 is refused"),
    ({"optim_args": {"foreach": True}}, "optim_args=.* is no text"),
    ({"block_size": 300}, "block_size=300 is more than the model's 256 positions"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not part"),
    ({"neftune_noise_alpha": 5.0, "path_fraction": 0.5}, "neftune_noise_alpha=5.0 is added to the student's own embedding"),
])
def test_a_later_stages_mistake_is_said_before_the_first_one_trains(tmp_path, own, message):
    path = written(tmp_path, {**make_recipe(tmp_path, "llama", ANCHORS), "stages": {LAST: own}})
    key = "save_strategy" if "save_strategy" in own else next(iter(own))
    for act in (lambda: distill_chain(path, tmp_path / "chain"), lambda: dry_run(Recipe.read(path))):
        with pytest.raises(CBDError, match=message) as caught:
            act()
        if key != "teacher_cache":  # whose message begins with a folder
            assert f"recipe.yaml line {line_of(path, key)}: " in str(caught.value)
        else:
            assert f"recipe.yaml line {line_of(path, LAST)}: " in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "chain").exists()


@pytest.mark.parametrize(("options", "said"), [
    ({"kd_weight": "1"}, "kd_weight='1' is no finite number"), ({"temperature": None}, "temperature=None is no finite number"), ({"ce_weight": True}, "ce_weight=True is no finite number"),
    ({"seed": "3"}, "seed='3' is no whole number"), ({"seed": 1.5}, "seed=1.5 is no whole number"),
])
def test_numbers_are_numbers(tmp_path, options, said):
    with pytest.raises(ArgumentError, match=said):
        ChainDistillerConfig(str(tmp_path), **options)
    assert ChainDistillerConfig(str(tmp_path), kd_weight=np.float32(0.5)).kd_weight == 0.5


@pytest.mark.parametrize("more", [{"lr_scheduler_type": "cosine_with_min_lr"}, {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"no_such": 1}}])
def test_a_schedule_that_cannot_be_is_said_before_the_first_stage_trains(tmp_path, more):
    path = written(tmp_path, {**make_recipe(tmp_path, "llama", ANCHORS), "stages": {LAST: more}})
    for act in (lambda: distill_chain(path, tmp_path / "chain"), lambda: dry_run(Recipe.read(path))):
        with pytest.raises(CBDError, match="min_lr|no_such"):
            act()
    assert not (tmp_path / "chain").exists()


def test_minillm_on_a_stream_is_said_before_work(tmp_path):
    plain = make_recipe(tmp_path, "llama", ANCHORS)
    stream = {**plain["data"], "streaming": True, "reserve": 40}
    with pytest.raises(DataError, match="objective=minillm needs its rows more than once"):
        distill_chain({**plain, "stages": {LAST: {"objective": "minillm", "rollout_batch": 8, "data": stream}}}, tmp_path / "chain")
    assert not (tmp_path / "chain").exists()


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run whose first anchor is finished and whose second one is not begun; its recipe."""
    plain = make_recipe(tmp_path, "llama", ANCHORS, stage={"max_steps": 2})
    real, calls = recipe_module.measure_segment, []

    def stopping(*args, **kwargs):
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe_module, "measure_segment", stopping)
    with pytest.raises(KeyboardInterrupt):
        distill_chain(plain, tmp_path / "chain")
    monkeypatch.setattr(recipe_module, "measure_segment", real)
    return plain


def test_a_corrected_recipe_keeps_what_is_finished(stopped, tmp_path, monkeypatch):
    """The chain is bit for bit that of the corrected recipe run at once, and the finished anchor is not trained again."""
    corrected = {**stopped, "stages": {LAST: {"learning_rate": 5e-4, "max_steps": 3}}}
    whole = distill_chain(corrected, tmp_path / "whole")
    trained, real = [], recipe_module.ChainDistiller
    monkeypatch.setattr(recipe_module, "ChainDistiller", lambda **kwargs: trained.append(kwargs["args"].max_steps) or real(**kwargs))
    again = distill_chain(corrected, tmp_path / "chain")
    assert trained == [3]
    assert {**again.manifest.model_dump(), "name": ""} == {**whole.manifest.model_dump(), "name": ""}
    for anchor in whole.anchors:
        one, two = (load_file(tmp_path / name / "anchors" / anchor.name / "model.safetensors") for name in ("whole", "chain"))
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("change", "message"), [
    ({"stage": {"learning_rate": 0.5}}, "stage.learning_rate=0.001, and the recipe has 0.5"), ({"data": {"heldout": 0.2}}, "data.heldout=0.1, and the recipe has 0.2"),
    ({"anchors": [{"layers": 3, "ffn": 20}]}, "which the recipe does not make"),
])
def test_a_recipe_that_changes_what_is_begun_is_refused(stopped, tmp_path, change, message):
    key, value = next(iter(change.items()))
    with pytest.raises(RecipeError, match=message):
        distill_chain({**stopped, key: {**stopped[key], **value} if isinstance(value, dict) else value}, tmp_path / "chain")


def test_a_second_run_on_one_folder_is_refused(stopped, tmp_path):
    with held(tmp_path / "chain" / ".work", "another"), pytest.raises(StorageError, match="is being written by another process"):
        distill_chain(stopped, tmp_path / "chain")
    assert (tmp_path / "chain" / ".work").is_dir()


def test_of_chats_the_answers_are_measured_alone(tmp_path):
    """The calibration loss is the dense cross-entropy of the answers' tokens, each in its own chat."""
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[: 3 + index % 9]}]} for index, text in enumerate(tiny.texts(90))]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = make_recipe(tmp_path, "llama", ANCHORS)
    read = Recipe.parse({**plain, "data": {**plain["data"], "path": str(tmp_path / "chat.jsonl"), "block_size": 250}})
    parts, tok, model = read_parts(read), tiny.tokenizer(), tiny.llama()
    documents = calibration_of(parts, tok, 250).documents
    nats = tokens = size = 0
    for row in parts.calibration:
        ids = torch.tensor([tok.apply_chat_template(row["messages"], tokenize=True, return_dict=False)])
        start = len(tok.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=True, return_dict=False))
        nats += float(torch.nn.functional.cross_entropy(model(ids).logits[0, start - 1 : -1], ids[0, start:], reduction="sum").detach())
        tokens += ids.shape[1] - start
        size += len(tok.decode(ids[0, start:]).encode())
    losses = document_losses(ModelRunner(model), documents, bf16=False)
    assert (documents.tokens, losses.tokens.sum(), sum(documents.lengths)) == (tokens, tokens, size)
    assert losses.mean == pytest.approx(nats / tokens, rel=1e-5)


def test_a_cache_is_made_of_a_stages_own_text(tmp_path):
    (tmp_path / "other.txt").write_text("\n\n".join(tiny.texts(60, seed=7)))
    own = {"data": {"path": str(tmp_path / "other.txt"), "heldout": 0.1, "calibration": 0.1}, "block_size": 16}
    plain = make_recipe(tmp_path, "llama", ANCHORS)
    path = written(tmp_path, {**plain, "stages": {LAST: own}})
    cache, _ = cache_text(plain["teacher"], tmp_path / "cache", recipe=path, anchor=LAST, top_k=4, quiet=True)
    assert cache.record.source.packing.block_size == 16
    assert cache.record.source.text.documents == 48
    with pytest.raises(ArgumentError, match="anchor 9M is none of this recipe"):
        cache_text(plain["teacher"], tmp_path / "none", recipe=path, anchor="9M", quiet=True)
    with pytest.raises(ArgumentError, match='"bad name" cannot be the name of a repo'):
        cache_text("/no/model", tmp_path / "none", recipe=path, push="bad name", quiet=True)


def test_a_dry_run_with_a_cache_counts_no_teacher_to_run(tmp_path, monkeypatch):
    """On a CPU the teacher itself waits in the same memory, in fp32; what is not there is its copy in bf16."""
    monkeypatch.setattr("cbd_hub.distill.config.has_bf16", lambda device: True)
    plain = make_recipe(tmp_path, "llama", ANCHORS[1:], stage={"bf16": True})
    live = dry_run(Recipe.parse(plain))[0]
    cache_text(plain["teacher"], tmp_path / "cache", recipe=written(tmp_path, plain), top_k=4, quiet=True)
    cached = dry_run(Recipe.parse({**plain, "stage": {**plain["stage"], "teacher_cache": str(tmp_path / "cache")}}))[0]
    assert dry_run(Recipe.parse({**plain, "stages": {LAST: {"teacher_cache": None}}}))[0].memory == live.memory
    teacher = parameter_count(tiny.llama().config)
    assert live.memory - 2.5 * teacher < cached.memory < live.memory - 1.5 * teacher


def test_a_dry_run_counts_the_optimiser_that_is_asked_for(tmp_path):
    plain = make_recipe(tmp_path, "llama", [{"layers": 4, "ffn": 40}])
    adam, plainly = (dry_run(Recipe.parse({**plain, "stage": {**plain["stage"], "optim": optim}}))[0] for optim in ("adamw_torch", "sgd"))
    assert adam.memory - plainly.memory == pytest.approx(8 * adam.size, rel=0.01)


def test_a_dry_run_reckons_a_stage_of_hidden_states_alone(tmp_path):
    plain = make_recipe(tmp_path, "llama", ANCHORS[1:], stage={"kd_weight": 0.0, "ce_weight": 0.0, "hidden_weight": 1.0})
    assert dry_run(Recipe.parse(plain))[0].seconds > 0


def test_a_dry_run_counts_checkpoints_as_the_trainer_does(tmp_path, monkeypatch):
    """A share of the steps is rounded up to whole ones."""
    monkeypatch.setattr("cbd_hub.distill.dry_run._written_a_second", lambda: 1.0)
    plain = make_recipe(tmp_path, "llama", ANCHORS[1:], stage={"max_steps": 5})
    share, steps = (dry_run(Recipe.parse({**plain, "stage": {**plain["stage"], "save_steps": every}}))[0] for every in (0.25, 2))
    assert share.training == pytest.approx(steps.training, rel=0.01)


def test_a_dry_run_on_a_finished_chain_reckons_what_is_new(tmp_path):
    plain = make_recipe(tmp_path, "llama", ANCHORS)
    path = written(tmp_path, plain)
    whole = dry_run(Recipe.parse(plain))
    chain = distill_chain({**plain, "anchors": ANCHORS[:1]}, tmp_path / "chain")
    (new,) = dry_run(Recipe.parse(plain), chain=chain)
    assert (new.anchor, new.shape, new.memory) == (whole[1].anchor, whole[1].shape, whole[1].memory)
    done = CliRunner().invoke(app, ["distill", str(path), "--dry-run", "--out", str(tmp_path / "chain"), "--json"])
    assert [stage["anchor"] for stage in json.loads(done.stdout)["stages"]] == [new.anchor]
    distill_chain(plain, tmp_path / "chain")
    done = CliRunner().invoke(app, ["distill", str(path), "--dry-run", "--out", str(tmp_path / "chain")])
    assert (done.exit_code, "nothing is left to train" in done.output) == (0, True)
    with pytest.raises(RecipeError, match="made by another recipe"):
        dry_run(Recipe.parse({**plain, "seed": 1}), chain=Chain.from_pretrained(tmp_path / "chain"))


def test_wrong_rows_are_named_by_their_line(tmp_path):
    plain = make_recipe(tmp_path, "llama", ANCHORS)
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for wrong, message in (
        ({"messages": [{"role": "user"}]}, r"line 2: messages\[0\] has no content but None"), ({"messages": None}, "line 2: messages is no list of messages but None"),
        ({"prompt": "a", "completion": 5}, "line 2: completion is no text but int"),
    ):
        (tmp_path / "rows.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(wrong) + "\n")
        with pytest.raises(DataError, match=message):
            distill_chain({**plain, "data": {**plain["data"], "path": str(tmp_path / "rows.jsonl")}}, tmp_path / "chain")
    (tmp_path / "t.csv").write_text("text\n1\n2\n")
    with pytest.raises(DataError, match='row 0: "text" is no text but int'):
        distill_chain({**plain, "data": {**plain["data"], "path": str(tmp_path / "t.csv")}}, tmp_path / "chain")


def test_a_chain_states_the_losses_that_its_models_have_on_the_texts_one_by_one(tmp_path):
    recipe = make_recipe(tmp_path, "llama", ANCHORS[:1])
    chain, read = distill_chain(recipe, tmp_path / "chain"), Recipe.parse(recipe)
    documents = Documents.read(read_parts(read).calibration, chain.tokenizer(), read.data.block_size, CALIBRATION_TOKENS)
    for anchor in chain.anchors:
        losses = document_losses(ModelRunner(chain.model(anchor.parameters, dtype=torch.float32)), documents)
        assert anchor.evaluations[0].loss == pytest.approx(losses.mean, rel=1e-6)
    point = chain.manifest.links[0].curve[1]
    losses = document_losses(ModelRunner(chain.model(point.size, strategy=point.strategy, dtype=torch.float32)), documents)
    assert point.loss == pytest.approx(losses.mean, abs=2e-3)
