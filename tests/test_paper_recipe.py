"""The paper's bridge as a ready recipe: it is valid as it stands, and carried out on stand-ins of the same families."""

import json
from pathlib import Path

import pytest
import tiny
import tokenizers_for_bridge as kinds
import torch
import yaml

from cbd_hub import distill_chain
from cbd_hub.distill.dry_run import dry_run
from cbd_hub.distill.schema import Recipe


FILE = Path(__file__).parent.parent / "examples" / "bridge_paper.yaml"


@pytest.fixture
def stand_ins(tmp_path):
    """The file's recipe with a tiny model in the place of each id."""
    values = yaml.safe_load(FILE.read_text())
    tokenizer = kinds.byte_level(330)
    for name, more in {"gpt2-xl": {"layers": 4, "ffn": 64}, "gpt2-large": {"layers": 3, "ffn": 48}, "gpt2-medium": {"layers": 2, "ffn": 32}, "gpt2": {"layers": 1, "ffn": 24}}.items():
        model = tiny.gpt2(**more)
        torch.manual_seed(1)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    values["teacher"] = str(tiny.save(tiny.qwen3(hidden=64, ffn=96), tmp_path / "teacher"))
    local = {anchor["checkpoint"]: str(tmp_path / anchor["checkpoint"].split("/")[1]) for anchor in values["anchors"]}
    values["anchors"] = [{"checkpoint": local[anchor["checkpoint"]]} for anchor in values["anchors"]]
    values["stages"] = {local[name]: {**fields, "max_steps": 2, "max_new_tokens": 6} for name, fields in values["stages"].items()}
    values["stage"] |= {"max_steps": 2, "rollout_batch": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_new_tokens": 6, "bf16": False}
    rows = [{"prompt": f"say {index} now", "completion": text} for index, text in enumerate(tiny.texts(40))]
    (tmp_path / "dolly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["data"] |= {"path": str(tmp_path / "dolly.jsonl"), "block_size": 64, "heldout": 0.1, "calibration": 0.2}
    return values


def test_the_file_says_what_the_paper_says():
    recipe = Recipe.read(FILE)
    first, later = (recipe.stage_arguments(anchor) for anchor in recipe.anchors[:2])
    assert (first["bridge"], first["learning_rate"], first["per_device_train_batch_size"]) == ("text", 1e-5, 8)
    assert (later["objective"], later["max_steps"], later["rollout_batch"], later["inner_epochs"], later["ratio_clip"]) == ("minillm", 5000, 256, 4, 0.2)
    assert "bridge" not in later


def test_it_is_carried_out_on_stand_ins(stand_ins, tmp_path):
    assert len(dry_run(Recipe.parse(stand_ins))) == 4
    chain = distill_chain({**stand_ins, "anchors": stand_ins["anchors"][:2]}, tmp_path / "chain")
    assert [link.kind for link in chain.manifest.links] == ["bridge", "segment"]
    assert [anchor.family for anchor in chain.anchors] == ["qwen3", "gpt2", "gpt2"]
