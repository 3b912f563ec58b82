"""A model with another vocabulary learns from what it was: resumable, with bits per byte before, between and after."""

import json

import pytest
import tiny
import tokenizers_for_bridge as kinds
import torch
from safetensors.torch import load_file
from test_retokenize import saved
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hub.distill.data import split_documents
from cbd_hub.distill.moved import retokenize_and_train
from cbd_hub.errors import ArgumentError, DataError, StorageError


OPTIONS = {"steps": 6, "learning_rate": 3e-3, "batch_size": 4, "block_size": 32, "bf16": False, "save_steps": 1, "heldout": 0.1, "quiet": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    saved(folder / "model")
    kinds.sentencepiece().save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("options", [{"keep": 320}, {"bridge": "span+vocab"}], ids=["trimmed", "moved"])
def test_it_learns_and_goes_on_bit_for_bit_when_killed(options, source, tmp_path, monkeypatch):
    options = {**OPTIONS, **options, **({} if "keep" in options else {"tokenizer": source / "tokenizer"})}
    texts = tiny.texts(120)
    lines = []
    made = retokenize_and_train(source / "model", tmp_path / "whole", texts, progress=lines.append, **options)
    assert made.trained < made.after
    assert made.trained - made.before == pytest.approx(made.trained_difference[0])
    assert made.after - made.before == pytest.approx(made.difference[0])
    assert (made.steps, made.tokens > 500, made.bytes > 500) == (6, True, True)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    card = (tmp_path / "whole" / "README.md").read_text()
    for value in (made.before, made.after, made.trained):
        assert f"| {value:.4f} |" in card
    assert len(AutoTokenizer.from_pretrained(tmp_path / "whole")) == AutoModelForCausalLM.from_pretrained(tmp_path / "whole").config.vocab_size == made.vocab

    count = tiny.killed_in_training(monkeypatch, 4)
    with pytest.raises(tiny.Killed):
        retokenize_and_train(source / "model", tmp_path / "again", texts, **options)
    assert not (tmp_path / "again").exists()
    with pytest.raises(StorageError, match="unfinished run with learning_rate=0.003, and 0.1 is asked"):
        retokenize_and_train(source / "model", tmp_path / "again", texts, **{**options, "learning_rate": 0.1})
    assert retokenize_and_train(source / "model", tmp_path / "again", texts, **options) == made
    assert count[0] == 4 + 3
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_no_more_is_held_out_than_is_asked(source, tmp_path):
    texts, lines = tiny.texts(120), []
    made = retokenize_and_train(source / "model", tmp_path / "new", texts, keep=320, progress=lines.append, **{**OPTIONS, "steps": 1, "heldout": 0.25})
    parts = split_documents(texts, 0.25, 0.0, 0)
    held = [*parts.heldout, *parts.calibration]  # of the second there is one at least
    assert len(held) == 31
    assert made.bytes == sum(len(text.encode()) for text in held)


def test_what_is_refused(source, tmp_path):
    for options, kind, said in (
        ({"bridge": "hidden"}, ArgumentError, "bridge='hidden' is not known here"), ({"steps": 0}, ArgumentError, "steps=0 trains nothing"),
        ({"learning_rate": -1.0}, ArgumentError, "learning_rate=-1.0 teaches nothing"), ({"learning_rate": float("nan")}, ArgumentError, "learning_rate=nan teaches nothing"),
        ({"keep": 3}, ArgumentError, "keep=3 tokens"), ({"tokenizer": source / "tokenizer"}, ArgumentError, "give either keep"),
    ):
        with pytest.raises(kind, match=said):
            retokenize_and_train(source / "model", tmp_path / "new", tiny.texts(40), **{**OPTIONS, "keep": 320, **options})
        assert not (tmp_path / "new").exists()
    with pytest.raises(DataError, match="different documents"):
        retokenize_and_train(source / "model", tmp_path / "other", ["a"], keep=320, **OPTIONS)
    with pytest.raises(StorageError, match="exists"):
        retokenize_and_train(source / "model", source / "model", tiny.texts(40), keep=320, **OPTIONS)


def test_the_command(cbd, source, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(tiny.texts(120)))
    command = ["retokenize", source / "model", "--tokenizer", source / "tokenizer"]
    more = ["--text", tmp_path / "text.txt", "--steps", 2, "--block-size", 32]
    code, printed, said = cbd(*command, "--out", tmp_path / "new", *more)
    assert code == 0, said
    assert "after 2 steps" in printed
    assert "held-out bytes" in printed
    code, printed, _ = cbd(*command, "--out", tmp_path / "json", *more, "--json")
    assert json.loads(printed)["trained"] > 0
    code, _, said = cbd(*command, "--out", tmp_path / "other", "--steps", 2)
    assert (code, said.count("\n")) == (2, 1)
