"""Rows of every kind become blocks with exact borders; streams are read in the same order again."""

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset

from cbd_hub import ChainDistiller, ChainDistillerConfig
from cbd_hub.distill.packing import IGNORED, collate, packed_dataset, tokenise
from cbd_hub.errors import DataError


CHATS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}, {"role": "assistant", "content": "so long"}],
    [{"role": "system", "content": "be kind"}, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
]


def tokenizer():
    made = tiny.tokenizer()
    made.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    return made


def counted(tokens, tok):
    """The text of the tokens that count."""
    return tok.decode([label for label in tokens.labels if label != IGNORED])


def test_of_a_prompt_only_the_response_counts():
    tok = tokenizer()
    for name in ("completion", "response"):
        tokens = tokenise({"prompt": "two and two? ", name: "four"}, tok)
        assert tok.decode(tokens.ids) == "two and two? four<eos>"
        assert counted(tokens, tok) == "four<eos>"


def test_of_a_chat_only_the_assistants_turns_count():
    tok = tokenizer()
    assert counted(tokenise({"messages": CHATS[0]}, tok), tok) == "hello<eos>so long<eos>"
    assert counted(tokenise({"messages": CHATS[1]}, tok), tok) == "4<eos>"
    assert counted(tokenise({"prompt": CHATS[0][:3], "completion": CHATS[0][3:]}, tok), tok) == "hello<eos>so long<eos>"


def test_chats_that_cannot_be_told_apart_are_refused():
    tok = tokenizer()
    tok.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="rewrites earlier turns"):
        tokenise({"messages": CHATS[0]}, tok)
    tok.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        tokenise({"messages": CHATS[0]}, tok)
    with pytest.raises(DataError, match="columns words"):
        tokenise({"words": "x"}, tok)


def rows():
    return [{"prompt": f"{index} plus one is", "completion": f" {index + 1}" * (index % 4 + 1)} for index in range(12)]


def test_a_packed_block_is_its_rows_apart(family):
    """Logits of a row in a block equal those of the row alone: attention and positions stop at the border."""
    tok, model = tokenizer(), tiny.FAMILIES[family]()
    blocks = packed_dataset(rows(), tok, 64)
    batch = collate([blocks[index] for index in range(len(blocks))], tok.pad_token_id)
    assert "attention_mask" not in batch
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    alone = iter(tokenise(row, tok) for row in rows())
    for block in range(len(blocks)):
        ids, positions = blocks[block]["input_ids"], blocks[block]["position_ids"]
        starts = [index for index, position in enumerate(positions) if position == 0] + [len(ids)]
        for first, last in zip(starts, starts[1:]):
            row = next(alone)
            assert ids[first:last] == row.ids
            assert blocks[block]["labels"][first:last] == [IGNORED, *row.labels[1:]]
            expected = model(input_ids=torch.tensor([row.ids])).logits[0]
            torch.testing.assert_close(logits[block, first:last], expected, rtol=1e-4, atol=1e-5)
    assert next(alone, None) is None


def test_rows_without_an_answer_are_left_out_and_long_ones_cut():
    tok = tokenizer()
    made = packed_dataset([{"prompt": "x" * 100, "completion": "y"}, {"prompt": "a", "completion": "b" * 100}], tok, 32)
    assert len(made) == 1
    assert len(made[0]["input_ids"]) == 32
    with pytest.raises(DataError, match="fill one block"):
        packed_dataset([{"text": "short"}], tok, 32)


def stream(seed):
    source = Dataset.from_list([{"text": text} for text in tiny.texts(60, seed)])
    return source.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=16)


def weights_after(folder, dataset, stop=0):
    def make():
        config = ChainDistillerConfig(
            str(folder), max_steps=6, save_steps=2, per_device_train_batch_size=2, bf16=False, disable_tqdm=True, block_size=24, logging_steps=1
        )
        return ChainDistiller(model=tiny.llama(layers=2, seed=5), teacher=tiny.llama(), args=config, train_dataset=dataset, processing_class=tokenizer())

    return dict(tiny.stopped_and_resumed(make, folder, stop).model.named_parameters())


@pytest.mark.parametrize("kind", ["stream", "prompts"])
def test_the_order_is_the_same_after_resuming(tmp_path, kind):
    dataset = stream(1) if kind == "stream" else Dataset.from_list(rows())
    whole, again = weights_after(tmp_path / "a", dataset), weights_after(tmp_path / "b", dataset, stop=3)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_stream_is_packed_like_a_list():
    tok = tokenizer()
    texts = [{"text": text} for text in tiny.texts(30)]
    packed = packed_dataset(IterableDataset.from_generator(lambda: iter(texts)), tok, 24)
    assert list(packed) == list(packed_dataset(texts, tok, 24))
