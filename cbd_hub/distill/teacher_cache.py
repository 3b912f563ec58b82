"""A teacher's top-k log-probabilities, read instead of running it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Dataset as TorchDataset

from cbd_hub.distill.cache_record import FILE_NAME, TAIL, TOKEN, TOP, CacheRecord, IdentifiedBlocks, predicts
from cbd_hub.distill.top_codec import TailCodec, TopCodec
from cbd_hub.errors import DataError, one_line
from cbd_hub.files import check_file
from cbd_hub.hub import download, is_repo_id, local_path
from cbd_hub.weights import tokenizer_sha256, weights_sha256


class TeacherCache(TorchDataset[dict[str, Any]]):
    """A teacher cache as a data set: blocks with the teacher's top tokens at every position that predicts one that counts.

    A row has ``input_ids`` and, where the blocks had them, ``labels`` and ``position_ids``; ``top_ids``, int64, and ``top_log_probs``, float32,
    each of shape (length, k), zero where nothing counts; ``tail_ids`` and ``tail_log_probs``, shape (length, draws), of other tokens drawn by their
    probability (caches up to schema 2 lack these); ``token_log_probs``, float32, shape (length,), of each token itself after those before it, zero where it
    does not count (caches of schema 1 lack these).

    Example:
        >>> import tempfile
        >>> from cbd_hub.distill.cache_writing import write_cache
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> teacher = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = write_cache(teacher, [{"input_ids": [5, 6, 7, 8]}], folder + "/cache", top_k=3)
        ...     print(len(cache), cache[0]["top_ids"].shape)
        1 (4, 3)
    """

    def __init__(self, record: CacheRecord, rows: Any, name: str) -> None:
        self.record, self.name = record, name
        source = record.source
        self.codec, self.tail = TopCodec(source.top_k, source.bits, source.vocab_size), TailCodec(source.tail_draws, source.vocab_size)
        self._rows = rows

    @classmethod
    def open(cls, cache: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None) -> TeacherCache:
        """A cache from a local folder or a Hub data set.

        Args:
            cache: Folder or repo id.
            revision: Branch, tag or commit of the repo.
            token: Hub token; None for the stored one.

        Raises:
            DataError: If it is no cache, or its cache.json or columns are refused.
            IntegrityError: If a file is missing or differs from its recorded hash.
        """
        folder = local_path(os.fspath(cache))
        if not folder.is_dir() and is_repo_id(os.fspath(cache)):
            folder = download(os.fspath(cache), revision, [FILE_NAME, "data/*"], {"repo_type": "dataset", "token": token})
        record = CacheRecord.read(folder)
        wanted = record.source.features()
        parts = []
        for shard in record.shards:
            path = folder / shard.path
            check_file(path, shard.sha256, shard.bytes)
            try:
                part = Dataset.from_file(str(path))
            except Exception as error:  # pyarrow and datasets raise many kinds for a broken file
                raise DataError(f"{path} is no Arrow file ({one_line(error)}); fetch or make the cache again") from error
            if part.features != wanted or len(part) != shard.rows:
                raise DataError(f"{path} has {len(part):,} rows of {', '.join(part.features)}, not {shard.rows:,} of {', '.join(wanted)}; fetch or make the cache again")
            parts.append(part)
        return cls(record, concatenate_datasets(parts), os.fspath(cache))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[int(index)]
        try:
            return self._decoded(row)
        except (DataError, OverflowError, TypeError, ValueError) as error:
            raise DataError(f"row {index} of {self.name} is damaged: {one_line(error)}; fetch or make the cache again") from error

    def ids(self, index: int) -> list[int]:
        """The tokens of a block."""
        return list(self._rows[index]["input_ids"])

    def _decoded(self, row: dict[str, Any]) -> dict[str, Any]:
        length, vocab = len(row["input_ids"]), self.codec.vocab_size
        for name, low, high in (("input_ids", 0, vocab), ("labels", -100, vocab), ("position_ids", 0, length)):
            if name in row:
                values = np.asarray(row[name], np.int64)
                if values.shape != (length,) or not length or values.min() < low or values.max() >= high:
                    raise DataError(f"{name} are not {length} numbers from {low} to {high - 1:,}")
        keep = predicts(row)
        found = {"top": self.codec.decode(row.pop(TOP), int(keep.sum()))}
        if self.tail.draws:
            found["tail"] = self.tail.decode(row.pop(TAIL), int(keep.sum()))
        for name, parts in found.items():
            for what, part in zip(("ids", "log_probs"), parts):
                row[f"{name}_{what}"] = np.zeros((length, part.shape[1]), part.dtype)
                row[f"{name}_{what}"][keep] = part
        if self.record.source.token_log_probs:
            row[TOKEN] = _checked(row[TOKEN], keep)
        return row

    def check(self, *, teacher: Any = None, tokenizer: Any = None, rows: Iterable[Mapping[str, Any]] | None = None, block_size: int = 128) -> None:
        """Refuse unless the cache was made for what is given; what is left out is not compared.

        Args:
            teacher: A loaded model.
            tokenizer: A transformers tokenizer.
            rows: Rows or blocks, as for `cbd_hub.distill.cache_writing.write_cache`. A cache that stopped at a limit of tokens must be made of the first ones.
            block_size: Tokens in a block, for rows that are packed.

        Raises:
            DataError: Naming what differs.
        """
        source = self.record.source
        if teacher is not None:
            self._same("teacher", "weights", source.teacher.weights_sha256, weights_sha256(teacher))
        if tokenizer is not None and source.tokenizer_sha256 is not None:
            self._same("tokenizer", "tokenizer", source.tokenizer_sha256, tokenizer_sha256(tokenizer))
        if rows is None:
            return
        given = IdentifiedBlocks(rows, tokenizer, block_size, source.packing.prefix)
        raw = not given.packed and source.text.sha256 is not None
        if raw and block_size != source.packing.block_size:
            raise DataError(f"{self.name} was made for another sequence packing: blocks of {source.packing.block_size} tokens, not {block_size}{_REMEDY}")
        drawn = 0
        for drawn, _ in enumerate(given, 1):
            if drawn > source.packing.blocks or (drawn == source.packing.blocks and not source.text.complete):
                break
        if raw:
            self._same("text", "documents", f"{source.text.sha256} {source.text.documents}", f"{given.text_sha256} {given.documents}")
        what = "sequence packing" if raw else "text or sequence packing"
        self._same(what, "blocks", f"{source.packing.sha256} {source.packing.blocks}", f"{given.packing_sha256} {drawn}")

    def _same(self, what: str, of: str, recorded: str, found: str) -> None:
        if recorded != found:
            raise DataError(f"{self.name} was made for another {what}: its {of} are {recorded[:12]}..., these are {found[:12]}...{_REMEDY}")


_REMEDY = "; make a cache for this one with `cbd cache-teacher`, or leave teacher_cache out"


def _checked(values: Any, keep: np.ndarray) -> np.ndarray:
    """Log-probabilities of a block's tokens, where ``keep`` says which positions predict one that counts.

    Raises:
        ValueError: If they are none.
    """
    found = np.asarray(values, np.float32)
    if found.shape != keep.shape or not np.isfinite(found).all() or found.max() > 0 or found[~np.roll(keep, 1)].any():
        raise ValueError(f"{TOKEN} are no log-probabilities of its tokens")
    return found
