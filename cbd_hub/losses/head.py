"""Distillation losses from last hidden states and output heads, never holding an N x V tensor.

The rows are walked in blocks. A block's logits are formed, turned into loss and gradient in place, and used for the two gradient products, all
in the forward pass: four matrix products a token where recomputation in the backward pass needs six to eight. Within a block the
elementwise work goes by few rows at a time, so that it stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cbd_hub.errors import ArgumentError, VocabularyMismatchError
from cbd_hub.losses.blocks import HeadGradient, block_rows, few_at_once, gradients_times, scaled, through_scaling
from cbd_hub.losses.divergence import check_options
from cbd_hub.precision import widest


@dataclass(frozen=True)
class _Options:
    """What the loss is, apart from tensors."""

    divergence: str
    temperature: float
    beta: float
    skew: float
    kd_weight: float
    ce_weight: float
    vocab_size: int
    student_logit_scale: float
    teacher_logit_scale: float
    student_softcap: float | None
    teacher_softcap: float | None


def _divergence_and_gradient(student: Tensor, teacher: Tensor, options: _Options, desk: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Per-row divergence and its gradient with respect to the student's logits at the loss temperature.

    With ``z`` the log-sum-exp of logits, forward ``sum p_T (t - s) - z_T + z_S`` and ``p_S - p_T``; reverse ``sum p_S e`` with
    ``e = s - t - z_S + z_T``, and ``p_S (e - value)``: one exponential a logit.

    Args:
        student: Logits of the student at the loss temperature, shape (rows, V).
        teacher: The same of the teacher. Overwritten.
        options: The divergence and its mixture weights.
        desk: Two tensors of that shape to work in.

    Returns:
        The divergence, shape (rows,), and the gradient, shape (rows, V).
    """
    if options.divergence in ("forward_kl", "reverse_kl"):
        p_student, p_teacher = torch.softmax(student, -1, out=desk[0]), torch.softmax(teacher, -1, out=desk[1])
        shift = (student.amax(-1) - p_student.amax(-1).log()) - (teacher.amax(-1) - p_teacher.amax(-1).log())  # z_S - z_T
        if options.divergence == "forward_kl":
            value = torch.linalg.vecdot(p_teacher, teacher.sub_(student)).add_(shift)
            return value, p_student.sub_(p_teacher)
        difference = torch.sub(student, teacher, out=teacher).sub_(shift[:, None])
        value = torch.linalg.vecdot(p_student, difference)
        return value, difference.sub_(value[:, None]).mul_(p_student)
    ours, theirs = torch.log_softmax(student, -1, out=desk[0]), torch.log_softmax(teacher, -1, out=desk[1])
    weight = options.beta if options.divergence == "jensen_shannon" else options.skew
    mixture = torch.logaddexp(theirs + math.log(weight), ours + math.log1p(-weight))
    p_teacher, p_student = theirs.exp(), ours.exp()
    to_teacher = torch.linalg.vecdot(p_teacher, theirs - mixture)
    if options.divergence == "jensen_shannon":
        slope = ours - mixture
        to_student = torch.linalg.vecdot(p_student, slope)
        value = weight * to_teacher + (1 - weight) * to_student
        return value, slope.sub_(to_student[:, None]).mul_(p_student).mul_(1 - weight)
    # dKL/dp_S = -(1 - skew) p_T / mixture, pushed through the softmax
    pull = (theirs + ours - mixture).exp_().mul_(1 - weight)
    return to_teacher, p_student.mul_(pull.sum(-1, keepdim=True)).sub_(pull)


@dataclass(frozen=True)
class Listed:
    """What a teacher cache knows of a teacher's distribution.

    Attributes:
        ids: Its top tokens, shape (N, k), distinct in a row.
        log_probs: Their log-probabilities, shape (N, k).
        tail_ids: Draws from the other tokens by their probability, shape (N, s), perhaps the same one twice; None where there are none.
        tail_log_probs: Their log-probabilities, shape (N, s).
    """

    ids: Tensor
    log_probs: Tensor
    tail_ids: Tensor | None = None
    tail_log_probs: Tensor | None = None

    def __getitem__(self, rows: Any) -> Listed:
        """Some rows of it."""
        tails = (self.tail_ids, self.tail_log_probs)
        return Listed(self.ids[rows], self.log_probs[rows], *(None if tail is None else tail[rows] for tail in tails))


def _sparse_divergence_and_gradient(logits: Tensor, top: Listed, options: _Options, room: Tensor) -> tuple[Tensor, Tensor]:
    """Per-row divergence on what is known of the teacher, and its gradient with respect to the student's logits.

    Forward KL with draws from the tail: the top tokens as they are, and each of the s draws with a share of ``rest / s`` of the probability of all others,
    ``sum_top p (log p - log q) + rest / s sum_draws (log p - log q)``. In expectation over the draws that is the KL over the whole vocabulary, and the
    gradient, ``q`` less the weights, is its gradient (importance sampling: https://huggingface.co/papers/2503.16870).

    Else: the top tokens and one bucket for the rest. The k + 1 outcomes are a softmax of their own, so that the slope of a listed token's logit is that
    outcome's; the bucket's slope falls to its tokens by their share of its probability. It is a lower bound.

    Args:
        logits: The student's, shape (rows, V).
        top: What is known.
        options: The divergence and its mixture weights; temperature 1.
        room: Shape (rows, V), to work in.
    """
    tiny = torch.finfo(logits.dtype).eps
    ids, log_probs = top.ids, top.log_probs.to(logits.dtype)
    gradient = torch.softmax(logits, -1, out=room)
    whole = logits.amax(-1, keepdim=True) - gradient.amax(-1, keepdim=True).log()
    listed = logits.gather(1, ids) - whole
    if top.tail_ids is not None and top.tail_log_probs is not None and options.divergence == "forward_kl":
        probs = log_probs.exp()
        share = (1 - probs.sum(-1, keepdim=True)).clamp(min=0) / top.tail_ids.shape[1]
        missed = top.tail_log_probs.to(logits.dtype) - (logits.gather(1, top.tail_ids) - whole)
        value = torch.linalg.vecdot(probs, log_probs - listed) + (share * missed).sum(-1)
        gradient.scatter_add_(1, ids, -probs).scatter_add_(1, top.tail_ids, -share.expand_as(missed))
        return value, gradient

    def outcomes(listed: Tensor) -> Tensor:
        return torch.cat([listed, (1 - listed.exp().sum(-1, keepdim=True)).clamp(min=tiny).log()], -1)

    student = outcomes(listed)
    rest = student[:, -1:].exp()
    value, slope = _divergence_and_gradient(student, outcomes(log_probs), options, [torch.empty_like(student) for _ in range(2)])
    gradient.mul_(slope[:, -1:] / rest)
    return value, gradient.scatter_(1, ids, slope[:, :-1])


def _few_rows(
    product: Tensor, teacher_product: Tensor | None, top: Listed | None, labels: Tensor,
    biases: tuple[Tensor | None, Tensor | None], options: _Options, want_gradient: bool, desk: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of a few rows, and its gradient with respect to the student's product of hidden states and head."""
    raw = scaled(product, biases[0], options.student_logit_scale, options.student_softcap, desk[0])
    wide = widest(raw.device)
    total = raw.new_zeros((), dtype=wide)
    gradient: Tensor | None = None
    if teacher_product is not None:
        teacher = scaled(teacher_product, biases[1], options.teacher_logit_scale, options.teacher_softcap, desk[1])
        temperature = options.temperature
        student = raw
        if temperature != 1.0:
            teacher /= temperature
            student = torch.div(raw, temperature, out=desk[2])
        value, slope = _divergence_and_gradient(student, teacher, options, desk[3:])
        total += options.kd_weight * temperature**2 * value.sum(dtype=wide)
        if want_gradient:
            weight = options.kd_weight * temperature
            gradient = slope if weight == 1.0 else slope.mul_(weight)
    if top is not None:
        value, slope = _sparse_divergence_and_gradient(raw, top, options, desk[1])
        total += options.kd_weight * value.sum(dtype=wide)
        if want_gradient:
            gradient = slope if options.kd_weight == 1.0 else slope.mul_(options.kd_weight)
    if options.ce_weight:
        log_probs = raw.log_softmax(-1)
        chosen = log_probs.gather(1, labels[:, None])
        total -= options.ce_weight * chosen.sum(dtype=wide)
        if want_gradient:
            slope = log_probs.exp_()
            slope.scatter_add_(1, labels[:, None], torch.full_like(chosen, -1.0))
            slope.mul_(options.ce_weight)
            gradient = slope if gradient is None else gradient.add_(slope)
    if gradient is not None:
        gradient = through_scaling(gradient, raw, options.student_logit_scale, options.student_softcap)
    return total, gradient


class _HeadLoss(torch.autograd.Function):
    """Sum over rows; the gradients are made in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, teacher_hidden: Tensor | None,
        teacher_head: Tensor | None, teacher_bias: Tensor | None, known: Listed | None, labels: Tensor, options: _Options, compute: torch.dtype,
    ) -> Tensor:
        wants = ctx.needs_input_grad
        size, rows = options.vocab_size, len(hidden)
        accumulate = torch.float64 if compute == torch.float64 else torch.float32
        weight = head[:size].to(compute)
        teacher_weight = None if teacher_head is None else teacher_head[:size].to(compute)
        biases = (
            None if bias is None else bias[:size].to(accumulate), None if teacher_bias is None else teacher_bias[:size].to(accumulate)
        )
        d_hidden = torch.empty_like(hidden, dtype=accumulate) if wants[0] else None
        d_bias = torch.zeros(bias.shape, dtype=accumulate, device=head.device) if bias is not None and wants[2] else None
        total = torch.zeros((), dtype=widest(hidden.device), device=hidden.device)
        alone = head.dtype != accumulate and 2 * rows * compute.itemsize <= accumulate.itemsize * head.shape[1]  # its logits are less than a wide sum
        blocks = 1 if alone else max(1, math.ceil(rows / block_rows(hidden.device)))
        block, few = max(1, math.ceil(rows / blocks)), few_at_once(size, hidden.device)  # of equal size: a short last one would cost as much
        d_head = HeadGradient(head, size, blocks, accumulate) if wants[1] else None
        products = torch.empty(block, size, dtype=compute, device=hidden.device)
        # Room to work on a few rows, taken once: fresh tensors for every few rows would cost more than the arithmetic.
        desk = torch.empty(5, min(few, block), size, dtype=accumulate, device=hidden.device)
        teacher_products = None if teacher_hidden is None else torch.empty_like(products)
        for start in range(0, rows, block):
            part = hidden[start : start + block].to(compute)
            ours = torch.mm(part, weight.t(), out=products[: len(part)])
            theirs: Tensor | None = None
            if teacher_hidden is not None and teacher_weight is not None and teacher_products is not None:
                theirs = torch.mm(
                    teacher_hidden[start : start + block].to(compute), teacher_weight.t(), out=teacher_products[: len(part)]
                )
            for first in range(0, len(part), few):
                place = slice(first, first + few)
                rows_here = slice(start + first, start + min(first + few, len(part)))
                top = None if known is None else known[rows_here]
                value, slope = _few_rows(
                    ours[place], None if theirs is None else theirs[place], top, labels[rows_here], biases, options, any(wants[:3]),
                    desk[:, : rows_here.stop - first - start].unbind(),
                )
                total += value
                if slope is not None:
                    if d_bias is not None:
                        d_bias[:size] += slope.sum(0)
                    ours[place] = slope  # the logits' place is free for their gradient
            if d_hidden is not None:
                d_hidden[start : start + block] = ours @ weight
            if d_head is not None:
                d_head.add(ours, part)
        del products, teacher_products, desk
        ctx.gradients = (d_hidden, d_head, d_bias)
        ctx.dtypes = (hidden.dtype, None if bias is None else bias.dtype)
        return total.to(accumulate)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return (*gradients_times(grad_outputs[0], ctx), *(None,) * 7)


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    skew: float = 0.1,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    teacher_top: Listed | tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Distillation loss in nats per kept token, from hidden states and heads.

    ``kd_weight x divergence + ce_weight x cross-entropy``, each a sum over kept tokens divided by ``num_items``. The
    divergences are those of `cbd_hub.losses.divergence` (times temperature^2); the cross-entropy is at temperature 1.
    Under autocast the products run in its dtype; logits, losses and the head's gradient are kept in fp32. Rows that are not
    kept are dropped before any product. Extra memory is one block of at most 240 rows of logits a model (1,024 on an accelerator), and the gradients themselves.

    Args:
        student_hidden: Last hidden states (after the final norm), shape (N, H). Receives a gradient.
        student_head: Output projection, shape (V, H). Receives a gradient.
        teacher_hidden: Shape (N, H_teacher); None only where ``kd_weight`` is 0.
        teacher_head: Shape (V, H_teacher); None only where ``kd_weight`` is 0.
        labels: Next token of each row, shape (N,): already shifted; -100 drops the row.
        divergence: ``forward_kl``, ``reverse_kl``, ``jensen_shannon`` or ``skew_kl``.
        temperature: Temperature of the divergence, above 0.
        beta: Teacher's weight in the Jensen-Shannon mixture.
        skew: Teacher's share in the skew mixture.
        kd_weight: Weight of the divergence.
        ce_weight: Weight of the cross-entropy with the labels.
        num_items: Kept tokens of the whole optimiser step; None for this call's own.
        vocab_size: Rows of both heads that are real tokens; the rest is padding and is left out. None for all rows.
        student_bias: Shape (V,), or None.
        teacher_bias: Shape (V,), or None.
        student_logit_scale: Factor on the student's logits.
        teacher_logit_scale: Factor on the teacher's logits.
        student_softcap: ``cap * tanh(logits / cap)`` on the student's scaled logits, or None.
        teacher_softcap: The same for the teacher.
        teacher_top: Instead of the teacher's hidden states and head, its top tokens and their log-probabilities, each shape (N, k), distinct
            in a row, and perhaps draws from the others (`Listed`), which make the forward KL unbiased; else, and for the other divergences, what is left of its
            mass is one bucket. At temperature 1 only.

    Returns:
        Scalar; 0 with a live graph when no row is kept.

    Raises:
        VocabularyMismatchError: If the heads differ in rows and ``vocab_size`` is not given.
        ArgumentError: If an option is out of its range.

    Example:
        >>> hidden, head = torch.randn(6, 8), torch.randn(50, 8)
        >>> labels = torch.tensor([3, 1, -100, 7, 2, 9])
        >>> distillation_loss(hidden, head, hidden, head, labels).item()
        0.0
    """
    check_options(divergence, temperature, beta, skew)
    if not kd_weight and not ce_weight:
        raise ArgumentError("kd_weight and ce_weight are both 0, so there is nothing to learn from; set one of them")
    rows = student_head.shape[0]
    if teacher_top is not None and temperature != 1.0:
        raise ArgumentError(f"temperature={temperature} needs the teacher's whole distribution, and teacher_top has its top tokens; use temperature 1")
    if kd_weight and teacher_top is None:
        if teacher_hidden is None or teacher_head is None:
            raise ArgumentError("kd_weight is not 0 but no teacher was given; pass teacher_hidden and teacher_head")
        if vocab_size is None and teacher_head.shape[0] != rows:
            raise VocabularyMismatchError(
                f"the student's head has {rows:,} rows and the teacher's {teacher_head.shape[0]:,}; if both share a tokenizer "
                "pass its size as vocab_size, otherwise use a bridge"
            )
        rows = min(rows, teacher_head.shape[0])
    size = rows if vocab_size is None else vocab_size
    if not 0 < size <= rows:
        raise VocabularyMismatchError(f"vocab_size={size:,} but the heads have {rows:,} rows; give at most that many")
    kept = (labels != -100).nonzero().squeeze(1)
    chosen = labels[kept]
    if len(kept) and int(chosen.max()) >= size:
        raise VocabularyMismatchError(f"label {int(chosen.max())} is not below vocab_size={size:,}; the text needs another tokenizer")
    compute = student_hidden.dtype
    device = student_hidden.device.type
    if torch.is_autocast_enabled(device):
        compute = torch.get_autocast_dtype(device)
    options = _Options(
        divergence, temperature, beta, skew, kd_weight, ce_weight, size,
        student_logit_scale, teacher_logit_scale, student_softcap, teacher_softcap,
    )
    live = kd_weight and teacher_top is None
    teacher = teacher_hidden[kept].detach() if live and teacher_hidden is not None else None
    top = None
    if teacher_top is not None and kd_weight:
        top = (teacher_top if isinstance(teacher_top, Listed) else Listed(*teacher_top))[kept]
    with torch.autocast(device, enabled=False):
        total: Tensor = _HeadLoss.apply(
            student_hidden[kept], student_head, student_bias, teacher, teacher_head if live else None, teacher_bias, top, chosen, options, compute
        )
    return total / (max(len(kept), 1) if num_items is None else num_items)
