"""Rows divided among processes: what evens out their last batches is there, and does not count."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers.trainer_pt_utils import LengthGroupedSampler

from cbd_hub.errors import DataError
from cbd_hub.evaluation import IGNORED


_COUNTS = {"labels": IGNORED, "spans": -1, "teacher_spans": -1}  # what says that tokens count, and the value that says they do not


def rows_in(batch: Mapping[str, Any], size: int) -> int:
    """How many rows a batch has: ``size`` where a collator has joined them into one, each with positions from 0."""
    return size if len(batch["labels"]) == 1 and "position_ids" in batch else len(batch["labels"])


def without_rows(batch: Mapping[str, Any], first: int, rows: int) -> dict[str, Any]:
    """A batch of so many rows in which those from ``first`` on do not count.

    Example:
        >>> without_rows({"input_ids": torch.tensor([[5], [6]]), "labels": torch.tensor([[5], [6]])}, 1, 2)["labels"].tolist()
        [[5], [-100]]
        >>> without_rows({"position_ids": torch.tensor([[0, 1, 0]]), "labels": torch.tensor([[5, 6, 7]])}, 1, 2)["labels"].tolist()
        [[5, 6, -100]]
    """
    joined = len(batch["labels"]) < rows
    place = (batch["position_ids"] == 0).cumsum(-1) - 1 if joined else torch.arange(rows, device=batch["labels"].device).unsqueeze(-1)
    return {**batch, **{name: batch[name].masked_fill(place >= first, value) for name, value in _COUNTS.items() if name in batch}}


class Endless(IterableDataset[dict[str, Any]]):
    """A stream that begins anew where it ends, if it can: to the Trainer one pass, in which it finds its place again, and whose steps all have their batches.

    Args:
        stream: Rows.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for turn in itertools.count():
            if hasattr(self._stream, "set_epoch"):
                self._stream.set_epoch(turn)
            row = None
            for row in self._stream:
                yield row
            worker = get_worker_info()
            if row is None and (turn or (worker is not None and worker.id)):
                return  # a stream that can be read once, or a worker for which there is no shard
            if row is None:
                raise DataError("the stream to train on has no rows that fill a block; give more text or a smaller block_size")


class Filled(IterableDataset[dict[str, Any]]):
    """A stream that ends with rows that do not count, up to a multiple of rows: processes that share it would otherwise read its first rows again.

    Args:
        stream: Rows.
        multiple: Rows that all processes take at once.
    """

    def __init__(self, stream: Any, multiple: int) -> None:
        self._stream, self._multiple = stream, multiple

    def __iter__(self) -> Iterator[dict[str, Any]]:
        count, first = 0, None
        for row in self._stream:
            first = first or row
            count += 1
            yield row
        for _ in range(-count % self._multiple if first else 0):
            assert first is not None
            yield {**first, **{name: [value] * len(first.get(name, first["input_ids"])) for name, value in _COUNTS.items() if name in first or name == "labels"}}

    def set_epoch(self, epoch: int) -> None:
        """Tell the stream which epoch comes."""
        if hasattr(self._stream, "set_epoch"):
            self._stream.set_epoch(epoch)


class Grouped(LengthGroupedSampler):
    """Rows of like length together, in an order that seed and epoch alone decide.

    Args:
        batch_size: Rows of one optimiser step.
        lengths: Tokens of each row.
        seed: Of the order.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch."""
        self.generator.manual_seed(self._seed + epoch)
