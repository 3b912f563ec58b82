"""Two tokenisations of one text, cut at the bytes where both have a border.

A token's bytes are those of its entry in the vocabulary. Where they join to the text itself, borders are exact; where they do not (a text that NFC
changes, a literal U+2581, a marker between special tokens), the tokenizer's character offsets say which characters a token is of, and its bytes divide a
character that several tokens share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from cbd_hub.errors import ArgumentError, DataError
from cbd_hub.texts import utf8


Span = tuple[tuple[int, int], tuple[int, int], int]

_SPACE = "\u2581"
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # a byte of SentencePiece's fallback
_FAITHFUL = {"NFC", "NFD", "ByteLevel", "Prepend", "Sequence"}
_LOSSY = {
    "Lowercase": "lower-cases text", "StripAccents": "strips accents", "NFKC": "applies NFKC", "NFKD": "applies NFKD", "BertNormalizer": "cleans text as BERT does",
    "Precompiled": "applies a character map (NFKC in SentencePiece)", "Nmt": "applies NMT's character map", "Strip": "strips white space",
}


@dataclass
class _Reader:
    """The bytes of every token, and where offsets are wanted the tokenizer's own encoder, without what trims them."""

    tokens: tuple[bytes, ...]
    sizes: np.ndarray
    encoder: Tokenizer | None = None

    def encode(self, text: str, backend: Any, offsets: bool) -> Any:
        """A text's tokens, without special ones added; their offsets only where wanted."""
        if not offsets and backend.truncation is None and backend.padding is None:
            return backend.encode_batch_fast([text], add_special_tokens=False)[0]
        if self.encoder is None:
            facts = json.loads(backend.to_str())
            facts.update(post_processor=None, truncation=None, padding=None)
            self.encoder = Tokenizer.from_str(json.dumps(facts))
        self.encoder.encode_special_tokens = backend.encode_special_tokens
        return self.encoder.encode(text, add_special_tokens=False)


_READERS: WeakKeyDictionary[Any, tuple[int, _Reader]] = WeakKeyDictionary()


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for.

    Example:
        >>> alphabet = byte_alphabet()
        >>> len(alphabet), alphabet["Ġ"], alphabet["a"]
        (256, 32, 97)
    """
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in plain)
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + place): byte for place, byte in enumerate(others)}}


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """The description of a tokenizer's component and of all that it consists of."""
    if component is not None and not isinstance(component, (dict, list)):
        component = json.loads(component.__getstate__())
    if isinstance(component, dict):
        yield component
    for value in (component.values() if isinstance(component, dict) else component or ()):
        if isinstance(value, (dict, list)):
            yield from _parts(value)


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ArgumentError(
            f"{type(tokenizer).__name__} knows no byte offsets of its tokens, so that its spans cannot be found; load the fast tokenizer (tokenizer.json), or use bridge=text"
        )
    return backend


def _byte_kinds(backend: Any) -> tuple[bool, bool]:
    """Whether a tokenizer is byte-level, and whether it falls back to bytes: by either it reads every text."""
    kinds = {part.get("type") for component in (backend.decoder, backend.pre_tokenizer, backend.normalizer) for part in _parts(component)}
    return "ByteLevel" in kinds, bool(getattr(backend.model, "byte_fallback", False)) or "ByteFallback" in kinds


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that each token id stands for: of byte-level BPE, SentencePiece with byte fallback, and added tokens.

    The mark U+2581 of SentencePiece is a space. Ids without a token are empty.

    Args:
        tokenizer: A fast transformers tokenizer.

    Raises:
        ArgumentError: If it has no byte offsets.
    """
    backend = _backend(tokenizer)
    byte_level, fallback = _byte_kinds(backend)
    vocab = backend.get_vocab(with_added_tokens=False)
    added = {place: token.content for place, token in backend.get_added_tokens_decoder().items()}
    found = [b""] * (max([*vocab.values(), *added], default=-1) + 1)
    alphabet = byte_alphabet() if byte_level else None
    for token, place in vocab.items():
        if alphabet is not None and all(character in alphabet for character in token):
            found[place] = bytes(alphabet[character] for character in token)
        elif fallback and (byte := _BYTE.fullmatch(token)):
            found[place] = bytes([int(byte[1], 16)])
        else:
            found[place] = (token if alphabet is not None else token.replace(_SPACE, " ")).encode(errors="replace")
    for place, content in added.items():
        found[place] = content.encode(errors="replace")
    return found


def rowless_tokens(tokenizer: Any, rows: int) -> frozenset[int]:
    """The added tokens for which a model of so many rows has none, such as the image token that gemma 3's text models share with its others: it reads no text that holds one.

    What every text begins, ends or is padded with is not among them: a model without a row for that has another tokenizer.
    """
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *prefix_of(tokenizer)}
    return frozenset(place for place in tokenizer.added_tokens_decoder if place >= rows and place not in used)


def rows_needed(tokenizer: Any, rowless: frozenset[int] = frozenset()) -> int:
    """Rows that a model has to have for a tokenizer: up to its highest token, which is beyond their number where ids have gaps.

    Args:
        tokenizer: The tokenizer.
        rowless: Tokens that need none, as `rowless_tokens` gives them.
    """
    return max(set(tokenizer.get_vocab().values()) - rowless, default=-1) + 1


def check_rows(ids: Iterable[int], rowless: frozenset[int], tokenizer: Any, which: str) -> None:
    """Refuse tokens for which the model has no row.

    Args:
        ids: Tokens of a text.
        rowless: As `rowless_tokens` gives them.
        tokenizer: The tokenizer.
        which: What to call it.

    Raises:
        DataError: Naming the first of them.
    """
    place = next((place for place in ids if place in rowless), None) if rowless else None
    if place is not None:
        raise DataError(f"{which} reads {tokenizer.convert_ids_to_tokens(place)} as the token {place:,}, for which its checkpoint has no row; leave this text out, or take that out of it")


def written_tokens(tokenizer: Any, rows: int | None = None) -> dict[bytes, int]:
    """The token of each string of bytes that is one.

    Of several tokens of the same bytes that is the one which the tokenizer writes: a special token, or a byte of SentencePiece's fallback, only where there is
    no other, and of others what comes of the text itself, else the first.

    Args:
        tokenizer: A fast transformers tokenizer.
        rows: Rows of its model: tokens beyond them are left out. None for all tokens.

    Raises:
        ArgumentError: If it has no byte offsets, or marks the pieces of a word, so that the bytes of a token do not say which it is.

    Example:
        >>> written_tokens(tokenizer)[b" the"]  # doctest: +SKIP
        278
    """
    backend = _backend(tokenizer)
    mark = next((mark for name in ("continuing_subword_prefix", "end_of_word_suffix") if (mark := getattr(backend.model, name, None))), None)
    if mark:
        raise ArgumentError(
            f'{type(tokenizer).__name__} marks pieces of a word by "{mark}", so that its tokens are not known by their bytes; give a byte-level or SentencePiece-like '
            "tokenizer, or use bridge=span"
        )
    special = set(tokenizer.all_special_ids)
    spare = {place for token, place in backend.get_vocab(with_added_tokens=False).items() if _BYTE.fullmatch(token)} if _byte_kinds(backend)[1] else set()
    places: dict[bytes, list[int]] = {}
    for place, token in enumerate(token_bytes(tokenizer)[:rows]):
        if token:
            places.setdefault(token, []).append(place)
    found = {}
    for token, alike in places.items():
        usual = [place for place in alike if place not in special and place not in spare] or [place for place in alike if place not in special] or alike
        if len(usual) > 1:
            ids = backend.encode(token.decode(errors="replace"), add_special_tokens=False).ids
            usual = [place for place in usual if ids == [place]] or usual
        found[token] = usual[0]
    return found


def check_whole(tokenizer: Any) -> None:
    """Refuse a tokenizer that does not read every text to the byte.

    Raises:
        ArgumentError: If it has no byte offsets, a normaliser that loses what the text says, or neither bytes nor a fallback to them.
    """
    check_faithful(tokenizer)
    if not any(_byte_kinds(_backend(tokenizer))):
        raise ArgumentError(
            f"{type(tokenizer).__name__} has neither bytes nor a fallback to them, so that some texts become unknown tokens, of which no loss per byte is known; give a "
            "byte-level tokenizer, or one with byte fallback"
        )


def check_faithful(tokenizer: Any) -> None:
    """Refuse a tokenizer whose tokens are not those of the text itself.

    Raises:
        ArgumentError: If it has no byte offsets, or a normaliser that loses what the text says.
    """
    for part in _parts(_backend(tokenizer).normalizer):
        kind = part.get("type")
        if kind is None or kind in _FAITHFUL or (kind == "Replace" and part.get("pattern") == {"String": " "} and part.get("content") == _SPACE):
            continue
        why = _LOSSY.get(str(kind), f"rewrites text ({kind})")
        raise ArgumentError(f"{type(tokenizer).__name__} {why} before it encodes, so that its tokens are not of the text's bytes; give a tokenizer without that, or use bridge=text")


def _reader(tokenizer: Any) -> _Reader:
    """What reads texts with a tokenizer, made once and anew where tokens were added."""
    backend = _backend(tokenizer)
    size = backend.get_vocab_size(with_added_tokens=True)
    known = _READERS.get(tokenizer)
    if known is not None and known[0] == size:
        return known[1]
    check_faithful(tokenizer)
    tokens = tuple(token_bytes(tokenizer))
    reader = _Reader(tokens, np.fromiter(map(len, tokens), np.int64, len(tokens)))
    _READERS[tokenizer] = size, reader
    return reader


def byte_counter(tokenizer: Any) -> Callable[[Sequence[int] | Tensor], int]:
    """What counts the UTF-8 bytes that token ids stand for, also where they begin or end inside a character; of a tokenizer without byte offsets, those of their text.

    Special tokens, such as the one at an answer's end, stand for none: they are no part of a text.
    """
    try:
        sizes = _reader(tokenizer).sizes.copy()
    except ArgumentError:
        return lambda ids: len(tokenizer.decode(ids, skip_special_tokens=True).encode())
    sizes[[token for token in tokenizer.all_special_ids if token < len(sizes)]] = 0
    return lambda ids: int(sizes[np.asarray(ids, np.int64)].sum())


def byte_ends(text: str, tokenizer: Any) -> tuple[list[int], np.ndarray]:
    """A text's tokens, without special ones added, and the byte at which each ends.

    A token whose end is not known to the byte, and one without bytes, has the end of the group that it is in: there is a border nowhere else.

    Args:
        text: Any Unicode text.
        tokenizer: A fast transformers tokenizer.

    Returns:
        Ids, and int64 ends in the text's UTF-8 bytes, never falling; the last one is the text's length.

    Raises:
        ArgumentError: If the tokenizer has no byte offsets or loses what the text says.
        DataError: If the text holds a lone surrogate.
    """
    data, reader = utf8(text), _reader(tokenizer)
    ids: list[int] = reader.encode(text, _backend(tokenizer), offsets=False).ids
    joined = b"".join(map(reader.tokens.__getitem__, ids))
    if joined == data:
        return ids, np.cumsum(reader.sizes[ids]) if ids else np.zeros(0, np.int64)
    if joined == b" " + data:  # a leading space that the text does not have
        return ids, np.maximum(np.cumsum(reader.sizes[ids]) - 1, 0)
    return ids, _ends_by_offsets(text, data, reader, ids, reader.encode(text, _backend(tokenizer), offsets=True).offsets)


def _ends_by_offsets(text: str, data: bytes, reader: _Reader, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Ends from character offsets; tokens whose characters overlap are one group, divided by their bytes where these join to the group's text."""
    if not ids:
        return np.zeros(0, np.int64)
    starts, ends = np.array(offsets, np.int64).T
    reached = np.maximum.accumulate(ends)
    first = np.flatnonzero(np.append(True, starts[1:] >= reached[:-1]))  # of each group
    last = np.append(first[1:], len(ids)) - 1
    borders = np.append(reached[last[:-1]], len(text))  # what no offset holds joins the token after it, at the end the one before
    for group in np.flatnonzero(starts[first[1:]] > borders[:-1]):
        gap = text[borders[group] : starts[first[group + 1]]]
        borders[group] += next((place for place, character in enumerate(gap) if character.isspace()), len(gap))  # what NFC has drawn into the token before
    borders = np.append(np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80), len(data))[borders]  # from characters to bytes
    found = np.repeat(borders, last - first + 1)
    for group in np.flatnonzero(last > first):
        place = slice(first[group], last[group] + 1)
        low = borders[group - 1] if group else 0
        if b"".join(map(reader.tokens.__getitem__, ids[place])) == data[low : borders[group]]:
            found[place] = low + np.cumsum(reader.sizes[ids[place]])
    return found


def end_of(tokenizer: Any) -> list[int]:
    """The token that ends a text, where a tokenizer has one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def prefix_of(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before every text, such as gemma's ``<bos>``."""
    plain, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    places = (start for start in range(len(whole) - len(plain) + 1) if whole[start : start + len(plain)] == plain)
    return whole[: next(places, 0)]


def common_spans(ends_a: np.ndarray, ends_b: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where both tokenisations have a border, and how many tokens of each are before it.

    Args:
        ends_a: Byte at which each token ends, as `byte_ends` gives it.
        ends_b: The same of the other tokenizer.
        total: Bytes of the text.

    Returns:
        Borders in bytes, rising, the last one ``total``; tokens of each side up to each border.

    Example:
        >>> common_spans(np.array([2, 5, 9]), np.array([1, 5, 7, 9]), 9)
        (array([5, 9]), array([2, 3]), array([2, 4]))
    """
    borders = ends_a[(np.diff(ends_a, prepend=0) > 0) & (ends_a < total)]
    borders = np.append(borders[np.searchsorted(ends_b, borders, side="right") > np.searchsorted(ends_b, borders)], total)
    sides = (np.searchsorted(ends, borders, side="right") for ends in (ends_a, ends_b))
    tokens_a, tokens_b = sides
    tokens_a[-1], tokens_b[-1] = len(ends_a), len(ends_b)
    return borders, tokens_a, tokens_b


def byte_spans(text: str, tokenizer_a: Any, tokenizer_b: Any) -> list[Span]:
    """The finest spans of a text that are whole tokens for both tokenizers.

    Both encode without special tokens of their own; such as stand in the text count as they are read. Spans come in order, touch, and hold every token and
    every byte: a token without bytes and bytes without a token join a neighbour. Of a tokenizer that applies NFC, tokens lie where its offsets say.

    Args:
        text: Any Unicode text.
        tokenizer_a: A fast transformers tokenizer.
        tokenizer_b: Another one, or the same.

    Returns:
        For each span the tokens of a, ``(start, stop)``, those of b, and its bytes.

    Raises:
        ArgumentError: If a tokenizer has no byte offsets, or a normaliser that loses what the text says.
        DataError: If the text holds a lone surrogate.

    Example:
        >>> byte_spans("the cat", bytewise, wordwise)  # doctest: +SKIP
        [((0, 3), (0, 1), 3), ((3, 7), (1, 2), 4)]
    """
    (ids_a, ends_a), (ids_b, ends_b) = byte_ends(text, tokenizer_a), byte_ends(text, tokenizer_b)
    if not ids_a and not ids_b:
        return []
    borders, stops_a, stops_b = (values.tolist() for values in common_spans(ends_a, ends_b, len(utf8(text))))
    return [
        ((start_a, stop_a), (start_b, stop_b), border - low)
        for start_a, stop_a, start_b, stop_b, low, border in zip([0, *stops_a], stops_a, [0, *stops_b], stops_b, [0, *borders], borders)
    ]
