"""Losses across vocabularies against dense float64 references; zero for a model bridged to itself; memory that does not know the vocabulary."""

import pytest
import tiny
import tokenizers_for_bridge as kinds
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbd_hub.errors import ArgumentError, VocabularyMismatchError
from cbd_hub.losses import bridge
from cbd_hub.losses.bridge import shared_loss, shared_tokens, span_loss
from cbd_hub.losses.log_probs import chosen_log_probs, token_losses


def reference(ours, our_spans, theirs, their_spans, temperature):
    """Span by span, by the definition."""
    total = 0.0
    for span in range(max(our_spans) + 1):
        p = torch.exp(torch.stack([value for value, number in zip(theirs, their_spans) if number == span]).sum() / temperature)
        q = torch.exp(torch.stack([value for value, number in zip(ours, our_spans) if number == span]).sum() / temperature)
        total = total + temperature * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    return total


def sides(seed=0, spans=5):
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(2):
        counts = torch.randint(1, 4, (spans,), generator=draw)
        numbers = torch.repeat_interleave(torch.arange(spans), counts)
        numbers = torch.cat([torch.tensor([-1]), numbers])
        made += [-3 * torch.rand(len(numbers), generator=draw, dtype=torch.float64) - 0.01, numbers]
    return made


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), spans=st.integers(1, 8), temperature=st.sampled_from([0.5, 1.0, 10.0, 100.0]))
def test_span_loss_is_its_definition(seed, spans, temperature):
    ours, our_spans, theirs, their_spans = sides(seed, spans)
    ours.requires_grad_()
    value = span_loss(ours, our_spans, theirs, their_spans, temperature=temperature, num_items=7)
    expected = reference(ours, our_spans.tolist(), theirs, their_spans.tolist(), temperature) / 7
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(*(torch.autograd.grad(loss, ours)[0] for loss in (value, expected)), rtol=1e-6, atol=1e-9)
    assert value.item() >= 0


def test_the_value_in_the_limit_is_the_one_that_is_stated():
    ours, our_spans, theirs, their_spans = sides()
    a, b = (-torch.zeros(5, dtype=torch.float64).index_add(0, numbers[1:], values[1:]) for values, numbers in ((theirs, their_spans), (ours, our_spans)))
    value = span_loss(ours, our_spans, theirs, their_spans, temperature=1e6, num_items=1)
    torch.testing.assert_close(value, (a * (a / b).log() - a + b).sum(), rtol=1e-4, atol=1e-6)


def test_a_tokenisation_of_one_span_does_not_matter():
    """The likelihood counts and not the number of tokens that it is spread over."""
    one = span_loss(torch.tensor([-2.0]), torch.tensor([0]), torch.tensor([-1.0]), torch.tensor([0]))
    many = span_loss(torch.tensor([-0.5, -1.5]), torch.tensor([0, 0]), torch.tensor([-0.25, -0.25, -0.5]), torch.tensor([0, 0, 0]))
    torch.testing.assert_close(one, many)


def test_sure_spans_and_no_spans_have_finite_gradients():
    for values, spans in ((torch.tensor([0.0, -1e-12, -50.0]), torch.tensor([0, 1, 2])), (torch.tensor([-1.0]), torch.tensor([-1]))):
        ours = values.clone().requires_grad_()
        value = span_loss(ours, spans, torch.tensor([-4.0, 0.0, -0.1])[: len(spans)], spans)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(ours.grad).all()
    assert value.item() == 0.0


def test_what_span_loss_refuses():
    ours, spans = torch.tensor([-1.0, -2.0]), torch.tensor([0, 1])
    with pytest.raises(ArgumentError, match="span 1 has tokens on one side"):
        span_loss(ours, spans, ours, torch.tensor([0, 0]))
    with pytest.raises(ArgumentError, match="span_temperature=0"):
        span_loss(ours, spans, ours, spans, temperature=0)


def test_a_model_bridged_to_itself_loses_nothing():
    """Log-probabilities come from other functions with and without a gradient, and are the same to the bit."""
    hidden, head, labels = torch.randn(40, 16), torch.randn(300, 16), torch.randint(0, 300, (40,))
    student = hidden.clone().requires_grad_()
    spans = torch.arange(40) // 3
    value = span_loss(chosen_log_probs(student, head, labels), spans, -token_losses(hidden, head, labels), spans)
    value.backward()
    assert value.item() == 0.0
    assert student.grad.abs().max() < 1e-12
    pairs = torch.randperm(300)[:100, None].expand(100, 2)
    assert shared_loss(student, head, hidden, head, pairs).item() == 0.0


def dense_shared(student, teacher, shared):
    p, q = teacher.softmax(-1), student.softmax(-1)
    p, q = (torch.cat([side[:, shared[:, place]], 1 - side[:, shared[:, place]].sum(-1, keepdim=True)], -1) for place, side in ((1, p), (0, q)))
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("block", [2**24, 1])
def test_shared_loss_is_its_definition(block, monkeypatch):
    monkeypatch.setattr(bridge, "_BLOCK_ELEMENTS", block)
    draw = torch.Generator().manual_seed(0)
    hidden, head, bias = (torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in ((9, 6), (31, 6), (31,)))
    target, teacher_head = torch.randn(9, 4, generator=draw, dtype=torch.float64), torch.randn(23, 4, generator=draw, dtype=torch.float64)
    shared = torch.stack([torch.randperm(31, generator=draw)[:12], torch.randperm(23, generator=draw)[:12]], 1)
    value = shared_loss(hidden, head, target, teacher_head, shared, num_items=5, student_bias=bias, student_logit_scale=0.7, student_softcap=3.0, teacher_softcap=2.0)
    student = 3.0 * torch.tanh((hidden @ head.t() + bias) * 0.7 / 3.0)
    teacher = 2.0 * torch.tanh(target @ teacher_head.t() / 2.0)
    expected = dense_shared(student, teacher, shared) / 5
    torch.testing.assert_close(value, expected)
    for got, want in zip(*(torch.autograd.grad(loss, (hidden, head, bias)) for loss in (value, expected))):
        torch.testing.assert_close(got, want)


def test_shared_loss_with_every_token_shared_is_the_whole_divergence():
    hidden, target, head = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    order = torch.randperm(11)
    value = shared_loss(hidden, head, target, head[order.argsort()], torch.stack([torch.arange(11), order.argsort().argsort()], 1), num_items=1)
    p, q = (target @ head.t()).softmax(-1), (hidden @ head.t()).softmax(-1)
    torch.testing.assert_close(value, (p * (p / q).log()).sum(), rtol=1e-6, atol=1e-6)


def test_shared_tokens_have_the_same_bytes():
    a, b = kinds.byte_level(), kinds.sentencepiece()
    shared = shared_tokens(a, b)
    assert len(shared) > 60
    for ours, theirs in shared.tolist():
        token = b.convert_ids_to_tokens(theirs)
        text = bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode()
        assert a.convert_ids_to_tokens([ours]) == ([text.decode()] if text in (b"<|tool|>",) else [kinds.as_byte_level(text)])
    assert not set(shared[:, 0].tolist()) & set(a.all_special_ids)
    written = {b(text, add_special_tokens=False)["input_ids"][0] for text in "abcdeghilmnorstuy"}  # single characters of the corpus
    for text in "abcdeghilmnorstuy":
        (ours,) = a(text, add_special_tokens=False)["input_ids"]
        theirs = dict(shared.tolist())[ours]
        assert theirs in written or not b.convert_ids_to_tokens(theirs).startswith("<0x")
    same = shared_tokens(a, a)
    assert torch.equal(same[:, 0], same[:, 1])
    with pytest.raises(VocabularyMismatchError, match="teacher's head 10 rows"):
        shared_loss(torch.randn(2, 4), torch.randn(500, 4), torch.randn(2, 4), torch.randn(10, 4), shared)


def test_memory_of_the_span_loss_does_not_know_the_vocabulary():
    """Nothing that the loss of gathered log-probabilities keeps is as long as a vocabulary."""
    kept = []
    for vocab in (1_000, 50_000):
        hidden, head, labels = torch.randn(600, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True), torch.randint(0, 1000, (600,))
        sizes, own = {}, (hidden.data_ptr(), head.data_ptr())

        def note(tensor, sizes=sizes, own=own):
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            log_probs = chosen_log_probs(hidden, head, labels)
            span_loss(log_probs, torch.arange(600) // 2, torch.full((300,), -1.0), torch.arange(300))
        kept.append(sum(sizes.values()))
    assert kept[0] == kept[1] < 600 * 1000


def test_memory_of_the_vocabulary_loss_does_not_grow_with_the_rows():
    """No tensor of its value or gradient is N x V: the widest is a block of rows, however many there are."""
    vocab, widest = 50_000, []
    for rows in (600, 2400):
        hidden, head, teacher_hidden, teacher_head = (torch.randn(count, 8, requires_grad=True) for count in (rows, vocab, rows, vocab))
        with tiny.Widest(vocab) as found:
            shared_loss(hidden, head, teacher_hidden, teacher_head, torch.arange(40_000)[:, None].expand(-1, 2)).backward()
        widest.append(found.rows)
    assert 0 < widest[0] == widest[1] < 600 / 3
