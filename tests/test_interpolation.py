"""Plans and their execution against a slow reference that knows each architecture by heart."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from cbd_hub.errors import ArgumentError, ManifestError, SizeError
from cbd_hub.interpolation.blend import blend_plan
from cbd_hub.interpolation.execute import combine, materialise
from cbd_hub.interpolation.live import Between, ModelRunner
from cbd_hub.interpolation.patch import patch_plan
from cbd_hub.interpolation.plan import Kept, Segment
from cbd_hub.interpolation.planner import road_at, segment_plan
from cbd_hub.manifest import Blend, Mix, RoadPoint, Shape
from cbd_hub.shapes import count, shape_of


# FFN dimension of the tensors that have one; everything else is untouched by the FFN.
FFN = {
    "llama": {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1},
    "gpt2": {"c_fc.weight": 1, "c_fc.bias": 0, "mlp.c_proj.weight": 0},
}
OUT = {"llama": ("o_proj.weight", "down_proj.weight"), "gpt2": ("attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")}
READS_FFN = {"llama": "down_proj.weight", "gpt2": "mlp.c_proj.weight"}
BLOCK = {"llama": "model.layers.", "gpt2": "transformer.h."}


def pair(family, seed=0, small=(3, 20), large=(6, 32), tied=True):
    make = tiny.FAMILIES[family]
    more = {"tied": tied} if family == "llama" else {"tie_word_embeddings": tied}
    big = make(layers=large[0], ffn=large[1], seed=seed, **more)
    little = make(layers=small[0], ffn=small[1], seed=seed + 1, **more)
    draw = np.random.default_rng(seed)
    layers = np.sort(draw.choice(large[0], small[0], replace=False))
    kept = Kept(layers, np.stack([draw.permutation(large[1]) for _ in range(large[0])]))
    shapes = shape_of(little.config), shape_of(big.config)
    segment = Segment("s", "l", *shapes, kept, list(draw.permutation(kept.dropped)), big.config, patch=small[1] == large[1])
    return little, big, segment


def reference_blend(family, small, large, segment, shape, mix, replicate=False):
    """Eq. 3 written out tensor by tensor."""
    a, b = small.state_dict(), large.state_dict()
    held = list(segment.kept.layers)
    layers = sorted(held + list(segment.order[: shape.layers - len(held)]))
    made = {}
    for key in b:
        if BLOCK[family] not in key:
            made[key] = mix.alpha * a[key] + (1 - mix.alpha) * b[key]
    width_small = segment.small_shape.ffn
    for place, layer in enumerate(layers):
        order = torch.from_numpy(segment.kept.ffn[layer])
        source = held.index(layer) if layer in held else max([i for i, other in enumerate(held) if other < layer], default=0)
        for key in [key for key in b if key.startswith(f"{BLOCK[family]}{layer}.")]:
            name = key.split(".", 3)[3]
            target = f"{BLOCK[family]}{place}.{name}"
            theirs = b[key]
            dim = next((d for suffix, d in FFN[family].items() if key.endswith(suffix)), None)
            if dim is not None:
                theirs = theirs.index_select(dim, order[: shape.ffn])
            gain = mix.layer_gain if any(key.endswith(suffix) for suffix in OUT[family]) else 1.0
            if layer not in held and not replicate:
                made[target] = gain * theirs
                continue
            ours = a[f"{BLOCK[family]}{source}.{name}"]
            if dim is None:
                made[target] = mix.alpha * ours + (1 - mix.alpha) * theirs
                continue
            shared = mix.alpha * ours + (1 - mix.alpha) * theirs.narrow(dim, 0, width_small)
            extra = theirs.narrow(dim, width_small, shape.ffn - width_small)
            extra = extra * (mix.neuron_gain if key.endswith(READS_FFN[family]) else 1.0)
            made[target] = torch.cat([shared, extra], dim)
    return made


def live(plan, small, large):
    parameters = {"s": dict(small.named_parameters()), "l": dict(large.named_parameters())}
    return {name: combine(terms, parameters) for name, terms in plan.tensors.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mix", [Mix(alpha=0.3), Mix(alpha=1.0, layer_gain=0.5, neuron_gain=0.7), Mix(alpha=0.0), Mix(alpha=0.6, layer_gain=0.2)])
@pytest.mark.parametrize("tied", [True, False])
def test_blend_is_the_formula(family, seed, mix, tied):
    small, large, segment = pair(family, seed, tied=tied)
    draw = np.random.default_rng(seed)
    shape = segment.small_shape.model_copy(update={"layers": int(draw.integers(3, 7)), "ffn": int(draw.integers(20, 33))})
    for replicate in (False, True):
        chosen = dataclasses.replace(segment, blend=Blend(replicate=replicate))
        plan = blend_plan(chosen, shape, mix)
        expected = reference_blend(family, small, large, chosen, shape, mix, replicate)
        if tied:
            expected.pop("lm_head.weight")
        made = live(plan, small, large)
        assert made.keys() == expected.keys()
        for name, tensor in made.items():
            torch.testing.assert_close(tensor, expected[name], msg=name)
        assert sum(tensor.numel() for tensor in made.values()) == plan.parameters == count(shape, segment.config)


@pytest.mark.parametrize("seed", range(3))
def test_lazy_and_live_tensors_agree(family, seed):
    """Training on the path and from_chain make the same model from the same plan."""
    small, large, segment = pair(family, seed)
    shape = segment.small_shape.model_copy(update={"layers": 5, "ffn": 27})
    plan = blend_plan(segment, shape, Mix(alpha=0.4, layer_gain=0.6, neuron_gain=0.8))
    states = {"s": small.state_dict(), "l": large.state_dict()}
    for name, tensor in live(plan, small, large).items():
        lazy = materialise(plan.tensors[name], lambda anchor, key: states[anchor][key], tuple(tensor.shape), torch.float32)
        torch.testing.assert_close(lazy, tensor.detach(), rtol=1e-6, atol=1e-7)


def test_blend_is_rounded_once():
    """In bf16 a blend is the fp32 sum rounded, not a sum of rounded parts."""
    small, large, segment = pair("llama")
    plan = blend_plan(segment, segment.small_shape, Mix(alpha=0.3))
    halves = {"s": {k: v.bfloat16() for k, v in small.state_dict().items()}, "l": {k: v.bfloat16() for k, v in large.state_dict().items()}}
    name = "model.embed_tokens.weight"
    expected = (0.3 * halves["s"][name].double() + 0.7 * halves["l"][name].double()).float().bfloat16()
    made = materialise(plan.tensors[name], lambda anchor, key: halves[anchor][key], tuple(expected.shape), torch.bfloat16)
    assert (made != expected).float().mean() < 0.01  # the sum in fp32 falls on the other side of a few ties; rounded parts would differ in a third


@pytest.mark.parametrize("seed", range(4))
def test_patch_puts_whole_blocks_back(family, seed):
    small, large, segment = pair(family, seed, small=(3, 32), large=(7, 32))
    held = [int(layer) for layer in segment.kept.layers]
    for depth in range(3, 8):
        shape = segment.small_shape.model_copy(update={"layers": depth})
        plan = patch_plan(segment, shape)
        made = live(plan, small, large)
        back = set(segment.order[: depth - 3])
        expected = []
        for place, layer in enumerate(held):
            first = 0 if place == 0 else layer
            stop = held[place + 1] if place + 1 < len(held) else 7
            block = [other for other in range(first, stop) if other == layer or other in back]
            expected += [("l", other) for other in block] if len(block) > 1 else [("s", place)]
        assert len(expected) == depth
        models = {"s": small.state_dict(), "l": large.state_dict()}
        for name, tensor in made.items():
            if not name.startswith(BLOCK[family]):
                assert tensor is dict(small.named_parameters())[name]
                continue
            place, suffix = name.removeprefix(BLOCK[family]).split(".", 1)
            anchor, layer = expected[int(place)]
            assert torch.equal(tensor, models[anchor][f"{BLOCK[family]}{layer}.{suffix}"])


def test_a_plan_runs_like_the_model_it_makes(family):
    """The shell with given parameters computes what a model with those weights computes; padding is respected."""
    small, large, segment = pair(family)
    shape = segment.small_shape.model_copy(update={"layers": 5, "ffn": 25})
    plan = blend_plan(segment, shape, Mix(alpha=0.5))
    from cbd_hub.shapes import config_for
    model = AutoModelForCausalLM.from_config(config_for(shape, large.config, list(plan.layers))).eval()
    model.load_state_dict(live(plan, small, large), strict=False)
    model.tie_weights()
    ids = torch.randint(4, 260, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    output = Between({"s": small, "l": large}).run(plan)(ids, mask, states=True)
    logits = output.hidden @ output.head.weight.T
    torch.testing.assert_close(logits[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()], rtol=1e-4, atol=1e-5)
    assert len(output.states) == 5


def test_gradients_reach_the_parts_of_an_in_between_model(family):
    small, large, segment = pair(family)
    large.requires_grad_(False)
    plan = blend_plan(segment, segment.small_shape.model_copy(update={"layers": 4, "ffn": 24}), Mix(alpha=0.25))
    output = Between({"s": small, "l": large}).run(plan)(torch.randint(4, 260, (2, 9)))
    output.hidden.square().sum().backward()
    assert all(parameter.grad is not None for parameter in small.base_model.parameters())
    assert all(parameter.grad is None for parameter in large.parameters())


def test_function_preserving_zero_padding(family):
    """At gain 0 and alpha 1 a bigger blend computes exactly what the smaller neighbour computes."""
    small, large, segment = pair(family)
    plan = blend_plan(segment, segment.large_shape.model_copy(update={"layers": 5}), Mix(alpha=1.0, layer_gain=0.0, neuron_gain=0.0))
    ids = torch.randint(4, 260, (2, 9))
    mine, theirs = Between({"s": small, "l": large}).run(plan)(ids).hidden, ModelRunner(small)(ids).hidden
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_road_runs_from_anchor_to_anchor():
    _, _, segment = pair("llama")
    low, high = segment.sizes
    assert (road_at(segment, low).alpha, road_at(segment, high).alpha) == (1.0, 0.0)
    assert road_at(segment, (low + high) // 2).alpha == pytest.approx(0.5, abs=1e-3)
    middle = RoadPoint(size=(low + high) // 2, layers=3, alpha=0.9, layer_gain=0.4)
    fitted = dataclasses.replace(segment, blend=Blend(road=[middle]))
    assert road_at(fitted, middle.size).alpha == 0.9
    assert road_at(fitted, high).layer_gain == 1.0
    assert road_at(fitted, low).layers == 3


def test_sizes_are_realised_within_half_a_percent(family):
    _, _, segment = pair(family, small=(3, 40), large=(9, 400))
    low, high = segment.sizes
    for size in range(low, high, (high - low) // 37):
        plan = segment_plan(segment, size)
        assert abs(plan.parameters - size) <= 0.005 * size
        assert 3 <= plan.shape.layers <= 9


def test_where_only_layers_move_a_distant_size_is_refused_with_the_nearest():
    _, _, segment = pair("llama", small=(2, 32), large=(4, 32))
    low, high = segment.sizes
    middle = (low + high) // 2
    assert segment_plan(segment, middle).parameters == middle
    with pytest.raises(SizeError, match=r"nearest have .*or raise tolerance"):
        segment_plan(segment, low + (middle - low) // 2)
    with pytest.raises(SizeError, match="parameters within 1e-07%; the nearest"):
        segment_plan(segment, middle + 1, tolerance=1e-9)
    assert segment_plan(segment, low + (middle - low) // 2 + 100, tolerance=0.5).parameters in (low, middle)


def test_exact_shapes():
    _, _, segment = pair("llama")
    plan = segment_plan(segment, 1, shape={"layers": 5, "ffn": 21})
    assert (plan.shape.layers, plan.shape.ffn) == (5, 21)
    with pytest.raises(ArgumentError, match=r"layers=9 is outside .* 3 to 6"):
        segment_plan(segment, 1, shape={"layers": 9, "ffn": 21})
    with pytest.raises(ArgumentError, match='no field "depth"'):
        segment_plan(segment, 1, shape={"depth": 3})
    with pytest.raises(ArgumentError, match="gives no ffn"):
        segment_plan(segment, 1, shape={"layers": 4})


@pytest.mark.parametrize(("options", "message"), [
    ({"strategy": "slerp"}, "choose one of auto, blend, patch"), ({"alpha": 1.5}, "outside 0 to 1"),
    ({"alpha": 0.5, "strategy": "patch"}, "no meaning"), ({"strategy": "patch"}, "differ in layers only"),
])
def test_options_that_cannot_be(options, message):
    _, _, segment = pair("llama")
    with pytest.raises(ArgumentError, match=message):
        segment_plan(segment, sum(segment.sizes) // 2, **options)


def test_a_map_that_does_not_fit_is_refused():
    shape = Shape(layers=2, hidden=8, heads=1, kv_heads=1, head_size=8, ffn=4, vocab=10)
    large = shape.model_copy(update={"layers": 3})
    good = Kept(np.array([0, 2]), np.tile(np.arange(4), (3, 1)))
    good.check(shape, large)
    for layers, ffn in (([0, 3], good.ffn), ([2, 0], good.ffn), ([0], good.ffn), ([0, 2], good.ffn[:2]), ([0, 2], np.zeros((3, 4), dtype=int))):
        with pytest.raises(ManifestError, match="kept"):
            Kept(np.array(layers), ffn).check(shape, large)


def test_even_maps_keep_both_ends():
    small = Shape(layers=4, hidden=8, heads=1, kv_heads=1, head_size=8, ffn=4, vocab=10)
    kept = Kept.even(small, small.model_copy(update={"layers": 10}))
    assert kept.layers.tolist() == [0, 3, 6, 9]
    kept.check(small, small.model_copy(update={"layers": 10}))
