"""Draws from the tokens that a teacher cache does not list: unbiased in value and gradient, small, and refused where damaged."""

import zlib

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cbd_hub import ChainDistiller, ChainDistillerConfig
from cbd_hub.distill.cache_writing import write_cache
from cbd_hub.distill.top_codec import TailCodec
from cbd_hub.errors import ArgumentError, DataError
from cbd_hub.losses.divergence import forward_kl
from cbd_hub.losses.head import Listed, distillation_loss
from cbd_hub.losses.log_probs import top_log_probs


ROWS, VOCAB, WIDTH, TOP, DRAWS = 6, 40, 5, 3, 4


def models(seed=0):
    """Hidden states and heads of a teacher and a student, float64."""
    torch.manual_seed(seed)
    return [(torch.randn(ROWS, WIDTH, dtype=torch.float64), torch.randn(VOCAB, WIDTH, dtype=torch.float64)) for _ in range(2)]


def listed(teacher, uniform, draws=DRAWS):
    found = top_log_probs(*teacher, TOP, torch.zeros(ROWS, dtype=torch.int64), draws=draws, uniform=uniform)
    return Listed(found.ids, found.log_probs, found.tail_ids, found.tail_log_probs)


def test_each_token_is_drawn_as_often_as_it_is_probable_and_listed_ones_never():
    teacher, _ = models()
    log_probs = (teacher[0] @ teacher[1].T).log_softmax(-1)
    counts, grid = torch.zeros(ROWS, VOCAB, dtype=torch.float64), 4000
    for step in range(grid):
        top = listed(teacher, torch.full((ROWS,), (step + 0.5) / grid))
        counts.scatter_add_(1, top.tail_ids, torch.ones_like(top.tail_log_probs))
        torch.testing.assert_close(top.tail_log_probs, log_probs.gather(1, top.tail_ids))
    assert not counts.gather(1, top.ids).any()
    rest = log_probs.exp().scatter(1, top.ids, 0.0)
    torch.testing.assert_close(counts / grid / DRAWS, rest / rest.sum(-1, keepdim=True), rtol=0, atol=1e-3)


def test_value_and_gradient_are_those_of_the_whole_vocabulary_in_expectation():
    """Over all places where the draws can begin; with the bucket alone the value is less."""
    teacher, student = models()
    hidden, head = (tensor.requires_grad_() for tensor in student)
    labels = torch.arange(ROWS)
    dense = forward_kl((hidden @ head.T)[None], (teacher[0] @ teacher[1].T)[None], torch.ones(1, ROWS, dtype=torch.bool))
    expected = torch.autograd.grad(dense, (hidden, head))
    grid = 500
    values, gradients = [], [torch.zeros_like(hidden), torch.zeros_like(head)]
    for step in range(grid):
        value = distillation_loss(hidden, head, None, None, labels, teacher_top=listed(teacher, torch.full((ROWS,), (step + 0.5) / grid, dtype=torch.float64)))
        values.append(float(value.detach()))
        for total, part in zip(gradients, torch.autograd.grad(value, (hidden, head))):
            total += part / grid
    assert np.mean(values) == pytest.approx(float(dense.detach()), abs=1e-3)
    for got, want in zip(gradients, expected):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-3)
    top = listed(teacher, None)
    bucket = distillation_loss(hidden, head, None, None, labels, teacher_top=(top.ids, top.log_probs))
    assert float(bucket.detach()) < float(dense.detach()) - 0.05


def test_value_and_gradient_are_the_dense_formula():
    """For the draws as they are, with weights, a token that is drawn twice among them."""
    teacher, student = models(3)
    top = listed(teacher, torch.rand(ROWS, dtype=torch.float64), draws=9)
    assert any(len(set(row.tolist())) < 9 for row in top.tail_ids)
    hidden, head = (tensor.requires_grad_() for tensor in student)
    value = distillation_loss(hidden, head, None, None, torch.arange(ROWS), teacher_top=top, kd_weight=0.7, ce_weight=0.4)
    got = torch.autograd.grad(value, (hidden, head))
    ours = (hidden @ head.T).log_softmax(-1)
    share = (1 - top.log_probs.exp().sum(-1)) / 9
    divergence = (top.log_probs.exp() * (top.log_probs - ours.gather(1, top.ids))).sum(-1) + share * (top.tail_log_probs - ours.gather(1, top.tail_ids)).sum(-1)
    dense = (0.7 * divergence - 0.4 * ours.diagonal()).mean()
    torch.testing.assert_close(value, dense)
    for mine, want in zip(got, torch.autograd.grad(dense, (hidden, head))):
        torch.testing.assert_close(mine, want)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon", "skew_kl"])
def test_other_divergences_read_the_bucket(divergence):
    teacher, student = models()
    top = listed(teacher, torch.rand(ROWS, dtype=torch.float64))
    options = {"divergence": divergence, "labels": torch.arange(ROWS)}
    with_draws, without = (distillation_loss(*student, None, None, teacher_top=given, **options) for given in (top, (top.ids, top.log_probs)))
    assert torch.equal(with_draws, without)


def test_a_certain_teacher_has_no_tail_to_draw_from():
    """All of its probability is listed: the draws weigh nothing, and nothing becomes NaN."""
    teacher, student = models()
    sure = (50 * teacher[0], 50 * teacher[1])
    top = listed(sure, torch.rand(ROWS))
    value = distillation_loss(*student, None, None, torch.arange(ROWS), teacher_top=Listed(top.ids, top.log_probs, top.tail_ids, top.tail_log_probs.clamp(min=-24)))
    dense = forward_kl((student[0] @ student[1].T)[None], (sure[0] @ sure[1].T)[None], torch.ones(1, ROWS, dtype=torch.bool))
    assert float(value) == pytest.approx(float(dense), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(positions=st.integers(0, 9), vocab=st.sampled_from([5, 300, 70_000]), draws=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_draws_come_back_exactly_and_their_log_probabilities_within_half_a_step(positions, vocab, draws, seed):
    random = np.random.default_rng(seed)
    ids, log_probs = np.sort(random.integers(0, vocab, (positions, draws)), 1), -20 * random.random((positions, draws))
    log_probs = np.sort(log_probs, 1)
    codec = TailCodec(draws, vocab)
    got, kept = codec.decode(codec.encode(ids, log_probs), positions)
    assert np.array_equal(got, ids)
    same = np.array([len(set(row)) == draws for row in ids], dtype=bool)  # two of one token have one log-probability in a cache
    np.testing.assert_allclose(kept[same], log_probs[same], atol=24 / 255 / 2 + 1e-5)


@settings(max_examples=100, deadline=None)
@given(raw=arrays(np.uint8, 3 * 2 * 3))
def test_random_bytes_are_draws_or_refused(raw):
    codec = TailCodec(2, 300)
    try:
        ids, kept = codec.decode(zlib.compress(raw.tobytes()), 3)
    except DataError:
        return
    assert ids.min() >= 0
    assert ids.max() < 300
    assert np.isfinite(kept).all()


@pytest.mark.parametrize("damage", [lambda data: data[:-6], lambda data: b"\0" + data[1:], lambda data: data + b"x", lambda data: b"", lambda data: zlib.compress(b"\0" * 2**22)])
def test_hostile_bytes_are_refused(damage):
    codec = TailCodec(2, 260)
    with pytest.raises(DataError, match="draws"):
        codec.decode(damage(codec.encode(np.array([[3, 9]]), np.array([[-1.0, -2.0]]))), 1)


def test_a_cache_with_draws_knows_the_divergence_better_and_stays_small(tmp_path):
    teacher, student = tiny.llama(), tiny.llama(layers=2, seed=3)
    rows = [{"text": text} for text in tiny.texts(300)]
    made = {
        draws: write_cache(teacher, rows, tmp_path / f"{draws}", tokenizer=tiny.tokenizer(), block_size=32, top_k=5, student=student, tail_draws=draws) for draws in (0, 8)
    }
    figures = {draws: cache.record.figures for draws, cache in made.items()}
    error = {draws: found.student.kept - found.student.full for draws, found in figures.items()}
    assert figures[0].student.full == figures[8].student.full
    assert abs(error[8]) < 0.1 * abs(error[0])
    assert error[0] < 0
    assert made[8][3]["tail_ids"].shape == (32, 8)
    assert "tail_ids" not in made[0][3]
    assert figures[8].bytes_per_token < figures[0].bytes_per_token + 8 * 4


def test_stopped_and_gone_on_draws_the_same(tmp_path):
    teacher, rows = tiny.llama(), [{"text": text} for text in tiny.texts(120)]
    options = {"tokenizer": tiny.tokenizer(), "block_size": 32, "top_k": 12, "shard_tokens": 256}
    whole = write_cache(teacher, rows, tmp_path / "a", **options)

    def stop(what, done, total):
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(teacher, rows, tmp_path / "b", report=stop, **options)
    again = write_cache(teacher, rows, tmp_path / "b", **options)
    assert whole.record.source.tail_draws == 1
    assert all(np.array_equal(whole[index]["tail_ids"], again[index]["tail_ids"]) for index in range(len(whole)))


def test_training_reads_the_draws(tmp_path):
    """The trainer's loss is that of the listed tokens and the draws, by hand."""
    teacher, rows = tiny.llama(), [{"text": text} for text in tiny.texts(120)]
    cache = write_cache(teacher, rows, tmp_path / "c", tokenizer=tiny.tokenizer(), block_size=32, top_k=5, tail_draws=6)
    args = ChainDistillerConfig(str(tmp_path / "out"), max_steps=1, report_to="none", disable_tqdm=True, block_size=32)
    trainer = ChainDistiller(model=tiny.llama(layers=2, seed=3), args=args, teacher_cache=cache)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    loss = trainer.compute_loss(trainer.model, batch)
    with torch.no_grad():
        student = trainer.model(batch["input_ids"]).logits[:, :-1].double().log_softmax(-1)
    top, tail = (batch[name][:, :-1].double() for name in ("top_log_probs", "tail_log_probs"))
    ids, others = (batch[name][:, :-1] for name in ("top_ids", "tail_ids"))
    share = (1 - top.exp().sum(-1, keepdim=True)) / 6
    expected = (top.exp() * (top - student.gather(-1, ids))).sum(-1) + (share * (tail - student.gather(-1, others))).sum(-1)
    assert float(loss.detach()) == pytest.approx(float(expected.mean()), rel=1e-4)


def test_a_negative_number_of_draws_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="tail_draws=-1"):
        write_cache(tiny.llama(), [{"text": "a " * 99}], tmp_path / "c", tokenizer=tiny.tokenizer(), tail_draws=-1)
