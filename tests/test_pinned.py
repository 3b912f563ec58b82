"""What formulas say at values where a slip would show: sides told apart, weights unlike 1, an eps on either side."""

import copy
import dataclasses

import numpy as np
import pytest
import tiny
import torch
from test_align import two
from test_distill import trainer_for
from test_every_family import IDS, NO_GAIN, logits, pair, shape_in
from test_interpolation import pair as segment_of
from test_losses import reference, tensors
from test_reconstruct import cut_of, documents, seen

from cbd_hub.errors import ManifestError
from cbd_hub.evaluation import Documents, Losses
from cbd_hub.families import family_of
from cbd_hub.interpolation.align import fit, segment_with
from cbd_hub.interpolation.blend import blend_plan
from cbd_hub.interpolation.curve import last_loss
from cbd_hub.interpolation.execute import materialise
from cbd_hub.interpolation.fitting import Fit, shared_activations
from cbd_hub.interpolation.live import Between
from cbd_hub.interpolation.patch import patch_plan
from cbd_hub.interpolation.plan import Term, Turn, small_eps
from cbd_hub.interpolation.planner import expected_loss, segment_plan
from cbd_hub.losses.bridge import shared_loss
from cbd_hub.losses.divergence import jensen_shannon, skew_kl
from cbd_hub.losses.head import Listed, distillation_loss
from cbd_hub.losses.policy import minillm_loss
from cbd_hub.manifest import CurvePoint, Evaluation, Mix
from cbd_hub.reconstruct import reconstruct
from cbd_hub.shapes import other_differences, shape_of
from cbd_hub.weights import weights_sha256


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- losses --------------------------------------------------------------------------------------------------------------------


def test_the_heads_of_both_sides_have_their_own_bias_scale_and_softcap():
    hidden, weight, their_hidden, their_weight, labels = tensors(3)
    bias, their_bias = normal(37, seed=1), normal(37, seed=2)
    found = distillation_loss(
        hidden, weight, their_hidden, their_weight, labels.clamp(min=0), student_bias=bias, teacher_bias=their_bias, student_logit_scale=0.7, teacher_logit_scale=1.3, student_softcap=5.0, teacher_softcap=2.0
    )
    ours = 5 * torch.tanh((hidden @ weight.T + bias) * 0.7 / 5)
    theirs = 2 * torch.tanh((their_hidden @ their_weight.T + their_bias) * 1.3 / 2)
    torch.testing.assert_close(found, reference("forward_kl", ours, theirs, 1.0).mean())


def test_across_a_bridge_the_teachers_bias_and_scale_count():
    hidden, weight, their_hidden, their_weight, their_bias = normal(9, 6), normal(31, 6, seed=1), normal(9, 4, seed=2), normal(23, 4, seed=3), normal(23, seed=4)
    shared = torch.stack([torch.arange(12), torch.arange(12)], 1)
    found = shared_loss(hidden, weight, their_hidden, their_weight, shared, teacher_bias=their_bias, teacher_logit_scale=0.5)
    theirs, ours = ((their_hidden @ their_weight.T + their_bias) * 0.5).softmax(-1), (hidden @ weight.T).softmax(-1)
    theirs, ours = (torch.cat([probs[:, :12], 1 - probs[:, :12].sum(-1, keepdim=True)], -1) for probs in (theirs, ours))
    torch.testing.assert_close(found, (theirs * (theirs / ours).log()).sum() / 9)


def test_minillm_reads_the_students_head_as_it_is():
    hidden, weight, their_hidden, their_weight, bias = normal(9, 6), normal(31, 6, seed=1), normal(9, 4, seed=2), normal(31, 4, seed=3), normal(31, seed=4)
    labels, sampled, advantage = torch.arange(9), -normal(9, seed=5).abs() - 1, normal(9, seed=6)
    found = minillm_loss(hidden, weight, their_hidden, their_weight, labels, sampled, advantage, student_bias=bias, student_logit_scale=0.7, student_softcap=3.0)
    ours = (3 * torch.tanh((hidden @ weight.T + bias) * 0.7 / 3)).log_softmax(-1)
    theirs = (their_hidden @ their_weight.T).log_softmax(-1)
    ratio = (ours[torch.arange(9), labels] - sampled).exp()
    expected = ((ours.exp() * (ours - theirs)).sum(-1) - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)).mean()
    torch.testing.assert_close(found, expected)


def test_listed_tokens_of_more_than_all_mass_leave_none_to_the_others():
    """As rounding may give them."""
    top = Listed(torch.tensor([[0, 1]]), torch.tensor([[0.5005, 0.5005]]).double().log(), torch.tensor([[2]]), torch.tensor([[-30.0]]).double())
    found = distillation_loss(torch.zeros(1, 4, dtype=torch.float64), torch.zeros(8, 4, dtype=torch.float64), None, None, torch.tensor([0]), teacher_top=top)
    torch.testing.assert_close(found, (top.log_probs.exp() * (top.log_probs + np.log(8))).sum())


@pytest.mark.parametrize(("name", "more", "formula"), [("jensen_shannon", {"beta": 0.2}, jensen_shannon), ("skew_kl", {"skew": 0.4}, skew_kl)])
def test_the_trainer_hands_on_beta_and_skew(tmp_path, name, more, formula):
    trainer = trainer_for("llama", tmp_path, divergence=name, **more)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    trainer.model.eval()
    ours, theirs = (model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double() for model in (trainer.model, trainer.teacher))
    expected = formula(ours, theirs, batch["labels"][:, 1:] != -100, **more)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch).double(), expected, rtol=1e-4, atol=1e-6)


def test_a_share_of_the_steps_is_on_the_path_and_the_seed_says_which(tmp_path):
    trainer = trainer_for("llama", tmp_path, path_fraction=0.3)
    drawn = []
    for trainer.args.seed in (0, 1):
        steps = []
        for trainer.state.global_step in range(80):
            steps.append(trainer._path_plan() is not None)
        drawn.append(steps)
    assert all(10 <= sum(steps) <= 40 for steps in drawn)
    assert drawn[0] != drawn[1]


# -- sizes in between ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "olmo2"])
def test_neighbours_of_unlike_eps_keep_each_its_own(name):
    models, field = [], None
    small, large, segment = pair(name, 1)
    for model, eps in ((small, 2e-2), (large, 1e-3)):
        field = family_of(model.config).norm_eps
        made = type(model)(type(model.config).from_dict({**model.config.to_dict(), field: eps})).eval()
        made.load_state_dict(model.state_dict())
        models.append(made)
    small, large = models
    segment = dataclasses.replace(segment, config=large.config, small_eps=small_eps(small.config, large.config))
    plan = blend_plan(segment, shape_in(name, segment, 3, 3, 1, 32, 40), NO_GAIN)
    torch.testing.assert_close(logits(Between({"s": small, "l": large}).run(plan)(IDS)), small(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_runner_that_has_run_one_eps_runs_another():
    small, large, segment = pair("llama", 1, rms_norm_eps=1e-2)
    shape, between = shape_in("llama", segment, 3, 3, 1, 32, 40), Between({"s": small, "l": large})
    plans = [blend_plan(segment, shape, Mix(alpha=alpha)) for alpha in (1.0, 0.0)]
    assert plans[0].eps != plans[1].eps
    for plan in plans:
        torch.testing.assert_close(between.run(plan)(IDS).hidden, Between({"s": small, "l": large}).run(plan)(IDS).hidden, rtol=0, atol=0)


def test_a_patch_of_aligned_strangers_holds_the_smaller_ones_layers():
    small, large = tiny.llama(layers=2, tied=False, seed=5), tiny.llama(tied=False, seed=6)
    segment = dataclasses.replace(segment_with(fit(small, large), small, large), patch=True)
    plan = patch_plan(segment, segment.small_shape.model_copy(update={"layers": 3}))
    anchors = {name: {term.anchor for term in terms} for name, terms in plan.tensors.items()}
    assert anchors["model.embed_tokens.weight"] == {"small"}
    assert sorted(min(found) for name, found in anchors.items() if "q_proj" in name) == ["large", "large", "small"], "a block of the smaller one goes where the run that it stands for comes back"


def measured(strategy, share):
    """A segment with one measured point, that share of the way up in the logarithm of the size."""
    _, _, segment = segment_of("llama", small=(2, 32), large=(12, 32))
    low, high = segment.sizes
    return dataclasses.replace(segment, curve=(CurvePoint(size=round(low ** (1 - share) * high**share), strategy=strategy, loss=3.0, tokens=1, dataset="x"),))


def test_the_expected_loss_is_linear_in_the_logarithm_of_the_size():
    segment = measured("blend", 0.5)
    low, high = segment.sizes
    sizes = round(low**0.75 * high**0.25), round(low**0.25 * high**0.75)
    assert [expected_loss(segment, size, "blend", (4.0, 1.0)) for size in sizes] == pytest.approx([3.5, 2.0], abs=1e-3)


def test_a_shape_that_is_asked_for_has_no_expected_loss():
    assert segment_plan(measured("patch", 0.5), 1, shape={"layers": 7}, ends=(4.0, 2.0)).expected is None


def test_of_several_losses_on_one_text_the_latest_counts():
    assert last_loss([Evaluation(loss=loss, tokens=1, dataset="x") for loss in (3.0, 2.0)], "x") == 2.0


def test_bf16_weights_are_turned_in_fp32_and_rounded_once():
    weight = normal(64, 16).bfloat16()
    turn = torch.linalg.qr(normal(16, 16, seed=1))[0].float()
    found = materialise((Term("a", "w", 1.0, turns=(Turn(1, turn[None]),)),), lambda *_: weight, (64, 16), torch.bfloat16)
    expected = (weight.double() @ turn.double().T).float().bfloat16()
    assert (found != expected).float().mean() < 0.02


# -- alignment and reconstruction ------------------------------------------------------------------------------------------------


def test_neurons_come_by_norm_and_directions_by_strength():
    model = tiny.llama(tied=False, seed=3)
    norms = model.model.layers[0].mlp.down_proj.weight.norm(dim=0)
    assert (norms[torch.from_numpy(Fit(model, model, None, None).order.ffn[0])].diff() <= 0).all()
    small, large = two("llama", tied=False)
    rest = large.get_input_embeddings().weight.detach() @ fit(small, large).maps.rotation[:, small.config.hidden_size :]
    energy = rest.square().sum(0)
    assert (energy.diff() <= 1e-4 * energy.max()).all()


def test_activations_count_beside_weights():
    small, large = tiny.llama(layers=3, seed=5), tiny.llama(layers=3, seed=6)
    ids = [torch.randint(4, 260, (16,), generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    with torch.no_grad():
        ours, theirs = found = shared_activations(small, large, ids)
        plain, both = Fit(small, large, None, "permutation"), Fit(small, large, found, "permutation")
        states = [f"state.{layer}" for layer in range(3)]
        beside = sum(theirs[name].T @ ours[name] / (ours[name].norm() * theirs[name].norm()) for name in states)
        torch.testing.assert_close(both._stream_cross(), plain._stream_cross() + beside)
        for part in ("o", "q"):
            assert not torch.equal(both._head_cross(0, 0)[part], plain._head_cross(0, 0)[part])


def test_a_gain_of_nothing_is_refused():
    """Gains are divided by."""
    small, large = two("llama", tied=False)
    maps = fit(small, large).maps
    name = next(iter(maps.large_gains))
    gain = maps.large_gains[name].clone()
    gain[0] = 0
    with pytest.raises(ManifestError):
        dataclasses.replace(maps, large_gains={**maps.large_gains, name: gain}).check(shape_of(small.config), shape_of(large.config), large.config)


def test_a_narrower_stream_is_fitted_at_its_own_scale():
    whole = tiny.opt(layers=3, hidden=48, heads=6, ffn=48).eval()
    cut, plan = cut_of(whole, hidden=24, heads=3, kv_heads=3)
    fitted = copy.deepcopy(cut)
    reconstruct(fitted, whole, plan, documents(400), bf16=False)
    term = plan.tensors[next(name for name in plan.tensors if name.endswith("layers.2.fc2.weight"))][0]
    channels = torch.from_numpy(next(take.index for take in term.takes if take.dim == 0))
    wanted = term.weight * seen(whole, documents(), 2)[2][:, channels]
    before, after = (float(((wanted - seen(model, documents(), 2)[2]) ** 2).sum()) for model in (cut, fitted))
    assert term.weight != 1
    assert after < 0.5 * before


# -- what is counted -------------------------------------------------------------------------------------------------------------


def test_a_difference_weighs_each_of_the_others():
    tokens = np.array([10, 20, 30])
    ours, small, large = (Losses(np.array(nats), tokens) for nats in ([10.0, 30, 70], [8.0, 20, 60], [4.0, 10, 30]))
    assert ours.minus((0.25, small), (0.75, large))[0] == pytest.approx((ours.nats - 0.25 * small.nats - 0.75 * large.nats).sum() / 60)


def test_as_many_documents_as_fit_and_as_many_as_are_needed():
    found = Documents((torch.full((8,), 5),) * 4, (8,) * 4)
    assert (len(found.first(16).ids), len(found.after(16).ids)) == (2, 2)
    tokenizer = tiny.tokenizer()
    each = len(tokenizer("a" * 9).input_ids) - 1
    assert Documents.read(["a" * 9] * 5, tokenizer, 64, max_tokens=2 * each + 1).tokens == 3 * each


def test_dropout_is_no_difference_between_anchors():
    first, second = tiny.gpt2().config, tiny.gpt2().config
    second.attn_pdrop = 0.1
    assert other_differences(first, second) == []


def test_a_fingerprint_of_weights_knows_their_shapes():
    class Model:
        def __init__(self, *shape):
            self.shape = shape

        def state_dict(self):
            return {"w": torch.arange(6.0).view(*self.shape)}

    assert weights_sha256(Model(2, 3)) != weights_sha256(Model(3, 2))
