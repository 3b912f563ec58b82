"""Rows of every kind become blocks with exact borders; streams are read in the same order again."""

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from test_every_family import pair
from tokenizers import processors
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, DataCollatorWithFlattening

from cbd_hub import ChainDistiller, ChainDistillerConfig
from cbd_hub.distill.answers import answered_rows
from cbd_hub.distill.bridge_rows import BridgeRows
from cbd_hub.distill.packing import collate, next_tokens, packed_dataset, tokenise
from cbd_hub.distill.rollouts import Prompt, batch_prompts
from cbd_hub.distill.rows import template_options
from cbd_hub.distill.sharing import Endless
from cbd_hub.errors import ArgumentError, DataError
from cbd_hub.evaluation import IGNORED, joined_blocks
from cbd_hub.interpolation.blend import blend_plan
from cbd_hub.interpolation.live import Between, ModelRunner
from cbd_hub.manifest import Mix


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


def with_bos(before="<bos>"):
    """A tokenizer that begins every text as gemma's and llama's do."""
    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{before} $A", special_tokens=[("<bos>", 1), ("<pad>", 0)])
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
    assert counted(tokenise({"prompt": CHATS[0][:3], "completion": CHATS[0][3:]}, tok), tok) == "so long<eos>", "examples in a prompt are no answers"


def test_tools_and_options_go_to_the_chat_template():
    """As in TRL's data sets; rows that a data set filled with None are rows without."""
    tok = tokenizer()
    tok.chat_template = "{% if tools %}<{{ tools[0]['name'] }}>{% endif %}{% if loud %}!{% endif %}" + tok.chat_template
    plain = tokenise({"messages": CHATS[1]}, tok)
    tools = [{"name": "add"}]
    for said in (tools, '[{"name": "add"}]'):
        tokens = tokenise({"messages": CHATS[1], "tools": said, "chat_template_kwargs": {"loud": True}}, tok)
        assert tok.decode(tokens.ids) == "<add>!" + tok.decode(plain.ids)
        assert counted(tokens, tok) == "4<eos>"
    assert tok.decode(tokenise({"prompt": CHATS[1][:2], "completion": CHATS[1][2:], "tools": tools}, tok).ids).startswith("<add>[system]")
    assert tokenise({"messages": CHATS[1], "tools": None, "chat_template_kwargs": {"loud": None}}, tok) == plain
    rows = Dataset.from_list([{"messages": CHATS[1], "tools": [{"name": "add", "x": {"y": 1}}, {"name": "b"}]}, {"messages": CHATS[1], "tools": [{"name": "c", "z": "w"}]}])
    assert [template_options(row)["tools"] for row in rows] == [[{"name": "add", "x": {"y": 1}}, {"name": "b"}], [{"name": "c", "z": "w"}]]
    made = BridgeRows(ChainDistillerConfig("out", block_size=64, bridge="span"), tok, tok)._answered({"messages": CHATS[1], "tools": tools})
    assert [tok.decode(side.ids)[:5] for side in made] == ["<add>", "<add>"]
    answered = answered_rows([{"messages": CHATS[1], "tools": tools, "chat_template_kwargs": {"loud": True}}], ["5"], [""])
    assert tok.decode(tokenise(answered[0], tok).ids) == "<add>!" + tok.decode(plain.ids).replace("4", "5")
    for wrong, message in (({"tools": "[add"}, "tools cannot be read as json"), ({"tools": 5}, "tools is no list but int"), ({"chat_template_kwargs": "x"}, "chat_template_kwargs is str"), (
        {"chat_template_kwargs": {"truncation": True}}, "chat_template_kwargs has truncation, which is no option of a chat template"),
    ):
        with pytest.raises(DataError, match=message):
            tokenise({"messages": CHATS[1], **wrong}, tok)


def test_tokens_that_count_are_told_by_labels_alone(tmp_path):
    """A mask of TRL's that was passed over would have every token learned."""
    row = {"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}
    for given in (Dataset.from_list([row]), [row]):
        with pytest.raises(DataError, match="completion_mask but no labels.*give labels: the ids, and -100 where completion_mask is 0"):
            ChainDistiller(model=tiny.llama(), teacher=tiny.llama(), args=ChainDistillerConfig(str(tmp_path)), train_dataset=given)
    ChainDistiller(model=tiny.llama(), teacher=tiny.llama(), args=ChainDistillerConfig(str(tmp_path)), train_dataset=[{**row, "labels": [-100, -100, 7]}])


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


def runner_of(kind, name, attention):
    """A loaded model, as a student and a teacher are run, or one in between two of them."""
    small, large, segment = pair(name)
    for model in (small, large):
        model.set_attn_implementation(attention)
    return ModelRunner(large) if kind == "model" else Between({"s": small, "l": large}).run(blend_plan(segment, segment.large_shape, Mix(alpha=0.5)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["model", "plan"])
def test_a_packed_block_is_its_rows_apart(every, kind, attention):
    """Hidden states of a row in a block equal those of the row alone: attention and positions stop at the border."""
    tok, run = tokenizer(), runner_of(kind, every, attention)
    blocks = packed_dataset(rows(), tok, 64)
    batch = collate([blocks[index] for index in range(len(blocks))], tok.pad_token_id)
    assert "attention_mask" not in batch
    hidden = run(batch["input_ids"], None, batch["position_ids"]).hidden
    alone = iter(tokenise(row, tok) for row in rows())
    for block in range(len(blocks)):
        ids, positions = blocks[block]["input_ids"], blocks[block]["position_ids"]
        starts = [index for index, position in enumerate(positions) if position == 0] + [len(ids)]
        for first, last in zip(starts, starts[1:]):
            row = next(alone)
            assert ids[first:last] == row.ids
            assert blocks[block]["labels"][first:last] == [IGNORED, *row.labels[1:]]
            torch.testing.assert_close(hidden[block, first:last], run(torch.tensor([row.ids])).hidden[0], rtol=1e-4, atol=1e-5)
    assert next(alone, None) is None


def test_rows_without_an_answer_are_left_out_and_long_ones_cut():
    tok = tokenizer()
    made = packed_dataset([{"prompt": "x" * 100, "completion": "y"}, {"prompt": "a", "completion": "b" * 100}], tok, 32)
    assert len(made) == 1
    assert len(made[0]["input_ids"]) == 32
    with pytest.raises(DataError, match="fill one block"):
        packed_dataset([{"text": "short"}], tok, 32)


def test_prompts_that_fill_a_block_are_said(caplog):
    rows = [{"prompt": "x" * 40, "completion": "never seen"}, {"prompt": "a", "completion": "b"}]
    assert len(packed_dataset(rows, tokenizer(), 16)) == 1
    assert "1 rows have no answer within block_size=16 and were left out" in caplog.text
    with pytest.raises(DataError, match="no row has an answer within its first 16 tokens"):
        packed_dataset(rows[:1], tokenizer(), 16)


def test_chats_in_which_nobody_is_the_assistant_are_said(tmp_path, caplog):
    chats = [{"messages": [{"role": "human", "content": "hi"}, {"role": "gpt", "content": text}]} for text in "ab"]
    assert len(packed_dataset([*chats, {"messages": CHATS[1]}], tokenizer(), 96)) == 1
    assert '2 rows have no answer within block_size=96 and were left out; give a larger block_size or shorter prompts, and chats a turn of the role "assistant"' in caplog.text
    caplog.clear()
    bridge = BridgeRows(ChainDistillerConfig(str(tmp_path), block_size=96, bridge="span"), tokenizer(), tokenizer())
    assert len(list(bridge.blocks([*chats, {"messages": CHATS[1]}], 96))) == 1
    assert "2 rows have no answer" in caplog.text
    with pytest.raises(DataError, match='no row has an answer .* the turns of the role "assistant"'):
        packed_dataset(chats, tokenizer(), 96)


def test_long_and_short_documents_are_joined_alike():
    documents = [list(range(low, high)) for low, high in ((0, 100), (100, 101), (101, 101), (101, 130))]
    for prefix in ([], [7, 8]):
        room = 12 - len(prefix)
        assert list(joined_blocks(documents, 12, prefix)) == [[*prefix, *range(at, at + room)] for at in range(0, 130 - room + 1, room)]


def test_padding_in_rows_with_positions_counts_for_nothing():
    """A row padded on the left beside one that is packed: the padding is neither read nor predicted, nor what is behind it."""
    padded = {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1], "position_ids": [0, 0, 0, 1, 2]}
    packed = {"input_ids": [5, 6, 7, 8, 9], "attention_mask": [1] * 5, "position_ids": [0, 1, 2, 0, 1]}
    batch = collate([padded, packed])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100], [5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert "attention_mask" not in batch


def test_of_ready_rows_with_positions_no_document_is_predicted_from_another(tmp_path):
    """Loss, its count and evaluation are those of the documents one by one, whether labels are given or not; prompts are those of plain text."""
    documents = [tokenizer()(text).input_ids for text in tiny.texts(6)]
    packed = {"input_ids": [token for ids in documents for token in ids], "position_ids": [place for ids in documents for place in range(len(ids))]}
    assert int((next_tokens(collate([packed])) != IGNORED).sum()) == sum(len(ids) - 1 for ids in documents)
    assert batch_prompts(collate([packed]), 99, 0.5) == [[Prompt(ids[: round(len(ids) / 2)], len(ids) - round(len(ids) / 2)) for ids in documents]]
    losses = []
    for place, rows in enumerate(([{"input_ids": ids} for ids in documents], [packed], [{**packed, "labels": packed["input_ids"]}])):
        config = ChainDistillerConfig(
            str(tmp_path / str(place)), max_steps=1, per_device_train_batch_size=len(rows), bf16=False, disable_tqdm=True, logging_steps=1, save_strategy="no", ce_weight=0.5
        )
        trainer = ChainDistiller(model=tiny.llama(layers=2, seed=5, max_position_embeddings=2048), teacher=tiny.llama(max_position_embeddings=2048), args=config, train_dataset=rows)
        measured = trainer.evaluate(Dataset.from_list(rows))["eval_loss"]
        trainer.train()
        losses.append((measured, next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)))
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(("collator", "said"), [
    (DataCollatorForSeq2Seq(tiny.tokenizer()), "cannot batch rows with position_ids"), (DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False), "cannot batch rows with position_ids"),
    (DataCollatorWithFlattening(), "leaves out the position_ids"),
])
def test_a_collator_that_loses_where_documents_begin_is_refused(tmp_path, collator, said):
    prompts = [{"prompt": "a", "completion": f"b {number}"} for number in range(9)]
    apart = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "position_ids": [0, 1, 2]}, {"input_ids": [5, 6], "labels": [5, 6], "position_ids": [0, 1]}]

    def trainer(rows):
        config = ChainDistillerConfig(str(tmp_path), bf16=False, block_size=24)
        return ChainDistiller(model=tiny.llama(layers=2), teacher=tiny.llama(), args=config, train_dataset=rows, processing_class=tokenizer(), data_collator=collator)

    with pytest.raises(ArgumentError, match=f"data_collator {said}"):
        trainer(prompts)
    if isinstance(collator, DataCollatorWithFlattening):
        trainer(apart)


def test_rows_packed_by_trl_are_refused_without_positions(tmp_path):
    given = [{"input_ids": [5, 6, 7, 8], "seq_lengths": [2, 2]}]
    with pytest.raises(DataError, match="seq_lengths but no position_ids"):
        weights_after(tmp_path, given)
    weights_after(tmp_path, [{**given[0], "position_ids": [0, 1, 0, 1]}], steps=1)


def test_plain_text_and_prompts_are_not_mixed():
    """Joined end to end with text, the tokens of a prompt would be learned."""
    with pytest.raises(DataError, match="of one kind"):
        packed_dataset([*({"text": text} for text in tiny.texts(9)), {"prompt": "secret", "completion": "answer"}], tokenizer(), 16)


def test_a_chat_that_cannot_be_rendered_is_named():
    for messages in ([], [{"role": "assistant", "content": "hello"}]):
        with pytest.raises(DataError, match="row 1: .*chat template refuses"):
            list(packed_dataset([{"messages": CHATS[0]}, {"messages": messages}], tokenizer(), 96))


def stream(seed):
    source = Dataset.from_list([{"text": text} for text in tiny.texts(60, seed)])
    return source.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=16)


def weights_after(folder, dataset, stop=0, steps=6, **options):
    def make():
        config = ChainDistillerConfig(
            str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, bf16=False, disable_tqdm=True, block_size=24, logging_steps=1, **options
        )
        return ChainDistiller(model=tiny.llama(layers=2, seed=5), teacher=tiny.llama(), args=config, train_dataset=dataset, processing_class=tokenizer())

    return dict(tiny.stopped_and_resumed(make, folder, stop).model.named_parameters())


@pytest.mark.parametrize("kind", ["stream", "prompts"])
def test_the_order_is_the_same_after_resuming(tmp_path, kind):
    dataset = stream(1) if kind == "stream" else Dataset.from_list(rows())
    whole, again = weights_after(tmp_path / "a", dataset), weights_after(tmp_path / "b", dataset, stop=3)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_workers_read_all_of_a_stream(tmp_path):
    """Its shards are packed together, as one process reads them."""
    sharded = Dataset.from_list([{"text": text} for text in tiny.texts(60)]).to_iterable_dataset(num_shards=2)
    alone, shared = (weights_after(tmp_path / str(workers), sharded, steps=100, dataloader_num_workers=workers) for workers in (0, 2))
    assert all(torch.equal(alone[name], shared[name]) for name in alone)


def test_every_worker_has_as_many_shards(tmp_path):
    """Of three shards two workers would read one twice as often as the others."""
    rows = Dataset.from_list([{"input_ids": [5 + number, 5, 6]} for number in range(12)]).to_iterable_dataset(num_shards=3)
    config = ChainDistillerConfig(str(tmp_path), max_steps=12, per_device_train_batch_size=1, bf16=False, dataloader_num_workers=2)
    trainer = ChainDistiller(model=tiny.llama(layers=2), teacher=tiny.llama(), args=config, train_dataset=rows)
    seen = [int(batch["input_ids"][0, 0]) for _, batch in zip(range(12), trainer.get_train_dataloader())]
    assert sorted(seen) == list(range(5, 17))
    assert config.dataloader_num_workers == 2


@pytest.mark.parametrize("stop", [3, 7])
def test_rows_of_like_length_come_in_the_same_order_after_resuming(tmp_path, stop):
    """Killed in the first epoch, and in the second."""
    given = Dataset.from_list([{"input_ids": list(range(4, 8 + number % 5))} for number in range(8)])
    whole, again = (weights_after(tmp_path / str(at), given, stop=at, steps=8, train_sampling_strategy="group_by_length") for at in (0, stop))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("stop", [3, 9])
def test_a_stream_that_comes_round_is_resumed_at_its_place(tmp_path, stop):
    """Killed in its first pass, and in a later one."""
    dataset = IterableDataset.from_generator(lambda: iter([{"text": text} for text in tiny.texts(2)]))
    blocks = sum(1 for _ in packed_dataset(dataset, tokenizer(), 24))
    assert 3 < blocks // 2 < 9 - 2
    whole, again = weights_after(tmp_path / "a", dataset, steps=12), weights_after(tmp_path / "b", dataset, stop=stop, steps=12)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_steps_at_the_end_of_a_stream_have_all_their_batches(tmp_path):
    """Three rows and two batches a step: the third row's step takes the first row too, and the loss is a mean as ever."""
    given = [{"input_ids": torch.randint(4, tiny.VOCAB, (8,), generator=torch.Generator().manual_seed(seed)).tolist()} for seed in range(3)]
    config = ChainDistillerConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=0.0, bf16=False, disable_tqdm=True, logging_steps=1, save_strategy="no"
    )
    student, teacher = tiny.llama(layers=2, seed=5), tiny.llama()
    trainer = ChainDistiller(model=student, teacher=teacher, args=config, train_dataset=IterableDataset.from_generator(lambda: iter(given)))
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for found, places in zip(logged, ((0, 1), (2, 0), (1, 2))):
        batch = trainer.data_collator([given[index] for index in places])
        with torch.no_grad():
            assert found == pytest.approx(float(trainer.compute_loss(trainer.model.eval(), batch)), rel=1e-4)


def test_workers_without_a_shard_and_streams_that_can_be_read_once(tmp_path):
    texts = [{"text": text} for text in tiny.texts(20)]

    def trained(folder, dataset, **options):
        config = ChainDistillerConfig(
            str(folder), max_steps=4, per_device_train_batch_size=2, bf16=False, disable_tqdm=True, block_size=24, logging_steps=1, **{"save_strategy": "no", **options}
        )
        trainer = ChainDistiller(
            model=tiny.llama(layers=2, seed=5), teacher=tiny.llama(), args=config, train_dataset=dataset, eval_dataset=texts[:2], processing_class=tokenizer()
        )
        trainer.train()
        return trainer.state

    assert trained(tmp_path / "a", IterableDataset.from_generator(lambda: iter(texts)), dataloader_num_workers=2).global_step == 4
    blocks = [{"input_ids": list(range(4, 28))}] * 6
    assert list(Endless(iter(blocks))) == blocks, "what cannot be read again has an end"
    few = IterableDataset.from_generator(lambda: iter(texts[:1]))
    state = trained(tmp_path / "b", few, eval_strategy="epoch")
    assert [entry["step"] for entry in state.log_history if "eval_loss" in entry][0] < 4, "where its end is waited for there is one"


def test_an_empty_stream_is_said(tmp_path):
    with pytest.raises(DataError, match="has no rows that fill a block"):
        weights_after(tmp_path, IterableDataset.from_generator(lambda: iter([{"text": "a"}])))


def test_a_stream_is_packed_like_a_list():
    tok = tokenizer()
    texts = [{"text": text} for text in tiny.texts(30)]
    packed = packed_dataset(IterableDataset.from_generator(lambda: iter(texts)), tok, 24)
    assert list(packed) == list(packed_dataset(texts, tok, 24))


def test_each_block_of_text_begins_with_what_the_tokenizer_puts_before_a_text():
    """Blocks keep their length, the text is whole, and the first token of a block counts as little as ever."""
    plain, tok = tokenizer(), with_bos()
    texts = [{"text": text} for text in tiny.texts(30)]
    joined = [token for row in texts for token in tokenise(row, plain).ids]
    blocks = list(packed_dataset(texts, tok, 24))
    assert [block["input_ids"][0] for block in blocks] == [tok.bos_token_id] * len(blocks)
    assert [token for block in blocks for token in block["input_ids"][1:]] == joined[: 23 * len(blocks)]
    assert len(joined) - 23 * len(blocks) < 23
    assert list(packed_dataset(IterableDataset.from_generator(lambda: iter(texts)), tok, 24)) == blocks
    assert (collate(blocks)["labels"][:, 1:] == collate(blocks)["input_ids"][:, 1:]).all()
    assert list(packed_dataset(texts, plain, 24)) == [{"input_ids": joined[start : start + 24]} for start in range(0, len(joined) - 23, 24)]
    with pytest.raises(DataError, match="no room beside the 1"):
        packed_dataset(texts, tok, 1)


def test_what_is_predicted_of_a_longer_prefix_does_not_count():
    block = packed_dataset([{"text": "ab" * 20}], with_bos("<bos> <pad>"), 8)[0]
    assert block["input_ids"][:2] == [1, 0]
    assert block["labels"] == [IGNORED, IGNORED, *block["input_ids"][2:]]


def test_text_after_a_prefix_is_parted_as_text_without_one():
    """The prefix is no prompt of its own: the first share of the block is."""
    blocks = list(packed_dataset([{"text": text} for text in tiny.texts(9)], with_bos(), 24))
    for block, (prompt,) in zip(blocks, batch_prompts(collate(blocks), 99, 0.5)):
        assert prompt == Prompt(block["input_ids"][:12], 12)


def test_a_teacher_across_a_bridge_of_text_is_asked_with_its_prefix(tmp_path):
    args = ChainDistillerConfig(str(tmp_path), bridge="text", teacher_answers=str(tmp_path / "answers"), block_size=24, bf16=False)
    asked = BridgeRows(args, tokenizer(), with_bos()).prompts([{"text": text} for text in tiny.texts(9)], tiny.llama())
    assert len(asked) > 10
    assert {row["input_ids"][0] for row in asked} == {1}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_a_mask_names_is_neither_predicted_nor_counted(tmp_path, side):
    """The loss and its count are those of the same rows without padding."""
    ids = [tokenizer()(text).input_ids[: 10 + place] for place, text in enumerate(tiny.texts(6))]
    pads = [16 - len(row) for row in ids]
    padded = [
        {"input_ids": [0] * pad + row, "attention_mask": [0] * pad + [1] * len(row)} if side == "left"
        else {"input_ids": row + [0] * pad, "attention_mask": [1] * len(row) + [0] * pad} for row, pad in zip(ids, pads)
    ]
    batch = collate(padded)
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert int((batch["labels"][:, 1:] != IGNORED).sum()) == sum(len(row) - 1 for row in ids)
    given = collate([{**row, "labels": row["input_ids"]} for row in padded])
    assert torch.equal(given["labels"], given["input_ids"])
    losses, weights = [], []
    for place, dataset in enumerate(([{"input_ids": row} for row in ids], padded)):
        config = ChainDistillerConfig(
            str(tmp_path / str(place)), max_steps=2, per_device_train_batch_size=3, gradient_accumulation_steps=2, bf16=False, disable_tqdm=True, logging_steps=1,
            save_strategy="no", ce_weight=0.5, learning_rate=1e-1, optim="sgd",
        )
        trainer = ChainDistiller(model=tiny.llama(layers=2, seed=5), teacher=tiny.llama(), args=config, train_dataset=Dataset.from_list(dataset))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append(dict(trainer.model.named_parameters()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-6, msg=name)
