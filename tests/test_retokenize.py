"""Vocabularies trimmed and exchanged: kept rows bit for bit, every text still encodes, other rows the means that they should be."""

import json

import pytest
import tiny
import tokenizers_for_bridge as kinds
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from cbd_hub.errors import ArgumentError, CBDError, DataError, SizeFormatError, StorageError, VocabularyMismatchError
from cbd_hub.families import family_of
from cbd_hub.losses.alignment import token_bytes
from cbd_hub.retokenize import composition, retokenize, trimmed


MADE = {name: make() for name, make in kinds.MAKERS.items() if name != "bytes"}


def saved(folder, family="llama", tokenizer="gpt2", padding=0, **more):
    model = tiny.EVERY[family](**more)
    torch.manual_seed(2)
    model.resize_token_embeddings(len(MADE[tokenizer]) + padding, mean_resizing=False)
    model.config.bos_token_id, model.config.eos_token_id = MADE[tokenizer].bos_token_id, MADE[tokenizer].eos_token_id
    model.generation_config.eos_token_id = [MADE[tokenizer].eos_token_id]
    model.save_pretrained(folder)
    MADE[tokenizer].save_pretrained(folder)
    return folder


def vocabulary_rows(model):
    """The tensors with a row per token."""
    family, live = family_of(model.config), family_of(model.config).parameters(model)
    return {name: live[name] for spec, _, name in family.stored(model.config) if "vocab" in spec.dims}


@pytest.mark.parametrize("kind", ["gpt2", "gpt2_larger", "qwen", "llama", "gemma", "prefix"])
def test_a_trimmed_tokenizer_reads_every_text_with_a_prefix_of_its_merges(kind):
    old = MADE[kind]
    least = len(old) - len({"".join(pair) for pair in merges(old)})
    new, kept = trimmed(old, (least + len(old)) // 2)
    assert len(new) == len(kept) == (least + len(old)) // 2
    assert merges(new) == merges(old)[: len(merges(new))]
    assert [token_bytes(old)[token] for token in kept] == token_bytes(new)
    assert new.all_special_tokens == old.all_special_tokens
    assert new.chat_template == old.chat_template
    for text in kinds.HARD:
        ids = new(text, add_special_tokens=False)["input_ids"]
        assert new.decode(ids) == old.decode(old(text, add_special_tokens=False)["input_ids"])
        back = [kept[token] for token in new(text)["input_ids"]]
        assert b"".join(token_bytes(old)[token] for token in back) == b"".join(token_bytes(old)[token] for token in old(text)["input_ids"])
    with pytest.raises(ArgumentError, match="ask for a number in between"):
        trimmed(old, least - 1)
    with pytest.raises(ArgumentError, match="ask for a number in between"):
        trimmed(old, len(old))


def merges(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_rows_of_a_trimmed_model_are_its_own(family, tied, tmp_path):
    more = {"tie_word_embeddings": tied} if family == "gpt2" else {"tied": tied}
    source = saved(tmp_path / "old", family, padding=7, **more)
    made = retokenize(source, tmp_path / "new", keep=320, text=tiny.texts(20))
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "new"))
    tokenizer, kept = trimmed(MADE["gpt2"], 320)
    assert (made.vocab, made.copied, made.composed) == (320, 320, 0)
    assert made.parameters == sum(parameter.numel() for parameter in new.parameters())
    assert len(vocabulary_rows(new)) == (1 if tied else 2)
    for name, rows in vocabulary_rows(new).items():
        assert torch.equal(rows, vocabulary_rows(old)[name][kept])
    assert new.config.eos_token_id == tokenizer.eos_token_id == new.generation_config.eos_token_id[0]
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "new")("the cat")["input_ids"]])
    full = old(torch.tensor(kept)[ids]).logits[..., kept]
    torch.testing.assert_close(new(ids).logits, full, rtol=1e-5, atol=1e-5)
    assert made.before > 0
    assert made.after - made.before == pytest.approx(made.difference[0], abs=1e-9)


@pytest.mark.parametrize(("old_kind", "new_kind"), [("gpt2", "llama"), ("gpt2", "gpt2_larger"), ("llama", "qwen"), ("gemma", "gpt2")])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_for_another_tokenizer(old_kind, new_kind, tied, tmp_path, monkeypatch):
    monkeypatch.setattr("cbd_hub.retokenize._ROWS", 7)  # composed at once
    source = saved(tmp_path / "old", tokenizer=old_kind, tied=tied)
    MADE[new_kind].save_pretrained(tmp_path / "tokenizer")
    made = retokenize(source, tmp_path / "new", tokenizer=tmp_path / "tokenizer")
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "new"))
    ours, theirs = MADE[old_kind], MADE[new_kind]
    assert made.copied + made.composed == made.vocab == len(theirs)
    assert made.composed > 0
    assert new.config.eos_token_id == theirs.eos_token_id
    places = {}
    for place, token in enumerate(token_bytes(ours)):
        if place not in ours.all_special_ids and (token not in places or ours.convert_ids_to_tokens(places[token]).startswith("<0x")):
            places[token] = place  # a byte of the fallback where there is no other
    for name, rows in vocabulary_rows(new).items():
        before = vocabulary_rows(old)[name]
        assert torch.equal(rows[theirs.eos_token_id], before[ours.eos_token_id])
        for place, token in enumerate(token_bytes(theirs)):
            if place in theirs.all_special_ids or not token:
                continue
            if token in places and not theirs.convert_ids_to_tokens(place).startswith("<0x"):
                assert torch.equal(rows[place], before[places[token]]), token
            elif old_kind == "gpt2" and is_text(token):
                ids = ours(token.decode(), add_special_tokens=False)["input_ids"]
                torch.testing.assert_close(rows[place], before[ids].mean(0), msg=str(token))


def is_text(token):
    try:
        return bool(token.decode())
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma"])
def test_a_model_moved_to_its_own_tokenizer_is_itself(kind, tmp_path):
    source = saved(tmp_path / "old", tokenizer=kind, tied=False)
    made = retokenize(source, tmp_path / "new", tokenizer=source)
    assert made.composed == 0
    old, new = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (source, tmp_path / "new"))
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())


def test_special_tokens_are_those_of_the_same_name_then_of_the_same_use():
    old, new = kinds.byte_level(), kinds.byte_level()
    old.eos_token = new.bos_token = new.eos_token = "<eos>"
    assert composition(old, new)[new.eos_token_id] == [old.convert_tokens_to_ids("<eos>")]
    other = kinds.byte_level()
    other.add_special_tokens({"bos_token": "<|end|>", "eos_token": "<|end|>"})
    assert composition(old, other)[other.eos_token_id] == [old.eos_token_id]


@pytest.mark.parametrize(("make", "said"), [
    (lambda: kinds.byte_level(normalizer=normalizers.Lowercase()), "lower-cases text"), (lambda: kinds.byte_level(normalizer=normalizers.NFKC()), "applies NFKC"),
    (lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))), "neither bytes nor a fallback"),
])
def test_tokenizers_that_lose_text_are_refused(make, said, tmp_path):
    source = saved(tmp_path / "old")
    make().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ArgumentError, match=said):
        retokenize(source, tmp_path / "new", tokenizer=tmp_path / "tokenizer")
    assert not (tmp_path / "new").exists()


def test_merges_whose_parts_come_later_are_no_hindrance():
    """A list of merges that was made from SentencePiece has every split of a token, also those with parts that are longer merges."""
    facts = json.loads(MADE["gemma"].backend_tokenizer.to_str())
    known, listed = facts["model"]["vocab"], facts["model"]["merges"]
    facts["model"]["merges"] = [
        [product[:cut], product[cut:]] for product in map("".join, listed) for cut in range(1, len(product)) if product[:cut] in known and product[cut:] in known
    ]
    old = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(facts)), eos_token="<eos>")
    least = len(old) - len({"".join(pair) for pair in listed})
    for keep in range(least, len(old), 17):
        new, kept = trimmed(old, keep)
        assert len(new) <= keep
        for text in kinds.HARD:
            read = [kept[token] for token in new(text, add_special_tokens=False)["input_ids"]]
            assert b"".join(token_bytes(old)[token] for token in read) == b"".join(token_bytes(old)[token] for token in old(text, add_special_tokens=False)["input_ids"])


def test_tokens_that_a_generation_config_names_are_renumbered(tmp_path):
    source = saved(tmp_path / "old")
    config = GenerationConfig(eos_token_id=MADE["gpt2"].eos_token_id, suppress_tokens=[300, 398], bad_words_ids=[[270, 300], [399]], forced_eos_token_id=399)
    config.save_pretrained(source)
    retokenize(source, tmp_path / "new", keep=320)
    kept = trimmed(MADE["gpt2"], 320)[1]
    assert kept != list(range(320))
    found = GenerationConfig.from_pretrained(tmp_path / "new")
    assert [kept[token] for token in found.suppress_tokens] == [300]
    assert [[kept[token] for token in word] for word in found.bad_words_ids] == [[270, 300]]
    assert found.forced_eos_token_id is None


@pytest.mark.parametrize(("bias", "expected"), [([[[270, 300], -0.6], [[399], 2.0]], [[[270, 300], -0.6]]), ([[[399], -1.0]], None)], ids=["one is kept", "none"])
def test_a_bias_by_tokens_as_json_has_it_is_renumbered(tmp_path, bias, expected):
    """Its value is no token's number, be it whole."""
    source = saved(tmp_path / "old")
    GenerationConfig(eos_token_id=MADE["gpt2"].eos_token_id, sequence_bias=bias).save_pretrained(source)
    retokenize(source, tmp_path / "new", keep=320)
    kept, found = trimmed(MADE["gpt2"], 320)[1], GenerationConfig.from_pretrained(tmp_path / "new").sequence_bias
    assert (None if found is None else [[[kept[token] for token in tokens], value] for tokens, value in found]) == expected


def test_what_is_refused(tmp_path):
    source = saved(tmp_path / "old")
    for options, kind, said in (
        ({}, ArgumentError, "give either keep"), ({"keep": 300, "tokenizer": source}, ArgumentError, "give either keep"),
        ({"keep": "many"}, SizeFormatError, "many"), ({"keep": 3}, ArgumentError, "keep=3 tokens"), ({"tokenizer": tmp_path / "nowhere"}, CBDError, "nowhere"),
    ):
        with pytest.raises(kind, match=said):
            retokenize(source, tmp_path / "new", **options)
        assert not (tmp_path / "new").exists()
    with pytest.raises(StorageError):
        retokenize(source, source, keep=300)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(ArgumentError, match="no BPE"):
        trimmed(words, 1)
    MADE["gpt2_larger"].save_pretrained(source)
    with pytest.raises(VocabularyMismatchError, match="its own tokenizer"):
        retokenize(source, tmp_path / "new", keep=300)


def test_a_tokenizer_that_the_new_folder_would_be_read_otherwise_than_with_is_refused(tmp_path):
    """Of a Qwen2 transformers takes every tokenizer for Qwen2's own, whose rules make other tokens, some of numbers without a row."""
    source = saved(tmp_path / "old", family="qwen2", tokenizer="gpt2", padding=8)
    assert AutoTokenizer.from_pretrained(source)(kinds.HARD)["input_ids"] != MADE["gpt2"](kinds.HARD)["input_ids"]
    MADE["llama"].save_pretrained(tmp_path / "llama")
    with pytest.raises(VocabularyMismatchError, match="in a folder of a qwen2 transformers reads .*llama as a Qwen2Tokenizer, which makes other tokens of a text; give a tokenizer made for qwen2"):
        retokenize(source, tmp_path / "new", tokenizer=tmp_path / "llama")
    assert not (tmp_path / "new").exists()
    retokenize(source, tmp_path / "new", keep=300)  # its own, as it is read there
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "new"))
    assert [new.decode(ids) for ids in new(kinds.HARD)["input_ids"]] == [old.decode(ids) for ids in old(kinds.HARD)["input_ids"]]


@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_an_added_token_beyond_the_rows_is_no_hindrance(kind, tmp_path):
    """Gemma 3's text models have no row for the image token of their tokenizers: what comes out is what comes out without it."""
    source, plain = saved(tmp_path / "old", tokenizer=kind), saved(tmp_path / "plain", tokenizer=kind)
    spare = kinds.with_spare(kinds.MAKERS[kind]())
    rows = len(MADE[kind])
    spare.save_pretrained(source)
    assert AutoTokenizer.from_pretrained(source).convert_tokens_to_ids("<spare_0>") == rows
    keep = rows - 30
    made, expected = (retokenize(folder, tmp_path / f"{folder.name}-trimmed", keep=keep, text=tiny.texts(8)) for folder in (source, plain))
    assert made == expected
    new, other = (load_file(tmp_path / f"{name}-trimmed" / "model.safetensors") for name in ("old", "plain"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in new.items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "old-trimmed")
    assert (made.vocab, tokenizer.convert_tokens_to_ids("<spare_0>")) == (keep, keep)
    assert tokenizer(kinds.HARD)["input_ids"] == AutoTokenizer.from_pretrained(tmp_path / "plain-trimmed")(kinds.HARD)["input_ids"]
    retokenize(tmp_path / "old-trimmed", tmp_path / "once-more", keep=keep - 9)  # what came out is a model of the same kind
    whole = composition(spare, MADE["qwen"], rows)
    assert whole == composition(MADE[kind], MADE["qwen"])
    named = kinds.with_spare(kinds.byte_level(450))  # the token is in the other vocabulary too
    parts = composition(spare, named, rows)[named.convert_tokens_to_ids("<spare_0>")]
    assert b"".join(token_bytes(spare)[part] for part in parts) == b"<spare_0>"
    assert max(parts) < rows
    with pytest.raises(DataError, match=f"text 1: the tokenizer reads <spare_0> as the token {rows:,}, for which its checkpoint has no row"):
        retokenize(source, tmp_path / "measured", keep=keep, text=["fine", "a <spare_0>"])


def test_the_command(cbd, tmp_path):
    source = saved(tmp_path / "old")
    (tmp_path / "text.txt").write_text("\n\n".join(tiny.texts(30)))
    code, printed, said = cbd("retokenize", source, "--keep", 300, "--out", tmp_path / "new", "--text", tmp_path / "text.txt")
    assert code == 0, said
    assert "300 tokens, 300 rows copied and 0 composed" in printed
    assert "bits per byte" in printed
    code, _, said = cbd("retokenize", source, "--out", tmp_path / "other")
    assert (code, said.count("\n")) == (2, 1)
