"""Writing a teacher cache: the same folder from lists and streams, stopped or not; what cannot be cached is named."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny
from datasets import Dataset
from test_packing import with_bos

from cbd_hub.distill.cache_writing import write_cache
from cbd_hub.distill.packing import packed_dataset
from cbd_hub.distill.teacher_cache import TeacherCache
from cbd_hub.errors import ArgumentError, DataError, StorageError
from cbd_hub.files import ASIDE, held


K, BLOCK = 24, 32


def texts(count=40, seed=0):
    return [{"text": text} for text in tiny.texts(count, seed)]


def write(folder, teacher=None, rows=None, **options):
    options = {"tokenizer": tiny.tokenizer(), "block_size": BLOCK, "top_k": K, "shard_tokens": 32 * BLOCK, **options}
    return write_cache(teacher or tiny.llama(), texts() if rows is None else rows, folder, **options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "c"
    write(folder)
    return folder


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def test_options_outside_their_range_are_refused(tmp_path):
    for options, message in (({"bits": 3}, "bits=3"), ({"top_k": 260}, "top_k=260"), ({"top_k": 0}, "top_k=0")):
        with pytest.raises(ArgumentError, match=message):
            write(tmp_path / "c", **options)


def test_streams_are_cached_as_lists_are(cache, tmp_path):
    write(tmp_path / "c", rows=Dataset.from_list(texts()).to_iterable_dataset())
    assert files(tmp_path / "c") == files(cache)


@pytest.mark.parametrize("stop", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_and_run_again_it_comes_out_the_same(cache, tmp_path, stop):
    """Killed in a shard, the run leaves no cache and goes on behind the last whole shard; the folder is the same, byte for byte."""
    folder = tmp_path / "c"

    def dying(what, done, total):
        if done > stop * 32 + 8:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=write, args=(folder,), kwargs={"report": dying})
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(folder.glob("data/*.arrow"))) == stop
    with pytest.raises(DataError, match="run it again if it was stopped"):
        TeacherCache.open(folder)
    if stop == 2:  # a shard that was cut short is made again
        shard = min(folder.glob("data/*.arrow"))
        shard.write_bytes(shard.read_bytes()[:-100])
    asked = []
    write(folder, report=lambda what, done, total: asked.append(done))
    assert asked[0] == (8 if stop != 1 else 32)
    assert files(folder) == files(cache)
    assert not (folder / ".work").exists()


def test_only_what_a_killed_run_left_is_removed(cache, tmp_path):
    folder = tmp_path / "c"

    def visited(what, done, total):
        (folder / ".ipynb_checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / ".note").write_text("of the user")
        (folder / f".README.md.x{ASIDE}").write_text("half")

    write(folder, report=visited)
    assert (folder / "cache.json").read_bytes() == (cache / "cache.json").read_bytes()
    assert {path.name for path in folder.glob(".*")} == {".ipynb_checkpoints", ".note"}


def test_a_finished_cache_is_not_made_again(cache, tmp_path, monkeypatch):
    shutil.copytree(cache, tmp_path / "c")
    (tmp_path / "c" / ".work").mkdir()  # killed at its very end
    monkeypatch.setattr("cbd_hub.distill.cache_writing.ModelRunner", None)
    write(tmp_path / "c")
    assert files(tmp_path / "c") == files(cache)
    with pytest.raises(StorageError, match="another top_k, tail_draws; choose another folder"):
        write(tmp_path / "c", top_k=5)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").touch()
    with pytest.raises(StorageError, match="already exists and is no teacher cache"):
        write(tmp_path / "d")


def test_a_folder_that_another_process_writes_is_left_alone(cache, tmp_path):
    with held(tmp_path / "c" / ".work", "another"), pytest.raises(StorageError, match="c is being written by another process"):
        write(tmp_path / "c")
    assert list(files(tmp_path / "c")) == [".work/lock"]

    def second(what, done, total):
        with pytest.raises(StorageError, match="being written by another process"):
            write(tmp_path / "c")

    write(tmp_path / "c", report=second)
    assert files(tmp_path / "c") == files(cache)


def test_texts_that_cannot_be_cached_are_named(tmp_path):
    for options, message in (
        ({"rows": []}, "no rows"), ({"rows": [{"text": "a"}]}, "does not fill one block"), ({"tokenizer": None}, "no tokenizer came"),
        ({"rows": [{"input_ids": [5, 400]}]}, "token 400"), ({"rows": [{"input_ids": [5, 6], "labels": [5]}]}, "no block"),
        ({"rows": [{"input_ids": [5, 6], "attention_mask": [1, 0]}]}, "without padding"), ({"rows": [{"input_ids": [5, 6]}, {"input_ids": [5, 6], "labels": [5, 6]}]}, "same columns"),
    ):
        with pytest.raises(DataError, match=message):
            write(tmp_path / "c", **options)
    broken = tiny.llama()
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="no numbers"):
        write(tmp_path / "c", broken)


def test_a_cache_has_every_token_of_a_tokenizer_whose_ids_have_gaps(tmp_path):
    teacher = tiny.llama()
    teacher.resize_token_embeddings(320)
    cache = write(tmp_path / "c", teacher, tokenizer=tiny.tokenizer(gap=40))
    assert cache.codec.vocab_size == 300
    assert max(max(cache.ids(index)) for index in range(len(cache))) >= tiny.VOCAB


def test_a_cache_holds_the_blocks_that_training_packs(tmp_path):
    """Of a tokenizer that puts a token before a text: from the text and from blocks of it; ``bos=False`` leaves it out."""
    tok = with_bos()
    blocks = [row["input_ids"] for row in packed_dataset(texts(), tok, BLOCK)]
    cache, again = write(tmp_path / "a", tokenizer=tok), write(tmp_path / "b", rows=packed_dataset(texts(), tok, BLOCK), tokenizer=tok)
    for made in (cache, again):
        assert [made.ids(index) for index in range(len(made))] == blocks
        assert made.record.source.packing.prefix == [tok.bos_token_id]
        made.check(rows=texts(), tokenizer=tok, block_size=BLOCK)
        made.check(rows=packed_dataset(texts(), tok, BLOCK), tokenizer=tok, block_size=BLOCK)
    assert cache.record.source.columns == again.record.source.columns == ["input_ids", "labels"]
    bare = write(tmp_path / "c", tokenizer=tok, bos=False)
    assert bare.record.source.packing.prefix == []
    assert bare.record.source.columns == ["input_ids"]
    assert [bare.ids(index) for index in range(len(bare))] == [row["input_ids"] for row in packed_dataset(texts(), tiny.tokenizer(), BLOCK)]
    with pytest.raises(StorageError, match="another packing, columns; choose another folder"):
        write(tmp_path / "c", tokenizer=tok)


def test_the_first_token_of_a_document_is_not_predicted(tmp_path):
    """Of ready rows, whose positions alone say where it is."""
    row = {"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}
    cache = write(tmp_path / "c", rows=[row])
    assert cache.record.source.packing.predicted == 2
    assert [bool(listed.any()) for listed in cache[0]["top_log_probs"]] == [True, False, True, False]


def test_rows_that_are_not_joined_have_no_prefix(tmp_path):
    prompts = [{"prompt": f"say {index}", "completion": "yes"} for index in range(9)]
    for place, rows in enumerate((prompts, packed_dataset(prompts, with_bos(), BLOCK))):
        assert write(tmp_path / str(place), rows=rows, tokenizer=with_bos()).record.source.packing.prefix == []
    assert write(tmp_path / "c", rows=packed_dataset(texts(), tiny.tokenizer(), BLOCK), tokenizer=with_bos()).record.source.packing.prefix == []
