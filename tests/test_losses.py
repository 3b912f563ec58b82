"""Losses against a dense float64 reference, in value and gradient; only kept tokens count; only the student learns."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cbd_hub.errors import ArgumentError, VocabularyMismatchError
from cbd_hub.losses import blocks, divergence
from cbd_hub.losses.divergence import DIVERGENCES
from cbd_hub.losses.head import distillation_loss
from cbd_hub.losses.hidden import LeastSquares, hidden_loss
from cbd_hub.losses.log_probs import token_losses


def reference(name, student, teacher, temperature, beta=0.5, skew=0.1):
    """The divergence of one row by its definition, in probabilities."""
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    if name == "forward_kl":
        value = kl(p, q)
    elif name == "reverse_kl":
        value = kl(q, p)
    elif name == "jensen_shannon":
        m = beta * p + (1 - beta) * q
        value = beta * kl(p, m) + (1 - beta) * kl(q, m)
    else:
        value = kl(p, skew * p + (1 - skew) * q)
    return temperature**2 * value


def tensors(seed, rows=13, vocab=37, hidden=7, teacher_hidden=5, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)

    def made(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, vocab, (rows,), generator=draw)
    labels[torch.rand(rows, generator=draw) < 0.3] = -100
    return made(rows, hidden), made(vocab, hidden), made(rows, teacher_hidden), made(vocab, teacher_hidden), labels


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_divergences_are_their_definitions(name, temperature):
    student, teacher = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 11, dtype=torch.float64)
    keep = torch.rand(2, 5) < 0.6
    value = getattr(divergence, name)(student, teacher, keep, temperature)
    expected = reference(name, student, teacher, temperature)[keep].mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (value, expected)))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_is_zero_for_equal_models_and_when_nothing_is_kept(name):
    logits = torch.randn(2, 3, 5, requires_grad=True)
    assert getattr(divergence, name)(logits, logits.detach(), torch.ones(2, 3, dtype=torch.bool)).abs() < 1e-6
    empty = getattr(divergence, name)(logits, torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.bool))
    empty.backward()
    assert empty == 0
    assert not logits.grad.any()


def test_jensen_shannon_direction_and_skew_bound():
    """beta weighs the teacher; skew_kl never exceeds -log(skew)."""
    student, teacher = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    keep = torch.tensor([[True]])
    near_one = divergence.jensen_shannon(student, teacher, keep, beta=0.999) / 0.001
    torch.testing.assert_close(near_one, divergence.reverse_kl(student, teacher, keep), rtol=0.02, atol=0)
    near_zero = divergence.jensen_shannon(student, teacher, keep, beta=0.001) / 0.001
    torch.testing.assert_close(near_zero, divergence.forward_kl(student, teacher, keep), rtol=0.02, atol=0)
    far = 40 * student
    for skew in (0.1, 0.5):
        assert 0.9 * -math.log(skew) < divergence.skew_kl(far, -far, keep, skew=skew) <= -math.log(skew) + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(DIVERGENCES), seed=st.integers(0, 10**6), temperature=st.sampled_from([0.5, 1.0, 2.0]),
    weights=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)]), beta=st.floats(0.1, 0.9), bias=st.booleans(),
    cap=st.sampled_from([None, 4.0]), scale=st.sampled_from([1.0, 0.3]), chunk=st.sampled_from([37, 150, 10**6]), cut=st.sampled_from([None, 31]),
)
def test_head_loss_is_the_dense_reference_in_value_and_gradient(name, seed, temperature, weights, beta, bias, cap, scale, chunk, cut):
    hidden, head, teacher_hidden, teacher_head, labels = tensors(seed)
    labels = torch.where(labels >= (cut or 37), 0, labels)
    offset = torch.randn(37, dtype=torch.float64, requires_grad=True)
    leaves = [hidden.requires_grad_(), head.requires_grad_(), *([offset] if bias else [])]
    kd, ce = weights
    old = blocks._BLOCK_ROWS, blocks._AT_ONCE
    blocks._BLOCK_ROWS, blocks._AT_ONCE = {"cpu": max(1, chunk // 37)}, {"cpu": chunk // 2}
    try:
        value = distillation_loss(
            hidden, head, teacher_hidden, teacher_head, labels, divergence=name, temperature=temperature, beta=beta, skew=beta, kd_weight=kd,
            ce_weight=ce, num_items=17, vocab_size=cut, student_bias=offset if bias else None, student_logit_scale=scale,
            student_softcap=cap, teacher_softcap=cap, teacher_logit_scale=scale,
        )
    finally:
        blocks._BLOCK_ROWS, blocks._AT_ONCE = old

    def logits(states, matrix, add):
        raw = (states @ matrix.T + add) * scale
        return (raw if cap is None else cap * torch.tanh(raw / cap))[:, :cut]

    ours = logits(hidden, head, offset if bias else 0)
    theirs = logits(teacher_hidden, teacher_head, 0)
    keep = labels != -100
    expected = kd * reference(name, ours, theirs, temperature, beta, beta)[keep].sum()
    expected = (expected + ce * F.cross_entropy(ours, labels, reduction="sum")) / 17
    torch.testing.assert_close(value, expected)
    for got, want in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("rows", "vocab"), [(240, 40), (241, 40), (481, 40), (613, 2203), (1, 40)])
def test_the_blocks_of_a_call_are_the_dense_reference(rows, vocab):
    """At the sizes that are used: one block exactly, one row more, several with a shorter last one, and few rows at a time within them."""
    hidden, head, teacher_hidden, teacher_head, labels = tensors(rows, rows, vocab)
    labels = labels.clamp(min=0)  # so that all rows count
    leaves = [hidden.requires_grad_(), head.requires_grad_(), torch.randn(vocab, dtype=torch.float64, requires_grad=True)]
    assert blocks._BLOCK_ROWS["cpu"] == 240
    assert vocab == 40 or blocks._AT_ONCE["cpu"] // vocab < 240
    value = distillation_loss(hidden, head, teacher_hidden, teacher_head, labels, ce_weight=0.5, temperature=2.0, student_bias=leaves[2])
    ours = hidden @ head.T + leaves[2]
    expected = reference("forward_kl", ours, teacher_hidden @ teacher_head.T, 2.0).mean() + 0.5 * F.cross_entropy(ours, labels)
    torch.testing.assert_close(value, expected)
    for got, want in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_loss_in_other_dtypes_is_near_the_reference(dtype):
    hidden, head, teacher_hidden, teacher_head, labels = tensors(1, rows=200, vocab=90, hidden=16)
    exact = distillation_loss(hidden, head, teacher_hidden, teacher_head, labels, ce_weight=0.5)
    rounded = distillation_loss(*(tensor.to(dtype) for tensor in (hidden, head, teacher_hidden, teacher_head)), labels, ce_weight=0.5)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol={torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype], atol=0)


def test_head_loss_under_autocast_keeps_fp32_gradients_and_tied_heads():
    embedding = torch.nn.Parameter(torch.randn(50, 16))
    labels = torch.randint(0, 50, (30,))

    def loss():
        hidden = embedding[torch.arange(30)] * 1.5
        return distillation_loss(hidden, embedding, torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), torch.ones(50, 8), labels, ce_weight=1.0)

    exact = torch.autograd.grad(loss(), embedding)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss()
    rounded = torch.autograd.grad(value, embedding)[0]
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_head_loss_without_kept_rows_is_zero_with_a_graph():
    hidden, head, teacher_hidden, teacher_head, labels = tensors(0)
    hidden.requires_grad_()
    value = distillation_loss(hidden, head, teacher_hidden, teacher_head, torch.full_like(labels, -100))
    value.backward()
    assert value == 0
    assert not hidden.grad.any()


def test_dropped_rows_do_not_matter():
    hidden, head, teacher_hidden, teacher_head, labels = tensors(3)
    other = hidden.clone()
    other[labels == -100] = 1e4
    first, second = (distillation_loss(states, head, teacher_hidden, teacher_head, labels) for states in (hidden, other))
    assert first == second


def test_head_loss_refuses_what_cannot_be():
    hidden, head, teacher_hidden, teacher_head, labels = tensors(0)
    with pytest.raises(VocabularyMismatchError, match="37 rows and the teacher's 30"):
        distillation_loss(hidden, head, teacher_hidden, teacher_head[:30], labels)
    with pytest.raises(VocabularyMismatchError, match="label"):
        distillation_loss(hidden, head, teacher_hidden, teacher_head, torch.full_like(labels, 36), vocab_size=20)
    with pytest.raises(ArgumentError, match="divergence='kl'"):
        distillation_loss(hidden, head, teacher_hidden, teacher_head, labels, divergence="kl")
    with pytest.raises(ArgumentError, match="temperature=0"):
        distillation_loss(hidden, head, teacher_hidden, teacher_head, labels, temperature=0)
    with pytest.raises(ArgumentError, match="no teacher"):
        distillation_loss(hidden, head, None, None, labels)
    assert distillation_loss(hidden, head, None, None, labels, kd_weight=0.0, ce_weight=1.0) > 0


def test_token_losses_are_cross_entropy():
    hidden, head, _, _, _ = tensors(2)
    labels = torch.arange(13)
    expected = F.cross_entropy(5 * torch.tanh(hidden @ head.T * 2 / 5), labels, reduction="none")
    torch.testing.assert_close(token_losses(hidden, head, labels, logit_scale=2.0, softcap=5.0), expected)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_hidden_loss_is_its_definition(kind):
    ours = [torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    theirs = [torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(2)]
    keep = torch.tensor([[True, False, True], [True, True, False]])
    total = 0
    for mine, target in zip(ours, theirs):
        for row in keep.nonzero():
            a, b = mine[tuple(row)], target[tuple(row)]
            total += 1 - a @ b / a.norm() / b.norm() if kind == "cosine" else ((a - b) ** 2).mean() / (b**2).mean()
    value = hidden_loss(ours, theirs, keep, kind=kind)
    torch.testing.assert_close(value, total / 2 / 4)
    torch.testing.assert_close(torch.autograd.grad(value, ours), torch.autograd.grad(total / 8, ours))
    with pytest.raises(ArgumentError, match="shapes"):
        hidden_loss(ours, [state[..., :4] for state in theirs], keep)
    with pytest.raises(ArgumentError, match="kind='l1'"):
        hidden_loss(ours, theirs, keep, kind="l1")


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [1, 5, 36])
def test_top_tokens_and_a_bucket_are_the_dense_reference(name, k):
    """The divergence over k + 1 outcomes, with the rest of both distributions as one, in value and gradient."""
    hidden, head, teacher_hidden, teacher_head, labels = tensors(4)
    hidden.requires_grad_()
    head.requires_grad_()
    log_probs, ids = (teacher_hidden @ teacher_head.T).log_softmax(-1).topk(k, dim=-1)
    old = blocks._BLOCK_ROWS, blocks._AT_ONCE
    blocks._BLOCK_ROWS, blocks._AT_ONCE = {"cpu": 4}, {"cpu": 37 * 2}
    try:
        value = distillation_loss(hidden, head, None, None, labels, divergence=name, teacher_top=(ids, log_probs), ce_weight=0.3, num_items=7)
    finally:
        blocks._BLOCK_ROWS, blocks._AT_ONCE = old
    logits = hidden @ head.T
    q, p = logits.softmax(-1).gather(1, ids), log_probs.exp()
    q, p = (torch.cat([part, 1 - part.sum(-1, keepdim=True)], -1) for part in (q, p))
    keep = labels != -100
    expected = (reference(name, q.log(), p.log(), 1.0)[keep].sum() + 0.3 * F.cross_entropy(logits, labels, reduction="sum")) / 7
    torch.testing.assert_close(value, expected)
    for got, want in zip(torch.autograd.grad(value, (hidden, head)), torch.autograd.grad(expected, (hidden, head))):
        torch.testing.assert_close(got, want)
    with pytest.raises(ArgumentError, match="temperature=2"):
        distillation_loss(hidden, head, None, None, labels, teacher_top=(ids, log_probs), temperature=2.0)


def test_least_squares_is_the_minimum_of_the_mse():
    """At the closed-form start no small change of the projector lowers the normalised mse on the same text."""
    draw = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(1, 90, 6, generator=draw, dtype=torch.float64), torch.randn(1, 90, 9, generator=draw, dtype=torch.float64) + 2
    theirs[..., :6] += ours
    fit = LeastSquares(6, 9)
    for start in (0, 40):
        fit.add(ours[0, start : start + 40 if start == 0 else 90], theirs[0, start : start + 40 if start == 0 else 90])
    weight, bias = (tensor.requires_grad_() for tensor in fit.solve())
    keep = torch.ones(1, 90, dtype=torch.bool)
    value = hidden_loss([ours @ weight.t() + bias], [theirs], keep, kind="mse")
    gradients = torch.autograd.grad(value, (weight, bias))
    assert all(gradient.abs().max() < 1e-4 for gradient in gradients)  # the ridge's
    assert value < 0.9 * hidden_loss([bias.expand_as(theirs)], [theirs], keep, kind="mse")
    few = LeastSquares(6, 9)
    few.add(ours[0, :2], theirs[0, :2])
    assert all(torch.isfinite(tensor).all() for tensor in few.solve())


def test_gradients_are_given_away_once():
    hidden, head, teacher_hidden, teacher_head, labels = tensors(0)
    value = distillation_loss(hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head, labels)
    value.backward(retain_graph=True)
    first = head.grad.clone()
    with pytest.raises(RuntimeError, match="compute it anew"):
        value.backward()
    assert torch.equal(head.grad, first)
