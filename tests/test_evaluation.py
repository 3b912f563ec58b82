"""Losses, standard errors and accuracies against slow references."""

import json
import math

import numpy as np
import pytest
import tiny
import torch

from cbd_hub.errors import DataError
from cbd_hub.evaluation import Documents, Losses, Question, bits_per_byte, choice_accuracy, document_losses
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


def test_choices_are_scored_by_their_own_tokens(family):
    """Accuracy by hand: the summed log-probability of each choice's tokens after the query."""
    model, tok = tiny.FAMILIES[family](), tiny.tokenizer()
    questions = [Question(f"{index} and one is", (" two", " three words", " x"), index % 3) for index in range(9)]
    scores = choice_accuracy(ModelRunner(model), questions, tok, bf16=False)
    hits = norm = 0
    for question in questions:
        start = len(tok(question.query).input_ids)
        totals = []
        for choice in question.choices:
            ids = torch.tensor([tok(question.query + choice).input_ids])
            logs = model(ids).logits[0].log_softmax(-1)
            totals.append(sum(float(logs[place - 1, ids[0, place]]) for place in range(start, ids.shape[1])))
        hits += int(np.argmax(totals)) == question.answer
        norm += int(np.argmax([total / len(choice) for total, choice in zip(totals, question.choices)])) == question.answer
    assert scores["accuracy"] == pytest.approx(hits / 9)
    assert scores["accuracy_norm"] == pytest.approx(norm / 9)
    assert scores["questions"] == 9


def test_questions_are_read_or_refused_by_line(tmp_path):
    good = {"query": "a", "choices": ["b", "c"], "answer": 1}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(good) + "\n")
    assert Question.read(path) == [Question("a", ("b", "c"), 1)]
    for wrong in ({**good, "answer": 2}, {**good, "choices": ["b"]}, {"query": "a"}, [], {**good, "choices": ["", "b"]}):
        path.write_text(json.dumps(good) + "\n" + json.dumps(wrong) + "\n")
        with pytest.raises(DataError, match="line 2"):
            Question.read(path)
    path.write_text("")
    with pytest.raises(DataError, match="no questions"):
        Question.read(path)
    with pytest.raises(DataError, match="cannot be read"):
        Question.read(tmp_path / "absent")
