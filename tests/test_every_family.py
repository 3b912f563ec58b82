"""Every family alike: what a table says is tested by what the models compute, not by the table."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cbd_hub import Chain, assemble_chain
from cbd_hub.cut import cut_model, cut_plan, measure_importance
from cbd_hub.errors import ManifestError
from cbd_hub.evaluation import Documents
from cbd_hub.families import family_of
from cbd_hub.interpolation.blend import blend_plan
from cbd_hub.interpolation.execute import combine, materialise
from cbd_hub.interpolation.live import Between, ModelRunner
from cbd_hub.interpolation.plan import Kept, Segment, layer_types
from cbd_hub.manifest import Blend, Mix
from cbd_hub.shapes import count, shape_between, shape_of


SIZE = 8  # of a head
NO_GAIN = Mix(alpha=1.0, layer_gain=0.0, neuron_gain=0.0, head_gain=0.0, channel_gain=0.0)


def model_of(name, layers, hidden, heads, kv_heads, ffn, seed, **more):
    """A tiny model; families without grouped queries, or whose width is heads x head size, take what fits them."""
    if name in ("gpt2", "gpt_neox", "opt"):
        more = {"tie_word_embeddings": more.pop("tied")} if name == "gpt2" and "tied" in more else more
        return tiny.EVERY[name](layers=layers, hidden=hidden, heads=hidden // SIZE, ffn=ffn, seed=seed, **more)
    return tiny.EVERY[name](layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, seed=seed, head_dim=SIZE, **more)


def pair(name, seed=0, **more):
    """Two models of unequal width and depth, and a random map between them that joins layers of one type."""
    large = model_of(name, 4, 48, 6, 3, 40, seed, **more)
    kept = tiny.random_kept(shape_of(large.config).model_copy(update={"layers": 2}), shape_of(large.config), seed)
    if getattr(large.config, "layer_types", None):
        more["layer_types"] = [large.config.layer_types[layer] for layer in kept.layers]
    small = model_of(name, 2, 32, 2, 2, 24, seed + 1, **more)
    kept.check(shape_of(small.config), shape_of(large.config))
    kept.check_types(*layer_types(small.config, large.config))
    order = list(np.random.default_rng(seed).permutation(kept.dropped))
    return small, large, Segment("s", "l", shape_of(small.config), shape_of(large.config), kept, order, large.config, Blend())


def shape_in(name, segment, layers, kv_heads, group, ffn, hidden):
    if family_of(segment.config).hidden_is_heads:
        heads = kv_heads = hidden // SIZE
        hidden = heads * SIZE
    else:
        heads = kv_heads * group
        hidden = max(heads * round(hidden / heads), heads * -(-segment.small_shape.hidden // heads))
    return segment.small_shape.model_copy(update={"layers": layers, "heads": heads, "kv_heads": kv_heads, "ffn": ffn, "hidden": hidden})


def made(plan, small, large):
    """The plan's model, an ordinary one: loaded from checkpoint keys."""
    family = family_of(large.config)
    parameters = {"s": family.parameters(small), "l": family.parameters(large)}
    state = {name: combine(terms, parameters).detach().clone() for name, terms in plan.tensors.items()}
    return type(large).from_pretrained(None, config=plan.config(large.config), state_dict=state, dtype=large.dtype).eval()


def logits(output):
    return output.hidden @ output.head.weight.T


def eps(name):
    """A large eps, so that a wrong one is seen; OPT's is fixed."""
    field = family_of(tiny.EVERY[name]().config).norm_eps
    return {} if field is None else {field: 1e-3}


IDS = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(0))


def documents():
    return Documents.packed(tiny.texts(30), tiny.tokenizer(), 32, 256)


@pytest.mark.parametrize("tied", [True, False])
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_widening_preserves_the_function(every, tied, data):
    """A deeper, wider model whose new units write nothing computes what the smaller neighbour computes, run live and loaded by transformers."""
    check_widening(
        every, tied, data.draw(st.integers(0, 5)), data.draw(st.integers(2, 4)), data.draw(st.integers(2, 3)), data.draw(st.integers(1, 2)),
        data.draw(st.integers(24, 40)), data.draw(st.integers(32, 48)),
    )


def check_widening(name, tied, seed, layers, kv_heads, group, ffn, hidden):
    small, large, segment = pair(name, seed, tied=tied, **eps(name))
    plan = blend_plan(segment, shape_in(name, segment, layers, kv_heads, group, ffn, hidden), NO_GAIN)
    expected = small(IDS).logits
    torch.testing.assert_close(logits(Between({"s": small, "l": large}).run(plan)(IDS)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made(plan, small, large)(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_importance_finds_what_writes_nothing_and_its_cut_preserves_the_function(every):
    """A widened model is cut back by what is measured on it: layers, neurons, heads and channels that do nothing go first."""
    small, large, segment = pair(every, 3, **eps(every))
    wide = made(blend_plan(segment, segment.large_shape, NO_GAIN), small, large)
    importance = measure_importance(wide, documents(), bf16=False)
    kept = importance.kept(segment.small_shape)
    assert np.array_equal(kept.layers, segment.kept.layers)
    back = cut_model(wide, cut_plan("l", segment.small_shape, wide, kept)).eval()
    assert shape_of(back.config) == segment.small_shape
    torch.testing.assert_close(back(IDS).logits, small(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_permuted_copy_computes_the_same(every):
    """Heads by whole groups, neurons and channels in another order: whole in every tensor, fused or not."""
    model = model_of(every, 3, 48, 6, 3, 40, 0)
    shape = shape_of(model.config)
    kept = tiny.random_kept(shape, shape, 1)
    copy = cut_model(model, cut_plan("l", shape, model, kept)).eval()
    assert not torch.equal(copy.get_input_embeddings().weight, model.get_input_embeddings().weight)
    torch.testing.assert_close(copy(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_the_ends_of_a_blend_are_the_anchors(every):
    small, large, segment = pair(every)
    family = family_of(large.config)
    parameters = {"s": family.parameters(small), "l": family.parameters(large)}
    plan = blend_plan(segment, segment.small_shape, Mix(alpha=1.0))
    assert plan.eps == 1.0
    assert all(combine(terms, parameters) is parameters["s"][name] for name, terms in plan.tensors.items())
    even = Kept.even(segment.small_shape, segment.large_shape, layer_types(small.config, large.config))
    plan = blend_plan(replace(segment, kept=even, order=even.dropped), segment.large_shape, Mix(alpha=0.0))
    assert plan.eps == 1.0
    assert all(combine(terms, parameters) is parameters["l"][name] for name, terms in plan.tensors.items())


@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_a_blend_is_an_ordinary_model(every, tmp_path_factory, data):
    """Saved and loaded by plain transformers it computes what the live plan computes; its size is the planned one; lazy and live tensors agree."""
    small, large, segment = pair(every, data.draw(st.integers(0, 5)))
    shape = shape_in(every, segment, data.draw(st.integers(2, 4)), data.draw(st.integers(2, 3)), 1, 31, data.draw(st.integers(32, 48)))
    gain = st.sampled_from([0.0, 0.4, 1.0])
    mix = Mix(**{name: data.draw(gain) for name in Mix.model_fields})
    plan = blend_plan(segment, shape, mix)
    between = Between({"s": small, "l": large})
    live = logits(between.run(plan)(IDS))
    folder = tmp_path_factory.mktemp("made")
    made(plan, small, large).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(loaded(IDS).logits, live, rtol=1e-4, atol=1e-4)
    assert shape_of(loaded.config) == shape
    assert sum(p.numel() for p in loaded.parameters()) == plan.parameters == count(shape, large.config)
    family = family_of(large.config)
    parameters = {"s": family.parameters(small), "l": family.parameters(large)}
    for terms in plan.tensors.values():
        value = combine(terms, parameters).detach()
        lazy = materialise(terms, lambda anchor, key: parameters[anchor][key].detach(), tuple(value.shape), torch.float32)
        torch.testing.assert_close(lazy, value, rtol=1e-5, atol=1e-6)


def test_a_cut_to_a_smaller_shape_is_an_ordinary_model(every, tmp_path):
    model = model_of(every, 4, 48, 6, 3, 40, 0)
    importance = measure_importance(model, documents())
    whole = shape_of(model.config)
    segment = Segment("", "l", whole.model_copy(update={"hidden": 24, "heads": 1, "kv_heads": 1}), whole, None, [], model.config)
    shape = shape_in(every, segment, 3, 2, 2, 17, 32)
    cut = cut_model(model, cut_plan("l", shape, model, importance.kept(shape)))
    cut.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert shape_of(loaded.config) == shape
    assert torch.equal(loaded(IDS).logits, cut.eval()(IDS).logits)
    assert loaded(IDS).logits.isfinite().all()


def test_gradients_reach_every_parameter_of_both_anchors(every):
    small, large, segment = pair(every)
    output = Between({"s": small, "l": large}).run(blend_plan(segment, segment.large_shape, Mix(alpha=0.5)))(IDS)
    logits(output).square().sum().backward()
    for model in (small, large):
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_states_of_a_live_plan_are_those_of_the_model_it_makes(every):
    """Each block has its own type's mask and positions, beyond the sliding window and under padding."""
    small, large, segment = pair(every)
    plan = blend_plan(segment, segment.large_shape.model_copy(update={"layers": 3}), Mix(alpha=0.5))
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0
    live = Between({"s": small, "l": large}).run(plan)(IDS, mask, states=True)
    model = made(plan, small, large)
    states = []
    for block in model.get_submodule(family_of(model.config).blocks):
        block.register_forward_hook(lambda _, __, output: states.append(output[0] if isinstance(output, tuple) else output))
    whole = ModelRunner(model)(IDS, mask, states=True)
    assert len(live.states) == len(whole.states) == len(states) == 3
    states[-1] = whole.hidden  # the last one is after the final norm
    for first, second, third in zip(live.states, whole.states, states):
        torch.testing.assert_close(first[mask.bool()], second[mask.bool()], rtol=1e-4, atol=1e-4)
        assert torch.equal(second, third)


def test_norms_that_add_one_are_blended_as_what_they_multiply_by():
    """1 + w is averaged and rescaled, not w; on channels that only the larger anchor holds it is the larger one's."""
    small, large, segment = pair("gemma3_text")
    shape = segment.large_shape.model_copy(update={"hidden": 42})
    plan = blend_plan(segment, shape, Mix(alpha=0.3))
    parameters = {"s": dict(small.named_parameters()), "l": dict(large.named_parameters())}
    layer = int(segment.kept.layers[1])
    value = combine(plan.tensors[f"model.layers.{layer}.input_layernorm.weight"], parameters)
    ours = 1 + parameters["s"]["model.layers.1.input_layernorm.weight"]
    theirs = 1 + parameters["l"][f"model.layers.{layer}.input_layernorm.weight"][torch.from_numpy(segment.kept.hidden[:42])]
    expected = (48 / 42) ** 0.5 * theirs
    expected[:32] = 0.3 * (32 / 42) ** 0.5 * ours + 0.7 * expected[:32]
    torch.testing.assert_close(1 + value, expected)


@pytest.mark.parametrize("gain", [0.5, 0.0])
def test_the_gain_of_a_new_layer_is_on_what_leaves_it(every, gain):
    """Halved, a new layer adds half of what it adds, be there a norm behind attention and FFN or not."""
    _, large, segment = pair(every)
    one = segment.large_shape
    new = next(layer for layer in range(one.layers) if layer not in segment.kept.layers)
    plans = [blend_plan(replace(segment, small_shape=one.model_copy(update={"layers": 2})), one, Mix(alpha=0.0, layer_gain=value)) for value in (1.0, gain)]
    full, scaled = (made(plan, large, large) for plan in plans)
    added = []
    for model in (full, scaled):
        block = model.get_submodule(family_of(model.config).blocks)[new]
        caught = []
        inner = block.get_submodule((family_of(model.config).post_norms or [family_of(model.config).heads_input])[0])
        inner.register_forward_hook(lambda _, __, output, caught=caught: caught.append(output))
        model.get_submodule(family_of(model.config).blocks)[new].register_forward_pre_hook(
            lambda _, inputs, caught=caught: (torch.linspace(-1, 1, inputs[0].numel()).view_as(inputs[0]), *inputs[1:])
        )
        model(IDS)
        added.append(caught[0])
    torch.testing.assert_close(added[1], gain * added[0], rtol=1e-4, atol=1e-5)


def stack(types, **more):
    return tiny.gemma3(layers=len(types), layer_types=[f"{name}_attention" for name in types], **more)


S, F = "sliding", "full"


@pytest.mark.parametrize(("small", "large", "layers"), [
    ((S, F), (S, S, F, S), [0, 2]), ((S, S, F), (S, S, F, S, S, F), [0, 3, 5]), ((F, S), (S, F, S, S), [1, 3]), ((S, F, S), (S, S, F, S, S, F, S), [0, 2, 6]),
])
def test_layers_are_matched_to_layers_of_their_type(small, large, layers):
    one, two = (stack(types).config for types in (small, large))
    kept = Kept.even(shape_of(one), shape_of(two), layer_types(one, two))
    assert kept.layers.tolist() == layers
    kept.check_types(*layer_types(one, two))


def test_layers_that_cannot_be_matched_are_refused():
    one, two = stack((F, S)).config, stack((S, S, F)).config
    with pytest.raises(ManifestError, match=r"do not follow each other so in the 3 of the larger one"):
        Kept.even(shape_of(one), shape_of(two), layer_types(one, two))
    plain = Kept.even(shape_of(one), shape_of(two))
    with pytest.raises(ManifestError, match=r"layer 0 of the smaller anchor .full_attention. stands for layer 0 of the larger one .sliding_attention."):
        plain.check_types(*layer_types(one, two))


def test_a_replicated_layer_is_of_the_same_type():
    """A new full layer is averaged with the smaller anchor's full one, though a sliding one stands before it."""
    small, large = stack((F, S), seed=1), stack((F, S, S, F))
    kept = Kept(np.array([0, 1]), np.tile(np.arange(48), (4, 1)))
    segment = Segment("s", "l", shape_of(small.config), shape_of(large.config), kept, [3, 2], large.config, Blend(replicate=True))
    plan = blend_plan(segment, segment.large_shape, Mix(alpha=0.5))
    name = "model.layers.{}.mlp.up_proj.weight"
    assert [term.tensor for term in plan.tensors[name.format(3)]] == [name.format(0), name.format(3)]
    assert [term.tensor for term in plan.tensors[name.format(2)]] == [name.format(1), name.format(2)]


def test_assembled_anchors_of_mixed_stacks_match_types(tmp_path):
    folders = [tiny.save(stack(types, seed=seed), tmp_path / str(seed)) for seed, types in enumerate(((S, S, F, S, S, F), (S, S, F)))]
    chain = assemble_chain(folders, tmp_path / "chain")
    large, small = chain.anchors
    model = chain.model(shape={"layers": 5}, strategy="blend")
    assert model.config.layer_types == [large_type for layer, large_type in enumerate(stack((S, S, F, S, S, F)).config.layer_types) if layer in chain.plan(shape={"layers": 5}, strategy="blend").layers]
    assert torch.equal(chain.model(small.parameters)(IDS).logits, AutoModelForCausalLM.from_pretrained(folders[1]).eval()(IDS).logits)
    tiny.save(stack((F, F, S), seed=5), tmp_path / "odd")
    with pytest.raises(ManifestError, match="layer_types agree"):
        assemble_chain([folders[0], tmp_path / "odd"], tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_neox"])
def test_a_chain_is_distilled_on_its_path(name, tmp_path, monkeypatch):
    """Cut, trained on in-between models with states matched, measured, published in a folder: every size loads, and the ends are the anchors."""
    from conftest import recipe

    from cbd_hub import distill_chain
    monkeypatch.setitem(tiny.FAMILIES, name, tiny.EVERY[name])
    small = {"layers": 3, "hidden": 24, "ffn": 24, **({"heads": 2} if name == "gemma3_text" else {})}
    stage = {"path_fraction": 0.5, "hidden_weight": 0.5, "max_steps": 3}
    distill_chain(recipe(tmp_path, name, [small], stage=stage, teacher={"layers": 5}), tmp_path / "chain")
    chain = Chain.from_pretrained(tmp_path / "chain")
    large, little = chain.anchors
    types = getattr(chain.model("max").config, "layer_types", None)
    for size in np.linspace(little.parameters, large.parameters, 4).astype(int).tolist():
        plan, model = chain.plan(size, tolerance=0.3), chain.model(size, tolerance=0.3)
        assert model.num_parameters() == plan.parameters
        assert model(IDS).logits.isfinite().all()
        if types and plan.strategy == "blend":
            assert model.config.layer_types == [types[layer] for layer in plan.layers]
    for anchor in chain.anchors:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "chain" / "anchors" / anchor.name).eval()
        assert all(torch.equal(tensor, plain.state_dict()[key]) for key, tensor in chain.model(anchor.parameters).state_dict().items())


def test_every_size_between_is_realised_by_a_legal_shape(every):
    """On the path of all axes at once, each of the shapes is one that the class accepts, with the counted parameters."""
    _, large, segment = pair(every)
    low, high = segment.sizes
    for size in np.linspace(low, high, 5).astype(int).tolist():
        shape = shape_between(size, segment.small_shape, segment.large_shape, large.config)
        plan = blend_plan(segment, shape, Mix(alpha=0.5))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plan.config(large.config))
        assert sum(p.numel() for p in model.parameters()) == plan.parameters
        assert abs(plan.parameters - size) <= (0.1 if segment.small_shape.hidden == segment.small_shape.heads * SIZE else 0.01) * size
