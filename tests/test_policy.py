"""MiniLLM's formulas against slow loops in float64, in value and gradient, and against the objective they stand for."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbd_hub.errors import ArgumentError, VocabularyMismatchError
from cbd_hub.losses import log_probs
from cbd_hub.losses.log_probs import chosen_log_probs
from cbd_hub.losses.policy import clipped_surrogate, length_normalised, minillm_loss, rewards_to_go


def loop_rewards(rewards, keep, normalise):
    out = torch.zeros_like(rewards)
    for b, t in itertools.product(range(rewards.shape[0]), range(rewards.shape[1])):
        later = [rewards[b, u] for u in range(t + 1, rewards.shape[1]) if keep[b, u]]
        if keep[b, t] and later:
            out[b, t] = sum(later) / (len(later) if normalise else 1)
    return out


def loop_surrogate(log_probs, sample, advantages, keep, clip):
    total, count = 0 * log_probs.sum(), 0
    for index in range(len(log_probs)):
        if keep[index]:
            ratio = torch.exp(log_probs[index] - sample[index])
            clipped = min(max(ratio, torch.tensor(1 - clip)), torch.tensor(1 + clip))
            total = total - min(ratio * advantages[index], clipped * advantages[index])
            count += 1
    return total / max(count, 1)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), rows=st.integers(1, 4), length=st.integers(1, 7), normalise=st.booleans())
def test_rewards_to_go_are_the_loops(seed, rows, length, normalise):
    rewards, keep = drawn(seed, rows, length), drawn(seed + 1, rows, length) > -0.5
    rewards[~keep] = float("nan")  # what is not kept may be anything
    sums = rewards_to_go(rewards, keep)
    got = length_normalised(sums, keep) if normalise else sums
    torch.testing.assert_close(got, loop_rewards(rewards, keep, normalise))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), count=st.integers(1, 12), clip=st.sampled_from([0.1, 0.2, 0.5]))
def test_clipped_surrogate_is_the_loop_in_value_and_gradient(seed, count, clip):
    log_probs = (0.5 * drawn(seed, count) - 2).requires_grad_()
    sample, advantages, keep = log_probs.detach() + 0.4 * drawn(seed + 1, count), drawn(seed + 2, count), drawn(seed + 3, count) > -0.7
    got = clipped_surrogate(log_probs, sample, advantages, keep, clip)
    want = loop_surrogate(log_probs, sample, advantages, keep, clip)
    torch.testing.assert_close(got, want)
    slopes = [torch.autograd.grad(value, log_probs)[0] for value in (got, want)]
    torch.testing.assert_close(*slopes)


def test_the_clip_stops_the_gradient_only_where_it_goes_further():
    """Above the band a good token has no more pull, a bad one still has; below it is the other way round."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    clipped_surrogate(ratio.log(), torch.zeros(4), advantages, torch.ones(4, dtype=torch.bool)).backward()
    assert (ratio.grad != 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize("value", [0.0, 1.0, -0.2])
def test_ratio_clip_outside_its_range_is_refused(value):
    with pytest.raises(ArgumentError, match="ratio_clip=.*outside"):
        clipped_surrogate(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.ones(1, dtype=torch.bool), value)


def dense(hidden, head, labels, scale, cap, bias):
    logits = (hidden.double() @ head.double().T + (0 if bias is None else bias.double())) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), rows=st.integers(1, 9), vocab=st.integers(2, 40), scale=st.sampled_from([1.0, 0.5]), cap=st.sampled_from([None, 3.0]), biased=st.booleans(), block=st.integers(1, 4))
def test_chosen_log_probs_are_the_dense_ones_in_value_and_gradient(seed, rows, vocab, scale, cap, biased, block):
    """Whatever the block, with a weight of its own on every row."""
    hidden, head, bias = (drawn(seed + i, *shape).float().requires_grad_() for i, shape in enumerate([(rows, 6), (vocab, 6), (vocab,)]))
    labels = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    weights = drawn(seed + 5, rows)
    inputs = (hidden, head, bias) if biased else (hidden, head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_probs, "block_rows", lambda device: block)
        got = chosen_log_probs(hidden, head, labels, bias=bias if biased else None, logit_scale=scale, softcap=cap)
        slopes = torch.autograd.grad((got * weights).sum(), inputs)
    want = dense(hidden, head, labels, scale, cap, bias if biased else None)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(slopes, torch.autograd.grad((want * weights).sum(), inputs)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_padded_rows_of_the_head_are_left_out():
    hidden, head, labels = drawn(0, 5, 4).requires_grad_(), drawn(1, 12, 4).requires_grad_(), torch.tensor([0, 1, 2, 8, 9])
    got = chosen_log_probs(hidden, head, labels, vocab_size=10)
    torch.testing.assert_close(got, dense(hidden, head[:10], labels, 1.0, None, None))
    got.sum().backward()
    assert not head.grad[10:].any()
    with pytest.raises(VocabularyMismatchError, match="to 9 but the vocabulary has 9"):
        chosen_log_probs(hidden, head, labels, vocab_size=9)


def test_minillm_loss_is_the_dense_reference_in_value_and_gradient():
    """Single-step and long term spelt out by loops on full distributions."""
    rows, vocab = 9, 13
    hidden, head, theirs, their_head = (drawn(i, *shape) for i, shape in enumerate([(rows, 5), (vocab, 5), (rows, 7), (vocab, 7)]))
    hidden.requires_grad_()
    head.requires_grad_()
    labels = torch.tensor([3, -100, 0, 12, 5, -100, 7, 7, 1])
    sample, advantages = -drawn(4, rows).abs() - 1, drawn(5, rows)
    got = minillm_loss(hidden, head, theirs, their_head, labels, sample, advantages, ratio_clip=0.2, num_items=11)
    total = 0.0
    for n in range(rows):
        if labels[n] == -100:
            continue
        q, p = (hidden[n] @ head.T).log_softmax(-1), (theirs[n] @ their_head.T).log_softmax(-1)
        for v in range(vocab):
            total = total + q[v].exp() * (q[v] - p[v])
        total = total + loop_surrogate(q[labels[n], None], sample[n, None], advantages[n, None], [True], 0.2)
    want = total / 11
    torch.testing.assert_close(got, want)
    for mine, reference in zip(torch.autograd.grad(got, (hidden, head)), torch.autograd.grad(want, (hidden, head))):
        torch.testing.assert_close(mine, reference)


def test_no_teacher_gradient_and_zero_when_nothing_is_kept():
    hidden, head = drawn(0, 2, 3).requires_grad_(), drawn(1, 4, 3).requires_grad_()
    theirs = drawn(2, 2, 3).requires_grad_()
    nothing = minillm_loss(hidden, head, theirs, head.detach(), torch.tensor([-100, -100]), torch.zeros(2), torch.zeros(2))
    assert nothing.item() == 0.0
    nothing.backward()
    minillm_loss(hidden, head, theirs, head.detach(), torch.tensor([1, 2]), torch.zeros(2), torch.ones(2)).backward()
    assert theirs.grad is None


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_expected_gradient_is_that_of_the_reverse_kl_of_whole_sequences(share):
    """Over all sequences of two tokens of three: exact for the student's own samples, and nearly so for the mixture, whose weights are per token."""
    vocab, length = 3, 2
    tables = [drawn(i, 1 + vocab, vocab) for i in (0, 1)]  # logits of the first token, and of the second given the first
    student = tables[0].requires_grad_()
    q, p = student.log_softmax(-1), tables[1].log_softmax(-1)
    expected, objective = torch.zeros_like(student), torch.zeros((), dtype=torch.float64)
    identity = torch.eye(1 + vocab, dtype=torch.float64)
    for tokens in itertools.product(range(vocab), repeat=length):
        states = [0, 1 + tokens[0]]
        log_q, log_p = (torch.stack([table[s, y] for s, y in zip(states, tokens)]) for table in (q, p))
        mixed = torch.logaddexp(log_p + math.log(share), log_q.detach() + math.log1p(-share)) if share else log_q.detach()
        objective = objective + log_q.sum().exp() * (log_q - log_p).sum()
        advantages = rewards_to_go((log_p - log_q).detach()[None], torch.ones(1, length, dtype=torch.bool))[0]
        # A student whose hidden state is its state's number: the head's columns are its logits.
        loss = minillm_loss(
            identity[states], student.T, identity[states], tables[1].T, torch.tensor(tokens), mixed, advantages, ratio_clip=0.9, num_items=1
        )
        expected += mixed.sum().exp().detach() * torch.autograd.grad(loss, student)[0]
    (wanted,) = torch.autograd.grad(objective, student)
    if share:
        assert torch.nn.functional.cosine_similarity(expected.flatten(), wanted.flatten(), dim=0) > 0.95
    else:
        torch.testing.assert_close(expected, wanted)
