"""The teacher cache: exact tokens, bounded rounding, refusals by fingerprint, resuming bit for bit, training as from the live teacher."""

import json
import shutil
import zlib

import numpy as np
import pytest
import tiny
import tokenizers_for_bridge as kinds
import torch
import yaml
from conftest import online
from conftest import recipe as make_recipe
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard, constants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file
from test_cache_writing import BLOCK, K, files, texts, write
from test_distill import resumed as resumed_live
from test_distill import rows as masked_rows
from test_packing import with_bos
from transformers import AutoModelForCausalLM

from cbd_hub import ChainDistiller, ChainDistillerConfig, distill_chain
from cbd_hub.distill.cache_record import CacheRecord
from cbd_hub.distill.packing import packed_dataset, tokenise
from cbd_hub.distill.teacher_cache import TeacherCache
from cbd_hub.distill.top_codec import TopCodec, rounding_kl
from cbd_hub.errors import ArgumentError, DataError, IntegrityError, VocabularyMismatchError
from cbd_hub.files import sha256
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.losses.divergence import forward_kl
from cbd_hub.losses.head import distillation_loss
from cbd_hub.losses.log_probs import top_log_probs


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "c"
    write(folder)
    return folder


# -- the codec ---------------------------------------------------------------------------------------------------------------


def outcomes(logits, k):
    """The k likeliest tokens in rising order, their log-probabilities and that of the rest."""
    log_probs = torch.from_numpy(logits).double().log_softmax(-1)
    ids = log_probs.topk(k, -1).indices.sort(-1).values
    rest = log_probs.scatter(1, ids, -torch.inf).logsumexp(-1)
    return ids.numpy(), log_probs.gather(1, ids).numpy(), rest.numpy()


@settings(max_examples=60, deadline=None)
@given(
    positions=st.integers(0, 9), vocab=st.sampled_from([5, 300, 70_000]), bits=st.sampled_from([4, 6, 8, 9, 16]), data=st.data(),
    scale=st.sampled_from([0.0, 0.1, 3.0, 40.0]),
)
def test_tokens_come_back_exactly_and_rounding_keeps_its_bound(positions, vocab, bits, data, scale):
    """Any distribution, from uniform to one token with everything: ids exact, a sum of 1, KL within the bound that the documents promise."""
    k = data.draw(st.integers(1, min(vocab - 1, 40)))
    seed = data.draw(st.integers(0, 10**6))
    logits = scale * np.random.default_rng(seed).standard_normal((positions, vocab))
    ids, log_probs, rest = outcomes(logits, k)
    codec = TopCodec(k, bits, vocab)
    got, kept = codec.decode(codec.encode(ids, log_probs, rest), positions)
    assert np.array_equal(got, ids)
    assert (np.exp(kept, dtype=np.float64).sum(1) <= 1 + 1e-6).all()
    assert (rounding_kl(log_probs, rest, kept) <= codec.worst + 1e-6).all()


def test_the_rest_keeps_its_mass():
    """The bucket is an outcome like any other: within a step, also where it is tiny or nearly everything."""
    for mass in (0.9, 0.3, 1e-3, 1e-5):
        codec = TopCodec(2, 12, 100)
        listed = np.log([[0.75 * (1 - mass), 0.25 * (1 - mass)]])
        _, kept = codec.decode(codec.encode(np.array([[5, 80]]), listed, np.log([mass])), 1)
        assert 1 - np.exp(kept, dtype=np.float64).sum() == pytest.approx(mass, rel=codec.step, abs=2e-7)


def test_rounding_kl_is_its_definition():
    """By hand: (1/2, 1/4 | 1/4) kept as (1/4, 1/2 | 1/4) is 1/4 ln 2."""
    before, after = np.log([[0.5, 0.25]]), np.log([[0.25, 0.5]])
    assert rounding_kl(before, np.log([0.25]), after)[0] == pytest.approx(0.25 * np.log(2), rel=1e-6)


@pytest.mark.parametrize(("k", "limit"), [(128, 300), (50, 120)])
def test_bytes_stay_within_the_promise(k, limit):
    """Distributions with a language model's traits: a popular vocabulary, heavy heads, a block of 128 positions."""
    draw = np.random.default_rng(0)
    vocab, positions = 49_152, 127
    popularity = -1.1 * np.log(np.arange(1, vocab + 1))[draw.permutation(vocab)]
    logits = (popularity + 2.2 * draw.standard_normal((positions, vocab))).astype(np.float32)
    ids, log_probs, rest = outcomes(logits, k)
    codec = TopCodec(k, 8, vocab)
    data = codec.encode(ids, log_probs, rest)
    assert len(data) / positions + 12 <= limit  # with ids, labels and positions
    assert rounding_kl(log_probs, rest, codec.decode(data, positions)[1]).mean() < 2e-4


@pytest.mark.parametrize(("damage", "message"), [
    (lambda data: data[:-6], "not the"), (lambda data: b"\0" + data[1:], "no zlib stream"), (lambda data: data + b"x", "not the"), (lambda data: b"", "not the"),
    (lambda data: zlib.compress(b"\0" * 2**22), "not the"), (lambda data: zlib.compress(b"\xff" * 111), "not below the vocabulary"),
    (lambda data: zlib.compress(b"\2" * 36 + b"\0" * 75), "more or fewer"),
])
def test_hostile_bytes_are_refused(damage, message):
    ids, log_probs, rest = outcomes(np.random.default_rng(1).standard_normal((3, 260)), 12)
    codec = TopCodec(12, 8, 260)
    data = codec.encode(ids, log_probs, rest)
    assert len(zlib.decompress(data)) == 3 * 12 * 3 + 3
    with pytest.raises(DataError, match=message):
        codec.decode(damage(data), 3)


@settings(max_examples=100, deadline=None)
@given(raw=arrays(np.uint8, 3 * 2 * 3 + 3))
def test_random_bytes_decode_to_distributions_or_are_refused(raw):
    codec = TopCodec(2, 8, 300)
    try:
        ids, kept = codec.decode(zlib.compress(raw.tobytes()), 3)
    except DataError:
        return
    assert (np.diff(ids, axis=1) > 0).all()
    assert ids.min() >= 0
    assert ids.max() < 300
    assert (np.exp(kept).sum(1) <= 1 + 1e-6).all()


def test_top_log_probs_are_the_dense_reference():
    hidden, head, bias = torch.randn(9, 7, dtype=torch.float64), torch.randn(41, 7, dtype=torch.float64), torch.randn(41, dtype=torch.float64)
    labels = torch.randint(0, 37, (9,))
    ids, listed, rest, chosen, drawn, drawn_log_probs = top_log_probs(hidden, head, 5, labels, bias=bias, logit_scale=0.5, softcap=3.0, vocab_size=37, draws=2)
    expected = (3 * torch.tanh((hidden @ head.T + bias) * 0.5 / 3))[:, :37].log_softmax(-1)
    torch.testing.assert_close(listed, expected.gather(1, ids))
    torch.testing.assert_close(listed.sort(-1).values, expected.topk(5, -1).values.flip(-1))
    torch.testing.assert_close(rest.exp() + listed.exp().sum(-1), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(chosen, expected.gather(1, labels[:, None]).squeeze(1))
    torch.testing.assert_close(drawn_log_probs, expected.gather(1, drawn))


# -- the folder --------------------------------------------------------------------------------------------------------------


def test_a_cache_is_the_teacher(family, tmp_path):
    """Every position holds the teacher's own likeliest tokens and their log-probabilities, and the figures are what they say."""
    teacher, student = tiny.FAMILIES[family](), tiny.FAMILIES[family](layers=2, seed=3)
    cache = write(tmp_path / "c", teacher, bits=12, student=student, tail_draws=0)
    reads, logits, ours = [], [], []
    for row in (cache[index] for index in range(len(cache))):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits.append(teacher(ids).logits[0, :-1].double())
            ours.append(student(ids).logits[0, :-1].double())
        log_probs = logits[-1].log_softmax(-1)
        kept_ids = torch.from_numpy(row["top_ids"][:-1])
        torch.testing.assert_close(log_probs.gather(1, kept_ids).sort(-1).values, log_probs.topk(K, -1).values.flip(-1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.from_numpy(row["top_log_probs"][:-1]).double(), log_probs.gather(1, kept_ids), rtol=0, atol=cache.codec.step)
        assert not row["top_ids"][-1].any()
        own = log_probs.gather(1, ids[0, 1:, None]).squeeze(1)
        torch.testing.assert_close(torch.from_numpy(row["token_log_probs"][1:]).double(), own, rtol=1e-3, atol=1e-6)
        assert row["token_log_probs"][0] == 0
        reads.append(1 - np.exp(row["top_log_probs"][:-1]).sum(-1))
    figures = cache.record.figures
    assert figures.tail_mass == pytest.approx(float(np.mean(reads)), rel=1e-3)
    assert 0 < figures.rounding_kl <= figures.rounding_kl_max <= cache.codec.worst
    size = sum(path.stat().st_size for path in (tmp_path / "c" / "data").iterdir())
    assert figures.bytes_per_token == pytest.approx(size / (len(cache) * BLOCK))
    full = forward_kl(torch.stack(ours), torch.stack(logits), torch.ones(len(cache), BLOCK - 1, dtype=torch.bool))
    assert figures.student.full == pytest.approx(float(full), rel=1e-4)
    assert 0 < figures.student.kept < figures.student.full


def test_datasets_reads_it_without_cbd_hub(cache, tmp_path):
    read = load_dataset(str(cache), cache_dir=str(tmp_path), split="train")
    opened = TeacherCache.open(cache)
    assert read.column_names == ["input_ids", "token_log_probs", "teacher_top", "teacher_tail"]
    assert np.allclose(read["token_log_probs"][5], opened[5]["token_log_probs"])
    assert len(read) == len(opened) > 64
    assert read["input_ids"][5] == opened[5]["input_ids"]


def test_chats_and_masked_rows_keep_their_columns_and_only_what_counts(tmp_path):
    chats = [{"prompt": f"say {index}", "completion": f"{index} it is"} for index in range(12)]
    teacher = tiny.llama()
    cache = write(tmp_path / "a", teacher, chats, bits=12)
    for row, block in zip((cache[index] for index in range(len(cache))), packed_dataset(chats, tiny.tokenizer(), BLOCK), strict=True):
        assert {name: row[name] for name in block} == block
        predicts = np.array([*(label != -100 for label in row["labels"][1:]), False])
        assert (row["top_log_probs"].any(-1) == predicts).all()
        assert (row["token_log_probs"] != 0).tolist() == np.roll(predicts, 1).tolist()
        with torch.no_grad():
            log_probs = teacher(torch.tensor([row["input_ids"]]), position_ids=torch.tensor([row["position_ids"]]), use_cache=False).logits[0].log_softmax(-1)
        kept = torch.from_numpy(row["top_ids"][predicts])
        torch.testing.assert_close(torch.from_numpy(row["top_log_probs"][predicts]), log_probs[predicts].gather(1, kept), rtol=0, atol=0.01)
    blocks = write(tmp_path / "b", teacher, masked_rows())
    assert blocks.record.source.text.sha256 is None
    blocks.check(rows=masked_rows(), teacher=teacher, tokenizer=tiny.tokenizer())
    with pytest.raises(DataError, match="another text or sequence packing"):
        blocks.check(rows=masked_rows(seed=1))


def test_a_row_of_a_packed_block_is_cached_as_it_is_alone(every, tmp_path):
    """Also where the architecture itself does not part packed rows."""
    chats = [{"prompt": f"say {index}", "completion": f"{index} it is"} for index in range(6)]
    teacher = tiny.EVERY[every]()
    cache = write(tmp_path / "c", teacher, chats, block_size=64)
    alone = iter(tokenise(row, tiny.tokenizer()) for row in chats)
    for row in (cache[index] for index in range(len(cache))):
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        for first, last in zip(starts, [*starts[1:], len(row["input_ids"])]):
            ids = torch.tensor([next(alone).ids])
            assert row["input_ids"][first:last] == ids[0].tolist()
            with torch.no_grad():
                own = teacher(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1).numpy()
            said = row["token_log_probs"][first + 1 : last]
            assert np.allclose(said[said != 0], own[said != 0], rtol=1e-3, atol=1e-4)
    assert next(alone, None) is None


def test_with_a_prefix_the_cache_is_the_live_teacher(tmp_path):
    """What is made by default and what live training packs are the same blocks, and have the same loss."""
    tok, teacher = with_bos(), tiny.llama()
    cache = write(tmp_path / "c", teacher, tokenizer=tok, bits=16, top_k=259, tail_draws=0)
    losses = []
    for source in (cache, None):
        trainer = trainer_for(tmp_path / "out", source, teacher=teacher, train_dataset=texts(), processing_class=tok, block_size=BLOCK)
        assert {trainer.train_dataset[index]["input_ids"][0] for index in range(len(trainer.train_dataset))} == {tok.bos_token_id}
        losses.append(trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[index] for index in range(6)])).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_cache_keeps_the_packing_that_it_was_made_with(tmp_path):
    """One without the prefix is opened and checked by its own record; blocks packed otherwise are refused."""
    tok = with_bos()
    for prefixed in (True, False):
        cache = write(tmp_path / str(prefixed), tokenizer=tok, bos=prefixed)
        cache.check(rows=texts(), tokenizer=tok, block_size=BLOCK)
        with pytest.raises(DataError, match="another text or sequence packing"):
            cache.check(rows=packed_dataset(texts(), tiny.tokenizer() if prefixed else tok, BLOCK), block_size=BLOCK)


def test_a_cache_is_refused_for_anything_but_what_it_was_made_of(cache):
    opened, tokenizer = TeacherCache.open(cache), tiny.tokenizer()
    same = {"teacher": tiny.llama(), "tokenizer": tokenizer, "rows": texts(), "block_size": BLOCK}
    opened.check(**same)
    opened.check(**{**same, "teacher": tiny.llama().double(), "rows": packed_dataset(texts(), tokenizer, BLOCK)})
    nearly = tiny.llama()
    nearly.model.layers[3].mlp.down_proj.weight.data[7, 3] += 1e-3
    other = tiny.tokenizer()
    other.add_tokens(["teacher"])
    edited, shuffled = texts(), texts()[::-1]
    edited[-1] = {"text": edited[-1]["text"] + "!"}
    blocks = [dict(row) for row in packed_dataset(texts(), tokenizer, BLOCK)]
    for change, what in (
        ({"teacher": nearly}, "teacher"), ({"teacher": tiny.llama(seed=1)}, "teacher"), ({"tokenizer": other}, "tokenizer"),
        ({"rows": edited}, "text"), ({"rows": shuffled}, "text"), ({"rows": texts(41)}, "text"), ({"rows": texts()[:-1]}, "text"),
        ({"block_size": 16}, "sequence packing"), ({"rows": blocks[::-1]}, "text or sequence packing"), ({"rows": blocks[:-1]}, "text or sequence packing"),
        ({"rows": packed_dataset(texts(), tokenizer, 16)}, "text or sequence packing"),
    ):
        with pytest.raises(DataError, match=f"another {what}: .*make a cache for this one"):
            opened.check(**{**same, **change})


def test_a_cache_that_stopped_at_a_limit_is_of_the_first_documents(tmp_path):
    cache = write(tmp_path / "c", max_tokens=10 * BLOCK)
    assert len(cache) == 10
    assert not cache.record.source.text.complete
    cache.check(rows=texts(), tokenizer=tiny.tokenizer(), block_size=BLOCK)
    cache.check(rows=texts(20), tokenizer=tiny.tokenizer(), block_size=BLOCK)
    with pytest.raises(DataError, match="another text"):
        cache.check(rows=texts()[1:], tokenizer=tiny.tokenizer(), block_size=BLOCK)
    with pytest.raises(DataError, match="another text"):
        cache.check(rows=texts(2), tokenizer=tiny.tokenizer(), block_size=BLOCK)


def test_bf16_files_and_their_fp32_load_are_one_teacher(tmp_path):
    teacher = tiny.llama().bfloat16()
    cache = write(tmp_path / "c", teacher)
    assert cache.record.source.teacher.dtype == "bfloat16"
    cache.check(teacher=tiny.llama().bfloat16().float())
    cast = write(tmp_path / "d", tiny.llama(), dtype=torch.bfloat16)
    assert cast.record.source.teacher.dtype == "bfloat16"
    tiny.save(tiny.llama(), tmp_path / "model")
    write(tmp_path / "e", AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16))
    made, loaded = ({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.arrow")} for name in ("d", "e"))
    assert made
    assert made == loaded, "the frequencies of rotary positions are exact in both"


def test_a_teacher_in_several_files_is_the_same_teacher(family, tmp_path):
    """However its weights are spread over files; and another one as soon as one number in one file differs."""
    teacher = tiny.FAMILIES[family]()
    cache = write(tmp_path / "c", teacher)
    teacher.save_pretrained(tmp_path / "one")
    teacher.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    for name in ("one", "many"):
        cache.check(teacher=AutoModelForCausalLM.from_pretrained(tmp_path / name))
    tensors = load_file(shards[-1])
    key = min(tensors)
    tensors[key].view(-1)[-1] += 1e-3
    save_file(tensors, shards[-1], metadata={"format": "pt"})
    with pytest.raises(DataError, match="another teacher"):
        cache.check(teacher=AutoModelForCausalLM.from_pretrained(tmp_path / "many"))


def test_damaged_files_and_rows_are_named(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "c")
    shard = sorted((tmp_path / "c" / "data").iterdir())[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-64])
    with pytest.raises(IntegrityError, match=r"train-00001.*cut short"):
        TeacherCache.open(tmp_path / "c")
    shard.write_bytes(whole[:-64] + b"x" * 64)
    with pytest.raises(IntegrityError, match=r"train-00001.*damaged"):
        TeacherCache.open(tmp_path / "c")
    shard.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        TeacherCache.open(tmp_path / "c")


@pytest.mark.parametrize(("column", "value", "message"), [
    ("teacher_top", b"nonsense", "no zlib stream"), ("token_log_probs", [0.5] * 32, "no log-probabilities"), ("token_log_probs", [-1.0], "no log-probabilities"), ("teacher_top", None, "no zlib stream"), ("input_ids", [400] * 32, "0 to 259"), ("input_ids", [-1] * 32, "0 to 259"),
    ("input_ids", [], "0 numbers"), ("input_ids", [5] * 9, "the top tokens are not"), ("input_ids", [None] * 32, "int"),
])
def test_a_hostile_row_is_named(cache, tmp_path, column, value, message):
    """A row that its own hashes vouch for is still checked: a stranger may have recorded them."""
    shutil.copytree(cache, tmp_path / "c")
    path = sorted((tmp_path / "c" / "data").iterdir())[0]
    read = Dataset.from_file(str(path))
    rows = list(read)
    rows[3][column] = value
    Dataset.from_list(rows, features=read.features).save_to_disk(tmp_path / "saved")
    shutil.copyfile(next((tmp_path / "saved").glob("*.arrow")), path)
    record = json.loads((tmp_path / "c" / "cache.json").read_text())
    record["shards"][0].update(sha256=sha256(path), bytes=path.stat().st_size)
    (tmp_path / "c" / "cache.json").write_text(json.dumps(record))
    opened = TeacherCache.open(tmp_path / "c")
    assert len(opened[2]["top_ids"]) == BLOCK
    with pytest.raises(DataError, match=rf"row 3 of .* is damaged: .*{message}"):
        opened[3]


@pytest.mark.parametrize(("change", "message"), [
    (lambda record: record.update(schema_version=4), "pip install -U"), (lambda record: record["source"].update(top_k=0), "source.top_k"),
    (lambda record: record["shards"][0].update(path="../train-00000-of-00001.arrow"), "shards.0.path"), (lambda record: record["shards"].pop(), "contradicts itself"),
    (lambda record: record["source"].update(columns=["teacher"]), "contradicts itself"), (lambda record: record.pop("figures"), "figures"),
    (lambda record: record["source"].update(columns=["input_ids", "labels"]), "rows of input_ids, token_log_probs, teacher_top, teacher_tail, not"),
])
def test_a_hostile_record_is_refused(cache, tmp_path, change, message):
    shutil.copytree(cache, tmp_path / "c")
    record = json.loads((tmp_path / "c" / "cache.json").read_text())
    change(record)
    (tmp_path / "c" / "cache.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=message):
        TeacherCache.open(tmp_path / "c")
    (tmp_path / "c" / "cache.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        CacheRecord.read(tmp_path / "c")


# -- training ----------------------------------------------------------------------------------------------------------------


def trainer_for(folder, cache, seed=3, **options):
    arguments = {
        "max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "bf16": False, "disable_tqdm": True, "save_strategy": "no", "optim": "sgd",
        "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1, "block_size": BLOCK, **options,
    }
    given = {name: arguments.pop(name) for name in ("teacher", "train_dataset", "eval_dataset", "processing_class") if name in arguments}
    return ChainDistiller(model=tiny.llama(layers=2, seed=seed), args=ChainDistillerConfig(str(folder), **arguments), teacher_cache=cache, **given)


def weights(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "skew_kl"])
def test_training_from_the_cache_is_training_on_the_live_top_tokens(tmp_path, divergence):
    """At 16 bits the loss and its gradient are those of the teacher's top tokens computed on the spot; at 8 bits they are near."""
    teacher = tiny.llama()
    for bits, tolerance in ((16, 1e-4), (8, 0.02)):
        cache = write(tmp_path / f"{bits}", teacher, bits=bits, tail_draws=0)
        trainer = trainer_for(tmp_path / "out", cache, divergence=divergence, ce_weight=0.2, teacher=teacher, train_dataset=texts(), processing_class=tiny.tokenizer())
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(6)])
        value = trainer.compute_loss(trainer.model, batch)
        with torch.no_grad():
            target = ModelRunner(teacher)(batch["input_ids"])
        ids, log_probs, *_ = top_log_probs(target.hidden.flatten(0, 1), target.head.weight, K, batch["input_ids"].flatten())
        output = ModelRunner(trainer.model)(batch["input_ids"])
        labels = torch.full_like(batch["labels"], -100)
        labels[:, :-1] = batch["labels"][:, 1:]
        expected = distillation_loss(
            output.hidden.flatten(0, 1), output.head.weight, None, None, labels.flatten(), divergence=divergence, ce_weight=0.2, teacher_top=(ids, log_probs),
        )
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=1e-5)
        names, parameters = zip(*trainer.model.named_parameters())
        for name, got, want in zip(names, torch.autograd.grad(value, parameters), torch.autograd.grad(expected, parameters)):
            assert (got - want).norm() <= 5 * tolerance * want.norm() + 1e-7, name


def test_eight_by_one_is_one_by_eight_and_no_teacher_is_needed(tmp_path):
    """Also on rows of unequal length with masked labels, where a mean of means would be wrong."""
    cache = write(tmp_path / "c", rows=masked_rows())
    whole = trainer_for(tmp_path / "a", cache)
    pieces = trainer_for(tmp_path / "b", tmp_path / "c", per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert whole.teacher is None
    for trainer in (whole, pieces):
        trainer.train()
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(pieces)[name], rtol=1e-4, atol=1e-6, msg=name)
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, pieces)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("stop", [3, 5])
def test_stopped_and_resumed_equals_never_stopped(cache, tmp_path, stop, monkeypatch):
    monkeypatch.setattr("test_distill.trainer_for", lambda family, folder, **options: trainer_for(folder, cache, **options))
    whole, again = resumed_live("llama", tmp_path / "a", 0), resumed_live("llama", tmp_path / "b", stop)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_trainer_refuses_what_the_cache_is_not_for(cache, tmp_path):
    for options, error, message in (
        ({"teacher": tiny.llama(seed=1)}, DataError, "another teacher"), ({"train_dataset": texts(seed=1), "processing_class": tiny.tokenizer()}, DataError, "another text"),
        ({"train_dataset": texts(), "processing_class": tiny.tokenizer(), "block_size": 16}, DataError, "another sequence packing"),
        ({"temperature": 2.0}, ArgumentError, "temperature=2.0 needs the teacher itself"), ({"hidden_weight": 1.0}, ArgumentError, "hidden_weight=1.0 needs the teacher itself"),
        ({"path_fraction": 0.5}, ArgumentError, "path_fraction=0.5 needs the teacher itself"), ({"eval_dataset": texts()}, ArgumentError, "pass a TeacherCache as eval_dataset"),
    ):
        with pytest.raises(error, match=message):
            trainer_for(tmp_path / "out", cache, **options)
    with pytest.raises(ArgumentError, match="temperature=2.0 needs the teacher itself"):
        ChainDistillerConfig(str(tmp_path), temperature=2.0, teacher_cache=str(cache))
    with pytest.raises(ArgumentError, match="teacher_cache=5"):
        ChainDistillerConfig(str(tmp_path), teacher_cache=5)
    with pytest.raises(DataError, match="is no teacher cache"):
        trainer_for(tmp_path / "out", tmp_path)
    with pytest.raises(ArgumentError, match="or a teacher_cache"):
        trainer_for(tmp_path / "out", None)
    small = tiny.llama()
    small.resize_token_embeddings(200)
    with pytest.raises(VocabularyMismatchError, match="200 and the cached teacher of 260"):
        ChainDistiller(model=small, args=ChainDistillerConfig(str(tmp_path)), teacher_cache=cache)


def test_evaluation_reads_a_cache_too(cache, tmp_path):
    trainer = trainer_for(tmp_path, cache, eval_dataset=TeacherCache.open(cache), teacher_cache=None, per_device_eval_batch_size=4)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    with pytest.raises(ArgumentError, match="no top tokens"):
        trainer.evaluate(packed_dataset(texts(), tiny.tokenizer(), BLOCK))


def test_padded_heads_learn_on_the_tokenizers_tokens(tmp_path):
    teacher, student = tiny.llama(), tiny.llama(layers=2, seed=3)
    teacher.resize_token_embeddings(280)
    student.resize_token_embeddings(300)
    cache = write(tmp_path / "c", teacher)
    assert cache.codec.vocab_size == 260
    trainer = ChainDistiller(model=student, args=ChainDistillerConfig(str(tmp_path / "out"), bf16=False, max_steps=1), teacher_cache=cache)
    trainer.compute_loss(student, trainer.data_collator([cache[0]])).backward()
    assert not student.lm_head.weight.grad[260:].any()


# -- recipes and the command -------------------------------------------------------------------------------------------------


def test_a_recipes_stage_learns_from_its_cache(cbd, tmp_path):
    plain = make_recipe(tmp_path, "llama", [{"layers": 2, "ffn": 24}], stage={"teacher_cache": str(tmp_path / "cache")})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(plain))
    with pytest.raises(DataError, match="is no teacher cache"):
        distill_chain(tmp_path / "r.yaml", tmp_path / "chain")
    make = ("cache-teacher", plain["teacher"], "--recipe", tmp_path / "r.yaml", "--out", tmp_path / "cache", "--top-k", 24)
    code, _, said = cbd(*make)
    assert code == 0, said
    chain = distill_chain(tmp_path / "r.yaml", tmp_path / "chain")
    again = distill_chain(tmp_path / "r.yaml", tmp_path / "again")
    assert [files(tmp_path / name / "anchors" / chain.anchors[-1].name) for name in ("chain", "again")][0] == files(tmp_path / "again" / "anchors" / again.anchors[-1].name)
    assert chain.anchors[-1].training.tokens == 4 * 4 * 32
    second = {**plain, "anchors": [{"layers": 3}, {"layers": 2, "ffn": 24}], "stage": {key: value for key, value in plain["stage"].items() if key != "teacher_cache"}}
    second["stages"] = {"layers=2,ffn=24": {"teacher_cache": str(tmp_path / "cache")}}
    with pytest.raises(DataError, match=r"was made with a teacher of .*, and this stage's is the anchor of .* above it; make one of that anchor"):
        distill_chain(second, tmp_path / "second")  # before the first stage trains
    assert not (tmp_path / "second").exists()
    other = {**plain, "seed": 1}  # another split: held-out documents would be trained on
    with pytest.raises(DataError, match="another text"):
        distill_chain(other, tmp_path / "other")
    tiny.save(tiny.llama(seed=5), tmp_path / "teacher")
    with pytest.raises(DataError, match="another teacher"):
        distill_chain(plain, tmp_path / "third")


def test_the_command_end_to_end(cbd, tmp_path):
    teacher, student = tiny.save(tiny.llama(), tmp_path / "teacher"), tiny.save(tiny.llama(layers=2, seed=3), tmp_path / "student")
    (tmp_path / "t.txt").write_text("\n\n".join(tiny.texts(30)))
    command = ("cache-teacher", teacher, "--text", tmp_path / "t.txt", "--top-k", 16, "--block-size", 32)
    code, printed, said = cbd(*command, "--out", tmp_path / "c", "--student", student)
    assert code == 0, said
    for words in ("bytes per token", "KL of rounding", "tail mass", "KL to the student", "seconds", "next: teacher_cache"):
        assert words in printed
    assert "cache" in said
    stranger = tiny.save(tiny.llama(layers=2, seed=3), tmp_path / "stranger")
    kinds.byte_level(260).save_pretrained(stranger)
    refused, _, told = cbd(*command, "--out", tmp_path / "d", "--student", stranger)
    assert (refused, (tmp_path / "d").exists()) == (1, False)
    assert "reads texts by another tokenizer" in told
    code, printed, said = cbd(*command, "--out", tmp_path / "d", "--tokens", 320, "--bits", 6, "--dtype", "bfloat16", "--json")
    facts = json.loads(printed)
    assert (code, said) == (0, "")
    assert facts["source"]["packing"]["tokens"] == 320
    assert facts["source"]["teacher"]["dtype"] == "bfloat16"
    assert facts["figures"]["rounding_kl"] > 0
    TeacherCache.open(tmp_path / "d").check(teacher=tiny.llama(), rows=[{"text": text} for text in tiny.texts(30)], tokenizer=tiny.tokenizer(), block_size=32)
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"prompt": f"say {index}", "completion": "yes"}) + "\n" for index in range(9)))
    code, printed, _ = cbd("cache-teacher", teacher, "--text", tmp_path / "chat.jsonl", "--out", tmp_path / "e", "--top-k", 8, "--json")
    assert json.loads(printed)["source"]["columns"] == ["input_ids", "labels", "position_ids"]
    for arguments, code, message in (
        (("--out", tmp_path / "f"), 2, "either --text"), (("--text", "/no/such", "--out", tmp_path / "f"), 1, "no file matches"),
        (("--text", tmp_path / "t.txt", "--out", tmp_path / "f", "--dtype", "int4"), 2, "no dtype"), (("--text", tmp_path / "t.txt", "--out", tmp_path / "f", "--top-k", 260), 2, "top_k=260"),
        (("--text", tmp_path / "t.txt", "--out", tmp_path / "c"), 1, "another folder"),
    ):
        got, printed, said = cbd("cache-teacher", teacher, *arguments)
        assert (got, printed) == (code, "")
        assert message in said
        assert said.count("error: ") == 1
        assert not (tmp_path / "f").exists()
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"txt": "b"}\n')
    code, _, said = cbd("cache-teacher", teacher, "--text", tmp_path / "chat.jsonl", "--out", tmp_path / "f")
    assert (code, "columns txt" in said, (tmp_path / "f").exists()) == (1, True, False)
    assert cbd("cache-teacher", "/no/model", "--text", tmp_path / "t.txt", "--out", tmp_path / "f")[0] == 1
    assert "Usage: cbd" in cbd("cache-teacher", "--help")[1]


def test_a_pushed_cache_is_read_from_the_hub(hub, cbd, tmp_path, monkeypatch):
    """Pushed whole, as a data set with its card, and opened by its id with every file checked."""
    teacher = tiny.save(tiny.llama(), tmp_path / "teacher")
    (tmp_path / "t.txt").write_text("\n\n".join(tiny.texts(30)))
    code, printed, said = cbd("cache-teacher", teacher, "--text", tmp_path / "t.txt", "--out", tmp_path / "c", "--push", "org/cache", "--json")
    assert code == 0, said
    assert json.loads(printed)["pushed"] == "org/cache"
    repo = hub.repos["datasets/org/cache"]
    assert repo.at("main")[1] == files(tmp_path / "c")
    there, local = TeacherCache.open("org/cache"), TeacherCache.open(tmp_path / "c")
    assert len(there) == len(local)
    assert all(torch.equal(torch.as_tensor(one["top_ids"]), torch.as_tensor(other["top_ids"])) for one, other in zip(there, local))
    repo.at("main")[1]["data/train-00000-of-00001.arrow"] += b"x"
    online(monkeypatch, constants.ENDPOINT, tmp_path / "other")
    with pytest.raises(IntegrityError):
        TeacherCache.open("org/cache")
    card = DatasetCard((tmp_path / "c" / "README.md").read_text())
    assert card.data.to_dict()["configs"][0]["data_files"] == "data/*.arrow"
    assert str(tmp_path) not in str(files(tmp_path / "c"))
