"""Losses, standard errors and accuracies against slow references."""

import math

import numpy as np
import pytest
import tiny
import torch

from cbd_hub.evaluation import Documents, Losses, bits_per_byte, document_losses
from cbd_hub.interpolation.live import ModelRunner


def test_document_losses_are_each_documents_own(family):
    model, tok = tiny.FAMILIES[family](), tiny.tokenizer()
    texts = tiny.texts(12)
    documents = Documents.read(texts, tok, 64)
    losses = document_losses(ModelRunner(model), documents, bf16=False)
    for index, text in enumerate(texts):
        ids = torch.tensor([tok(text).input_ids[:64]])
        expected = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        assert losses.nats[index] == pytest.approx(float(expected.detach()), rel=1e-4)
        assert losses.tokens[index] == ids.shape[1] - 1
    bytes_ = sum(len(tok.decode(tok(text).input_ids[1:64]).encode()) for text in texts)
    assert bits_per_byte(losses, documents) == pytest.approx(losses.nats.sum() / math.log(2) / bytes_)


def test_standard_errors_agree_with_resampling():
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 50, 200)
    nats = tokens * draw.normal(3, 0.5, 200)
    losses = Losses(nats, tokens)
    picks = draw.integers(0, 200, (4000, 200))
    resampled = nats[picks].sum(1) / tokens[picks].sum(1)
    assert losses.stderr == pytest.approx(resampled.std(), rel=0.1)
    assert losses.minus((1.0, losses)) == (0.0, 0.0)
    assert Losses(nats[:1], tokens[:1]).stderr is None
