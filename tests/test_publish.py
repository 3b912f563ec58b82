"""Publish a chain with the official client, and load it back."""

import json

import pytest
import tiny
import yaml
from conftest import recipe
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from cbd_hub import CBDModel, Chain, assemble_chain, distill_chain
from cbd_hub.distill.schema import Recipe
from cbd_hub.errors import ArgumentError, IntegrityError, ManifestError, RecipeError, StorageError, WeightsError
from cbd_hub.extend import add_anchor
from cbd_hub.hub import ChainFiles
from cbd_hub.manifest import MAX_BYTES
from cbd_hub.publish import push_model
from cbd_hub.single import cut_single


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A distilled chain of three anchors."""
    folder = tmp_path_factory.mktemp("publish")
    distill_chain(recipe(folder, "llama", [{"layers": 4, "ffn": 24}, {"layers": 2, "ffn": 24}]), folder / "chain")
    return folder / "chain"


def middle(chain):
    first, second = Chain.from_pretrained(chain).anchors[:2]
    return (first.parameters + second.parameters) // 2


def test_a_pushed_chain_is_the_chain(hub, llama, tmp_path):
    chain = Chain.from_pretrained(llama)
    said = []
    done = chain.push_to_hub("org/tiny", progress=said.append)
    assert set(hub.repos) == {"org/tiny", *(f"org/tiny-{anchor.name}" for anchor in chain.anchors)}
    assert len(said) == 4
    assert done.tag == "v1"
    commit, index = hub.repos["org/tiny"].at("main")
    assert commit == done.commit == hub.repos["org/tiny"].tags["v1"]
    assert not [path for path in index if path.endswith(".safetensors") and not path.startswith("maps/")]
    assert [item["id"] for item in hub.collections[done.collection]["items"]] == ["org/tiny", *(repo for repo, _ in done.anchors.values())]
    for name, (repo, revision) in done.anchors.items():
        assert hub.repos[repo].at("main")[0] == revision
        assert hub.repos[repo].at("main")[1]["model.safetensors"] == (llama / "anchors" / name / "model.safetensors").read_bytes()
    remote = Chain.from_pretrained("org/tiny")
    assert remote.files.revision == commit
    size = middle(llama)
    assert tiny.same(CBDModel.from_chain("org/tiny", size=size), CBDModel.from_chain(llama, size))
    assert "hf_test" not in repr(remote.files) + str(hub.repos)
    text = remote.tokenizer()("a model").input_ids
    assert text == chain.tokenizer()("a model").input_ids
    remote.save_pretrained(tmp_path / "pulled")
    assert tiny.same(CBDModel.from_chain(tmp_path / "pulled", size=size), CBDModel.from_chain(llama, size))
    ours, theirs = (json.loads((folder / "chain.json").read_text()) for folder in (llama, tmp_path / "pulled"))
    for anchor in theirs["anchors"]:
        assert anchor["preview"] is None
    for point in (point for link in (*ours["links"], *theirs["links"]) for point in link["curve"]):
        point["dataset"] = point["dataset"].rpartition("/")[2]
    assert ours["links"] == theirs["links"]
    assert [anchor["files"] for anchor in ours["anchors"]] == [anchor["files"] for anchor in theirs["anchors"]]


def test_pushing_again_sends_nothing(hub, llama):
    first = Chain.from_pretrained(llama).push_to_hub("org/tiny")
    hub.forget()
    assert Chain.from_pretrained(llama).push_to_hub("org/tiny") == first
    assert not [entry for entry in hub.log if entry.method == "PUT" or "/commit/" in entry.path]


def test_cards_say_what_is_known_and_invent_nothing(hub, llama):
    Chain.from_pretrained(llama).push_to_hub("org/tiny")
    for repo_id, repo in hub.repos.items():
        text = repo.at("main")[1]["README.md"].decode()
        card = ModelCard(text)
        assert "license" not in card.data.to_dict()
        assert "base_model" not in card.data.to_dict()
        assert card.data.library_name == ("cbd-hub" if repo_id == "org/tiny" else "transformers")
        assert str(llama.parent) not in text
    assert "recipe.yaml" not in hub.repos["org/tiny"].at("main")[1], "it names a folder of this machine"
    assert hub.repos["org/tiny"].at("main")[1]["curve.png"].startswith(b"\x89PNG")


def with_teacher(llama, tmp_path, **teacher):
    """A copy of the chain whose teacher is on the Hub."""
    Chain.from_pretrained(llama).save_pretrained(tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / "chain.json").read_text())
    manifest["teacher"] = {"parameters": 1000, **teacher}
    (tmp_path / "copy" / "chain.json").write_text(json.dumps(manifest))
    return Chain.from_pretrained(tmp_path / "copy")


def test_the_licence_is_inherited_and_hand_written_parts_stay(hub, llama, tmp_path):
    chain = with_teacher(llama, tmp_path, repo_id="big/teacher", license="Apache-2.0")
    done = chain.push_to_hub("org/tiny")
    last = chain.anchors[-1].name
    repo = hub.repos[done.anchors[last][0]]
    files = repo.at("main")[1]
    data = ModelCard(files["README.md"].decode()).data
    assert (data.license, data.base_model, data.base_model_relation) == ("apache-2.0", "big/teacher", "finetune")
    assert "cbd-chain:org/tiny" in data.tags
    words = files["README.md"].decode().replace("tags:", "language: en\nlicense_link: https://example.org\ntags:\n- mine").replace("license: apache-2.0", "license: mit") + "\nHand-written.\n"
    repo.commit({**files, "README.md": words.encode()})
    chain.push_to_hub("org/tiny")
    text = repo.at("main")[1]["README.md"].decode()
    merged = ModelCard(text).data
    assert (merged.license, merged.license_link, merged.language) == ("mit", "https://example.org", ["en"])
    assert {"mine", "distillation"} <= set(merged.tags)
    assert text.count("cbd_hub:begin") == 1
    assert "Hand-written." in text


def test_nothing_is_sent_before_all_is_right(hub, llama, tmp_path):
    chain = Chain.from_pretrained(llama)
    for name, reason in (("tiny", "org/NAME"), ("org/a b", "org/NAME"), ("org/" + "x" * 95, "96")):
        with pytest.raises(ArgumentError, match=reason):
            chain.push_to_hub(name)
    damaged = with_teacher(llama, tmp_path)
    path = tmp_path / "copy" / "anchors" / damaged.anchors[-1].name / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(IntegrityError, match="differs|sha256"):
        damaged.push_to_hub("org/tiny")
    hub.forget()
    dry = chain.push_to_hub("org/tiny", dry_run=True)
    assert not hub.log
    assert not hub.repos
    assert dry.commit is None
    assert dry.bytes["org/tiny-" + chain.anchors[0].name] > 4 * chain.anchors[0].parameters
    bad = with_teacher(llama, tmp_path / "x", repo_id="big/teacher")
    bad.push_to_hub("org/ok")
    repo = hub.repos["org/ok"]
    repo.commit({**repo.at("main")[1], "README.md": b"---\nbase_model: /home/me\ndatasets: 3\n---\nx"})
    head = repo.at("main")[0]
    with pytest.raises(ArgumentError, match="datasets"):
        bad.push_to_hub("org/ok")
    assert repo.at("main")[0] == head


def test_private_gated_and_pull_requests(hub, llama):
    chain = Chain.from_pretrained(llama)
    done = chain.push_to_hub("org/shut", private=True, gated="manual")
    assert all(repo.private and repo.gated == "manual" for repo in hub.repos.values())
    with pytest.raises(ManifestError, match="no repo on the Hub"):
        Chain.from_pretrained("org/shut", token="hf_reader")
    chain.push_to_hub("org/open")
    with pytest.raises(ArgumentError, match="is public"):
        chain.push_to_hub("org/open", private=True)
    hub.repos["org/shut"].private = False
    with pytest.raises(StorageError, match="gated"):
        Chain.from_pretrained("org/shut", token="hf_reader", force_download=True)
    pull = chain.push_to_hub("org/open", create_pr=True, token="hf_reader")
    assert pull.pull_requests == []
    files = hub.repos["org/open"].at("main")[1]
    hub.repos["org/open"].commit({**files, "chain.json": b"{}"})
    pull = chain.push_to_hub("org/open", create_pr=True, token="hf_reader")
    assert len(pull.pull_requests) == 1
    assert hub.repos["org/open"].at("main")[1]["chain.json"] == b"{}"
    assert Chain.from_pretrained("org/open", revision="refs/pr/1").anchors == Chain.from_pretrained("org/open", revision=pull.commit).anchors
    with pytest.raises(StorageError, match="cannot push"):
        chain.push_to_hub("org/new", token="hf_reader")
    assert done.commit


def test_a_model_in_between_is_pushed_with_its_anchors_and_plan(hub, llama, tmp_path):
    with_teacher(llama, tmp_path, repo_id="big/teacher", license="mit").push_to_hub("org/tiny")
    size = middle(llama)
    CBDModel.materialize("org/tiny", size, output_dir=tmp_path / "made")
    done = push_model(tmp_path / "made", "org/middle")
    files = hub.repos["org/middle"].at(done.commit)[1]
    assert set(files) == {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    data = ModelCard(files["README.md"].decode()).data
    first, second = Chain.from_pretrained(llama).anchors[:2]
    assert set(data.base_model) == {f"org/tiny-{first.name}", f"org/tiny-{second.name}"}
    assert (data.base_model_relation, data.license) == ("merge", "mit")
    assert "alpha" in files["README.md"].decode()
    CBDModel.materialize(llama, size, output_dir=tmp_path / "local")
    push_model(tmp_path / "local", "org/local")
    assert "base_model" not in ModelCard(hub.repos["org/local"].at("main")[1]["README.md"].decode()).data.to_dict()
    with pytest.raises(WeightsError, match="neither a chain"):
        push_model(llama / "anchors" / first.name, "org/anchor")


def test_a_third_party_adds_an_anchor(hub, llama, tmp_path):
    Chain.from_pretrained(llama).push_to_hub("org/tiny")
    tiny.save(tiny.llama(layers=1, ffn=24), tmp_path / "small")
    before = hub.repos["org/tiny"].at("main")[0]
    hub.tokens["hf_third"] = "third"
    hub.writers.add("third")
    done = add_anchor(Chain.from_pretrained("org/tiny"), tmp_path / "small", "third/small", create_pr=True, token="hf_third")
    assert len(done.pull_requests) == 1
    assert hub.repos["org/tiny"].at("main")[0] == before
    extended = Chain.from_pretrained("org/tiny", revision="refs/pr/1")
    assert extended.anchors[-1].location.repo_id == "third/small"
    assert CBDModel.from_chain("org/tiny", size="min", revision="refs/pr/1").config.num_hidden_layers == 1
    assert CBDModel.plan("org/tiny", size="min", revision="refs/pr/1").parameters == extended.anchors[-1].parameters
    hub.repos["org/tiny"].merge(1)
    with pytest.raises(ArgumentError, match="already"):
        add_anchor(Chain.from_pretrained("org/tiny"), tmp_path / "small", "third/again")
    Chain.from_pretrained(llama).save_pretrained(tmp_path / "local")
    add_anchor(Chain.from_pretrained(tmp_path / "local"), tmp_path / "small", "third/small")
    local = Chain.from_pretrained(tmp_path / "local")
    assert tiny.same(CBDModel.from_chain(tmp_path / "local", size="min"), CBDModel.from_chain("org/tiny", size="min"))
    done = local.push_to_hub("org/more")
    assert done.anchors[local.anchors[-1].name][0] == "third/small", "an anchor in a repo of its own stays there"
    assert CBDModel.from_chain("org/more", size="min").config.num_hidden_layers == 1


def readme(hub, repo_id):
    return hub.repos[repo_id].at("main")[1]["README.md"].decode()


def test_a_chain_never_takes_a_models_place_nor_a_model_a_chains(hub, llama, tmp_path):
    chain = Chain.from_pretrained(llama)
    chain.push_to_hub("org/tiny")
    hub.upload_folder("org/model", llama / "anchors" / chain.anchors[0].name)
    CBDModel.materialize("org/tiny", middle(llama), output_dir=tmp_path / "made")
    before = {repo_id: repo.at("main")[0] for repo_id, repo in hub.repos.items()}
    with pytest.raises(ArgumentError, match=r"org/model holds a model, and a chain would take its place"):
        chain.push_to_hub("org/model")
    with pytest.raises(ArgumentError, match=r"org/tiny holds a chain, and a model would take its place"):
        push_model(tmp_path / "made", "org/tiny")
    with pytest.raises(ArgumentError, match=r"org/tiny holds a chain"):
        add_anchor(chain, tiny.save(tiny.llama(layers=1, ffn=24), tmp_path / "small"), "org/tiny")
    assert before == {repo_id: repo.at("main")[0] for repo_id, repo in hub.repos.items()}, "nothing was sent anywhere"


def test_a_model_that_cbd_hub_did_not_write_is_not_replaced(hub, llama, tmp_path):
    chain = Chain.from_pretrained(llama)
    own = tiny.save(tiny.llama(layers=1, ffn=24), tmp_path / "own")
    (own / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    for name in ("voices.safetensors", "my_vocab.json"):
        (own / name).write_bytes(b"{}")
    taken = f"org/tiny-{chain.anchors[1].name}"
    for repo_id in (taken, "org/own"):
        hub.upload_folder(repo_id, own)
    CBDModel.materialize(llama, middle(llama), output_dir=tmp_path / "made")
    other = tiny.save(tiny.llama(layers=1, ffn=24, seed=9), tmp_path / "other")
    for push in (lambda: chain.push_to_hub("org/tiny"), lambda: push_model(tmp_path / "made", "org/own"), lambda: add_anchor(chain, other, "org/own")):
        before = {repo_id: repo.at("main")[0] for repo_id, repo in hub.repos.items()}
        with pytest.raises(ArgumentError, match="holds a model that cbd_hub did not write, and another would take its place"):
            push()
        assert before == {repo_id: repo.at("main")[0] for repo_id, repo in hub.repos.items()}, "nothing was sent anywhere"
    chain.save_pretrained(tmp_path / "local")
    add_anchor(Chain.from_pretrained(tmp_path / "local"), "org/own", "org/own")
    files = hub.repos["org/own"].at("main")[1]
    assert {"voices.safetensors", "my_vocab.json", "model.safetensors"} <= set(files), "in its own repo an anchor's neighbours stay"
    assert files["README.md"].endswith(b"Mine.\n")
    hub.repos["org/own"].commit({**files, "adapter_config.json": b"{}"})
    (tmp_path / "second").mkdir()
    chain.save_pretrained(tmp_path / "second/local")
    add_anchor(Chain.from_pretrained(tmp_path / "second/local"), "org/own", "org/own")
    assert "adapter_config.json" in hub.repos["org/own"].at("main")[1], "and at the second push too"
    with pytest.raises(ArgumentError, match="holds a model that cbd_hub did not write"):
        push_model(tmp_path / "made", "org/own")


def test_an_anchors_place_is_its_chains(hub, llama, tmp_path, caplog):
    """No other model takes it, neither by a push nor as a further anchor; a chain that is pushed again says which anchors of others it leaves out."""
    chain = Chain.from_pretrained(llama)
    chain.push_to_hub("org/tiny")
    CBDModel.materialize("org/tiny", middle(llama), output_dir=tmp_path / "made")
    taken = f"org/tiny-{chain.anchors[1].name}"
    small = tiny.save(tiny.llama(layers=1, ffn=24), tmp_path / "small")
    before = {repo_id: repo.at("main")[0] for repo_id, repo in hub.repos.items()}
    with pytest.raises(ArgumentError, match=rf"{taken} holds anchor {chain.anchors[1].name} of the chain org/tiny"):
        push_model(tmp_path / "made", taken)
    with pytest.raises(ArgumentError, match=rf"{taken} holds anchor {chain.anchors[1].name} of this chain"):
        add_anchor(Chain.from_pretrained("org/tiny"), small, taken)
    assert before == {repo_id: repo.at("main")[0] for repo_id, repo in hub.repos.items()}, "nothing was sent anywhere"
    add_anchor(Chain.from_pretrained("org/tiny"), small, "third/small")
    with pytest.raises(ArgumentError, match="third/small holds anchor .* of the chain org/tiny"):
        push_model(tmp_path / "made", "third/small")
    assert push_model(tmp_path / "made", "third/small", create_pr=True).pull_requests, "a pull request replaces nothing"
    caplog.clear()
    chain.push_to_hub("org/tiny")
    assert caplog.text.count("which this chain has not") == 1
    assert "in third/small, which this chain has not" in caplog.text
    push_model(tmp_path / "made", "third/small")
    hub.repos["org/renamed"] = hub.repos.pop("org/tiny")
    caplog.clear()
    chain.push_to_hub("org/renamed")
    assert "which this chain has not" not in caplog.text
    del hub.repos["org/renamed"]
    push_model(tmp_path / "made", taken)  # its chain is gone, whatever the cache still has of it


def test_a_chain_that_shares_no_anchor_with_the_one_that_is_there_is_told_of_it(hub, llama, tmp_path, caplog):
    chain = Chain.from_pretrained(llama)
    chain.push_to_hub("org/tiny")
    chain.push_to_hub("org/tiny")
    assert "shares no anchor" not in caplog.text
    other = assemble_chain([tiny.save(tiny.llama(layers=layers, seed=9), tmp_path / f"{layers}") for layers in (3, 1)], tmp_path / "other", align=False)
    other.push_to_hub("org/tiny")
    assert f"org/tiny holds the chain {chain.name} ({', '.join(anchor.name for anchor in chain.anchors)}), which shares no anchor with this one and becomes its earlier revision" in caplog.text
    assert [anchor.parameters for anchor in Chain.from_pretrained("org/tiny", revision="v1").anchors] == [anchor.parameters for anchor in chain.anchors]


def test_adapters_and_models_keep_their_places(hub, llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    from cbd_hub import carry_adapter
    CBDModel.materialize(llama, middle(llama), output_dir=tmp_path / "made")
    get_peft_model(CBDModel.from_chain(llama, "max"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    carry_adapter(tmp_path / "lora", llama, middle(llama), adapter_size="max", output_dir=tmp_path / "carried")
    push_model(tmp_path / "made", "org/made")
    push_model(tmp_path / "carried", "org/lora")
    for folder, repo_id, held in (("carried", "org/made", "a model, and an adapter"), ("made", "org/lora", "an adapter, and a model")):
        with pytest.raises(ArgumentError, match=f"{repo_id} holds {held} would take its place"):
            push_model(tmp_path / folder, repo_id)
    push_model(tmp_path / "carried", "org/lora")
    assert tiny.same(AutoModelForCausalLM.from_pretrained("org/made"), AutoModelForCausalLM.from_pretrained(tmp_path / "made"))


def test_what_was_generated_goes_with_the_chain_that_it_was_of(hub, llama, tmp_path):
    """A licence, a base model, a tag: of the second chain, or of a person; never of the first one."""
    with_teacher(llama, tmp_path, repo_id="big/teacher", license="apache-2.0").push_to_hub("org/tiny")
    first = {repo_id: ModelCard(readme(hub, repo_id)).data.to_dict() for repo_id in hub.repos}
    assert all((data["license"], data["base_model"]) == ("apache-2.0", "big/teacher") for data in first.values())
    files = hub.repos["org/tiny"].at("main")[1]
    hub.repos["org/tiny"].commit({**files, "README.md": files["README.md"].replace(b"tags:", b"language: en\ntags:\n- mine")})
    (tmp_path / "second").mkdir()
    with_teacher(llama, tmp_path / "second", license="gemma").push_to_hub("org/tiny")
    for repo_id in hub.repos:
        data = ModelCard(readme(hub, repo_id)).data.to_dict()
        assert data["license"] == "gemma", repo_id
        assert "base_model" not in data
        assert "base_model_relation" not in data
    data = ModelCard(readme(hub, "org/tiny")).data
    assert (set(data.tags), data.language) == ({"mine", "cbd-hub", "cbd-chain"}, ["en"])
    Chain.from_pretrained(llama).push_to_hub("org/tiny")
    assert not any("license" in ModelCard(readme(hub, repo_id)).data.to_dict() for repo_id in hub.repos)


def test_what_a_person_changed_in_the_metadata_stays(hub, llama, tmp_path):
    chain = Chain.from_pretrained(llama)
    chain.push_to_hub("org/tiny")
    last = f"org/tiny-{chain.anchors[-1].name}"

    def edited(repo_id, *pairs):
        files = hub.repos[repo_id].at("main")[1]
        text = files["README.md"].decode()
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new, 1)
        hub.repos[repo_id].commit({**files, "README.md": text.encode()})

    edited("org/tiny", ("tags:", "base_model: me/base\nbase_model_relation: finetune\ntags:"))
    chain.push_to_hub("org/tiny")
    data = ModelCard(readme(hub, "org/tiny")).data
    assert (data.base_model, data.base_model_relation) == ("me/base", "finetune")
    chain = with_teacher(llama, tmp_path, repo_id="big/teacher", license="My Licence")
    chain.push_to_hub("org/tiny")
    edited(last, ("license: other", "license: other\nlicense_link: LICENSE"), ("base_model: big/teacher", "base_model:\n- big/teacher\n- me/base"))
    chain.push_to_hub("org/tiny")
    data = ModelCard(readme(hub, last)).data
    assert (data.license_link, data.license_name) == ("LICENSE", "my-licence")
    assert (data.base_model, data.base_model_relation) == (["big/teacher", "me/base"], "finetune")
    (tmp_path / "other").mkdir()
    with_teacher(llama, tmp_path / "other", repo_id="new/teacher", license="mit").push_to_hub("org/tiny")
    data = ModelCard(readme(hub, last)).data
    assert (data.license, data.to_dict().get("license_link"), data.base_model) == ("mit", None, ["new/teacher", "me/base"])


def test_an_adapters_folder_names_no_place_and_pefts_form_stays_behind(hub, llama, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    from cbd_hub import carry_adapter
    get_peft_model(CBDModel.from_chain(llama, "max"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    carry_adapter(tmp_path / "lora", llama, middle(llama), adapter_size="max", output_dir=tmp_path / "carried")
    PeftModel.from_pretrained(CBDModel.from_chain(llama, middle(llama)), tmp_path / "carried").save_pretrained(tmp_path / "carried")
    assert "[More Information Needed]" in (tmp_path / "carried/README.md").read_text()
    push_model(tmp_path / "carried", "org/lora")
    files = hub.repos["org/lora"].at("main")[1]
    assert not [name for name, data in files.items() if str(tmp_path.parent).encode() in data]
    assert b"More Information Needed" not in files["README.md"]
    assert json.loads(files["adapter_config.json"])["r"] == 2
    assert f'CBDModel.from_chain("path/to/{Chain.from_pretrained(llama).name}", ' in files["README.md"].decode(), "where its chain is here is nobody's business"


def test_files_of_the_old_model_go_and_those_of_a_person_stay(hub, llama, tmp_path):
    CBDModel.materialize(llama, middle(llama), output_dir=tmp_path / "made")
    push_model(tmp_path / "made", "org/made")
    repo = hub.repos["org/made"]
    old = ("adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json")
    kept = ("voices.safetensors", "my_vocab.json", "onnx/model.safetensors")
    repo.commit({**repo.at("main")[1], **dict.fromkeys((*old, *kept), b"{}")})
    (tmp_path / "made/generation_config.json").unlink()
    push_model(tmp_path / "made", "org/made")
    files = set(repo.at("main")[1])
    assert not files & {*old, "generation_config.json"}
    assert set(kept) <= files


def test_a_size_that_was_trained_since_is_not_told_to_be_untrained(hub, llama, tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True)
    trainer = Trainer(model=CBDModel.from_chain(llama, middle(llama)), args=args, train_dataset=[{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    trainer.train()
    trainer.save_model(tmp_path / "tuned")
    with pytest.raises(WeightsError, match="was trained since the chain made it"):
        push_model(tmp_path / "tuned", "org/tuned")
    assert "org/tuned" not in hub.repos


def test_a_cut_model_is_pushed_as_what_it_is(hub, tmp_path):
    source = tiny.save(tiny.llama(layers=4, seed=9), tmp_path / "teacher")
    (source / "README.md").write_text("---\nlicense: gemma\n---\n")
    hub.upload_folder("org/teacher", source)
    for model, name in (("org/teacher", "cut"), (source, "local")):
        cut_single(model, shape={"layers": 3}, calibration=tiny.texts(40)).save_pretrained(tmp_path / name)
        path = tmp_path / name / "README.md"
        path.write_text(path.read_text() + "\nMy own words.\n")
        push_model(tmp_path / name, f"org/{name}")
        text = readme(hub, f"org/{name}")
        data = ModelCard(text).data
        assert (data.license, "pruning" in data.tags, "merge" in data.tags) == ("gemma", True, False)
        assert data.to_dict().get("base_model") == ("org/teacher" if name == "cut" else None)
        assert [text.count(words) for words in ("My own words.", "cbd_hub:begin", f'from_pretrained("org/{name}")')] == [1, 1, 2]
        assert str(tmp_path) not in text + hub.repos[f"org/{name}"].at("main")[1]["config.json"].decode()
    config = json.loads((tmp_path / "cut/config.json").read_text())
    for younger in ("sliced_loss", "reconstruction", "reconstruction_tokens"):
        del config["cbd"][younger]
    (tmp_path / "cut/config.json").write_text(json.dumps(config))
    push_model(tmp_path / "cut", "org/older")
    assert "before reconstruction" not in readme(hub, "org/older")


def test_a_licence_on_a_local_models_card_goes_with_it(hub, llama, tmp_path):
    CBDModel.materialize(llama, middle(llama), output_dir=tmp_path / "made")
    (tmp_path / "made/README.md").write_text("---\nlicense: mit\nlanguage: de\n---\nMy own words.\n")
    push_model(tmp_path / "made", "org/made")
    text = readme(hub, "org/made")
    assert (ModelCard(text).data.license, ModelCard(text).data.language, text.count("My own words.")) == ("mit", ["de"], 1)


def test_what_a_pull_request_cannot_gate(hub, llama):
    chain = Chain.from_pretrained(llama)
    chain.push_to_hub("org/new", gated="manual", create_pr=True)
    assert {repo.gated for repo in hub.repos.values()} == {"manual"}, "what it made is gated, before any byte of it is there"
    chain.push_to_hub("org/open")
    with pytest.raises(ArgumentError, match="is not gated, and a pull request cannot gate it"):
        chain.push_to_hub("org/open", gated="auto", create_pr=True)


def test_no_token_is_published(hub, llama, tmp_path):
    chain = with_teacher(llama, tmp_path)
    path = tmp_path / "copy/recipe.yaml"
    path.write_text("data: {path: text.txt}\n")
    chain.push_to_hub("org/plain")
    assert "recipe.yaml" in hub.repos["org/plain"].at("main")[1]
    path.write_text(f"data: {{path: text.txt}}\nstage: {{hub_token: hf_{'a' * 34}}}\n")
    chain.push_to_hub("org/secret")
    assert "recipe.yaml" not in hub.repos["org/secret"].at("main")[1]
    path.write_text(f"teacher: x\nanchors: [1M]\ndata: {{path: text.txt}}\nstage: {{hub_token: hf_{'a' * 34}}}\n")
    with pytest.raises(RecipeError, match=r"line 4: stage.hub_token is no setting of a recipe: a recipe is kept and published"):
        Recipe.read(path)


def test_without_the_right_to_make_collections_the_chain_is_published(hub, cbd, llama, caplog):
    hub.fail("POST /api/collections", status=403, times=9)
    code, printed, _ = cbd("push", llama, "org/tiny", "--json")
    assert (code, json.loads(printed)["collection"]) == (0, None)
    assert "org/tiny is published, but no collection could be made of it (403" in caplog.text
    assert Chain.from_pretrained("org/tiny").anchors


def test_a_cached_chain_without_a_recipe_is_copied_offline(hub, llama, tmp_path):
    Chain.from_pretrained(llama).push_to_hub("org/tiny")
    assert "recipe.yaml" not in hub.repos["org/tiny"].at("main")[1]
    Chain.from_pretrained("org/tiny").save_pretrained(tmp_path / "first")
    hub.forget()
    Chain.from_pretrained("org/tiny", local_files_only=True).save_pretrained(tmp_path / "second")
    assert not hub.log
    assert (tmp_path / "second/chain.json").read_bytes() == (tmp_path / "first/chain.json").read_bytes()


def test_maps_may_be_as_large_as_widths_make_them(hub, tmp_path, monkeypatch):
    """The most that is fetched of one grows with the largest anchor: a rotation of 4,096 channels has 64 MiB."""
    distill_chain(recipe(tmp_path, "llama", [{"layers": 2, "ffn": 24}]), tmp_path / "chain")
    chain = Chain.from_pretrained(tmp_path / "chain")
    chain.push_to_hub("org/tiny")
    limits = []
    sound = ChainFiles._sound
    monkeypatch.setattr(ChainFiles, "_sound", lambda self, repo_id, path, revision, check, *limit: limits.append((path, *limit)) or sound(self, repo_id, path, revision, check, *limit))
    CBDModel.plan("org/tiny", size=middle(tmp_path / "chain"))
    assert [limit for path, *limit in limits if path.startswith("maps/")] == [[MAX_BYTES + 4 * chain.anchors[0].parameters]]


def test_a_chain_says_which_commit_of_its_teacher_it_was_made_of(hub, tmp_path):
    wish = recipe(tmp_path, "llama", [{"layers": 2, "ffn": 24}])
    HfApi().create_repo("big/teacher")
    commit = HfApi().upload_folder(repo_id="big/teacher", folder_path=wish["teacher"]).oid
    made = distill_chain({**wish, "teacher": "big/teacher"}, tmp_path / "chain")
    assert (made.manifest.teacher.repo_id, made.manifest.teacher.revision) == ("big/teacher", commit)


def test_words_in_a_local_card_go_up_once_and_come_back(hub, llama, tmp_path):
    chain = with_teacher(llama, tmp_path, repo_id="big/teacher", license="mit")
    path = tmp_path / "copy/README.md"
    path.write_text(path.read_text().replace("tags:", "tags:\n- mine") + "\nWritten here.\n")
    chain.push_to_hub("org/tiny")
    first = readme(hub, "org/tiny")
    assert first.count("Written here.") == first.count("# org/tiny:") == 1
    assert {"mine", "cbd-chain"} <= set(ModelCard(first).data.tags)
    files = hub.repos["org/tiny"].at("main")[1]
    hub.repos["org/tiny"].commit({**files, "README.md": (first + "\nWritten there.\n").encode()})
    chain.push_to_hub("org/tiny")
    second = readme(hub, "org/tiny")
    assert [second.count(text) for text in ("Written here.", "Written there.", "cbd_hub:begin", "cbd_hub:end")] == [1, 1, 1, 1]
    Chain.from_pretrained("org/tiny").save_pretrained(tmp_path / "pulled")
    pulled = (tmp_path / "pulled/README.md").read_text()
    assert [pulled.count(text) for text in ("Written here.", "Written there.", "cbd_hub:begin")] == [1, 1, 1]
    assert "anchors/" in pulled, "its own block names its own folders"


def test_a_card_of_another_system_keeps_its_metadata_and_words(hub, llama):
    chain = Chain.from_pretrained(llama)
    chain.push_to_hub("org/tiny")
    repo = hub.repos["org/tiny"]
    repo.commit({**repo.at("main")[1], "README.md": b"\xef\xbb\xbf---\r\nlicense: mit\r\ntags:\r\n- mine\r\n---\r\n# By hand\r\n\r\nM\xc3\xa4nner\r\n"})
    chain.push_to_hub("org/tiny")
    data = ModelCard(readme(hub, "org/tiny")).data
    assert (data.license, "mine" in data.tags) == ("mit", True)
    assert readme(hub, "org/tiny").endswith("# By hand\n\nMänner\n")
    head = repo.commit({**repo.at("main")[1], "README.md": "# Männer".encode("latin-1")})
    with pytest.raises(ArgumentError, match="README of org/tiny is not UTF-8"):
        chain.push_to_hub("org/tiny")
    assert repo.at("main")[0] == head


def test_cards_tell_the_loss_the_data_and_the_shape(hub, llama, tmp_path):
    chain = with_teacher(llama, tmp_path, repo_id="big/teacher", license="mit")
    recipe = tmp_path / "copy/recipe.yaml"
    values = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**values, "teacher": "big/teacher", "data": {"dataset": "org/text", "split": "train"}}))
    chain.push_to_hub("org/tiny")
    for anchor in chain.anchors[1:]:
        text = readme(hub, f"org/tiny-{anchor.name}")
        for line in (
            "| learned by | 1 x forward_kl at temperature 1 + 1 x cross-entropy |", "| data | org/text |", f"| training tokens | {anchor.training.tokens:,} |",
            f"| cut from and taught by | anchor {anchor.parent} |",
        ):
            assert line in text
        assert ModelCard(text).data.datasets == ["org/text"]
    assert ModelCard(readme(hub, f"org/tiny-{chain.anchors[0].name}")).data.datasets is None, "the teacher's are not known"
    index = readme(hub, "org/tiny")
    assert ModelCard(index).data.datasets == ["org/text"]
    assert f"| cut from {chain.anchors[0].name}, {chain.anchors[1].training.tokens:,} tokens |" in index
    CBDModel.materialize("org/tiny", middle(llama), output_dir=tmp_path / "made")
    config = tmp_path / "made/config.json"
    made = json.loads(config.read_text())
    config.write_text(json.dumps({**made, "cbd": {**made["cbd"], "note": "a|b\n<!-- cbd_hub:end -->"}}))
    push_model(tmp_path / "made", "org/middle")
    text = readme(hub, "org/middle")
    assert "| shape | 4 layers, hidden 32," in text
    assert "| note | a\\|b <\\!-- cbd_hub:end --> |" in text
    assert f"| parameters | {made['cbd']['parameters']:,} |" in text


def test_what_is_shut_stays_shut_and_what_is_half_made_is_named(hub, llama, tmp_path):
    """A private chain's collection is private also where a killed push is gone on with without --private."""
    chain = Chain.from_pretrained(llama)
    chain.push_to_hub("org/shut", private=True, collection=False)
    done = chain.push_to_hub("org/shut")
    assert hub.collections[done.collection]["private"]
    (tmp_path / "begun/anchors").mkdir(parents=True)
    with pytest.raises(WeightsError, match=r"neither a chain \(it has no chain\.json\)"):
        push_model(tmp_path / "begun", "org/begun")


def test_a_pulled_chain_keeps_its_licences(hub, tmp_path):
    for layers, licence in ((4, "mit"), (2, "apache-2.0")):
        folder = tiny.save(tiny.llama(layers=layers, seed=layers), tmp_path / f"m{layers}")
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    assemble_chain([tmp_path / "m4", tmp_path / "m2"], tmp_path / "chain").push_to_hub("org/chain")
    Chain.from_pretrained("org/chain").save_pretrained(tmp_path / "pulled")
    assert [anchor.license for anchor in Chain.from_pretrained(tmp_path / "pulled").anchors] == ["mit", "apache-2.0"]
    Chain.from_pretrained(tmp_path / "chain").save_pretrained(tmp_path / "copied")
    assert [anchor.license for anchor in Chain.from_pretrained(tmp_path / "copied").anchors] == ["mit", "apache-2.0"]
