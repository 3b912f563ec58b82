"""Spans across tokenizers: whole, in order, finest, against a slow reference that walks the text; tokenizers that lose text are named."""

import itertools
import unicodedata

import numpy as np
import pytest
import tokenizers_for_bridge as kinds
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cbd_hub.errors import ArgumentError, DataError
from cbd_hub.losses.alignment import byte_alphabet, byte_ends, check_rows, rowless_tokens, token_bytes, written_tokens
from cbd_hub.losses.bridge import byte_spans


MADE = {name: make() for name, make in kinds.MAKERS.items()}
PAIRS = list(itertools.product(MADE, repeat=2))
TEXT = st.text(
    st.one_of(st.sampled_from("ab the\t\r\n▁é\u0301\u0308👍🏽\u200d\u200bשم日가ᄀ<>0xE"), st.characters(exclude_categories=("Cs",))), max_size=30,
) | st.lists(st.sampled_from([*kinds.HARD, "the", " ", "<eos>", "<|tool|>"]), max_size=5).map("".join)


def piece(tokenizer, token):
    """A token's bytes by the letter of its kind."""
    if token in tokenizer.get_added_vocab():
        return token.encode()
    if tokenizer in (MADE["llama"], MADE["gemma"]):
        return bytes([int(token[3:5], 16)]) if token.startswith("<0x") and len(token) == 6 else token.replace("▁", " ").encode()
    return bytes(byte_alphabet()[character] for character in token)


def reference(text, first, second):
    """Byte borders that both have, token by token; None where a tokenizer's bytes are not the text's."""
    borders = []
    for tokenizer in (first, second):
        pieces = [piece(tokenizer, token) for token in tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])]
        joined = b"".join(pieces)
        extra = 1 if joined == b" " + text.encode() else 0
        if joined[extra:] != text.encode():
            return None
        ends, at = [], -extra
        for one in pieces:
            at += len(one)
            ends.append(max(at, 0))
        borders.append(ends)
    common = sorted(end for end in set(borders[0]) & set(borders[1]) if end > 0)
    spans, low = [], 0
    starts = [0, 0]
    for border in common:
        stops = [max(place for place, end in enumerate(ends) if end <= border) + 1 for ends in borders]
        spans.append(((starts[0], stops[0]), (starts[1], stops[1]), border - low))
        low, starts = border, stops
    return spans


def check_whole(text, first, second, spans):
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for tokenizer in (first, second)]
    assert sum(size for *_, size in spans) == len(text.encode())
    for side, length in enumerate(lengths):
        ranges = [span[side] for span in spans]
        assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges)][: len(ranges)]
        assert (ranges[-1][1] if ranges else 0) == length
        assert all(start < stop for start, stop in ranges)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_hard_texts_are_whole_and_finest(first, second):
    a, b = MADE[first], MADE[second]
    exact = 0
    for text in kinds.HARD:
        spans = byte_spans(text, a, b)
        check_whole(text, a, b, spans)
        expected = reference(text, a, b)
        exact += expected is not None
        assert expected is None or spans == expected, text
    assert exact > 10


@settings(max_examples=80, deadline=None)
@given(text=TEXT, pair=st.sampled_from(PAIRS))
def test_any_text_is_whole_and_finest(text, pair):
    a, b = (MADE[name] for name in pair)
    spans = byte_spans(text, a, b)
    check_whole(text, a, b, spans)
    expected = reference(text, a, b)
    assert expected is None or spans == expected
    assert [(y, x, n) for x, y, n in spans] == byte_spans(text, b, a)


@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_a_tokenizer_with_itself_gives_its_own_tokens(text):
    for name in ("bytes", "gpt2", "gpt2_larger"):
        spans = byte_spans(text, MADE[name], MADE[name])
        assert spans == [((place, place + 1), (place, place + 1), size) for place, (*_, size) in enumerate(spans)]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("ae o\u0301\u0308\u0327가ᄀ\u1161\u11a8 ▁👍"), max_size=20))
def test_nfc_never_cuts_what_it_has_composed(text):
    """Every border of the NFC tokenizer is a border of the text that its tokens so far stand for."""
    ids, ends = byte_ends(text, MADE["qwen"])
    table = token_bytes(MADE["qwen"])
    for place in range(len(ids)):
        if place + 1 == len(ids) or ends[place] < ends[place + 1]:
            head = text.encode()[: ends[place]]
            made = b"".join(table[token] for token in ids[: place + 1])
            try:
                head, made = head.decode(), made.decode()
            except UnicodeDecodeError:
                continue  # within a character
            assert unicodedata.normalize("NFC", head) == made or unicodedata.normalize("NFC", text) != unicodedata.normalize("NFC", head) + unicodedata.normalize("NFC", text[len(head):])


def test_spans_worked_by_hand():
    assert byte_spans("é", MADE["bytes"], MADE["bytes"]) == [((0, 1), (0, 1), 1), ((1, 2), (1, 2), 1)]  # finer than a character
    spans = byte_spans("e\u0301", MADE["bytes"], MADE["qwen"])
    assert spans == [((0, 3), (0, spans[0][1][1]), 3)]
    text = "a\u2581b"
    assert sum(size for *_, size in byte_spans(text, MADE["llama"], MADE["gpt2"])) == 5
    assert byte_spans("<eos>", MADE["gpt2"], MADE["llama"])[0][0] == (0, 1)
    assert byte_spans("", MADE["gpt2"], MADE["qwen"]) == []


def test_a_tokenizer_in_use_is_left_as_it_is():
    """Truncation of an earlier call does not cut spans, and spans change no later call."""
    tokenizer = kinds.byte_level()
    text = "the cat sat on the mat " * 5
    cut = tokenizer(text, truncation=True, max_length=4)["input_ids"]
    whole = byte_spans(text, tokenizer, tokenizer)
    assert whole[-1][0][1] == len(tokenizer(text)["input_ids"])
    assert tokenizer(text, truncation=True, max_length=4)["input_ids"] == cut
    tokenizer.add_tokens([" cat sat on"])
    assert byte_spans(text, tokenizer, tokenizer)[-1][0][1] < whole[-1][0][1]


def test_lone_surrogates_are_refused():
    with pytest.raises(DataError, match="lone surrogate at character 3"):
        byte_spans("abc\ud800d", MADE["gpt2"], MADE["qwen"])


@pytest.mark.parametrize(("normalizer", "said"), [
    (normalizers.Lowercase(), "lower-cases"), (normalizers.StripAccents(), "strips accents"), (normalizers.NFKC(), "applies NFKC"),
    (normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), "lower-cases"), (normalizers.BertNormalizer(), "BERT"),
    (normalizers.Replace(Regex(" +"), " "), "rewrites text"),
])
def test_lossy_normalisers_are_named(normalizer, said):
    with pytest.raises(ArgumentError, match=said):
        byte_spans("text", MADE["gpt2"], kinds.byte_level(300, normalizer=normalizer))


def test_a_tokenizer_without_offsets_is_named():
    class Slow:
        backend_tokenizer = None

    with pytest.raises(ArgumentError, match="Slow knows no byte offsets"):
        byte_spans("text", Slow(), MADE["gpt2"])


def test_white_space_that_no_token_holds_joins_the_next():
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    spans = byte_spans("the  cat \n", words, MADE["bytes"])
    assert [(span[0], span[2]) for span in spans] == [((0, 1), 3), ((1, 2), 7)]


def test_common_borders_of_long_texts_are_found_at_once():
    """No loop over characters: a text a hundred times as long takes no more Python steps."""
    import sys
    counts = []
    for times in (1, 100):
        text, steps = " ".join(kinds.HARD[:5]) * times, 0

        def count(frame, event, argument):
            nonlocal steps
            steps += 1
            return count

        byte_ends(text, MADE["gpt2"])
        sys.settrace(count)
        byte_ends(text, MADE["gpt2"])
        sys.settrace(None)
        counts.append(steps)
    assert counts[1] == counts[0]
    assert np.all(np.diff(byte_ends(text, MADE["gpt2"])[1]) >= 0)


def test_added_tokens_beyond_the_rows_are_left_out():
    tokenizer, rows = kinds.with_spare(kinds.byte_level(), 2), len(MADE["gpt2"])
    assert len(tokenizer) == rows + 2
    assert rowless_tokens(tokenizer, rows) == {rows, rows + 1}
    assert rowless_tokens(tokenizer, rows + 2) == rowless_tokens(MADE["gpt2"], rows) == frozenset()
    assert written_tokens(tokenizer)[b"<spare_1>"] == rows + 1
    assert written_tokens(tokenizer, rows) == written_tokens(MADE["gpt2"])
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(rows)})
    assert rowless_tokens(tokenizer, rows) == {rows + 1}, "what ends every text has to have a row"
    check_rows(range(rows), rowless_tokens(tokenizer, rows), tokenizer, "it")
    with pytest.raises(DataError, match=f"^it reads <spare_1> as the token {rows + 1:,}, for which its checkpoint has no row; leave this text out"):
        check_rows([4, rows + 1], rowless_tokens(tokenizer, rows), tokenizer, "it")
