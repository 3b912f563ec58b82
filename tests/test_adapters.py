"""Adapters that move along the chain: what is carried is what a plan makes of anchors that were both changed alike, and peft loads it."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import test_align
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_every_family import IDS, pair, shape_in
from transformers import AutoModelForCausalLM

from cbd_hub import CBDModel, Chain, assemble_chain, carry_adapter, heal
from cbd_hub.adapter_files import CONFIG, LINEAGE, WEIGHTS, read_adapter, targeted
from cbd_hub.adapter_home import home_of, paths_of
from cbd_hub.errors import ArgumentError, CBDError, SizeError, StorageError
from cbd_hub.families import family_of
from cbd_hub.interpolation.align import fit, segment_with
from cbd_hub.interpolation.blend import blend_plan
from cbd_hub.interpolation.carrying import Place, carry
from cbd_hub.interpolation.execute import combine
from cbd_hub.interpolation.low_rank import LowRank, carried, carried_back
from cbd_hub.interpolation.patch import patch_plan
from cbd_hub.interpolation.plan import Take, Term
from cbd_hub.interpolation.planner import PADDING
from cbd_hub.manifest import Blend, Link, Manifest, Mix
from cbd_hub.publish import push_model
from cbd_hub.sizes import format_size


MIX = Mix(alpha=0.3, layer_gain=0.5, neuron_gain=0.7, head_gain=0.6, channel_gain=0.4)
FAMILIES = ["llama", "gpt2", "gpt_neox", "qwen2", "qwen3", "gemma3_text", "olmo2", "opt"]


def weights(model):
    """A model's parameters by checkpoint key, in float64."""
    return {key: parameter.detach().double() for key, parameter in family_of(model.config).parameters(model).items()}


def changes_of(model, seed=0):
    """A random change of rank 2 of every matrix of a model."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return {key: LowRank(random(weight.shape[0], 2), random(2, weight.shape[1]), 0.5) for key, weight in weights(model).items() if weight.dim() == 2}


def changed(model, changes):
    return {key: weight + changes[key].dense() if key in changes else weight for key, weight in weights(model).items()}


def anchors_of(segment):
    return Place(segment.small_shape, Mix(alpha=1.0)), Place(segment.large_shape, Mix(alpha=0.0))


def ranks(changes):
    return {change.rank for change in changes.values()}


def assert_what_the_plan_makes(plan, small, large, ours, theirs, found, tolerance=1e-9):
    """The plan of both anchors changed, less the plan of both as they are, is what was carried."""
    before, after = ({plan.small: first, plan.large: second} for first, second in ((weights(small), weights(large)), (changed(small, ours), changed(large, theirs))))
    for key, terms in plan.tensors.items():
        expected = combine(terms, after) - combine(terms, before)
        if key in found:
            torch.testing.assert_close(found[key].dense(), expected, rtol=tolerance, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}")
        else:
            assert not expected.any(), key
    assert ranks(found) == {2}


def case(name, seed=0, **more):
    small, large, segment = pair(name, seed, **more)
    return small, large, segment, shape_in(name, segment, 3, 3, 1, 32, 40)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_change_of_the_larger_anchor_is_carried_as_if_the_smaller_one_had_it_too(name):
    """The real plan, alpha and gains and all, of two anchors of which the smaller one got what is carried to it: layers, FFN, heads and hidden width move."""
    small, large, segment, shape = case(name, tied=False)
    theirs, (at_small, at_large), target = changes_of(large), anchors_of(segment), Place(shape, MIX)
    ours, found = carry(segment, theirs, at_large, at_small), carry(segment, theirs, at_large, target)
    assert len(found) > len(ours) > 0
    assert_what_the_plan_makes(blend_plan(segment, shape, MIX), small, large, ours, theirs, found)
    # and the same terms by themselves
    plan = blend_plan(segment, shape, MIX, share=0.0)
    parameters = {"l": {key: change.dense() for key, change in theirs.items()}}
    for key, change in found.items():
        assert {term.anchor for term in plan.tensors[key]} == {"l"}
        torch.testing.assert_close(change.dense(), combine(plan.tensors[key], parameters), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_change_of_the_smaller_anchor_is_carried_as_if_the_larger_one_had_it_too(name):
    small, large, segment, shape = case(name, tied=False)
    ours, (at_small, at_large), target = changes_of(small), anchors_of(segment), Place(shape, MIX)
    theirs, found = carry(segment, ours, at_small, at_large), carry(segment, ours, at_small, target)
    assert theirs.keys() < weights(large).keys(), "a layer that it lacks has no change"
    assert_what_the_plan_makes(blend_plan(segment, shape, MIX), small, large, ours, theirs, found)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_change_of_a_size_in_between_is_what_its_own_plan_makes_of_the_anchors_it_was_carried_to(name):
    small, large, segment, shape = case(name, tied=False)
    model = type(large).from_pretrained(None, config=blend_plan(segment, shape, MIX).config(large.config), state_dict={
        key: combine(terms, {"s": family_of(small.config).parameters(small), "l": family_of(large.config).parameters(large)}).detach()
        for key, terms in blend_plan(segment, shape, MIX).tensors.items()
    })
    own, (at_small, at_large), source = changes_of(model), anchors_of(segment), Place(shape, MIX)
    ours, theirs = carry(segment, own, source, at_small), carry(segment, own, source, at_large)
    assert_what_the_plan_makes(blend_plan(segment, shape, MIX), small, large, ours, theirs, own)
    wider = shape_in(name, segment, 4, 3, 2, 36, 44)
    found, mix = carry(segment, own, source, Place(wider, Mix(alpha=0.1))), Mix(alpha=0.1)
    back = carry(segment, found, Place(wider, mix), source)
    for key, change in own.items():
        torch.testing.assert_close(back[key].dense(), change.dense(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gains_of_zero_and_padding(name):
    """What writes nothing at a size gets nothing there, and nothing is divided by zero on the way back; the padded smaller anchor gets the smaller one's change."""
    small, large, segment, shape = case(name, tied=False)
    (at_small, at_large), padded = anchors_of(segment), Place(shape, PADDING)
    theirs = changes_of(large)
    ours, found = carry(segment, theirs, at_large, at_small), carry(segment, theirs, at_large, padded)
    assert_what_the_plan_makes(blend_plan(replace(segment, blend=Blend()), shape, PADDING), small, large, ours, {}, found)
    again = carry(segment, found, padded, at_small)
    for key, change in ours.items():
        torch.testing.assert_close(again[key].dense(), change.dense(), rtol=1e-9, atol=1e-9)
    muted = Mix(alpha=0.5, layer_gain=0.0, neuron_gain=0.0, head_gain=0.0, channel_gain=0.0)
    back = carry(segment, carry(segment, theirs, at_large, Place(shape, muted)), Place(shape, muted), at_large)
    assert all(change.dense().isfinite().all() for change in back.values())


def test_replicated_layers_get_the_change_of_the_layer_that_they_repeat():
    small, large, segment = pair("llama", 1, tied=False)
    kept = replace(segment.kept, ffn=np.tile(np.arange(40), (4, 1)), heads=None, hidden=None)
    segment = replace(segment, kept=kept, blend=Blend(replicate=True))
    shape = shape_in("llama", segment, 4, 3, 1, 32, 40)
    ours, (at_small, at_large) = changes_of(small), anchors_of(segment)
    theirs, found = carry(segment, ours, at_small, at_large), carry(segment, ours, at_small, Place(shape, MIX))
    assert len(found) == len(weights(large)) - 2 * 4 - 1, "every matrix of every layer"
    assert_what_the_plan_makes(blend_plan(segment, shape, MIX), small, large, ours, theirs, found)
    few = shape.model_copy(update={"layers": 3})
    there = carry(segment, ours, at_small, Place(few, MIX))
    for key, change in carry(segment, there, Place(few, MIX), Place(shape, MIX)).items():
        torch.testing.assert_close(change.dense(), found[key].dense(), rtol=1e-9, atol=1e-9)


def test_whole_blocks_of_a_patch_get_the_larger_ones_change_in_its_own_order():
    """A patch leaves a block's heads and neurons in the larger one's order, whatever the smaller one's is."""
    large = tiny.llama(layers=6, tied=False, seed=1)
    small = tiny.llama(layers=3, tied=False, seed=2)
    _, _, segment = pair("llama", 4)
    shapes = [segment.small_shape.model_copy(update={"layers": layers, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48}) for layers in (3, 6)]
    kept = replace(tiny.random_kept(*shapes, 5), layers=np.array([0, 2, 5]), hidden=None)
    segment = replace(segment, small_shape=shapes[0], large_shape=shapes[1], kept=kept, order=[3, 1, 4], config=large.config, patch=True)
    plan = patch_plan(segment, shapes[0].model_copy(update={"layers": 4}))
    target, (at_small, at_large) = Place.of(plan), anchors_of(segment)
    assert target.whole == {1: 2, 2: 3}
    for source, changes in ((at_large, changes_of(large)), (at_small, changes_of(small))):
        ours, theirs, found = (carry(segment, changes, source, place) for place in (at_small, at_large, target))
        assert_what_the_plan_makes(plan, small, large, ours, theirs, found)
        again = carry(segment, found, target, at_large)
        for key in (name for name in theirs if name in again):
            torch.testing.assert_close(again[key].dense(), theirs[key].dense(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "residual"), [("llama", "rotation"), ("llama", "permutation"), ("gpt2", "permutation")])
def test_aligned_anchors_meet_in_common_coordinates(name, residual):
    """Signs, maps inside heads and rotations of the residual stream with the gains that they carry: linear, so that a change is turned as its weight is."""
    untied = {"tie_word_embeddings": False} if name == "gpt2" else {"tied": False}
    small, large = test_align.two(name, **untied)
    segment = segment_with(fit(small, large, residual=residual), small, large)
    assert segment.maps is not None
    middle = segment.small_shape.model_copy(update={"layers": 4, "ffn": (segment.small_shape.ffn + segment.large_shape.ffn) // 2})
    (at_small, at_large), blended, padded = anchors_of(segment), Place(middle, MIX), Place(middle, PADDING)
    for source, model in ((at_large, large), (at_small, small)):
        changes = changes_of(model)
        ours, theirs, found = (carry(segment, changes, source, place) for place in (at_small, at_large, blended))
        assert_what_the_plan_makes(blend_plan(segment, middle, MIX), small, large, ours, theirs, found, 1e-3)
    for one, other in ((blended, padded), (padded, blended)):  # one shape, and two kinds of coordinates
        changes = carry(segment, changes_of(small), at_small, one)
        moved, expected = carry(segment, changes, one, other), carry(segment, carry(segment, changes, one, at_small), at_small, other)
        assert moved.keys() == expected.keys()
        for key, change in expected.items():
            torch.testing.assert_close(moved[key].dense(), change.dense(), rtol=1e-9, atol=1e-9)
        assert any((moved[key].dense() - changes[key].dense()).abs().max() > 0.1 for key in moved)


def test_weights_that_do_not_factor_concatenate_ranks():
    draw = torch.Generator().manual_seed(0)
    change = LowRank(torch.randn(4, 2, generator=draw).double(), torch.randn(2, 6, generator=draw).double(), 2.0)
    rows, columns = (np.array([2, 0]), np.array([3, 1])), (np.array([5, 1, 2]), np.array([0, 4]))

    def terms(*weights):
        starts = [(0, 0), (0, 3), (2, 0), (2, 3)]
        return tuple(
            Term("a", "w", weight, (Take(0, first, rows[first // 2]), Take(1, second, columns[second // 3]))) for (first, second), weight in zip(starts, weights)
        )

    for weights_, rank in (((1.0, 0.5, 2.0, 1.0), 2), ((1.0, 0.5, 2.0, 2.0), 4), ((1.0, 0.0, 0.0, 0.0), 2)):
        found = carried(terms(*weights_), {"w": change}, (4, 5))
        assert found.rank == rank
        torch.testing.assert_close(found.dense(), combine(terms(*weights_), {"a": {"w": change.dense()}}), rtol=1e-12, atol=1e-12)
    two = (Term("a", "w", 0.5), Term("a", "v", 0.25))
    other = replace(change, scale=3.0)
    found = carried(two, {"w": change, "v": other}, (4, 6))
    torch.testing.assert_close(found.dense(), 0.5 * change.dense() + 0.25 * other.dense(), rtol=1e-12, atol=1e-12)
    assert carried(two, {}, (4, 6)) is None
    with pytest.raises(ValueError, match="do not factor"):
        carried_back(terms(1.0, 0.5, 2.0, 2.0), change, (4, 6))


# PEFT folders on chains


def lora(model, folder, targets="all-linear", seed=0, **more):
    """A LoRA with random factors on a model, saved by peft."""
    from peft import LoraConfig, get_peft_model
    made = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": targets, "task_type": "CAUSAL_LM", **more}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(std=0.1)
    made.save_pretrained(folder)
    (folder / "README.md").unlink()  # a form to fill in
    return folder


def chain_of(folder, *models):
    paths = [tiny.save(model, folder / f"m{index}") for index, model in enumerate(models)]
    assemble_chain(paths, folder / "chain", align=False)
    return folder / "chain"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Llamas of three sizes: between the first two layers and FFN move, between the last two all does."""
    return chain_of(
        tmp_path_factory.mktemp("adapters"), tiny.llama(layers=5, hidden=48, heads=6, kv_heads=3, ffn=64, head_dim=8, seed=1),
        tiny.llama(layers=3, hidden=48, heads=6, kv_heads=3, ffn=48, head_dim=8, seed=2), tiny.llama(layers=2, hidden=32, heads=4, kv_heads=2, ffn=24, head_dim=8, seed=3),
    )


def sizes(chain):
    return [anchor.parameters for anchor in Chain.from_pretrained(chain).anchors]


def middles(chain):
    """A size in each segment."""
    found = sizes(chain)
    return [(large + small) // 2 for large, small in zip(found, found[1:])]


def on(chain, size, folder, **more):
    """A LoRA trained, as it were, at a size of the chain."""
    return lora(CBDModel.from_chain(chain, size), folder, **more)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_all_ways_agree(chain, size, adapter, tmp_path, **options):
    """peft on the written folder, from_chain and the merged model: one function, and another than without the adapter."""
    from peft import PeftModel
    base = CBDModel.from_chain(chain, size, tolerance=0.1)
    before = logits(base)
    made = carry_adapter(adapter, chain, size, output_dir=tmp_path / "carried", tolerance=0.1, **options)
    assert not list((tmp_path / "carried").glob("*.bin"))
    loaded = PeftModel.from_pretrained(base, tmp_path / "carried")
    expected = logits(loaded)
    assert expected.isfinite().all()
    assert (expected - before).abs().max() > 1e-2
    whole = CBDModel.from_chain(chain, size, adapter=adapter, tolerance=0.1, **options)
    assert type(whole) is type(base)
    assert whole.config.cbd["adapter"] == made.plan.adapter == json.loads((tmp_path / "carried" / LINEAGE).read_text())
    torch.testing.assert_close(logits(whole), expected, rtol=0, atol=0)
    assert CBDModel.materialize(chain, size, output_dir=tmp_path / "merged", adapter=adapter, tolerance=0.1, **options).adapter == made.plan.adapter
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)
    assert CBDModel.plan(chain, size, adapter=adapter, tolerance=0.1, **options).adapter == made.plan.adapter
    return made


@pytest.mark.parametrize(("name", "targets", "more"), [
    ("gpt2", ["c_attn", "c_proj", "c_fc"], {"r": 8, "use_rslora": True}), ("gpt_neox", ["query_key_value", "dense_4h_to_h", "embed_in", "lm_head"], {}),
    ("qwen2", "all-linear", {"rank_pattern": {"q_proj": 5, "layers.0.mlp.up_proj": 2}, "alpha_pattern": {"q_proj": 9}}),
    ("gemma3_text", ["q_proj", "o_proj", "down_proj"], {}), ("olmo2", r".*layers\.\d+\.(self_attn\.(q|k)_proj|mlp\.gate_proj)", {}),
])
def test_peft_loads_what_is_carried(name, targets, more, tmp_path):
    """Conv1D and fused heads, embeddings and heads, biases, post-norms, norms over heads: on the larger anchor, to the middle, by all ways."""
    kv = {} if name in ("gpt2", "gpt_neox") else {"kv_heads": 2, "head_dim": 8}
    own = {"layer_types": tiny.mixed(4)[:2]} if name == "gemma3_text" else {}
    chain = chain_of(tmp_path, tiny.EVERY[name](layers=4, hidden=32, heads=4, ffn=48, seed=1, **kv), tiny.EVERY[name](layers=2, hidden=24 if not kv else 32, heads=3 if not kv else 4, ffn=32, seed=2, **kv, **own))
    adapter = on(chain, "max", tmp_path / "lora", targets=targets, **more)
    made = assert_all_ways_agree(chain, middles(chain)[0], adapter, tmp_path, **({"adapter_size": "max"} if isinstance(targets, str) and name == "olmo2" else {}))
    assert made.plan.adapter["home"]["parameters"] == sizes(chain)[0]
    assert made.plan.adapter["ranks"]["home"] == made.plan.adapter["ranks"]["target"]
    assert made.config["lora_alpha"] == 7


def test_at_its_own_size_an_adapter_is_itself_bit_for_bit(chain, tmp_path):
    for size in (sizes(chain)[1], middles(chain)[0]):
        adapter = on(chain, size, tmp_path / f"{size}")
        carry_adapter(adapter, chain, size, output_dir=tmp_path / f"{size}-carried")
        for name in (CONFIG, WEIGHTS):
            assert (adapter / name).read_bytes() == (tmp_path / f"{size}-carried" / name).read_bytes()
    assert carry_adapter(adapter, chain, size).plan.adapter["home"]["found_by"] == "shapes"


def test_across_two_segments_step_by_step(chain, tmp_path):
    """From the largest into the last segment by way of the anchor between, and from the smallest up: one call is the two calls."""
    first, _, last = sizes(chain)
    upper, lower = middles(chain)
    way = sizes(chain)[1]
    for home, target in ((first, lower), (last, upper), (upper, last), (lower, upper)):
        adapter = on(chain, home, tmp_path / f"{home}", targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
        made = carry_adapter(adapter, chain, target)
        assert made.plan.adapter["steps"] == 2
        carry_adapter(adapter, chain, way, output_dir=tmp_path / f"{home}-way")
        again = carry_adapter(tmp_path / f"{home}-way", chain, target)
        assert again.plan.adapter["home"]["parameters"] == way
        assert again.tensors.keys() == made.tensors.keys()
        for name, tensor in made.tensors.items():
            torch.testing.assert_close(again.tensors[name], tensor, rtol=1e-5, atol=1e-7)


def test_there_and_back_is_where_it_was(chain, tmp_path):
    """Down to a size in between and up again: what that size holds is as before, the rest has no change; and once more down is the same bit for bit but for rounding."""
    middle = middles(chain)[0]
    adapter = on(chain, "max", tmp_path / "lora")
    down = carry_adapter(adapter, chain, middle, output_dir=tmp_path / "down")
    up = carry_adapter(tmp_path / "down", chain, "max", output_dir=tmp_path / "up")
    assert up.plan.adapter["home"] == {**down.plan.adapter["target"], "found_by": "config.json"}
    again = carry_adapter(tmp_path / "up", chain, middle, adapter_size="max")
    for name, tensor in down.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor, rtol=1e-6, atol=1e-8)


def test_the_home_is_found_by_name_by_record_and_by_shapes(chain, tmp_path):
    root, anchors = Chain.from_pretrained(chain).files.root, Chain.from_pretrained(chain).anchors

    def home(adapter, **options):
        return carry_adapter(adapter, chain, "min", **options).plan.adapter["home"]

    attention = lora(AutoModelForCausalLM.from_pretrained(root / "anchors" / anchors[1].name), tmp_path / "named", targets=["q_proj", "v_proj"])
    assert home(attention)["found_by"] == "base_model_name_or_path"
    assert home(attention)["size"] == anchors[1].name
    moved = on(chain, middles(chain)[0], tmp_path / "attention", targets=["q_proj", "v_proj"])
    found = home(moved)
    assert found["found_by"] == "shapes"
    assert found["shape"].startswith("4 x 48"), "an axis that no module shows does not matter"
    assert home(moved, adapter_size=middles(chain)[0])["parameters"] == CBDModel.plan(chain, middles(chain)[0]).parameters


def test_a_home_that_cannot_be_told_is_asked_for(chain, tmp_path):
    top, second, _ = Chain.from_pretrained(chain).anchors
    for where, targets, match in (
        ("max", r".*layers\.[01]\.self_attn\.q_proj", rf"fits {top.name}, {second.name}, 4 layers .* between {second.name} and {top.name} and 1 more of .* alike .*say by adapter_size="),
        (middles(chain)[0], r".*layers\.[01]\.mlp\.up_proj", "fits 3 layers .*, 4 layers .*, 5 layers .* alike .*adapter_size="),
    ):
        adapter = on(chain, where, tmp_path / str(where), targets=targets)
        with pytest.raises(ArgumentError, match=match):
            carry_adapter(adapter, chain, "min")
        assert carry_adapter(adapter, chain, "min", adapter_size=where).plan.adapter["home"]["found_by"] == "adapter_size"
        with pytest.raises(ArgumentError, match="adapter_size='min', which is .*but .*q_proj|up_proj is 48 x"):
            carry_adapter(adapter, chain, "min", adapter_size="min")
    other = lora(tiny.llama(hidden=64), tmp_path / "other")
    with pytest.raises(ArgumentError, match="fits no size of .*is 48 x 64|64 x"):
        carry_adapter(other, chain, "min")
    strange = lora(tiny.gpt2(), tmp_path / "strange", targets=["c_fc"])
    with pytest.raises(ArgumentError, match="fits no size of .*which no llama of this kind has"):
        carry_adapter(strange, chain, "min")
    named = json.loads((other / CONFIG).read_text()) | {"base_model_name_or_path": str(chain / "anchors" / top.name)}
    (other / CONFIG).write_text(json.dumps(named))
    with pytest.raises(ArgumentError, match="base_model_name_or_path is .* which is .* but "):
        carry_adapter(other, chain, "min")


def test_of_aligned_anchors_a_width_that_nothing_shows_is_asked_for(tmp_path):
    """A size with an anchor's layers and another FFN has its units in other places: that of an attention adapter is not guessed."""
    paths = [tiny.save(tiny.llama(layers=layers, ffn=ffn, seed=layers), tmp_path / f"m{layers}") for layers, ffn in ((4, 96), (2, 48))]
    chain = assemble_chain(paths, tmp_path / "chain", align=True)
    for layers, ffn in ((4, 80), (2, 64)):
        shape = {"layers": layers, "ffn": ffn}
        size = chain.plan(shape=shape).parameters
        adapter = lora(CBDModel.from_chain(tmp_path / "chain", shape=shape), tmp_path / f"lora{layers}", ["q_proj", "v_proj"])
        with pytest.raises(ArgumentError, match=rf"fits .*, {layers} layers .* alike .*say by adapter_size="):
            carry_adapter(adapter, tmp_path / "chain", "max")
        assert carry_adapter(adapter, tmp_path / "chain", "max", adapter_size=size).plan.adapter["home"]["parameters"] == size
    for path, model in zip(paths, chain.anchors):  # on the very checkpoint that the chain was made of it is known
        adapter = lora(AutoModelForCausalLM.from_pretrained(path), tmp_path / f"on{path.name}", ["q_proj", "v_proj"])
        assert carry_adapter(adapter, tmp_path / "chain", "max").plan.adapter["home"] == {
            "found_by": "base_model_name_or_path", "parameters": model.parameters, "shape": model.shape.text, "size": format_size(model.parameters),
        }
    whole = lora(CBDModel.from_chain(tmp_path / "chain", shape={"layers": 4, "ffn": 80}), tmp_path / "whole")
    assert carry_adapter(whole, tmp_path / "chain", "max").plan.adapter["home"]["found_by"] == "shapes"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """Llamas of 6 layers and of 4, the middle of 5: an adapter on some layers may be of several of them."""
    return chain_of(tmp_path_factory.mktemp("narrow"), tiny.llama(layers=6, ffn=48, seed=1), tiny.llama(layers=4, ffn=32, seed=2))


def test_modules_are_found_by_the_rules_of_peft():
    """Lists and patterns, what is left out, layers with and without a name for their list: as peft itself decides."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    paths = [path for name in ("llama", "gpt2", "opt") for path in paths_of(tiny.EVERY[name](layers=3).config)]
    wanted = [["q_proj", "c_attn"], ["self_attn.q_proj", "transformer.h.1.mlp.c_fc"], ["embed_tokens"], r".*\.(q|v)_proj", r".*(layers|h)\.[02]\..*"]
    left_out = [None, [], ["layers.1.self_attn.q_proj"], r".*\.1\..*", ["proj"]]
    layers = [(None, None), ([0, 2], None), (1, None), ([1], "layers"), ([2], ["h", "layers"]), ([0], "elsewhere")]
    found = 0
    for targets, excluded, (which, pattern) in itertools.product(wanted, left_out, layers):
        if isinstance(targets, str) and which is not None:
            continue  # peft takes layers with lists only
        config = LoraConfig(target_modules=targets, exclude_modules=excluded, layers_to_transform=which, layers_pattern=pattern)
        expected = [path for path in paths if check_target_module_exists(config, path)]
        stored = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
        assert [path for path in paths if targeted(stored, path)] == expected, stored
        found += len(expected)
    assert found > 200


@pytest.mark.parametrize(("targets", "more"), [(r".*\.(q|v)_proj", {}), (["q_proj"], {"exclude_modules": ["v_proj"]}), (["up_proj", "v_proj"], {})])
def test_a_pattern_is_of_the_size_whose_modules_it_names(narrow, tmp_path, targets, more):
    """Factors of five layers are never taken for those of a model with six, of which the same pattern names more."""
    middle = CBDModel.plan(narrow, middles(narrow)[0])
    for size, shape in ((middles(narrow)[0], middle.shape), ("max", CBDModel.plan(narrow, "max").shape)):
        adapter = on(narrow, size, tmp_path / f"{size}", targets=targets, **more)
        home = carry_adapter(adapter, narrow, "max").plan.adapter["home"]
        assert (home["found_by"], home["shape"][:2]) == ("shapes", f"{shape.layers} ")
    adapter = tmp_path / f"{middles(narrow)[0]}"
    with pytest.raises(ArgumentError, match="adapter_size='max', which is .*but (it has factors of 5 layers, and there are 6|.*up_proj is 32 x 42)"):
        carry_adapter(adapter, narrow, "min", adapter_size="max")
    there = carry_adapter(adapter, narrow, middles(narrow)[0]).tensors
    for name, tensor in load_file(adapter / WEIGHTS).items():
        torch.testing.assert_close(there[name], tensor, rtol=1e-5, atol=1e-7)


def test_an_adapter_on_some_layers_is_asked_for_its_size(narrow, tmp_path):
    """Of how many layers its model has such an adapter shows nothing; named, it is checked as any other."""
    for name, where, more in (
        ("some", middles(narrow)[0], {"targets": ["q_proj"], "layers_to_transform": [0, 4]}), ("but", "max", {"targets": ["q_proj"], "exclude_modules": r".*layers\.5\..*"}),
    ):
        adapter = on(narrow, where, tmp_path / name, **more)
        with pytest.raises(ArgumentError, match="fits .*, .* alike .*adapter_size="):
            carry_adapter(adapter, narrow, "max")
        assert CBDModel.plan(narrow, "max", adapter=adapter, adapter_size=where).adapter["home"]["parameters"] == CBDModel.plan(narrow, where).parameters
        with pytest.raises(ArgumentError, match="adapter_size='min', which is .* but "):
            carry_adapter(adapter, narrow, "min", adapter_size="min")


def test_an_adapter_of_another_blend_of_the_same_shape_is_told_of(narrow, tmp_path, caplog):
    CBDModel.materialize(narrow, middles(narrow)[0], alpha=0.3, output_dir=tmp_path / "made")
    adapter = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "made"), tmp_path / "lora", targets=["q_proj"])
    carry_adapter(adapter, narrow, middles(narrow)[0], alpha=0.3)
    carry_adapter(adapter, narrow, "max")
    assert not caplog.text
    carry_adapter(adapter, narrow, middles(narrow)[0])
    assert re.search(r"was trained on the blend of .* between .* with alpha 0\.30, and this one has alpha 0\.\d\d; name the alpha \(alpha=0\.3\) for that one", caplog.text)


def test_the_record_of_the_base_models_folder_is_read_first(narrow, tmp_path):
    """An adapter trained on a folder of `cbd make` is of that folder's size, whatever else it would fit."""
    CBDModel.materialize(narrow, middles(narrow)[0], alpha=0.3, output_dir=tmp_path / "made")
    adapter = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "made"), tmp_path / "lora", targets=["q_proj"], layers_to_transform=[0, 1])
    home = carry_adapter(adapter, narrow, "max").plan.adapter["home"]
    assert (home["found_by"], home["parameters"]) == ("base_model_name_or_path", CBDModel.plan(narrow, middles(narrow)[0]).parameters)


def test_the_home_of_a_padded_size_is_padded_unless_a_record_says_how_else_it_was_made(tmp_path):
    """Where the curve sags a size is the smaller anchor padded, in that one's coordinates: so is the home that shapes or a size tell, but not a blend that a folder records."""
    chain = chain_of(tmp_path, tiny.llama(layers=4, ffn=64, seed=1), tiny.llama(layers=2, ffn=48, seed=2))
    manifest, middle = json.loads((chain / "chain.json").read_text()), middles(chain)[0]
    for size, loss in ((manifest["anchors"][0]["parameters"], 1.0), (middle, 9.0), (manifest["anchors"][1]["parameters"], 2.0)):
        point = {"size": size, "strategy": "blend", "loss": loss, "stderr": 0.1, "tokens": 100, "dataset": "text"}
        if size == middle:
            manifest["links"][0]["curve"] = [point]
        else:
            anchor = next(anchor for anchor in manifest["anchors"] if anchor["parameters"] == size)
            anchor["evaluations"] = [{name: value for name, value in point.items() if name not in ("size", "strategy")}]
    (chain / "chain.json").write_text(json.dumps(manifest))
    assert CBDModel.plan(chain, middle).mix == PADDING
    files = Chain.from_pretrained(chain).files

    def home(adapter, size=None):
        return home_of(files, read_adapter(adapter, files.options), size).place

    assert home(on(chain, middle, tmp_path / "padded")).padded
    CBDModel.materialize(chain, middle, strategy="blend", alpha=0.5, output_dir=tmp_path / "blended")
    blended = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "blended"), tmp_path / "lora")
    assert home(blended).mix.alpha == home(blended, middle).mix.alpha == 0.5


@pytest.mark.parametrize("align", [True, False])
def test_an_adapter_of_another_chain_is_refused_though_its_shapes_and_names_fit(align, narrow, tmp_path, caplog):
    """Its base model's config.json knows the anchors' weights; a size that is named is believed, with a warning."""
    paths = [tiny.save(tiny.llama(layers=layers, ffn=ffn, seed=seed), tmp_path / f"m{seed}") for layers, ffn, seed in ((6, 48, 11), (4, 32, 12))]
    other = assemble_chain(paths, tmp_path / "chain", align=align)
    other.save_pretrained(tmp_path / "copy")
    assert [anchor.name for anchor in other.anchors] == [anchor.name for anchor in Chain.from_pretrained(narrow).anchors]
    for name in ("max", "min", middles(narrow)[0]):
        folder = tmp_path / f"made-{name}"
        CBDModel.materialize(tmp_path / "chain", name, output_dir=folder)
        adapter = lora(AutoModelForCausalLM.from_pretrained(folder), tmp_path / f"lora-{name}")
        for right in (tmp_path / "chain", tmp_path / "copy"):
            assert carry_adapter(adapter, right, "max").plan.adapter["home"]["found_by"] == "base_model_name_or_path"
        for act in (partial(carry_adapter, adapter, narrow, "max"), partial(CBDModel.from_chain, narrow, "max", adapter=adapter)):
            with pytest.raises(ArgumentError, match="its base model .*made-.* was made from another chain of the name chain, or before it was made anew, and so is no model of .*adapter_size="):
                act()
            assert not caplog.text
            act(adapter_size=name)
            assert "and so is no model of" in caplog.text
            caplog.clear()
        record = json.loads((folder / "config.json").read_text())  # as it was before fingerprints were written down: told by names
        del record["cbd"]["fingerprints"]
        (folder / "config.json").write_text(json.dumps({**record, "cbd": {**record["cbd"], "chain": "other"}}))
        with pytest.raises(ArgumentError, match="was made from other, and so is no model of"):
            carry_adapter(adapter, narrow, "max")


def test_a_base_model_that_is_none_of_the_chains_is_refused_and_one_that_is_not_at_hand_is_told_of(narrow, tmp_path, caplog):
    folder = tiny.save(tiny.llama(layers=6, ffn=48, seed=11), tmp_path / "plain")
    adapter = lora(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "lora")
    with pytest.raises(ArgumentError, match=r"its base model .*plain has the files of no anchor of .*, though .* has its shape.*say by adapter_size="):
        carry_adapter(adapter, narrow, "min")
    assert carry_adapter(adapter, narrow, "min", adapter_size="max").plan.adapter["home"]["found_by"] == "adapter_size"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}))
    with pytest.raises(ArgumentError, match="its base model .*plain is no llama, and so is no model of"):
        carry_adapter(adapter, narrow, "min")
    assert not caplog.text
    gone = json.loads((adapter / CONFIG).read_text()) | {"base_model_name_or_path": "someone/model"}
    (adapter / CONFIG).write_text(json.dumps(gone))
    assert carry_adapter(adapter, narrow, "min").plan.adapter["home"]["found_by"] == "shapes"
    assert "names the base model someone/model, of which" in caplog.text


def test_a_weight_that_was_trained_beside_the_lora_is_refused_at_home_too(tmp_path):
    chain = chain_of(tmp_path, tiny.llama(layers=3, tied=False, seed=1), tiny.llama(layers=2, tied=False, seed=2))
    model = CBDModel.from_chain(chain, "max")
    with torch.no_grad():
        model.model.embed_tokens.weight[-4:] += 1  # new tokens, set by hand
    adapter = lora(model, tmp_path / "lora", targets=["embed_tokens", "q_proj"])
    for act in (lambda: CBDModel.from_chain(chain, "max", adapter=adapter), lambda: CBDModel.materialize(chain, "max", adapter=adapter, output_dir=tmp_path / "merged")):
        with pytest.raises(ArgumentError, match="trained or resized beside the LoRA"):
            act()


@pytest.mark.parametrize("tied", [True, False])
def test_copies_of_the_vocabularys_weights_that_peft_saves_are_no_hindrance(tied, tmp_path):
    """peft takes a vocabulary that is not its base model's for a resized one, as beyond a bridge, and saves embedding and head with the factors."""
    chain = chain_of(tmp_path, tiny.llama(layers=3, tied=tied, seed=1), tiny.llama(layers=2, tied=tied, seed=2))
    plain = on(chain, "max", tmp_path / "plain", targets=["q_proj"])
    assert all("lora" in name for name in load_file(plain / WEIGHTS)), "the chain's config.json says its vocabulary"
    config = json.loads((chain / "config.json").read_text())
    (chain / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    copied = on(chain, "max", tmp_path / "copied", targets=["q_proj"])
    tensors = load_file(copied / WEIGHTS)
    assert {name for name in tensors if "lora" not in name} >= {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"}
    save_file({name: tensor for name, tensor in tensors.items() if "lora" in name}, plain / WEIGHTS)
    for size in ("max", "min"):
        expected = logits(CBDModel.from_chain(chain, size, adapter=plain))
        torch.testing.assert_close(logits(CBDModel.from_chain(chain, size, adapter=copied)), expected, rtol=0, atol=0)
    assert_all_ways_agree(chain, "min", copied, tmp_path)
    model = CBDModel.from_chain(chain, "max")
    with torch.no_grad():
        model.model.embed_tokens.weight[-4:] += 1
    with pytest.raises(ArgumentError, match="trained or resized beside the LoRA"):
        carry_adapter(lora(model, tmp_path / "changed", targets=["q_proj"]), chain, "min")


def test_the_base_model_can_be_named_at_home_too(chain, tmp_path):
    adapter = on(chain, "max", tmp_path / "lora", targets=["q_proj"])
    assert carry_adapter(adapter, chain, "min").plan.adapter["adapter"] == "lora", "what is published names no folder of this machine"
    carry_adapter(adapter, chain, "max", base_model="org/other", output_dir=tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG).read_text()) == {**json.loads((adapter / CONFIG).read_text()), "base_model_name_or_path": "org/other"}
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


def test_an_embedding_of_a_size_in_between_is_carried(chain, tmp_path):
    """The copy of the weight that peft keeps beside it is that of the size, however the size was named."""
    adapter = on(chain, middles(chain)[1], tmp_path / "lora", targets=["embed_tokens", "up_proj", "o_proj"])
    for said in ({}, {"adapter_size": middles(chain)[1]}):
        assert carry_adapter(adapter, chain, "min", **said).plan.adapter["home"]["parameters"] == CBDModel.plan(chain, middles(chain)[1]).parameters
    other = lora(CBDModel.from_chain(chain, middles(chain)[1], alpha=0.9), tmp_path / "other", targets=["embed_tokens", "up_proj", "o_proj"])
    with pytest.raises(ArgumentError, match="holds a weight of .*embed_tokens that is not the one"):
        carry_adapter(other, chain, "min")


@pytest.mark.parametrize(("more", "match"), [
    ({"use_dora": True}, "use_dora=True.*DoRA's magnitudes"), ({"bias": "lora_only"}, 'bias="lora_only", and biases are not carried'),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*whole modules were trained"), ({"lora_bias": True}, "lora_bias=True"), ({"init_lora_weights": "pissa"}, "begun with init_lora_weights='pissa'"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
])
def test_what_cannot_be_carried_is_refused_by_name(chain, tmp_path, more, match):
    adapter = on(chain, "min", tmp_path / "lora", targets=["q_proj"], **more)
    with pytest.raises(ArgumentError, match=match):
        carry_adapter(adapter, chain, "max", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_kinds_of_adapters_are_refused(chain, tmp_path):
    from peft import IA3Config, get_peft_model
    get_peft_model(CBDModel.from_chain(chain, "min"), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ArgumentError, match="PEFT type IA3, and only LORA"):
        carry_adapter(tmp_path / "ia3", chain, "max")
    classify = on(chain, "min", tmp_path / "lora", targets=["q_proj"], task_type="FEATURE_EXTRACTION")
    with pytest.raises(ArgumentError, match="task FEATURE_EXTRACTION"):
        carry_adapter(classify, chain, "max")


def test_tied_heads_and_embeddings(chain, tmp_path):
    """A head that shares the embedding has no place of its own; an embedding is carried, and never merged into the head."""
    head = on(chain, "max", tmp_path / "head", targets=["lm_head", "q_proj"])
    with pytest.raises(ArgumentError, match="lm_head, which shares the weights of the embedding"):
        carry_adapter(head, chain, "min")
    adapter = on(chain, "max", tmp_path / "embedding", targets=["embed_tokens"], r=2)
    made = carry_adapter(adapter, chain, "min", adapter_size="max", output_dir=tmp_path / "out")
    assert {tuple(tensor.shape) for tensor in made.tensors.values()} == {(2, tiny.VOCAB), (32, 2)}
    from peft import PeftModel
    expected = logits(PeftModel.from_pretrained(CBDModel.from_chain(chain, "min"), tmp_path / "out"))
    torch.testing.assert_close(logits(CBDModel.from_chain(chain, "min", adapter=adapter, adapter_size="max")), expected, rtol=0, atol=0)
    with pytest.raises(ArgumentError, match="changes the embedding, which the head shares"):
        CBDModel.materialize(chain, "min", adapter=adapter, adapter_size="max", output_dir=tmp_path / "merged")
    tensors = load_file(adapter / WEIGHTS)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] += 1
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ArgumentError, match="trained or resized beside the LoRA"):
        carry_adapter(adapter, chain, "min", adapter_size="max")


def test_files_that_are_missing_pickled_or_broken(chain, tmp_path):
    good = on(chain, "max", tmp_path / "good", targets=["q_proj"])

    def broken(change):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(good, tmp_path / "bad")
        change(tmp_path / "bad")
        return tmp_path / "bad"

    def edited(**values):
        return lambda folder: (folder / CONFIG).write_text(json.dumps(json.loads((good / CONFIG).read_text()) | values))

    def retyped(change):
        return lambda folder: save_file(change(load_file(good / WEIGHTS)), folder / WEIGHTS)

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for change, match in (
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "has no adapter_model.safetensors; a pickle is never read"),
        (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors; save it again"), (lambda folder: (folder / CONFIG).unlink(), "has no adapter_config.json, so it is no PEFT folder"),
        (lambda folder: (folder / CONFIG).write_text("{"), "adapter_config.json cannot be read"), (lambda folder: (folder / CONFIG).write_text("[]"), "it is no object"),
        (lambda folder: (folder / CONFIG).write_text(" " * 2**21), "bytes"), (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 40), "is not a whole safetensors file"),
        (edited(r=4), "its config says rank 4"), (edited(lora_alpha="x"), "lora_alpha=x, which is no number"), (edited(lora_alpha=10**400), "which is no number"), (edited(lora_dropout="x"), "lora_dropout=x, which is no share"), (edited(rank_pattern={"(": 3}), "rank_pattern of adapter_config.json cannot be read"),
        (edited(target_modules=5), "target_modules=5, which names no modules"), (edited(exclude_modules="("), "exclude_modules of adapter_config.json cannot be read"), (edited(layers_to_transform=["x"]), "layers_to_transform="),
        (edited(target_modules=["k_proj"]), "has factors of model.layers.0.self_attn.q_proj, which its adapter_config.json does not target"), (edited(rank_pattern=[1]), "rank_pattern of adapter_config.json cannot be read"), (edited(peft_type=None), "PEFT type None"), (edited(some_new_option=3), "some_new_option=3, which cannot be carried"),
        (retyped(lambda tensors: {name: tensor for name, tensor in tensors.items() if name != first}), "not both factors of model.layers.0.self_attn.q_proj"),
        (retyped(lambda tensors: tensors | {first: tensors[first] * float("nan")}), "no matrix of finite numbers"), (retyped(lambda tensors: tensors | {"base_model.model.x.bias": torch.ones(2)}), "no factor of a LoRA"),
        (retyped(lambda tensors: tensors | {first.replace("q_proj.lora_A.", "k_proj."): torch.ones(2, 2)}), "no factor of a LoRA"), (retyped(lambda tensors: {"x": torch.ones(2, 2)}), "no factor of a LoRA"), (retyped(lambda tensors: {}), "holds no factors"),
    ):
        with pytest.raises(CBDError, match=match) as caught:
            carry_adapter(broken(change), chain, "min")
        assert "\n" not in str(caught.value)
    with pytest.raises(ArgumentError, match="neither a folder nor a Hub id"):
        carry_adapter(tmp_path / "nowhere", chain, "min")
    with pytest.raises(StorageError, match="already exists"):
        carry_adapter(good, chain, "min", output_dir=good)


def test_a_bridge_is_not_crossed(tmp_path):
    chain = chain_of(tmp_path, tiny.llama(layers=4, seed=1), tiny.llama(layers=3, seed=2), tiny.llama(layers=2, seed=3))
    manifest = Manifest.read(chain)
    links = [Link(kind="bridge", small=link.small, large=link.large) if place == 1 else link for place, link in enumerate(manifest.links)]
    (chain / "chain.json").write_text(manifest.model_copy(update={"links": links}).to_json())
    adapter = on(chain, "max", tmp_path / "lora")
    names = [anchor.name for anchor in manifest.anchors]
    with pytest.raises(SizeError, match=f"of {names[0]} .* and {names[2]} .* asked for, but the bridge between {names[2]} and {names[1]} lies between them"):
        carry_adapter(adapter, chain, "min")
    assert carry_adapter(adapter, chain, sizes(chain)[1]).plan.adapter["steps"] == 1


def test_the_tokenizer_beside_an_adapter_goes_with_it_untouched(chain, tmp_path):
    adapter = on(chain, "max", tmp_path / "lora", targets=["q_proj"])
    (adapter / "chat_template.jinja").write_text("{{ own }}")
    made = carry_adapter(adapter, chain, "min", output_dir=tmp_path / "out", base_model="org/model", adapter_size="max")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ own }}"
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == "org/model" == made.config["base_model_name_or_path"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS, LINEAGE, "config.json", "chat_template.jinja"}


def test_merging_rounds_once(chain, tmp_path):
    adapter = on(chain, "max", tmp_path / "lora")
    for name, dtype in (("half", torch.bfloat16), ("whole", torch.float32)):
        CBDModel.materialize(chain, middles(chain)[0], adapter=adapter, output_dir=tmp_path / name, dtype=dtype)
    half, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "whole"))
    assert all(torch.equal(tensor, whole[name].bfloat16()) for name, tensor in half.items())


def test_a_model_with_an_adapter_is_not_healed_by_mistake(chain, tmp_path):
    adapter = on(chain, "max", tmp_path / "lora")
    with pytest.raises(ArgumentError, match="the model has an adapter"):
        heal(CBDModel.from_chain(chain, middles(chain)[0], adapter=adapter), chain, [{"text": "a"}])


def test_without_peft_from_chain_says_what_to_install(chain, tmp_path, monkeypatch):
    adapter = on(chain, "max", tmp_path / "lora")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ArgumentError, match="pip install peft"):
        CBDModel.from_chain(chain, "min", adapter=adapter, adapter_size="max")
    CBDModel.materialize(chain, "min", adapter=adapter, adapter_size="max", output_dir=tmp_path / "merged")
    with pytest.raises(ArgumentError, match="adapter_kwargs= cannot be used"):
        CBDModel.from_chain(chain, "min", adapter_kwargs={})


def test_the_command_carries_and_merges(cbd, chain, tmp_path):
    adapter = on(chain, "max", tmp_path / "lora")
    size = middles(chain)[0]
    code, text, _ = cbd("carry", adapter, chain, "--size", size, "--out", tmp_path / "out")
    assert (code, "carried from" in text, "PeftModel.from_pretrained" in text) == (0, True, True)
    code, text, _ = cbd("carry", adapter, chain, "--size", size, "--out", tmp_path / "json", "--json")
    assert json.loads(text)["ranks"] == {"home": "3", "target": "3"}
    code, text, _ = cbd("plan", chain, "--size", size, "--adapter", adapter)
    assert (code, "carried from" in text) == (0, True)
    code, text, _ = cbd("make", chain, "--size", size, "--adapter", adapter, "--out", tmp_path / "made")
    assert (code, "merged" in text) == (0, True)
    assert (tmp_path / "made" / "model.safetensors").is_file()
    code, _, error = cbd("carry", tmp_path / "nowhere", chain, "--size", size, "--out", tmp_path / "no")
    assert (code, error.count("\n"), (tmp_path / "no").exists()) == (2, 1, False)
    (adapter / WEIGHTS).unlink()
    code, _, error = cbd("make", chain, "--size", size, "--adapter", adapter, "--out", tmp_path / "no")
    assert (code, error.count("\n"), (tmp_path / "no").exists()) == (1, 1, False)


def test_adapters_from_the_hub(hub, chain, tmp_path):
    from huggingface_hub import HfApi
    adapter = on(chain, "max", tmp_path / "lora")
    HfApi().create_repo("org/lora")
    commit = HfApi().upload_folder(repo_id="org/lora", folder_path=adapter).oid
    for name in ("org/lora", f"org/lora@{commit}"):
        made = carry_adapter(name, chain, middles(chain)[0])
        assert (made.plan.adapter["adapter"], made.plan.adapter["revision"]) == (name, commit)
    made.save(tmp_path / "out")
    push_model(tmp_path / "out", "org/carried")
    card = HfApi().hf_hub_download("org/carried", "README.md")
    assert "| adapter | org/lora" in Path(card).read_text()
    again = carry_adapter("org/carried", chain, "min")
    assert again.plan.adapter["home"] == {**made.plan.adapter["target"], "found_by": "config.json"}
    with pytest.raises(CBDError, match="org/nothing"):
        carry_adapter("org/nothing", chain, "min")
