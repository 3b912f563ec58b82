"""Losses on the same bytes by every tokenizer of a chain: what its sizes on both sides of a bridge are compared by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cbd_hub.distill.data import as_row
from cbd_hub.distill.packing import tokenised
from cbd_hub.distill.rows import RESPONSES, chat_of
from cbd_hub.errors import DataError
from cbd_hub.evaluation import Documents, Losses, byte_losses, common_texts, document_losses
from cbd_hub.interpolation.live import Runner


class SameBytes:
    """Documents cut for several tokenizers: texts where each of them still reads them in one block; rows with answers are whole, or left out.

    Args:
        documents: Texts, or rows with prompts and completions or chats.
        tokenizers: All tokenizers that are compared.
        block_size: Longest document in tokens, by any of them.
        max_tokens: Where to stop, by the one that needs the most.

    Attributes:
        documents: What is read.

    Raises:
        DataError: If nothing is left, or a document cannot be read.
    """

    def __init__(self, documents: Sequence[Any], tokenizers: Sequence[Any], block_size: int, max_tokens: int) -> None:
        self.documents: list[Any]
        self._bytes: list[int] = []  # of the answers
        if all(isinstance(document, str) for document in documents):
            self.documents = common_texts(documents, tokenizers, block_size, max_tokens)
            return
        self.documents = []
        totals = np.zeros(len(tokenizers), dtype=np.int64)
        for row, *sides in zip(documents, *(tokenised(map(as_row, documents), tokenizer) for tokenizer in tokenizers)):
            said = _answer_bytes(as_row(row))
            if not said or any(len(side.ids) > block_size for side in sides):
                continue
            self.documents.append(as_row(row))
            self._bytes.append(said)
            totals += [sum(label >= 0 for label in side.labels[1:]) for side in sides]
            if totals.max() >= max_tokens:
                break
        if not self.documents:
            raise DataError(f"no row is read whole in {block_size:,} tokens by every tokenizer, so that bits per byte cannot be compared; give shorter rows, or a larger block_size")

    def losses(self, runner: Runner, tokenizer: Any) -> Losses:
        """Nats of each document, and bytes in the place of tokens."""
        if not self._bytes:
            return byte_losses(runner, tokenizer, self.documents, characters=None, max_bytes=None)
        rows = [(tokens.ids, tokens.labels) for tokens in tokenised(self.documents, tokenizer)]
        return Losses(document_losses(runner, Documents.answered(rows, tokenizer, max(len(ids) for ids, _ in rows))).nats, np.array(self._bytes))


def _answer_bytes(row: Mapping[str, Any]) -> int:
    """UTF-8 bytes that a row's answers say; 0 where one of them is no text."""
    chat = chat_of(row)
    if chat is None:
        said = [row[name] for name in RESPONSES if name in row][:1]
    else:
        messages, first = chat
        said = [message.get("content") for message in messages[first:] if message["role"] == "assistant"]
    return sum(len(text.encode()) for text in said) if all(isinstance(text, str) for text in said) else 0
