"""Reconstruction of a cut: what its attention and FFN write, fitted to make up for what is gone."""

import copy
import itertools

import pytest
import tiny
import torch

from cbd_hub.cut import Cut, at_depth, choose_cut, cut_model, cut_plan, measure_importance
from cbd_hub.errors import ArgumentError, WeightsError
from cbd_hub.evaluation import Documents, document_losses
from cbd_hub.families import family_of
from cbd_hub.interpolation.live import ModelRunner, frozen
from cbd_hub.reconstruct import choose_reconstructed, reconstruct
from cbd_hub.shapes import count, shape_of


def documents(count=80, length=32, seed=0):
    ids = torch.randint(4, tiny.VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    return Documents(tuple(ids), (length,) * count)


def cut_of(model, **axes):
    """A cut to fewer layers, neurons or channels, and its plan."""
    shape = shape_of(model.config).model_copy(update=axes)
    plan = cut_plan("whole", shape, model, measure_importance(model, documents(), bf16=False).kept(shape))
    return cut_model(model, plan).eval(), plan


def seen(model, text, layer, site="ffn_input"):
    """What a layer's FFN or attention (heads_input) writes with, its output (before a post-norm), and the stream after it; in float64, positions first."""
    family, found = family_of(model.config), {}
    block = model.get_submodule(family.blocks)[layer]
    handles = [
        block.get_submodule(getattr(family, site)).register_forward_hook(lambda _, inputs, output: found.update(inputs=inputs[0], written=output, added=output)),
        *([block.get_submodule(family.post_norms[0]).register_forward_hook(lambda _, __, output: found.update(added=output))] if family.post_norms and site == "heads_input" else []),
        block.register_forward_pre_hook(lambda _, inputs: found.update(before=inputs[0])),
        block.register_forward_hook(lambda _, inputs, output: found.update(stream=output[0] if isinstance(output, tuple) else output)),
    ]
    with torch.no_grad():
        model(torch.stack(text.ids))
    for handle in handles:
        handle.remove()
    inputs, written, added, before, stream = (found[name].double().flatten(0, -2) for name in ("inputs", "written", "added", "before", "stream"))
    return inputs, written, before + added if site == "heads_input" else stream


def gone(model, whole, plan, text, layer):
    """What the stream after a layer lacks, relative to its size at each position; the mean square."""
    last = [*plan.layers[1:], shape_of(whole.config).layers][layer] - 1
    wanted = seen(whole, text, last)[2]
    return float((((wanted - seen(model, text, layer)[2]) ** 2).sum(1) / wanted.square().mean(1).clamp(min=1e-12)).sum())


def through_norm(model, layer, place, lack, written):
    """What a post-norm's input should change by, so that its output changes by what is lacking, and how much each position then weighs besides."""
    family = family_of(model.config)
    gain = model.get_submodule(family.blocks)[layer].get_submodule(family.post_norms[place]).weight.detach().double() + family.norm_offset
    size = (written.square().mean(1, keepdim=True) + getattr(model.config, family.norm_eps)).sqrt()
    wanted = lack * gain / (gain.square() + 0.03 * gain.square().mean())
    unit = written / size
    return (wanted - unit * (unit * wanted).mean(1, keepdim=True)) * size, 1 / size


@pytest.mark.parametrize("family", sorted(tiny.EVERY))
def test_the_fit_is_the_ridge_regression_of_the_docstring(family):
    """Each layer's change is the least-squares solution in float64 of the problem written out: rows for positions, and rows that hold each neuron to what it wrote."""
    whole = tiny.EVERY[family](layers=5, ffn=48).eval()
    cut, plan = cut_of(whole, layers=3, ffn=32)
    fitted = copy.deepcopy(cut)
    made = reconstruct(fitted, whole, plan, documents(), bf16=False)
    names = family_of(cut.config).parameters(cut)
    ends = [*plan.layers, 5]
    for layer, site in itertools.product(range(3), ("heads_input", "ffn_input")):
        spec, dim = family_of(cut.config).input_of(getattr(family_of(cut.config), site))
        inputs, written, stream = seen(cut, documents(), layer, site)
        wanted = seen(whole, documents(), ends[layer] if site == "heads_input" else ends[layer + 1] - 1, site)[2]
        lack, weight = wanted - stream, wanted.square().mean(1, keepdim=True).rsqrt()
        if family_of(cut.config).post_norms:
            lack, besides = through_norm(cut, layer, int(site == "ffn_input"), lack, written)
            weight = weight * besides
        key = spec.name.format(layer=layer)
        biased = key.removesuffix("weight") + "bias" in names
        held = (inputs * weight).norm(dim=0) * (0.3 + 4096 / len(inputs)) ** 0.5
        if biased:
            inputs, held = torch.cat([inputs, torch.ones(len(inputs), 1)], 1), torch.cat([held, torch.zeros(1)])
        rows = torch.cat([inputs * weight, held.diag()])
        change = torch.linalg.lstsq(rows, torch.cat([lack * weight, torch.zeros(len(held), wanted.shape[1])])).solution
        expected = names[key].detach() + (change[: len(change) - biased]).movedim(0, dim)
        torch.testing.assert_close(made.get(key, names[key]).double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
        with torch.no_grad():  # what comes next is fitted on what comes out of this
            names[key].copy_(expected)
            if biased:
                bias = names[key.removesuffix("weight") + "bias"]
                bias += change[-1]
                torch.testing.assert_close(made.get(key.removesuffix("weight") + "bias", bias), bias, rtol=1e-3, atol=1e-5)
    changed = {name for name, tensor in family_of(fitted.config).parameters(fitted).items() if not tensor.equal(family_of(fitted.config).parameters(cut_of(whole, layers=3, ffn=32)[0])[name])}
    assert changed == set(made), "nothing else moves"


@pytest.mark.parametrize("axes", [{"ffn": 32}, {"layers": 3, "ffn": 40}], ids=str)
@pytest.mark.parametrize("family", sorted(tiny.EVERY))
def test_every_layer_comes_nearer_to_the_whole_model_in_every_family(family, axes):
    whole = tiny.EVERY[family](layers=5, ffn=48).eval()
    cut, plan = cut_of(whole, **axes)
    fitted = copy.deepcopy(cut)
    reconstruct(fitted, whole, plan, documents(), bf16=False)
    last = len(plan.layers) - 1
    for text, share in ((documents(), 0.97), (documents(seed=1), 1.0)):  # also on text that it was not fitted on
        before, after = (gone(model, whole, plan, text, last) for model in (cut, fitted))
        assert after < share * before


@pytest.mark.parametrize("target", ["stream", "layer"])
@pytest.mark.parametrize("family", sorted(name for name in tiny.EVERY if name not in ("gpt2", "gpt_neox", "opt")))  # these cut heads with the hidden width
def test_heads_that_are_gone_are_made_up_for_by_those_that_stay(family, target):
    whole = tiny.EVERY[family](layers=3, ffn=48).eval()
    cut, plan = cut_of(whole, heads=2, kv_heads=1)
    fitted, table = copy.deepcopy(cut), family_of(cut.config)
    made = reconstruct(fitted, whole, plan, documents(), target=target, bf16=False)
    assert {table.input_of(table.heads_input)[0].name.format(layer=layer) for layer in range(3)} <= made.keys()
    for text in (documents(), documents(seed=1)):
        before, after = (gone(model, whole, plan, text, 0) for model in (cut, fitted))
        assert after < before


@pytest.mark.parametrize("family", sorted(tiny.EVERY))
def test_what_was_not_missed_is_not_made_up_for(family):
    """Neurons that write nothing can go, and nothing moves."""
    whole = tiny.EVERY[family](layers=3, ffn=48).eval()
    spec, dim = family_of(whole.config).input_of(family_of(whole.config).ffn_input)
    parameters = family_of(whole.config).parameters(whole)
    with torch.no_grad():
        for layer in range(3):
            parameters[spec.name.format(layer=layer)].movedim(dim, 0)[5:15] = 0
    cut, plan = cut_of(whole, ffn=38)
    before = copy.deepcopy(cut)
    reconstruct(cut, whole, plan, documents(), bf16=False)
    for name, tensor in cut.named_parameters():
        torch.testing.assert_close(tensor, before.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_channels_that_were_cut_are_left_out_of_the_target():
    whole = tiny.llama(layers=4, hidden=48, heads=4, ffn=48).eval()
    cut, plan = cut_of(whole, hidden=32)
    fitted = copy.deepcopy(cut)
    reconstruct(fitted, whole, plan, documents(), bf16=False)
    (term,) = plan.tensors["model.layers.3.mlp.down_proj.weight"]
    (channels,) = (torch.from_numpy(take.index) for take in term.takes if take.dim == 0)
    wanted = seen(whole, documents(), 3)[2][:, channels]
    before, after = (float(((wanted - seen(model, documents(), 3)[2]) ** 2).sum()) for model in (cut, fitted))
    assert after < before


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "qwen3"])
def test_a_narrower_stream_comes_nearer_too(family, seed):
    """Also through post-norms, whose denominators are others where channels are gone."""
    whole = tiny.EVERY[family](layers=3, hidden=48, heads=6, kv_heads=2, ffn=48, seed=seed).eval()
    cut, plan = cut_of(whole, hidden=36)
    text = torch.stack(documents(seed=1).ids)

    def divergence():
        with torch.no_grad():
            wanted, made = (model(text).logits.log_softmax(-1) for model in (whole, cut))
        return float((wanted.exp() * (wanted - made)).sum(-1).mean())

    before = divergence()
    reconstruct(cut, whole, plan, documents(400, seed=3), bf16=False)
    assert divergence() < before


def test_documents_of_unequal_length_count_by_their_positions():
    """Batches are of one length; the sums are over all of them."""
    whole = tiny.llama(layers=4, ffn=48).eval()
    text = documents()
    mixed = Documents((*text.ids[:40], *(ids[:12] for ids in text.ids[40:])), (1,) * 80)
    first, plan = cut_of(whole, layers=3, ffn=32)
    second = copy.deepcopy(first)
    made = reconstruct(first, whole, plan, mixed, bf16=False)
    again = reconstruct(second, whole, plan, Documents(mixed.ids[::-1], mixed.lengths), bf16=False)
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, again[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ArgumentError, match="300"):
        reconstruct(first, whole, plan, documents(2, 300), bf16=False)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_a_neuron_that_is_never_active_stays_what_it_is(family):
    whole = tiny.EVERY[family](layers=3, ffn=48).eval()
    cut, plan = cut_of(whole, layers=2)
    table = family_of(cut.config)
    spec, dim = table.input_of(table.ffn_input)
    parameters = table.parameters(cut)
    silent = next(name for name in parameters if name.startswith(spec.name.partition("{")[0] + "0") and any(part in name for part in ("up_proj.weight", "fc1.weight")))
    with torch.no_grad():
        parameters[silent][7] = 0
    before = parameters[spec.name.format(layer=0)].movedim(dim, 0)[7].clone()
    reconstruct(cut, whole, plan, documents(), bf16=False)
    assert parameters[spec.name.format(layer=0)].movedim(dim, 0)[7].equal(before)


@pytest.mark.parametrize("family", sorted(tiny.EVERY))
def test_a_stream_of_zeros_and_an_ffn_that_writes_nothing_spoil_nothing(family):
    """A padding row that is also the first token of every text stays 0 in training; blocks that are grown begin with an FFN that writes nothing."""
    whole = tiny.EVERY[family](layers=4, ffn=48, tied=False).eval() if family not in ("gpt2", "opt") else tiny.EVERY[family](layers=4, ffn=48).eval()
    table = family_of(whole.config)
    parameters = table.parameters(whole)
    spec, _ = table.input_of(table.ffn_input)
    with torch.no_grad():
        parameters[table.embedding][2] = 0
        for name in (spec.name.format(layer=1), spec.name.removesuffix("weight").format(layer=1) + "bias"):
            if name in parameters:
                parameters[name].zero_()
    text = documents()
    for ids in text.ids:
        ids[0] = 2
    for axes in ({"layers": 3}, {"ffn": 32}):
        cut, plan = cut_of(whole, **axes)
        before = copy.deepcopy(cut)
        made = reconstruct(cut, whole, plan, text, bf16=False)
        assert all(tensor.isfinite().all() for tensor in made.values())
        assert gone(cut, whole, plan, text, len(plan.layers) - 1) < gone(before, whole, plan, text, len(plan.layers) - 1)


@pytest.mark.parametrize("gain", [0.1, 0.01, 0.001, 1e-5, 0.0])
@pytest.mark.parametrize("axes", [{"ffn": 32}, {"layers": 2}], ids=str)
@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_a_channel_that_a_post_norm_all_but_silences_makes_no_fit_worse(family, axes, gain):
    whole = tiny.EVERY[family](layers=4, ffn=48).eval()
    with torch.no_grad():
        for block in whole.model.layers:
            block.post_feedforward_layernorm.weight[5] = gain - family_of(whole.config).norm_offset
    cut, plan = cut_of(whole, **axes)
    before = copy.deepcopy(cut)
    made = reconstruct(cut, whole, plan, documents(), bf16=False)
    assert all(tensor.isfinite().all() for tensor in made.values())
    last = len(plan.layers) - 1
    for text in (documents(), documents(seed=1)):
        assert gone(cut, whole, plan, text, last) < gone(before, whole, plan, text, last)


def test_in_bf16_each_fit_sees_the_weights_that_were_fitted_before_it(monkeypatch):
    """Autocast keeps the rounded copy of a weight, of one that has changed since too, unless it is told not to."""
    monkeypatch.setattr("cbd_hub.precision.has_bf16", lambda device: True)
    whole = tiny.llama(layers=4, ffn=48).eval()
    cut, plan = cut_of(whole, layers=3, ffn=32)
    made = reconstruct(copy.deepcopy(cut), whole, plan, documents())

    def forgets(*_, **__):
        return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)

    monkeypatch.setattr("cbd_hub.reconstruct.products", forgets)
    wanted = reconstruct(copy.deepcopy(cut), whole, plan, documents())
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in wanted.items())


def test_what_cannot_be_fitted_is_refused():
    whole = tiny.llama(layers=3, ffn=48).eval()
    cut, plan = cut_of(whole, ffn=32)
    with torch.no_grad():
        whole.model.layers[1].mlp.gate_proj.weight.fill_(float("inf"))
    with pytest.raises(WeightsError, match="reconstruct=None"):
        reconstruct(cut, whole, plan, documents(), bf16=False)


def test_the_depth_is_chosen_by_the_loss_after_the_fit():
    """No depth beside the chosen one loses less, each fitted on the first 1,024 tokens and judged on the others."""
    whole, text = tiny.llama(layers=10, ffn=96, initializer_range=0.3).eval(), documents(150)
    importance = measure_importance(whole, text, bf16=False)
    size = count(shape_of(whole.config).model_copy(update={"layers": 8, "ffn": 80}), whole.config)
    plain, lines = choose_cut(whole, size, importance, text, name="whole"), []
    chosen = choose_reconstructed(plain, whole, importance, text, size, name="whole", progress=lines.append)

    def loss(depth):
        shape = at_depth(size, depth, whole.config)
        if shape is None:
            return float("inf")
        plan = Cut.of(whole, shape, importance, "whole").plan
        student = cut_model(whole, plan)
        reconstruct(student, whole, plan, text.first(1024))
        with frozen(student):
            return document_losses(ModelRunner(student), text.after(1024).first(3072)).mean

    depth, start = (cut.plan.shape.layers for cut in (chosen, plain))
    found = {layers: loss(layers) for layers in {depth - 1, depth, depth + 1, start}}
    assert found[depth] == min(found.values())
    assert any(f"{found[depth]:.3f} nats per token, reconstructed on {text.first(1024).tokens:,} tokens" in line for line in lines)
    assert len(lines) == len(set(lines)), "no shape is tried twice"
    assert chosen.tried == plain.tried
    short = []
    assert choose_reconstructed(plain, whole, importance, text.first(4000), size, name="whole", progress=short.append) is plain
    assert "no other depths are tried" in short[0]
    assert choose_reconstructed(plain, whole, importance, documents(100), size, name="whole").plan.shape == plain.plan.shape, "so little text does not tell depths apart"
