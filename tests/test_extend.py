"""A third party's anchor in a chain: beyond its ends and inside a segment, with the licence of its own card."""

import json
from contextlib import suppress

import pytest
import tiny
from conftest import recipe
from huggingface_hub import HfApi, ModelCard
from transformers import AutoTokenizer

from cbd_hub import CBDModel, Chain, assemble_chain, distill_chain, extend
from cbd_hub.card_metadata import license_of
from cbd_hub.errors import StorageError
from cbd_hub.extend import add_anchor
from cbd_hub.hub import resolve_checkpoint
from cbd_hub.interpolation.blend import blend_plan
from cbd_hub.manifest import Mix
from cbd_hub.plans import segment_between
from cbd_hub.publish import push_model


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A chain of 6, 2 and 1 layers whose segments have curves."""
    folder = tmp_path_factory.mktemp("extend")
    for layers in (6, 2, 1):
        tiny.save(tiny.llama(layers=layers, seed=layers), folder / f"m{layers}")
    chain = assemble_chain([folder / f"m{layers}" for layers in (6, 2, 1)], folder / "chain")
    values = json.loads((folder / "chain/chain.json").read_text())
    for link, (large, small) in zip(values["links"], zip(chain.anchors, chain.anchors[1:])):
        middle = (large.parameters + small.parameters) // 2
        link["curve"] = [{"size": middle, "strategy": "patch", "loss": 3.0, "stderr": 0.1, "tokens": 100, "dataset": "words"}]
        link["recommended_sizes"] = [middle]
    (folder / "chain/chain.json").write_text(json.dumps(values))
    return folder / "chain"


def card(folder, text):
    (folder / "README.md").write_text(f"---\n{text}\n---\nmine\n")
    return folder


def check_split(chain, before):
    """The split segment is two new ones of which nothing was measured; the other one is as it was."""
    assert [anchor.shape.layers for anchor in chain.anchors] == [6, 4, 2, 1]
    first, second, kept = chain.manifest.links
    for link, dropped in ((first, 2), (second, 2)):
        assert (link.kind, link.curve, link.recommended_sizes, len(link.order)) == ("segment", [], [], dropped)
        assert link.strategies.patch is not None
    assert kept == before.manifest.links[1]
    for layers, ends in ((5, (6, 4)), (3, (4, 2))):
        plan = CBDModel.plan(chain.files.root if chain.files.revision is None else chain.files.name, shape={"layers": layers}, revision=chain.files.revision)
        assert [chain.manifest.anchor(name).shape.layers for name in (plan.large, plan.small)] == list(ends)


def test_an_anchor_inside_a_segment_of_a_local_chain(hub, measured, tmp_path):
    Chain.from_pretrained(measured).save_pretrained(tmp_path / "local")
    index = json.loads((tmp_path / "local/chain.json").read_text())
    for anchor in index["anchors"]:
        anchor["tokenizer_sha256"] = "0" * 64  # of a version that recorded it otherwise
    (tmp_path / "local/chain.json").write_text(json.dumps(index))
    before = Chain.from_pretrained(tmp_path / "local")
    added = card(tiny.save(tiny.llama(layers=4, seed=4), tmp_path / "m4"), "license: cc-by-nc-sa-4.0")
    (tmp_path / "local/README.md").write_text((tmp_path / "local/README.md").read_text() + "\nHand-written.\n")
    add_anchor(before, added, "third/four")
    chain = Chain.from_pretrained(tmp_path / "local")
    check_split(chain, before)
    assert len({anchor.tokenizer_sha256 for anchor in chain.anchors}) == 1
    text = (tmp_path / "local/README.md").read_text()
    assert chain.anchors[1].name in text
    assert "Hand-written." in text
    assert ModelCard(hub.repos["third/four"].at("main")[1]["README.md"].decode()).data.license == "cc-by-nc-sa-4.0"
    model = CBDModel.from_chain(tmp_path / "local", shape={"layers": 5})
    assert model.config.num_hidden_layers == 5


def test_a_chain_that_was_changed_meanwhile_is_not_written_over(hub, measured, tmp_path):
    Chain.from_pretrained(measured).save_pretrained(tmp_path / "local")
    first, second = (Chain.from_pretrained(tmp_path / "local") for _ in range(2))
    add_anchor(first, tiny.save(tiny.llama(layers=4, seed=4), tmp_path / "m4"), "third/four")
    written = (tmp_path / "local/chain.json").read_bytes()
    with pytest.raises(StorageError, match="has changed since it was read; nothing was written to it"):
        add_anchor(second, tiny.save(tiny.llama(layers=5, seed=5), tmp_path / "m5"), "third/five")
    assert (tmp_path / "local/chain.json").read_bytes() == written


def test_an_anchor_inside_a_segment_of_a_published_chain(hub, measured, tmp_path):
    before = Chain.from_pretrained(measured)
    before.push_to_hub("org/chain")
    old = hub.repos["org/chain"].at("main")[1]
    added = tiny.save(tiny.llama(layers=4, seed=4), tmp_path / "m4")
    add_anchor(Chain.from_pretrained("org/chain"), added, "third/four")
    check_split(Chain.from_pretrained("org/chain"), before)
    files = hub.repos["org/chain"].at("main")[1]
    assert files["curve.png"] != old["curve.png"], "the picture shows what is measured now"
    assert "license" not in ModelCard(hub.repos["third/four"].at("main")[1]["README.md"].decode()).data.to_dict(), "none is known, so none is invented"


def test_licences_come_from_cards_and_teachers(hub, measured, tmp_path):
    """Of an assembled chain each anchor keeps its checkpoint's; a model in between has one where its anchors agree; an anchor without one has the chain's."""
    for layers, licence in ((6, "license: other\nlicense_name: Our Licence"), (2, "license: other\nlicense_name: Our Licence"), (1, "license: mit")):
        card(tiny.save(tiny.llama(layers=layers, seed=layers), tmp_path / f"m{layers}"), licence)
    assemble_chain([tmp_path / f"m{layers}" for layers in (6, 2, 1)], tmp_path / "chain")
    done = Chain.from_pretrained(tmp_path / "chain").push_to_hub("org/chain")
    found = [ModelCard(hub.repos[repo].at("main")[1]["README.md"].decode()).data for repo, _ in done.anchors.values()]
    assert [(data.license, data.license_name) for data in found] == [("other", "our-licence"), ("other", "our-licence"), ("mit", None)]
    assert "license" not in ModelCard(hub.repos["org/chain"].at("main")[1]["README.md"].decode()).data.to_dict(), "its anchors differ"
    two = assemble_chain([tmp_path / "m6", tmp_path / "m2"], tmp_path / "two")
    two.push_to_hub("org/two")
    add_anchor(Chain.from_pretrained("org/two"), tiny.save(tiny.llama(layers=1, seed=9), tmp_path / "bare"), "third/bare")
    assert ModelCard(hub.repos["third/bare"].at("main")[1]["README.md"].decode()).data.license_name == "our-licence"
    assert ModelCard(hub.repos["org/two"].at("main")[1]["README.md"].decode()).data.license_name == "our-licence"
    add_anchor(Chain.from_pretrained("org/two"), card(tiny.save(tiny.llama(layers=4, seed=9), tmp_path / "mit"), "license: mit"), "third/mit")
    assert "license" not in ModelCard(hub.repos["org/two"].at("main")[1]["README.md"].decode()).data.to_dict(), "its anchors no longer agree"
    CBDModel.materialize("org/chain", shape={"layers": 4}, output_dir=tmp_path / "made")
    push_model(tmp_path / "made", "org/made")
    data = ModelCard(hub.repos["org/made"].at("main")[1]["README.md"].decode()).data
    assert (data.license, data.license_name, data.base_model_relation) == ("other", "our-licence", "merge")


@pytest.mark.parametrize("text", ["license: [mit, apache-2.0]", "license: 3", "license: ''", "x: [", "- 1"])
def test_what_is_no_licence_is_none(text, tmp_path):
    assert license_of(card(tmp_path, text)) is None
    assert license_of(tmp_path / "nowhere") is None


def test_a_new_largest_anchor_brings_the_chains_tokenizer(hub, measured, tmp_path):
    """The files beside chain.json are the first anchor's; one of the same vocabulary may have other settings and lack a file."""
    folder = tiny.save(tiny.llama(layers=8, seed=8), tmp_path / "m8")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 123}))
    (folder / "chat_template.jinja").unlink()
    Chain.from_pretrained(measured).save_pretrained(tmp_path / "local")
    Chain.from_pretrained(measured).push_to_hub("org/chain")
    assert "chat_template.jinja" in hub.repos["org/chain"].at("main")[1]
    for name, repo in ((tmp_path / "local", "third/local"), ("org/chain", "third/eight")):
        add_anchor(Chain.from_pretrained(name), folder, repo)
        chain = Chain.from_pretrained(name)
        assert [anchor.shape.layers for anchor in chain.anchors] == [8, 6, 2, 1]
        for size in (None, "min", "max"):
            assert chain.tokenizer(size).model_max_length == 123
    assert "chat_template.jinja" not in hub.repos["org/chain"].at("main")[1]


def test_a_new_largest_anchor_is_read_with_the_chains_tokenizer_by_whatever_rules(hub, tmp_path):
    """Of a Qwen2 transformers reads every tokenizer by Qwen2's rules, and beside chain.json there is no architecture."""
    folders = [tiny.save(tiny.qwen2(layers=layers), tmp_path / f"{layers}") for layers in (6, 4, 2)]
    text, expected = "A\u030a \u2126.", AutoTokenizer.from_pretrained(folders[0])("A\u030a \u2126.").input_ids
    assert expected != tiny.tokenizer()(text).input_ids
    add_anchor(assemble_chain(folders[1:], tmp_path / "chain"), folders[0], "third/six")
    chain = Chain.from_pretrained(tmp_path / "chain")
    assert [chain.tokenizer(size)(text).input_ids for size in (None, "max", "min")] == [expected] * 3
    assert AutoTokenizer.from_pretrained("third/six")(text).input_ids == AutoTokenizer.from_pretrained(tmp_path / "chain")(text).input_ids == expected


@pytest.mark.parametrize("writes", range(7))
def test_a_local_chain_keeps_a_tokenizer_whenever_its_growth_is_killed(hub, measured, tmp_path, monkeypatch, writes):
    folder = tiny.save(tiny.llama(layers=8, seed=8), tmp_path / "m8")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 123}))
    (folder / "chat_template.jinja").unlink()
    Chain.from_pretrained(measured).save_pretrained(tmp_path / "local")
    left = iter(range(writes))

    def killed(write):
        def call(path, *content):
            if path.is_relative_to(tmp_path / "local") and next(left, None) is None:
                raise tiny.Killed
            return write(path, *content)
        return call

    for name in ("write_bytes", "write_text"):
        monkeypatch.setattr(extend, name, killed(getattr(extend, name)))
    with suppress(tiny.Killed):
        add_anchor(Chain.from_pretrained(tmp_path / "local"), folder, "third/local")
    chain = Chain.from_pretrained(tmp_path / "local")
    tokenizer = chain.tokenizer()
    new = len(chain.anchors) == 4
    assert (tokenizer.model_max_length == 123, tokenizer.chat_template is None) == (new, new)
    assert new == (writes >= 5)  # the record of its chunks, two files of the tokenizer, config.json, chain.json


def test_anchors_in_folders_of_a_published_chain_keep_their_tokenizers(hub, measured, tmp_path):
    """Somebody uploaded the folder as it is: only what stands beside chain.json makes room."""
    HfApi().create_repo("org/whole")
    HfApi().upload_folder(repo_id="org/whole", folder_path=measured)
    before = {path for path in hub.repos["org/whole"].at("main")[1] if path.startswith("anchors/")}
    add_anchor(Chain.from_pretrained("org/whole"), tiny.save(tiny.llama(layers=8, seed=8), tmp_path / "m8"), "third/eight")
    assert {path for path in hub.repos["org/whole"].at("main")[1] if path.startswith("anchors/")} == before
    assert CBDModel.from_chain("org/whole", "min").config.num_hidden_layers == 1


def test_of_a_checkpoint_on_the_hub_only_the_weights_beside_its_config_are_fetched(hub, tmp_path):
    """Some repos hold the same weights once more, in folders of the maker's format or of other dtypes."""
    tiny.save(tiny.llama(layers=2), tmp_path / "m")
    (tmp_path / "m" / "original").mkdir()
    (tmp_path / "m" / "original" / "model.safetensors").write_bytes(b"the same once more")
    HfApi().create_repo("org/model")
    HfApi().upload_folder(repo_id="org/model", folder_path=tmp_path / "m")
    found = resolve_checkpoint("org/model")
    assert (found / "model.safetensors").is_file()
    assert not (found / "original").exists()


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A distilled chain whose smaller anchor was cut from the teacher in layers, FFN and hidden width."""
    folder = tmp_path_factory.mktemp("cut")
    made = recipe(folder, "llama", [{"layers": 2, "ffn": 24, "hidden": 24}], teacher={"layers": 6, "ffn": 48, "hidden": 32, "head_dim": 8})
    distill_chain(made, folder / "chain")
    return folder / "chain"


@pytest.mark.parametrize("published", [False, True], ids=["local", "published"])
def test_a_size_of_the_chain_as_an_anchor_keeps_the_coordinates(hub, cut, tmp_path, caplog, published):
    """With weights in between as the plan makes them, the sizes around the new anchor are what that very neighbour and a blend with it are."""
    Chain.from_pretrained(cut).save_pretrained(tmp_path / "local")
    name = tmp_path / "local"
    if published:
        Chain.from_pretrained(cut).push_to_hub("org/cut")
        name = "org/cut"
    before = Chain.from_pretrained(name)
    large, small = before.anchors
    middle = (large.parameters + small.parameters) // 2
    for number, size in enumerate((middle, (middle + small.parameters) // 2)):  # the second between the first and the anchor cut from the same one
        CBDModel.materialize(name, size, output_dir=tmp_path / f"made{number}", tolerance=0.2)
        add_anchor(Chain.from_pretrained(name), tmp_path / f"made{number}", f"third/made{number}")
    chain = Chain.from_pretrained(name)
    assert not [record for record in caplog.records if record.name == "cbd_hub.extend"]
    assert [anchor.parent for anchor in chain.anchors] == [None, large.name, large.name, large.name]
    segments = [segment_between(chain.files, low, high) for high, low in zip(chain.anchors, chain.anchors[1:])]
    whole = segment_between(before.files, small, large)
    held = list(range(6))
    for segment in segments:  # layers of the teacher, followed down the chain
        assert not segment.blend.replicate
        held = [held[layer] for layer in segment.kept.layers]
        returned = [layer for layer in whole.order if layer in held]
        assert returned == list(whole.order)[: len(returned)]
    assert held == [int(layer) for layer in whole.kept.layers]
    made = chain.anchors[1]
    first = blend_plan(segments[0], made.shape, Mix(alpha=0.0)).tensors  # all of the larger neighbour's units that the new anchor stands for
    second = blend_plan(whole, made.shape, Mix(alpha=0.0)).tensors
    for key, terms in first.items():
        for ours, theirs in zip(terms, second[key], strict=True):
            assert (ours.anchor, ours.tensor, ours.weight) == (theirs.anchor, theirs.tensor, theirs.weight)
            assert [take.index.tolist() for take in ours.takes] == [take.index.tolist() for take in theirs.takes]
    model = chain.model((made.parameters + chain.anchors[2].parameters) // 2, tolerance=0.2)
    assert model.config.cbd["neighbours"] == [chain.anchors[2].name, made.name]


def test_a_size_of_another_chain_of_the_same_names_is_told_of(hub, cut, tmp_path, caplog):
    """Local chains are named after their folder and anchors after their size: what tells them apart are the units that were kept."""
    Chain.from_pretrained(cut).save_pretrained(tmp_path / "chain")
    CBDModel.materialize(tmp_path / "chain", shape={"layers": 4, "ffn": 40, "hidden": 32}, output_dir=tmp_path / "made")
    config = json.loads((tmp_path / "made/config.json").read_text())
    (tmp_path / "made/config.json").write_text(json.dumps({**config, "cbd": {**config["cbd"], "maps": "0" * 64}}))
    add_anchor(Chain.from_pretrained(tmp_path / "chain"), tmp_path / "made", "third/made")
    assert "share coordinates, which" in caplog.text


def test_a_stranger_among_shared_coordinates_is_told_of(hub, cut, tmp_path, caplog):
    Chain.from_pretrained(cut).save_pretrained(tmp_path / "local")
    add_anchor(Chain.from_pretrained(tmp_path / "local"), tiny.save(tiny.llama(layers=4, ffn=40, hidden=32, head_dim=8), tmp_path / "m4"), "third/four")
    assert "share coordinates, which" in caplog.text
    middle = Chain.from_pretrained(tmp_path / "local").anchors[1]
    assert (middle.parent, middle.maps) == (None, None)
