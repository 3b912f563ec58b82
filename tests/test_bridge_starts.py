"""A chain that goes on beyond a bridge from a cut of a checkpoint, or from random weights of a given shape."""

import pytest
import tiny
import tokenizers_for_bridge as kinds
import torch
from conftest import recipe as make_recipe
from safetensors.torch import load_file
from transformers import set_seed

from cbd_hub import CBDModel, distill_chain
from cbd_hub.distill.dry_run import dry_run
from cbd_hub.distill.schema import Recipe, anchor_key
from cbd_hub.distill.starts import Start
from cbd_hub.errors import RecipeError


BRIDGE = {"bridge": "span", "ce_weight": 0.5, "block_size": 24, "save_steps": 1}
INLINE = {"model_type": "gpt2", "n_embd": 24, "n_head": 2, "n_layer": 3, "n_inner": 32, "n_positions": 128}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A gpt2 of another vocabulary, larger than the teacher, and its tokenizer alone."""
    folder = tmp_path_factory.mktemp("other")
    model = tiny.gpt2(layers=5, hidden=32, ffn=64)
    torch.manual_seed(1)
    tokenizer = kinds.byte_level(330)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder / "whole")
    tokenizer.save_pretrained(folder / "whole")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def made(folder, first, after, **more):
    return make_recipe(folder, "llama", [first, after], teacher={"hidden": 64}, stages={anchor_key(first): {**BRIDGE, **more}})


def starts(other):
    return {
        "shape": ({"origin": "cut", "checkpoint": str(other / "whole"), "layers": 3, "ffn": 24}, {"layers": 2, "ffn": 24}),
        "size": ({"origin": "cut", "checkpoint": str(other / "whole"), "size": "32K"}, {"layers": 1, "ffn": 24}),
        "inline": ({"origin": "random", "config": INLINE, "tokenizer": str(other / "tokenizer")}, {"layers": 2}),
        "folder": ({"origin": "random", "config": str(other / "whole"), "layers": 3, "heads": 2, "hidden": 16, "ffn": 40}, {"layers": 2}),
    }


@pytest.fixture(scope="module", params=["shape", "inline"])
def bridged(request, other, tmp_path_factory):
    """A chain whose first anchor beyond the bridge is a cut, or random, and goes on from there."""
    folder = tmp_path_factory.mktemp(request.param)
    first, after = starts(other)[request.param]
    return first, distill_chain(made(folder, first, after), folder / "chain")


def test_the_chain_goes_on_from_it(bridged):
    first, chain = bridged
    _, anchor, last = chain.anchors
    assert [link.kind for link in chain.manifest.links] == ["bridge", "segment"]
    assert (anchor.origin, anchor.parent, anchor.maps) == (first["origin"], None, None)
    assert (last.origin, last.parent) == ("cut", anchor.name)
    model = CBDModel.from_chain(chain.files.root, (anchor.parameters + last.parameters) // 2, tolerance=0.3)
    assert model.config.model_type == "gpt2"
    assert CBDModel.from_chain(chain.files.root, anchor.parameters).config.eos_token_id == chain.tokenizer("min").eos_token_id


@pytest.mark.parametrize("kind", ["size", "folder"])
def test_killed_and_run_again_it_comes_out_the_same(kind, other, tmp_path, monkeypatch):
    first, after = starts(other)[kind]
    recipe = {**made(tmp_path, first, after), "anchors": [first]}
    anchor = distill_chain(recipe, tmp_path / "chain").anchors[1]
    assert anchor.shape.vocab == 331
    assert all(getattr(anchor.shape, axis) == first[axis] for axis in ("layers", "hidden", "heads", "ffn") if axis in first)
    (cost,) = dry_run(Recipe.parse(recipe))
    assert cost.shape == anchor.shape or kind == "size"
    assert cost.shape.vocab == 331
    tiny.killed_in_training(monkeypatch, 3)
    with pytest.raises(tiny.Killed):
        distill_chain(recipe, tmp_path / "again")
    distill_chain(recipe, tmp_path / "again")
    whole, resumed = (load_file(tmp_path / root / "anchors" / anchor.name / "model.safetensors") for root in ("chain", "again"))
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


def test_random_weights_follow_the_seed(other):
    first, _ = starts(other)["folder"]
    weights = []
    for seed in (0, 0, 1):
        set_seed(seed)
        weights.append(Start.of(first).random_model().transformer.h[0].mlp.c_fc.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("anchor", "said", "line"), [
    ("{origin: cut, checkpoint: WHOLE}", "needs a checkpoint, and either a size or axes", 3),
    ("{origin: cut, checkpoint: WHOLE, size: 30K, layers: 3}", "either a size or axes", 3),
    ("{origin: cut, checkpoint: WHOLE, size: many}", "many", 3),
    ("{origin: cut, checkpoint: WHOLE, layers: 9}", "layers=9 cannot be cut from layers=5", 3),
    ("{origin: cut, checkpoint: WHOLE, layers: three}", "anchors.0.layers: Input should be a valid integer", 3),
    ("{origin: cut, checkpoint: WHOLE, layer: 3}", "layer is no key of an anchor; did you mean layers", 3),
    ("{origin: grown, checkpoint: WHOLE, size: 30K}", "anchors.0.origin: Input should be 'cut' or 'random'", 3),
    ("{checkpoint: WHOLE, layers: 3}", "it may say its origin: cut", 3),
    ("{origin: random, layers: 3}", "needs a config", 3),
    ("{origin: random, config: {model_type: gpt2}}", "a tokenizer where the config is written out", 3),
    ("{origin: random, config: WHOLE, size: 30K}", "size does not go with origin: random", 3),
    ("{origin: random, config: WHOLE, heads: 3, hidden: 32}", "hidden is heads x head_size", 3),
    ("{origin: random, config: WHOLE, layers: 3, vocab: 7}", "vocab=7 is less than the 331 tokens", 3),
    ("{origin: random, config: {model_type: gpt9}, tokenizer: WHOLE}", "gpt9", 3),
    ("{origin: random, config: {model_type: gpt2, n_embed: 9}, tokenizer: WHOLE}", "n_embed is no field of a gpt2 config; did you mean n_embd", 3),
    ("{origin: random, config: {model_type: qwen2, hidden_size: 32, num_attention_heads: 2, num_key_value_heads: 2, num_hidden_layers: 2, intermediate_size: 48}, tokenizer: WHOLE}", "reads .* as a Qwen2Tokenizer", 3),
    ("{origin: random, config: WHOLE, layers: 300}", "falling size", 3),
    ("{origin: cut, checkpoint: WHOLE, layers: 4096, ffn: 1048576}", "4,096 layers of 1,048,576 neurons", 3), ("{origin: random, config: WHOLE, layers: 4096, ffn: 1048576}", "4,096 layers of 1,048,576 neurons", 3),
])
def test_what_is_refused_with_its_line(anchor, said, line, other, tmp_path):
    text = anchor.replace("WHOLE", str(other / "whole"))
    plain = made(tmp_path, {"layers": 2}, {"layers": 1})
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"teacher: {plain['teacher']}\nanchors:\n- {text}\ndata: {{path: {plain['data']['path']}, block_size: 24, heldout: 0.1, calibration: 0.2}}\n"
        "stage: {max_steps: 2, bf16: false, bridge: span}\n"
    )
    with pytest.raises(RecipeError, match=said) as caught:
        distill_chain(Recipe.read(file), tmp_path / "chain")
    assert f"line {line}:" in str(caught.value)
    assert not (tmp_path / "chain").exists()


def test_an_origin_without_a_bridge_is_refused(other, tmp_path):
    plain = made(tmp_path, {"layers": 2}, {"layers": 1})
    for first, _ in starts(other).values():
        with pytest.raises(RecipeError, match="set a bridge in its stage"):
            distill_chain({**plain, "anchors": [first], "stages": {}}, tmp_path / "chain")
