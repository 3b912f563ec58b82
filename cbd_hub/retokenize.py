"""A model moved to another vocabulary without training: its own trimmed, or that of another tokenizer."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from cbd_hub.card_metadata import license_of
from cbd_hub.cards import retokenized_card
from cbd_hub.configs import read_config, read_generation_config
from cbd_hub.errors import ArgumentError, VocabularyMismatchError
from cbd_hub.evaluation import BITS, Losses, byte_losses
from cbd_hub.families import family_of
from cbd_hub.files import check_absent, staged_folder, write_text
from cbd_hub.hub import resolve_checkpoint
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.losses.alignment import (
    byte_ends,
    check_faithful,
    check_whole,
    rowless_tokens,
    rows_needed,
    token_bytes,
    written_tokens,
)
from cbd_hub.precision import best_device
from cbd_hub.shapes import parameter_count
from cbd_hub.sizes import parse_size
from cbd_hub.weights import Checkpoint, check_read_back, load_model, load_tokenizer, write_safetensors


_ROWS = 4096  # composed at once
_ROLES = ("eos", "bos", "pad", "unk", "sep", "cls", "mask")
_TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id")
_OWN_FILES = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Retokenized:
    """What became of a model.

    Attributes:
        vocab: Rows of its embedding.
        copied: Rows that are one row of the old embedding, bit for bit.
        composed: Rows that are the mean of several.
        parameters: Unique parameters.
        before: Bits per byte of the original on the text that was given, or None.
        after: The same of the new model.
        difference: ``after - before`` with its standard error over documents, paired.
        bytes: Length of the text that was measured on.
        trained: Bits per byte after training, or None.
        trained_difference: ``trained - before`` with its standard error.
        steps: Optimiser steps of the training.
        tokens: Tokens that it saw.
        bridge: What it learned by.
    """

    vocab: int
    copied: int
    composed: int
    parameters: int
    before: float | None = None
    after: float | None = None
    difference: tuple[float, float | None] | None = None
    bytes: int = 0
    trained: float | None = None
    trained_difference: tuple[float, float | None] | None = None
    steps: int = 0
    tokens: int = 0
    bridge: str | None = None


def retokenize(
    model: str | os.PathLike[str], output_dir: str | os.PathLike[str], *, keep: int | str | None = None, tokenizer: str | os.PathLike[str] | None = None,
    text: Sequence[str] | None = None, revision: str | None = None,
) -> Retokenized:
    """Write a model with another vocabulary: its own trimmed to ``keep`` tokens, or that of another ``tokenizer``.

    Trimmed, the tokenizer keeps its special and single-byte tokens and the first merges of its list, in order, so that every text still encodes and a kept token
    means what it meant; its row is copied. For another tokenizer a row is copied where a token of the same bytes, or the special token of the same
    use, is in the old vocabulary, and is else the mean of the rows of the old tokens that its bytes consist of
    (https://huggingface.co/papers/2503.20083 trains on from there; so does `cbd_hub.distill.moved.retokenize_and_train`). Output heads that are not tied are treated alike.

    Args:
        model: Folder or Hub id.
        output_dir: The folder to make.
        keep: Tokens to keep, such as 16000 or "16K".
        tokenizer: Folder or Hub id of another tokenizer.
        text: Texts on which bits per byte are measured before and after.
        revision: Branch, tag or commit of a model on the Hub.

    Raises:
        ArgumentError: If not one of keep and tokenizer is given, keep is too small or too large, or the tokenizer is none that can be trimmed.
        VocabularyMismatchError: If the tokenizer and the checkpoint do not fit.
        WeightsError: If the model or a tokenizer cannot be read.
        StorageError: If the folder is in the way or the disk is full.

    Example:
        >>> retokenize("org/chain-64M", "./small", keep="16K")  # doctest: +SKIP
    """
    if (keep is None) == (tokenizer is None):
        raise ArgumentError("give either keep (a number of tokens of the model's own vocabulary) or tokenizer (another one's folder or Hub id)")
    target = Path(output_dir).expanduser()
    check_absent(target)
    source = resolve_checkpoint(model, revision)
    config, old = read_config(source), load_tokenizer(source)
    checkpoint, family = Checkpoint(source, config), family_of(config)
    rows = int(family.sizes(config)["vocab"])
    if rows_needed(old, rowless_tokens(old, rows)) > rows:
        raise VocabularyMismatchError(f"{source} has a tokenizer of {len(old):,} tokens and an embedding of {rows:,} rows; give the model its own tokenizer")
    if keep is not None:
        new, kept = trimmed(old, parse_size(keep), rows)
        parts = [[token] for token in kept]
    else:
        assert tokenizer is not None
        new = load_tokenizer(resolve_checkpoint(tokenizer, weights=False))
        check_read_back(new, config, os.fspath(tokenizer))
        check_faithful(old)
        parts = composition(old, new, rows)
    made = copy.deepcopy(config)
    setattr(made, family.fields["vocab"], len(parts))
    generation = read_generation_config(source)
    for holder in (made, generation):
        if holder is not None:
            _renumber(holder, old, new, None if keep is None else {token: place for place, (token,) in enumerate(parts)})
    layout, dims = {}, {}
    for spec, _, name in family.stored(made):
        dims[name] = spec.dims.index("vocab") if "vocab" in spec.dims else None
        layout[name] = (checkpoint.dtype, spec.shape(family.sizes(made)))
    tensors = (checkpoint[name].to(checkpoint.dtype) if dim is None else _recomposed(checkpoint[name], dim, parts).to(checkpoint.dtype) for name, dim in dims.items())
    with staged_folder(target) as staging:
        write_safetensors(staging / "model.safetensors", layout, tensors)
        made.save_pretrained(staging)
        new.save_pretrained(staging)
        if generation is not None:
            generation.save_pretrained(staging)
        load_model(staging, checkpoint.dtype)
        single = sum(len(part) == 1 for part in parts)
        found = Retokenized(len(parts), single, len(parts) - single, parameter_count(made))
        if text is not None:
            before, after = (measured(folder, which, text) for folder, which in ((source, old), (staging, new)))
            found = replace(found, before=before.mean * BITS, after=after.mean * BITS, difference=difference_of(after, before), bytes=int(before.tokens.sum()))
        write_text(staging / "README.md", retokenized_card(target.name, os.fspath(model), asdict(found), trimmed=keep is not None, license=license_of(source)))
    return found


def difference_of(losses: Losses, base: Losses) -> tuple[float, float | None]:
    """The mean of losses minus that of others in bits, paired over documents, and its standard error."""
    difference, error = losses.minus((1.0, base))
    return difference * BITS, None if error is None else error * BITS


def measured(folder: Path, tokenizer: Any, texts: Sequence[str]) -> Losses:
    """Losses of a model folder on the bytes of texts, in fp32."""
    return byte_losses(ModelRunner(load_model(folder, torch.float32).to(best_device())), tokenizer, texts, bf16=False)


def _recomposed(tensor: Tensor, dim: int, parts: Sequence[Sequence[int]]) -> Tensor:
    """Rows (along ``dim``) that are rows of a tensor, or means of several, made in fp32."""
    first = torch.tensor([part[0] for part in parts])
    made = tensor.index_select(dim, first)
    flat, rows = tensor.movedim(dim, 0), made.movedim(dim, 0)
    composed = [place for place, part in enumerate(parts) if len(part) > 1]
    for start in range(0, len(composed), _ROWS):
        several = composed[start : start + _ROWS]
        owners = torch.cat([torch.full((len(parts[place]),), number) for number, place in enumerate(several)])
        sums = flat.new_zeros(len(several), *flat.shape[1:], dtype=torch.float32)
        sums.index_add_(0, owners, flat[torch.tensor([token for place in several for token in parts[place]])].float())
        counts = torch.bincount(owners).view(-1, *[1] * (flat.dim() - 1))
        rows[torch.tensor(several)] = (sums / counts).to(made.dtype)
    return made


def _renumber(holder: Any, old: Any, new: Any, places: Mapping[int, int] | None) -> None:
    """Give a config's special tokens their new numbers: where the vocabulary was trimmed those of the same tokens, else those of the same use.

    Other tokens that it names (suppressed, forced) are renumbered where the vocabulary was trimmed, and left out in another one.
    """
    for role in _ROLES:
        name = f"{role}_token_id"
        value = getattr(holder, name, None)
        if value is None:
            continue
        if places is None:
            setattr(holder, name, getattr(new, name, None))
        elif isinstance(value, list):
            setattr(holder, name, [places[token] for token in value if token in places])
        else:
            setattr(holder, name, places.get(value))
    for name in _TOKEN_LISTS:
        if getattr(holder, name, None) is not None:
            setattr(holder, name, None if places is None else _renumbered(getattr(holder, name), places))
    biases = getattr(holder, "sequence_bias", None)
    if biases is not None:  # tokens with a bias each, as a dict or, from JSON, as pairs
        pairs = [] if places is None else biases.items() if isinstance(biases, dict) else biases
        holder.sequence_bias = [[[places[token] for token in tokens], bias] for tokens, bias in pairs if places is not None and all(token in places for token in tokens)] or None


def _renumbered(value: Any, places: Mapping[int, int]) -> Any:
    """New numbers of tokens in lists and lists of lists; what holds a token that is gone is left out. None where nothing is left."""
    if not isinstance(value, list):
        return places.get(value)
    found = [_renumbered(part, places) for part in value]
    if value and isinstance(value[0], list):
        return [part for part, whole in zip(found, value) if part is not None and len(part) == len(whole)] or None
    return [part for part in found if part is not None] or None


def composition(old: Any, new: Any, rows: int | None = None) -> list[list[int]]:
    """The old tokens that each token of another tokenizer consists of, one where it is in the old vocabulary.

    That is the token of the same name and bytes, else the one that the old tokenizer writes for its bytes; of a special one that of the same name, else of the
    same use, the end of a text before its beginning.

    Args:
        old: The tokenizer of the model.
        new: The other one.
        rows: Rows of the model: of no old token beyond them does one consist. None for all tokens.

    Raises:
        ArgumentError: If a tokenizer has no byte offsets, marks the pieces of a word, or does not read every text to the byte.
    """
    check_whole(new)
    known, held, special = written_tokens(old, rows), token_bytes(old)[:rows], (set(old.all_special_ids), set(new.all_special_ids))
    vocab = {name: place for name, place in old.get_vocab().items() if place < len(held)}
    uses = {getattr(new, f"{role}_token_id"): place for role in reversed(_ROLES) if (place := getattr(old, f"{role}_token_id")) is not None and place < len(held)}
    names, everything = {place: name for name, place in new.get_vocab().items()}, sorted(set(vocab.values()))
    longest = max(map(len, known), default=0)
    parts = []
    for place, token in enumerate(token_bytes(new)):
        twin = vocab.get(names.get(place))
        if twin is None or held[twin] != token or (twin in special[0]) != (place in special[1]):
            twin = uses.get(place) if place in special[1] else None
        twin = known.get(token) if twin is None else twin
        parts.append([twin] if twin is not None else _spelt(token, old, known, longest, len(held)) or everything)  # a number without a token is never read
    return parts


def _spelt(token: bytes, old: Any, known: Mapping[bytes, int], longest: int, rows: int) -> list[int]:
    """A token's bytes as the old tokenizer reads them; where they are no text, or it reads a token without a row, the longest known tokens from the left."""
    try:
        ids, ends = byte_ends(token.decode(), old)
    except UnicodeDecodeError:
        ids, ends = [rows], np.zeros(1, np.int64)
    if max(ids, default=0) >= rows:
        found, start = [], 0
        while start < len(token):
            stop = next((stop for stop in range(min(len(token), start + longest), start, -1) if token[start:stop] in known), None)
            if stop is not None:
                found.append(known[token[start:stop]])
            start = stop or start + 1
        return found
    return [token for token, low, end in zip(ids, [0, *ends.tolist()], ends.tolist()) if end > low] or list(ids)


def trimmed(tokenizer: Any, keep: int, rows: int | None = None) -> tuple[Any, list[int]]:
    """A BPE tokenizer with an exact prefix of its merges, and the old numbers of its tokens in their new order.

    Kept are all tokens that no merge makes, which are the special ones, bytes and single characters, and the products of as many of the first merges as make
    ``keep`` tokens at most. Added tokens beyond the model's rows come after these: they are beyond the rows of the trimmed model too.

    Args:
        tokenizer: A fast transformers tokenizer.
        keep: Tokens wanted.
        rows: Rows of the model; None where it has one for each token.

    Raises:
        ArgumentError: If it is no BPE, or ``keep`` is less than what no merge makes, or more than there is.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = None if backend is None else json.loads(backend.to_str())
    if facts is None or facts["model"]["type"] != "BPE":
        raise ArgumentError(f"{type(tokenizer).__name__} is no BPE with a list of merges ({'slow' if facts is None else facts['model']['type']}), so that it cannot be trimmed; move the model to another tokenizer instead")
    model = facts["model"]
    vocab: dict[str, int] = model["vocab"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    products = {"".join(pair) for pair in pairs}
    added = {entry["content"] for entry in facts["added_tokens"]}
    taken = {token for token in vocab if token not in products or token in added}
    rowless = set() if rows is None else rowless_tokens(tokenizer, rows)
    beyond = {entry["content"] for entry in facts["added_tokens"] if entry["id"] in rowless}
    whole = len((taken | products & vocab.keys() | added) - beyond)
    least = len((taken | added) - beyond)
    if least == whole:
        raise ArgumentError(f"keep={keep:,} tokens, but all {whole:,} of the vocabulary are special tokens, bytes and single characters; there is nothing to trim")
    if not least <= keep < whole:
        raise ArgumentError(
            f"keep={keep:,} tokens, but special tokens, bytes and single characters alone are {least:,} and the whole vocabulary is {whole:,}; ask for a number in between"
        )
    room, count = keep - least, 0  # for products of merges
    for pair in pairs:
        product = "".join(pair)
        if product not in taken and taken.issuperset(pair):  # a list made from SentencePiece also has pairs whose parts come later
            if not room:
                break
            room -= product not in added
            taken.add(product)
        count += 1
    numbers = {entry["content"]: entry["id"] for entry in facts["added_tokens"]}
    kept = sorted({vocab[token] for token in taken} | set(numbers.values()))
    places = {token: place for place, token in enumerate(kept)}
    model["vocab"] = {token: places[vocab[token]] for token in sorted(taken, key=vocab.__getitem__)}
    model["merges"] = [merge for merge, pair in zip(model["merges"][:count], pairs) if taken.issuperset([*pair, "".join(pair)])]
    for entry in facts["added_tokens"]:
        entry["id"] = places[entry["id"]]
    facts["post_processor"] = _replaced(facts["post_processor"], numbers, places)
    return _rebuilt(tokenizer, facts, places), [token for token in kept if token not in rowless]


def _replaced(processor: Any, numbers: Mapping[str, int], places: Mapping[int, int]) -> Any:
    """A post-processor with the new numbers of its special tokens."""
    if isinstance(processor, list):
        if len(processor) == 2 and isinstance(processor[0], str) and numbers.get(processor[0]) == processor[1]:
            return [processor[0], places[processor[1]]]
        return [_replaced(part, numbers, places) for part in processor]
    if not isinstance(processor, dict):
        return processor
    return {key: [places[token] for token in part] if key == "ids" else _replaced(part, numbers, places) for key, part in processor.items()}


def _rebuilt(tokenizer: Any, facts: Mapping[str, Any], places: Mapping[int, int]) -> Any:
    """The tokenizer read anew from its files with another description."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer.save_pretrained(folder)
        for name in _OWN_FILES:
            (folder / name).unlink(missing_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
        path = folder / "tokenizer_config.json"
        said = json.loads(path.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in said:
            said["added_tokens_decoder"] = {str(places[int(place)]): entry for place, entry in said["added_tokens_decoder"].items()}
        path.write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")
        made = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    wanted = {**facts["model"]["vocab"], **{entry["content"]: entry["id"] for entry in facts["added_tokens"]}}
    if made.get_vocab() != wanted:
        raise ArgumentError(f"{type(tokenizer).__name__} has tokens outside its tokenizer.json, so that it cannot be trimmed; move the model to another tokenizer instead")
    return made
