"""A recipe whose chain goes on in another architecture and vocabulary."""

import json
import math
import shutil

import pytest
import tiny
import tokenizers_for_bridge as kinds
import torch
import yaml
from conftest import recipe as make_recipe
from typer.testing import CliRunner

from cbd_hub import CBDModel, Chain, distill_chain
from cbd_hub.cards import example_size
from cbd_hub.cli import app
from cbd_hub.distill.dry_run import dry_run
from cbd_hub.distill.schema import Recipe
from cbd_hub.distill.stages import read_parts
from cbd_hub.errors import ArgumentError, RecipeError, SizeError, VocabularyMismatchError
from cbd_hub.evaluation import Documents, byte_losses, common_texts, document_losses
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.sizes import format_size


BRIDGE = {"bridge": "span+vocab", "ce_weight": 0.5, "block_size": 24}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A llama of a byte vocabulary above a gpt2 of a larger one."""
    folder = tmp_path_factory.mktemp("bridge")
    other = tiny.gpt2(layers=3, ffn=24)
    torch.manual_seed(1)
    tokenizer = kinds.byte_level(330)
    other.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    other.save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    anchor = {"checkpoint": str(folder / "other")}
    made = make_recipe(folder, "llama", [{"layers": 3, "ffn": 40}, anchor, {"layers": 2, "ffn": 24}], teacher={"hidden": 64}, stages={str(folder / "other"): BRIDGE})
    return folder, made


@pytest.fixture(scope="module")
def bridged(plain):
    folder, made = plain
    return distill_chain(made, folder / "chain")


def test_its_card_and_its_next_step_name_sizes_that_there_are(bridged):
    first, second, third, fourth = (format_size(anchor.parameters) for anchor in bridged.anchors)
    assert f"any size from {fourth} to {third} and any size from {second} to {first}" in (bridged.files.root / "README.md").read_text()
    bridged.plan(example_size(bridged.manifest), tolerance=0.5)  # so small, sizes come in wide steps


def test_the_chain_goes_on_beyond_the_bridge(bridged, plain):
    assert [link.kind for link in bridged.manifest.links] == ["segment", "bridge", "segment"]
    assert [anchor.family for anchor in bridged.anchors] == ["llama", "llama", "gpt2", "gpt2"]
    assert [anchor.origin for anchor in bridged.anchors] == ["source", "cut", "published", "cut"]
    assert all(anchor.evaluations[-1].bits_per_byte > 0 for anchor in bridged.anchors)
    sides = [bridged.tokenizer(anchor.parameters) for anchor in bridged.anchors]
    parts = read_parts(Recipe.parse(plain[1]))
    same = common_texts(parts.calibration, [sides[0], sides[2]], 32, 4096)
    for anchor, tokenizer in zip(bridged.anchors, sides):
        model = ModelRunner(CBDModel.from_chain(bridged.files.root, anchor.parameters).float())
        losses, documents = byte_losses(model, tokenizer, same, characters=None, max_bytes=None), Documents.read(parts.calibration, tokenizer, 32, 4096)
        assert losses.tokens.sum() == sum(len(text.encode()) for text in same)
        assert anchor.evaluations[-1].bits_per_byte == pytest.approx(losses.mean / math.log(2), rel=1e-6)
        assert anchor.evaluations[-1].loss == pytest.approx(document_losses(model, documents).mean, rel=1e-6)  # in nats per token as ever
        assert anchor.evaluations[-1].tokens == documents.tokens
    assert len(bridged.tokenizer()) == tiny.VOCAB
    assert len(bridged.tokenizer("min")) == len(bridged.tokenizer(bridged.anchors[2].parameters)) == 331


@pytest.mark.parametrize("first", [1, 2], ids=["to its side", "beyond it"])
def test_a_chain_that_grows_across_the_bridge_is_the_chain_made_at_once(bridged, plain, tmp_path, first):
    _, made = plain
    distill_chain({**made, "anchors": made["anchors"][:first], "stages": made["stages"] if first == 2 else {}}, tmp_path / "chain")
    assert distill_chain(made, tmp_path / "chain").manifest == bridged.manifest


def test_sizes_on_each_side_work_and_the_gap_names_them(bridged, tmp_path):
    first, second, third, fourth = bridged.anchors
    for large, small in ((first, second), (third, fourth)):
        model = CBDModel.from_chain(bridged.files.root, (large.parameters + small.parameters) // 2, tolerance=0.2)
        assert model.config.model_type == large.family
    with pytest.raises(SizeError, match=f"across the bridge between {third.name} and {second.name}"):
        CBDModel.plan(bridged.files.root, (second.parameters + third.parameters) // 2)
    for anchor in (first, second, third, fourth):
        assert CBDModel.plan(bridged.files.root, shape=anchor.shape).large == anchor.name
    with pytest.raises(ArgumentError, match="lies in no segment") as caught:
        CBDModel.plan(bridged.files.root, shape={"layers": 9})
    assert f"{third.name} ({third.shape.text}) to {second.name}" not in str(caught.value), "a bridge is no segment"
    CBDModel.materialize(bridged.files.root, "min", output_dir=tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == bridged.files.path(fourth, "tokenizer.json").read_bytes()
    Chain.from_pretrained(bridged.files.root).save_pretrained(tmp_path / "copy")
    assert Chain.from_pretrained(tmp_path / "copy").manifest.links[1].kind == "bridge"


def test_the_commands_know_both_sides(bridged, plain):
    folder, _ = plain
    for words in (["show", str(bridged.files.root)], ["eval", str(bridged.files.root), "--text", str(folder / "text.txt")], ["generate", str(bridged.files.root), "the", "--size", "min", "--max-new-tokens", "3"]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (words, done.output, done.exception)
        if words[0] != "generate":
            assert "bits/byte" in done.output


def test_sizes_on_both_sides_are_measured_on_the_same_bytes(bridged, plain, cbd):
    text, anchors = plain[0] / "text.txt", bridged.anchors
    command = ("eval", bridged.files.root, "--text", text, "--block-size", 24, "--max-tokens", 300, "--json")
    whole = json.loads(cbd(*command)[1])
    texts = text.read_text().split("\n\n")
    same = common_texts(texts, [bridged.tokenizer(anchor.parameters) for anchor in (anchors[0], anchors[2])], 24, 300)
    assert (whole["documents"], whole["bytes"], "tokens" in whole) == (len(same), sum(len(part.encode()) for part in same), False)
    for anchor, row in zip(anchors, whole["results"]):
        tokenizer, model = bridged.tokenizer(anchor.parameters), ModelRunner(CBDModel.from_chain(bridged.files.root, anchor.parameters).float())
        losses = byte_losses(model, tokenizer, same, characters=None, max_bytes=None)
        assert row["bits_per_byte"] == pytest.approx(losses.mean / math.log(2), rel=1e-6)
        assert row["bits_per_byte_stderr"] == pytest.approx(losses.stderr / math.log(2), rel=1e-5)
        assert row["loss"] == pytest.approx(document_losses(model, Documents.read(texts, tokenizer, 24, 300)).mean, rel=1e-6)
    one = json.loads(cbd(*command, "--sizes", anchors[0].parameters)[1])
    assert one["results"] == whole["results"][:1], "whatever else is asked for"
    assert one["tokens"] > 0


def test_a_run_corrected_by_a_bridge_measures_all_on_the_same_bytes(bridged, plain, tmp_path, monkeypatch):
    """What was measured before the recipe had a second vocabulary is measured in bits per byte too."""
    _, made = plain
    tiny.killed_in_training(monkeypatch, 3)
    with pytest.raises(tiny.Killed):
        distill_chain({**made, "anchors": made["anchors"][:1], "stages": {}}, tmp_path / "chain")
    assert distill_chain(made, tmp_path / "chain").manifest.anchors == bridged.manifest.anchors


def test_the_teachers_tokenizer_is_checked_before_any_stage(plain, tmp_path):
    folder, made = plain
    wrong = tmp_path / "wrong"
    shutil.copytree(folder / "other", wrong)
    kinds.byte_level(400).save_pretrained(wrong)
    recipe = {**made, "anchors": [{"checkpoint": str(wrong)}], "stages": {str(wrong): BRIDGE}}
    with pytest.raises(VocabularyMismatchError, match=r"the student's tokenizer has the token 399 and its checkpoint a vocabulary of 331; give the student its own tokenizer \(stage of anchor"):
        distill_chain(recipe, tmp_path / "chain")
    assert not (tmp_path / "chain" / "anchors").exists()


def test_what_a_recipe_cannot_bridge(plain, tmp_path):
    folder, made = plain
    other = str(folder / "other")
    with pytest.raises(VocabularyMismatchError, match="give|bridge: span"):
        distill_chain({**made, "anchors": [{"checkpoint": str(tiny_of_another_vocabulary(tmp_path))}], "stages": {}}, tmp_path / "a")
    with pytest.raises(RecipeError, match="give it as {checkpoint"):
        distill_chain({**made, "stage": {**made["stage"], **BRIDGE}}, tmp_path / "b")
    with pytest.raises(RecipeError, match="path_fraction=0.5 does not go with bridge"):
        distill_chain({**made, "stages": {other: {**BRIDGE, "path_fraction": 0.5}}}, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_losses_are_measured_within_the_positions_beyond_the_bridge(plain, tmp_path):
    _, made = plain
    tiny.gpt2(layers=2, ffn=24, n_positions=24).save_pretrained(tmp_path / "short")
    tiny.tokenizer().save_pretrained(tmp_path / "short")
    short = str(tmp_path / "short")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**made, "anchors": [{"checkpoint": short}], "stages": {short: BRIDGE}}, sort_keys=False))
    line = 1 + path.read_text().splitlines().index("data:")
    for act in (lambda: distill_chain(path, tmp_path / "chain"), lambda: dry_run(Recipe.read(path))):
        with pytest.raises(RecipeError, match=f"line {line}: the recipe's data.block_size=32, .* is more than the model's 24 positions; give 24 or less"):
            act()
    assert not (tmp_path / "chain").exists()


def tiny_of_another_vocabulary(folder):
    made = tiny.llama(layers=1)
    made.resize_token_embeddings(331, mean_resizing=False)
    made.save_pretrained(folder / "llama")
    kinds.byte_level(330).save_pretrained(folder / "llama")
    return folder / "llama"


def test_a_dry_run_reckons_with_the_bridge(plain):
    costs = dry_run(Recipe.parse(plain[1]))
    assert [cost.shape.vocab for cost in costs] == [260, 331, 331]
    assert all(cost.seconds > 0 for cost in costs)


def test_a_dry_run_knows_a_teacher_whose_special_tokens_are_beyond_the_students_rows(plain, tmp_path):
    """The other way round: from the larger vocabulary to that of bytes."""
    _, made = plain
    whole, small = tiny.llama(layers=2, hidden=64), str(tiny.save(tiny.gpt2(layers=2), tmp_path / "small"))
    whole.resize_token_embeddings(331)
    whole.config.pad_token_id = 330
    whole.save_pretrained(tmp_path / "whole")
    kinds.byte_level(330).save_pretrained(tmp_path / "whole")
    (cost,) = dry_run(Recipe.parse({**made, "teacher": str(tmp_path / "whole"), "anchors": [{"checkpoint": small}], "stages": {small: BRIDGE}}))
    assert cost.seconds > 0


def test_a_whole_shape_lies_in_its_own_segment_whatever_is_across_the_bridge(tmp_path):
    """The larger side's anchor is shallower, so that the shape lies between the depths across the bridge too."""
    wide, deep, small = tiny.llama(layers=2, hidden=64, ffn=300), tiny.gpt2(layers=6), tiny.gpt2(layers=3, seed=1)
    wide.resize_token_embeddings(331)
    names = [str(tiny.save(model, tmp_path / name)) for name, model in (("wide", wide), ("deep", deep), ("small", small))]
    kinds.byte_level(330).save_pretrained(tmp_path / "wide")
    recipe = make_recipe(tmp_path, "llama", [{"checkpoint": names[1]}, {"checkpoint": names[2]}], stages={names[1]: BRIDGE})
    chain = distill_chain({**recipe, "teacher": names[0]}, tmp_path / "chain")
    assert [link.kind for link in chain.manifest.links] == ["bridge", "segment"]
    plan = chain.plan(shape={"layers": 4})
    assert chain.plan(shape=plan.shape).summary() == plan.summary()


def test_answers_longer_than_a_block_cost_a_bridged_chain_its_bits_and_no_more(plain, tmp_path):
    _, made = plain
    rows = [{"prompt": "say", "completion": text * 3} for text in tiny.texts(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    chain = distill_chain({**made, "anchors": made["anchors"][:2], "data": {**made["data"], "path": str(tmp_path / "rows.jsonl")}}, tmp_path / "chain", progress=said.append)
    assert any("no bits per byte" in line for line in said)
    assert [anchor.evaluations[-1].bits_per_byte for anchor in chain.anchors] == [None] * 3
    one = CliRunner().invoke(app, ["eval", str(tmp_path / "chain"), "--sizes", "max", "--text", str(tmp_path / "rows.jsonl"), "--block-size", "32", "--json"])
    assert one.exit_code == 0
    both = CliRunner().invoke(app, ["eval", str(tmp_path / "chain"), "--sizes", "max,min", "--text", str(tmp_path / "rows.jsonl"), "--block-size", "32"])
    assert "no row is read whole in 32 tokens" in str(both.exception)
