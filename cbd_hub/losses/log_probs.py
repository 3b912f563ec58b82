"""Log-probabilities of tokens from hidden states and an output head, never holding an N x V tensor: measured, the likeliest ones, or with a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cbd_hub.errors import VocabularyMismatchError
from cbd_hub.losses.blocks import HeadGradient, block_rows, scaled, through_scaling
from cbd_hub.precision import widest


_BLOCK_ELEMENTS = 2**24  # logits held at once, of a wide vocabulary


@torch.no_grad()
def token_losses(
    hidden: Tensor, head: Tensor, labels: Tensor, *, bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Cross-entropy of every row in nats, shape (N,), without gradient and without an N x V tensor.

    Args:
        hidden: Last hidden states, shape (N, H). Their dtype is the dtype of the product.
        head: Output projection, shape (V, H).
        labels: Next token of each row, shape (N,).
        bias: Shape (V,), or None.
        logit_scale: Factor on the logits.
        softcap: ``cap * tanh(logits / cap)``, or None.

    Example:
        >>> token_losses(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([0, 5])).exp().round()
        tensor([8., 8.])
    """
    head = head.to(hidden.dtype)
    rows = max(1, min(block_rows(hidden.device), _BLOCK_ELEMENTS // len(head)))
    losses = []
    for start in range(0, len(hidden), rows):
        products = hidden[start : start + rows] @ head.t()
        logits = scaled(products, bias, logit_scale, softcap, None if products.itemsize == 2 else products)
        chosen = logits.gather(1, labels[start : start + rows, None]).squeeze(1)
        losses.append(logits.logsumexp(-1) - chosen)
    return torch.cat(losses) if losses else hidden.new_zeros(0)


class Top(NamedTuple):
    """What is kept of the distributions of N rows.

    Attributes:
        ids: Their likeliest tokens, shape (N, k), in no order.
        log_probs: Log-probabilities of these, shape (N, k).
        log_rest: Log-probability of any other token, shape (N,).
        chosen: Log-probability of the next token, shape (N,).
        tail_ids: Draws from the other tokens by their probability, shape (N, s).
        tail_log_probs: Log-probabilities of these, shape (N, s).
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor
    chosen: Tensor
    tail_ids: Tensor
    tail_log_probs: Tensor


def _draws(logits: Tensor, log_mass: Tensor, uniform: Tensor, count: int) -> Tensor:
    """Tokens drawn by systematic sampling, shape (rows, count): at equal distances in the running sum of their probabilities.

    Each token comes ``count`` times its probability often in expectation, with less variance than by draws of their own.
    """
    wide = widest(logits.device)
    places = (uniform[:, None].to(wide) + torch.arange(count, device=logits.device, dtype=wide)) / count
    found = []
    few = max(1, _BLOCK_ELEMENTS // 4 // logits.shape[1])
    for start in range(0, len(logits), few):
        sums = (logits[start : start + few].to(wide) - log_mass[start : start + few, None]).exp_().nan_to_num_(0.0).cumsum(-1)
        found.append(torch.searchsorted(sums, places[start : start + few] * sums[:, -1:], right=True).clamp_(max=logits.shape[1] - 1))
    return torch.cat(found)


@torch.no_grad()
def top_log_probs(
    hidden: Tensor, head: Tensor, k: int, labels: Tensor, *, bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None,
    vocab_size: int | None = None, draws: int = 0, uniform: Tensor | None = None,
) -> Top:
    """The likeliest tokens of every row, the mass of the others, and the token that is there, without an N x V tensor.

    Args:
        hidden: Last hidden states, shape (N, H). Their dtype is the dtype of the product.
        head: Output projection, shape (V, H).
        k: How many tokens, below V.
        labels: Next token of each row, shape (N,).
        bias: Shape (V,), or None.
        logit_scale: Factor on the logits.
        softcap: ``cap * tanh(logits / cap)``, or None.
        vocab_size: Rows of the head that are real tokens; None for all.
        draws: How many of the other tokens are drawn, by their probability.
        uniform: Where in their probabilities the draws begin, one number from 0 to 1 a row, shape (N,); half way by default.

    Example:
        >>> top = top_log_probs(torch.zeros(2, 4), torch.zeros(8, 4), 3, torch.tensor([5, 0]))
        >>> top.log_probs.exp()[0], top.log_rest.exp(), top.chosen.exp()
        (tensor([0.1250, 0.1250, 0.1250]), tensor([0.6250, 0.6250]), tensor([0.1250, 0.1250]))
    """
    head = head[:vocab_size].to(hidden.dtype)
    bias = None if bias is None else bias[:vocab_size]
    rows = block_rows(hidden.device)
    parts = []
    for start in range(0, len(hidden), rows):
        logits = scaled(hidden[start : start + rows] @ head.t(), bias, logit_scale, softcap)
        chosen = logits.gather(1, labels[start : start + rows, None]).squeeze(1)
        listed, ids = logits.topk(k, -1, sorted=False)
        rest = logits.scatter_(1, ids, -math.inf).logsumexp(-1)
        whole = torch.logaddexp(listed.logsumexp(-1), rest)
        where = hidden.new_full((len(logits),), 0.5) if uniform is None else uniform[start : start + rows]
        drawn = _draws(logits, rest, where, draws) if draws else ids[:, :0]
        parts.append(Top(ids, listed - whole[:, None], rest - whole, chosen - whole, drawn, logits.gather(1, drawn) - whole[:, None]))
    if not parts:
        none, listless = hidden.new_zeros(0), hidden.new_zeros(0, k, dtype=torch.int64)
        return Top(listless, hidden.new_zeros(0, k), none, none, listless[:, :0].expand(0, draws), hidden.new_zeros(0, draws))
    return Top(*map(torch.cat, zip(*parts)))


@dataclass(frozen=True)
class _Head:
    """What is between products and logits."""

    logit_scale: float
    softcap: float | None
    compute: torch.dtype


class _ChosenLogProbs(torch.autograd.Function):
    """The logits of a block are formed in the forward pass and again in the backward pass: each row has a weight of its own there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor, head: _Head) -> Tensor:
        log_probs = -token_losses(
            hidden.to(head.compute), weight.to(head.compute), chosen, bias=bias, logit_scale=head.logit_scale, softcap=head.softcap
        )
        ctx.save_for_backward(hidden, weight, bias, chosen)
        ctx.head = head
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        hidden, weight, bias, chosen = ctx.saved_tensors
        head: _Head = ctx.head
        scale = grad_outputs[0]
        accumulate = torch.float64 if head.compute == torch.float64 else torch.float32
        d_hidden = torch.zeros_like(hidden, dtype=accumulate)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=accumulate)
        matrix = weight.to(head.compute)
        rows = block_rows(hidden.device)
        d_weight = HeadGradient(weight, len(weight), math.ceil(len(hidden) / rows), accumulate)
        for start in range(0, len(hidden), rows):
            place = slice(start, start + rows)
            part = hidden[place].to(head.compute)
            logits = scaled(part @ matrix.t(), bias, head.logit_scale, head.softcap)
            slope = logits.softmax(-1).neg_()  # of log p[chosen] in the logits: one-hot minus p
            slope.scatter_add_(1, chosen[place, None], torch.ones_like(slope[:, :1]))
            slope.mul_(scale[place, None])
            slope = through_scaling(slope, logits, head.logit_scale, head.softcap)
            if d_bias is not None:
                d_bias += slope.sum(0)
            slope = slope.to(head.compute)
            d_hidden[place] = slope @ matrix
            d_weight.add(slope, part)
        return d_hidden.to(hidden.dtype), d_weight.times(scale.new_ones(())), None if d_bias is None or bias is None else d_bias.to(bias.dtype), None, None


def chosen_log_probs(
    hidden: Tensor, head: Tensor, labels: Tensor, *, bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Log-probability of each row's label in nats, with a gradient; extra memory is one block of logits and the gradients themselves.

    Args:
        hidden: Last hidden states, shape (N, H). Receives a gradient.
        head: Output projection, shape (V, H). Receives a gradient.
        labels: Token of each row, shape (N,).
        bias: Shape (V,), or None.
        logit_scale: Factor on the logits.
        softcap: ``cap * tanh(logits / cap)``, or None.
        vocab_size: Rows of the head that are real tokens; None for all.

    Returns:
        Shape (N,), at most 0, in fp32 (fp64 for fp64 input).

    Raises:
        VocabularyMismatchError: If a label is outside the vocabulary.

    Example:
        >>> chosen_log_probs(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([0, 5])).exp()
        tensor([0.1250, 0.1250])
    """
    size = head.shape[0] if vocab_size is None else vocab_size
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < size:
        raise VocabularyMismatchError(f"labels run from {int(labels.min())} to {int(labels.max())} but the vocabulary has {size:,} tokens; the text needs another tokenizer")
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        log_probs: Tensor = _ChosenLogProbs.apply(
            hidden, head[:size], None if bias is None else bias[:size], labels, _Head(logit_scale, softcap, compute)
        )
    return log_probs
