"""chain.json from a stranger is hostile until validated."""

import copy
import json
import logging

import pytest
from transformers import LlamaConfig

from cbd_hub.errors import ArchitectureError, ManifestError, SizeError
from cbd_hub.files import inside
from cbd_hub.manifest import Manifest
from cbd_hub.shapes import shape_of


SHAPE = {"layers": 4, "hidden": 8, "heads": 2, "kv_heads": 2, "head_size": 4, "ffn": 16, "vocab": 32}


def anchor(name, parameters, layers=4, **more):
    return {
        "name": name, "parameters": parameters, "shape": {**SHAPE, "layers": layers}, "family": "llama",
        "location": {"repo_id": ".", "revision": None, "subfolder": f"anchors/{name}"},
        "files": {"config.json": {"sha256": "0" * 64, "bytes": 10}}, "origin": "cut", **more,
    }


def values():
    return {
        "schema_version": 1, "name": "demo", "created_with": "cbd_hub 0.1.0", "teacher": None,
        "anchors": [anchor("3K", 3000), anchor("2K", 2000, layers=3), anchor("1K", 1000, layers=1)],
        "links": [
            {"kind": "segment", "small": "2K", "large": "3K", "order": [2]},
            {"kind": "bridge", "small": "1K", "large": "2K"},
        ],
    }


def test_it_round_trips(tmp_path):
    manifest = Manifest.parse(values(), "test")
    (tmp_path / "chain.json").write_text(manifest.to_json())
    assert Manifest.read(tmp_path) == manifest


def test_unknown_fields_are_ignored_with_a_log_line(caplog):
    made = values()
    made["anchors"][0]["mood"] = "good"
    with caplog.at_level(logging.INFO, "cbd_hub.manifest"):
        assert Manifest.parse(made, "test") == Manifest.parse(values(), "test")
    assert "mood" in caplog.text


def edit(path, value):
    def change(made):
        *where, last = path
        target = made
        for key in where:
            target = target[key]
        target[last] = value
    return change


@pytest.mark.parametrize(("change", "message"), [
    (edit(["schema_version"], 2), "pip install -U cbd-hub"),
    (edit(["schema_version"], 2.0), "pip install -U cbd-hub"),
    (edit(["schema_version"], "1"), "schema_version"),
    (edit(["schema_version"], 0), "schema_version"),
    (edit(["links", 0, "curve"], [{"size": 2500, "strategy": "blend", "loss": 1.0, "tokens": 1, "dataset": "\x1b]0;x\x07"}]), "control characters"),
    (edit(["links", 0, "curve"], [{"size": 2500, "strategy": "blend", "loss": float("nan"), "tokens": 1, "dataset": "x"}]), "loss"),
    (edit(["links", 0, "curve"], [{"size": 5000, "strategy": "blend", "loss": 1.0, "tokens": 1, "dataset": "x"}]), "outside its anchors"),
    (edit(["links", 0, "strategies"], {"blend": {"road": [{"size": size, "layers": 3, "alpha": 1} for size in (2600, 2500)]}}), "rising sizes"),
    (edit(["name"], "../x"), "name"),
    (edit(["anchors"], []), "anchors"),
    (edit(["anchors", 0, "location", "subfolder"], "../../etc"), "plain relative path"),
    (edit(["anchors", 0, "location", "subfolder"], "/etc"), "plain relative path"),
    (edit(["anchors", 0, "location", "subfolder"], "a\\..\\b"), "plain relative path"),
    (edit(["anchors", 0, "files"], {"../../x": {"sha256": "0" * 64, "bytes": 1}}), "plain relative path"),
    (edit(["anchors", 0, "files", "config.json", "sha256"], "zz"), "sha256"),
    (edit(["anchors", 0, "files", "config.json", "bytes"], -1), "bytes"),
    (edit(["anchors", 0, "shape"], {**SHAPE, "layers": 4096, "ffn": 2**20}), "4,294,967,296 units"),
    (edit(["anchors", 0, "shape"], {**SHAPE, "layers": 4096, "heads": 4096}), "67,108,864 units"),
    (edit(["anchors", 0, "shape"], {**SHAPE, "hidden": 2**17, "heads": 4096, "kv_heads": 4096}), "shapes lie between"),
    (edit(["anchors", 0, "chunks"], {"path": "~/../x/..", "sha256": "0" * 64}), "plain relative path"),
    (edit(["anchors", 0, "shape", "layers"], 10**9), "layers"),
    (edit(["anchors", 0, "shape", "ffn"], 0), "ffn"),
    (edit(["anchors", 0, "parameters"], 10**30), "parameters"),
    (edit(["anchors", 0, "parameters"], 2000), "falling size"),
    (edit(["anchors", 0, "parameters"], float("nan")), "parameters"),
    (edit(["anchors", 1, "name"], "3K"), "same name"),
    (edit(["anchors", 0, "location"], {"repo_id": "org/x", "revision": None}), "pinned"),
    (edit(["anchors", 0, "location"], {"repo_id": "../x", "revision": "0" * 40}), "repo_id"),
    (edit(["links"], []), "neighbours"),
    (edit(["links", 0, "order"], [1, 2]), "order must hold 1"),
    (edit(["links", 0, "order"], [7]), "order must hold 1"),
    (edit(["links", 0, "strategies"], {"blend": {"road": [{"size": 2500, "layers": 3, "alpha": 7}]}}), "alpha"),
])
def test_hostile_fields_are_refused_by_name(change, message):
    made = values()
    change(made)
    with pytest.raises(ManifestError, match=message) as caught:
        Manifest.parse(made, "x/chain.json")
    assert "\n" not in str(caught.value)
    assert "x/chain.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, '{"schema_version": "one"}', "\x00\xff"])
def test_what_is_no_manifest_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "chain.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError) as caught:
        Manifest.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_one_says_how_to_make_one(tmp_path):
    with pytest.raises(ManifestError, match="cbd distill"):
        Manifest.read(tmp_path)


def test_sizes_mean_anchors_and_neighbours():
    manifest = Manifest.parse(values(), "test")
    assert manifest.size("max") == 3000
    assert manifest.size("min") == 1000
    assert manifest.size("3K") == 3000
    assert [a.name for a in manifest.neighbours(2500)] == ["2K", "3K"]
    assert [a.name for a in manifest.neighbours(2000)] == ["2K", "2K"]
    with pytest.raises(SizeError, match="1K or less, or 2K or more"):
        manifest.neighbours(1500)
    for outside in (999, 3001, "5M"):
        with pytest.raises(SizeError, match="spans 1K to 3K"):
            manifest.size(outside)


def test_text_finds_the_anchor_it_rounds_to():
    made = copy.deepcopy(values())
    made["anchors"][0]["parameters"] = 3041
    manifest = Manifest.parse(json.loads(json.dumps(made)), "test")
    assert manifest.size("3K") == 3041
    assert manifest.size("3.0K") == 3041
    assert manifest.size(3000) == 3000


def test_links_that_lead_out_of_the_folder_are_refused(tmp_path):
    chain = tmp_path / "chain"
    chain.mkdir()
    (chain / "out").symlink_to(tmp_path)
    with pytest.raises(ManifestError, match="leads out"):
        inside(chain, "out/secret")
    assert inside(chain, "a/b") == chain / "a/b"


def test_a_config_out_of_all_bounds_is_refused():
    """Where no chain.json was validated before: a model of its own, with a config that nobody could have trained."""
    with pytest.raises(ArchitectureError, match="4,294,967,296 units.*check its config.json"):
        shape_of(LlamaConfig(num_hidden_layers=4096, intermediate_size=2**20))
    with pytest.raises(ArchitectureError, match="ffn=.*check its config.json"):
        shape_of(LlamaConfig(intermediate_size=2**40))
