"""Alignment: what leaves a function alone is found again, and nothing else is changed."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from cbd_hub import CBDModel, assemble_chain
from cbd_hub.errors import ArchitectureError, ArgumentError, ManifestError, WeightsError
from cbd_hub.evaluation import Documents
from cbd_hub.families import family_of
from cbd_hub.files import sha256
from cbd_hub.interpolation import align as align_room
from cbd_hub.interpolation.align import align, apply, fit, segment_with
from cbd_hub.interpolation.execute import combine
from cbd_hub.interpolation.fitting import Fit, activations, shared_activations
from cbd_hub.interpolation.live import Between
from cbd_hub.interpolation.maps import norms
from cbd_hub.interpolation.patch import patch_plan
from cbd_hub.interpolation.plan import Kept
from cbd_hub.interpolation.planner import segment_plan
from cbd_hub.interpolation.refine import SHARES, middle_loss, refine
from cbd_hub.manifest import CurvePoint
from cbd_hub.shapes import shape_of


IDS = torch.arange(3, 43).view(1, 40) % 250


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def copied(model, state):
    """A model like another, with other values."""
    made = type(model)(model.config).eval()
    family = family_of(model.config)
    with torch.no_grad():
        for name, parameter in family.parameters(made).items():
            parameter.copy_(state[name])
    return made


def permuted(model, seed=0):
    """The same function with every permutable unit in another place."""
    draw = np.random.default_rng(seed)
    family, shape = family_of(model.config), shape_of(model.config)
    group = shape.heads // shape.kv_heads
    sizes = family.sizes(model.config)
    hidden = draw.permutation(shape.hidden)
    orders = []
    for _ in range(shape.layers):
        kv = draw.permutation(shape.kv_heads)
        orders.append({
            "hidden": hidden, "ffn": draw.permutation(shape.ffn), "kv_heads": kv,
            "heads": np.concatenate([head * group + draw.permutation(group) for head in kv]),
        })
    state = {}
    parameters = family.parameters(model)
    for spec, layer, name in family.stored(model.config):
        tensor = parameters[name].detach()
        for dim, axes in enumerate(spec.dims):
            parts = axes if isinstance(axes, tuple) else (axes,)
            lengths = [part if isinstance(part, int) else sizes[part] for part in parts]
            whole = tensor.unflatten(dim, lengths)
            for at, part in enumerate(parts):
                order = orders[layer or 0].get(part) if isinstance(part, str) else None
                if order is not None:
                    whole = whole.index_select(dim + at, torch.from_numpy(order))
            tensor = whole.flatten(dim, dim + len(parts) - 1)
        state[name] = tensor.clone()
    return copied(model, state)


def same_parameters(first, second, tolerance=1e-4):
    for (name, ours), (_, theirs) in zip(first.named_parameters(), second.named_parameters()):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", [*sorted(tiny.EVERY), "untied llama", "untied gpt2"])
def test_a_permuted_copy_aligns_back(name):
    model = {"untied llama": lambda: tiny.llama(tied=False, seed=3), "untied gpt2": lambda: tiny.gpt2(tie_word_embeddings=False, seed=3)}.get(
        name, lambda: tiny.EVERY[name](seed=3)
    )()
    other = permuted(model)
    torch.testing.assert_close(logits(other), logits(model), atol=1e-4, rtol=1e-4)
    back = align(other, model)
    torch.testing.assert_close(logits(back), logits(model), atol=1e-3, rtol=1e-3)
    same_parameters(back, model, 1e-3)


@pytest.mark.parametrize(("small", "large"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
def test_models_in_half_precision_are_aligned_in_fp32_and_rounded_once(small, large, caplog):
    ids = [torch.randint(tiny.VOCAB, (32,), generator=torch.Generator().manual_seed(place)) for place in range(8)]
    model, reference = tiny.llama(layers=3, ffn=48, tied=False, seed=3).to(small), tiny.llama(layers=4, tied=False, seed=4).to(large)
    exact = align(copy.deepcopy(model).float(), copy.deepcopy(reference).float(), ids)
    aligned = align(model, reference, ids)
    assert "computes nearly" not in caplog.text
    assert (model.dtype, reference.dtype) == (small, large)
    assert aligned.dtype == small
    for name, tensor in exact.named_parameters():
        assert torch.equal(aligned.get_parameter(name), tensor.to(small)), name


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_an_odd_number_of_rotary_channels_is_turned_in_pairs(share):
    """Heads of 12 channels: transformers turns 4 of them where a quarter is 3."""
    model = tiny.gpt_neox(layers=2, hidden=48, heads=4, seed=3, rotary_pct=share)
    cos, _ = model.gpt_neox.rotary_emb(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.long))
    assert Fit(model, model, None, None).rotary_width == cos.shape[-1]
    found = fit(model, model)
    assert found.error < 1e-3
    assert found.maps.queries is not None
    same_parameters(apply(found, model, model), model, 1e-3)


def test_models_of_few_positions_are_tried_on_as_many_tokens():
    model = tiny.gpt2(layers=1, n_positions=16)
    assert fit(model, model).error < 1e-3


def turned_llama(model, hidden, seed=0):
    """An untied llama of another width that computes the same: states turned by a random orthogonal map, gains folded, heads turned inside."""
    draw = torch.Generator().manual_seed(seed)
    old, size, kv = model.config.hidden_size, model.config.head_dim, model.config.num_key_value_heads
    config = type(model.config)(**{**model.config.to_dict(), "hidden_size": hidden, "rms_norm_eps": model.config.rms_norm_eps * old / hidden})
    made = type(model)(config).eval()
    turn = torch.linalg.qr(torch.randn(hidden, hidden, generator=draw, dtype=torch.float64))[0][:, :old]
    heads = torch.linalg.qr(torch.randn(kv, size, size, generator=draw, dtype=torch.float64))[0]
    group = model.config.num_attention_heads // kv
    state = {name: tensor.detach().double() for name, tensor in model.named_parameters()}
    for name in list(state):
        if name.endswith(("layernorm.weight", "norm.weight")):
            continue
        value = state[name]
        if "v_proj" in name:
            value = (heads @ value.unflatten(0, (kv, size))).flatten(0, 1)
        if "o_proj" in name:
            value = (value.unflatten(1, (kv * group, size)).transpose(0, 1) @ heads.repeat_interleave(group, 0).mT).transpose(0, 1).flatten(1)
        if "o_proj" in name or "down_proj" in name:
            value = turn @ value
        elif "embed" in name:
            value = value @ turn.T
        else:
            norm = "model.norm.weight" if "lm_head" in name else f"model.layers.{name.split('.')[2]}." + (
                "input_layernorm.weight" if "self_attn" in name else "post_attention_layernorm.weight"
            )
            value = value * state[norm] @ turn.T * (old / hidden) ** 0.5
        state[name] = value
    state |= {name: torch.ones(hidden) for name in state if "norm" in name}
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(state[name])
    return made


def test_a_rotated_and_permuted_copy_of_an_untied_llama_aligns_back():
    model = tiny.llama(tied=False, seed=3)
    other = permuted(turned_llama(model, model.config.hidden_size))
    torch.testing.assert_close(logits(other), logits(model), atol=1e-4, rtol=1e-4)
    back = align(other, model)
    torch.testing.assert_close(logits(back), logits(model), atol=1e-3, rtol=1e-3)
    same_parameters(back, model, 1e-3)


def test_a_model_aligns_to_its_own_rotated_copy_in_a_larger_width():
    model = tiny.llama(tied=False, seed=3)
    reference = turned_llama(permuted(model), 48)
    torch.testing.assert_close(logits(reference), logits(model), atol=1e-4, rtol=1e-4)
    same_parameters(align(model, reference), reference, 1e-3)


def test_a_head_tied_to_the_embedding_takes_a_signed_permutation():
    model = tiny.llama(seed=3)
    other = permuted(model)
    signs = torch.where(torch.arange(32) % 3 == 0, -1.0, 1.0)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(signs[:, None] if name.endswith(("o_proj.weight", "down_proj.weight")) else signs)
    torch.testing.assert_close(logits(other), logits(model), atol=1e-4, rtol=1e-4)
    same_parameters(align(other, model), model, 1e-3)


def test_a_tied_model_that_is_turned_is_said_to_compute_nearly_what_it_did(caplog):
    torch.manual_seed(1)
    ids = [torch.randint(tiny.VOCAB, (24,)) for _ in range(4)]
    small, large = tiny.qwen2(layers=2, hidden=24, heads=4, ffn=24, seed=1, kv_heads=2, head_dim=8), tiny.qwen2(layers=3, seed=20, kv_heads=2, head_dim=8)
    with torch.no_grad():
        for model in (small, large):
            model.model.norm.weight.mul_(torch.exp(0.3 * torch.randn_like(model.model.norm.weight)))
    align(small, large)
    assert not caplog.records
    align(small, large, ids)
    assert "computes nearly what the model did: on random tokens its logits differ by" in caplog.text


WIDER = {"hidden": 48, "heads": 6, "ffn": 72, "layers": 5}


def two(name, **more):
    """A smaller and a larger model of one family, each random; tiny families with kv heads share two query heads a kv head."""
    kv = {} if name in ("gpt2", "gpt_neox", "opt") else {"kv_heads": 3, "head_dim": 8}
    own = {"kv_heads": 2, "head_dim": 8} if kv else {}
    return tiny.EVERY[name](layers=3, seed=5, **own, **more), tiny.EVERY[name](seed=6, **{**WIDER, **kv}, **more)


@pytest.mark.parametrize("name", sorted(tiny.EVERY))
def test_an_aligned_model_computes_what_it_did(name):
    """Fitted to a stranger, wider and deeper where that can be: whatever was matched, the function is the model's own."""
    layers = {"layer_types": tiny.mixed(3)} if name == "gemma3_text" else {}
    small = tiny.EVERY[name](layers=3, seed=5, **layers)
    for large in (tiny.EVERY[name](layers=3, seed=6, **layers), None):
        if large is None:
            small, large = two(name)
        aligned = align(small, large)
        assert shape_of(aligned.config) == shape_of(large.config).model_copy(update={"layers": 3})
        torch.testing.assert_close(logits(aligned), logits(small), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_an_untied_model_computes_what_it_did(name):
    """Orthogonal maps of the residual stream, under norms that subtract the mean too, at one width and at two."""
    untied = {"tie_word_embeddings": False} if name == "gpt2" else {"tied": False}
    small, large = tiny.EVERY[name](layers=3, seed=5, **untied), tiny.EVERY[name](layers=3, seed=6, **untied)
    found = fit(small, large)
    assert found.residual == "rotation"
    torch.testing.assert_close(logits(apply(found, small, large)), logits(small), atol=2e-3, rtol=2e-3)
    small, large = two(name, **untied)
    found = fit(small, large)
    assert found.residual == ("rotation" if name == "llama" else "permutation")
    torch.testing.assert_close(logits(apply(found, small, large)), logits(small), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("places", [[0, 2, 4], [0, 1, 4], [0, 1, 2], [2, 3, 4]])
@pytest.mark.parametrize("text", [True, False])
def test_layers_are_matched(text, places):
    """A deeper model in which some layers write nothing: the others are the smaller one's, wherever they stand."""
    small = tiny.llama(layers=3, seed=3)
    large = tiny.llama(layers=5, seed=4)
    source = {layer: place for place, layer in enumerate(places)}
    with torch.no_grad():
        ours, theirs = dict(small.named_parameters()), dict(large.named_parameters())
        for name, parameter in theirs.items():
            if not name.startswith("model.layers."):
                parameter.copy_(ours[name])
                continue
            layer, rest = int(name.split(".")[2]), name.split(".", 3)[3]
            if layer in source:
                parameter.copy_(ours[f"model.layers.{source[layer]}.{rest}"])
            elif rest.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    ids = Documents.packed(tiny.texts(20), tiny.tokenizer(), 32).ids if text else None
    assert fit(small, large, ids, steps=0).kept.layers.tolist() == places


def test_layers_are_matched_by_states_where_no_neuron_tells():
    """A stranger's neurons are like none; what the layers make of a text still is."""
    small = tiny.llama(layers=3, seed=3)
    large = tiny.llama(layers=5, seed=4)
    with torch.no_grad():
        ours, theirs = dict(small.named_parameters()), dict(large.named_parameters())
        theirs["model.embed_tokens.weight"].copy_(ours["model.embed_tokens.weight"])
        for name in (name for name in theirs if "self_attn" in name and name.split(".")[2] in "234"):
            theirs[name].copy_(ours[name.replace(name.split(".")[2], str(int(name.split(".")[2]) - 2), 1)])
        for name, parameter in theirs.items():  # attention writes what it wrote, and FFNs hardly anything
            if name.endswith("down_proj.weight") or (name.endswith("o_proj.weight") and name.split(".")[2] in "01"):
                parameter.mul_(1e-3)
        for layer in small.model.layers:
            layer.mlp.down_proj.weight.mul_(1e-3)
        for layer in (*small.model.layers, *large.model.layers):
            layer.self_attn.o_proj.weight.mul_(30)
    ids = Documents.packed(tiny.texts(20), tiny.tokenizer(), 32).ids
    assert fit(small, large, ids, steps=0).kept.layers.tolist() == [2, 3, 4]


def test_strangers_of_whom_nothing_is_known_are_matched_evenly():
    for seed in range(4):
        found = fit(tiny.llama(layers=3, seed=10 + seed), tiny.llama(layers=5, seed=20 + seed))
        assert found.kept.layers.tolist() == [0, 2, 4]


def learned(model, ids):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(30):
        batch = torch.stack(list(ids[step % 4 * 8 : step % 4 * 8 + 8]))
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_steps_lower_the_middle_and_leave_the_function_alone(tied):
    ids = Documents.packed(tiny.texts(40), tiny.tokenizer(), 32).ids
    small, large = (learned(tiny.llama(layers=2, tied=tied, seed=seed), ids) for seed in (5, 6))
    losses = []
    for steps in (0, 8):
        found = fit(small, large, ids, steps=steps, residual="permutation" if tied else "rotation")
        losses.append(middle_loss(segment_with(found, small, large), {"small": small, "large": large}, ids))
        assert found.error < 1e-3
    assert losses[1] < losses[0]


def test_gradient_steps_that_other_text_gains_nothing_from_are_taken_back():
    """Text that is learned by heart says nothing of other text."""
    ids = Documents.packed(tiny.texts(40), tiny.tokenizer(), 32).ids
    small, large = (learned(learned(tiny.llama(layers=2, tied=False, seed=seed), ids), ids) for seed in (5, 6))
    models = {"small": small, "large": large}
    found = fit(small, large, ids, steps=0)
    segment = segment_with(found, small, large)

    def moved(watched):
        said = []
        maps = refine(segment, models, ids[:1], watched, steps=100, rotary_width=8, centred=False, report=lambda _, done, __: said.append(done))
        return maps, len(said)

    (first, few), (second, many) = moved(ids[16:32]), moved(ids[:1])
    own, other = (
        [sum(middle_loss(replace(segment, maps=maps), models, text, share) for share in SHARES) for maps in (found.maps, first, second)]
        for text in (ids[:1], ids[16:32])
    )
    assert other[1] <= min(other)
    assert own[2] < own[1]
    assert other[2] > other[1] + 0.01
    assert few < many


def test_text_that_judges_is_not_fitted_on(monkeypatch):
    """And activations, gigabytes of a real model, are of a part of the rest."""
    read, comparing, refining = [], align_room.shared_activations, align_room.refine
    monkeypatch.setattr(align_room, "shared_activations", lambda model, reference, ids: read.append(ids) or comparing(model, reference, ids))
    monkeypatch.setattr(align_room, "refine", lambda segment, models, ids, watched, **options: read.append((ids, watched)) or refining(segment, models, ids, watched, **options))
    monkeypatch.setattr(align_room, "_ACTIVATIONS", 100)
    judging = []
    judge = align_room.middle_loss
    monkeypatch.setattr(align_room, "middle_loss", lambda segment, models, ids: judging.append(ids) or judge(segment, models, ids))
    small, large = tiny.llama(layers=2, seed=5), tiny.llama(seed=6)
    rows = torch.randint(3, 250, (9, 32), generator=torch.Generator().manual_seed(0))
    fit(small, large, rows, steps=1)  # a tensor of rows is a sequence of them too
    compared, (ids, watched) = read
    assert len(judging) == 2
    for found, wanted in ((compared, rows[2:5]), (ids, rows[2:]), (watched, rows[:2]), *((text, rows[:2]) for text in judging)):
        assert torch.equal(torch.stack(list(found)), wanted)


def test_massive_activations_are_not_compared():
    """A few tokens' states are as long as all others' together, in one model or the other, and would decide every product of activations."""
    models = tiny.llama(layers=2, seed=5), tiny.llama(seed=6)
    ids = torch.randint(20, 250, (4, 32), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[2, 7] = 3, 4
    for model, token in zip(models, (3, 4)):
        with torch.no_grad():
            model.get_input_embeddings().weight[token, 0] = 500
    with torch.no_grad():
        found, whole = shared_activations(*models, list(ids)), [activations(model, list(ids)) for model in models]
    usual = (ids > 4).flatten()
    assert int(usual.sum()) == 123
    for ours, theirs in zip(found, whole):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name][usual])


def test_channels_are_fitted_to_the_layers_that_were_matched():
    """Not to those that were there to begin with: of a model whose layers stand otherwise than evenly."""
    small, large = tiny.llama(layers=3, seed=3), tiny.llama(layers=5, seed=4)
    with torch.no_grad():
        ours = dict(small.named_parameters())
        for name, parameter in large.named_parameters():
            if not name.startswith("model.layers."):
                parameter.copy_(ours[name])
            elif int(name.split(".")[2]) > 1:
                parameter.copy_(ours[name.replace(name.split(".")[2], str(int(name.split(".")[2]) - 2), 1)])
    ids = Documents.packed(tiny.texts(20), tiny.tokenizer(), 32).ids
    with torch.no_grad():
        acts = [activations(model, ids) for model in (small, large)]
        found = Fit(small, large, tuple(acts), None)
        found.run()
        assert found.kept.layers.tolist() == [2, 3, 4]
        for place in range(3):
            ours, theirs = acts[0][f"state.{place}"], acts[1][f"state.{place + 2}"]
            torch.testing.assert_close(found._product("state", place, place + 2), ours.T @ theirs / (ours.norm() * theirs.norm()))
        own = [found._product("state", place, layer) for place, layer in enumerate((2, 3, 4))]
        even = [found._product("state", place, layer) for place, layer in enumerate((0, 2, 4))]
        assert not torch.allclose(sum(own), sum(even), atol=1e-3)


def test_text_that_is_too_short_to_be_judged_on_is_not_learned_by_heart(monkeypatch):
    monkeypatch.setattr("cbd_hub.interpolation.align.refine", lambda *_, **__: pytest.fail("no gradient on three rows"))
    ids = Documents.packed(tiny.texts(20), tiny.tokenizer(), 32).ids[:3]
    assert fit(tiny.llama(layers=2, seed=5), tiny.llama(seed=6), ids).maps.neurons is not None


def test_units_that_come_back_have_the_given_order():
    """Behind those that the smaller one's stand for."""
    small, large = two("llama")
    draw, shape = np.random.default_rng(0), shape_of(large.config)
    heads = np.arange(shape.heads).reshape(shape.kv_heads, -1)
    order = Kept(
        np.arange(shape.layers), np.stack([draw.permutation(shape.ffn) for _ in range(shape.layers)]),
        np.stack([draw.permuted(heads[draw.permutation(shape.kv_heads)], axis=1).ravel() for _ in range(shape.layers)]), draw.permutation(shape.hidden),
    )
    before = replace(order, ffn=order.ffn.copy(), heads=order.heads.copy())
    kept = fit(small, large, order=order).kept
    assert np.array_equal(order.ffn, before.ffn)
    assert np.array_equal(order.heads, before.heads)
    kept.check(shape_of(small.config), shape)
    for layer in range(shape.layers):
        own = shape_of(small.config).ffn if layer in kept.layers else 0
        assert np.array_equal(kept.ffn[layer][own:], [unit for unit in order.ffn[layer] if unit not in kept.ffn[layer][:own]])
        kv = 2 if layer in kept.layers else 0
        groups, theirs = (one[layer].reshape(shape.kv_heads, -1) for one in (kept.heads, order.heads))
        mine = {group.min() for group in groups[:kv]}
        assert groups[kv:].tolist() == [group.tolist() for group in theirs if group.min() not in mine]
    width = shape_of(small.config).hidden
    assert np.array_equal(kept.hidden[width:], [unit for unit in order.hidden if unit not in kept.hidden[:width]])


def chain_of(tmp_path, small, large, **options):
    return assemble_chain([tiny.save(large, tmp_path / "l"), tiny.save(small, tmp_path / "s")], tmp_path / "chain", **options)


@pytest.mark.parametrize("tied", [True, False])
def test_a_chain_of_a_model_and_part_of_its_permuted_copy_is_the_models_own_cut(tmp_path, tied):
    """In common coordinates the two are one: between them lies the larger one's own cut, whatever alpha; each anchor stays itself, bit for bit."""
    large = tiny.llama(tied=tied, seed=3)
    whole = permuted(large if tied else turned_llama(large, 32))
    small = tiny.llama(layers=2, tied=tied)
    with torch.no_grad():
        theirs = dict(whole.named_parameters())
        for name, parameter in small.named_parameters():
            parameter.copy_(theirs[name.replace("layers.1.", "layers.3.")])
    chain = chain_of(tmp_path, small, large)
    link = chain.manifest.links[0]
    assert link.strategies.blend.align.residual == ("permutation" if tied else "rotation")
    assert chain.anchors[1].maps is not None
    cut = tiny.llama(layers=3, tied=tied)
    with torch.no_grad():
        theirs = dict(large.named_parameters())
        for name, parameter in cut.named_parameters():
            layer = name.split(".")[2] if name.startswith("model.layers") else None
            parameter.copy_(theirs[name if layer is None else name.replace(f"layers.{layer}.", f"layers.{[0, 2, 3][int(layer)]}.")])
    for options in ({"strategy": "blend", "alpha": 0.3}, {"strategy": "blend", "alpha": 1.0}, {"strategy": "patch"}):
        made = CBDModel.from_chain(tmp_path / "chain", shape={"layers": 3}, **options)
        torch.testing.assert_close(logits(made), logits(cut), atol=1e-3, rtol=1e-3)
    CBDModel.materialize(tmp_path / "chain", shape={"layers": 3}, strategy="patch", output_dir=tmp_path / "made")
    assert torch.equal(logits(type(made).from_pretrained(tmp_path / "made")), logits(made))
    for name, model in (("min", small), ("max", large)):
        assert all(map(torch.equal, CBDModel.from_chain(tmp_path / "chain", name).parameters(), model.parameters()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_and_whole_tensors_are_turned_alike(name, tmp_path):
    """What is streamed to disk in parts is what live parameters give, at unequal widths with rotated states too."""
    small, large = two(name, **({"tied": False} if name == "llama" else {}))
    chain = chain_of(tmp_path, small, large, align=True)
    size = sum(anchor.parameters for anchor in chain.anchors) // 2
    plan = chain.plan(size, strategy="blend", alpha=0.4)
    family = family_of(large.config)
    live = {anchor.name: family.parameters(model) for anchor, model in zip(chain.anchors, (large, small))}
    made = family.parameters(chain.model(size, strategy="blend", alpha=0.4))
    for key, terms in plan.tensors.items():
        torch.testing.assert_close(made[key], combine(terms, live), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("around", ["default dtype", "autocast"])
def test_what_the_caller_computes_in_is_of_no_account(around, tmp_path):
    """A script that sets bf16 for its own model gets the size that everybody gets, and makes the chain that everybody makes."""
    small, large = two("llama", tied=False)
    chain = chain_of(tmp_path, small, large, align=True)
    shape = {"layers": 4, "hidden": 36, "heads": 4, "kv_heads": 2, "ffn": 60}
    plain = chain.model(shape=shape, alpha=0.4).state_dict()
    if around == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            made = chain.model(shape=shape, alpha=0.4).state_dict()
    else:
        torch.set_default_dtype(torch.bfloat16)
        try:
            (tmp_path / "again").mkdir()
            made = chain_of(tmp_path / "again", small, large, align=True).model(shape=shape, alpha=0.4).state_dict()
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(made[key], tensor) for key, tensor in plain.items())


@pytest.mark.parametrize(("name", "shape"), [
    ("llama", {"layers": 4, "hidden": 36, "heads": 4, "kv_heads": 2, "ffn": 60}), ("gpt2", {"layers": 4, "hidden": 40, "heads": 5, "kv_heads": 5, "ffn": 60}),
])
def test_a_plan_names_every_row_that_it_reads(name, shape, tmp_path):
    """What it does not name need not be there: on the Hub it is not fetched, and reads as zeros. A rotation makes each row of all."""
    small, large = two(name, **({"tied": False} if name == "llama" else {}))
    chain = chain_of(tmp_path, small, large, align=True)
    plan = chain.plan(shape=shape, strategy="blend", alpha=0.4)
    family = family_of(large.config)
    live = {anchor.name: family.parameters(model) for anchor, model in zip(chain.anchors, (large, small))}
    there = {anchor: {key: torch.zeros_like(live[anchor][key]) for key in rows} for anchor, rows in plan.rows().items()}
    for anchor, rows in plan.rows().items():
        for key, chosen in rows.items():
            held = slice(None) if chosen is None else torch.from_numpy(chosen)
            there[anchor][key][held] = live[anchor][key].detach()[held]
    assert any(chosen is not None for rows in plan.rows().values() for chosen in rows.values()), "some rows are not read"
    for terms in plan.tensors.values():
        assert torch.equal(combine(terms, there), combine(terms, live))


def test_auto_leaves_neighbours_alone_that_share_coordinates(tmp_path):
    large = tiny.llama(seed=3)
    small = tiny.llama(layers=2)
    with torch.no_grad():
        theirs = dict(large.named_parameters())
        for name, parameter in small.named_parameters():
            parameter.copy_(theirs[name.replace("layers.1.", "layers.3.")])
    assert chain_of(tmp_path, small, large).manifest.links[0].strategies.blend.align is None


def refused(folder, arrays, message, save=save_file):
    """A chain whose first maps file holds these arrays, on record, makes no plan."""
    manifest = json.loads((folder / "chain.json").read_text())
    path = folder / manifest["anchors"][1]["maps"]["path"]
    save(arrays, path)
    manifest["anchors"][1]["maps"]["sha256"] = sha256(path)
    (folder / "chain.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=message):
        CBDModel.plan(folder, shape={"layers": 3})


def test_a_plan_refuses_maps_that_do_not_fit(tmp_path):
    chain = chain_of(tmp_path, tiny.llama(layers=2, seed=1), tiny.llama(seed=2), align=True)
    path = tmp_path / "chain" / chain.anchors[1].maps.path
    arrays = load_file(path)
    ones = np.ones(32, np.float32)
    for key, value, message in (
        ("align.values", arrays["align.values"][:1], "values has shape"), ("align.queries", arrays["align.queries"] * np.float32("nan"), "not finite"),
        ("align.rotation", np.eye(32, dtype=np.float32), "gains of the small"), ("align.values", 2 * arrays["align.values"], "values is not orthogonal"),
        ("align.channels", 0.5 * ones, "channels is not orthogonal"), ("align.channels.first", ones, "channels.first is unknown"),
        ("align.small_gains", ones, "small_gains is unknown"),
    ):
        refused(tmp_path / "chain", {**arrays, key: value}, message)
    eighths = {name: torch.from_numpy(array) for name, array in arrays.items()} | {"align.values": torch.ones(2, 2, 8, 8).to(torch.float8_e4m3fn)}
    refused(tmp_path / "chain", eighths, "holds no kept.layers", save_torch)


def test_a_plan_refuses_a_rotation_that_the_architecture_cannot_have(tmp_path):
    """Where blocks normalise what they write no gain can be folded away."""
    types = tiny.mixed(4)
    small, large = tiny.gemma3(layers=2, layer_types=types[1:3], seed=1), tiny.gemma3(layer_types=types, seed=2)
    chain = chain_of(tmp_path, small, large, align=True)
    arrays = load_file(tmp_path / "chain" / chain.anchors[1].maps.path)
    gains = {
        f"align.{side}_gains.{name}": np.ones(32, np.float32)
        for side, model in (("small", small), ("large", large)) for name, _ in norms(family_of(model.config), model.config.num_hidden_layers)
    }
    refused(tmp_path / "chain", {**arrays, **gains, "align.rotation": np.eye(32, dtype=np.float32)}, "rotation is not known for gemma3_text")


def test_an_aligned_link_without_its_maps_is_refused(tmp_path):
    """Else the models in between would be averages of unaligned anchors, under losses that were measured on aligned ones."""
    chain_of(tmp_path, tiny.llama(layers=2, seed=1), tiny.llama(seed=2), align=True)
    manifest = json.loads((tmp_path / "chain" / "chain.json").read_text())
    manifest["anchors"][1]["maps"] = None
    (tmp_path / "chain" / "chain.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="were aligned, but the maps of"):
        CBDModel.plan(tmp_path / "chain", shape={"layers": 3})


def test_a_neighbour_is_padded_in_its_own_coordinates():
    """Also where it was turned by a map that a tied head makes approximate: it computes what the smaller neighbour computes."""
    small, large = tiny.llama(layers=2, ffn=24, seed=5), tiny.llama(seed=6)
    found = fit(small, large, residual="rotation")
    assert found.error > 0.01
    segment = segment_with(found, small, large)
    size = sum(segment.sizes) // 2
    segment = replace(segment, curve=[CurvePoint(size=size, strategy="blend", loss=3.0, tokens=1, dataset="text")])
    plan = segment_plan(segment, size, tolerance=0.1, ends=(2.0, 1.0))
    assert "padded" in plan.trough
    with torch.no_grad():
        padded = Between({"small": small, "large": large}).run(plan)(IDS)
    torch.testing.assert_close(padded.hidden @ padded.head.weight.T, logits(small), atol=1e-4, rtol=1e-4)


def test_a_patch_in_another_order_of_channels_puts_blocks_into_it():
    """An alignment may be an order alone: the larger one's blocks still meet the smaller one's channels."""
    large = tiny.llama(tied=False, seed=3)
    small = permuted(large)
    found = fit(small, large, residual="permutation")
    segment = replace(segment_with(replace(found, maps=None), small, large), small_shape=shape_of(small.config).model_copy(update={"layers": 2}), patch=True)
    segment = replace(segment, kept=replace(found.kept, layers=np.array([0, 1])), order=[2, 3])
    small.model.layers = small.model.layers[:2]
    plan = patch_plan(segment, shape_of(large.config).model_copy(update={"layers": 3}))
    cut = tiny.llama(layers=3, tied=False)
    cut.load_state_dict({name: tensor for name, tensor in large.state_dict().items() if ".layers.3." not in name})
    with torch.no_grad():
        made = Between({"small": small, "large": large}).run(plan)(IDS)
    torch.testing.assert_close(made.hidden @ made.head.weight.T, logits(cut), atol=1e-3, rtol=1e-3)


def test_what_no_alignment_can_be_fitted_on_is_refused(tmp_path):
    broken = tiny.llama(layers=2)
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(WeightsError, match=r"the model: model.embed_tokens.weight holds values that are no finite numbers"):
        align(broken, tiny.llama())
    with pytest.raises(WeightsError, match=r"/s: model.embed_tokens.weight holds values that are no finite numbers"):
        chain_of(tmp_path, broken, tiny.llama(), align=False, calibration=tiny.texts())
    for calibration in ([], ["text"], [torch.arange(4), torch.arange(5)], [torch.arange(4), "text"], [torch.arange(4).view(1, 4)], [torch.tensor(3)]):
        with pytest.raises(ArgumentError, match="tensors of one length"):
            align(tiny.llama(layers=2), tiny.llama(), calibration)
    for calibration, message in (
        ([torch.rand(8)], "is of torch.float32; token ids are of torch.int64"), ([torch.ones(8, dtype=torch.bool)], "is of torch.bool"),
        ([torch.tensor([5])], "rows of length 1; give two tokens"), ([torch.zeros(0, dtype=torch.long)], "rows of length 0"),
        ([torch.full((8,), 999)], "token id 999, and the vocabulary has 260"), ([torch.full((8,), -1)], "token id -1"),
        ([torch.arange(100)], r"a row of 100 tokens is more than the model's 64 positions"),
    ):
        with pytest.raises(ArgumentError, match=message):
            align(tiny.gpt2(layers=2, n_positions=64), tiny.gpt2(n_positions=64), calibration)
    with pytest.raises(ArgumentError, match="not known for these gemma3_text models; choose permutation"):
        fit(tiny.gemma3(seed=1), tiny.gemma3(), residual="rotation")


def test_what_cannot_be_aligned_is_refused():
    for pair in (("x", tiny.llama()), (tiny.llama(), None)):
        with pytest.raises(ArgumentError, match="to align is (str|NoneType); give a loaded transformers model"):
            align(*pair)
    with pytest.raises(ArchitectureError, match="two architectures"):
        align(tiny.llama(), tiny.gpt2())
    with pytest.raises(ManifestError, match="more ffn"):
        align(tiny.llama(ffn=64), tiny.llama())
