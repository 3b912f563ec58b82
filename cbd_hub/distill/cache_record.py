"""What a teacher cache was made from: cache.json as validated data, the columns of the shards, and blocks that are identified while they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from datasets import Features, List, Value
from pydantic import Field, ValidationError

from cbd_hub.distill.packing import is_joined, next_tokens, pack
from cbd_hub.distill.rows import TEMPLATE_COLUMNS, check_ready
from cbd_hub.distill.top_codec import BITS
from cbd_hub.errors import DataError
from cbd_hub.evaluation import IGNORED
from cbd_hub.manifest import Data, FileRecord, Parameters, Sha256


SCHEMA_VERSION = 3
FILE_NAME = "cache.json"
COLUMNS = ("input_ids", "labels", "position_ids")
TOP, TAIL = "teacher_top", "teacher_tail"
TOKEN = "token_log_probs"
_TEXT = ("text", "prompt", "completion", "response", "messages", *TEMPLATE_COLUMNS)
_MAX_BYTES = 64 * 2**20


class TeacherRecord(Data):
    """The model whose log-probabilities are kept: its fingerprint (`cbd_hub.weights.weights_sha256`) and what it computed in."""

    repo_id: str | None = Field(default=None, max_length=256)
    parameters: Parameters
    weights_sha256: Sha256
    dtype: str = Field(max_length=16)


class TextRecord(Data):
    """The rows that were packed, in their order; ``complete`` unless a limit of tokens stopped before the last one."""

    sha256: Sha256 | None = None
    documents: int = Field(ge=0)
    complete: bool


class PackingRecord(Data):
    """The blocks, in their order; ``predicted`` counts the positions whose next token counts, ``prefix`` is what each block of joined text begins with."""

    sha256: Sha256
    block_size: int | None = Field(default=None, ge=1, le=2**20)
    blocks: int = Field(ge=1, le=2**40)
    tokens: int = Field(ge=1, le=2**50)
    predicted: int = Field(ge=1, le=2**50)
    prefix: list[Annotated[int, Field(ge=0, lt=2**24)]] = Field(default=[], max_length=16)


class Source(Data):
    """All that decides what a cache holds; equal sources give equal caches.

    Caches of schema 1 lack ``token_log_probs``, and those of schema 2 ``tail_draws``.
    """

    teacher: TeacherRecord
    tokenizer_sha256: Sha256 | None = None
    text: TextRecord
    packing: PackingRecord
    columns: list[str] = Field(min_length=1, max_length=3)
    top_k: int = Field(ge=1, lt=2**24)
    bits: int = Field(ge=BITS[0], le=BITS[1])
    vocab_size: int = Field(ge=2, le=2**24)
    shard_blocks: int = Field(ge=1)
    student_sha256: Sha256 | None = None
    token_log_probs: bool = False
    tail_draws: int = Field(default=0, ge=0, le=2**12)

    def features(self) -> Features:
        """The columns of the shards."""
        own = {TOKEN: List(Value("float16"))} if self.token_log_probs else {}
        return Features({**{name: List(Value("int32")) for name in self.columns}, **own, TOP: Value("binary"), **({TAIL: Value("binary")} if self.tail_draws else {})})


class StudentFigures(Data):
    """Forward KL from the teacher to a student, nats per token: over the whole vocabulary, and over what the cache keeps."""

    parameters: Parameters
    full: float
    kept: float


class Figures(Data):
    """What was measured while a cache was written.

    Attributes:
        bytes_per_token: Bytes of the shards, token ids included, over tokens of the text.
        rounding_kl: What rounding costs: mean KL between the teacher's k + 1 outcomes before and after, nats per predicted token.
        rounding_kl_max: The most it costs at any position.
        tail_mass: Mean probability of the tokens that are not listed.
        student: How far the kept divergence lies below the full one for a given student.
    """

    bytes_per_token: float
    rounding_kl: float
    rounding_kl_max: float
    tail_mass: float
    student: StudentFigures | None = None


class ShardRecord(FileRecord):
    """One Arrow file of a cache."""

    path: Annotated[str, Field(pattern=r"^data/train-\d{5}-of-\d{5}\.arrow$")]
    rows: int = Field(ge=1)


class CacheRecord(Data):
    """cache.json."""

    schema_version: int
    created_with: str = Field(max_length=64)
    source: Source
    figures: Figures
    shards: list[ShardRecord] = Field(min_length=1, max_length=100_000)

    @classmethod
    def read(cls, folder: Path) -> CacheRecord:
        """The record of a cache's folder.

        Raises:
            DataError: If there is none, or it is broken, newer than this version, or refused.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise DataError(f"{folder} is no teacher cache: it has no {FILE_NAME}; make one with `cbd cache-teacher`, or run it again if it was stopped")
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError(f"{path.stat().st_size:,} bytes")
            values = json.loads(path.read_bytes())
            version = values.get("schema_version") if isinstance(values, dict) else None
            if isinstance(version, int) and version > SCHEMA_VERSION:
                raise DataError(f"{path} has schema {version} and this cbd_hub reads up to {SCHEMA_VERSION}; run `pip install -U cbd-hub`")
            record = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole file"
            raise DataError(f"{path} is refused at {where[:120]}: {first['msg'][:200]}; fetch or make the cache again") from error
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} cannot be read ({str(error)[:100]}); fetch or make the cache again") from error
        if sum(shard.rows for shard in record.shards) != record.source.packing.blocks or not set(record.source.columns) <= set(COLUMNS):
            raise DataError(f"{path} contradicts itself; fetch or make the cache again")
        return record


    def table(self) -> dict[str, str]:
        """What there is to know of the cache, in words."""
        source, figures = self.source, self.figures
        told = {
            "tokens": f"{source.packing.tokens:,} in {source.packing.blocks:,} blocks, {source.packing.predicted:,} of them predict one that counts",
            "listed": f"{source.top_k} of {source.vocab_size:,} tokens at {source.bits} bits",
            "bytes per token": f"{figures.bytes_per_token:.1f}",
            "KL of rounding": f"{figures.rounding_kl:.1e} nats per token, {figures.rounding_kl_max:.1e} at most",
            "tail mass": f"{figures.tail_mass:.4f} of the probability is on tokens not listed, of which the sum is kept" + (
                f" and {source.tail_draws} draws" if source.tail_draws else ""
            ),
        }
        if figures.student is not None:
            told["KL to the student"] = (
                f"{figures.student.full:.4f} nats per token over the whole vocabulary, {figures.student.kept:.4f} over what is kept: "
                f"an error of {figures.student.kept - figures.student.full:+.4f}"
            )
        return told


class IdentifiedBlocks:
    """Blocks of rows, packed and fingerprinted as they are drawn.

    Args:
        rows: Rows with ``text``, ``prompt`` and ``completion`` or ``messages``, or blocks that have ``input_ids``.
        tokenizer: A transformers tokenizer; needed unless rows have ``input_ids``.
        block_size: Tokens in a block.
        prefix: Tokens that each block of joined text begins with and that do not count.

    Attributes:
        joined: Whether the blocks are of plain text that is joined end to end.
        prefix: The same, empty of rows that are not joined, and of blocks that do not begin with it.

    Raises:
        DataError: If there are no rows, or no tokenizer where one is needed.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], tokenizer: Any, block_size: int, prefix: Sequence[int] = ()) -> None:
        self.documents = self.blocks = self.tokens = self.predicted = 0
        self._text, self._packing = hashlib.sha256(), hashlib.sha256()
        self._rows = iter(rows)
        self._first = next(self._rows, None)
        if self._first is None:
            raise DataError("there are no rows; give a text of at least one block")
        self.packed = "input_ids" in self._first
        if not self.packed and tokenizer is None:
            raise DataError(f"the rows have the columns {', '.join(self._first)} but no tokenizer came; pass one")
        self.joined = _begins(self._first, prefix) if self.packed else is_joined(self._first)
        self._tokenizer, self.block_size, self.prefix = tokenizer, block_size, list(prefix) if self.joined else []

    @property
    def text_sha256(self) -> str | None:
        """Fingerprint of the rows drawn so far; None of rows that came as blocks."""
        return None if self.packed else self._text.hexdigest()

    @property
    def packing_sha256(self) -> str:
        """Fingerprint of the blocks drawn so far."""
        return self._packing.hexdigest()

    def _documents(self) -> Iterator[Mapping[str, Any]]:
        row = self._first
        while row is not None:
            self.documents += 1
            if not self.packed:
                self._text.update(json.dumps({name: row[name] for name in _TEXT if name in row}, sort_keys=True).encode() + b"\n")
            yield row
            row = next(self._rows, None)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        drawn = self._documents()
        for row in drawn if self.packed else pack(drawn, self._tokenizer, self.block_size, self.prefix):
            block = {name: np.asarray(row[name], np.int32) for name in COLUMNS if row.get(name) is not None}
            ids = block["input_ids"]
            check_ready(row)
            if len(self.prefix) == 1:  # what it says is known without, and is part of a cache all the same
                block.setdefault("labels", np.append(np.int32(IGNORED), ids[1:]))
            if any(values.shape != (len(ids),) for values in block.values()) or not len(ids) or not all(row.get("attention_mask") or [1]):
                raise DataError(f"row {self.blocks:,} is no block: its {', '.join(block)} must be lists of one length, without padding")
            self.blocks += 1
            self.tokens += len(ids)
            self.predicted += int(predicts(block).sum())
            for name, values in block.items():
                self._packing.update(f"{name} {len(values)}\n".encode() + values.astype("<i4").tobytes())
            yield block


def _begins(block: Mapping[str, Any], prefix: Sequence[int]) -> bool:
    """Whether a block is of joined text, and begins with the prefix."""
    return block.get("position_ids") is None and [int(token) for token in block["input_ids"][: len(prefix)]] == list(prefix)


def predicts(block: Mapping[str, Any]) -> np.ndarray:
    """Which positions of a block predict a token that counts, bool, shape (length,)."""
    given = {"labels": block.get("labels", block["input_ids"]), **({"position_ids": block["position_ids"]} if "position_ids" in block else {})}
    found: np.ndarray = (next_tokens({name: torch.tensor(np.asarray(values))[None] for name, values in given.items()})[0] != IGNORED).numpy()
    return found
