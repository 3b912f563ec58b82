"""Multiple-choice questions are scored as lm-evaluation-harness scores them."""

import json
import math

import numpy as np
import pytest
import tiny
import torch

from cbd_hub.errors import DataError
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.questions import Question, accuracies, choice_accuracy, choice_nats


def by_hand(model, ids, start):
    """Loss of the tokens from a place on, from dense logits."""
    ids = torch.tensor([ids])
    logs = model(ids).logits[0].log_softmax(-1)
    return -sum(float(logs[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))


def test_choices_are_scored_by_their_own_tokens(family):
    """Accuracy by hand: the summed log-probability of each choice's tokens after the query; its length without the space before it."""
    model, tok = tiny.FAMILIES[family](), tiny.tokenizer()
    questions = [Question(f"{index} and one is", (" two", " three words", " x"), index % 3) for index in range(9)]
    scores = choice_accuracy(ModelRunner(model), questions, tok, bf16=False)
    hits = norm = 0
    for question in questions:
        start = len(tok(question.query).input_ids)
        totals = [by_hand(model, tok(question.query + choice).input_ids, start) for choice in question.choices]
        hits += int(np.argmin(totals)) == question.answer
        norm += int(np.argmin([total / (len(choice) - 1) for total, choice in zip(totals, question.choices)])) == question.answer
    assert scores["accuracy"] == pytest.approx(hits / 9)
    assert scores["accuracy_norm"] == pytest.approx(norm / 9)
    assert scores["questions"] == 9
    assert scores["accuracy_stderr"] == pytest.approx(math.sqrt(hits / 9 * (1 - hits / 9) / 8))


def test_contexts_may_differ_and_choices_be_alike():
    """WinoGrande: the choice stands in the context, and what follows it is scored."""
    model, tok = tiny.llama(), tiny.tokenizer()
    question = Question(("so Sarah", "so Maria"), (" got it.", " got it."), 1)
    nats = choice_nats(ModelRunner(model), [question], tok, bf16=False)[0]
    expected = [by_hand(model, tok(context + " got it.").input_ids, len(context)) for context in question.contexts]
    assert nats == pytest.approx(expected, rel=1e-4)
    assert nats[0] != nats[1]


def test_a_space_at_the_end_of_the_context_belongs_to_the_choice():
    model, tok = tiny.llama(), tiny.tokenizer()
    apart, together = (choice_nats(ModelRunner(model), [Question(query, choices, 0)], tok, bf16=False)[0] for query, choices in (("one ", ("two", "x")), ("one", (" two", " x"))))
    assert apart == together


def test_without_a_context_the_first_token_is_predicted_too():
    model, tok = tiny.llama(), tiny.tokenizer()
    nats = choice_nats(ModelRunner(model), [Question("", ("one", "two"), 0)], tok, bf16=False)[0]
    assert nats == pytest.approx([by_hand(model, [tok.bos_token_id, *tok(choice).input_ids], 1) for choice in ("one", "two")], rel=1e-4)


def test_a_context_longer_than_the_positions_loses_its_beginning():
    model, tok = tiny.gpt2(n_positions=32), tiny.tokenizer()
    long, short = ("a" * 100 + "the end of it is", (" near", " far")), ("a" * 11 + "the end of it is", (" near", " far"))
    cut, whole = (choice_nats(ModelRunner(model), [Question(query, choices, 0)], tok, bf16=False)[0] for query, choices in (long, short))
    assert cut[0] == pytest.approx(whole[0], rel=1e-4)  # 11 + 16 + 5 bytes are the 32 positions
    assert all(map(math.isfinite, cut))


def test_characters_are_counted_not_bytes():
    """Three characters of two bytes each lose to four of one byte where the loss per character is higher."""
    question = Question("x", (" äöü", " abcd"), 0)
    assert question.right([6.0, 7.0]) == (True, False)


def test_questions_are_read_or_refused_by_line(tmp_path):
    good = {"query": "a", "choices": ["b", "c"], "answer": 1}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, "query": ["d", "e"]}) + "\n")
    assert Question.read(path) == [Question("a", ("b", "c"), 1), Question(("d", "e"), ("b", "c"), 1)]
    path.write_text(json.dumps({**good, "query": "a\u2028b\x85c"}, ensure_ascii=False) + "\r\n" + json.dumps(good) + "\n", encoding="utf-8")
    assert [question.query for question in Question.read(path)] == ["a\u2028b\x85c", "a"], "what ends no line of JSON"
    for wrong in ({**good, "answer": 2}, {**good, "choices": ["b"]}, {"query": "a"}, [], {**good, "choices": ["", "b"]}, {**good, "query": ["a"]}, {**good, "choices": "yes"}, {**good, "answer": 0.9}, {**good, "answer": True}, {**good, "answer": "b"}, {**good, "query": None}, {**good, "choices": ["b", {}]}):
        path.write_text(json.dumps(good) + "\n" + json.dumps(wrong) + "\n")
        with pytest.raises(DataError, match="line 2"):
            Question.read(path)
    path.write_text("".join(json.dumps({**good, "answer": answer}) + "\n" for answer in ("1", 1.0)))
    assert [question.answer for question in Question.read(path)] == [1, 1], "as data sets write them"
    path.write_text("\ufeff" + json.dumps(good), encoding="utf-8")
    assert len(Question.read(path)) == 1
    assert accuracies([(True, False)])["accuracy_stderr"] is None, "one question has no standard error"
    path.write_text("")
    with pytest.raises(DataError, match="no questions"):
        Question.read(path)
    with pytest.raises(DataError, match="cannot be read"):
        Question.read(tmp_path / "absent")
