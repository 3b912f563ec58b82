"""A chain on the Hub whose owner means harm: one clear error each, nothing run, nothing outside the cache, and the cache usable afterwards."""

import hashlib
import json
import pickle
import struct
import time

import pytest
import torch
from conftest import assembled

from cbd_hub import CBDModel, Chain
from cbd_hub.errors import CBDError, IntegrityError, ManifestError, WeightsError
from cbd_hub.files import CHUNK_BYTES


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return assembled(tmp_path_factory.mktemp("hostile"), 4, 2)


@pytest.fixture
def published(hub, local):
    Chain.from_pretrained(local).push_to_hub("org/chain")
    return hub.repos["org/chain"], hub.repos[f"org/chain-{Chain.from_pretrained(local).anchors[0].name}"]


def change(index, work):
    """Commit another chain.json."""
    files = index.at("main")[1]
    values = json.loads(files["chain.json"])
    work(values)
    index.commit({**files, "chain.json": json.dumps(values).encode()})


def replace_file(index, repo, name, data, old=None):
    """Put another file into the larger anchor's repo, with records that agree with it."""
    files = {path: held for path, held in repo.at("main")[1].items() if path != old}
    commit = repo.commit({**files, name: data})
    hashes = [hashlib.sha256(data[start : start + CHUNK_BYTES]).hexdigest() for start in range(0, len(data), CHUNK_BYTES)]
    listing = json.dumps({"files": {name: hashes}}).encode()
    if name.endswith(".safetensors"):
        held = index.at("main")[1]
        index.commit({**held, json.loads(held["chain.json"])["anchors"][0]["chunks"]["path"]: listing})

    def work(values):
        anchor = values["anchors"][0]
        anchor["location"]["revision"] = commit
        anchor["files"].pop(old, None)
        anchor["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        anchor["preview"] = None
        if name.endswith(".safetensors"):
            anchor["chunks"]["sha256"] = hashlib.sha256(listing).hexdigest()

    change(index, work)


class Payload:
    """A pickle that would leave a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (self.trace, "w")


def refused(local, kind, match, **options):
    """Loads of every kind are refused; the honest chain then loads from the same cache."""
    for shape in ({"layers": 3}, {"layers": 4}):
        with pytest.raises(kind, match=match) as caught:
            CBDModel.from_chain("org/chain", shape=shape, **options)
        assert str(caught.value).isprintable()
    Chain.from_pretrained(local).push_to_hub("org/honest")
    loaded, right = CBDModel.from_chain("org/honest", shape={"layers": 3}), CBDModel.from_chain(local, shape={"layers": 3})
    assert all(torch.equal(loaded.get_parameter(name), tensor) for name, tensor in right.named_parameters())


def test_a_header_of_ten_gigabytes(published, local):
    index, repo = published
    replace_file(index, repo, "model.safetensors", struct.pack("<Q", 10 * 2**30) + repo.at("main")[1]["model.safetensors"][8:])
    refused(local, IntegrityError, "10,737,418,240 bytes|not a whole safetensors file")


def test_a_small_file_that_is_none_is_not_fetched(published, local, hub):
    """Recorded with 1,000 bytes, served with 30 MB."""
    index, repo = published
    replace_file(index, repo, "tokenizer.json", b" " * 30_000_000)
    change(index, lambda values: values["anchors"][0]["files"]["tokenizer.json"].update(bytes=1000))
    hub.forget()
    with pytest.raises(IntegrityError, match="1,000 are the most"):
        Chain.from_pretrained("org/chain").save_pretrained(local.parent / "pulled")
    assert hub.sent < 10_000_000


def test_a_pull_copies_no_code_and_no_pickle(published, local, tmp_path):
    index, repo = published
    for name in ("evil.py", "pytorch_model.bin", "deep/config.json"):
        replace_file(index, repo, name, b"import os")
    Chain.from_pretrained("org/chain").save_pretrained(tmp_path / "pulled")
    names = {path.name for path in (tmp_path / "pulled/anchors").rglob("*") if path.is_file()}
    assert names == {path.name for path in (local / "anchors").rglob("*") if path.is_file()}


def test_a_pickle_instead_of_safetensors(published, local, tmp_path):
    index, repo = published
    trace = tmp_path / "trace"
    replace_file(index, repo, "pytorch_model.bin", pickle.dumps(Payload(str(trace))), old="model.safetensors")
    refused(local, WeightsError, "pickle is never read")
    index, repo = published
    replace_file(index, repo, "model.safetensors", pickle.dumps(Payload(str(trace))), old="pytorch_model.bin")
    refused(local, IntegrityError, "header of|not a whole safetensors file")
    assert not trace.exists()


@pytest.mark.parametrize("consent", [False, True])
def test_code_of_its_own_is_never_run(published, local, consent, tmp_path):
    index, repo = published
    trace = tmp_path / "trace"
    files = repo.at("main")[1]
    repo.commit({**files, "evil.py": f"open({str(trace)!r}, 'w')".encode()})
    config = {**json.loads(files["config.json"]), "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    replace_file(index, repo, "config.json", json.dumps(config).encode())
    refused(local, WeightsError, "code of its own", trust_remote_code=consent)
    assert not trace.exists()


def test_an_index_that_names_another_repos_files(published, local, hub):
    """A repo that this account may read but its owner may not: what does not hash as recorded is refused, and none of it is shown."""
    index, _ = published
    hub.upload_folder("victim/private", local.parent / "m2")
    hub.repos["victim/private"].private = True
    commit = hub.repos["victim/private"].at("main")[0]
    change(index, lambda values: values["anchors"][0]["location"].update(repo_id="victim/private", revision=commit))
    refused(local, IntegrityError, "were recorded|was recorded|recorded hash|asked")


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", "a/../../b", "C:\\x", "\x1b[31m"])
def test_paths_that_leave_the_cache(published, local, path):
    index, _ = published
    change(index, lambda values: values["anchors"][0]["files"].update({path: {"sha256": "0" * 64, "bytes": 1}}))
    refused(local, ManifestError, "plain relative path")
    change(index, lambda values: values["anchors"][0].update(chunks={"path": path, "sha256": "0" * 64}))
    refused(local, ManifestError, "plain relative path|control characters")


def test_a_million_anchors(published, local):
    index, _ = published
    files = index.at("main")[1]
    anchor = json.dumps({"name": "a"})
    index.commit({**files, "chain.json": f'{{"schema_version": 1, "name": "x", "created_with": "y", "anchors": [{",".join([anchor] * 1_000_000)}]}}'.encode()})
    began = time.process_time()
    with pytest.raises(ManifestError, match="anchors"):
        CBDModel.plan("org/chain", "min")
    assert time.process_time() - began < 20
    refused(local, ManifestError, "anchors")


@pytest.mark.parametrize("size", [float("nan"), float("inf"), 10**400, -1, 0, "9" * 30 + "T", "1e999"])
def test_sizes_that_are_none(published, local, size):
    index, _ = published
    with pytest.raises(CBDError):
        CBDModel.from_chain("org/chain", size=size)
    if not isinstance(size, str):
        change(index, lambda values: values["anchors"][0].update(parameters=size))
        refused(local, ManifestError, "parameters|JSON|falling|whole file")


def test_a_preview_that_lies(published, local):
    """A plan believes it; a load does not."""
    index, _ = published

    def lie(values):
        for anchor in values["anchors"]:
            header = json.loads(anchor["preview"]["headers"]["model.safetensors"])
            header["tensors"] = {key: {**entry, "data_offsets": [0, 8]} for key, entry in header["tensors"].items()}
            anchor["preview"]["headers"]["model.safetensors"] = json.dumps(header)

    change(index, lie)
    loaded, right = CBDModel.from_chain("org/chain", shape={"layers": 3}), CBDModel.from_chain(local, shape={"layers": 3})
    assert all(torch.equal(loaded.get_parameter(name), tensor) for name, tensor in right.named_parameters())


def test_a_repo_that_turned_private_or_vanished(published, local, hub):
    CBDModel.from_chain("org/chain", shape={"layers": 3})
    hub.repos["org/chain"].private = True
    with pytest.raises(ManifestError, match="no repo on the Hub that this account can see"):
        CBDModel.from_chain("org/chain", shape={"layers": 3}, token="hf_reader", force_download=True)
    assert CBDModel.from_chain("org/chain", shape={"layers": 3}, local_files_only=True)
    del hub.repos["org/chain"]
    with pytest.raises(ManifestError, match="no repo on the Hub"):
        CBDModel.from_chain("org/chain", shape={"layers": 3}, cache_dir=local.parent / "empty")
