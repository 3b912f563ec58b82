"""Losses across vocabularies: likelihoods of spans, and distributions on shared tokens. Spans are where both tokenisations have a border (`byte_spans`).

Likelihoods of spans (approximate likelihood matching, https://huggingface.co/papers/2503.20083, section 3). With ``l`` the log-likelihood of a span, the sum
of those of its tokens, student and teacher each say that the text goes on with it or not::

    p = exp(l / temperature),     loss = temperature x [ p_T log(p_T / p_S) + (1 - p_T) log((1 - p_T) / (1 - p_S)) ]

This is the paper's f-divergence with f that of the KL, so that equal models lose nothing (its cross-entropy form has the same gradient and keeps the teacher's
entropy). At temperature 1 a span that both find unlikely, as most long ones, would have next to no gradient; the paper's temperature of 100 is the default. The
factor in front keeps the loss in nats whatever the temperature is: in the limit it is ``a log(a / b) - a + b`` with a and b the nats that the span costs
teacher and student, and its slope in b is ``1 - a / b``.

Only log-probabilities of the tokens that are there are needed: no distribution, no sort, no table of two vocabularies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cbd_hub.errors import ArgumentError, VocabularyMismatchError
from cbd_hub.losses.alignment import byte_spans, written_tokens
from cbd_hub.losses.blocks import HeadGradient, few_at_once, gradients_times, scaled, through_scaling
from cbd_hub.precision import widest


__all__ = ["byte_spans", "shared_loss", "shared_tokens", "shared_top_loss", "span_loss"]

TEMPERATURE = 100.0
_LEAST = 1e-9  # nats: a span cannot be surer than that
_BLOCK_ELEMENTS = 2**24  # logits of both models held at once


def span_loss(
    student_log_probs: Tensor, student_spans: Tensor, teacher_log_probs: Tensor, teacher_spans: Tensor, *, temperature: float = TEMPERATURE,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Binary KL between teacher's and student's likelihoods of spans, in nats, a sum over spans divided by ``num_items``.

    Args:
        student_log_probs: Log-probability of each of the student's tokens in nats, shape (N,). Receives the gradient.
        student_spans: The span that each is in, shape (N,), from 0 on, -1 for none.
        teacher_log_probs: The same of the teacher's tokens, shape (M,).
        teacher_spans: The same numbers for these, shape (M,).
        temperature: Temperature of the likelihoods, above 0.
        num_items: What the sum is divided by; None for the number of spans.

    Returns:
        Scalar, at least 0: 0 where both find every span equally likely, and 0 with a live graph without spans.

    Raises:
        ArgumentError: If the temperature is not above 0, or the two sides have different spans.

    Example:
        >>> ours, theirs = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-3.0, -0.5])
        >>> span_loss(ours, torch.tensor([0, 0, 1]), theirs, torch.tensor([0, 1])).item()
        0.0
    """
    if not temperature > 0.0:
        raise ArgumentError(f"span_temperature={temperature} is not above 0; the paper's value is {TEMPERATURE:g}")
    spans = 1 + max((int(numbers.max()) for numbers in (student_spans, teacher_spans) if len(numbers)), default=-1)
    costs, counts = zip(*(_sums(values, numbers, spans) for values, numbers in ((student_log_probs, student_spans), (teacher_log_probs.detach(), teacher_spans))))
    held = counts[0] > 0
    if not torch.equal(held, counts[1] > 0):
        odd = int((held != (counts[1] > 0)).nonzero()[0])
        raise ArgumentError(f"span {odd} has tokens on one side alone; number spans as byte_spans gives them and leave both sides of one out together")
    student, teacher = (-(cost[held] / temperature).clamp(max=-_LEAST / temperature) for cost in costs)
    likely, unlikely = torch.exp(-teacher), -torch.expm1(-teacher)
    value = likely * (student - teacher) + unlikely * (unlikely.log() - torch.log(-torch.expm1(-student)))
    total = temperature * value.sum() + 0.0 * student_log_probs.sum()
    return (total / (held.sum().clamp(min=1) if num_items is None else num_items)).to(torch.promote_types(student_log_probs.dtype, torch.float32))


def _sums(log_probs: Tensor, spans: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Log-likelihood of every span in the widest type, and its tokens."""
    chosen = spans >= 0
    values, places = log_probs[chosen].to(widest(log_probs.device)), spans[chosen]
    return values.new_zeros(count).index_add(0, places, values), torch.bincount(places, minlength=count)


def shared_tokens(student: Any, teacher: Any) -> Tensor:
    """Tokens of both vocabularies that stand for the same bytes, special ones apart.

    Args:
        student: Its tokenizer.
        teacher: Its tokenizer.

    Returns:
        The ids of each in student and teacher, int64, shape (K, 2), rising in the student's.

    Raises:
        ArgumentError: If a tokenizer has no byte offsets, or marks the pieces of a word.
        VocabularyMismatchError: If there are none.
    """
    sides = []
    for tokenizer in (student, teacher):
        special = set(tokenizer.all_special_ids)
        sides.append({token: place for token, place in written_tokens(tokenizer).items() if place not in special})
    pairs = sorted((place, sides[1][token]) for token, place in sides[0].items() if token in sides[1])
    if not pairs:
        raise VocabularyMismatchError("student and teacher share no token, so that there is nothing to distil by bridge=vocab; use bridge=span")
    return torch.tensor(pairs)


def shared_loss(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, shared: Tensor, *, num_items: int | Tensor | None = None,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None, student_logit_scale: float = 1.0, teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None, teacher_softcap: float | None = None,
) -> Tensor:
    """KL(teacher || student) of the next token in nats, where K shared tokens are K outcomes and all others one more; a sum over rows divided by ``num_items``.

    Rows are walked in blocks whose gradients are made with the loss, in the forward pass; there is never an N x V tensor.

    Args:
        student_hidden: Last hidden states before common borders, shape (N, H). Receives a gradient.
        student_head: Output projection, shape (V, H). Receives a gradient.
        teacher_hidden: Before the same borders, shape (N, H_teacher).
        teacher_head: Shape (V_teacher, H_teacher).
        shared: Ids in student and teacher, shape (K, 2), as `shared_tokens` gives them.
        num_items: What the sum is divided by; None for the number of rows.
        student_bias: Shape (V,), or None.
        teacher_bias: Shape (V_teacher,), or None.
        student_logit_scale: Factor on the student's logits.
        teacher_logit_scale: Factor on the teacher's logits.
        student_softcap: ``cap * tanh(logits / cap)`` on the student's scaled logits, or None.
        teacher_softcap: The same for the teacher.

    Returns:
        Scalar, at least 0; 0 with a live graph without rows.

    Raises:
        VocabularyMismatchError: If a shared id is none of a head's rows.

    Example:
        >>> hidden, head = torch.randn(6, 8), torch.randn(50, 8)
        >>> shared_loss(hidden, head, hidden, head, torch.arange(40)[:, None].expand(40, 2)).item()
        0.0
    """
    for side, head in enumerate((student_head, teacher_head)):
        if len(shared) and int(shared[:, side].max()) >= len(head):
            raise VocabularyMismatchError(f"a shared token has id {int(shared[:, side].max()):,} and the {('student', 'teacher')[side]}'s head {len(head):,} rows; give its own tokenizer")
    device = student_hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student_hidden.dtype
    ours, theirs = shared.to(student_hidden.device).unbind(1)

    options = _Scaling(student_logit_scale, teacher_logit_scale, student_softcap, teacher_softcap, compute)
    with torch.autocast(device, enabled=False):
        total: Tensor = _SharedLoss.apply(student_hidden, student_head, student_bias, teacher_hidden.detach(), teacher_head.detach(), teacher_bias, ours, theirs, options)
    return total / (max(len(student_hidden), 1) if num_items is None else num_items)


@dataclass(frozen=True)
class _Scaling:
    """What is between products and logits."""

    student_scale: float
    teacher_scale: float
    student_softcap: float | None
    teacher_softcap: float | None
    compute: torch.dtype


def _split(logits: Tensor, shared: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a few rows of logits: log-probabilities of the shared tokens, that of any other, the probabilities of the others where they stand, and their least sum."""
    probabilities = logits.softmax(-1)
    listed = logits[:, shared] - (logits.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log())
    others = probabilities.index_fill_(1, shared, 0.0)
    rest = others.sum(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).eps)
    return listed, rest.log(), others, rest


class _SharedLoss(torch.autograd.Function):
    """Sum over rows. With p the student's probabilities, the slope of a shared token's logit is ``p - p_T``, that of any other's ``p (1 - rest_T / rest)``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, target: Tensor, teacher_head: Tensor, teacher_bias: Tensor | None, ours: Tensor, theirs: Tensor,
        options: _Scaling,
    ) -> Tensor:
        compute = options.compute
        wide = torch.promote_types(compute, torch.float32)
        rows = max(1, _BLOCK_ELEMENTS // (len(head) + len(teacher_head)))
        few = few_at_once(max(len(head), len(teacher_head)), hidden.device)
        weight, teacher_weight = head.to(compute), teacher_head.to(compute)
        d_hidden = torch.zeros_like(hidden, dtype=wide)
        d_head = HeadGradient(head, len(head), 1 if len(hidden) <= rows else 2, wide)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        total = hidden.new_zeros((), dtype=widest(hidden.device))
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows].to(compute)
            products, aims = part @ weight.t(), target[start : start + rows].to(compute) @ teacher_weight.t()
            for first in range(0, len(part), few):
                place = slice(first, first + few)
                logits = scaled(products[place], bias, options.student_scale, options.student_softcap)
                known, known_rest, _, least = _split(scaled(aims[place], teacher_bias, options.teacher_scale, options.teacher_softcap), theirs)
                listed, rest, slope, held = _split(logits, ours)
                likely = known.exp()
                total += torch.linalg.vecdot(likely, known - listed).sum(dtype=total.dtype) + (least * (known_rest - rest)).sum(dtype=total.dtype)
                slope.mul_(1 - least / held).index_copy_(1, ours, listed.exp_().sub_(likely))
                slope = through_scaling(slope, logits, options.student_scale, options.student_softcap)
                if d_bias is not None:
                    d_bias += slope.sum(0)
                products[place] = slope
            d_hidden[start : start + rows] = products @ weight
            d_head.add(products, part)
        ctx.gradients = d_hidden, d_head, d_bias
        ctx.dtypes = hidden.dtype, None if bias is None else bias.dtype
        return total.to(wide)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return (*gradients_times(grad_outputs[0], ctx), *(None,) * 6)


def shared_top_loss(
    student_hidden: Tensor, student_head: Tensor, ids: Tensor, log_probs: Tensor, *, num_items: int | Tensor | None = None, student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0, student_softcap: float | None = None,
) -> Tensor:
    """As `shared_loss`, of a teacher of whom only the likeliest tokens are known: those of them that are shared are outcomes, and all others one more.

    Fewer outcomes than all shared tokens are, so that it is never above `shared_loss`.

    Args:
        student_hidden: Last hidden states before common borders, shape (N, H). Receives a gradient.
        student_head: Output projection, shape (V, H). Receives a gradient.
        ids: The teacher's likeliest tokens as ids of the student, distinct in a row, -1 where it has none, shape (N, k).
        log_probs: The teacher's log-probabilities of them, shape (N, k).
        num_items: What the sum is divided by; None for the number of rows.
        student_bias: Shape (V,), or None.
        student_logit_scale: Factor on the student's logits.
        student_softcap: ``cap * tanh(logits / cap)`` on the student's scaled logits, or None.

    Returns:
        Scalar, at least 0; 0 with a live graph without rows.

    Example:
        >>> hidden, head = torch.randn(6, 8), torch.randn(50, 8)
        >>> top = (hidden @ head.t()).log_softmax(-1).topk(5)
        >>> abs(round(shared_top_loss(hidden, head, top.indices, top.values).item(), 5))
        0.0
    """
    device = student_hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student_hidden.dtype

    def block(hidden: Tensor, head: Tensor, bias: Tensor | None, ids: Tensor, known: Tensor) -> Tensor:
        with torch.autocast(device, enabled=False):
            found = _log_probs(hidden.to(compute) @ head.to(compute).t(), bias, student_logit_scale, student_softcap).gather(1, ids.clamp(min=0))
            held = ids >= 0
            student, teacher = (_with_rest(values.masked_fill(~held, -torch.inf)) for values in (found, known.to(found.dtype)))
            held = torch.cat([held, held.new_ones(len(held), 1)], -1)
            return (teacher.exp() * (teacher - student).masked_fill(~held, 0.0)).sum()

    rows = max(1, _BLOCK_ELEMENTS // len(student_head))
    total = 0.0 * student_hidden.sum()
    for start in range(0, len(student_hidden), rows):
        place = slice(start, start + rows)
        part: Tensor = checkpoint(block, student_hidden[place], student_head, student_bias, ids[place], log_probs[place], use_reentrant=False)
        total = total + part
    return total / (max(len(student_hidden), 1) if num_items is None else num_items)


def _log_probs(products: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = products.to(torch.promote_types(products.dtype, torch.float32))
    logits = logits if bias is None else logits + bias
    logits = logits * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1)


def _with_rest(log_probs: Tensor) -> Tensor:
    """Log-probabilities of some outcomes and, in the last column, of any other."""
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(log_probs.dtype).eps).log()
    return torch.cat([log_probs, rest], -1)
