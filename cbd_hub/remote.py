"""The weights of an anchor that a plan reads, wherever they are: of a remote one only the bytes that are needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants

from cbd_hub.errors import IntegrityError, StorageError
from cbd_hub.families import family_of
from cbd_hub.hub import ChainFiles
from cbd_hub.manifest import Anchor
from cbd_hub.ranges import PartialFile, chunk_bytes, chunks_of
from cbd_hub.weights import MAX_HEADER, Checkpoint, read_header, reads_whole, row_spans


Rows = Mapping[str, np.ndarray | None]  # tensor -> rows that are read, None for all
Spans = list[tuple[int, int]]

_WHOLE = 0.98  # share of a file from which on it is fetched whole, into the standard cache


def open_weights(files: ChainFiles, anchor: Anchor, config: Any, rows: Rows | None = None) -> Checkpoint:
    """The opened weights of an anchor, checked as they are read.

    Args:
        files: The chain.
        anchor: One of its anchors.
        config: Its transformers config.
        rows: What is read of it; None for all.

    Raises:
        IntegrityError: If bytes differ from what was recorded.
        StorageError: If they cannot be fetched.
        WeightsError: If tensors are missing, extra or mis-shaped.
    """
    folder = files.path(anchor, "config.json").parent
    places = {name: _place(files, anchor, name, config, rows) for name in anchor.weight_files}
    return Checkpoint(folder, config, dict(anchor.files), files.chunks(anchor), places, rows)


def bytes_to_fetch(files: ChainFiles, anchor: Anchor, config: Any, rows: Rows) -> int:
    """Bytes of an anchor's weights that `open_weights` would fetch, from headers alone."""
    if files.remote(anchor) is None:
        return 0
    total = 0
    for name in anchor.weight_files:
        if files.cached(anchor, name) is not None:
            continue
        size, header = anchor.files[name].bytes, _previewed(anchor, name)
        if header is None:
            partial = files.partial(anchor, name)
            header = _own_header(partial) if _fetch(files, partial, [(0, 8)]) else None
        chunks = chunks_of([(0, size)]) if header is None else chunks_of(spans_read(*header, config, rows))
        if chunk_bytes(chunks, size) >= _WHOLE * size:
            total += size
            continue
        started = files.partial(anchor, name, hashes=False).path.is_file()  # only then are the hashes worth a request
        total += chunk_bytes(files.partial(anchor, name).missing(chunks) if started else chunks, size)
    return total


def bytes_needed(files: ChainFiles, anchor: Anchor, config: Any, rows: Rows) -> int:
    """Bytes of an anchor's weights that `open_weights` fetches into an empty cache, without a request: a file whose header is not at hand counts whole."""
    total = 0
    for name in anchor.weight_files:
        size, header = anchor.files[name].bytes, header_at_hand(files, anchor, name)
        read = size if header is None else chunk_bytes(chunks_of(spans_read(*header, config, rows)), size)
        total += size if read >= _WHOLE * size else read
    return total


def header_at_hand(files: ChainFiles, anchor: Anchor, name: str) -> tuple[dict[str, Any], int] | None:
    """The header of a weight file and where its tensors begin, without a request: as chain.json has it, or from the file itself where that is local."""
    found = _previewed(anchor, name)
    return read_header(files.path(anchor, name)) if found is None and files.remote(anchor) is None else found


def spans_read(header: Mapping[str, Any], start: int, config: Any, rows: Rows | None) -> Spans:
    """The stretches of a weight file that are read: its header, and the rows of its tensors.

    Args:
        header: Its safetensors header.
        start: Where its tensors begin.
        config: transformers config of the model.
        rows: What is read; None for all.
    """
    family = family_of(config)
    spans: Spans = [(0, start)]
    compared = family.head if getattr(config, family.tied) and reads_whole(rows, family.embedding) else None  # a head stored beside its embedding
    for key, entry in header.items():
        name = family.canonical(key)
        first, last = entry["data_offsets"]
        span = (start + first, start + last)
        if rows is None or (name is not None and name == compared):
            spans.append(span)
        elif name is not None and name in rows:
            spans += row_spans(span, entry["shape"][0] if entry["shape"] else 1, rows[name])
    return spans


def _place(files: ChainFiles, anchor: Anchor, name: str, config: Any, rows: Rows | None) -> Path:
    """Where a weight file is, once what is read of it is there."""
    if files.remote(anchor) is None:
        return files.path(anchor, name)
    if rows is None or files.cached(anchor, name) is not None:
        return files.path(anchor, name)
    partial = files.partial(anchor, name)
    guess = _previewed(anchor, name)
    spans = [(0, 8)] if guess is None else spans_read(*guess, config, rows)
    if (guess is not None and _mostly(partial, spans)) or not _fetch(files, partial, spans):
        return files.path(anchor, name)
    header = _own_header(partial)
    if header is None or header != guess:
        if not _fetch(files, partial, [(0, 8 + _header_length(partial))]):
            return files.path(anchor, name)
        spans = spans_read(*read_header(partial.path), config, rows)
        if _mostly(partial, spans) or not _fetch(files, partial, spans):
            return files.path(anchor, name)
    return partial.path


def _mostly(partial: PartialFile, spans: Spans) -> bool:
    """Whether so much of a file is needed, and is not there yet, that it is better fetched whole."""
    return chunk_bytes(partial.missing(chunks_of(spans)), partial.size) >= _WHOLE * partial.size


def _fetch(files: ChainFiles, partial: PartialFile, spans: Spans) -> bool:
    if (files.options.get("local_files_only") or constants.HF_HUB_OFFLINE) and partial.missing(chunks_of(spans)):
        raise StorageError(f"{partial.repo_id} is not in the cache as far as this size needs it, and no request may be made; load it once online")
    return partial.fetch(spans)


def _header_length(partial: PartialFile) -> int:
    with partial.path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_HEADER, partial.size - 8):
        raise IntegrityError(f"{partial.repo_id}/{partial.name} has a header of {length:,} bytes, which no model needs; it is refused")
    return length


def _own_header(partial: PartialFile) -> tuple[dict[str, Any], int] | None:
    """The header of a file of which the header's chunks are there."""
    stop = 8 + _header_length(partial)
    return None if partial.missing(chunks_of([(0, stop)])) else read_header(partial.path)


def _previewed(anchor: Anchor, name: str) -> tuple[dict[str, Any], int] | None:
    """The header of a weight file as chain.json has it; a promise, until the file itself is there."""
    text = anchor.preview.headers.get(name) if anchor.preview is not None else None
    if text is None:
        return None
    try:
        found = json.loads(text)
        header, start, size = found["tensors"], int(found["start"]), anchor.files[name].bytes
        for entry in header.values():
            first, last = entry["data_offsets"]
            if not (0 <= first <= last <= size - start and all(isinstance(side, int) and side >= 0 for side in entry["shape"])):
                raise ValueError
        if start < 8:
            raise ValueError
        return header, start
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
