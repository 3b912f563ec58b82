"""A student learns from a teacher of another architecture and vocabulary: exact losses, accumulation, resuming, every kind of data."""

import json

import pytest
import tiny
import tokenizers_for_bridge as kinds
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from cbd_hub import ChainDistiller, ChainDistillerConfig
from cbd_hub.distill.answers import answered_rows
from cbd_hub.distill.bridge_rows import BridgeRows
from cbd_hub.distill.bridging import Bridge, check_vocabularies
from cbd_hub.distill.packing import tokenise
from cbd_hub.distill.rollouts import prompts_of
from cbd_hub.errors import ArgumentError, DataError, VocabularyMismatchError
from cbd_hub.losses.alignment import prefix_of, token_bytes


STUDENT, TEACHER = kinds.byte_level(), kinds.sentencepiece()
TEXTS = [{"text": text} for text in [*tiny.texts(40), *[text for text in kinds.HARD if text.strip()]]]
ANSWERS = [{"prompt": f"say {text[:12]}", "completion": text} for text in tiny.texts(12)]
CHATS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}, {"role": "user", "content": "more"}, {"role": "assistant", "content": text[::-1]}]}
    for text in tiny.texts(8)
]


def resized(model, rows):
    torch.manual_seed(1)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def trainer_for(folder, rows=TEXTS, teacher=None, tokenizer=TEACHER, student=None, **options):
    arguments = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "bf16": False, "disable_tqdm": True,
        "save_strategy": "no", "optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1, "block_size": 24, "bridge": "span", **options,
    }
    return ChainDistiller(
        model=student or resized(tiny.gpt2(layers=2), len(STUDENT)), teacher=teacher or resized(tiny.llama(layers=3, hidden=48, seed=3), len(TEACHER)),
        args=ChainDistillerConfig(**arguments), train_dataset=rows, processing_class=STUDENT, teacher_processing_class=tokenizer,
    )


def dense(trainer, rows, kind, temperature=100.0):
    """The loss row by row and span by span on full logits."""
    total, kept = 0.0, 0
    pairs = dict(trainer.bridge.shared.tolist() if trainer.bridge.shared is not None else [])
    for row in rows:
        logs = [
            model(torch.tensor([row[name]])).logits[0].double().log_softmax(-1)
            for model, name in ((trainer.model, "input_ids"), (trainer.teacher, "teacher_input_ids"))
        ]
        kept += sum(label != -100 for label in row["labels"][1:])
        for span in sorted(set(row["spans"]) - {-1}):
            places = [[place for place, number in enumerate(row[name]) if number == span] for name in ("spans", "teacher_spans")]
            ids = [row["input_ids"], row["teacher_input_ids"]]
            one = all(len(side) == 1 for side in places) and pairs.get(ids[0][places[0][0]]) == ids[1][places[1][0]]
            if "vocab" in kind:
                q, p = (log[side[0] - 1].exp() for log, side in zip(logs, places))
                p, q = p[list(pairs.values())], q[list(pairs)]
                p, q = (torch.cat([part, 1 - part.sum()[None]]) for part in (p, q))
                total = total + (p * (p / q).log()).sum()
            if "span" in kind and not ("vocab" in kind and one):
                q, p = (torch.exp(sum(log[place - 1, side_ids[place]] for place in side) / temperature) for log, side, side_ids in zip(logs, places, ids))
                total = total + temperature * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    return total / kept


@pytest.mark.parametrize("kind", ["span", "vocab", "span+vocab"])
@pytest.mark.parametrize("rows", [TEXTS, ANSWERS, CHATS], ids=["text", "answers", "chats"])
def test_the_loss_is_the_dense_reference(kind, rows, tmp_path):
    trainer = trainer_for(tmp_path, rows, bridge=kind)
    batch = [trainer.train_dataset[index] for index in range(4)]
    trainer.model.train()
    value, expected = trainer.compute_loss(trainer.model, trainer.data_collator(batch)), dense(trainer, batch, kind)
    assert value.item() > 1e-4
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)
    parameters = list(trainer.model.parameters())
    for got, want in zip(*(torch.autograd.grad(loss, parameters) for loss in (value, expected))):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["span", "vocab", "span+vocab"])
def test_a_model_bridged_to_itself_loses_nothing(kind, tmp_path):
    model = resized(tiny.llama(layers=2), len(STUDENT))
    twin = resized(tiny.llama(layers=2), len(STUDENT))
    twin.load_state_dict(model.state_dict())
    trainer = trainer_for(tmp_path, student=model, teacher=twin, tokenizer=STUDENT, bridge=kind)
    assert trainer.compute_loss(model, trainer.data_collator([trainer.train_dataset[0]])).item() == 0.0


@pytest.mark.parametrize("options", [{}, {"bridge": "span+vocab", "ce_weight": 0.5}, {"hidden_weight": 1.0}, {"bridge": "hidden", "hidden_balance": True}])
def test_eight_by_one_is_one_by_eight(options, tmp_path):
    whole = trainer_for(tmp_path / "a", **options)
    pieces = trainer_for(tmp_path / "b", **options, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    before = {name: tensor.detach().clone() for name, tensor in whole.model.named_parameters()}
    whole.train()
    pieces.train()
    for (name, first), second in zip(whole.model.named_parameters(), pieces.model.parameters()):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.equal(before[name], tensor) for name, tensor in whole.model.named_parameters())
    assert not any("cbd_projectors" in name for name, _ in whole.model.named_parameters())


@pytest.mark.parametrize("options", [{"bridge": "span+vocab"}, {"hidden_weight": 1.0}, {"bridge": "text", "max_new_tokens": 6}])
def test_a_killed_run_goes_on_bit_for_bit(options, tmp_path):
    weights = []
    for folder, stop in (("a", 0), ("b", 2)):
        more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "per_device_train_batch_size": 4}
        made = tiny.stopped_and_resumed(lambda folder=folder, more=more: trainer_for(tmp_path / folder, **{**more, **options}), tmp_path / folder, stop)
        weights.append(load_file(f"{get_last_checkpoint(tmp_path / folder)}/model.safetensors"))
        assert made.state.global_step == 4
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.parametrize(("student", "teacher"), [("gpt2", "llama"), ("llama", "qwen"), ("gemma", "gpt2_larger"), ("qwen", "prefix")])
def test_blocks_hold_the_text_once(student, teacher):
    """Tokens of all blocks in a row are the texts, and tokens of a span have the same bytes on both sides."""
    a, b = kinds.MAKERS[student](), kinds.MAKERS[teacher]()
    bridge = Bridge(ChainDistillerConfig("out", bridge="span", block_size=24), a, b)
    rows = list(bridge.rows.blocks([{"text": text} for text in tiny.texts(20)], 96))
    for name, tokenizer in (("input_ids", a), ("teacher_input_ids", b)):
        before = len(prefix_of(tokenizer))
        ids = [token for row in rows for token in row[name][before:]]
        expected = [token for text in tiny.texts(20) for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
        assert ids == expected[: len(ids)]
        assert len(expected) - len(ids) < 96
    tables = token_bytes(a), token_bytes(b)
    for row in rows:
        assert len(row["input_ids"]) <= 24
        for span in set(row["spans"]) - {-1}:
            sides = [b"".join(table[token] for token, number in zip(row[ids], row[spans]) if number == span)
                     for table, ids, spans in ((tables[0], "input_ids", "spans"), (tables[1], "teacher_input_ids", "teacher_spans"))]
            assert sides[0].strip() == sides[1].strip()


def test_spans_of_chats_are_what_the_assistant_says(tmp_path):
    trainer = trainer_for(tmp_path, CHATS, block_size=256)
    row = trainer.train_dataset[0]
    for ids, spans, tokenizer in (("input_ids", "spans", STUDENT), ("teacher_input_ids", "teacher_spans", TEACHER)):
        inside = [token for token, number in zip(row[ids], row[spans]) if number >= 0]
        said = tokenizer.decode(inside, skip_special_tokens=True)
        first = CHATS[0]["messages"][1]["content"]
        assert first[-8:] in said
        assert "user" not in said
        assert inside.count(tokenizer.eos_token_id) == 2
    assert [label != -100 for label in row["labels"]].count(True) >= [number >= 0 for number in row["spans"]].count(True)


def test_examples_in_a_prompt_are_no_answers():
    turns = CHATS[0]["messages"]
    bridge = Bridge(ChainDistillerConfig("unused", bridge="span", block_size=256, report_to="none"), STUDENT, TEACHER)
    row, whole = (next(bridge.rows.blocks([given], 512)) for given in ({"prompt": turns[:3], "completion": turns[3:]}, {"messages": turns}))
    assert row["labels"] == tokenise({"prompt": turns[:3], "completion": turns[3:]}, STUDENT).labels
    for ids, spans, tokenizer in (("input_ids", "spans", STUDENT), ("teacher_input_ids", "teacher_spans", TEACHER)):
        assert row[ids] == whole[ids]
        assert tokenizer.decode([token for token, number in zip(row[ids], row[spans]) if number >= 0]).strip() == f"{turns[3]['content']}<eos>"


@pytest.mark.parametrize("answer", ["a", "assistant", "user", "hi", "[assistant]", "t"])
def test_answers_that_the_template_says_too_are_found_in_their_turn(answer):
    chat = [{"role": "system", "content": f"{answer} {answer}"}, {"role": "user", "content": answer}, {"role": "assistant", "content": answer}]
    bridge = Bridge(ChainDistillerConfig("unused", bridge="span", block_size=256, report_to="none"), STUDENT, TEACHER)
    (row,) = bridge.rows.blocks([{"messages": chat}], 512)
    for ids, spans, tokenizer in (("input_ids", "spans", STUDENT), ("teacher_input_ids", "teacher_spans", TEACHER)):
        inside = [place for place, number in enumerate(row[spans]) if number >= 0]
        assert b"".join(token_bytes(tokenizer)[row[ids][place]] for place in inside) == answer.encode() + b"<eos>"
        assert inside[-1] > len(row[ids]) - 4
        if spans == "spans":
            assert all(row["labels"][place] != -100 for place in inside)


def test_answers_do_not_begin_or_end_with_half_a_character(tmp_path):
    teacher = resized(tiny.llama(layers=3, hidden=48, seed=3), len(STUDENT))
    trainer = trainer_for(tmp_path, [{"text": "日本語のテキストと한국어 👍🏽 " * 6}], teacher=teacher, tokenizer=STUDENT, bridge="text", max_new_tokens=3)
    assert trainer.train_dataset is not None
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "answers" / "answers-00000.jsonl").read_text().splitlines()]
    assert len(lines) > 2
    assert not any(side.startswith("\ufffd") or side.endswith("\ufffd") for line in lines for side in (line["prompt"], line["completion"]))


def test_the_teacher_may_begin_with_its_own_token():
    bridge = Bridge(ChainDistillerConfig("out", bridge="span", block_size=16), STUDENT, TEACHER)
    assert (prefix_of(STUDENT), prefix_of(TEACHER)) == ([], [TEACHER.bos_token_id])
    row = next(iter(bridge.rows.blocks(TEXTS, 64)))
    assert row["teacher_input_ids"][0] == TEACHER.bos_token_id
    assert row["teacher_spans"][0] == row["spans"][0] == -1


def test_streams_and_evaluation_sets_are_read_by_both(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(TEXTS))
    trainer = trainer_for(tmp_path, stream)
    trainer.train()
    loss = trainer.evaluate(Dataset.from_list(TEXTS[:10]))["eval_loss"]
    assert loss > 0
    assert trainer.evaluate(Dataset.from_list(TEXTS[:10]))["eval_loss"] == loss
    assert trainer.predict(Dataset.from_list(TEXTS[:10])).metrics["test_loss"] == loss


def test_text_trains_on_the_teachers_answers(tmp_path):
    asked = [{"prompt": chat["messages"][:1]} for chat in CHATS]
    for number, rows in enumerate((TEXTS, ANSWERS, CHATS, asked)):
        trainer = trainer_for(tmp_path / str(number), rows, bridge="text", max_new_tokens=5)
        trainer.train()
        assert (tmp_path / str(number) / "answers" / "answers-00000.jsonl").is_file()
        assert "teacher_input_ids" not in trainer.train_dataset.column_names
        assert max(max(row["input_ids"]) for row in trainer.train_dataset) < len(STUDENT)


def test_empty_answers_are_left_out():
    rows = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]}, {"text": "x"}]
    made = answered_rows(rows, [" yes", "ok ", " "], ["a", "b", "x"])
    assert made == [{"prompt": "a", "completion": " yes"}, {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "ok"}]}]
    with pytest.raises(DataError, match="every answer of the teacher is empty"):
        answered_rows(rows[:1], [""], ["a"])


@pytest.mark.parametrize("row", [
    {"messages": [*CHATS[0]["messages"][:2], {"role": "user", "content": "C?"}]}, {"messages": CHATS[0]["messages"][:2]}, {"prompt": CHATS[0]["messages"][:1]},
    {"prompt": CHATS[0]["messages"][:2]}, {"prompt": CHATS[0]["messages"][:1], "completion": CHATS[0]["messages"][1:]},
])
def test_an_answer_stands_behind_what_was_asked(row):
    """The teacher is asked all before the last answer of a chat, whatever comes after it."""
    rows = BridgeRows(ChainDistillerConfig("out", bridge="text", block_size=256), STUDENT, TEACHER)
    (asked,) = prompts_of(rows.prompts([row], tiny.llama())[0], 9, 0.5)
    (made,) = rows.answered({"completion": ["yes"], "prompt": [""]})
    said = tokenise(made, TEACHER)
    assert prompts_of({"input_ids": said.ids, "labels": said.labels}, 9, 0.5) == [asked]


def test_what_a_bridge_refuses(tmp_path):
    for options, said in (
        ({"bridge": "words"}, "bridge='words' is not known"), ({"path_fraction": 0.3}, "path_fraction=0.3 does not go with bridge=span"),
        ({"span_temperature": 0.0}, "span_temperature=0.0"), ({"bridge": "text", "hidden_weight": 1.0}, "hidden_weight=1.0 does not go with bridge=text"),
        ({"tokenizer": None}, "pass teacher_processing_class="),
    ):
        with pytest.raises(ArgumentError, match=said):
            trainer_for(tmp_path, **options)
    with pytest.raises(VocabularyMismatchError, match="give the teacher its own tokenizer"):
        trainer_for(tmp_path, tokenizer=kinds.byte_level(900))
    with pytest.raises(DataError, match="these rows have input_ids"):
        trainer_for(tmp_path, [{"input_ids": [1, 2]}])
    with pytest.raises(DataError, match="row 1: text holds a lone surrogate"):
        trainer_for(tmp_path, [{"text": "fine"}, {"text": "\ud800"}])
    with pytest.raises(DataError, match=r"row 0: messages\[1\] holds a lone surrogate"):
        trainer_for(tmp_path, [{"messages": [CHATS[0]["messages"][0], {"role": "assistant", "content": "\ud83d"}]}])
    silent = kinds.sentencepiece()
    silent.chat_template = None
    with pytest.raises(DataError, match="row 0: the teacher's tokenizer: .* no chat template"):
        trainer_for(tmp_path, CHATS, tokenizer=silent)


@pytest.mark.parametrize("options", [{}, {"bridge": "vocab"}, {"bridge": "span+vocab"}, {"bridge": "text", "max_new_tokens": 4}])
def test_added_tokens_beyond_the_rows_are_no_hindrance(options, tmp_path):
    """Gemma 3's text models have no row for the image token of their tokenizers."""
    plain = trainer_for(tmp_path / "plain", **options)
    spare = trainer_for(tmp_path / "spare", tokenizer=kinds.with_spare(kinds.sentencepiece()), **options)
    for trainer in (plain, spare):
        trainer.train()
    for (name, first), second in zip(plain.model.named_parameters(), spare.model.parameters()):
        assert torch.equal(first, second), name


def test_shared_tokens_have_rows(tmp_path):
    """Also where both tokenizers have a token that one of the models has no row for, and it is not special."""
    both = [kinds.byte_level(), kinds.sentencepiece()]
    for tokenizer in both:
        tokenizer.add_tokens(["<extra>"])
    bridge = Bridge(ChainDistillerConfig("out", bridge="vocab"), *both)
    assert both[0].convert_tokens_to_ids("<extra>") in bridge.shared[:, 0].tolist()
    whole = len(bridge.shared)
    check_vocabularies(bridge.rows, len(both[0]), len(both[1]) - 1)
    assert both[0].convert_tokens_to_ids("<extra>") not in bridge.shared[:, 0].tolist()
    assert len(bridge.shared) == whole - 1


@pytest.mark.parametrize("rows", [
    [*TEXTS[:1], {"text": "an <spare_0> in it"}], [*ANSWERS[:1], {"prompt": "a <spare_0>", "completion": "b"}],
    [*CHATS[:1], {"messages": [{"role": "user", "content": "<spare_0>"}, {"role": "assistant", "content": "b"}]}],
], ids=["text", "answers", "chats"])
def test_a_text_with_a_token_beyond_the_rows_is_refused(rows, tmp_path):
    with pytest.raises(DataError, match=r"row 1: the teacher's tokenizer reads <spare_0> as the token \d+, for which its checkpoint has no row"):
        trainer_for(tmp_path, rows, tokenizer=kinds.with_spare(kinds.sentencepiece()))


def test_a_prompt_with_a_token_beyond_the_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="the teacher's tokenizer reads <spare_0>"):
        trainer_for(tmp_path, [{"prompt": "a <spare_0>", "completion": "b"}], tokenizer=kinds.with_spare(kinds.sentencepiece()), bridge="text", max_new_tokens=4)
