"""A third party's anchor in a chain: beyond its ends and inside a segment, with the licence of its own card."""

import json

import pytest
import tiny
from huggingface_hub import ModelCard

from cbd_hub import CBDModel, Chain, assemble_chain
from cbd_hub.cards import license_of
from cbd_hub.extend import add_anchor
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
    before = Chain.from_pretrained(tmp_path / "local")
    added = card(tiny.save(tiny.llama(layers=4, seed=4), tmp_path / "m4"), "license: cc-by-nc-sa-4.0")
    (tmp_path / "local/README.md").write_text((tmp_path / "local/README.md").read_text() + "\nHand-written.\n")
    add_anchor(before, added, "third/four")
    chain = Chain.from_pretrained(tmp_path / "local")
    check_split(chain, before)
    text = (tmp_path / "local/README.md").read_text()
    assert chain.anchors[1].name in text
    assert "Hand-written." in text
    assert ModelCard(hub.repos["third/four"].at("main")[1]["README.md"].decode()).data.license == "cc-by-nc-sa-4.0"
    model = CBDModel.from_chain(tmp_path / "local", shape={"layers": 5})
    assert model.config.num_hidden_layers == 5


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
