"""A bridge from a teacher cache is the bridge from the live teacher, up to the rounding of log-probabilities."""

import json
import shutil

import numpy as np
import pytest
import tiny
import tokenizers_for_bridge as kinds
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from cbd_hub import ChainDistiller, ChainDistillerConfig
from cbd_hub.distill.cache_writing import write_cache
from cbd_hub.distill.teacher_cache import TeacherCache
from cbd_hub.errors import ArgumentError, DataError
from cbd_hub.files import sha256
from cbd_hub.losses.alignment import prefix_of, token_bytes
from cbd_hub.losses.bridge import shared_loss, shared_top_loss


STUDENT = kinds.byte_level()
TEACHERS = {"llama": kinds.sentencepiece(), "qwen": kinds.MAKERS["qwen"](), "bytes": kinds.bytewise()}
TEXTS = [{"text": text} for text in [*tiny.texts(30), *[text for text in kinds.HARD if text.strip()]]]
ANSWERS = [{"prompt": f"say {text[:12]}", "completion": text} for text in tiny.texts(12)]
CHATS = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]} for text in tiny.texts(8)]
EXAMPLES = [{"prompt": [*CHATS[-1]["messages"], *chat["messages"][:1]], "completion": chat["messages"][1:]} for chat in CHATS[:-1]]
BLOCK = 48


def teacher_of(kind):
    model = tiny.llama(layers=3, hidden=48, seed=3)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(TEACHERS[kind]), mean_resizing=False)
    return model


def student():
    model = tiny.gpt2(layers=2)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(STUDENT), mean_resizing=False)
    return model


def trainer_for(folder, rows, kind, cache, **options):
    arguments = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "bf16": False, "disable_tqdm": True, "save_strategy": "no",
        "block_size": BLOCK, "bridge": "span", **options,
    }
    return ChainDistiller(
        model=student(), args=ChainDistillerConfig(**arguments), train_dataset=rows, processing_class=STUDENT, teacher_processing_class=TEACHERS[kind], teacher_cache=cache,
    )


def cached(folder, rows, kind, **options):
    return write_cache(teacher_of(kind), rows, folder, tokenizer=TEACHERS[kind], top_k=24, bits=16, bos=kind == "llama", **{"block_size": BLOCK, **options})


def live(trainer, teacher, batch):
    """The same batch without what the cache holds, through the live teacher."""
    rows = {name: value for name, value in batch.items() if name not in ("teacher_log_probs", "teacher_top_ids", "teacher_top_log_probs")}
    other = ChainDistiller(
        model=trainer.model, teacher=teacher, args=trainer.args, train_dataset=[{"input_ids": [1, 2], "teacher_input_ids": [1, 2]}],
        processing_class=STUDENT, teacher_processing_class=trainer.bridge.rows.teacher,
    )
    other.teacher_cache = None
    return other.compute_loss(other.model, rows)


@pytest.mark.parametrize("kind", list(TEACHERS))
@pytest.mark.parametrize("rows", [TEXTS, ANSWERS, CHATS, EXAMPLES], ids=["text", "answers", "chats", "examples"])
def test_span_from_the_cache_is_span_from_the_live_teacher(kind, rows, tmp_path):
    size = 4 * BLOCK if rows is EXAMPLES else BLOCK
    cache = cached(tmp_path / "cache", rows, kind, block_size=size)
    trainer = trainer_for(tmp_path / "out", rows, kind, cache, block_size=size)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(trainer.train_dataset))])
    assert (batch["spans"] >= 0).sum() > 40
    value = trainer.compute_loss(trainer.model, batch)
    if "position_ids" in batch:  # rows of a packed block each for itself
        expected = live_packed(trainer, teacher_of(kind), batch)
    else:
        expected = live(trainer, teacher_of(kind), batch)
    assert value.item() > 1e-3
    torch.testing.assert_close(value, expected, rtol=2e-3, atol=1e-6)
    parameters = list(trainer.model.parameters())
    for got, want in zip(*(torch.autograd.grad(loss, parameters) for loss in (value, expected))):
        assert (got - want).norm() <= 5e-3 * want.norm() + 1e-6


def live_packed(trainer, teacher, batch):
    """Positions of the teacher's packed rows are those of the cache's blocks."""
    places = torch.stack([torch.tensor(trainer.teacher_cache[index]["position_ids"] + [0] * (batch["teacher_input_ids"].shape[1] - len(trainer.teacher_cache.ids(index)))) for index in range(len(trainer.teacher_cache))])
    with torch.no_grad():
        logs = teacher(batch["teacher_input_ids"], position_ids=places, use_cache=False).logits.log_softmax(-1)
    own = torch.zeros_like(batch["teacher_log_probs"])
    own[:, 1:] = logs[:, :-1].gather(2, batch["teacher_input_ids"][:, 1:, None]).squeeze(2)
    return trainer.compute_loss(trainer.model, {**batch, "teacher_log_probs": own})


@pytest.mark.parametrize("kind", list(TEACHERS))
def test_blocks_hold_the_text_once_in_order(kind, tmp_path):
    trainer = trainer_for(tmp_path / "out", TEXTS, kind, cached(tmp_path / "cache", TEXTS, kind))
    before, tables = len(prefix_of(STUDENT)), (token_bytes(STUDENT), token_bytes(TEACHERS[kind]))
    rows = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
    ids = [token for row in rows for token in row["input_ids"][before:]]
    expected = [token for row in TEXTS for token in [*STUDENT(row["text"], add_special_tokens=False)["input_ids"], STUDENT.eos_token_id]]
    assert ids == expected[: len(ids)]
    assert len(expected) - len(ids) < 3 * BLOCK
    for row in rows:
        numbers = set(row["spans"]) - {-1}
        assert numbers == set(row["teacher_spans"]) - {-1}
        assert len(numbers) > 3
        for span in numbers:
            sides = [
                b"".join(table[token] for token, number in zip(row[ids], row[spans]) if number == span)
                for table, ids, spans in ((tables[0], "input_ids", "spans"), (tables[1], "teacher_input_ids", "teacher_spans"))
            ]
            assert sides[0].strip() == sides[1].strip() or kind == "qwen" or "▁".encode() in sides[0]


@pytest.mark.parametrize("bridge", ["vocab", "span+vocab"])
def test_shared_tokens_from_the_cache(bridge, tmp_path):
    """Of the likeliest tokens the shared ones are outcomes: never above the whole divergence, and near it where most of the mass is listed."""
    cache = cached(tmp_path / "cache", TEXTS, "llama")
    trainer = trainer_for(tmp_path / "out", TEXTS, "llama", cache, bridge=bridge)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(6)])
    value, expected = trainer.compute_loss(trainer.model, batch), live(trainer, teacher_of("llama"), batch)
    assert 0 < value.item() < expected.item() + 1e-4
    trainer.train()


def test_shared_top_loss_is_its_definition():
    draw = torch.Generator().manual_seed(0)
    hidden, head, bias = (torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in ((7, 6), (31, 6), (31,)))
    target, teacher_head = torch.randn(7, 4, generator=draw, dtype=torch.float64), torch.randn(23, 4, generator=draw, dtype=torch.float64)
    top = (target @ teacher_head.t()).log_softmax(-1).topk(9)
    partner = torch.where(torch.arange(23) % 3 == 0, -1, torch.arange(23) + 2)
    value = shared_top_loss(hidden, head, partner[top.indices], top.values, num_items=5, student_bias=bias, student_logit_scale=0.7, student_softcap=3.0)
    student = (3.0 * torch.tanh((hidden @ head.t() + bias) * 0.7 / 3.0)).softmax(-1)
    expected = 0.0
    for row in range(7):
        p = [(top.values[row, place].exp(), student[row, partner[token]]) for place, token in enumerate(top.indices[row].tolist()) if partner[token] >= 0]
        p.append((1 - sum(pair[0] for pair in p), 1 - sum(pair[1] for pair in p)))
        expected = expected + sum(ours * (ours / theirs).log() for ours, theirs in p)
    torch.testing.assert_close(value, expected / 5)
    for got, want in zip(*(torch.autograd.grad(loss, (hidden, head, bias)) for loss in (value, expected / 5))):
        torch.testing.assert_close(got, want)
    everything = torch.arange(23).expand(7, 23)
    whole = (target @ teacher_head.t()).log_softmax(-1)
    torch.testing.assert_close(
        shared_top_loss(hidden, head, everything, whole), shared_loss(hidden, head, target, teacher_head, torch.arange(23)[:, None].expand(23, 2)), rtol=1e-4, atol=1e-6,
    )


@pytest.mark.parametrize("rows", [TEXTS, CHATS], ids=["text", "chats"])
def test_a_killed_run_goes_on_bit_for_bit_without_a_teacher(rows, tmp_path):
    cache = cached(tmp_path / "cache", rows, "llama")
    weights = []
    for folder, stop in (("a", 0), ("b", 2)):
        more = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "bridge": "span+vocab", "ce_weight": 0.5, "per_device_train_batch_size": 2}
        tiny.stopped_and_resumed(lambda folder=folder, more=more: trainer_for(tmp_path / folder, rows, "llama", cache, **more), tmp_path / folder, stop)
        weights.append(load_file(f"{get_last_checkpoint(tmp_path / folder)}/model.safetensors"))
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_limit_of_tokens_stops_the_student_too(tmp_path):
    cache = cached(tmp_path / "cache", TEXTS, "qwen", max_tokens=3 * BLOCK)
    assert len(cache) == len(trainer_for(tmp_path / "out", TEXTS, "qwen", cache).train_dataset) == 3


def test_what_is_refused(tmp_path):
    cache = cached(tmp_path / "cache", TEXTS, "llama")
    for options, said in (({"bridge": "hidden"}, "bridge=hidden needs the teacher itself"), ({"bridge": "text"}, "bridge=text needs the teacher itself")):
        with pytest.raises(ArgumentError, match=said):
            ChainDistillerConfig(str(tmp_path), teacher_cache=str(tmp_path / "cache"), **options)
    with pytest.raises(ArgumentError, match="hidden_weight=1.0 needs the teacher itself"):
        trainer_for(tmp_path / "out", TEXTS, "llama", cache, hidden_weight=1.0)
    with pytest.raises(ArgumentError, match="pass them as train_dataset"):
        trainer_for(tmp_path / "out", None, "llama", cache)
    with pytest.raises(DataError, match="another text"):
        trainer_for(tmp_path / "out", TEXTS[1:], "llama", cache)
    with pytest.raises(DataError, match="another tokenizer"):
        trainer_for(tmp_path / "out", TEXTS, "qwen", cache)
    with pytest.raises(DataError, match="another sequence packing"):
        trainer_for(tmp_path / "out", TEXTS, "llama", cache, block_size=24)


def test_a_cache_of_schema_1_is_read_and_refused_for_a_bridge_alone(tmp_path):
    new = cached(tmp_path / "new", TEXTS, "qwen")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    record = json.loads((tmp_path / "old" / "cache.json").read_text())
    record["schema_version"] = 1
    del record["source"]["token_log_probs"], record["source"]["packing"]["prefix"]
    for shard in record["shards"]:
        path = tmp_path / "old" / shard["path"]
        Dataset.from_file(str(path)).remove_columns("token_log_probs").save_to_disk(tmp_path / "saved")
        shutil.copyfile(next((tmp_path / "saved").glob("*.arrow")), path)
        shard.update(sha256=sha256(path), bytes=path.stat().st_size)
    (tmp_path / "old" / "cache.json").write_text(json.dumps(record))
    old = TeacherCache.open(tmp_path / "old")
    old.check(rows=TEXTS, tokenizer=TEACHERS["qwen"], block_size=BLOCK)
    assert np.array_equal(old[2]["top_log_probs"], new[2]["top_log_probs"])
    assert "token_log_probs" not in old[2]
    with pytest.raises(ArgumentError, match="make it again with `cbd cache-teacher`"):
        trainer_for(tmp_path / "out", TEXTS, "qwen", old)
