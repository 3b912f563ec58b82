"""Loads from the Hub: only the bytes that are needed, few requests, one download among processes, faults, hostile servers."""

import itertools
import json
import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from conftest import assembled
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hub import CBDModel, Chain, assemble_chain
from cbd_hub.client import counted
from cbd_hub.configs import stored_config
from cbd_hub.errors import ArgumentError, CBDError, IntegrityError, ManifestError, SizeError, StorageError
from cbd_hub.files import CHUNK_BYTES
from cbd_hub.hub import _bar_up_to, open_chain
from cbd_hub.interpolation.budget import largest_size
from cbd_hub.plans import anchor_config, plan_costs
from cbd_hub.remote import open_weights
from cbd_hub.weights import row_spans


SHAPE = {"layers": 7}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A chain of two models of several chunks each, which differ in layers."""
    return assembled(tmp_path_factory.mktemp("wide"), 8, 5, hidden=256, heads=4, kv_heads=4, ffn=1000)


@pytest.fixture
def published(hub, wide):
    """The chain on the test Hub, with an empty request log."""
    commit = Chain.from_pretrained(wide).push_to_hub("org/wide").commit
    hub.forget()
    return commit


def weights(hub):
    """Log entries of weight files."""
    return [entry for entry in hub.log if entry.path.endswith(".safetensors") and "maps/" not in entry.path and entry.method == "GET"]


def parts_of(hub, wide):
    """What requests for parts of the larger anchor's weights begin with."""
    large = f"org/wide-{Chain.from_pretrained(wide).anchors[0].name}"
    return f"GET /{large}/resolve/{hub.repos[large].at('main')[0]}/model.safetensors"


def test_a_patch_costs_its_own_bytes_and_chunk_rounding(hub, wide, published):
    local = CBDModel.from_chain(wide, shape=SHAPE)
    plan = CBDModel.plan(wide, shape=SHAPE)
    assert plan.strategy == "patch"
    assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE), local)
    own = 4 * plan.parameters
    sent = sum(entry.sent for entry in weights(hub))
    pieces = sum(1 for entry in weights(hub))
    assert sent <= 1.02 * own + 2 * CHUNK_BYTES * pieces
    small, large = (next(anchor.name for anchor in Chain.from_pretrained(wide).anchors if anchor.shape.layers == layers) for layers in (5, 8))
    assert [entry.range for entry in weights(hub) if f"wide-{small}" in entry.path] == [None], "all of the smaller one is needed: an ordinary download"
    assert all(entry.range for entry in weights(hub) if f"wide-{large}" in entry.path)
    record = Chain.from_pretrained(wide).manifest.anchor(large).files["model.safetensors"]
    assert sum(entry.sent for entry in weights(hub) if f"wide-{large}" in entry.path) < record.bytes - CHUNK_BYTES
    with hub.counted() as asked:
        assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE), local)
    assert [(entry.method, entry.path) for entry in asked] == [("HEAD", "/org/wide/resolve/main/chain.json")]
    with hub.counted() as asked:
        assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE, revision=published), local)
        assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE, local_files_only=True), local)
    assert not asked
    # A further size of the segment costs what is missing, an anchor is the whole file in the standard cache.
    hub.forget()
    CBDModel.from_chain("org/wide", shape={"layers": 6})
    assert sum(entry.sent for entry in weights(hub)) <= CHUNK_BYTES
    hub.forget()
    assert tiny.same(CBDModel.from_chain("org/wide", size="max"), CBDModel.from_chain(wide, size="max"))
    assert [entry.range for entry in weights(hub)] == [None]


def test_a_head_stored_beside_its_embedding_is_no_hindrance_to_loading_in_part(hub, tmp_path):
    """Some tied models store their head too; where a plan takes neither from an anchor, neither is fetched nor compared."""
    folders = []
    for layers in (8, 5):
        folder = tiny.save(tiny.llama(layers=layers, seed=layers, hidden=4096, heads=4, kv_heads=4, ffn=16, head_dim=8), tmp_path / f"m{layers}")
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    chain = assemble_chain(folders, tmp_path / "chain", align=False)
    chain.push_to_hub("org/spare")
    plan = chain.plan(shape=SHAPE)
    assert plan.strategy == "patch"
    files = open_chain("org/spare")
    large = files.manifest.anchors[0]
    with open_weights(files, large, anchor_config(files, large), plan.rows()[large.name])._where["model.layers.1.mlp.up_proj.weight"][0].open("rb") as file:
        file.seek(CHUNK_BYTES)
        assert not any(file.read(CHUNK_BYTES)), "the chunk of head and embedding alone is not there"
    assert tiny.same(CBDModel.from_chain("org/spare", shape=SHAPE), CBDModel.from_chain(tmp_path / "chain", shape=SHAPE))
    assert tiny.same(CBDModel.from_chain("org/spare", size="max"), CBDModel.from_chain(tmp_path / "chain", size="max"))


def test_a_plan_prints_the_bytes_in_five_requests(hub, wide, published):
    with hub.counted() as asked:
        from dataclasses import replace
        files = replace(open_chain("org/wide"), glance=True)
        plan = Chain(files).plan(shape=SHAPE)
        costs = plan_costs(files, plan)
    assert len(asked) <= 5
    assert not weights(hub)
    CBDModel.from_chain("org/wide", shape=SHAPE)
    assert sum(costs["bytes_to_fetch"].values()) == sum(entry.sent for entry in weights(hub))
    assert sum(plan_costs(files, plan)["bytes_to_fetch"].values()) == 0
    assert CBDModel.plan("org/wide", shape=SHAPE).summary() == CBDModel.plan(wide, shape=SHAPE).summary()


def test_a_server_without_ranges_still_serves(hub, wide, published):
    hub.ranges = False
    assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE), CBDModel.from_chain(wide, shape=SHAPE))


def test_connections_that_break_and_servers_that_are_busy(hub, wide, published):
    for fault in ({"cut": 5_000_000}, {"status": 429, "headers": {"Retry-After": "0"}}, {"status": 503}, {"drop": "before"}, {"cut": 100}):
        hub.fail(parts_of(hub, wide), **fault)
    assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE), CBDModel.from_chain(wide, shape=SHAPE))


def test_wrong_bytes_are_refused_and_the_cache_stays_usable(hub, wide, published):
    hub.fail("safetensors", change=lambda body: body[:-5] + b"wrong", times=9)
    with pytest.raises(IntegrityError, match="was recorded|differs from its recorded hash"):
        CBDModel.from_chain("org/wide", shape=SHAPE)
    hub.faults.clear()
    assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE), CBDModel.from_chain(wide, shape=SHAPE))


def test_damage_in_the_cache_is_mended(hub, wide, published):
    CBDModel.from_chain("org/wide", shape=SHAPE)
    anchor = Chain.from_pretrained("org/wide").anchors[0]
    path = open_chain("org/wide").partial(anchor, "model.safetensors").path
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    os.utime(path, (1, 1))
    assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE), CBDModel.from_chain(wide, shape=SHAPE))
    with path.open("r+b") as file:
        file.truncate(100)
    assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE), CBDModel.from_chain(wide, shape=SHAPE))


def test_a_body_longer_than_asked_does_not_fill_the_memory(hub, wide, published):
    hub.fail(parts_of(hub, wide), more=10 * CHUNK_BYTES, times=9)
    with pytest.raises(IntegrityError, match="more bytes than were asked"):
        CBDModel.from_chain("org/wide", shape=SHAPE)
    hub.faults.clear()
    assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE), CBDModel.from_chain(wide, shape=SHAPE))


def test_bytes_of_the_network_are_not_those_of_the_file():
    """hf-xet tells of both, and of more of the first than a file has."""
    came = []
    with counted(came.append), XetDownloadProgressReporter(
        reconstruction_desc="", total=1000, log_level=20, name="huggingface_hub.xet_get", tqdm_class=_bar_up_to(1000, "org/x", IntegrityError)
    ) as reporter:
        for written, transferred in ((500, 600), (1000, 1050)):
            reporter.update_progress(SimpleNamespace(
                total_bytes_completed=written, total_transfer_bytes_completed=transferred, total_bytes=1000, total_bytes_completion_rate=1.0, total_transfer_bytes_completion_rate=1.0
            ))
    assert sum(came) == 1000


@pytest.mark.parametrize("wait", ["\xb2", "-1", "soon", "9" * 400])
def test_a_wait_that_is_no_number_is_a_wait(hub, wide, published, monkeypatch, wait):
    monkeypatch.setattr("cbd_hub.ranges._LONGEST_WAIT", 0.01)
    hub.fail(parts_of(hub, wide), status=429, headers={"Retry-After": wait})
    assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE), CBDModel.from_chain(wide, shape=SHAPE))


def test_one_wrong_part_ends_the_others(hub, wide, published, monkeypatch):
    """What would be refused in the end is not fetched to its end; Ctrl-C takes the same way."""
    monkeypatch.setattr("cbd_hub.ranges._JOB_CHUNKS", 1)
    hub.fail(parts_of(hub, wide), status=404)
    hub.fail(parts_of(hub, wide), delay=2.0, times=99)
    with pytest.raises(CBDError):
        CBDModel.from_chain("org/wide", shape=SHAPE)
    slow = [entry for entry in weights(hub) if entry.range and entry.status == 206]
    assert slow
    assert sum(entry.sent for entry in slow) < len(slow) * CHUNK_BYTES // 2


def test_forced_parts_are_written_over_what_others_read(hub, wide, published):
    """A process that has the file open keeps reading the very file."""
    CBDModel.from_chain("org/wide", shape=SHAPE)
    anchor = Chain.from_pretrained("org/wide").anchors[0]
    path = open_chain("org/wide").partial(anchor, "model.safetensors").path
    before = path.stat().st_ino
    fetched = sum(entry.sent for entry in weights(hub))
    hub.forget()
    assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE, force_download=True), CBDModel.from_chain(wide, shape=SHAPE))
    assert path.stat().st_ino == before
    assert sum(entry.sent for entry in weights(hub)) == fetched


def test_a_cache_in_another_place_holds_all(hub, wide, published, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    here = set(tmp_path.iterdir())
    CBDModel.from_chain("org/wide", shape=SHAPE)
    CBDModel.from_chain("org/wide", shape=SHAPE, cache_dir=tmp_path / "own")
    assert {path.name for path in set(tmp_path.iterdir()) - here} <= {"elsewhere", "own", "home"}
    for place in ("elsewhere", "own"):
        assert [path.name for path in (tmp_path / place / ".cbd_hub/partial").rglob("*.safetensors")] == ["model.safetensors"]
    hub.forget()
    CBDModel.from_chain("org/wide", shape=SHAPE, revision=published, cache_dir=tmp_path / "own")
    assert not hub.log


def test_a_load_reads_each_config_once(wide, monkeypatch):
    read = []
    monkeypatch.setattr("cbd_hub.plans.stored_config", lambda folder: read.append(folder) or stored_config(folder))
    CBDModel.from_chain(wide, shape=SHAPE)
    assert len(read) == 2


def test_what_vanished_or_shut_is_one_clear_error(hub, wide, published):
    anchor, repo = Chain.from_pretrained(wide).anchors[0].name, hub.repos
    repo[f"org/wide-{anchor}"].gated = "auto"
    with pytest.raises(StorageError, match="gated"):
        CBDModel.from_chain("org/wide", shape=SHAPE, token="hf_reader")
    gone = repo.pop(f"org/wide-{anchor}")
    with pytest.raises(ManifestError, match="no repo on the Hub"):
        CBDModel.from_chain("org/wide", shape=SHAPE)
    repo[f"org/wide-{anchor}"] = gone
    with pytest.raises(ManifestError, match="no such revision"):
        CBDModel.from_chain("org/wide", shape=SHAPE, revision="v9")
    with pytest.raises(ManifestError, match=r"without chain\.json"):
        CBDModel.from_chain(f"org/wide-{anchor}", shape=SHAPE)
    with pytest.raises(StorageError, match="cannot be reached"):
        CBDModel.from_chain("org/wide", shape=SHAPE, local_files_only=True, cache_dir="/nowhere")
    with pytest.raises(StorageError, match="refuses this account or its token"):
        CBDModel.from_chain("org/wide", shape=SHAPE, token="hf_expired")
    assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE), CBDModel.from_chain(wide, shape=SHAPE))


def test_the_largest_size_that_fits_is_found_without_a_download(hub, wide, published):
    small, large = (anchor.parameters for anchor in reversed(Chain.from_pretrained(wide).anchors))
    sizes = [CBDModel.plan(wide, shape={"layers": layers}).parameters for layers in (5, 6, 7, 8)]
    for budget, dtype in ((sizes[1] * 4, "float32"), (sizes[1] * 4 + 3, "float32"), (sizes[2] * 4 - 1, None), (sizes[3] * 2 - 1, "bfloat16"), (10**12, None)):
        room = budget // (2 if dtype == "bfloat16" else 4)
        plan = CBDModel.plan("org/wide", memory_budget=budget, dtype=dtype)
        assert plan.parameters == max(size for size in sizes if size <= room)
    assert not weights(hub)
    assert CBDModel.from_chain(wide, memory_budget="1GiB").num_parameters() == large
    with pytest.raises(SizeError, match="smallest anchor"):
        CBDModel.plan("org/wide", memory_budget=small * 4 - 1)
    with pytest.raises(SizeError, match="no count of bytes"):
        CBDModel.plan(wide, memory_budget="much")
    with pytest.raises(ArgumentError, match="one of them"):
        CBDModel.plan(wide, memory_budget="1GB", size="max")


def test_a_budget_holds_for_what_is_made_in_the_widest_dtype_of_the_neighbours(tmp_path):
    """A teacher in bf16 above anchors in fp32, as a distilled chain has them: in between it is fp32, the teacher itself bf16."""
    for layers, dtype in ((6, torch.bfloat16), (2, torch.float32)):
        tiny.save(tiny.llama(layers=layers, seed=layers).to(dtype), tmp_path / str(layers))
    large, small = assemble_chain([tmp_path / "6", tmp_path / "2"], tmp_path / "chain", align=False).anchors
    for budget in (4 * small.parameters, 4 * small.parameters + 30_000, 2 * large.parameters - 1, 2 * large.parameters):
        model = CBDModel.from_chain(tmp_path / "chain", memory_budget=budget)
        assert sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) <= budget
    assert model.num_parameters() == large.parameters
    assert CBDModel.plan(tmp_path / "chain", memory_budget=2 * small.parameters, dtype="bfloat16").parameters == small.parameters
    with pytest.raises(SizeError, match="in float32, but the smallest anchor"):
        CBDModel.plan(tmp_path / "chain", memory_budget=4 * small.parameters - 1)


def test_the_dtype_is_that_of_the_weights_whatever_a_config_says(hub, tmp_path):
    """Weights in fp32 whose config names bf16, of a local chain and of one on the Hub; and anchors in bf16 and fp16, of which neither holds the other."""
    paths = [tiny.save(tiny.llama(layers=layers, seed=layers), tmp_path / str(layers)) for layers in (6, 2)]
    for path in paths:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    chain = assemble_chain(paths, tmp_path / "chain", align=False)
    chain.push_to_hub("org/said")
    for name in (tmp_path / "chain", "org/said"):
        budget = 4 * sum(anchor.parameters for anchor in chain.anchors) // 2
        model = CBDModel.from_chain(name, memory_budget=budget)
        assert 0.7 * budget < sum(parameter.nbytes for parameter in model.parameters()) <= budget
    large, small = tiny.llama(layers=4, ffn=48).to(torch.bfloat16), tiny.llama(layers=3, ffn=40, seed=3).to(torch.float16)
    with torch.no_grad():
        large.model.layers[0].mlp.up_proj.weight[0, 0] = 2e5
    mixed = assemble_chain([tiny.save(large, tmp_path / "bf16"), tiny.save(small, tmp_path / "fp16")], tmp_path / "mixed", align=False)
    model = CBDModel.from_chain(tmp_path / "mixed", sum(anchor.parameters for anchor in mixed.anchors) // 2, tolerance=0.2)
    assert model.dtype == torch.float32
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_budget_holds_where_a_size_asked_for_again_is_another(wide):
    """Shapes come in steps, and which is nearest depends on what was asked: what is promised is what comes out of the size that is given back."""
    manifest = Chain.from_pretrained(wide).manifest
    small, large = (anchor.parameters for anchor in reversed(manifest.anchors))

    def realised(size):
        return min(size - 1 if size % 2 == 0 else size + 3, large)

    for limit in range(small + 10, small + 30):
        found = largest_size(manifest, lambda *anchors, limit=limit: limit, realised)
        assert small <= found <= limit
        assert found == small or realised(found) <= limit


def test_auto_classes_open_a_chain(hub, wide, published):
    import cbd_hub.auto  # noqa: F401
    small = Chain.from_pretrained(wide).anchors[1]
    model = AutoModelForCausalLM.from_pretrained("org/wide", size=small.parameters, dtype=torch.bfloat16)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.bfloat16
    assert tiny.same(AutoModelForCausalLM.from_pretrained(f"org/wide-{small.name}"), CBDModel.from_chain(wide, size="min"))
    assert AutoTokenizer.from_pretrained("org/wide")("a").input_ids == tiny.tokenizer()("a").input_ids
    with pytest.raises(ArgumentError, match="say which"):
        AutoModelForCausalLM.from_pretrained("org/wide")
    assert AutoModelForCausalLM.from_pretrained("org/wide", size="min", attn_implementation="eager").config._attn_implementation == "eager"
    assert tiny.same(AutoModelForCausalLM.from_pretrained(wide, size="min"), CBDModel.from_chain(wide, size="min")), "a local chain too"


def test_a_snapshot_of_the_hubs_cache_is_a_chain_too(hub, wide, published):
    """Its files are links to the blobs of its repo, beside the snapshots."""
    folder = Path(snapshot_download("org/wide"))
    assert (folder / "chain.json").is_symlink()
    assert tiny.same(CBDModel.from_chain(folder, size="min"), CBDModel.from_chain(wide, size="min"))


def load(wide_id, shape, queue):
    files = open_chain(wide_id)
    plan = Chain(files).plan(shape=shape)
    for name, rows in plan.rows().items():
        anchor = files.manifest.anchor(name)
        checkpoint = open_weights(files, anchor, anchor_config(files, anchor), rows)
        queue.put(sum(float(checkpoint[tensor].sum()) for tensor in sorted(rows)))


def test_processes_share_one_download(hub, wide, published):
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    workers = [fork.Process(target=load, args=("org/wide", SHAPE, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    sums = [queue.get(timeout=120) for _ in range(8)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len({round(value, 3) for value in sums}) == 2
    sent = sum(entry.sent for entry in weights(hub))
    hub.forget()
    load("org/wide", SHAPE, queue)
    assert sum(entry.sent for entry in weights(hub)) == 0
    assert sent <= 4 * CBDModel.plan(wide, shape=SHAPE).parameters * 1.02 + 6 * CHUNK_BYTES


def killed_at(hub, number, when, work):
    """Run some work in a process that is killed at its request of that number; whether it was."""
    fork = multiprocessing.get_context("fork")
    worker = fork.Process(target=work)
    hub.fail("", skip=number, drop=when)
    hub.faults[-1].kill = 0
    fault = hub.faults[-1]
    fault.strike = lambda: os.kill(worker.pid, signal.SIGKILL)
    worker.start()
    worker.join(120)
    hub.faults.clear()
    return worker.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(("when", "stride"), [
    ("before", 9), ("after", 11), pytest.param("before", 1, marks=pytest.mark.slow), pytest.param("after", 1, marks=pytest.mark.slow),
])
def test_a_push_killed_at_any_request_harms_nothing_and_goes_on(hub, wide, when, stride):
    """The walk: at requests of a second push the process is killed; the published chain then is the old one or the new one, whole."""
    chain = Chain.from_pretrained(wide)
    chain.push_to_hub("org/wide")
    repo = hub.repos["org/wide"]
    old = repo.at("main")[1]
    number, seen = 0, set()
    while True:
        for name in hub.repos:  # what the second push has to send again
            hub.repos[name].commit({path: data for path, data in hub.repos[name].at("main")[1].items() if path != "generation_config.json"})
        stale = repo.at("main")[0]
        was_killed = killed_at(hub, number, when, lambda: chain.push_to_hub("org/wide"))
        new = repo.at("main")[1]
        assert repo.at("main")[0] == stale or set(new) == set(old)
        assert Chain.from_pretrained("org/wide", force_download=True).anchors
        for anchor in Chain.from_pretrained("org/wide").anchors:
            commit, held = anchor.location.revision, hub.repos[anchor.location.repo_id].at(anchor.location.revision)[1]
            assert {path: len(held[path]) for path in anchor.files} == {path: record.bytes for path, record in anchor.files.items()}, commit
        seen.add(repo.at("main")[0] != stale)
        if not was_killed:
            break
        number += stride
    assert number > 20
    assert True in seen


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_load_killed_at_any_request_leaves_a_usable_cache(hub, wide, published, when):
    import queue
    number = 0
    while killed_at(hub, number, when, lambda: load("org/wide", SHAPE, queue.Queue())):
        number += 1
    assert number >= 1
    assert tiny.same(CBDModel.from_chain("org/wide", shape=SHAPE), CBDModel.from_chain(wide, shape=SHAPE))


def test_no_token_is_ever_shown(hub, wide, published, caplog, capsys, monkeypatch):
    secret = "hf_" + "s3cret" * 5
    hub.tokens[secret] = "org"
    monkeypatch.setenv("HF_TOKEN", secret)
    shown = [repr(Chain.from_pretrained("org/wide", token=secret).files)]
    for match, fault in (("chain.json", {"status": 500}), ("safetensors", {"status": 403}), ("safetensors", {"drop": "before"})):
        hub.fail(match, times=50, **fault)
        with pytest.raises(CBDError) as caught:
            CBDModel.from_chain("org/wide", shape=SHAPE, token=secret, force_download=True)
        shown += [str(caught.value), str(caught.value.__cause__)]
        hub.faults.clear()
    hub.fail("POST /api/models", times=50, status=500)
    with pytest.raises(CBDError) as caught:
        Chain.from_pretrained(wide).push_to_hub("org/other", token=secret)
    hub.faults.clear()
    Chain.from_pretrained(wide).push_to_hub("org/other", token=secret)
    held = b"".join(data for repo in hub.repos.values() for _, files in repo.commits.values() for path, data in files.items() if not path.endswith(".safetensors"))
    printed = capsys.readouterr()
    assert secret not in "".join(shown) + str(caught.value) + caplog.text + printed.out + printed.err
    assert secret.encode() not in held
    assert all(secret not in entry.path + entry.query for entry in hub.log)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.integers(0, 9), st.sets(st.integers(0, 39)))
def test_the_spans_of_rows_are_these_rows(start, width, rows):
    chosen = sorted(rows)
    spans = row_spans((start, start + 40 * width), 40, np.array(chosen, dtype=np.int64))
    assert [place for low, high in spans for place in range(low, high)] == [start + row * width + byte for row in chosen for byte in range(width)]
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(spans)) or not width
