"""Full disks, pushes that were cut off, and an index too large to be one."""

import itertools
import multiprocessing
import os
import resource
import signal
import subprocess

import pytest
import tiny
from conftest import assembled
from test_remote import killed_at

from cbd_hub import CBDModel, Chain
from cbd_hub.errors import CBDError, ManifestError, StorageError
from cbd_hub.manifest import MAX_BYTES


SHAPE = {"layers": 7}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A chain of two models of several chunks each, which differ in layers."""
    return assembled(tmp_path_factory.mktemp("faults"), 8, 5, hidden=256, heads=4, kv_heads=4, ffn=700)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A chain of two tiny models."""
    return assembled(tmp_path_factory.mktemp("small"), 4, 2)


def with_files_up_to(limit, work):
    """Run some work in a process in which no file can grow longer; the kind and text of its error, or None."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            work()
            sender.send(None)
        except BaseException as error:
            sender.send((isinstance(error, StorageError), f"{type(error).__name__}: {error}"))

    worker = fork.Process(target=limited)
    worker.start()
    assert receiver.poll(120), "it hangs"
    found = receiver.recv()
    worker.join(60)
    return found


def refused(found):
    """One line that names the trouble and the way out."""
    assert found is not None
    ours, text = found
    assert ours, text
    assert "\n" not in text
    assert "disk" in text


def test_a_load_onto_a_full_disk_says_so_and_goes_on_later(hub, wide):
    Chain.from_pretrained(wide).push_to_hub("org/wide")
    for limit in (0, 2000, 100_000, 3 * 2**20):
        refused(with_files_up_to(limit, lambda: CBDModel.from_chain("org/wide", shape=SHAPE)))
    assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE), CBDModel.from_chain(wide, shape=SHAPE))


def test_what_is_written_onto_a_full_disk_is_whole_or_not_there(hub, wide, tmp_path):
    """Pull, make and push."""
    Chain.from_pretrained(wide).push_to_hub("org/wide")
    Chain.from_pretrained("org/wide").save_pretrained(tmp_path / "first")
    for limit in (0, 5000, 3 * 2**20):
        refused(with_files_up_to(limit, lambda: Chain.from_pretrained("org/wide").save_pretrained(tmp_path / "pulled")))
        refused(with_files_up_to(limit, lambda: CBDModel.materialize("org/wide", shape=SHAPE, output_dir=tmp_path / "made")))
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["first"]
    head = hub.repos["org/wide"].at("main")[0]
    hub.repos["org/wide"].commit({**hub.repos["org/wide"].at(head)[1], "README.md": b"# theirs, " + b"x" * 5000})
    refused(with_files_up_to(0, lambda: Chain.from_pretrained(wide).push_to_hub("org/wide")))
    Chain.from_pretrained(wide).push_to_hub("org/wide")
    assert b"theirs" in hub.repos["org/wide"].at("main")[1]["README.md"]


def test_a_small_disk(hub, wide, tmp_path):
    """A real one, where this account may mount one: the cache fills up, and is used on when there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a real full disk is a small one that root mounts, and this account may not; RLIMIT_FSIZE stands in above")
    try:
        Chain.from_pretrained(wide).push_to_hub("org/wide")
        for size in ("64k", "1m", "9m", "20m"):
            subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
            with pytest.raises(StorageError, match="No space left"):
                CBDModel.from_chain("org/wide", shape=SHAPE, cache_dir=disk / "cache")
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        hub.forget()
        assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE, cache_dir=disk / "cache"), CBDModel.from_chain(wide, shape=SHAPE))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_an_index_too_large_to_be_one_is_not_fetched(hub, small, tmp_path):
    Chain.from_pretrained(small).push_to_hub("org/small")
    repo = hub.repos["org/small"]
    good = repo.at("main")[1]
    repo.commit({**good, "chain.json": b" " * (MAX_BYTES + 1)})
    hub.forget()
    for options in ({}, {"force_download": True}):
        with pytest.raises(ManifestError, match="67,108,865 bytes"):
            Chain.from_pretrained("org/small", cache_dir=tmp_path / "cache", **options)
    assert hub.sent < MAX_BYTES // 2, "what the sockets took before it was refused"
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) < 10_000
    repo.commit(good)
    assert Chain.from_pretrained("org/small", cache_dir=tmp_path / "cache").anchors


def test_a_pull_request_that_was_cut_off_is_gone_on_with(hub, small):
    """At every request the answer is lost; in the end each repo has one pull request, and the new files are in it."""
    chain = Chain.from_pretrained(small)
    chain.push_to_hub("org/small")
    for repo in hub.repos.values():
        files = repo.at("main")[1]
        repo.commit({path: data for path, data in files.items() if path != "config.json"} | {"tokenizer.model": b"old"})
    for number in itertools.count():
        hub.fail("", skip=number, drop="after", times=8)  # more often than the client tries again
        try:
            done = chain.push_to_hub("org/small", create_pr=True, token="hf_reader")
            break
        except CBDError:
            continue
        finally:
            hub.faults.clear()
    assert number > 15
    assert len(done.pull_requests) == 3
    for repo_id, repo in hub.repos.items():
        assert [(pull["author"], pull["status"]) for pull in repo.requests] == [("reader", "open")], repo_id
        files = repo.at("refs/pr/1")[1]
        assert "config.json" in files
        assert "tokenizer.model" not in files
        assert "config.json" not in repo.at("main")[1]
    before = {repo_id: repo.at("refs/pr/1")[0] for repo_id, repo in hub.repos.items()}
    again = chain.push_to_hub("org/small", create_pr=True, token="hf_reader")
    assert again == done
    assert before == {repo_id: repo.at("refs/pr/1")[0] for repo_id, repo in hub.repos.items()}
    assert CBDModel.from_chain("org/small", size="max", revision="refs/pr/1").num_parameters() == chain.anchors[0].parameters
    for repo in hub.repos.values():
        repo.merge(1)
    pinned = chain.push_to_hub("org/small", create_pr=True, token="hf_reader").pull_requests
    assert [address.rpartition("/org/")[2] for address in pinned] == ["small/discussions/2"], "a new one on the index alone: the anchors' merged commits"
    hub.repos["org/small"].merge(2)
    assert chain.push_to_hub("org/small", create_pr=True, token="hf_reader").pull_requests == [], "all is merged, nothing is asked for"
    assert chain.push_to_hub("org/other", create_pr=True).pull_requests


@pytest.mark.parametrize(("when", "stride"), [
    ("before", 13), ("after", 17), pytest.param("before", 1, marks=pytest.mark.slow), pytest.param("after", 1, marks=pytest.mark.slow),
])
def test_a_first_push_killed_at_any_request_goes_on(hub, small, when, stride):
    chain = Chain.from_pretrained(small)
    chain.push_to_hub("org/small")
    whole = {repo_id: repo.at("main")[1] for repo_id, repo in hub.repos.items()}
    for number in itertools.count(0, stride):
        hub.repos.clear()
        hub.objects.clear()
        hub.collections.clear()
        hub.forget()
        was_killed = killed_at(hub, number, when, lambda: chain.push_to_hub("org/small"))
        index = hub.repos.get("org/small")
        assert index is None or set(index.at("main")[1]) in (set(), set(whole["org/small"])), "there is no half index"
        done = chain.push_to_hub("org/small")
        assert {repo_id: set(repo.at("main")[1]) for repo_id, repo in hub.repos.items()} == {repo_id: set(files) for repo_id, files in whole.items()}
        assert CBDModel.from_chain("org/small", size="min", force_download=True).num_parameters() == chain.anchors[-1].parameters
        assert hub.repos["org/small"].tags == {"v1": done.commit}
        assert len(hub.collections[done.collection]["items"]) == 3
        sent = [entry.path for entry in hub.log if entry.method == "PUT" and entry.status == 200]
        assert len(sent) == len(set(sent)), "what was sent is not sent again"
        if not was_killed:
            break
    assert number > 20
