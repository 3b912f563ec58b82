"""Losses, standard errors and accuracies against slow references."""

import math

import numpy as np
import pytest
import tiny
import tokenizers_for_bridge as kinds
import torch
from test_packing import with_bos

from cbd_hub.cut import measure_importance
from cbd_hub.distill.packing import packed_dataset
from cbd_hub.distill.same_bytes import SameBytes
from cbd_hub.errors import DataError
from cbd_hub.evaluation import Calibration, Documents, Losses, bits_per_byte, byte_losses, common_texts, document_losses
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


def test_a_token_without_a_row_is_told():
    """As of an image's place, which gemma 3's tokenizers have and its text models have no row for."""
    model = tiny.llama()
    documents = Documents((torch.tensor([5, 6, model.config.vocab_size, 7]),), (3,))
    with pytest.raises(DataError, match=f"holds the token {model.config.vocab_size}, and the model has rows for {model.config.vocab_size}"):
        document_losses(ModelRunner(model), documents)
    with pytest.raises(DataError, match="has rows for"):
        measure_importance(model, documents)


@pytest.mark.parametrize("text", ["Все люди рождаются свободными. ", "人人生而自由，", "free and equal "])
def test_bytes_are_counted_where_a_document_begins_and_ends_inside_a_character(text):
    """A tokenizer of bytes: each predicted token is one."""
    tok = tiny.tokenizer()
    documents = Documents.read([text * 9] * 3, tok, 64)
    assert sum(documents.lengths) == documents.tokens
    rows = [(tok(text * 2).input_ids, [-100] * 3 + tok(text * 2).input_ids[3:])]
    answered = Documents.answered(rows, tok, 128)
    assert sum(answered.lengths) == answered.tokens
    ended = Documents.answered([(ids + [tok.eos_token_id], labels + [tok.eos_token_id]) for ids, labels in rows], tok, 128)
    assert (ended.tokens, ended.lengths) == (answered.tokens + 1, answered.lengths), "its end is predicted, and has no bytes"


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


BOTH = [tiny.tokenizer(), kinds.byte_level()]
LONG = [*tiny.texts(12), "nowhitespaceatall" * 9, "👍🏽" * 30, "", "a"]


def sized(tokenizer):
    model = tiny.llama(layers=1)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return ModelRunner(model)


def test_every_tokenizer_reads_the_same_beginnings():
    found = common_texts(LONG, BOTH, 40)
    assert [text for text in LONG if text] == [next(text for text in LONG if text.startswith(part)) for part in found]
    for whole, part in zip((text for text in LONG if text), found):
        counts = [len(tokenizer(part, add_special_tokens=False)["input_ids"]) for tokenizer in BOTH]
        assert max(counts) <= 39  # one before it
        assert part == whole or max(counts) > 20
        assert part == whole or " " not in part or whole[len(part)] == " "
    assert common_texts(LONG, BOTH, 40, 60) == found[:2]
    losses = [byte_losses(sized(tokenizer), tokenizer, found, characters=None, max_bytes=None) for tokenizer in BOTH]
    assert losses[0].tokens.tolist() == losses[1].tokens.tolist() == [len(part.encode()) for part in found]
    with pytest.raises(DataError, match="no text has a beginning that every tokenizer reads in 3 tokens"):
        common_texts(["👍"], BOTH, 3)


@pytest.mark.parametrize("chat", [False, True])
def test_answers_that_every_tokenizer_reads_whole(chat):
    rows = [{"prompt": "say", "completion": text} for text in tiny.texts(12)]
    if chat:
        rows = [{"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": row["completion"]}]} for row in rows]
    same = SameBytes(rows, BOTH, 130, 10_000)
    said = [row["messages"][1]["content"] if chat else row["completion"] for row in same.documents]
    assert 2 < len(said) < 12
    assert all(len(text) < 130 for text in said)
    for tokenizer in BOTH:
        losses = same.losses(sized(tokenizer), tokenizer)
        assert losses.tokens.tolist() == [len(text.encode()) for text in said]
        assert losses.nats.min() > 0
    assert SameBytes(rows, BOTH, 130, len(said[0]) + 20).documents == same.documents[:2]
    with pytest.raises(DataError, match="no row is read whole in 5 tokens by every tokenizer"):
        SameBytes(rows, BOTH, 5, 100)


def test_examples_in_a_prompt_are_no_answers():
    """Bytes are of the text that nats are of."""
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "an example"}, {"role": "user", "content": "again"}, {"role": "assistant", "content": "yes"}]
    assert SameBytes([{"prompt": turns[:3], "completion": turns[3:]}], BOTH, 130, 100).losses(sized(BOTH[0]), BOTH[0]).tokens.tolist() == [3]


@pytest.mark.parametrize("tok", [tiny.tokenizer(), with_bos()], ids=["plain", "bos"])
def test_calibration_blocks_are_packed_as_training_packs_them(tok):
    texts = tiny.texts(20)
    blocks = [torch.tensor(block["input_ids"]) for block in packed_dataset([{"text": text} for text in texts], tok, 32)]
    packed = Documents.packed(texts, tok, 32)
    assert len(packed.ids) == len(blocks)
    assert all(torch.equal(*pair) for pair in zip(packed.ids, blocks))
    assert packed.labels is None
    assert packed.lengths == tuple(len(tok.decode(block[1:], skip_special_tokens=True).encode()) for block in blocks)
    read = Calibration.read(texts, tok, 32, 10 * 32)
    assert len(read.blocks.ids) == 10
    assert all(torch.equal(*pair) for pair in zip(read.blocks.ids, blocks))
    assert {int(ids[0]) == 1 for ids in (*read.blocks.ids, *read.documents.ids)} == {tok("a").input_ids[0] == 1}


def test_a_longer_prefix_of_a_calibration_block_does_not_count():
    packed = Documents.packed(["ab" * 40], with_bos("<bos> <pad>"), 16)
    assert packed.tokens == 14 * len(packed.ids)
    assert set(packed.lengths) == {14}
    with pytest.raises(DataError, match="no room beside the 2"):
        Documents.packed(["ab" * 40], with_bos("<bos> <pad>"), 2)
