"""Held-out loss with its standard error, paired differences, perplexity and bits per byte."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cbd_hub.errors import DataError
from cbd_hub.interpolation.live import ModelRunner, Runner, frozen
from cbd_hub.losses.alignment import byte_counter, check_rows, end_of, prefix_of, rowless_tokens
from cbd_hub.losses.log_probs import token_losses
from cbd_hub.precision import has_bf16, products
from cbd_hub.shapes import check_ids, check_positions
from cbd_hub.texts import utf8


logger = logging.getLogger(__name__)

ENOUGH = 2048  # calibration tokens
_BATCH_TOKENS = 2048
_CHARACTERS = 16  # looked at for a token of a block
IGNORED = -100
BITS = 1 / math.log(2)  # in a nat


def joined_blocks(rows: Iterable[Sequence[int]], block_size: int, prefix: Sequence[int] = ()) -> Iterator[list[int]]:
    """Rows of token ids joined end to end and cut into full blocks; the last, unfilled one is left out.

    Args:
        rows: Token ids.
        block_size: Tokens in a block.
        prefix: Tokens that each block begins with.

    Raises:
        DataError: If the prefix leaves no room in a block.

    Example:
        >>> list(joined_blocks([[1, 2, 3], [4, 5]], 3, [0]))
        [[0, 1, 2], [0, 3, 4]]
    """
    room = block_size - len(prefix)
    if room < 1:
        raise DataError(f"a block of {block_size} tokens has no room beside the {len(prefix)} that it begins with; give a larger block_size")
    ids: list[int] = []
    for row in rows:
        ids += row
        whole = len(ids) // room * room
        for start in range(0, whole, room):
            yield [*prefix, *ids[start : start + room]]
        del ids[:whole]


def no_answer(block_size: int) -> DataError:
    """What to say of prompts and chats of which no token counts."""
    return DataError(f'no row has an answer within its first {block_size:,} tokens; give rows with answers, which in a chat are the turns of the role "assistant", or a larger block_size')


@dataclass(frozen=True)
class Documents:
    """Tokenised documents for evaluation.

    Attributes:
        ids: Token ids of each document, shape (length,), cut to the block size; each at least 2.
        lengths: UTF-8 bytes that the predicted tokens of each document stand for.
        labels: The ids once more, -100 where a token does not count, as a prompt's; None where all count. The first one is never predicted.
    """

    ids: tuple[Tensor, ...]
    lengths: tuple[int, ...]
    labels: tuple[Tensor, ...] | None = None

    @property
    def tokens(self) -> int:
        """Predicted tokens of all documents."""
        return sum(int((labels[1:] != IGNORED).sum()) for labels in self.labels or self.ids)

    def check(self, config: Any) -> None:
        """Refuse documents that a model cannot read.

        Raises:
            ArgumentError: If one is longer than the model has positions.
            DataError: If one holds a token for which the model has no row.
        """
        longest = max((len(ids) for ids in self.ids), default=0)
        check_positions(longest, config, f"a row of {longest:,} tokens")
        check_ids(max((int(ids.max()) for ids in self.ids), default=0), config)

    def first(self, tokens: int) -> Documents:
        """As many documents as fit into so many tokens, at least one of those that there are."""
        return self._part(slice(self._fitting(tokens)))

    def after(self, tokens: int) -> Documents:
        """The documents that are not the `first` of so many tokens; there may be none."""
        return self._part(slice(self._fitting(tokens), None))

    def _fitting(self, tokens: int) -> int:
        return max(1, sum(total <= tokens for total in itertools.accumulate(len(ids) for ids in self.ids)))

    def _part(self, part: slice) -> Documents:
        return Documents(self.ids[part], self.lengths[part], self.labels and self.labels[part])

    def batch(self, chosen: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
        """Some documents padded to one length: ids, attention mask (None without padding), and the token that each position predicts, -100 for none."""
        input_ids = pad_sequence([self.ids[index] for index in chosen], batch_first=True)
        mask = pad_sequence([torch.ones_like(self.ids[index]) for index in chosen], batch_first=True)
        labels = pad_sequence([(self.labels or self.ids)[index] for index in chosen], batch_first=True, padding_value=IGNORED)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return input_ids.to(device), None if bool(mask.all()) else mask.to(device), targets.to(device)

    @classmethod
    def read(cls, texts: Sequence[str], tokenizer: Any, block_size: int, max_tokens: int | None = None) -> Documents:
        """Documents from texts, in order, until ``max_tokens`` predicted tokens are reached.

        Args:
            texts: One text per document.
            tokenizer: A transformers tokenizer.
            block_size: Longest document in tokens; the rest is left out.
            max_tokens: Where to stop; None for all.

        Raises:
            DataError: If no document has two tokens.
        """
        (ids, lengths, total), count = ([], [], 0), byte_counter(tokenizer)
        for text in texts:
            tokens = tokenizer(text, add_special_tokens=True, truncation=True, max_length=block_size)["input_ids"]
            if len(tokens) < 2:
                continue
            ids.append(torch.tensor(tokens))
            lengths.append(count(tokens[1:]))
            total += len(tokens) - 1
            if max_tokens is not None and total >= max_tokens:
                break
        if not ids:
            raise DataError("the text has no document of two tokens or more; give a longer text")
        return cls(tuple(ids), tuple(lengths))

    @classmethod
    def answered(cls, rows: Iterable[tuple[Sequence[int], Sequence[int]]], tokenizer: Any, block_size: int, max_tokens: int | None = None) -> Documents:
        """Prompts with their answers, each row a document of which the answer alone counts, until ``max_tokens`` of these are reached.

        Args:
            rows: Token ids and labels, -100 where a token does not count.
            tokenizer: A transformers tokenizer.
            block_size: Longest row in tokens; the rest is left out.
            max_tokens: Where to stop; None for all.

        Raises:
            DataError: If no token counts.
        """
        (ids, lengths, kept, total), count = ([], [], [], 0), byte_counter(tokenizer)
        for row in rows:
            tokens, labels = (torch.tensor(values[:block_size]) for values in row)
            counted = tokens[1:][labels[1:] != IGNORED]
            if not len(counted):
                continue
            ids.append(tokens)
            kept.append(labels)
            lengths.append(count(counted))
            total += len(counted)
            if max_tokens is not None and total >= max_tokens:
                break
        if not ids:
            raise no_answer(block_size)
        return cls(tuple(ids), tuple(lengths), tuple(kept))

    @classmethod
    def packed(cls, texts: Sequence[str], tokenizer: Any, block_size: int, max_tokens: int | None = None, *, name: str = "the calibration text") -> Documents:
        """Texts joined end to end, with the end-of-text token between them, in blocks of one length as training packs them: for calibration.

        Raises:
            DataError: If the texts do not fill one block.
        """
        end = end_of(tokenizer)
        return cls.joined(([*tokenizer(text, add_special_tokens=False)["input_ids"], *end] for text in texts), tokenizer, block_size, max_tokens, name=name)

    @classmethod
    def joined(
        cls, rows: Iterable[Sequence[int]], tokenizer: Any, block_size: int, max_tokens: int | None = None, *, name: str = "the calibration text"
    ) -> Documents:
        """Rows of token ids joined end to end, in blocks of one length, each after what the tokenizer puts before a text, which does not count.

        Raises:
            DataError: If they do not fill one block, or it has no room for them.
        """
        before = prefix_of(tokenizer)
        most = None if max_tokens is None else max(max_tokens, block_size) // block_size
        found = 0

        def told() -> Iterator[Sequence[int]]:
            nonlocal found
            for row in rows:
                found += len(row)
                yield row

        ids = [torch.tensor(block) for block in itertools.islice(joined_blocks(told(), block_size, before), most)]
        if not ids:
            raise DataError(
                f"{name} has {found:,} tokens, less than one block of {block_size - len(before):,}; give a longer text or a smaller block_size"
            )
        if len(ids) * block_size < min(ENOUGH, max_tokens or ENOUGH):
            logger.warning(
                "%s has %d tokens; with fewer than %d, what is chosen or fitted on them is clearly worse: give a longer text", name, len(ids) * block_size, ENOUGH
            )
        counted = max(1, len(before))  # the first that can
        labels = tuple(torch.cat([block.new_full((counted,), IGNORED), block[counted:]]) for block in ids) if counted > 1 else None
        count = byte_counter(tokenizer)
        return cls(tuple(ids), tuple(count(block[counted:]) for block in ids), labels)


@dataclass(frozen=True)
class Calibration:
    """Calibration text in two readings.

    Attributes:
        blocks: Joined end to end in blocks of one length: units are weighed on them and coordinates fitted.
        documents: One by one, as `cbd eval` reads held-out text: every loss that a chain states is measured on them. In joined blocks a model that has not
            learned where our texts end would look worse than it is, a teacher more than its anchors.
    """

    blocks: Documents
    documents: Documents

    @classmethod
    def read(cls, texts: Sequence[str], tokenizer: Any, block_size: int, max_tokens: int) -> Calibration:
        """Both readings of some texts, each to ``max_tokens``.

        Raises:
            DataError: If the texts do not fill one block.
        """
        return cls(*(read(texts, tokenizer, block_size, max_tokens) for read in (Documents.packed, Documents.read)))


@dataclass(frozen=True)
class Losses:
    """Summed loss in nats and predicted tokens of each document.

    Example:
        >>> losses = Losses(np.array([20.0, 30.0]), np.array([10, 10]))
        >>> losses.mean, round(losses.stderr, 3)
        (2.5, 0.5)
    """

    nats: np.ndarray
    tokens: np.ndarray

    @classmethod
    def kept(cls, path: Path, make: Callable[[], Losses]) -> Losses:
        """Those of a file, which is written whole from what ``make`` gives where it is not there."""
        if not path.is_file():
            losses, partial = make(), path.with_name(f"partial.{path.name}")
            np.savez(partial, nats=losses.nats, tokens=losses.tokens)
            os.replace(partial, path)
        with np.load(path) as stored:
            return cls(stored["nats"], stored["tokens"])

    @property
    def mean(self) -> float:
        """Nats per token over all tokens."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean over documents, as of a ratio estimate; None of one document."""
        return _ratio_stderr(self.nats, self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(mean)."""
        return math.exp(self.mean) if self.mean < 700 else math.inf

    def minus(self, *others: tuple[float, Losses]) -> tuple[float, float | None]:
        """Mean of this minus a weighted sum of others, paired over documents, and its standard error, in nats per token."""
        nats = self.nats - sum(weight * other.nats for weight, other in others)
        return float(nats.sum() / self.tokens.sum()), _ratio_stderr(nats, self.tokens)


def _ratio_stderr(nats: np.ndarray, tokens: np.ndarray) -> float | None:
    documents = len(nats)
    if documents < 2:
        return None
    residual = nats - nats.sum() / tokens.sum() * tokens
    return float(math.sqrt(documents / (documents - 1) * np.square(residual).sum()) / tokens.sum())


@torch.no_grad()
def document_losses(runner: Runner, documents: Documents, *, bf16: bool = True) -> Losses:
    """Loss of a model on each document.

    Args:
        runner: A model or a plan that runs.
        documents: The documents.
        bf16: Whether products run in bf16 (under autocast) on a device that is quick at it; logits and losses are fp32 either way.

    Returns:
        The losses, in the documents' order.

    Raises:
        ArgumentError: If a document is longer than the model has positions.
        DataError: If one holds a token for which the model has no row.
    """
    documents.check(runner.config)
    by_length = sorted(range(len(documents.ids)), key=lambda index: len(documents.ids[index]))
    nats, tokens = np.zeros(len(by_length)), np.zeros(len(by_length), dtype=np.int64)
    start = 0
    while start < len(by_length):
        stop = start + 1
        while stop < len(by_length) and (stop + 1 - start) * len(documents.ids[by_length[stop]]) <= _BATCH_TOKENS:
            stop += 1
        chosen = by_length[start:stop]
        for index, (total, count) in zip(chosen, batch_losses(runner, documents, chosen, bf16)):
            nats[index], tokens[index] = total, count
        start = stop
    return Losses(nats, tokens)


def model_losses(model: Any, documents: Documents) -> Losses:
    """Loss of a loaded model on each document, in eval mode; see `document_losses`."""
    with frozen(model):
        return document_losses(ModelRunner(model), documents)


def batch_losses(runner: Runner, documents: Documents, chosen: Sequence[int], bf16: bool) -> list[tuple[float, int]]:
    """Summed loss in nats, and count, of the predicted tokens of some documents in one forward pass."""
    device = runner.device
    bf16 = bf16 and has_bf16(device.type)
    input_ids, mask, targets = documents.batch(chosen, device)
    with products(device, bf16=bf16):
        output = runner(input_ids, mask)
    predicts = targets != IGNORED
    head = output.head
    hidden = output.hidden[predicts]
    losses = token_losses(
        hidden.to(torch.bfloat16) if bf16 else hidden, head.weight, targets[predicts], **head.options(),
    ).cpu().double()
    counts = predicts.sum(1).tolist()
    return [(float(part.sum()), count) for part, count in zip(losses.split(counts), counts)]


def bits_per_byte(losses: Losses, documents: Documents) -> float:
    """Loss in bits per UTF-8 byte of text: the unit in which models of different vocabularies compare."""
    return float(losses.nats.sum() / math.log(2) / sum(documents.lengths))


def common_texts(texts: Iterable[str], tokenizers: Sequence[Any], block_size: int, max_tokens: int | None = None) -> list[str]:
    """Beginnings of texts that each of several tokenizers reads in one block, cut at white space, so that `byte_losses` of all of them are on the same bytes.

    Args:
        texts: One text per document.
        tokenizers: The tokenizers.
        block_size: Longest document in tokens, with those before the text; the rest is left out.
        max_tokens: Where to stop, by the tokenizer that needs the most; None for all.

    Raises:
        DataError: If no text is left, or a tokenizer has no token to begin with.
    """
    rooms = np.array([block_size - len(_before(tokenizer)) for tokenizer in tokenizers])
    found, totals = [], np.zeros(len(tokenizers), dtype=np.int64)
    for text in texts:
        part = text[: _CHARACTERS * block_size]
        while part:
            counts = np.array([len(tokenizer(part, add_special_tokens=False)["input_ids"]) for tokenizer in tokenizers])
            if (counts <= rooms).all():
                break
            short = part[: min(len(part) - 1, int(len(part) * max(0.0, float((rooms / counts.clip(1)).min()))))]
            place = max(short.rfind(" "), short.rfind("\n"))
            part = short[:place] if place > 0 else short
        if not part or not counts.all():
            continue
        found.append(part)
        totals += counts
        if max_tokens is not None and totals.max() >= max_tokens:
            break
    if not found:
        raise DataError(f"no text has a beginning that every tokenizer reads in {block_size:,} tokens; give longer texts, or a larger block_size")
    return found


def _before(tokenizer: Any) -> list[int]:
    """What a text's first token is predicted after.

    Raises:
        DataError: If there is nothing.
    """
    before: list[int] = prefix_of(tokenizer) or [token for token in (tokenizer.eos_token_id, tokenizer.bos_token_id) if token is not None][:1]
    if not before:
        raise DataError("the tokenizer has neither a first nor an end-of-text token, so that a text's first token cannot be predicted; set its eos_token")
    return before


def byte_losses(
    runner: Runner, tokenizer: Any, texts: Sequence[str], *, characters: int | None = 400, max_bytes: int | None = 100_000, bf16: bool = True
) -> Losses:
    """Loss in nats, and bytes in the place of tokens, on the beginnings of texts: the same bytes whatever the tokenizer is.

    The first token is predicted too, after what the tokenizer begins a text with, else after its end-of-text token.

    Args:
        runner: A model that runs.
        tokenizer: Its tokenizer.
        texts: One text per document.
        characters: Most of a text; None for all.
        max_bytes: Where to stop; None for all.
        bf16: Whether products run in bf16.

    Raises:
        DataError: If there is no text, one holds a token for which the model has no row, or the tokenizer has no token to begin with.
    """
    before = _before(tokenizer)
    sizes = itertools.accumulate(len(utf8(text[:characters], f"text {number:,}")) for number, text in enumerate(texts))
    parts = [text[:characters] for text, total in zip(texts, sizes) if max_bytes is None or total <= max_bytes] or [text[:characters] for text in texts[:1]]
    rows = [[*before, *tokenizer(part, add_special_tokens=False)["input_ids"]] for part in parts]
    rowless = rowless_tokens(tokenizer, runner.config.vocab_size)
    for number, row in enumerate(rows):
        check_rows(row, rowless, tokenizer, f"text {number:,}: the tokenizer")
    held = [place for place, row in enumerate(rows) if len(row) > len(before)]
    if not held:
        raise DataError("there is no text to measure on; give a file with at least a few paragraphs")
    documents = Documents(tuple(torch.tensor(rows[place]) for place in held), tuple(len(parts[place].encode()) for place in held))
    if len(before) > 1:
        labels = tuple(torch.cat([ids.new_full((len(before),), IGNORED), ids[len(before) :]]) for ids in documents.ids)
        documents = Documents(documents.ids, documents.lengths, labels)
    return Losses(document_losses(runner, documents, bf16=bf16).nats, np.array(documents.lengths))
