"""Recipes: mistakes named by line, runs resumed bit for bit, foreign folders left alone."""

import dataclasses
import hashlib
import json
import multiprocessing
import shutil
import signal
import time
from glob import glob
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from conftest import recipe as make_recipe
from safetensors.torch import load_file
from test_align import permuted

from cbd_hub import CBDModel, Chain, Recipe, assemble_chain, distill_chain, texts
from cbd_hub import chain as chain_module
from cbd_hub.configs import read_config
from cbd_hub.distill import recipe as recipe_module
from cbd_hub.distill import stages as stages_module
from cbd_hub.distill.data import split_documents
from cbd_hub.distill.dry_run import dry_run
from cbd_hub.distill.packing import packed_dataset
from cbd_hub.distill.schema import anchor_key
from cbd_hub.distill.stages import plan_stages
from cbd_hub.errors import ArgumentError, CBDError, DataError, IntegrityError, RecipeError, StorageError
from cbd_hub.evaluation import Documents
from cbd_hub.files import held
from cbd_hub.hub import KEPT_FILE
from cbd_hub.interpolation.curve import Chord
from cbd_hub.publish import _without_places
from cbd_hub.single import cut_single
from cbd_hub.texts import read_texts


ANCHORS = [{"layers": 4, "ffn": 24}, {"layers": 2, "ffn": 24}]


def everything(chain):
    """All that a chain is: its manifest and every tensor."""
    manifest = json.loads((chain / "chain.json").read_text())
    return manifest, {str(path.relative_to(chain)): load_file(path) for path in sorted(chain.rglob("*.safetensors"))}


def assert_same(first, second):
    (manifest, tensors), (other_manifest, other_tensors) = everything(first), everything(second)
    assert manifest == {**other_manifest, "name": manifest["name"]}
    assert tensors.keys() == other_tensors.keys()
    for path in tensors:
        for name, tensor in tensors[path].items():
            assert torch.equal(tensor, other_tensors[path][name]), (path, name)


def test_the_chain_is_complete(chain):
    names = {path.name for path in chain.iterdir()}
    assert names == {"chain.json", "config.json", "README.md", "recipe.yaml", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "anchors", "maps", "chunks"}
    opened = Chain.from_pretrained(chain)
    assert [anchor.origin for anchor in opened.anchors] == ["source", "cut", "cut"]
    assert [anchor.parent for anchor in opened.anchors] == [None, opened.anchors[0].name, opened.anchors[1].name]
    for anchor in opened.anchors[1:]:
        assert anchor.training.tokens == 4 * 4 * 32
        assert anchor.training.recipe_sha256 == Recipe.read(chain / "recipe.yaml").sha256()
    for link in opened.manifest.links:
        assert link.curve
        assert {point.strategy for point in link.curve} <= {"blend", "patch"}
    assert opened.manifest.links[1].strategies.patch is not None
    assert opened.manifest.links[0].strategies.patch is None


def test_anchors_learned(chain, family):
    """Training moved the anchors: they are not the cuts they began as."""
    opened = Chain.from_pretrained(chain)
    first, second = (load_file(chain / "anchors" / anchor.name / "model.safetensors") for anchor in opened.anchors[:2])
    key = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}[family]
    assert not torch.equal(first[key], second[key])


def test_the_card_can_be_read_by_the_hub_client(chain):
    from huggingface_hub import ModelCard
    card = ModelCard.load(chain / "README.md")
    assert card.data.library_name == "cbd-hub"
    assert "cbd-chain" in card.data.tags
    for anchor in Chain.from_pretrained(chain).anchors:
        assert f"| {anchor.name} | {anchor.parameters:,} |" in card.text


def test_the_same_recipe_twice_gives_the_same_chain(tmp_path):
    plain = make_recipe(tmp_path, "llama", ANCHORS, stage={"path_fraction": 0.5, "hidden_weight": 0.1})
    assert_same(distill_chain(plain, tmp_path / "a").files.root, distill_chain(plain, tmp_path / "b").files.root)


@pytest.mark.parametrize(("anchors", "stage", "expected"), [
    ([{"hidden": 16}], {}, [0.2]), ([{"layers": 4, "ffn": 24}, {"hidden": 16}], {}, [0.0, 0.2]), ([{"hidden": 16}], {"path_fraction": 0.0}, [0.0]),
    ([{"hidden": 16}], {"on_policy_fraction": 0.5}, [0.0]), ([{"hidden": 16}], {"objective": "minillm"}, [0.0]),
    ([{"hidden": 16}], {"kd_weight": 0.0, "ce_weight": 0.0, "hidden_weight": 1.0}, [0.0]), ([{"hidden": 16}], {"neftune_noise_alpha": 5.0}, [0.0]),
], ids=["hidden width", "only where it moves", "named", "on policy", "minillm", "hidden states alone", "noise"])
def test_an_anchor_of_another_hidden_width_is_trained_on_the_path_too(tmp_path, anchors, stage, expected):
    plain = make_recipe(tmp_path, "llama", anchors, stage=stage, teacher={"layers": 6, "hidden": 32, "ffn": 128})
    check_path(plain, expected)


@pytest.mark.parametrize(("anchor", "expected"), [({"heads": 2}, [0.2]), ({"hidden": 16}, [0.2]), ({"layers": 4}, [0.0])], ids=str)
def test_so_is_one_whose_hidden_width_follows_from_its_heads(tmp_path, anchor, expected):
    check_path(make_recipe(tmp_path, "gpt2", [anchor], teacher={"layers": 6, "hidden": 32, "heads": 4}), expected)


def check_path(plain, expected):
    read = Recipe.parse(plain)
    stages = plan_stages(read, Path(read.teacher), read_config(Path(read.teacher)))
    assert [stage.config("unused").path_fraction for stage in stages] == expected


def test_a_finished_run_is_returned_at_once(chain, monkeypatch):
    monkeypatch.setattr(recipe_module, "ChainDistiller", None)
    again = distill_chain(chain / "recipe.yaml", chain)
    assert again.manifest == Chain.from_pretrained(chain).manifest


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """A recipe, and the chain of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("never_stopped")
    plain = make_recipe(folder, "llama", ANCHORS, stage={"save_steps": 2})
    tokenizer = folder / "teacher" / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text())))  # not as its anchors' will be written
    return plain, distill_chain(plain, folder / "whole").files.root


@pytest.fixture(scope="module")
def first_made(never_stopped, tmp_path_factory):
    """The chain of that recipe's first anchor alone."""
    return distill_chain({**never_stopped[0], "anchors": ANCHORS[:1]}, tmp_path_factory.mktemp("first_made") / "chain").files.root


@pytest.fixture
def short(never_stopped, first_made, tmp_path):
    """A recipe, and a copy of the chain of its first anchor."""
    return never_stopped[0], shutil.copytree(first_made, tmp_path / "chain")


@pytest.mark.parametrize("where", ["cut", "train", "link", *(pytest.param(where, marks=pytest.mark.slow) for where in ("teacher", "save", "finish"))])
def test_interrupted_anywhere_it_goes_on_to_the_same_chain(never_stopped, tmp_path, monkeypatch, where):
    plain, whole = never_stopped
    place = {
        "teacher": ("copy_checkpoint", 1), "cut": ("choose_cut", 2), "train": ("ChainDistiller", 2), "save": ("staged_folder", 3),
        "link": ("measure_segment", 2), "finish": ("Teacher", 1),
    }[where]
    name, at = place
    real, calls = getattr(recipe_module, name), []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(recipe_module, name, stopping)
    with pytest.raises(KeyboardInterrupt):
        distill_chain(plain, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "chain.json").exists()
    monkeypatch.undo()
    assert_same(whole, distill_chain(plain, tmp_path / "stopped").files.root)


@pytest.mark.parametrize("at", [1, 2])
def test_gone_on_with_where_importance_comes_out_otherwise_units_stay_those_that_were_cut(never_stopped, tmp_path, monkeypatch, at):
    """On another machine products may differ in their last digits, and near units change places; what was trained, or is being trained, was cut before."""
    plain, whole = never_stopped
    real, calls = recipe_module.ChainDistiller, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(recipe_module, "ChainDistiller", stopping)
    with pytest.raises(KeyboardInterrupt):
        distill_chain(plain, tmp_path / "stopped")
    monkeypatch.undo()
    measure = recipe_module.measure_importance

    def otherwise(model, blocks):
        found = measure(model, blocks)
        return dataclasses.replace(found, ffn=found.ffn[:, ::-1].copy())

    before = {path.name: path.read_bytes() for path in (tmp_path / "stopped" / "maps").iterdir()}
    assert len(before) == at
    monkeypatch.setattr(recipe_module, "measure_importance", otherwise)
    made = distill_chain(plain, tmp_path / "stopped").files.root
    for name, kept in before.items():
        assert (made / "maps" / name).read_bytes() == kept == (whole / "maps" / name).read_bytes()
    first = Path("anchors") / next(iter(before)).removesuffix(".safetensors") / "model.safetensors"
    assert (made / first).read_bytes() == (whole / first).read_bytes()


def test_killed_in_the_middle_of_a_stage_it_goes_on_to_the_same_chain(tmp_path):
    """kill -9 while training, twice; then run again: bitwise the chain of a run that was never killed."""
    plain = make_recipe(tmp_path, "llama", ANCHORS, stage={"save_steps": 3, "max_steps": 30, "per_device_train_batch_size": 8})
    whole = distill_chain(plain, tmp_path / "whole").files.root
    target = tmp_path / "killed"
    for steps in (3, 9):
        process = multiprocessing.get_context("fork").Process(target=distill_chain, args=(plain, target))
        process.start()
        while process.is_alive():
            found = [int(path.name.split("-")[1]) for path in target.glob(".work/*/checkpoint-*")]
            if found and max(found) >= steps:
                break
            time.sleep(0.01)
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert not (target / "chain.json").exists()
    assert_same(whole, distill_chain(plain, target).files.root)


def test_a_folder_that_is_something_else_is_left_alone(tmp_path, chain):
    plain = make_recipe(tmp_path, "llama", ANCHORS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    with pytest.raises(StorageError, match="no run of a recipe"):
        distill_chain(plain, tmp_path / "mine")
    with pytest.raises(RecipeError, match="another recipe"):
        distill_chain({**plain, "seed": 5}, chain)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["precious.txt"]


def test_a_run_of_another_recipe_is_not_mixed_in(tmp_path, monkeypatch):
    """One that has learned stays, also where it did so after the other recipe was looked at and before its turn came."""
    plain, target = make_recipe(tmp_path, "llama", ANCHORS, stage={"save_steps": 1}), tmp_path / "out"

    def killed_at(step):
        with monkeypatch.context() as patch:
            tiny.killed_in_training(patch, step)
            with pytest.raises(tiny.Killed):
                distill_chain(plain, target)

    killed_at(1)
    waiting = recipe_module._Run(Recipe.parse({**plain, "seed": 1}), target, print)
    killed_at(3)
    checkpoints = sorted(target.rglob("checkpoint-*/model.safetensors"))
    assert checkpoints
    for again in (waiting.carry_out, lambda: distill_chain({**plain, "seed": 1}, target)):
        with pytest.raises(RecipeError, match="unfinished run whose anchor .* was begun with seed=0, and the recipe has 1"):
            again()
    assert sorted(target.rglob("checkpoint-*/model.safetensors")) == checkpoints


@pytest.mark.parametrize("change", [{"stage": {"max_steps": 3}}, {"anchors": [{"layers": 3}, {"layers": 1}]}, {"anchors": [{"layers": 4, "ffn": 24}]}, {"seed": 1}, {"data": {"block_size": 16}}], ids=["steps", "size", "shape", "seed", "data"])
def test_an_anchor_that_learned_nothing_is_in_the_way_of_no_other(change, tmp_path, monkeypatch):
    """A run that failed at its first step is corrected and run again: what was begun by other words, and the units that it kept, are forgotten."""
    wrong, right = make_recipe(tmp_path, "llama", ANCHORS), make_recipe(tmp_path, "llama", ANCHORS)
    right = {**right, **{key: {**right[key], **value} if isinstance(value, dict) else value for key, value in change.items()}}
    with monkeypatch.context() as patch:
        patch.setattr(recipe_module, "ChainDistiller", lambda **_: (_ for _ in ()).throw(RuntimeError("it fails")))
        with pytest.raises(RuntimeError):
            distill_chain(wrong, tmp_path / "out")
    assert list((tmp_path / "out" / "maps").iterdir())
    assert_same(distill_chain(right, tmp_path / "whole").files.root, distill_chain(right, tmp_path / "out").files.root)


def test_a_finished_chain_grows_by_a_longer_recipe(short, tmp_path, monkeypatch):
    """One anchor, then two more: bitwise the chain of all three at once, and nothing that was there is made again."""
    plain, target = short
    plain = {**plain, "anchors": [*ANCHORS, {"layers": 1, "ffn": 24}]}
    whole = distill_chain(plain, tmp_path / "whole").files.root
    (target / ".git").mkdir()
    trained, measured, measure = [], [], recipe_module.measure_importance
    monkeypatch.setattr(recipe_module, "show_stage", lambda trainer, name: trained.append(name))
    monkeypatch.setattr(recipe_module, "measure_importance", lambda model, blocks: measured.append(1) or measure(model, blocks))
    assert_same(whole, distill_chain(plain, target).files.root)
    assert trained == [anchor.name for anchor in Chain.from_pretrained(target).anchors[2:]]
    assert len(measured) == 2
    assert (target / ".git").is_dir()
    assert not (target / ".work").exists()
    assert (target / "recipe.yaml").read_text() == (whole / "recipe.yaml").read_text()


def test_several_processes_are_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match="by one process, and 2 were launched; run it without a launcher, or train single stages"):
        distill_chain(make_recipe(tmp_path, "llama", ANCHORS), tmp_path / "chain")
    assert not (tmp_path / "chain").exists()


@pytest.mark.parametrize("where", ["train", "chain.json", *(pytest.param(where, marks=pytest.mark.slow) for where in ("link", "recipe.yaml"))])
def test_a_chain_that_was_stopped_while_it_grew_is_what_it_was_and_goes_on(never_stopped, short, monkeypatch, where):
    (plain, target), whole = short, never_stopped[1]
    before = Chain.from_pretrained(target).manifest

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    if where in ("recipe.yaml", "chain.json"):
        real = chain_module.write_text
        monkeypatch.setattr(chain_module, "write_text", lambda path, text: stop() if path.name == where else real(path, text))
    else:
        monkeypatch.setattr(recipe_module, {"train": "ChainDistiller", "link": "measure_segment"}[where], stop)
    with pytest.raises(KeyboardInterrupt):
        distill_chain(plain, target)
    monkeypatch.undo()
    assert Chain.from_pretrained(target).manifest == before
    (target / ".chain.json.x1y2z3a4.cbd-part").write_text("{")  # what a kill leaves
    (target / "chunks" / f".{before.anchors[0].name}.json.x1y2z3a4.cbd-part").write_text("{")
    assert distill_chain({**plain, "anchors": ANCHORS[:1]}, target).manifest == before
    assert_same(whole, distill_chain(plain, target).files.root)
    assert not list(target.rglob(".*"))


def grown_in_part(plain, target, monkeypatch):
    """The growth of a chain of one anchor, stopped once the next one is made."""
    with monkeypatch.context() as patch:
        patch.setattr(recipe_module, "measure_segment", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            distill_chain(plain, target)


def test_what_is_the_users_stays_while_a_chain_grows(short):
    plain, target = short
    before = Chain.from_pretrained(target)
    first = before.anchors[0].name
    mine = [target / ".README.md.swp", target / ".README.md.original", target / "anchors" / ".gitignore", target / "anchors" / first / "NOTES.txt", target / ".git" / "config"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (target / "README.md").write_text((target / "README.md").read_text() + "\nMy words.\n")
    manifest = json.loads((target / "chain.json").read_text())
    manifest["name"], manifest["anchors"][0]["evaluations"] = "named", [{**manifest["anchors"][0]["evaluations"][0], "dataset": "other", "loss": 1.0}, *manifest["anchors"][0]["evaluations"]]
    (target / "chain.json").write_text(json.dumps(manifest))
    grown = distill_chain(plain, target)
    assert [path.read_text() for path in mine] == ["mine"] * len(mine)
    assert "My words." in (target / "README.md").read_text()
    assert grown.name == "named"
    assert grown.anchors[0].model_dump() == before.anchors[0].model_dump() | {"evaluations": grown.anchors[0].model_dump()["evaluations"]}
    assert [entry.dataset for entry in grown.anchors[0].evaluations][:-1] == ["other"]


@pytest.mark.parametrize("file", ["anchors/{}/model.safetensors", "maps/{}.safetensors", "chunks/{}.json"])
def test_a_damaged_chain_does_not_grow(short, file):
    plain, target = short
    path = target / file.format(Chain.from_pretrained(target).anchors[1].name)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    before = everything(target)[0]
    with pytest.raises(IntegrityError, match=path.name):
        distill_chain(plain, target)
    assert everything(target)[0] == before


def test_somebody_else_s_anchor_is_not_lost_while_a_chain_grows(short, monkeypatch):
    plain, target = short
    grown_in_part(plain, target, monkeypatch)
    manifest = json.loads((target / "chain.json").read_text())
    manifest["anchors"][1]["training"] = None  # as of an anchor that came from elsewhere
    (target / "chain.json").write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match="not all of one recipe .* is of none.*choose another folder"):
        distill_chain(plain, target)
    assert json.loads((target / "chain.json").read_text()) == manifest


def test_a_chain_that_changed_while_it_grew_is_not_overwritten(short, monkeypatch):
    plain, target = short
    measure = recipe_module.measure_segment

    def changing(*args, **kwargs):
        (target / "chain.json").write_text((target / "chain.json").read_text().replace('"name": "chain"', '"name": "other"', 1))
        return measure(*args, **kwargs)

    monkeypatch.setattr(recipe_module, "measure_segment", changing)
    with pytest.raises(StorageError, match="was changed while it was made longer"):
        distill_chain(plain, target)
    assert Chain.from_pretrained(target).name == "other"


def test_a_growth_that_is_asked_for_otherwise_says_what_to_remove_and_never_the_chain(short, tmp_path, monkeypatch):
    plain, target = short
    grown_in_part(plain, target, monkeypatch)
    new = Recipe.parse(plain)
    other = {**plain, "stages": {anchor_key(new.anchors[1]): {"max_steps": 3}}}
    with pytest.raises(RecipeError, match=r"was begun with stage.max_steps=4, and the recipe has 3; put it back, or remove \S+/chain/anchors/\S+ and \S+ and \S+ to begin it anew") as told:
        distill_chain(other, target)
    anchor, *work = (word for word in str(told.value).split() if word.startswith(f"{target}/"))
    for path in (path for pattern in work for path in map(Path, glob(pattern))):
        path.unlink()
    with pytest.raises(StorageError, match=f"does not say how {anchor} came about; remove it to make that anew"):
        distill_chain(other, target)
    shutil.rmtree(anchor)
    assert_same(distill_chain(other, tmp_path / "whole").files.root, distill_chain(other, target).files.root)


def test_a_chain_grows_by_its_own_recipe_edited_in_place(short):
    plain, target = short
    text = "# mine\n" + Recipe.parse(plain).to_yaml()
    (target / "recipe.yaml").write_text(text)
    assert len(distill_chain(target / "recipe.yaml", target).anchors) == 3
    assert (target / "recipe.yaml").read_text() == text


def test_a_published_chain_that_was_pulled_grows_on_its_text_alone(tmp_path):
    """The index names the text without its folder; the new loss stands beside the old ones all the same, and other text is refused."""
    plain, target = make_recipe(tmp_path, "llama", ANCHORS), tmp_path / "chain"
    distill_chain({**plain, "anchors": ANCHORS[:1]}, target)
    manifest = _without_places(Chain.from_pretrained(target).manifest)
    (target / "chain.json").write_text(manifest.to_json())
    path = Path(plain["data"]["path"])
    text = path.read_text()
    path.write_text(text.replace(" ", "  "))
    with pytest.raises(DataError, match="is not the text that"):
        distill_chain(plain, target)
    path.write_text(text)
    grown = distill_chain(plain, target)
    assert {entry.dataset for anchor in grown.anchors for entry in anchor.evaluations} == {"text.txt (calibration)"}
    assert all(loss is not None for link in grown.manifest.links for loss in Chord.of(grown.manifest, link).losses)


def test_a_made_checkpoint_is_needed_no_more(tmp_path):
    small = tiny.save(tiny.llama(layers=3, ffn=24, seed=9), tmp_path / "small")
    plain = make_recipe(tmp_path, "llama", [{"checkpoint": str(small)}, {"layers": 2, "ffn": 24}])
    whole = distill_chain(plain, tmp_path / "whole").files.root
    distill_chain({**plain, "anchors": plain["anchors"][:1]}, tmp_path / "chain")
    shutil.rmtree(small)
    assert_same(whole, distill_chain(plain, tmp_path / "chain").files.root)


def test_a_chain_does_not_grow_on_other_text_and_needs_its_teacher_no_more(tmp_path):
    plain, target = make_recipe(tmp_path, "llama", ANCHORS), tmp_path / "chain"
    distill_chain({**plain, "anchors": ANCHORS[:1]}, target)
    shutil.rmtree(plain["teacher"])
    path = Path(plain["data"]["path"])
    text = path.read_text()
    path.write_text(text.upper())
    with pytest.raises(DataError, match="is not the text that .* was measured on: anchor .* put the text back, or choose another folder"):
        distill_chain(plain, target)
    path.write_text(text)
    assert len(distill_chain(plain, target).anchors) == 3


def test_the_old_recipe_leaves_a_growing_chain_s_work_alone(short):
    plain, target = short
    old = {**plain, "anchors": ANCHORS[:1]}
    with held(target / ".work", "another"):
        distill_chain(old, target)
        assert (target / ".work" / "lock").is_file()
        with pytest.raises(StorageError, match="is being written by another process"):
            distill_chain(plain, target)
    distill_chain(old, target)
    assert not (target / ".work").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"seed": 5}, "made by another recipe, with seed=0 where this one has 5; to make the chain longer give its own recipe with further anchors at the end of the list, or choose another folder"),
    ({"anchors": [{"layers": 3, "ffn": 24}, *ANCHORS[1:]]}, "with anchors="), ({"anchors": ANCHORS[:1]}, "with anchors="),
])
def test_a_chain_grows_at_its_end_alone(tmp_path, chain, change, message):
    plain = {**yaml.safe_load((chain / "recipe.yaml").read_text()), **change}
    before = everything(chain)[0]
    with pytest.raises(RecipeError, match=message):
        distill_chain(plain, chain)
    assert everything(chain)[0] == before
    assert not (chain / ".work").exists()


def test_a_chain_with_an_anchor_of_somebody_else_does_not_grow(tmp_path):
    small = tiny.save(tiny.llama(layers=2, ffn=24, seed=9), tmp_path / "small")
    large = tiny.save(tiny.llama(layers=4, ffn=24, seed=9), tmp_path / "large")
    chain = assemble_chain([large, small], tmp_path / "chain")
    plain = make_recipe(tmp_path, "llama", ANCHORS)
    with pytest.raises(RecipeError, match="not all of one recipe .* is of none.*choose another folder"):
        distill_chain(plain, chain.files.root)


def test_text_that_changes_under_an_unfinished_run_is_refused(tmp_path, monkeypatch):
    plain = make_recipe(tmp_path, "llama", [{"layers": 2, "ffn": 24}], stage={"save_steps": 1})
    with monkeypatch.context() as patch:
        tiny.killed_in_training(patch, 3)
        with pytest.raises(tiny.Killed):
            distill_chain(plain, tmp_path / "chain")
    text = tmp_path / "text.txt"
    whole = text.read_text()
    for other in (whole.replace("9 ", "9 more ", 1), whole + "\n\nOne document more."):
        text.write_text(other)
        with pytest.raises(RecipeError, match="begun with text="):
            distill_chain(plain, tmp_path / "chain")
    text.write_text(whole)
    assert len(distill_chain(plain, tmp_path / "chain").anchors) == 2


def test_sizes_are_cut_where_it_hurts_least(tmp_path):
    """Given a size, several mixes are tried and the least loss wins; the anchor's size is met."""
    plain = make_recipe(tmp_path, "llama", [60_000], teacher={"layers": 6, "hidden": 32, "ffn": 128})
    lines = []
    chain = distill_chain(plain, tmp_path / "chain", progress=lines.append)
    assert abs(chain.anchors[1].parameters - 60_000) <= 300
    tried = {line.split(" nats")[0].rsplit(maxsplit=1)[0].strip(): float(line.split()[-3]) for line in lines if "untrained" in line}
    assert len(tried) > 2
    assert min(tried, key=tried.__getitem__) == chain.anchors[1].shape.text


def test_published_checkpoints_can_be_anchors(tmp_path):
    """The paper's way: a ready checkpoint learns from the anchor above it; no map, no path."""
    small = tiny.save(tiny.llama(layers=2, ffn=24, seed=9), tmp_path / "small")
    plain = make_recipe(tmp_path, "llama", [{"checkpoint": str(small)}], align=False)
    chain = distill_chain(plain, tmp_path / "chain")
    assert chain.anchors[1].origin == "published"
    assert chain.anchors[1].parent is None
    middle = sum(anchor.parameters for anchor in chain.anchors) // 2
    assert CBDModel.from_chain(tmp_path / "chain", middle).config.cbd["strategy"] == "blend"


@pytest.mark.parametrize(("field", "nothing", "something"), [("align", "auto", False), ("reconstruct", "layer", False), ("reconstruct", "layer", "stream")])
def test_a_field_that_says_nothing_makes_no_other_recipe(field, nothing, something):
    """Chains made before the field was one stay of their recipes: the hash is that of then."""
    plain = {"teacher": "a/b", "anchors": ["1M"], "data": {"path": "x.txt"}}
    before = Recipe.parse(plain).model_dump()
    del before["align"], before["reconstruct"]
    assert Recipe.parse(plain).sha256() == Recipe.parse({**plain, field: nothing}).sha256() == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    assert Recipe.parse(plain).sha256() != Recipe.parse({**plain, field: something}).sha256()
    assert Recipe.parse(plain).outcome() != Recipe.parse({**plain, field: something}).outcome()


@pytest.fixture
def strange(tmp_path):
    """A recipe whose checkpoint is a permuted copy of half of the teacher's layers."""
    plain = make_recipe(tmp_path, "llama", [{"checkpoint": str(tmp_path / "small")}], teacher={"seed": 3, "layers": 4}, stage={"learning_rate": 1e-5}, align=True)
    whole, small = dict(permuted(tiny.llama(seed=3, layers=4)).named_parameters()), tiny.llama(layers=2)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.copy_(whole[name.replace("layers.1.", "layers.3.")])
    tiny.save(small, tmp_path / "small")
    return plain


def test_a_checkpoint_that_learned_is_brought_into_the_coordinates_above_it(strange, tmp_path):
    """Distillation alone does not: two models that compute alike may still hold their units in other orders."""
    chain = distill_chain(strange, tmp_path / "chain")
    (link,), anchor = chain.manifest.links, chain.anchors[1]
    assert link.strategies.blend.align.error < 1e-3
    assert (anchor.origin, anchor.parent) == ("published", chain.anchors[0].name)
    card = " ".join((tmp_path / "chain" / "README.md").read_text().split())
    assert "each smaller anchor learns from the one above it; what it began as stands in the table." in card
    assert f"For sizes in between {anchor.name} is brought into {anchor.parent}'s coordinates by a" in card
    shared = load_file(chain.files.side_file(anchor.maps))
    assert shared["kept.layers"].tolist() == [0, 3]
    apart = distill_chain({**strange, "align": False}, tmp_path / "apart")
    own, ids = CBDModel.from_chain(tmp_path / "chain", shape={"layers": 3}, strategy="patch"), torch.arange(4, 30)[None]
    mixed, plain = (CBDModel.from_chain(folder, shape={"layers": 3}, strategy="blend", alpha=0.5)(ids).logits for folder in (tmp_path / "chain", tmp_path / "apart"))
    assert (mixed - own(ids).logits).norm() < 0.02 * (plain - own(ids).logits).norm(), "in common coordinates the two are one, whatever alpha"
    assert apart.anchors[1].maps is None
    assert apart.manifest.links[0].strategies.blend.align is None
    assert tiny.same(CBDModel.from_chain(tmp_path / "chain", "min"), CBDModel.from_chain(tmp_path / "apart", "min")), "the anchors are the same"


def test_a_checkpoint_that_was_cut_from_the_anchor_above_keeps_its_coordinates(tmp_path):
    plain = make_recipe(tmp_path, "llama", [{"checkpoint": str(tmp_path / "cut")}], teacher={"layers": 4})
    cut_single(plain["teacher"], shape={"layers": 3, "ffn": 48}, calibration=tiny.texts(60)).save_pretrained(tmp_path / "cut")
    chain = distill_chain(plain, tmp_path / "chain")
    (link,), anchor = chain.manifest.links, chain.anchors[1]
    assert (anchor.origin, anchor.parent, link.strategies.blend.align) == ("cut", chain.anchors[0].name, None)
    told, kept = load_file(chain.files.side_file(anchor.maps)), load_file(tmp_path / "cut" / KEPT_FILE)
    assert all(torch.equal(told[name].long(), kept[name].long()) for name in ("kept.layers", "kept.ffn"))


@pytest.mark.parametrize(("said", "targets"), [({}, ["layer"]), ({"reconstruct": "stream"}, ["stream"]), ({"reconstruct": False}, [])], ids=str)
def test_an_anchor_begins_reconstructed_as_the_recipe_says(tmp_path, monkeypatch, said, targets):
    """On training text, once; a stage that goes on from a checkpoint has its weights from there."""
    fitted, lines, real = [], [], stages_module.reconstruct
    monkeypatch.setattr(stages_module, "reconstruct", lambda *models, target: fitted.append(target) or real(*models, target=target))
    plain = {**make_recipe(tmp_path, "llama", ANCHORS[:1], stage={"save_steps": 1}), **said}
    with monkeypatch.context() as patch:
        tiny.killed_in_training(patch, 2)
        with pytest.raises(tiny.Killed):
            distill_chain(plain, tmp_path / "chain", progress=lines.append)
    assert fitted == targets
    assert any(f"reconstruction by {target} on" in line for target in targets for line in lines) == bool(targets)
    made = distill_chain(plain, tmp_path / "chain", progress=lines.append)
    assert fitted == targets
    assert_same(distill_chain(plain, tmp_path / "whole").files.root, made.files.root)


def test_an_anchor_begins_as_it_is_cut_where_there_is_no_text_to_fit_on(tmp_path, monkeypatch):
    """A stage's own text may be all that is trained on."""
    recipe = make_recipe(tmp_path, "llama", ANCHORS[:1])
    monkeypatch.setattr(stages_module, "reconstruct", None)
    monkeypatch.setattr(stages_module, "training_blocks", lambda *_: Documents.joined([[5] * 9], tiny.tokenizer(), 32, name="the training text"))
    lines = []
    distill_chain(recipe, tmp_path / "chain", progress=lines.append)
    assert any("without reconstruction: the training text has 9 tokens" in line for line in lines)


def test_an_anchor_of_another_hidden_width_says_that_it_begins_as_it_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(stages_module, "reconstruct", None)
    lines = []
    distill_chain(make_recipe(tmp_path, "llama", [{"hidden": 16}]), tmp_path / "chain", progress=lines.append)
    assert any("begins as it is cut: layers of another hidden width cannot be compared" in line for line in lines)


@pytest.mark.parametrize(("begun", "said"), [({}, {"reconstruct": False}), ({"reconstruct": False}, {})], ids=str)
def test_what_was_begun_is_told_by_the_words_of_recipes(tmp_path, monkeypatch, begun, said):
    plain = make_recipe(tmp_path, "llama", ANCHORS[:1], stage={"save_steps": 1})
    with monkeypatch.context() as patch:
        tiny.killed_in_training(patch, 2)
        with pytest.raises(tiny.Killed):
            distill_chain({**plain, **begun}, tmp_path / "chain")
    names = [repr({"reconstruct": "layer", **recipe}["reconstruct"]) for recipe in (begun, said)]
    with pytest.raises(RecipeError, match=f"begun with reconstruct={names[0]}, and the recipe has {names[1]}; put it back"):
        distill_chain({**plain, **said}, tmp_path / "chain")


def test_layers_of_another_hidden_width_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(stages_module, "reconstruct", None)
    distill_chain(make_recipe(tmp_path, "llama", [{"layers": 3, "ffn": 24, "hidden": 24}]), tmp_path / "chain")


@pytest.mark.parametrize("name", ["measured_pair", "Link"])
def test_stopped_while_it_aligns_it_goes_on_to_the_same_chain(strange, tmp_path, monkeypatch, name):
    whole = distill_chain(strange, tmp_path / "whole").files.root
    real, calls = getattr(recipe_module, name), []

    def stopping(*args, **kwargs):
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe_module, name, stopping)
    with pytest.raises(KeyboardInterrupt):
        distill_chain(strange, tmp_path / "stopped")
    monkeypatch.setattr(recipe_module, name, real)
    with pytest.raises(RecipeError, match="align"):
        distill_chain({**strange, "align": False}, tmp_path / "stopped")
    assert_same(whole, distill_chain(strange, tmp_path / "stopped").files.root)


RECIPE = """\
teacher: some/model
anchors: [2M, 1M]
data:
  path: "x.txt"
  block_size: 64
stage:
  max_steps: 10
  divergence: forward_kl
stages:
  1M: {max_steps: 20}
"""


@pytest.mark.parametrize(("old", "new", "message"), [
    ("teacher:", "techer:", r"line 1: techer is no key of a recipe; did you mean teacher\?|line \d: teacher"),
    ("block_size", "blok_size", r"line 5: data.blok_size is no key of a recipe; did you mean block_size\?"),
    ("divergence:", "divergance:", r"line 8: stage.divergance is no field of ChainDistillerConfig; did you mean divergence\?"),
    ("{max_steps: 20}", "{max_step: 20}", r"line 10: stages.1M.max_step is no field .* did you mean max_steps\?"), ("{max_steps: 20}", "{lr: 20}", r"stages.1M.lr is no field .* did you mean learning_rate\?"),
    ("  1M: {", "  3M: {", r"line 10: stages.3M names no anchor"),
    ("[2M, 1M]", "[2M, 1Q]", 'size "1Q" cannot be read'),
    ("data:", "align: maybe\ndata:", "line 3: align: 'maybe' is not known; write auto, true or false"),
    ("data:", "reconstruct: true\ndata:", "line 3: reconstruct: True is not known; write layer, stream or false"),
    ("block_size: 64", "block_size: many", "line 5: data.block_size"),
    ('path: "x.txt"', "heldout: 0.1", "line 3: data: give either path"),
    ("[2M, 1M]", "[]", "line 2: anchors"),
    ("anchors: [", "anchors: [[", "line 3: not valid YAML"),
    (RECIPE, "just text", "holds no recipe"),
    ("max_steps: 10", "max_steps: many", r"line 7: stage.max_steps='many' must be a whole number"),
    ("max_steps: 10", "max_steps: -1", "line 7: stage.max_steps=-1 must be"),
    ("max_steps: 10", "learning_rate: 4e-4", "line 7: stage.learning_rate='4e-4' is no number.*4.0e-4"),
    ("max_steps: 10", "bf16: maybe", "line 7: stage.bf16='maybe' is neither true nor false"),
    ("  max_steps: 10", "  divergence: reverse_kl", "line 8: stage.divergence is given twice"),
    ("max_steps: 10", "run_name: 2024-10-05", "line 7: stage.run_name=2024-10-05 is a date, .* in quotes"), ("max_steps: 10", "project: !!set {a}", "line 7: stage.project={'a'} is a set"),
    ("max_steps: 10", "run_name: 2024-13-45", r"line 7: not valid YAML \(2024-13-45: month must be"), ("max_steps: 10", "warmup_steps: 0x_", r"line 7: not valid YAML \(0x_: "),
    ("max_steps: 10", "lr_scheduler_kwargs: {1: 2}", "line 7: stage.lr_scheduler_kwargs has the key 1"), ("stage:", "text_data: {colum: z}\nstage:", r"line 6: text_data.colum .* mean column\?"),
])
def test_mistakes_are_named_with_their_line(tmp_path, old, new, message):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(CBDError, match=message) as caught:
        Recipe.read(tmp_path / "recipe.yaml")
    assert "\n" not in str(caught.value)


def test_a_recipe_survives_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text(RECIPE)
    first = Recipe.read(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(first.to_yaml())
    assert Recipe.read(tmp_path / "b.yaml") == first
    assert Recipe.read(tmp_path / "b.yaml").sha256() == first.sha256()


def test_stages_may_differ():
    recipe = Recipe.parse(yaml.safe_load(RECIPE))
    assert recipe.stage_arguments("2M")["max_steps"] == 10
    assert recipe.stage_arguments("1M")["max_steps"] == 20


@pytest.mark.parametrize(("more", "message"), [
    ({"stage": {"max_steps": 2, "temperature": 0}}, "temperature=0.*stage of anchor"), ({"stage": {"max_steps": 2, "divergence": "kl"}}, "divergence='kl'"),
    ({"stage": {"max_steps": 2, "optim": "foo"}}, "stage of anchor"), ({"anchors": [{"hidden": 64}]}, "hidden=64 cannot be cut"),
    ({"anchors": [{"layers": 0}]}, "layers"), ({"anchors": ["1K"]}, "smaller than the embeddings"), ({"anchors": ["39.3K"]}, "falling size"),
    ({"anchors": ["30K", {"layers": 1}]}, "name both layers and ffn"),
])
def test_what_cannot_be_is_said_before_anything_is_done(tmp_path, more, message):
    plain = {**make_recipe(tmp_path, "llama", ANCHORS), **more}
    with pytest.raises(CBDError, match=message):
        distill_chain(plain, tmp_path / "chain")
    assert not (tmp_path / "chain").exists()


@pytest.mark.parametrize(("key", "change", "message"), [
    ("teacher", {"teacher": "./nope"}, "neither a model folder nor a Hub id"), ("data", {"data": {"path": "./none.txt"}}, "no file matches"),
])
def test_what_is_wrong_with_teacher_or_data_has_its_line(tmp_path, key, change, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**make_recipe(tmp_path, "llama", ANCHORS), **change}, sort_keys=False))
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if text.startswith(f"{key}:"))
    for act in (lambda: distill_chain(path, tmp_path / "chain"), lambda: dry_run(Recipe.read(path))):
        with pytest.raises(CBDError, match=message) as caught:
            act()
        assert f"recipe.yaml line {line}: " in str(caught.value)


def test_a_stage_that_cannot_take_its_steps_is_no_anchor(tmp_path):
    plain = make_recipe(tmp_path, "llama", ANCHORS[:1], stage={"dataloader_drop_last": True, "per_device_train_batch_size": 10_000})
    with pytest.raises(RecipeError, match=r"max_steps=\d+ could not be taken, but 0: the text gives no more batches"):
        distill_chain(plain, tmp_path / "chain")
    assert not (tmp_path / "chain" / "chain.json").exists()


def test_settings_that_change_nothing_neither_stop_a_run_nor_a_chain_from_going_on(never_stopped, tmp_path):
    """How often is saved and said is no part of what a chain is."""
    plain, whole = never_stopped
    shutil.copytree(whole, tmp_path / "chain")
    before = Chain.from_pretrained(tmp_path / "chain").manifest
    other = {**plain, "stage": {**plain["stage"], "save_steps": 1, "logging_steps": 1}}
    assert distill_chain(other, tmp_path / "chain").manifest == before
    grown = distill_chain({**other, "anchors": [*ANCHORS, {"layers": 1, "ffn": 24}]}, tmp_path / "chain")
    assert [anchor.files for anchor in grown.anchors[:-1]] == [anchor.files for anchor in before.anchors]
    with pytest.raises(RecipeError, match="with stage.max_steps="):
        distill_chain({**other, "anchors": [*ANCHORS, {"layers": 1, "ffn": 24}, {"layers": 1, "ffn": 8}], "stage": {**other["stage"], "max_steps": 9}}, tmp_path / "chain")


def test_anchors_must_fall_in_size(tmp_path):
    plain = make_recipe(tmp_path, "llama", [{"layers": 2}, {"layers": 3}])
    with pytest.raises(RecipeError, match="layers=3 cannot be cut from layers=2"):
        distill_chain(plain, tmp_path / "chain")
    with pytest.raises(RecipeError, match="falling size"):
        distill_chain({**plain, "anchors": ["900M"]}, tmp_path / "other")
    with pytest.raises(RecipeError, match="4,096 layers of 1,048,576 neurons"):
        distill_chain({**plain, "anchors": [{"layers": 4096, "ffn": 1048576}]}, tmp_path / "other")


@pytest.mark.parametrize(("text", "message"), [("", "holds no text"), ("\n \n\t\n", "holds no text"), ("one line", "1 different documents"), ("a\n\nb\n\nc", "fill one block|less than one block")])
def test_too_little_text_is_named(tmp_path, text, message):
    plain = make_recipe(tmp_path, "llama", ANCHORS)
    Path(plain["data"]["path"]).write_text(text)
    with pytest.raises(DataError, match=message):
        distill_chain(plain, tmp_path / "chain")


def test_no_such_text(tmp_path):
    with pytest.raises(DataError, match="no file matches"):
        read_texts(str(tmp_path / "*.txt"))
    (tmp_path / "a.bin").write_bytes(b"\x00")
    with pytest.raises(DataError, match=r'"\.bin" files are not read'):
        read_texts(str(tmp_path / "a.bin"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_texts(str(tmp_path / "b.txt"))
    (tmp_path / "c.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(DataError, match='no column "text"; it has words'):
        read_texts(str(tmp_path / "c.jsonl"))
    (tmp_path / "d.jsonl").write_text('{"text": ')
    with pytest.raises(DataError, match="cannot be read as json"):
        read_texts(str(tmp_path / "d.jsonl"))


def test_the_parts_never_mix_and_do_not_depend_on_order():
    texts = tiny.texts(100)
    parts = split_documents(texts + texts[:10], 0.1, 0.2, seed=3)
    assert (len(parts.heldout), len(parts.calibration), len(parts.train)) == (10, 20, 70)
    assert set(parts.train) | set(parts.calibration) | set(parts.heldout) == set(texts)
    assert split_documents(texts[::-1], 0.1, 0.2, seed=3) == parts
    assert split_documents(texts, 0.1, 0.2, seed=4).heldout != parts.heldout


def test_packing_loses_nothing_but_the_tail():
    tokenizer = tiny.tokenizer()
    texts = tiny.texts(20)
    stream = [token for text in texts for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    packed = packed_dataset([{"text": text} for text in texts], tokenizer, 16)
    flat = [token for row in packed for token in row["input_ids"]]
    assert flat == stream[: len(stream) // 16 * 16]


def test_files_of_every_kind_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\r\n")
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n{"text": ""}\n{"text": "five"}\n')
    (tmp_path / "c.csv").write_text("text\nsix\n")
    assert read_texts(str(tmp_path / "*")) == ["one\ntwo", "three", "four", "five", "six"]
    assert texts.FORMATS[".parquet"] == "parquet"
