"""Rows read by the tokenizers of both models, with the spans of text that both have borders at."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from torch import Tensor

from cbd_hub.distill.answers import answered_rows
from cbd_hub.distill.config import ChainDistillerConfig
from cbd_hub.distill.packing import collate, no_block, packed_dataset, say_short, tokenise
from cbd_hub.distill.rollouts import positions_of, prompts_of
from cbd_hub.distill.rows import RESPONSES, chat_of, check_row, first_row, template_options, with_answer
from cbd_hub.errors import ArgumentError, DataError
from cbd_hub.evaluation import IGNORED
from cbd_hub.losses.alignment import byte_ends, check_faithful, check_rows, common_spans, end_of, prefix_of
from cbd_hub.shapes import check_positions
from cbd_hub.texts import utf8


logger = logging.getLogger(__name__)

CACHED = ("teacher_log_probs", "teacher_top_ids", "teacher_top_log_probs")
COLUMNS = ("spans", "teacher_input_ids", "teacher_attention_mask", "teacher_spans", *CACHED)
_ROOM = 4  # tokens of the teacher in a row, for each of the student's


@dataclass
class Side:
    """One tokenizer's view of a row: tokens, the span that each is in (-1 for none), and labels."""

    ids: list[int]
    spans: list[int]
    labels: list[int]

    def add(self, ids: Sequence[int], span: int | Sequence[int], *, counts: bool = True) -> None:
        """Tokens of one span, or with a span each."""
        self.ids += ids
        self.spans += [span] * len(ids) if isinstance(span, int) else span
        self.labels += ids if counts else [IGNORED] * len(ids)

    def cut(self, room: int) -> None:
        """Cut to so many tokens; a span that loses any counts no more."""
        lost = set(self.spans[room:])
        del self.ids[room:], self.labels[room:]
        self.spans = [-1 if span in lost else span for span in self.spans[:room]]


class BridgeRows:
    """Reads rows for a student and a teacher with tokenizers of their own.

    Args:
        args: The trainer's arguments.
        student: The student's tokenizer.
        teacher: The teacher's tokenizer.

    Raises:
        ArgumentError: If a tokenizer is missing, has no byte offsets or loses what a text says.
    """

    def __init__(self, args: ChainDistillerConfig, student: Any, teacher: Any) -> None:
        for name, tokenizer in (("processing_class", student), ("teacher_processing_class", teacher)):
            if tokenizer is None:
                raise ArgumentError(f"bridge={args.bridge} reads texts with the tokenizers of both models; pass {name}=")
        if args.bridge != "text":
            check_faithful(student)
            check_faithful(teacher)
        self.args, self.student, self.teacher = args, student, teacher
        self._asked: list[Mapping[str, Any]] = []
        self.rowless: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())  # added tokens of both for which their models have no row

    def _check_rows(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        """Refuse tokens for which their model has no row.

        Raises:
            DataError: If there is one.
        """
        for name, ids, rowless, tokenizer in zip(("student", "teacher"), (student, teacher), self.rowless, (self.student, self.teacher)):
            check_rows(ids, rowless, tokenizer, f"the {name}'s tokenizer")

    def with_tokens(self, dataset: Any, model: Any, teacher: Any) -> Any:
        """A data set, or several by name, read by both tokenizers; None stays None, and rows that have been read stay as they are.

        Raises:
            ArgumentError: If a block is longer than the student's positions.
            DataError: If a row cannot be read, or has tokens instead of text.
        """
        if isinstance(dataset, Mapping):
            return {name: self.with_tokens(rows, model, teacher) for name, rows in dataset.items()}
        first = first_row(dataset)
        if first is None or "teacher_input_ids" in first:
            return dataset
        if "input_ids" in first:
            raise DataError(f"bridge={self.args.bridge} reads texts with both tokenizers, and these rows have input_ids; give text, prompt and completion, or messages")
        check_positions(self.args.block_size, model.config, f"block_size={self.args.block_size}")
        most = getattr(teacher.config, "max_position_embeddings", None) or getattr(teacher.config, "n_positions", None) or 2**30
        room = min(_ROOM * self.args.block_size, int(most))
        if isinstance(dataset, IterableDataset):
            return IterableDataset.from_generator(lambda: self.blocks(dataset, room))
        blocks = list(self.blocks(dataset, room))
        if not blocks:
            raise no_block(self.args.block_size, joined=is_plain(dataset))
        return Dataset.from_list(blocks)

    def prompts(self, dataset: Any, model: Any) -> Any:
        """Rows as the teacher reads them, for its answers to their prompts: prompts and chats each for itself, plain text in blocks.

        Raises:
            DataError: If a row cannot be read, or has tokens instead of text.
        """
        if not hasattr(type(dataset), "__len__"):
            raise DataError("bridge=text needs its rows more than once, and a stream has no length; give a data set that is there as a whole")
        rows = list(dataset)
        if rows and "input_ids" in rows[0]:
            raise DataError("bridge=text asks the teacher with its own tokenizer, and these rows have input_ids; give text, prompt and completion, or messages")
        if is_plain(rows):
            check_positions(self.args.block_size, model.config, f"block_size={self.args.block_size}")
            read = [(row, {"text": ""}) for row in packed_dataset(rows, self.teacher, self.args.block_size)]
        else:
            read = []
            for number, row in enumerate(rows):
                try:
                    tokens = tokenise(with_answer(row), self.teacher)
                except DataError as error:
                    raise DataError(f"row {number:,}: the teacher's tokenizer: {error}") from error
                read.append(({"input_ids": tokens.ids, "labels": tokens.labels}, row))
        for tokens, _ in read:
            self._check_rows((), tokens["input_ids"])
        args, positions = self.args, positions_of(model)
        asked = [(prompt, tokens, row) for tokens, row in read for prompt in prompts_of(tokens, args.max_new_tokens, args.prompt_share)]
        fit = [entry for entry in asked if positions is None or len(entry[0].ids) < positions]
        if len(fit) < len(asked):
            logger.warning("%d of %d prompts fill the teacher's %d positions and are left out", len(asked) - len(fit), len(asked), positions)
        self._asked = [row for *_, row in fit]
        return Dataset.from_list([tokens for _, tokens, _ in fit])

    def answered(self, answers: Any) -> list[dict[str, Any]]:
        """The teacher's answers to `prompts` as rows of text.

        Raises:
            DataError: If every answer is empty.
        """
        return answered_rows(self._asked, answers["completion"], answers["prompt"])

    def blocks(self, rows: Any, room: int) -> Iterator[dict[str, list[int]]]:
        """Rows of both tokenizers: plain text joined end to end and cut where both have a border, of anything with a prompt one by one.

        Args:
            rows: With ``text``, ``prompt`` and ``completion``, or ``messages``.
            room: Most tokens of the teacher in a row.
        """
        yield from self._joined(self.pieces(rows), room) if is_plain(rows) else self._single(rows, room)

    def sides(self, rows: Any, room: int, teacher_room: int) -> Iterator[tuple[Side, Side]]:
        """Prompts with completions and chats, one by one, each side cut to its room.

        Raises:
            DataError: If a row cannot be read; the message has its number, from 0.
        """
        short = unanswered = 0
        for number, row in enumerate(rows):
            try:
                check_row(row)
                pair = self._answered(row)
                self._check_rows(pair[0].ids, pair[1].ids)
            except DataError as error:
                raise DataError(f"row {number:,}: {error}") from error
            long = False
            for side, limit in zip(pair, (room, teacher_room)):
                long |= len(side.ids) > limit
                side.cut(limit)
            short += long
            unanswered += all(label == IGNORED for label in pair[0].labels[1:])
            yield pair
        say_short(short, unanswered, self.args.block_size)

    def pieces(self, rows: Any) -> Iterator[tuple[list[int], list[int], bool]]:
        """Spans of texts, one after the other: tokens of both, and whether they stand for the same. Each text ends with the end-of-text tokens."""
        ends = [end_of(tokenizer) for tokenizer in (self.student, self.teacher)]
        for number, row in enumerate(rows):
            text = _text_of(row, number)
            (ours, our_ends), (theirs, their_ends) = byte_ends(text, self.student), byte_ends(text, self.teacher)
            try:
                self._check_rows(ours, theirs)
            except DataError as error:
                raise DataError(f"row {number:,}: {error}") from error
            _, our_stops, their_stops = common_spans(our_ends, their_ends, len(utf8(text)))
            low, start = 0, 0
            for stop, their_stop in zip(our_stops.tolist(), their_stops.tolist()):
                yield ours[low:stop], theirs[start:their_stop], low < stop and start < their_stop
                low, start = stop, their_stop
            yield ends[0], ends[1], all(ends)

    def _joined(self, pieces: Iterator[tuple[list[int], list[int], bool]], room: int) -> Iterator[dict[str, list[int]]]:
        size, long = self.args.block_size, 0
        before = prefix_of(self.student), prefix_of(self.teacher)
        row = self._begun(before)
        for ours, theirs, same in pieces:
            if len(row[0].ids) + len(ours) > size or len(row[1].ids) + len(theirs) > room:
                if len(row[0].ids) > len(before[0]):
                    yield row_of(*row)
                row = self._begun(before)
                if len(before[0]) + len(ours) > size or len(before[1]) + len(theirs) > room:
                    long += 1
                    continue
            span = len(row[0].ids) if same else -1
            row[0].add(ours, span)
            row[1].add(theirs, span)
        if long:
            logger.info("%d spans were longer than a block and were left out", long)

    @staticmethod
    def _begun(before: tuple[list[int], list[int]]) -> tuple[Side, Side]:
        sides = Side([], [], []), Side([], [], [])
        for side, ids in zip(sides, before):
            side.add(ids, -1, counts=False)
        return sides

    def _single(self, rows: Any, room: int) -> Iterator[dict[str, list[int]]]:
        for pair in self.sides(rows, self.args.block_size, room):
            made = row_of(*pair)
            if any(label != IGNORED for label in made["labels"][1:]):
                yield made

    def _answered(self, row: Mapping[str, Any]) -> tuple[Side, Side]:
        """A prompt with its completion, or a chat, whose answers are the same text for both."""
        chat = chat_of(row)
        if chat is not None:
            return self._chat(*chat, row)
        response = next((name for name in RESPONSES if name in row), None)
        if response is None:
            raise DataError(f"a row has the columns {', '.join(row)}; give the prompt its completion")
        text, sides = row[response], (Side([], [], []), Side([], [], []))
        found = [byte_ends(text, tokenizer) for tokenizer in (self.student, self.teacher)]
        stops = common_spans(found[0][1], found[1][1], len(utf8(text)))[1:]
        ends = [end_of(tokenizer) for tokenizer in (self.student, self.teacher)]
        for side, tokenizer, (ids, _), counts, end in zip(sides, (self.student, self.teacher), found, stops, ends):
            whole = tokenise({"prompt": row["prompt"], "completion": ""}, tokenizer).ids
            side.add(whole[: len(whole) - len(end)], -1, counts=False)
            side.add(ids, np.repeat(np.arange(len(counts)), np.diff(counts, prepend=0)).tolist())
            side.add(end, len(counts) if all(ends) else -1)
        return sides

    def _chat(self, messages: Sequence[Mapping[str, Any]], first: int, row: Mapping[str, Any]) -> tuple[Side, Side]:
        """Both templates' renderings; spans are of what the assistant says from the ``first`` message on, and of the special token that ends a turn."""
        sides, ends, renderings = [], [], []
        for who, tokenizer in (("student", self.student), ("teacher", self.teacher)):
            try:
                tokens = tokenise(row, tokenizer)
            except DataError as error:
                raise DataError(f"the {who}'s tokenizer: {error}") from error
            text = tokenizer.apply_chat_template(list(messages), **{**template_options(row), "tokenize": False})
            ids, border = byte_ends(text, tokenizer)
            if ids != tokens.ids:
                raise DataError(f"the {who}'s tokenizer reads its own chat template's text otherwise than the chat; give prompt and completion")
            sides.append(Side(ids, [-1] * len(ids), tokens.labels))
            ends.append(border)
            renderings.append(utf8(text))
        span = 0
        turns = [_turns(side.labels, border) for side, border in zip(sides, ends)]
        answers = [message.get("content") for message in messages[first:] if message["role"] == "assistant"]
        if any(len(found) != len(answers) for found in turns):
            return sides[0], sides[1]  # a template that leaves turns out or joins them
        for answer, *places in zip(answers, *turns):
            said = utf8(answer.strip()) if isinstance(answer, str) else b""
            starts = [text.find(said, *place) for text, place in zip(renderings, places)]
            if said and min(starts) >= 0:  # a template that rewrites it has no text in common with the other
                span = self._turn(sides, [border - start for border, start in zip(ends, starts)], len(said), span)
        return sides[0], sides[1]

    def _turn(self, sides: Sequence[Side], ends: Sequence[np.ndarray], size: int, span: int) -> int:
        """Number the spans of one turn, whose text begins at byte 0 of ``ends``; the next free number comes back."""
        common = np.intersect1d(ends[0], ends[1])
        common = common[(common >= 0) & (common <= size)]
        for low, high in zip(common, common[1:]):
            for side, border in zip(sides, ends):
                start, stop = (int(np.searchsorted(border, place, side="right")) for place in (low, high))
                side.spans[start:stop] = [span] * (stop - start)
            span += 1
        if len(common) and common[-1] == size:
            places = [int(np.searchsorted(border, size, side="right")) for border in ends]
            if all(place < len(side.ids) and side.ids[place] in tokenizer.all_special_ids for place, side, tokenizer in zip(places, sides, (self.student, self.teacher))):
                for place, side in zip(places, sides):
                    side.spans[place] = span
                span += 1
        return span

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of rows of both tokenizers; rows of the student alone are batched as ever."""
        batch = collate(rows, self.student.pad_token_id or 0)
        if "teacher_input_ids" in rows[0]:
            other = collate([{"input_ids": row["teacher_input_ids"]} for row in rows], self.teacher.pad_token_id or 0)
            batch.update({f"teacher_{name}": other[name] for name in ("input_ids", "attention_mask") if name in other})
            for name, ids in (("spans", "input_ids"), ("teacher_spans", "teacher_input_ids")):
                length = batch[ids].shape[1]
                batch[name] = torch.tensor([[*row[name], *[-1] * (length - len(row[name]))] for row in rows])
            length = batch["teacher_input_ids"].shape[1]
            for name in (name for name in CACHED if name in rows[0]):
                values = [torch.as_tensor(row[name]) for row in rows]
                batch[name] = torch.stack([F.pad(value, (0, 0) * (value.dim() - 1) + (0, length - len(value))) for value in values])
        return batch


def _turns(labels: Sequence[int], ends: np.ndarray) -> list[tuple[int, int]]:
    """First byte and the byte after the last of each stretch of tokens that count; ``ends`` are the tokens' last bytes."""
    counted = np.concatenate([[False], np.array(labels) != IGNORED, [False]])
    borders = np.append(0, ends)  # of token n from n to n + 1
    changes = np.flatnonzero(counted[1:] != counted[:-1])
    return [(int(borders[start]), int(borders[stop])) for start, stop in changes.reshape(-1, 2)]


def is_plain(rows: Any) -> bool:
    """Whether rows are texts, by the first one."""
    return not {"messages", "prompt"} & set(next(iter(rows), {}))


def _text_of(row: Mapping[str, Any], number: int) -> str:
    check_row(row, f"row {number:,}")
    if "text" not in row:
        raise DataError(f"row {number:,}: the first row is text and this one has the columns {', '.join(row)}; give rows of one kind")
    return str(row["text"])


def row_of(student: Side, teacher: Side) -> dict[str, list[int]]:
    """A row of both sides; a span that one side has no prediction for, or lost to the cut, counts for neither."""
    held = set(student.spans[1:]) & set(teacher.spans[1:]) - {student.spans[0], teacher.spans[0]}
    return {
        "input_ids": student.ids, "labels": student.labels, "spans": [span if span in held else -1 for span in student.spans],
        "teacher_input_ids": teacher.ids, "teacher_spans": [span if span in held else -1 for span in teacher.spans],
    }
