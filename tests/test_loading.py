"""What a plan and a load touch, how fast a plan is, and mergekit's passthrough as an oracle for patches."""

import json
import os
import subprocess
import time
import weakref

import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file
from transformers import LlamaConfig

from cbd_hub import CBDModel, Chain, assemble_chain, model, weights
from cbd_hub.files import sha256
from cbd_hub.manifest import Anchor, FileRecord, Link, Location, Manifest, PathRecord
from cbd_hub.shapes import count, shape_of


@pytest.fixture
def touched(monkeypatch):
    """The tensors that are read, with the folder of their anchor; and the files that are opened for it."""
    seen = {"tensors": [], "files": set()}
    real = weights.safe_open

    class Watched:
        def __init__(self, path, **more):
            seen["files"].add(path)
            self._path, self._inner = path, real(path, **more)

        def __enter__(self):
            return self

        def __exit__(self, *rest):
            return None

        def get_tensor(self, key):
            seen["tensors"].append((self._path.parent.name, key))
            return self._inner.get_tensor(key)

    monkeypatch.setattr(weights, "safe_open", Watched)
    return seen


@pytest.mark.parametrize("strategy", ["patch", "blend", "anchor"])
def test_nothing_is_read_that_the_plan_does_not_use(touched, strategy, tmp_path):
    """Planning opens no weights; loading opens the anchors of the plan alone, and of them its tensors, once for each term."""
    checkpoints = [tiny.save(tiny.llama(layers=layers, seed=layers), tmp_path / f"m{layers}") for layers in (8, 5, 2)]
    chain = assemble_chain(checkpoints, tmp_path / "chain")
    for entry in touched.values():
        entry.clear()
    sizes = [anchor.parameters for anchor in chain.anchors]
    options = {} if strategy == "anchor" else {"strategy": strategy}
    size = sizes[1] if strategy == "anchor" else sizes[1] + (sizes[0] - sizes[1]) // 3
    plan = CBDModel.plan(tmp_path / "chain", size, **options)
    assert not touched["files"]
    CBDModel.from_chain(tmp_path / "chain", size, **options)
    assert set(touched["tensors"]) == {(anchor, tensor) for anchor, tensors in plan.sources().items() for tensor in tensors}
    assert len(touched["tensors"]) == sum(len(terms) for terms in plan.tensors.values())
    assert {path.parent.name for path in touched["files"]} == set(plan.sources())
    assert chain.anchors[2].name not in plan.sources()


def test_a_size_is_written_with_a_few_tensors_in_memory(tmp_path, monkeypatch):
    """While a blend goes to disk there are never more than the one that is written, the one before, the next and the two that it is made of, of whichever anchor."""
    checkpoints = [tiny.save(tiny.llama(layers=layers, ffn=64, seed=layers), tmp_path / f"m{layers}") for layers in (24, 12)]
    assemble_chain(checkpoints, tmp_path / "chain", align=False)
    alive, most, real, write = [], [], weights.safe_open, model.write_safetensors

    def seen(tensor):
        alive.append(weakref.ref(tensor))
        most.append(sum(held.nbytes for held in (found() for found in alive) if held is not None))
        return tensor

    class Watched:
        def __init__(self, path, **more):
            self._inner = real(path, **more)

        def __enter__(self):
            return self

        def __exit__(self, *rest):
            return None

        def get_tensor(self, key):
            return seen(self._inner.get_tensor(key))

    monkeypatch.setattr(weights, "safe_open", Watched)
    monkeypatch.setattr(model, "write_safetensors", lambda path, layout, tensors: write(path, layout, map(seen, tensors)))
    plan = CBDModel.materialize(tmp_path / "chain", shape={"layers": 18}, strategy="blend", output_dir=tmp_path / "made")
    largest, whole = (work(tensor.nbytes for tensor in load_file(tmp_path / "made/model.safetensors").values()) for work in (max, sum))
    assert len(most) == len(plan.tensors) + sum(len(terms) for terms in plan.tensors.values())
    assert largest <= max(most) <= 5 * largest < whole / 2


def test_a_plan_of_billions_takes_no_time(tmp_path):
    """Under 0.3 s after import, at 2B parameters with every axis moving: config files, the map and numbers alone."""
    anchors, configs = [], []
    for layers, hidden, ffn in ((32, 2048, 8192), (20, 1536, 5632)):
        config = LlamaConfig(
            vocab_size=128_256, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256,
            head_dim=64, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
        )
        folder = tmp_path / "anchors" / f"{hidden}"
        config.save_pretrained(folder)
        configs.append(config)

    draw = np.random.default_rng(0)
    kept = {
        "kept.layers": np.arange(0, 20), "kept.ffn": draw.permuted(np.tile(np.arange(8192), (32, 1)), axis=1), "kept.hidden": draw.permutation(2048),
        "kept.heads": np.tile(np.arange(32), (32, 1)),
    }
    (tmp_path / "maps").mkdir()
    save_arrays({name: order.astype(np.int32) for name, order in kept.items()}, tmp_path / "maps/s.safetensors")
    for name, config, parent in (("l", configs[0], None), ("s", configs[1], "l")):
        path = tmp_path / "anchors" / str(config.hidden_size) / "config.json"
        anchors.append(Anchor(
            name=name, parameters=count(shape_of(config), config), shape=shape_of(config), family="llama", origin="cut" if parent else "source", parent=parent,
            location=Location(repo_id=".", subfolder=f"anchors/{config.hidden_size}"),
            files={"config.json": FileRecord(sha256=sha256(path), bytes=path.stat().st_size)},
            maps=PathRecord(path="maps/s.safetensors", sha256=sha256(tmp_path / "maps/s.safetensors")) if parent else None,
        ))
    links = [Link(kind="segment", small="s", large="l", order=list(range(20, 32)))]
    (tmp_path / "chain.json").write_text(Manifest(name="big", created_with="test", anchors=anchors, links=links).to_json())
    assert anchors[0].parameters > 1.9e9
    times = []
    for size in np.linspace(anchors[1].parameters, anchors[0].parameters, 9, dtype=int)[1:-1].tolist():
        began = time.process_time()
        plan = CBDModel.plan(tmp_path, size)
        times.append(time.process_time() - began)
        assert abs(plan.parameters - size) <= 0.002 * size
    assert sorted(times)[len(times) // 2] < 0.3


@pytest.mark.skipif("CBD_MERGEKIT_PYTHON" not in os.environ, reason="CBD_MERGEKIT_PYTHON names no Python with mergekit")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_a_patch_is_mergekit_s_passthrough(family, tied, tmp_path):
    """The same layers stacked by another tool give the same bytes, and the embedding of a tied model is stored once.

    mergekit takes what stands before the layers from the first slice's model and what comes after from the last one's, so that an order is used in
    which the blocks at both ends stay the smaller neighbour's.
    """
    make, more = tiny.FAMILIES[family], {"tied": tied} if family == "llama" else {"tie_word_embeddings": tied}
    folders = [tiny.save(make(layers=layers, seed=layers, **more), tmp_path / f"m{layers}") for layers in (9, 4)]
    chain = assemble_chain(folders, tmp_path / "chain", align=False)  # in their own coordinates
    data = json.loads((tmp_path / "chain/chain.json").read_text())
    link, held = data["links"][0], np.rint(np.linspace(0, 8, 4)).astype(int).tolist()
    middle = [layer for layer in link["order"] if held[1] < layer < held[3]]
    link["order"] = middle + [layer for layer in link["order"] if layer not in middle]
    (tmp_path / "chain/chain.json").write_text(json.dumps(data))
    names = dict(zip((anchor.name for anchor in chain.anchors), folders))
    marker = {"llama": "model.layers.{}.input_layernorm.weight", "gpt2": "transformer.h.{}.ln_1.weight"}[family]
    for depth in range(5, 5 + len(middle)):
        plan = CBDModel.materialize(tmp_path / "chain", shape={"layers": depth}, strategy="patch", output_dir=tmp_path / f"ours{depth}")
        slices = []
        for layer in range(depth):
            (term,) = plan.tensors[marker.format(layer)]
            source = int(term.tensor.split(".")[2])
            slices.append({"sources": [{"model": str(names[term.anchor]), "layer_range": [source, source + 1]}]})
        assert {names[plan.small]} == {folders[1]}
        (tmp_path / "recipe.yml").write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices, "dtype": "float32"}))
        subprocess.run(
            [os.environ["CBD_MERGEKIT_PYTHON"], "-m", "mergekit.scripts.run_yaml", str(tmp_path / "recipe.yml"), str(tmp_path / f"theirs{depth}")],
            check=True, capture_output=True,
        )
        theirs = {name: tensor for path in (tmp_path / f"theirs{depth}").glob("*.safetensors") for name, tensor in load_file(path).items()}
        ours = load_file(tmp_path / f"ours{depth}/model.safetensors")
        if tied:
            assert "lm_head.weight" not in ours
            theirs.pop("lm_head.weight", None)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert Chain.from_pretrained(tmp_path / "chain").anchors[1].parameters < plan.parameters
