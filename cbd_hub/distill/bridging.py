"""A teacher of another vocabulary: the terms of the loss that are taken on spans of text which both read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cbd_hub.distill.bridge_rows import BridgeRows
from cbd_hub.distill.config import ChainDistillerConfig
from cbd_hub.errors import VocabularyMismatchError
from cbd_hub.interpolation.live import Head, Output
from cbd_hub.losses.alignment import rowless_tokens, rows_needed
from cbd_hub.losses.bridge import shared_loss, shared_tokens, shared_top_loss, span_loss
from cbd_hub.losses.log_probs import chosen_log_probs, token_losses


logger = logging.getLogger(__name__)


class Bridge:
    """What a trainer needs of a teacher with a tokenizer of its own: rows that both read, and the loss on them.

    Args:
        args: The trainer's arguments.
        student: The student's tokenizer.
        teacher: The teacher's tokenizer.

    Attributes:
        rows: Reads rows with both tokenizers.

    Raises:
        ArgumentError: If a tokenizer is missing, has no byte offsets or loses what a text says.
        VocabularyMismatchError: If no token is shared where that is needed.
    """

    def __init__(self, args: ChainDistillerConfig, student: Any, teacher: Any) -> None:
        self.args, self.rows = args, BridgeRows(args, student, teacher)
        self.kinds = set(str(args.bridge).split("+"))
        self._shared_tokens: Tensor | None = None
        if "vocab" in self.kinds:
            self._shared_tokens = shared_tokens(student, teacher)
            logger.info("%d of the student's %d tokens are the teacher's too", len(self._shared_tokens), len(student))

    @property
    def shared(self) -> Tensor | None:
        """Pairs (student's, teacher's) of tokens of the same bytes that both models have rows for, shape (N, 2); None where the loss reads none."""
        found = self._shared_tokens
        for side, rowless in enumerate(self.rows.rowless):
            if found is not None and rowless:
                found = found[~torch.isin(found[:, side], torch.tensor(sorted(rowless)))]
        return found

    def loss(self, output: Output, target: Output | None, inputs: Mapping[str, Tensor], num_items: Tensor | int) -> Tensor:
        """The bridge's own terms on a batch, in nats, each a sum over spans divided by ``num_items``; without the teacher's output those of a teacher cache."""
        student, teacher = (_Spans.of(inputs[f"{name}spans"], inputs[f"{name}input_ids"]) for name in ("", "teacher_"))
        total = 0.0 * output.hidden.sum()
        remainder = torch.ones(student.count, dtype=torch.bool, device=output.hidden.device)
        ours, shared = output.head, self.shared
        if shared is not None and student.count:
            total = total + self._shared(shared, student, teacher, output, target, inputs, num_items)
            partner = torch.full((len(ours.weight),), -1, device=remainder.device)
            partner[shared[:, 0]] = shared[:, 1].to(remainder.device)
            remainder = ~(student.single & teacher.single & (partner[student.tokens[student.first]] == teacher.tokens[teacher.first]))
        if "span" in self.kinds and bool(remainder.any()):
            (our_tokens, our_spans), (their_tokens, their_spans) = student.of_those(remainder), teacher.of_those(remainder)
            log_probs = chosen_log_probs(
                student.before(output.hidden, our_tokens), ours.weight, student.tokens[our_tokens], **ours.options(),
            )
            if target is None:
                known = inputs["teacher_log_probs"].flatten()[teacher.places[their_tokens]]
            else:
                known = _known(teacher.before(target.hidden, their_tokens), target.head, teacher.tokens[their_tokens])
            total = total + span_loss(log_probs, our_spans, known, their_spans, temperature=self.args.span_temperature, num_items=num_items)
        return total

    def _shared(
        self, shared: Tensor, student: _Spans, teacher: _Spans, output: Output, target: Output | None, inputs: Mapping[str, Tensor], num_items: Tensor | int
    ) -> Tensor:
        """The divergence on shared tokens at the beginning of every span."""
        ours, hidden = output.head, student.before(output.hidden, student.first)
        options = {"num_items": num_items, **ours.options("student_")}
        if target is None:
            ids, log_probs = (teacher.before(inputs[name], teacher.first) for name in ("teacher_top_ids", "teacher_top_log_probs"))
            partner = torch.full((int(shared[:, 1].max()) + 1,), -1, device=ids.device)
            partner[shared[:, 1]] = shared[:, 0].to(ids.device)
            return shared_top_loss(hidden, ours.weight, partner[ids.clamp(max=len(partner) - 1)].masked_fill(ids >= len(partner), -1), log_probs, **options)
        theirs = target.head
        return shared_loss(
            hidden, ours.weight, teacher.before(target.hidden, teacher.first), theirs.weight, shared, **theirs.options("teacher_"), **options,
        )

    def at_borders(self, output: Output, target: Output, inputs: Mapping[str, Tensor]) -> tuple[Output, Output, Tensor]:
        """States of both models at the last token of each span, where both have read the same text, and a mask that keeps them all."""
        found = []
        for side, name in ((output, ""), (target, "teacher_")):
            spans = _Spans.of(inputs[f"{name}spans"], inputs[f"{name}input_ids"])
            assert side.states is not None
            found.append(Output(side.hidden, side.head, tuple(state.flatten(0, 1)[spans.places[spans.last]][None] for state in side.states)))
        assert found[0].states is not None
        return found[0], found[1], torch.ones(found[0].states[0].shape[:2], dtype=torch.bool, device=output.hidden.device)


@dataclass(frozen=True)
class _Spans:
    """Tokens of a batch that are in spans, row after row.

    Attributes:
        places: Their places in the flattened batch, shape (N,).
        tokens: Their ids.
        numbers: The span of each, from 0 to ``count`` - 1 over the whole batch.
        count: How many spans there are.
        first: The first token of each span, an index into these.
        last: Its last one.
    """

    places: Tensor
    tokens: Tensor
    numbers: Tensor
    count: int
    first: Tensor
    last: Tensor

    @classmethod
    def of(cls, spans: Tensor, ids: Tensor) -> _Spans:
        row, column = (spans >= 0).nonzero(as_tuple=True)
        _, numbers, sizes = torch.unique_consecutive(torch.stack([row, spans[row, column]]), dim=1, return_inverse=True, return_counts=True)
        last = sizes.cumsum(0) - 1
        return cls(row * spans.shape[1] + column, ids[row, column], numbers, len(sizes), last - sizes + 1, last)

    @property
    def single(self) -> Tensor:
        """Which spans are one token."""
        return self.first == self.last

    def of_those(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the chosen spans, and their spans' numbers."""
        tokens = chosen[self.numbers].nonzero().squeeze(1)
        return tokens, self.numbers[tokens]

    def before(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Hidden states, or what else there is at each position, that predict some of these tokens, shape (n, H)."""
        return hidden.flatten(0, 1)[self.places[tokens] - 1]


def _known(hidden: Tensor, head: Head, tokens: Tensor) -> Tensor:
    """The teacher's log-probabilities of tokens, in the dtype of autocast."""
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return -token_losses(hidden.to(compute), head.weight, tokens, **head.options())


def check_heads(rows: BridgeRows, student: Any, teacher: Any = None) -> None:
    """Refuse tokenizers that are not those of the models, as `check_vocabularies` does."""
    check_vocabularies(rows, student.config.vocab_size, None if teacher is None else teacher.config.vocab_size)


def check_vocabularies(rows: BridgeRows, student: int, teacher: int | None = None) -> None:
    """Refuse tokenizers that are not those of models with so many rows.

    Added tokens may lie beyond the rows, as in gemma 3's text models; from then on ``rows`` refuses texts that hold one.

    Raises:
        VocabularyMismatchError: Naming the model whose head has fewer rows than its tokenizer has tokens.
    """
    found = []
    for name, tokenizer, size in (("student", rows.student, student), ("teacher", rows.teacher, teacher)):
        found.append(frozenset() if size is None else rowless_tokens(tokenizer, size))
        if size is not None and (needed := rows_needed(tokenizer, found[-1])) > size:
            raise VocabularyMismatchError(f"the {name}'s tokenizer has the token {needed - 1:,} and its checkpoint a vocabulary of {size:,}; give the {name} its own tokenizer")
    rows.rowless = (found[0], found[1])
