"""Multiple-choice questions, and how often a model's likeliest choice is the right one: the log-likelihood protocol of lm-evaluation-harness."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cbd_hub.errors import DataError
from cbd_hub.evaluation import IGNORED, Documents, batch_losses
from cbd_hub.interpolation.live import Runner
from cbd_hub.texts import json_rows


_BATCH_ROWS = 16


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: a context, the ways it may go on, and which is right.

    Attributes:
        query: The context; or one for each choice, where the choices differ in it and the texts after it are alike, as in WinoGrande.
        choices: What may follow, with the space that divides it from the context.
        answer: Index of the right one, from 0.
    """

    query: str | tuple[str, ...]
    choices: tuple[str, ...]
    answer: int

    @property
    def contexts(self) -> tuple[str, ...]:
        """The context of each choice."""
        return (self.query,) * len(self.choices) if isinstance(self.query, str) else self.query

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> list[Question]:
        """Questions of a .jsonl file whose rows hold ``query``, ``choices`` and ``answer`` (the right one's index from 0).

        Raises:
            DataError: If the file cannot be read, or a row is no question; the message names the line.
        """
        found = []
        for number, row in json_rows(os.fsdecode(path)):
            try:
                query, choices, answer = row["query"], row["choices"], row["answer"]
                if not isinstance(choices, list):
                    raise TypeError(f"choices are {choices!r}, which is no list")
                question = cls(tuple(map(_text, query)) if isinstance(query, list) else _text(query), tuple(map(_text, choices)), _index(answer))
                if len(question.choices) < 2 or not 0 <= question.answer < len(choices) or not all(question.choices):
                    raise ValueError("needs two choices or more, none empty, and the index of one as answer")
                if len(question.contexts) != len(choices):
                    raise ValueError(f"has {len(question.contexts)} queries for {len(choices)} choices; give one text, or one for each")
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} line {number} is no question with query, choices and answer ({error})") from error
            found.append(question)
        if not found:
            raise DataError(f"{path} holds no questions; give rows with query, choices and answer")
        return found

    def right(self, nats: Sequence[float]) -> tuple[bool, bool]:
        """Whether the right choice has the least loss, and whether it has it per character.

        Args:
            nats: The loss of each choice, as `choice_nats` gives it.

        Example:
            >>> Question("Is ice cold?", (" no", " yes, it is"), 1).right([3.0, 4.0])
            (False, True)
        """
        # the space before a choice divides it from the context and is not counted, as in lm-evaluation-harness
        per_character = [total / max(1, len(choice.removeprefix(" "))) for total, choice in zip(nats, self.choices)]
        return int(np.argmin(nats)) == self.answer, int(np.argmin(per_character)) == self.answer


def _text(value: Any) -> str:
    """A text, or a number as one.

    Raises:
        TypeError: If it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"{value!r} is no text")
    return str(value)


def _index(value: Any) -> int:
    """A whole number, however it is written.

    Raises:
        TypeError, ValueError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or float(value) != int(float(value)):
        raise TypeError(f"answer is {value!r}, which is no index")
    return int(float(value))


def _row(tokenizer: Any, context: str, choice: str, room: int | None) -> tuple[Tensor, Tensor]:
    """Token ids of a context with its choice, shape (T,), and labels, -100 for the context's.

    White space at the end of the context is tokenised with the choice; what is longer than the model has positions loses its beginning.
    """
    stem = context.rstrip()
    choice = context[len(stem) :] + choice
    ids = tokenizer(stem + choice)["input_ids"]
    start = len(tokenizer(stem)["input_ids"])
    if not start:  # something has to stand before the first token, that it is predicted
        before = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
        ids, start = [*before, *ids], len(before)
    labels = [IGNORED] * min(start, len(ids) - 1)
    labels += ids[len(labels) :]
    cut = 0 if room is None else -room
    return torch.tensor(ids[cut:]), torch.tensor(labels[cut:])


@torch.no_grad()
def choice_nats(runner: Runner, questions: Sequence[Question], tokenizer: Any, *, bf16: bool = True) -> list[list[float]]:
    """Loss of each choice after its context, in nats, summed over the choice's tokens.

    Context and choice are tokenised as one text, and the choice's tokens are those after the context's own.

    Args:
        runner: A model that runs.
        questions: The questions.
        tokenizer: Its tokenizer.
        bf16: Whether products run in bf16 on a device that is quick at it.

    Returns:
        For each question one loss per choice.

    Raises:
        DataError: If a question holds a token for which the model has no row.
    """
    room = getattr(runner.config, "max_position_embeddings", None)
    rows = [_row(tokenizer, context, choice, room) for question in questions for context, choice in zip(question.contexts, question.choices)]
    documents = Documents(tuple(ids for ids, _ in rows), (), tuple(labels for _, labels in rows))
    documents.check(runner.config)
    nats = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    for first in range(0, len(order), _BATCH_ROWS):
        chosen = order[first : first + _BATCH_ROWS]
        for index, (total, _) in zip(chosen, batch_losses(runner, documents, chosen, bf16)):
            nats[index] = total
    found = iter(nats)
    return [[next(found) for _ in question.choices] for question in questions]


def choice_accuracy(runner: Runner, questions: Sequence[Question], tokenizer: Any, *, bf16: bool = True) -> dict[str, float | None]:
    """Share of questions whose right choice is the likeliest continuation of the query.

    The log-likelihood protocol of lm-evaluation-harness (`benchmarks/tasks.py --check` compares them item by item): the largest summed log-probability
    wins; for ``accuracy_norm``, its ``acc_norm``, it is divided by the choice's length in characters first.

    Args:
        runner: A model that runs.
        questions: The questions.
        tokenizer: Its tokenizer.
        bf16: Whether products run in bf16 on a device that is quick at it.

    Returns:
        ``accuracy`` and ``accuracy_norm``, each from 0 to 1, their standard errors over questions, and the number of questions.
    """
    return accuracies([question.right(nats) for question, nats in zip(questions, choice_nats(runner, questions, tokenizer, bf16=bf16))])


def accuracies(right: Sequence[tuple[bool, bool]]) -> dict[str, float | None]:
    """What `choice_accuracy` returns, from what `Question.right` says of each question; one alone has no standard error.

    Example:
        >>> accuracies([(True, False), (True, True)])
        {'questions': 2, 'accuracy': 1.0, 'accuracy_stderr': 0.0, 'accuracy_norm': 0.5, 'accuracy_norm_stderr': 0.5}
    """
    scores: dict[str, float | None] = {"questions": len(right)}
    for name, hits in zip(("accuracy", "accuracy_norm"), zip(*right)):
        share = float(np.mean(hits))
        scores[name] = share
        scores[f"{name}_stderr"] = math.sqrt(share * (1 - share) / (len(hits) - 1)) if len(hits) > 1 else None
    return scores
