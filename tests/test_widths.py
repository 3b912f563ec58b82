"""Heads and hidden width: cuts and blends against dense references built by hand, for both kinds of norm."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from cbd_hub import CBDModel, Chain, assemble_chain
from cbd_hub.cut import Cut, cut_model, cut_plan, measure_importance
from cbd_hub.errors import ArchitectureError, ArgumentError, CBDError, ManifestError
from cbd_hub.evaluation import Documents
from cbd_hub.interpolation.blend import blend_plan
from cbd_hub.interpolation.execute import combine, materialise
from cbd_hub.interpolation.live import Between, ModelRunner
from cbd_hub.interpolation.plan import Kept, Segment
from cbd_hub.interpolation.planner import segment_plan, shape_at
from cbd_hub.manifest import Blend, Mix, RoadPoint, Shape
from cbd_hub.measure import settled
from cbd_hub.shapes import check_legal, count, shape_between, shape_of
from cbd_hub.wishes import complete_shape


# Dimensions of every tensor: vocabulary, positions, hidden, query heads, kv heads, FFN, and GPT-2's three blocks of heads.
DIMS = {
    "llama": {
        "embed_tokens.weight": "VH", "lm_head.weight": "VH", "q_proj.weight": "QH", "k_proj.weight": "KH", "v_proj.weight": "KH", "o_proj.weight": "HQ",
        "gate_proj.weight": "FH", "up_proj.weight": "FH", "down_proj.weight": "HF", "layernorm.weight": "H", "model.norm.weight": "H",
        "q_proj.bias": "Q", "k_proj.bias": "K", "v_proj.bias": "K", "o_proj.bias": "H",
    },
    "gpt2": {
        "wte.weight": "VH", "wpe.weight": "PH", "lm_head.weight": "VH", "ln_1.weight": "H", "ln_1.bias": "H", "ln_2.weight": "H", "ln_2.bias": "H",
        "ln_f.weight": "H", "ln_f.bias": "H", "c_attn.weight": "HC", "c_attn.bias": "C", "attn.c_proj.weight": "QH", "attn.c_proj.bias": "H",
        "c_fc.weight": "HF", "c_fc.bias": "F", "mlp.c_proj.weight": "FH", "mlp.c_proj.bias": "H",
    },
}
WRITES = ("embed_tokens.weight", "wte.weight", "wpe.weight", "o_proj.weight", "o_proj.bias", "down_proj.weight", "attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")
NORM_WEIGHTS = ("layernorm.weight", "model.norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")
NORM_BIASES = ("ln_1.bias", "ln_2.bias", "ln_f.bias")
BLOCK = {"llama": "model.layers.", "gpt2": "transformer.h."}
SIZE = 8  # of a head


def model_of(family, shape, seed, **more):
    make = tiny.FAMILIES[family]
    if family == "llama":
        more = {"kv_heads": shape["kv_heads"], "head_dim": SIZE, **more}
    return make(layers=shape["layers"], hidden=shape["hidden"], heads=shape["heads"], ffn=shape["ffn"], seed=seed, **more)


LARGE = {
    "llama": {"layers": 4, "hidden": 48, "heads": 6, "kv_heads": 3, "ffn": 40},
    "gpt2": {"layers": 4, "hidden": 48, "heads": 6, "kv_heads": 6, "ffn": 40},
}
SMALL = {
    "llama": {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 24},
    "gpt2": {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 4, "ffn": 24},
}


def pair(family, seed=0, small=None, large=None, **more):
    big = model_of(family, large or LARGE[family], seed, **more)
    little = model_of(family, small or SMALL[family], seed + 1, **more)
    shapes = shape_of(little.config), shape_of(big.config)
    kept = tiny.random_kept(*shapes, seed)
    order = list(np.random.default_rng(seed).permutation(kept.dropped))
    return little, big, Segment("s", "l", *shapes, kept, order, big.config)


def shape_in(segment, family, layers, kv_heads, group, ffn, hidden):
    heads = kv_heads * group
    hidden = heads * SIZE if family == "gpt2" else max(heads * round(hidden / heads), heads * -(-segment.small_shape.hidden // heads))
    return segment.small_shape.model_copy(update={"layers": layers, "heads": heads, "kv_heads": kv_heads, "ffn": ffn, "hidden": hidden})


def rows_of(heads):
    return [head * SIZE + offset for head in heads for offset in range(SIZE)]


def places(axis, kept, layer, small, large, target):
    """For each entry of a target's dimension: its place in the larger one, and in the smaller one or None."""
    group_small, group_large, group = small.heads // small.kv_heads, large.heads // large.kv_heads, target.heads // target.kv_heads
    if axis == "H":
        return [(int(kept.hidden[i]), i if i < small.hidden else None) for i in range(target.hidden)]
    if axis == "F":
        return [(int(kept.ffn[layer][i]), i if i < small.ffn else None) for i in range(target.ffn)]
    if axis == "Q":
        found = []
        for g in range(target.kv_heads):
            for j in range(group):
                theirs, ours = int(kept.heads[layer][g * group_large + j]), g * group_small + j if g < small.kv_heads and j < group_small else None
                found += [(theirs * SIZE + o, None if ours is None else ours * SIZE + o) for o in range(SIZE)]
        return found
    if axis == "K":
        kv = [int(kept.heads[layer][g * group_large]) // group_large for g in range(target.kv_heads)]
        return [(kv[g] * SIZE + o, g * SIZE + o if g < small.kv_heads else None) for g in range(target.kv_heads) for o in range(SIZE)]
    if axis == "C":  # q, k, v one after the other
        one = places("Q", kept, layer, small, large, target)
        wide, narrow = large.heads * SIZE, small.heads * SIZE
        return [(block * wide + theirs, None if ours is None else block * narrow + ours) for block in range(3) for theirs, ours in one]
    size = {"V": target.vocab, "P": 256}[axis]
    return [(i, i) for i in range(size)]


def dense_blend(family, small, large, segment, shape, mix, replicate=False):
    """The documented rule, written out on dense float64 tensors: expand, mask, average."""
    a, b = ({k: v.double() for k, v in model.state_dict().items()} for model in (small, large))
    kept, held = segment.kept, [int(layer) for layer in segment.kept.layers]
    layers = sorted(held + [int(layer) for layer in segment.order[: shape.layers - len(held)]])
    made = {}
    for key in b:
        targets = [(key, key, key, 0, True)]
        if BLOCK[family] in key:
            layer, name = key.removeprefix(BLOCK[family]).split(".", 1)
            layer = int(layer)
            if layer not in layers:
                continue
            there = layer in held
            source = held.index(layer) if there else max([i for i, other in enumerate(held) if other < layer], default=0)
            targets = [(f"{BLOCK[family]}{layers.index(layer)}.{name}", f"{BLOCK[family]}{source}.{name}", key, layer, there or replicate)]
        (target, ours, theirs, layer, both), = targets
        axes = next(dims for suffix, dims in DIMS[family].items() if key.endswith(suffix))
        found = [places(axis, kept, layer, segment.small_shape, segment.large_shape, shape) for axis in axes]
        grid = np.ix_(*[[big for big, _ in place] for place in found])
        theirs = b[theirs][grid] * (np.sqrt(segment.large_shape.hidden / shape.hidden) if key.endswith(NORM_WEIGHTS) else 1.0)
        holds = np.ix_(*[[index for index, (_, little) in enumerate(place) if little is not None] for place in found])
        mask = torch.zeros(theirs.shape, dtype=torch.bool)
        mask[holds] = True
        expanded = torch.zeros_like(theirs)
        if both:
            ours = a[ours] * (np.sqrt(segment.small_shape.hidden / shape.hidden) if key.endswith(NORM_WEIGHTS) else 1.0)
            expanded[holds] = ours[np.ix_(*[[little for _, little in place if little is not None] for place in found])]
        mean_part = mix.alpha * expanded + (1 - mix.alpha) * theirs if both else theirs
        writes = key.endswith(WRITES) and key != "lm_head.weight"
        gain = torch.ones_like(theirs)
        for dim, (axis, place) in enumerate(zip(axes, found)):
            factor = {"H": mix.channel_gain, "F": mix.neuron_gain, "Q": mix.head_gain}.get(axis, 1.0) if writes else 1.0
            factor = mix.channel_gain if key.endswith(NORM_BIASES) and axis == "H" else factor
            factor = factor if both or axis == "H" else 1.0
            along = torch.tensor([1.0 if little is not None else factor for _, little in place], dtype=torch.float64)
            gain *= along.view([-1 if d == dim else 1 for d in range(len(axes))])
        value = torch.where(mask, mean_part, gain * theirs)
        if family == "gpt2" and writes:  # a new channel carries the mean of the shared ones
            dim, shared = axes.index("H"), segment.small_shape.hidden
            mean = value.narrow(dim, 0, shared).mean(dim, keepdim=True)
            value.narrow(dim, shared, shape.hidden - shared).add_((1 - mix.channel_gain) * mean)
        made[target] = value * (mix.layer_gain if writes and not both else 1.0)
    return made


def live(plan, small, large):
    parameters = {"s": dict(small.named_parameters()), "l": dict(large.named_parameters())}
    return {name: combine(terms, parameters) for name, terms in plan.tensors.items()}


numbers = st.sampled_from([0.0, 0.3, 0.8, 1.0])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_blend_is_the_dense_formula(family, data):
    """Every axis at once, at random shapes, mixes and maps, in float64."""
    tied = data.draw(st.booleans())
    more = {"tied": tied} if family == "llama" else {"tie_word_embeddings": tied}
    if family == "llama":
        more["attention_bias"] = data.draw(st.booleans())
    small, large, segment = pair(family, data.draw(st.integers(0, 5)), **more)
    small, large = small.double(), large.double()
    group = data.draw(st.integers(1, 2)) if family == "llama" else 1
    shape = shape_in(
        segment, family, data.draw(st.integers(2, 4)), data.draw(st.integers(SMALL[family]["kv_heads"], LARGE[family]["kv_heads"])), group,
        data.draw(st.integers(24, 40)), data.draw(st.integers(32, 48)),
    )
    mix = Mix(**{name: data.draw(numbers) for name in Mix.model_fields})
    replicate = data.draw(st.booleans())
    segment = dataclasses.replace(segment, blend=Blend(replicate=replicate))
    plan = blend_plan(segment, shape, mix)
    expected = dense_blend(family, small, large, segment, shape, mix, replicate)
    if tied:
        expected.pop("lm_head.weight", None)
    made = live(plan, small, large)
    assert made.keys() == expected.keys()
    states = {"s": small.state_dict(), "l": large.state_dict()}
    for name, tensor in made.items():
        torch.testing.assert_close(tensor.detach(), expected[name], rtol=1e-12, atol=1e-13, msg=name)
        lazy = materialise(plan.tensors[name], lambda anchor, key: states[anchor][key], tuple(tensor.shape), torch.float64)
        torch.testing.assert_close(lazy, tensor.detach(), rtol=1e-12, atol=1e-13)
    assert sum(tensor.numel() for tensor in made.values()) == plan.parameters == count(shape, segment.config)


def test_lazy_reading_in_chunks_of_every_size_gives_the_same(family, monkeypatch):
    """Rows read a few at a time, selections along several dimensions, and means of channels, in bf16."""
    small, large, segment = pair(family)
    shape = shape_in(segment, family, 3, SMALL[family]["kv_heads"] + 1, 1, 31, 40)
    plan = blend_plan(segment, shape, Mix(alpha=0.4, channel_gain=0.5, head_gain=0.7))
    states = {"s": small.bfloat16().state_dict(), "l": large.bfloat16().state_dict()}
    sizes = {name: tuple(tensor.shape) for name, tensor in live(plan, small, large).items()}
    for name, terms in plan.tensors.items():
        whole = materialise(terms, lambda anchor, key: states[anchor][key], sizes[name], torch.bfloat16)
        monkeypatch.setattr("cbd_hub.interpolation.execute._CHUNK_ELEMENTS", 150)
        assert torch.equal(materialise(terms, lambda anchor, key: states[anchor][key], sizes[name], torch.bfloat16), whole)
        monkeypatch.undo()


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_widening_preserves_the_function(family, data):
    """With alpha 1 and gains of 0 a deeper, wider model computes exactly what the smaller neighbour computes; eps included."""
    more = {"rms_norm_eps": 1e-3} if family == "llama" else {"layer_norm_epsilon": 1e-3}
    small, large, segment = pair(family, data.draw(st.integers(0, 5)), **more)
    kv_heads = data.draw(st.integers(SMALL[family]["kv_heads"], LARGE[family]["kv_heads"]))
    group = data.draw(st.integers(1, 2)) if family == "llama" else 1
    shape = shape_in(segment, family, data.draw(st.integers(2, 4)), kv_heads, group, data.draw(st.integers(24, 40)), data.draw(st.integers(32, 48)))
    plan = blend_plan(segment, shape, Mix(alpha=1.0, layer_gain=0.0, neuron_gain=0.0, head_gain=0.0, channel_gain=0.0))
    ids = torch.randint(4, 260, (2, 9))
    between = Between({"s": small.double(), "l": large.double()}).run(plan)(ids)
    plain = ModelRunner(small)(ids)
    torch.testing.assert_close(between.hidden @ between.head.weight.T, plain.hidden @ plain.head.weight.T, rtol=1e-5, atol=1e-6)  # RMSNorm itself works in fp32


def test_the_ends_of_a_blend_are_the_anchors(family):
    """At an anchor's shape with all weight on it the tensors are the anchor's own, and eps is untouched."""
    small, large, segment = pair(family)
    plan = blend_plan(segment, segment.small_shape, Mix(alpha=1.0))
    own = dict(small.named_parameters())
    assert all(tensor is own[name] for name, tensor in live(plan, small, large).items())
    assert plan.eps == 1.0
    assert blend_plan(segment, segment.large_shape, Mix(alpha=0.0)).eps == 1.0
    assert segment_plan(segment, segment.sizes[0]).strategy == segment_plan(segment, segment.sizes[1]).strategy == "anchor"


def documents():
    return Documents.packed(tiny.texts(30), tiny.tokenizer(), 32, 256)


def test_a_full_width_cut_is_the_model_bit_for_bit(family):
    model = model_of(family, LARGE[family], 0)
    importance = measure_importance(model, documents())
    shape = shape_of(model.config)
    same = cut_model(model, Cut.of(model, shape, importance, "t").plan)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in same.state_dict().items())
    fewer = cut_model(model, Cut.of(model, shape.model_copy(update={"layers": 2}), importance, "t").plan)
    assert torch.equal(fewer.get_input_embeddings().weight, model.get_input_embeddings().weight)


def sliced(family, model, shape, kept):
    """A cut by hand: a fresh model of the shape, filled by dense slicing."""
    whole = shape_of(model.config)
    config = type(model.config).from_dict(model.config.to_dict())
    names = {"llama": ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"), "gpt2": ("n_layer", "n_embd", "n_head", None, "n_inner")}
    for name, field in zip(names[family], ("layers", "hidden", "heads", "kv_heads", "ffn")):
        if name:
            setattr(config, name, getattr(shape, field))
    eps = {"llama": "rms_norm_eps", "gpt2": "layer_norm_epsilon"}[family]
    setattr(config, eps, getattr(config, eps) * whole.hidden / shape.hidden)
    made = AutoModelForCausalLM.from_config(config).eval()
    state = made.state_dict()
    for key, value in model.state_dict().items():
        layer, target = 0, key
        if BLOCK[family] in key:
            layer, name = key.removeprefix(BLOCK[family]).split(".", 1)
            layer = int(layer)
            if layer not in kept.layers:
                continue
            target = f"{BLOCK[family]}{list(kept.layers).index(layer)}.{name}"
        axes = next(dims for suffix, dims in DIMS[family].items() if key.endswith(suffix))
        grid = np.ix_(*[[big for big, _ in places(axis, kept, layer, shape, whole, shape)] for axis in axes])
        state[target].copy_(value[grid] * (np.sqrt(whole.hidden / shape.hidden) if key.endswith(NORM_WEIGHTS) else 1.0))
    return made


CUTS = {
    "llama": [{"hidden": 36, "heads": 6, "kv_heads": 3}, {"hidden": 40, "heads": 4, "kv_heads": 2, "layers": 3}, {"hidden": 48, "heads": 3, "kv_heads": 3}, {"hidden": 45, "heads": 1, "kv_heads": 1, "ffn": 17}],
    "gpt2": [{"hidden": 32, "heads": 4, "kv_heads": 4}, {"hidden": 8, "heads": 1, "kv_heads": 1, "ffn": 9, "layers": 2}],
}


@pytest.mark.parametrize(("model_family", "wish"), [(name, wish) for name, wishes in CUTS.items() for wish in wishes])
def test_a_cut_computes_what_slicing_by_hand_computes_and_loads_anywhere(model_family, wish, tmp_path):
    family = model_family
    model = model_of(family, LARGE[family], 0)
    shape = shape_of(model.config).model_copy(update=wish)
    importance = measure_importance(model, documents(), bf16=False)
    cut = Cut.of(model, shape, importance, "t")
    made = cut_model(model, cut.plan)
    full = written_out(cut.kept, shape_of(model.config))
    expected = sliced(family, model, shape, full)
    ids = torch.randint(4, 260, (2, 12))
    torch.testing.assert_close(made(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)
    made.save_pretrained(tmp_path / "cut")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert torch.equal(loaded(ids).logits, made(ids).logits)
    assert shape_of(loaded.config) == shape
    assert sum(p.numel() for p in loaded.parameters()) == count(shape, model.config)


@settings(max_examples=10, deadline=None)
@given(alpha=st.floats(0, 1), hidden=st.integers(32, 48), ffn=st.integers(24, 40), kv_heads=st.integers(1, 6))
def test_between_a_model_and_its_own_cut_lie_its_cuts(family, alpha, hidden, ffn, kv_heads):
    """Untrained anchors share every number: at any alpha the blend is the cut to that shape, and path training starts from it."""
    model = model_of(family, LARGE[family], 0).double()
    shape = shape_of(model.config).model_copy(update={**SMALL[family], "heads": SMALL[family]["kv_heads"]})
    importance = measure_importance(model.float(), documents(), bf16=False)
    cut = Cut.of(model.double(), shape, importance, "t")
    small = cut_model(model, cut.plan)
    segment = Segment("s", "l", shape, shape_of(model.config), cut.kept, importance.order(cut.kept), model.config)
    wide = max(min(kv_heads, LARGE[family]["kv_heads"]), SMALL[family]["kv_heads"])
    between = shape_in(segment, family, 3, wide, 1, ffn, hidden)
    made = live(blend_plan(segment, between, Mix(alpha=alpha)), small, model)
    direct = live(cut_plan("l", between, model, cut.kept, importance.order(cut.kept)[:1]), small, model)
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, direct[name], rtol=1e-6, atol=1e-9, msg=name)


def written_out(kept, large):
    """The same map with the identity written out."""
    heads = np.tile(np.arange(large.heads), (large.layers, 1)) if kept.heads is None else kept.heads
    return Kept(kept.layers, kept.ffn, heads, np.arange(large.hidden) if kept.hidden is None else kept.hidden)


def test_importance_of_heads_and_channels_is_its_definition(family):
    """Root mean square of what a head writes, through the output projection's columns; mean |x| after the norms, summed over them."""
    model = model_of(family, LARGE[family], 0)
    texts = documents()
    importance = measure_importance(model, texts, bf16=False)
    ids = torch.stack(texts.ids)
    layers = model.base_model.layers if family == "llama" else model.base_model.h
    output = layers[1].self_attn.o_proj if family == "llama" else layers[1].attn.c_proj
    norms = [m for name, m in model.named_modules() if name.endswith(("layernorm", "model.norm", "ln_1", "ln_2", "ln_f"))]
    caught, states = {}, []
    hooks = [output.register_forward_pre_hook(lambda module, inputs: caught.update(x=inputs[0])), *(m.register_forward_hook(lambda m, i, o: states.append(o)) for m in norms)]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    weight = (output.weight.T if family == "llama" else output.weight).detach()
    for head in range(6):
        rows = slice(head * SIZE, (head + 1) * SIZE)
        assert importance.heads[1, head] == pytest.approx(float((caught["x"][..., rows] @ weight[rows]).square().sum(-1).mean().sqrt()), rel=1e-4)
    assert len(states) == 9
    np.testing.assert_allclose(importance.hidden, sum(state.abs().mean((0, 1)) for state in states).numpy(), rtol=1e-4)


def permuted(family, model, seed):
    """The same function with heads, neurons and channels in another order, and the map that was applied."""
    shape = shape_of(model.config)
    kept = tiny.random_kept(shape, shape, seed)
    kept = dataclasses.replace(kept, layers=np.arange(shape.layers))
    return sliced(family, model, shape, kept), kept


def test_a_permuted_model_is_cut_to_the_same_units(family):
    """Importance follows the units: of a model with its heads, neurons and channels shuffled, the same ones are kept."""
    model = model_of(family, LARGE[family], 0)
    shuffled, applied = permuted(family, model, 7)
    ids = torch.randint(4, 260, (2, 12))
    torch.testing.assert_close(shuffled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    shape = shape_of(model.config).model_copy(update=CUTS[family][1 if family == "llama" else 0])
    first, second = (measure_importance(m, documents(), bf16=False).kept(shape) for m in (model, shuffled))
    assert np.array_equal(applied.hidden[second.hidden], first.hidden)
    assert np.array_equal(np.take_along_axis(applied.heads, second.heads, 1), first.heads)
    assert np.array_equal(first.layers, second.layers)
    cuts = [cut_model(m, cut_plan("t", shape, m, kept)) for m, kept in ((model, first), (shuffled, second))]
    torch.testing.assert_close(cuts[1](ids).logits, cuts[0](ids).logits, rtol=1e-4, atol=1e-5)


def test_query_heads_of_a_group_stay_together():
    """With grouped queries a group moves whole, the strongest group first, and within it the strongest heads come first."""
    model = model_of("llama", LARGE["llama"], 0)
    importance = measure_importance(model, documents())
    kept = importance.kept(shape_of(model.config).model_copy(update={"heads": 4, "kv_heads": 2}))
    for layer, order in enumerate(kept.heads):
        groups = order.reshape(3, 2) // 2
        assert (groups[:, 0] == groups[:, 1]).all()
        strength = importance.heads[layer][order].reshape(3, 2)
        assert np.all(np.diff(strength.sum(1)) <= 0)
        assert np.all(np.diff(strength, axis=1) <= 0)


@pytest.mark.parametrize(("family", "change", "message"), [
    ("llama", {"hidden": 44}, "multiple of heads .6.; the nearest are hidden=42 or 48"),
    ("llama", {"heads": 5}, r"5 heads do not share 3 kv_heads evenly; the nearest are heads=3 or 6"),
    ("gpt2", {"hidden": 44}, r"heads x head_size .6 x 8.; the nearest are hidden=40 with heads=5 or 48 with heads=6"),
    ("gpt2", {"heads": 5, "kv_heads": 5}, "heads x head_size .5 x 8."),
])
def test_an_illegal_width_names_the_nearest_legal_ones(family, change, message):
    model = model_of(family, LARGE[family], 0)
    shape = shape_of(model.config).model_copy(update=change)
    with pytest.raises(ArchitectureError, match=message):
        check_legal(shape, model.config)
    with pytest.raises(ArchitectureError, match=message):
        cut_plan("t", shape, model, Kept.even(shape, shape_of(model.config)))


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden": 54}, "hidden=54 cannot be cut from hidden=48"), ({"head_size": 4}, "head_size and vocab stay"),
    ({"heads": 6, "kv_heads": 2}, "asks for 3 query heads per kv head, and there are 2; the most are heads=4"),
])
def test_what_is_no_cut_is_said(change, message):
    model = model_of("llama", LARGE["llama"], 0)
    shape = shape_of(model.config).model_copy(update=change)
    with pytest.raises(ArgumentError, match=message):
        cut_plan("t", shape, model, Kept.even(shape, shape_of(model.config)))


GPT2 = {"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 12, "head_size": 64, "ffn": 3072, "vocab": 50257}


def test_published_shapes_follow_from_layers_and_hidden_width():
    """The paper's targets between GPT-2 B, M and L, with its counts (Table 8)."""
    from transformers import GPT2Config
    sizes = [Shape(**{**GPT2, "layers": n, "hidden": 64 * h, "heads": h, "kv_heads": h, "ffn": 256 * h}) for n, h in ((12, 12), (24, 16), (36, 20))]
    config = GPT2Config()
    for segment, wish, millions in ((0, {"layers": 14, "hidden": 768}, 138.6), (0, {"layers": 18, "hidden": 896}, 219.6), (0, {"layers": 24, "hidden": 896}, 277.4), (1, {"layers": 26, "hidden": 1024}, 380.0), (1, {"layers": 30, "heads": 18}, 537.3)):
        shape = complete_shape(wish, sizes[segment], sizes[segment + 1], config)
        assert count(shape, config) / 1e6 == pytest.approx(millions, abs=0.051)
        assert shape.ffn == 4 * shape.hidden == 256 * shape.heads


GROUPS = {"hidden": 72, "head_dim": 8, "ffn": 24}


@pytest.mark.parametrize(("wish", "message"), [
    ({"heads": 12, "kv_heads": 2}, "heads=12 with kv_heads=2: the neighbours have 2 to 3 query heads per kv head; choose heads=4 or 6, or other kv_heads"),
    ({"heads": 4, "kv_heads": 4}, "choose heads=8 or 12"), ({"heads": 8, "kv_heads": 3}, "choose heads=6 or 9"), ({"heads": 9, "kv_heads": 4}, "choose heads=8 or 12"),
])
def test_groups_that_neither_neighbour_could_hold_are_refused(wish, message):
    """Their heads would be taken from foreign groups."""
    small, large = (tiny.llama(layers=layers, heads=heads, kv_heads=kv, **GROUPS) for layers, heads, kv in ((2, 4, 2), (3, 12, 4)))
    with pytest.raises(ArgumentError, match=message):
        complete_shape({"layers": 3, **wish}, shape_of(small.config), shape_of(large.config), large.config)


@pytest.mark.parametrize(("shape", "message"), [
    ({"layers": 3, "heads": 12, "kv_heads": 2}, "heads=12 with kv_heads=2: the neighbours have 2 to 3"), ({"layers": 9}, "lies in no segment of chain, which has .*; choose one inside"),
])
def test_a_chain_of_many_segments_says_what_is_wrong_with_a_shape(tmp_path, shape, message):
    sizes = ((2, 4, 2), (3, 12, 4), (4, 12, 4))
    anchors = [tiny.save(tiny.llama(layers=layers, heads=heads, kv_heads=kv, **GROUPS), tmp_path / str(layers)) for layers, heads, kv in sizes]
    chain = assemble_chain(anchors, tmp_path / "chain", align=False)
    with pytest.raises(ArgumentError, match=message):
        chain.plan(shape=shape)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (6, 3), (9, 3), (8, 4)])
@pytest.mark.parametrize("ordered", [False, True])
def test_between_unlike_groups_every_head_comes_from_its_own_group(heads, kv_heads, ordered):
    models = {
        "small": tiny.llama(layers=2, heads=4, kv_heads=2, seed=1, **GROUPS), "large": tiny.llama(layers=3, heads=12, kv_heads=4, seed=2, **GROUPS),
    }
    small, large = (shape_of(model.config) for model in models.values())
    kept = Kept.even(small, large)
    if ordered:
        kept = dataclasses.replace(kept, heads=tiny.random_kept(small, large, 3).heads)
    segment = Segment("small", "large", small, large, kept, kept.dropped[::-1], models["large"].config)
    shape = complete_shape({"layers": 3, "heads": heads, "kv_heads": kv_heads}, small, large, segment.config)
    group, order = heads // kv_heads, np.arange(12) if kept.heads is None else kept.heads[0]
    chosen = order.reshape(4, 3)[:kv_heads, :group]
    for alpha, model, q, kv in ((0.0, models["large"], chosen.ravel(), chosen[:, 0] // 3), (1.0, models["small"], np.arange(4).reshape(2, 2)[:, :group].ravel(), np.arange(2))):
        plan, live = blend_plan(segment, shape, Mix(alpha=alpha)), {name: dict(each.named_parameters()) for name, each in models.items()}
        for role, wanted, per in (("q", q, group), ("k", kv, 1), ("v", kv, 1)):
            name = f"model.layers.0.self_attn.{role}_proj.weight"
            made = combine(plan.tensors[name], live).unflatten(0, (kv_heads, per, 8))
            if alpha:
                made = made[:2, :2]
            theirs = model.get_parameter(name).unflatten(0, (-1, 8))[torch.from_numpy(wanted)]
            torch.testing.assert_close(made.flatten(0, 1), theirs)


def big(family):
    from transformers import GPT2Config, LlamaConfig
    if family == "gpt2":
        small = Shape(**GPT2)
        return small, small.model_copy(update={"layers": 24, "hidden": 1024, "heads": 16, "kv_heads": 16, "ffn": 4096}), GPT2Config()
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    large = shape_of(config)
    return large.model_copy(update={"layers": 24, "hidden": 450, "heads": 6, "kv_heads": 2, "ffn": 1024}), large, config


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1), moves=st.sets(st.sampled_from(["layers", "hidden", "ffn"]), min_size=1))
def test_every_size_is_realised_on_the_path(family, share, moves):
    """Whatever moves: within 0.5% where the FFN does, else the nearest there is; only legal shapes between the ends."""
    small, large, config = big(family)
    small = large.model_copy(update={name: getattr(small, name) for name in moves | ({"heads", "kv_heads"} if "hidden" in moves else set())})
    low, high = count(small, config), count(large, config)
    size = round(low + share * (high - low))
    shape = shape_between(size, small, large, config)
    check_legal(shape, config)
    assert complete_shape(shape, small, large, config) == shape
    error = abs(count(shape, config) / size - 1)
    if "ffn" in moves:
        assert error <= 0.005
    elif family == "llama" and "hidden" in moves:
        assert error <= 0.01
    assert shape_between(low, small, large, config) == small
    assert shape_between(high, small, large, config) == large


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1), layers=st.integers(0, 3))
def test_a_size_that_came_out_comes_out_again(family, share, layers):
    """Where the FFN fills the rest, the size of a shape is the shape's; a point of the road keeps its shape whatever moves."""
    small, large, config = big(family)
    point = RoadPoint(size=round(count(small, config) + share * (count(large, config) - count(small, config))), layers=small.layers + layers, hidden=large.hidden, alpha=0.5)
    segment = Segment("s", "l", small, large, tiny.random_kept(small, large, 0), [], config)
    own = settled(segment, point)
    assert own.size == count(shape_at(segment, own), config)
    assert abs(own.size - point.size) <= 0.02 * point.size
    narrow = large.model_copy(update={"ffn": small.ffn})
    size = round(count(narrow, config) + share * (count(large, config) - count(narrow, config)))
    shape = shape_between(size, narrow, large, config)
    assert shape_between(count(shape, config), narrow, large, config) == shape
    plain = small.model_copy(update={"ffn": large.ffn})
    size = round(count(plain, config) + share * (count(large, config) - count(plain, config)))
    shape = shape_between(size, plain, large, config)
    assert shape_between(count(shape, config), plain, large, config) == shape


def test_a_point_between_two_shapes_that_are_equally_good_is_one_of_them():
    small, large, config = big("llama")
    small = large.model_copy(update={"hidden": small.hidden, "heads": small.heads, "kv_heads": small.kv_heads, "ffn": 768})
    segment = Segment("s", "l", small, large, tiny.random_kept(small, large, 0), [], config)
    low, high = segment.sizes
    for size in range(low + 1, high, (high - low) // 200):
        own = settled(segment, RoadPoint(size=size, layers=30, hidden=520, alpha=0.5))
        assert own.size == count(shape_at(segment, own), config)


def test_along_the_path_no_axis_goes_back_more_than_a_step(family):
    """Every axis rises with the size; where another one steps up it may give back one step."""
    small, large, config = big(family)
    low, high = count(small, config), count(large, config)
    shapes = [shape_between(size, small, large, config) for size in range(low, high, (high - low) // 40)]
    for axis, step in (("layers", 1), ("hidden", 64 if family == "gpt2" else 18), ("heads", 1)):
        values = [getattr(shape, axis) for shape in shapes]
        assert np.polyfit(range(len(values)), values, 1)[0] > 0
        assert max(first - second for first, second in zip(values, values[1:])) <= step


def test_planning_takes_no_time(family):
    import time
    small, large, config = big(family)
    kept = tiny.random_kept(small, large, 0)
    segment = Segment("s", "l", small, large, kept, kept.dropped, config)
    size = sum(segment.sizes) // 2
    times = []
    for _ in range(5):  # what else this process does, such as collecting garbage, comes on top
        started = time.process_time()
        plan = segment_plan(segment, size)
        times.append(time.process_time() - started)
    assert min(times) < 0.3
    assert plan.shape not in (small, large)


@pytest.mark.parametrize(("name", "value"), [
    ("heads", np.zeros((4, 6), dtype=int)), ("heads", np.arange(6)), ("heads", np.tile([0, 2, 1, 3, 4, 5], (4, 1))), ("heads", np.tile(np.arange(6), (4, 1)) - 1),
    ("hidden", np.arange(47)), ("hidden", np.arange(48)[None]), ("hidden", np.full(48, 2**40)), ("hidden", np.arange(48) - 1),
])
def test_hostile_maps_are_refused(name, value):
    small, large = (Shape(**{**shapes["llama"], "head_size": SIZE, "vocab": 260}) for shapes in (SMALL, LARGE))
    kept = tiny.random_kept(small, large, 0)
    kept.check(small, large)
    with pytest.raises(ManifestError, match="kept h"):
        dataclasses.replace(kept, **{name: value}).check(small, large)


@pytest.mark.parametrize("change", [{"hidden": 54}, {"kv_heads": 4}, {"head_size": 16}, {"vocab": 300}, {"heads": 6, "kv_heads": 2}])
def test_anchors_that_no_map_can_join_are_refused(change):
    small, large = (Shape(**{**shapes["llama"], "head_size": SIZE, "vocab": 260}) for shapes in (SMALL, LARGE))
    with pytest.raises(ManifestError, match="nothing can be interpolated"):
        tiny.random_kept(small, large, 0).check(small.model_copy(update=change), large)


RECIPES = {
    "llama": [{"hidden": 24, "heads": 2, "ffn": 32}, {"layers": 2, "kv_heads": 1, "heads": 1, "hidden": 17}],
    "gpt2": [{"hidden": 24, "ffn": 32}, {"layers": 2, "heads": 2}],
}


@pytest.fixture(scope="module")
def wide_chain(family, tmp_path_factory):
    """A chain whose segments move heads, hidden width, FFN and layers, trained on the path."""
    from conftest import recipe

    from cbd_hub import distill_chain
    folder = tmp_path_factory.mktemp(f"wide-{family}")
    distill_chain(recipe(folder, family, RECIPES[family], stage={"path_fraction": 0.5}), folder / "chain")
    return folder / "chain"


def test_a_recipe_can_name_widths_and_every_size_between_loads(wide_chain, family, tmp_path):
    chain = Chain.from_pretrained(wide_chain)
    shapes = [anchor.shape for anchor in chain.anchors]
    assert [shape.hidden for shape in shapes] == ([32, 24, 17] if family == "llama" else [32, 24, 16])
    assert [shape.heads for shape in shapes] == ([4, 2, 1] if family == "llama" else [4, 3, 2])
    assert [shape.kv_heads for shape in shapes] == ([2, 1, 1] if family == "llama" else [4, 3, 2])
    ids = torch.randint(4, 260, (1, 9))
    for small, large in zip(chain.anchors[1:], chain.anchors):
        link = chain.manifest.link(small, large)
        assert link.curve
        assert "kept.hidden" in load_file(wide_chain / small.maps.path)
        for size in np.linspace(small.parameters, large.parameters, 7).astype(int).tolist():
            plan = chain.plan(size, tolerance=0.2)
            model = chain.model(size, tolerance=0.2)
            assert shape_of(model.config) == plan.shape
            assert sum(p.numel() for p in model.parameters()) == plan.parameters
            assert model(ids).logits.isfinite().all()
    middle = sum(anchor.parameters for anchor in chain.anchors[:2]) // 2
    plan = CBDModel.materialize(wide_chain, middle, output_dir=tmp_path / "made", tolerance=0.2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert torch.equal(loaded(ids).logits, chain.model(middle, tolerance=0.2)(ids).logits)
    assert shape_of(loaded.config) == plan.shape


def test_a_plan_of_a_wide_segment_runs_like_the_model_it_makes(wide_chain):
    """Path training, measuring and from_chain are one: the live plan and the loaded model give the same logits."""
    chain = Chain.from_pretrained(wide_chain)
    small, large = chain.anchors[1].parameters, chain.anchors[0].parameters
    size = (2 * small + large) // 3
    plan = chain.plan(size, tolerance=0.2)
    models = {anchor.name: chain.model(anchor.parameters) for anchor in chain.anchors[:2]}
    ids = torch.randint(4, 260, (2, 9))
    output = Between(models).run(plan)(ids)
    made = chain.model(size, tolerance=0.2)
    torch.testing.assert_close(output.hidden @ output.head.weight.T, made(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_command_works_on_widths(cbd, wide_chain, tmp_path):
    chain = Chain.from_pretrained(wide_chain)
    size = (chain.anchors[0].parameters + chain.anchors[1].parameters) // 2
    (tmp_path / "held.txt").write_text("\n\n".join(tiny.texts(10, seed=9)))
    assert cbd("show", wide_chain)[0] == 0
    for arguments in (
        ["plan", wide_chain], ["make", wide_chain, "--out", tmp_path / "m"], ["generate", wide_chain, "the small", "--max-new-tokens", "2"],
    ):
        code, _, errors = cbd(*arguments, "--size", size, "--tolerance", "0.2")
        assert code == 0, errors
    code, printed, errors = cbd("eval", wide_chain, "--sizes", chain.anchors[1].parameters, "--text", tmp_path / "held.txt")
    assert code == 0, errors
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").num_parameters() == chain.plan(size, tolerance=0.2).parameters


def test_maps_without_heads_and_channels_are_the_identity(wide_chain, tmp_path):
    """A map as older versions wrote it still loads: coordinates by index."""
    import hashlib
    import json
    import shutil
    shutil.copytree(wide_chain, tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "chain.json").read_text())
    record = manifest["anchors"][1]["maps"]
    path = tmp_path / "old" / record["path"]
    save_file({name: array for name, array in load_file(path).items() if name in ("kept.layers", "kept.ffn")}, path)
    record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "old" / "chain.json").write_text(json.dumps(manifest))
    chain = Chain.from_pretrained(tmp_path / "old")
    size = (chain.anchors[0].parameters + chain.anchors[1].parameters) // 2
    plan = chain.plan(size, tolerance=0.2)
    takes = [take for name in plan.tensors if name.endswith(("norm.weight", "ln_f.weight")) for term in plan.tensors[name] for take in term.takes]
    assert takes
    assert all(take.run is not None for take in takes)
    assert chain.model(size, tolerance=0.2).num_parameters() == plan.parameters
    save_file({"kept.layers": np.arange(4, dtype=np.float32), "kept.ffn": np.zeros((4, 48), dtype=np.int32)}, path)
    record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "old" / "chain.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="no integers"):
        Chain.from_pretrained(tmp_path / "old").plan(size, tolerance=0.2)


def test_published_checkpoints_of_unequal_width_make_a_chain(family, tmp_path):
    """The paper's way with its shapes: nothing shared but the index."""
    folders = [tiny.save(model_of(family, shapes[family], seed), tmp_path / str(seed)) for seed, shapes in enumerate((LARGE, SMALL))]
    chain = assemble_chain(folders, tmp_path / "chain")
    wish = {"layers": 3, "hidden": 40} if family == "gpt2" else {"layers": 3, "hidden": 40, "heads": 4, "kv_heads": 2, "ffn": 30}
    model = chain.model(shape={"ffn": 30, **wish}, alpha=0.3)
    assert shape_of(model.config).hidden == 40


@pytest.mark.parametrize(("family", "wish", "message"), [
    ("llama", {"hidden": 30}, "nearest are hidden=28 or 32"), ("llama", {"heads": 3}, "3 heads do not share"), ("gpt2", {"hidden": 20}, "nearest are hidden=16"),
    ("llama", {"hidden": 40}, "hidden=40 cannot be cut from hidden=32"), ("llama", {"head_size": 4}, "head_size=4 cannot be cut"),
])
def test_a_recipe_that_names_what_cannot_be_cut_is_refused(family, wish, message, tmp_path):
    from conftest import recipe

    from cbd_hub import distill_chain
    with pytest.raises(CBDError, match=message):
        distill_chain(recipe(tmp_path, family, [wish]), tmp_path / "chain")
    assert not (tmp_path / "chain").exists()
