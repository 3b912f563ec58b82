"""Rows in, token blocks out: text, prompt and response, chat; packing; batches.

A row's labels are its tokens, -100 where a token does not count. Text counts whole; of prompts and chats only what the model is to answer.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from torch import Tensor

from cbd_hub.distill.data import is_conversation
from cbd_hub.distill.rows import RESPONSES, chat_of, check_row, first_row, template_options
from cbd_hub.errors import ArgumentError, DataError, one_line
from cbd_hub.evaluation import IGNORED, Documents, joined_blocks, no_answer
from cbd_hub.losses.alignment import end_of, prefix_of


logger = logging.getLogger(__name__)

CACHED = ("top_ids", "top_log_probs", "tail_ids", "tail_log_probs")  # of a teacher cache


@dataclass(frozen=True)
class Tokens:
    """One row's tokens and labels."""

    ids: list[int]
    labels: list[int]


def tokenise(row: Mapping[str, Any], tokenizer: Any) -> Tokens:
    """A row's tokens: of a ``text``, of a ``prompt`` and its ``completion`` (or ``response``), or of chat ``messages``.

    A text and a response end with the end-of-text token. Prompt and response are tokenised apart, so that where one ends is exact. Of a chat, the
    assistant's turns count, each from the generation prompt to its end; of a prompt and completion that are chats, those of the completion. A chat's
    ``tools`` and ``chat_template_kwargs`` go to the chat template.

    Raises:
        DataError: If the row has none of these columns, or a chat comes without a usable chat template.
    """
    check_row(row)
    end = end_of(tokenizer)
    chat = chat_of(row)
    if chat is not None:
        return _chat(*chat, tokenizer, template_options(row))
    response = next((name for name in RESPONSES if name in row), None)
    if "prompt" in row and response is not None:
        prompt = list(tokenizer(row["prompt"], add_special_tokens=True)["input_ids"])
        if prompt and prompt[-1:] == end:
            prompt.pop()  # a tokenizer that ends every text would end the prompt too
        answer = [*tokenizer(row[response], add_special_tokens=False)["input_ids"], *end]
        return Tokens([*prompt, *answer], [IGNORED] * len(prompt) + answer)
    if "text" not in row:
        raise DataError(f"a row has the columns {', '.join(row)}; give the prompt its completion")
    ids = [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], *end]
    return Tokens(ids, list(ids))


def tokenised(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> Iterator[Tokens]:
    """The tokens of each row.

    Raises:
        DataError: If a row cannot be read; the message has its number, from 0.
    """
    for number, row in enumerate(rows):
        try:
            tokens = tokenise(row, tokenizer)
        except DataError as error:
            raise DataError(f"row {number:,}: {error}") from error
        yield tokens


def row_documents(rows: Sequence[Mapping[str, Any]], tokenizer: Any, block_size: int, max_tokens: int) -> Documents:
    """Rows one by one, as `cbd eval` reads them: texts, or of prompts and chats the answers alone.

    Raises:
        DataError: If a row cannot be read, or no token counts.
    """
    if is_conversation(rows[0]):
        return Documents.answered(((row.ids, row.labels) for row in tokenised(rows, tokenizer)), tokenizer, block_size, max_tokens)
    return Documents.read([row["text"] for row in rows], tokenizer, block_size, max_tokens)


def _chat(messages: Sequence[Mapping[str, Any]], first: int, tokenizer: Any, options: Mapping[str, Any]) -> Tokens:
    """Tokens of a chat; the assistant's turns, from the ``first`` message on, are what each adds to the chat before it with its generation prompt."""
    if not tokenizer.chat_template:
        raise DataError("the data has chat messages but the tokenizer has no chat template; set tokenizer.chat_template, or give prompt and completion")

    def rendered(count: int, prompt: bool) -> list[int]:
        try:
            return list(tokenizer.apply_chat_template(list(messages[:count]), **{**options, "add_generation_prompt": prompt, "tokenize": True, "return_dict": False}))
        except (TemplateError, ValueError, TypeError) as error:
            raise DataError(f"the chat template refuses the messages ({one_line(error)}); give them as it wants them, or prompt and completion") from error

    whole = rendered(len(messages), False)
    labels = [IGNORED] * len(whole)
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first:
            continue
        before, after = rendered(index, True), rendered(index + 1, False)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise DataError("the chat template rewrites earlier turns, so that an answer's tokens cannot be told apart; give prompt and completion")
        labels[len(before) : len(after)] = whole[len(before) : len(after)]
    return Tokens(whole, labels)


def text_blocks(rows: Iterable[Tokens], block_size: int, prefix: Sequence[int] = ()) -> Iterator[dict[str, list[int]]]:
    """Rows joined end to end and cut into full blocks; attention crosses their borders. The last, unfilled block is left out.

    Args:
        rows: The rows.
        block_size: Tokens in a block.
        prefix: Tokens that each block begins with and that do not count. A block has labels where there are several: the first token of a block never counts.

    Raises:
        DataError: If the prefix leaves no room in a block.
    """
    for ids in joined_blocks((row.ids for row in rows), block_size, prefix):
        yield {"input_ids": ids, **({"labels": [IGNORED] * len(prefix) + ids[len(prefix) :]} if len(prefix) > 1 else {})}


def segment_blocks(rows: Iterable[Tokens], block_size: int) -> Iterator[dict[str, list[int]]]:
    """Whole rows packed into blocks with exact borders, in order.

    Positions start anew in each row, which is how the rows of a block are told apart, so that attention never crosses a border; a
    row's first token counts for nothing, as nothing in the row comes before it. A row longer than a block is cut short; one that has no answer
    in that is left out.
    """
    block: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    short = unanswered = 0
    for row in rows:
        ids, labels = row.ids[:block_size], row.labels[:block_size]
        short += len(row.ids) > block_size
        if all(label == IGNORED for label in labels[1:]):
            unanswered += 1
            continue  # nothing to learn
        if len(block["input_ids"]) + len(ids) > block_size:
            yield block
            block = {"input_ids": [], "labels": [], "position_ids": []}
        block["input_ids"] += ids
        block["labels"] += [IGNORED, *labels[1:]]
        block["position_ids"] += range(len(ids))
    say_short(short, unanswered, block_size)
    if block["input_ids"]:
        yield block


def say_short(short: int, unanswered: int, block_size: int) -> None:
    """Say how many rows were cut short, and how many have nothing that is to be learned."""
    if short:
        logger.info("%d rows were longer than block_size=%d and were cut short", short, block_size)
    if unanswered:
        logger.warning(
            '%d rows have no answer within block_size=%d and were left out; give a larger block_size or shorter prompts, and chats a turn of the role "assistant"', unanswered, block_size
        )


def no_block(block_size: int, *, joined: bool) -> DataError:
    """What to say of rows of which no block came."""
    if joined:
        return DataError(f"the training text does not fill one block of {block_size:,} tokens; give more text or a smaller block_size")
    return no_answer(block_size)


def pack(rows: Iterable[Mapping[str, Any]], tokenizer: Any, block_size: int, prefix: Sequence[int] | None = None) -> Iterator[dict[str, list[int]]]:
    """Blocks of rows: plain text joined end to end, each block after the prefix; anything with a prompt packed with exact borders.

    Args:
        rows: The rows.
        tokenizer: A transformers tokenizer.
        block_size: Tokens in a block.
        prefix: What each block of plain text begins with; by default what the tokenizer puts before a text.
    """
    first, rows = _peek(iter(rows))
    if first is None or not is_joined(first):
        return segment_blocks(tokenised(rows, tokenizer), block_size)
    return text_blocks(_texts_alone(rows, tokenizer), block_size, prefix_of(tokenizer) if prefix is None else prefix)


def is_joined(row: Mapping[str, Any]) -> bool:
    """Whether a row is plain text, which is joined end to end."""
    return "text" in row and "messages" not in row and "prompt" not in row


def _texts_alone(rows: Iterator[Mapping[str, Any]], tokenizer: Any) -> Iterator[Tokens]:
    """The tokens of rows of plain text."""
    rows, again = itertools.tee(rows)
    for number, (row, tokens) in enumerate(zip(again, tokenised(rows, tokenizer))):
        if not is_joined(row):
            raise DataError(f"row {number:,} has a prompt, whose tokens would be learned with the plain text of the rows before it; give rows of one kind")
        yield tokens


def _peek(rows: Iterator[Mapping[str, Any]]) -> tuple[Mapping[str, Any] | None, Iterator[Mapping[str, Any]]]:
    first = next(rows, None)
    return first, rows if first is None else itertools.chain([first], rows)


def packed_dataset(dataset: Any, tokenizer: Any, block_size: int) -> Any:
    """A data set of blocks, those of plain text after what the tokenizer puts before a text; a stream stays a stream, whose order is the same each time it is read.

    Args:
        dataset: A list of rows, a ``datasets.Dataset`` or an ``IterableDataset``.
        tokenizer: A transformers tokenizer.
        block_size: Tokens in a block.

    Raises:
        DataError: If the rows have no known columns or do not fill one block.
    """
    if isinstance(dataset, IterableDataset):
        return IterableDataset.from_generator(lambda: pack(dataset, tokenizer, block_size))
    blocks = list(pack(dataset, tokenizer, block_size))
    if not blocks:
        raise no_block(block_size, joined=is_joined(next(iter(dataset), {"text": ""})))
    return Dataset.from_list(blocks)


def next_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """The token that each position of a batch predicts, -100 where none counts: labels moved one to the left, shape (B, T).

    A document's first token, at position 0, is not predicted: what stands before it is another document.

    Example:
        >>> next_tokens({"labels": torch.tensor([[-100, 7, 8]])}).tolist()
        [[7, 8, -100]]
        >>> next_tokens({"labels": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}).tolist()
        [[6, -100, 8, -100]]
    """
    labels = batch["labels"]
    if "position_ids" in batch:
        labels = labels.masked_fill(batch["position_ids"] == 0, IGNORED)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def collate(rows: list[dict[str, Any]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """A batch: ids, labels and what else the rows have, padded to the longest row.

    Labels are the ids where a row has none and -100 in the padding, be it made here or given by the row's ``attention_mask``. Rows with positions are told
    apart by them and need no mask: what it says is padding is left out, and the padding made here is a row of its own.
    """
    rows = [_unpadded(row) if "position_ids" in row else row for row in rows]
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        return [*values, *[fill] * (longest - len(values))]

    batch = {
        "input_ids": torch.tensor([padded(row["input_ids"], pad_token_id) for row in rows]),
        "labels": torch.tensor([padded(row["labels"] if "labels" in row else _labels(row), IGNORED) for row in rows]),
    }
    if any("position_ids" in row for row in rows):
        batch["position_ids"] = torch.tensor([
            [*row["position_ids"], *range(longest - len(row["input_ids"]))] for row in rows
        ])
    elif any("attention_mask" in row for row in rows) or any(len(row["input_ids"]) < longest for row in rows):
        batch["attention_mask"] = torch.tensor([padded(_mask(row), 0) for row in rows])
    if "top_ids" in rows[0]:
        for name in (name for name in CACHED if name in rows[0]):  # shape (length, k), or of the draws (length, s)
            batch[name] = torch.stack([F.pad(torch.as_tensor(row[name]), (0, 0, 0, longest - len(row[name]))) for row in rows])
    return batch


def check_collator(batched: Callable[[list[Any]], Mapping[str, Any]], dataset: Any) -> None:
    """Refuse a caller's collator that cannot batch rows with positions, or loses them: attention would cross the borders of what is packed.

    Args:
        batched: The collator.
        dataset: Rows; nothing is known of a stream's.

    Raises:
        ArgumentError: If it does.
    """
    first = first_row(dataset) if hasattr(type(dataset), "__len__") else None
    if first is None or first.get("position_ids") is None:
        return
    positions = [int(place) for place in first["position_ids"]]
    try:
        found = batched([dict(first), {name: values[:-1] for name, values in first.items()}]).get("position_ids")
    except Exception as error:  # collators raise many kinds
        raise ArgumentError(f"data_collator cannot batch rows with position_ids ({one_line(error)}), as prompts and chats are packed; leave it out") from error
    if found is None or found.flatten()[: len(positions)].tolist() != positions:
        raise ArgumentError("data_collator leaves out the position_ids of the rows, which say where packed documents begin; leave it out, or give rows of one document each")


def _unpadded(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with positions without the tokens that its mask says are padding."""
    there = [place for place, kept in enumerate(_mask(row)) if kept] or [0]
    if len(there) == len(row["input_ids"]):
        return dict(row)
    found = {**row, "labels": row["labels"] if "labels" in row else _labels(row)}
    return {name: torch.as_tensor(values)[there].tolist() for name, values in found.items() if name in ("input_ids", "labels", "position_ids", *CACHED)}


def _labels(row: Mapping[str, Any]) -> list[int]:
    """The ids of a row, -100 where its mask says padding and at the token behind it: padding is not predicted and predicts nothing."""
    mask = _mask(row)
    return [int(token) if there and before else IGNORED for token, there, before in zip(row["input_ids"], mask, [1, *mask[:-1]])]


def _mask(row: Mapping[str, Any]) -> Sequence[int]:
    mask: Sequence[int] | None = row.get("attention_mask")
    return [1] * len(row["input_ids"]) if mask is None else mask
