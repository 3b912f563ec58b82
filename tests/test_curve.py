"""What the measured curve decides: the order of layers, what auto is, troughs, recommended sizes; and the shapes that any size gets."""

import dataclasses
import functools
import itertools
import json
import random

import numpy as np
import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_interpolation import pair
from transformers import GPT2Config, LlamaConfig

from cbd_hub import CBDModel, Chain, assemble_chain
from cbd_hub.cards import chain_card
from cbd_hub.cut import Importance
from cbd_hub.evaluation import Documents
from cbd_hub.families import family_of
from cbd_hub.files import sha256
from cbd_hub.interpolation.blend import blend_plan
from cbd_hub.interpolation.curve import Chord
from cbd_hub.interpolation.execute import combine
from cbd_hub.interpolation.live import Between, ModelRunner
from cbd_hub.interpolation.patch import patch_plan
from cbd_hub.interpolation.plan import Kept
from cbd_hub.interpolation.planner import segment_plan, shape_at
from cbd_hub.losses.divergence import forward_kl
from cbd_hub.manifest import Anchor, CurvePoint, FileRecord, Link, Location, Manifest
from cbd_hub.measure import best_order, fit_road, nested_order
from cbd_hub.shapes import count, shape_between, shape_of


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_few_layers_is_the_best_path(seed):
    draw = random.Random(seed)
    layers = draw.sample(range(20), 5)
    known = {frozenset(back): draw.random() for depth in range(1, 5) for back in itertools.combinations(layers, depth)}
    asked = []

    def distance(back):
        asked.append(frozenset(back))
        return known[frozenset(back)]

    def total(order):
        return sum(known[frozenset(order[:depth])] for depth in range(1, 5))

    order = nested_order(layers, distance)
    assert len(asked) == len(set(asked)) == 2**5 - 2
    assert total(order) == pytest.approx(min(total(other) for other in itertools.permutations(layers)))
    greedy = nested_order(layers, distance, trials=25)
    assert total(order) <= total(greedy)


def test_layers_come_back_in_the_order_of_least_kl_to_the_larger_neighbour():
    """Against every order of three layers, each made and measured on text by dense logits."""
    small, large, segment = pair("llama", small=(2, 32), large=(5, 32))
    documents = Documents.packed(tiny.texts(20), tiny.tokenizer(), 32, 256)
    ids, _, labels = documents.batch(range(len(documents.ids)), "cpu")
    family = family_of(large.config)
    parameters = {"s": family.parameters(small), "l": family.parameters(large)}

    @functools.cache
    def distance(back):
        shape = segment.small_shape.model_copy(update={"layers": 2 + len(back)})
        plan = patch_plan(dataclasses.replace(segment, order=[*sorted(back), *(layer for layer in segment.order if layer not in back)]), shape)
        state = {name: combine(terms, parameters).detach() for name, terms in plan.tensors.items()}
        made = type(large).from_pretrained(None, config=plan.config(large.config), state_dict=state).eval()
        with torch.no_grad():
            return float(forward_kl(made(ids).logits, large(ids).logits, labels != -100))

    def total(order):
        return sum(distance(frozenset(order[:depth])) for depth in (1, 2))

    order = best_order(segment, {"s": small, "l": large}, documents, segment.order)
    totals = {other: total(other) for other in itertools.permutations(segment.order)}
    assert totals[tuple(order)] == pytest.approx(min(totals.values()), rel=1e-4)
    assert max(totals.values()) > 1.01 * min(totals.values())


@pytest.mark.parametrize("count_", [1, 2, 6, 7, 12, 40, 100])
def test_the_trials_of_an_order_are_bounded(count_):
    asked = []
    order = nested_order(range(count_), lambda back: asked.append(back) or sum(back))
    assert sorted(order) == list(range(count_))
    assert len(asked) <= max(62, count_)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_many_layers_takes_the_nearest_each_time(seed):
    """Each layer brings the model nearer by its own worth: of the candidates, which are the first of the rest, the worthiest comes back first."""
    draw = random.Random(seed)
    layers = draw.sample(range(40), 9)
    worth = {layer: draw.random() for layer in layers}
    order, breadth = nested_order(layers, lambda back: -sum(worth[layer] for layer in back)), 62 // 9
    rest = list(layers)
    for layer in order[:-1]:
        assert layer == max(rest[:breadth], key=worth.__getitem__)
        rest.remove(layer)
    assert order[-1:] == rest


def test_a_cuts_layers_come_back_with_the_most_influential_first():
    importance = Importance(np.array([0.5, 0.1, 0.4, 0.2, 0.3]), np.ones((5, 8)), np.ones((5, 2)), np.ones(8), 2)
    kept = Kept(np.array([0, 3]), np.tile(np.arange(8), (5, 1)))
    assert importance.order(kept) == [2, 4, 1]


def test_the_road_is_fitted_where_the_loss_is_least():
    """A loss with a known least point: alpha 0.5, gain 0.6 of new neurons and 1 of new layers, six layers."""
    _, _, segment = pair("llama", small=(4, 400), large=(8, 800))
    size = sum(segment.sizes) // 2
    asked = []

    def loss(plan):
        asked.append(plan.mix)
        mix = plan.mix
        return abs(mix.alpha - 0.5) + abs(mix.neuron_gain - 0.6) + abs(mix.layer_gain - 1.0) + abs(plan.shape.layers - 6)

    point = fit_road(segment, loss, size)
    assert (point.layers, point.alpha, point.neuron_gain, point.layer_gain) == (6, 0.5, 0.6, 1.0)
    assert loss(blend_plan(segment, shape_at(segment, point), point)) < min(loss(blend_plan(segment, shape_at(segment, point), mix)) for mix in asked[:1])


def test_two_wishes_that_give_one_shape_give_one_model():
    _, _, segment = pair("llama", small=(2, 32), large=(6, 32))
    size = at(segment, 0.5)
    first, second = (segment_plan(segment, wish, strategy="blend", tolerance=0.2) for wish in (size - 40, size + 40))
    assert first.shape == second.shape
    assert first.mix == second.mix


def test_the_chord_is_of_the_losses_on_the_curves_own_text(tmp_path):
    paths = [tiny.save(tiny.llama(layers=layers, seed=layers), tmp_path / f"m{layers}") for layers in (4, 2)]
    assemble_chain(paths, tmp_path / "chain", align=False)
    values = json.loads((tmp_path / "chain/chain.json").read_text())
    for anchor, loss in zip(values["anchors"], (3.0, 4.0)):
        entry = {"loss": loss, "stderr": 0.1, "tokens": 100, "dataset": "words"}
        anchor["evaluations"] = [entry, {**entry, "loss": loss + 5, "dataset": "other words"}]
    values["links"][0]["curve"] = [{"size": sum(anchor["parameters"] for anchor in values["anchors"]) // 2, "strategy": "patch", "loss": 3.4, "stderr": 0.1, "tokens": 100, "dataset": "words"}]
    (tmp_path / "chain/chain.json").write_text(json.dumps(values))
    manifest = Chain.from_pretrained(tmp_path / "chain").manifest
    assert Chord.of(manifest, manifest.links[0]).losses == (4.0, 3.0)


def curve(segment, **losses):
    low, high = segment.sizes
    points = [
        CurvePoint(size=round(low + share * (high - low)), strategy=strategy, loss=loss, tokens=1, dataset="x")
        for strategy, row in losses.items() for share, loss in zip((0.25, 0.5, 0.75), row)
    ]
    return dataclasses.replace(segment, curve=tuple(points))


def at(segment, share):
    low, high = segment.sizes
    return round(low + share * (high - low))


def test_auto_is_the_lower_curve_between_its_points():
    _, _, segment = pair("llama", small=(2, 32), large=(12, 32))
    measured = curve(segment, blend=(4.0, 3.9, 3.0), patch=(4.5, 3.5, 3.4))
    for share in np.linspace(0.01, 0.99, 29):
        plan = segment_plan(measured, at(segment, share), ends=(5.0, 2.0), tolerance=0.5)
        if plan.strategy == "anchor":
            continue
        others = [segment_plan(measured, plan.parameters, ends=(5.0, 2.0), strategy=name, tolerance=0.5).expected for name in ("blend", "patch")]
        assert plan.expected == min(others)
    assert segment_plan(measured, at(segment, 0.3), ends=(5.0, 2.0)).strategy == "blend"
    assert segment_plan(measured, at(segment, 0.5), ends=(5.0, 2.0)).strategy == "patch"


@pytest.mark.parametrize("replicate", [False, True])
def test_a_size_never_loses_to_the_smaller_neighbour(family, replicate):
    """Where every strategy measured worse, auto computes what the smaller neighbour computes, and says so."""
    small, large, segment = pair(family)
    segment = curve(dataclasses.replace(segment, blend=dataclasses.replace(segment).blend.model_copy(update={"replicate": replicate})), blend=(6.0, 5.5, 3.1))
    size = at(segment, 0.4)
    plan = segment_plan(segment, size, ends=(5.0, 3.0))
    assert plan.expected == 5.0
    assert "padded" in plan.trough
    assert abs(plan.parameters - size) <= 0.02 * size
    ids = torch.randint(4, 260, (2, 9))
    torch.testing.assert_close(Between({"s": small, "l": large}).run(plan)(ids).hidden, ModelRunner(small)(ids).hidden, rtol=1e-4, atol=1e-5)
    assert "more than the smaller s" in segment_plan(segment, size, ends=(5.0, 3.0), strategy="blend").trough
    assert segment_plan(segment, at(segment, 0.9), ends=(5.0, 3.0)).trough is None


def test_a_trough_is_above_the_smaller_neighbour_or_the_chord():
    chord = Chord("s", "l", (100, 400), (4.0, 3.0))
    assert chord.at(200) == pytest.approx(3.5)
    assert chord.trough(200, 3.54) is None
    assert "0.060 above" in chord.trough(200, 3.56)
    assert "smaller s" in chord.trough(200, 4.01)
    assert "lose 4.000 nats per token, 0.0001 more than the smaller s" in chord.trough(200, 4.0001)
    assert chord.trough(200, None) is None
    blind = Chord("s", "l", (100, 400), (None, 3.0))
    assert blind.at(200) is None
    assert blind.trough(200, 9.0) is None


def test_a_chain_recommends_what_is_no_trough(cbd, tmp_path, caplog):
    """Untrained neighbours sag: their sizes are warned of in the plan and on the card, and are not recommended."""
    folders = [tiny.save(tiny.llama(layers=layers, seed=seed), tmp_path / f"m{seed}") for layers, seed in ((4, 0), (2, 1))]
    chain = assemble_chain(folders, tmp_path / "chain", calibration=tiny.texts(8))
    (link,) = chain.manifest.links
    chord = Chord.of(chain.manifest, link)
    assert None not in chord.losses
    best = {size: min(point.loss for point in link.curve if point.size == size) for size in {point.size for point in link.curve}}
    assert set(link.recommended_sizes) == {size for size, loss in best.items() if chord.trough(size, loss) is None}
    data = json.loads((tmp_path / "chain" / "chain.json").read_text())
    for point in data["links"][0]["curve"]:
        point["loss"] = chord.losses[0] + 1
    data["links"][0]["recommended_sizes"] = []
    (tmp_path / "chain" / "chain.json").write_text(json.dumps(data))
    size = sum(anchor.parameters for anchor in chain.anchors) // 2
    code, printed, said = cbd("plan", tmp_path / "chain", "--size", size, "--tolerance", 0.2)
    assert (code, said.count("\n")) == (0, 1)
    assert said.startswith("warning: ")
    assert f"{chord.losses[0]:.3f} nats per token" in printed
    for number, act in enumerate((
        lambda: CBDModel.plan(tmp_path / "chain", size, tolerance=0.2), lambda: CBDModel.from_chain(tmp_path / "chain", size, tolerance=0.2),
        lambda: CBDModel.materialize(tmp_path / "chain", size, tolerance=0.2, output_dir=tmp_path / "made"),
    )):
        caplog.clear()
        act()
        assert [record.getMessage() for record in caplog.records if record.name == "cbd_hub.plans"] == [said.removeprefix("warning: ").strip()], number
    assert cbd("make", tmp_path / "chain", "--size", size, "--tolerance", 0.2, "--out", tmp_path / "again")[2].startswith(said)
    assert "Note: " in chain_card(Chain.from_pretrained(tmp_path / "chain").manifest)


AXES = st.tuples(st.integers(2, 40), st.integers(2, 24), st.integers(8, 64))  # layers, widths in steps of 64
KINDS = {"ffn": 0.002, "hidden": 0.01, "heads": 0.002}


def configs_of(kind, axes, group, tied):
    """A config: of the FFN alone (llama), of hidden width alone (llama), or of hidden width, heads and FFN together (GPT-2)."""
    layers, width, ffn = axes
    if kind == "heads":
        return GPT2Config(n_layer=layers, n_head=width, n_embd=64 * width, tie_word_embeddings=tied)
    return LlamaConfig(
        vocab_size=32000, num_hidden_layers=layers, hidden_size=64 * width if kind == "hidden" else 1024, num_attention_heads=2 * group,
        num_key_value_heads=2, head_dim=64, intermediate_size=64 * ffn if kind == "ffn" else 2048, tie_word_embeddings=tied,
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(first=AXES, second=AXES, group=st.sampled_from([1, 2, 4]), tied=st.booleans(), kind=st.sampled_from(sorted(KINDS)), share=st.floats(0.01, 0.99))
def test_any_size_is_realised(first, second, group, tied, kind, share):
    """Within 0.2% where the FFN moves, by a tenth and more; within 1% where hidden width does and the FFN does not; whatever else moves."""
    small, large = (configs_of(kind, tuple(map(pick, zip(first, second))), group, tied) for pick in (min, max))
    low, high = shape_of(small), shape_of(large)
    if kind == "heads":  # as published models are: a step of a head is bridged by the range of the FFN
        assume(low.layers >= 8 and low.heads >= 6 and high.hidden >= 1.25 * low.hidden)
    assume(low.ffn <= 0.9 * high.ffn if kind == "ffn" else low.hidden < high.hidden)
    sizes = count(low, small), count(high, large)
    size = round(sizes[0] + share * (sizes[1] - sizes[0]))
    shape = shape_between(size, low, high, large)
    assert abs(count(shape, large) - size) <= KINDS[kind] * size, (low, high, size, shape)
    for axis in ("layers", "hidden", "heads", "kv_heads", "ffn"):
        assert getattr(low, axis) <= getattr(shape, axis) <= getattr(high, axis)


@pytest.fixture
def gpt2_chain(tmp_path):
    """A chain of the published GPT-2 shapes without any weights: all that a plan needs."""
    anchors = []
    for layers, hidden in ((36, 1280), (24, 1024), (12, 768)):
        config = GPT2Config(n_layer=layers, n_embd=hidden, n_head=hidden // 64, architectures=["GPT2LMHeadModel"])
        folder = tmp_path / "anchors" / f"{layers}"
        config.save_pretrained(folder)
        path = folder / "config.json"
        anchors.append(Anchor(
            name=f"a{layers}", parameters=count(shape_of(config), config), shape=shape_of(config), family="gpt2", origin="published",
            location=Location(repo_id=".", subfolder=f"anchors/{layers}"), files={"config.json": FileRecord(sha256=sha256(path), bytes=path.stat().st_size)},
        ))
    links = []
    for large, small in itertools.pairwise(anchors):
        held = np.rint(np.linspace(0, large.shape.layers - 1, small.shape.layers)).astype(int)
        order = sorted(set(range(large.shape.layers)) - set(held.tolist()))
        links.append(Link(kind="segment", small=small.name, large=large.name, order=order[::-1]))
    (tmp_path / "chain.json").write_text(Manifest(name="gpt2", created_with="test", anchors=anchors, links=links).to_json())
    return tmp_path


@pytest.mark.parametrize(("layers", "hidden", "size"), [(14, 768, "138.6M"), (18, 896, "219.6M"), (24, 896, "277.4M"), (26, 1024, "380.0M"), (30, 1152, "537.3M")])
def test_the_paper_s_targets_come_out(cbd, gpt2_chain, layers, hidden, size):
    """Layers and hidden width are enough: heads and FFN follow the hidden width (paper, Table 2)."""
    plan = CBDModel.plan(gpt2_chain, shape={"layers": layers, "hidden": hidden})
    assert f"{plan.parameters / 1e6:.1f}M" == size
    assert (plan.shape.heads, plan.shape.ffn) == (hidden // 64, 4 * hidden)
    code, printed, _ = cbd("plan", gpt2_chain, "--shape", f"layers={layers},hidden={hidden}", "--json")
    assert code == 0
    assert json.loads(printed)["parameters"] == plan.parameters


@pytest.mark.parametrize("tied", [True, False])
def test_a_patch_has_the_size_that_was_asked_for(tied, tmp_path):
    """A tied embedding counts once, an untied head of its own."""
    folders = [tiny.save(tiny.llama(layers=layers, tied=tied, seed=layers), tmp_path / f"m{layers}") for layers in (6, 2)]
    chain = assemble_chain(folders, tmp_path / "chain")
    large, small = (anchor.parameters for anchor in chain.anchors)
    for back in (1, 2, 3):
        size = small + back * (large - small) // 4
        model = chain.model(size, strategy="patch")
        assert model.num_parameters() == sum({id(p): p.numel() for p in model.parameters()}.values()) == size
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
