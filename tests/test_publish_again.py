"""What is there already when something is published: how open it is, tags, cards, files of an older model."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from conftest import recipe
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download

from cbd_hub import CBDModel, Chain, ChainDistiller, ChainDistillerConfig, assemble_chain, distill_chain
from cbd_hub.card_metadata import check_card, license_lines
from cbd_hub.errors import ArgumentError, ManifestError, WeightsError
from cbd_hub.extend import add_anchor
from cbd_hub.manifest import Manifest
from cbd_hub.publish import push_model
from cbd_hub.single import cut_single
from cbd_hub.space.push import push_space


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """Three models, and a chain of them."""
    folder = tmp_path_factory.mktemp("again")
    models = [tiny.save(tiny.llama(layers=layers, seed=layers), folder / f"m{layers}") for layers in (6, 4, 2)]
    assemble_chain(models, folder / "chain", align=False)
    return models, folder / "chain"


def between(chain):
    """A size half way between the two largest anchors."""
    large, small = Chain.from_pretrained(chain).anchors[:2]
    return (large.parameters + small.parameters) // 2


def readme(hub, repo):
    return hub.repos[repo].at("main")[1]["README.md"].decode()


def openness(hub):
    return {name: (repo.private, repo.gated) for name, repo in hub.repos.items()}


def test_what_grows_out_of_a_shut_chain_is_as_shut(hub, llamas, tmp_path):
    """A further anchor, one that somebody adds, and a size; what is said goes before it."""
    models, whole = llamas
    assemble_chain(models[:2], tmp_path / "two", align=False)
    Chain.from_pretrained(tmp_path / "two").push_to_hub("org/shut", private=True, gated="manual")
    Chain.from_pretrained(whole).push_to_hub("org/shut")
    further = tiny.save(tiny.llama(layers=3, seed=13), tmp_path / "m3")
    add_anchor(Chain.from_pretrained("org/shut"), further, "org/shut-between")
    CBDModel.materialize("org/shut", between(whole), output_dir=tmp_path / "made")
    push_model(tmp_path / "made", "org/made")
    assert len(hub.repos) == 6
    assert set(openness(hub).values()) == {(True, "manual")}
    push_model(tmp_path / "made", "org/open", private=False)
    assert hub.repos["org/open"].private is False


def test_a_push_that_stopped_goes_on_as_shut_as_it_began(hub, llamas, monkeypatch):
    chain = Chain.from_pretrained(llamas[1])
    with monkeypatch.context() as stopped:
        stopped.setattr(HfApi, "create_commit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            chain.push_to_hub("org/shut", private=True, gated="auto")
    assert len(hub.repos) == 1
    chain.push_to_hub("org/shut")
    assert len(hub.repos) == 4
    assert set(openness(hub).values()) == {(True, "auto")}


def test_a_tag_that_is_taken_is_refused_before_anything_is_sent(hub, llamas):
    models, whole = llamas
    chain = Chain.from_pretrained(whole)
    first = chain.push_to_hub("org/chain", tag="first")
    assert chain.push_to_hub("org/chain", tag="first").commit == first.commit, "it is on this very commit"
    index = hub.repos["org/chain"]
    index.commit({**index.at("main")[1], "mine.txt": b"1"})
    index.tags["v²"] = first.commit
    there = {name: repo.at("main")[0] for name, repo in hub.repos.items()}
    for tag, why in (("first", "has the tag first on another commit"), ("a b", "is no name for a tag"), ("x..y", "is no name")):
        with pytest.raises(ArgumentError, match=why):
            chain.push_to_hub("org/chain", tag=tag)
    with pytest.raises(ArgumentError, match="is no name for a tag"):
        chain.push_to_hub("org/chain", tag="~", dry_run=True)
    with pytest.raises(ArgumentError, match="which a pull request has none of"):
        chain.push_to_hub("org/chain", tag="second", create_pr=True)
    assert {name: repo.at("main")[0] for name, repo in hub.repos.items()} == there
    assert chain.push_to_hub("org/chain").tag == "v1", "numbers are told from what only looks like one"


def test_metadata_that_is_no_yaml_is_named(hub, llamas, tmp_path):
    """On an anchor, on the index, and in a local card: what people wrote would be lost."""
    chain = Chain.from_pretrained(llamas[1])
    done = chain.push_to_hub("org/chain")
    for name in ("org/chain", done.anchors[chain.anchors[0].name][0]):
        repo = hub.repos[name]
        commit, files = repo.at("main")
        repo.commit({**files, "README.md": b"---\nlicense: mit: x\n---\nMine\n"})
        with pytest.raises(ArgumentError, match=f"the card of {name} has metadata that is not YAML"):
            chain.push_to_hub("org/chain")
        repo.commit(files)
    shutil.copytree(llamas[1], tmp_path / "chain")
    (tmp_path / "chain/README.md").write_text("---\nlicense: mit: x\n---\nMine\n")
    with pytest.raises(ArgumentError, match=r"README\.md has metadata that is not YAML"):
        Chain.from_pretrained(tmp_path / "chain").push_to_hub("org/other")
    assert "org/other" not in hub.repos


def test_which_units_an_older_model_kept_goes_with_it(hub, llamas, tmp_path):
    cut_single(llamas[0][0], shape={"layers": 3}, calibration=tiny.texts(40)).save_pretrained(tmp_path / "cut")
    push_model(tmp_path / "cut", "org/x")
    assert "cbd_kept.tensors" in hub.repos["org/x"].at("main")[1]
    CBDModel.materialize(llamas[1], between(llamas[1]), output_dir=tmp_path / "made")
    push_model(tmp_path / "made", "org/x")
    assert "cbd_kept.tensors" not in hub.repos["org/x"].at("main")[1]


def test_the_trainers_push_keeps_what_people_wrote(hub, tmp_path):
    arguments = ChainDistillerConfig(
        str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2, hub_model_id="org/student", bf16=False, disable_tqdm=True, report_to="none", use_cpu=True
    )
    trainer = ChainDistiller(
        model=tiny.llama(layers=2), teacher=tiny.llama(layers=4), args=arguments, train_dataset=Dataset.from_dict({"text": tiny.texts(20)}), processing_class=tiny.tokenizer()
    )
    trainer.push_to_hub()
    repo = hub.repos["org/student"]
    files = repo.at("main")[1]
    repo.commit({**files, "README.md": files["README.md"].replace(b"pipeline_tag", b"license: mit\npipeline_tag", 1) + b"\nMy own words.\n"})
    trainer.push_to_hub()
    text = readme(hub, "org/student")
    assert ModelCard(text).data.license == "mit"
    assert "My own words." in text
    assert text.count("# org/student") == 1


def test_a_token_in_a_recipes_comment_stays_here(hub, tmp_path):
    distill_chain(recipe(tmp_path, "llama", [{"layers": 2}]), tmp_path / "chain")
    path = tmp_path / "chain/recipe.yaml"
    path.write_text("teacher: org/x\nanchors: [1M]\n")
    chain = Chain.from_pretrained(tmp_path / "chain")
    chain.push_to_hub("org/open")
    assert "recipe.yaml" in hub.repos["org/open"].at("main")[1]
    path.write_text(f"# with hf_{'a' * 34}\n" + path.read_text())
    chain.push_to_hub("org/shut")
    assert "recipe.yaml" not in hub.repos["org/shut"].at("main")[1]


def test_an_anchor_of_a_checkpoint_has_its_licence_and_no_base_that_it_never_had(hub, tmp_path):
    ready = tiny.save(tiny.llama(layers=2, seed=7), tmp_path / "ready")
    (ready / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    values = recipe(tmp_path, "llama", [{"checkpoint": str(ready)}], align=False)
    (Path(values["teacher"]) / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    chain = distill_chain(values, tmp_path / "chain")
    assert [anchor.license for anchor in chain.anchors] == [None, "cc-by-nc-4.0"]
    path = tmp_path / "chain/chain.json"
    manifest = json.loads(path.read_text())
    manifest["teacher"]["repo_id"] = "org/teacher"
    path.write_text(json.dumps(manifest))
    done = Chain.from_pretrained(tmp_path / "chain").push_to_hub("org/chain")
    (top, _), (small, _) = done.anchors.values()
    data = ModelCard(readme(hub, small)).data
    assert (data.license, data.base_model, "distillation" in data.tags) == ("cc-by-nc-4.0", None, True)
    data = ModelCard(readme(hub, top)).data
    assert (data.license, data.base_model, "distillation" in data.tags) == ("apache-2.0", "org/teacher", False)
    assert ModelCard(readme(hub, "org/chain")).data.license is None, "they differ"


def test_a_size_of_a_local_chain_has_its_licence_and_an_anchor_is_no_merge(hub, llamas, tmp_path):
    shutil.copytree(llamas[1], tmp_path / "chain")
    path = tmp_path / "chain/chain.json"
    manifest = json.loads(path.read_text())
    for anchor in manifest["anchors"]:
        anchor["license"] = "gemma"
    path.write_text(json.dumps(manifest))
    Chain.from_pretrained(tmp_path / "chain").push_to_hub("org/chain")
    middle = between(llamas[1])
    for source, size, tags, relation in ((tmp_path / "chain", middle, True, None), ("org/chain", middle, True, "merge"), ("org/chain", "min", False, None)):
        CBDModel.materialize(source, size, output_dir=tmp_path / "made")
        push_model(tmp_path / "made", "org/made")
        data = ModelCard(readme(hub, "org/made")).data
        assert (data.license, "merge" in data.tags, data.get("base_model_relation")) == ("gemma", tags, relation)
        shutil.rmtree(tmp_path / "made")
        del hub.repos["org/made"]


@pytest.mark.parametrize("name", ["1.0", "No", "on", "2024-01-01", "null"])
def test_a_licences_name_is_a_text(name):
    card = f"---\n{license_lines(name)}---\n"
    check_card(card, "org/x")
    assert ModelCard(card).data.license_name == name.lower()


def test_an_anchor_in_the_chains_own_repo_is_told_by_its_folder(hub, llamas, tmp_path):
    api = HfApi()
    api.create_repo("org/one")
    api.upload_folder(repo_id="org/one", folder_path=llamas[1])
    further = tiny.save(tiny.llama(layers=3, seed=13), tmp_path / "m3")
    add_anchor(Chain.from_pretrained("org/one"), further, "you/between")
    text, names = readme(hub, "org/one"), [anchor.name for anchor in Chain.from_pretrained(llamas[1]).anchors]
    assert f'AutoModelForCausalLM.from_pretrained("org/one", subfolder="anchors/{names[-1]}")' in text
    assert f"](https://huggingface.co/org/one/tree/main/anchors/{names[0]})" in text
    assert "](https://huggingface.co/you/between)" in text


def test_a_dry_run_of_a_size_asks_the_hub_nothing(hub, llamas, tmp_path, monkeypatch):
    Chain.from_pretrained(llamas[1]).push_to_hub("org/chain")
    CBDModel.materialize("org/chain", between(llamas[1]), output_dir=tmp_path / "made")
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other"))
    assert push_model(tmp_path / "made", "org/made", dry_run=True).commit is None
    assert not hub.log


@pytest.mark.parametrize(("change", "place"), [
    ({"neighbours": 5}, r"cbd\.neighbours"), ({"license": [1]}, r"cbd\.license"), ({"strategy": "cut", "difference": 0.1}, r"cbd\.model"),
])
def test_a_config_that_says_nonsense_of_its_origin_is_refused_by_name(llamas, tmp_path, change, place):
    CBDModel.materialize(llamas[1], between(llamas[1]), output_dir=tmp_path / "made")
    path = tmp_path / "made/config.json"
    config = json.loads(path.read_text())
    config["cbd"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=place):
        push_model(tmp_path / "made", "org/made", dry_run=True)


@pytest.mark.parametrize(("field", "value"), [("loss", -1.0), ("stderr", -0.1), ("loss", 1e300), ("bits_per_byte", -2.0)])
def test_figures_that_no_measurement_gives_are_refused(llamas, field, value):
    """A picture could not be drawn of them, when all anchors are published."""
    values = json.loads((llamas[1] / "chain.json").read_text())
    values["anchors"][0]["evaluations"] = [{"loss": 3.0, "tokens": 5, "dataset": "x", field: value}]
    with pytest.raises(ManifestError, match=field):
        Manifest.parse(values, "x")


def test_a_snapshot_whose_blobs_are_shared_is_a_chain_too(hub, llamas):
    """As the client's cache has them where they came by Xet: the repo's blobs are links themselves."""
    shared = pytest.importorskip("huggingface_hub.utils._shared_blobs")
    Chain.from_pretrained(llamas[1]).push_to_hub("org/chain")
    folder = Path(snapshot_download("org/chain"))
    cache = folder.parents[2]
    chain = Chain.from_pretrained(folder)
    record = chain.anchors[0].chunks
    blob = (folder / record.path).resolve()
    assert shared.publish_blob_to_shared_store(
        blob_path=str(blob), xet_hash=record.sha256, cache_dir=str(cache), expected_size=blob.stat().st_size, replace_existing=False
    )
    assert cache / "blobs" in chain.files.side_file(record).resolve().parents
    (cache / "blobs/.huggingface-shared-blobs").unlink()
    with pytest.raises(ManifestError, match="leads out of the chain's folder"):
        chain.files.side_file(record)


def test_a_space_never_takes_an_apps_place_and_is_as_shut_as_its_chain(hub, cbd, llamas):
    Chain.from_pretrained(llamas[1]).push_to_hub("org/shut", private=True, collection=False)
    chain = Chain.from_pretrained("org/shut")
    api = HfApi()
    api.create_repo("org/mine", repo_type="space", space_sdk="docker")
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="app.py", repo_id="org/mine", repo_type="space")
    for dry in (True, False):
        with pytest.raises(ArgumentError, match="the Space org/mine holds an app that `cbd space` did not deploy"):
            push_space(chain, "org/mine", dry_run=dry)
    assert hub.repos["spaces/org/mine"].at("main")[1]["app.py"] == b"mine"
    code, _, said = cbd("space", "org/shut", "--push", "org/look")
    assert code == 0, said
    assert "give the Space a secret HF_TOKEN" in said
    space = hub.repos["spaces/org/look"]
    assert space.private
    assert "`HF_TOKEN`" in space.at("main")[1]["README.md"].decode()
    space.private = False
    with pytest.raises(ArgumentError, match="the Space org/look is public, but private was asked"):
        push_space(chain, "org/look", private=True)
    del hub.repos[f"org/shut-{chain.anchors[1].name}"]
    with pytest.raises(ManifestError, match=f"org/shut-{chain.anchors[1].name}"):
        push_space(chain, "org/look")
