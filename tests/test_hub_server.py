"""The test Hub answers the official client as the Hub does; what tests of push and load rest on."""

import json
import os

import hub_server
import pytest
from conftest import online
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session


WEIGHTS = bytes(range(256)) * 1000


@pytest.fixture
def api(hub):
    return HfApi()


@pytest.fixture
def pushed(hub, api, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text("{}")
    api.create_repo("org/m")
    return api.upload_folder(repo_id="org/m", folder_path=folder)


def test_what_is_pushed_comes_back(hub, api, pushed):
    assert api.create_repo("org/m", exist_ok=True).repo_id == "org/m"
    listed = {entry.path: entry for entry in api.list_repo_tree("org/m", recursive=True)}
    assert listed["model.safetensors"].lfs.size == len(WEIGHTS)
    assert listed["config.json"].lfs is None
    path = hf_hub_download("org/m", "model.safetensors", revision=pushed.oid)
    with open(path, "rb") as file:
        assert file.read() == WEIGHTS
    assert pushed.oid in os.path.realpath(snapshot_download("org/m"))
    with hub.counted() as asked:
        assert hf_hub_download("org/m", "model.safetensors", revision=pushed.oid) == path
    assert not asked
    assert sorted(api.model_info("org/m").siblings, key=lambda file: file.rfilename)[0].rfilename == "config.json"


def test_unchanged_files_make_no_commit(hub, api, pushed, tmp_path):
    assert api.upload_folder(repo_id="org/m", folder_path=tmp_path / "model").oid == pushed.oid
    assert sum(entry.method == "PUT" for entry in hub.log) == 1


def test_large_objects_come_in_parts(hub, api, pushed, tmp_path):
    hub.multipart = 100_000
    api.upload_file(path_or_fileobj=WEIGHTS[::-1], path_in_repo="more.safetensors", repo_id="org/m")
    assert sum(entry.method == "PUT" for entry in hub.log) == 1 + 3
    assert hub.repos["org/m"].at("main")[1]["more.safetensors"] == WEIGHTS[::-1]


def test_parents_tags_and_pull_requests(hub, api, pushed):
    operation = [CommitOperationAdd("a.txt", b"a")]
    with pytest.raises(HfHubHTTPError, match="commit has happened"):
        api.create_commit("org/m", operation, commit_message="x", parent_commit="1" * 40)
    pull = api.create_commit("org/m", [CommitOperationAdd("a.txt", b"a")], commit_message="x", create_pr=True)
    assert pull.pr_num == 1
    assert "a.txt" not in hub.repos["org/m"].at("main")[1]
    assert "a.txt" in hub.repos["org/m"].at(pull.oid)[1]
    assert [found.title for found in api.get_repo_discussions("org/m")] == ["x"]
    hub.repos["org/m"].merge(1)
    assert "a.txt" in api.list_repo_files("org/m")
    api.create_tag("org/m", tag="v1", revision=pushed.oid)
    api.create_tag("org/m", tag="v1", exist_ok=True)
    assert [(tag.name, tag.target_commit) for tag in api.list_repo_refs("org/m").tags] == [("v1", pushed.oid)]
    assert "a.txt" not in api.list_repo_files("org/m", revision="v1")


def test_collections(hub, api, pushed):
    made = api.create_collection("A chain", namespace="org", exists_ok=True)
    assert api.create_collection("A chain", namespace="org", exists_ok=True).slug == made.slug
    api.add_collection_item(made.slug, "org/m", "model", note="note")
    filled = api.add_collection_item(made.slug, "org/m", "model", exists_ok=True)
    assert [(item.item_id, item.note) for item in filled.items] == [("org/m", "note")]


def test_doors_stay_shut(hub, api, pushed, monkeypatch):
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/absent")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/m", revision="no")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/m", "absent.txt")
    api.update_repo_settings("org/m", gated="auto")
    with pytest.raises(GatedRepoError):
        hf_hub_download("org/m", "config.json", token="hf_reader")
    hub.repos["org/m"].granted.add("reader")
    assert hf_hub_download("org/m", "config.json", token="hf_reader")
    with pytest.raises(HfHubHTTPError):
        api.create_commit("org/m", [CommitOperationAdd("a.txt", b"a")], commit_message="x", token="hf_reader")
    api.update_repo_settings("org/m", visibility="private")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/m", token="hf_reader")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")


def test_faults_on_demand(hub, api, pushed):
    url = hf_hub_url("org/m", "model.safetensors")
    part = get_session().get(url, headers={**build_hf_headers(), "Range": "bytes=10-19"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, WEIGHTS[10:20], f"bytes 10-19/{len(WEIGHTS)}")
    hub.fail("GET /org/m/resolve", cut=100_000)
    hub.forget()
    assert open(hf_hub_download("org/m", "model.safetensors"), "rb").read() == WEIGHTS  # noqa: SIM115
    assert [entry.sent for entry in hub.log if entry.method == "GET"] == [100_000, len(WEIGHTS)]
    hub.fail("PUT /lfs", status=429, headers={"Retry-After": "0"}, times=2)
    hub.fail("POST /org/m.git/info/lfs", status=500)
    api.upload_file(path_or_fileobj=b"w" * 99, path_in_repo="w.safetensors", repo_id="org/m")
    assert [entry.status for entry in hub.log if entry.method == "PUT"] == [429, 429, 200]
    hub.fail("commit", drop="after")
    with pytest.raises(Exception, match="disconnected|reset"):
        api.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="org/m")
    assert "b.txt" in hub.repos["org/m"].at("main")[1]
    hub.fail("config.json", change=lambda body: body + b" ")
    assert get_session().get(hf_hub_url("org/m", "config.json")).content == b"{} "


def test_the_store_behind_a_redirect_gets_no_token(tmp_path, monkeypatch):
    with hub_server.running(cdn=True) as (hub, address):
        online(monkeypatch, address, tmp_path / "home")
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "model.safetensors").write_bytes(WEIGHTS)
        hub.upload_folder("org/m", tmp_path / "m")
        with open(hf_hub_download("org/m", "model.safetensors"), "rb") as file:
            assert file.read() == WEIGHTS
    stored = [entry for entry in hub.log if entry.path.startswith("/cdn/")]
    assert stored
    assert all(entry.token is None and entry.port != int(address.rsplit(":", 1)[1]) for entry in stored)
    assert json.dumps(hub.requests)
