"""Rows walked in blocks, for losses that never hold an N x V tensor: how many at once, logits of a few rows, and the gradients that a forward pass makes.

What `head`, `log_probs` and `bridge` have in common: a block's logits are formed, turned into loss and gradient, and used for the gradient's products at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


# Rows of a block: each block adds to the whole of the head's gradient, which must cost little beside its products.
_BLOCK_ROWS = {"cpu": 240, "other": 1024}
_AT_ONCE = {"cpu": 2**19, "other": 2**24}  # logits worked on at once: what a CPU's cache holds, what fills an accelerator
_SLICE_ROWS = 4096  # of the head's gradient, made at once


def block_rows(device: torch.device) -> int:
    """Rows of a block at most."""
    return _BLOCK_ROWS["cpu" if device.type == "cpu" else "other"]


def few_at_once(vocab_size: int, device: torch.device) -> int:
    """Rows of logits that are worked on at once, within a block."""
    return max(1, _AT_ONCE["cpu" if device.type == "cpu" else "other"] // vocab_size)


def block_bytes(vocab_size: int, device: torch.device, compute: torch.dtype) -> int:
    """Bytes of the logits that `distillation_loss` holds at once, of student and teacher.

    Example:
        >>> block_bytes(50_000, torch.device("cpu"), torch.bfloat16)
        48000000
    """
    return 2 * block_rows(device) * vocab_size * compute.itemsize


def scaled(products: Tensor, bias: Tensor | None, scale: float, softcap: float | None, out: Tensor | None = None) -> Tensor:
    """Products of a few rows turned into logits, in fp32 (fp64 for fp64 input), shape (rows, V)."""
    if out is None:
        out = torch.empty_like(products, dtype=torch.float64 if products.dtype == torch.float64 else torch.float32)
    logits = out.copy_(products)
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def through_scaling(gradient: Tensor, logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """The gradient with respect to logits turned into that with respect to their products, in place; the logits are overwritten."""
    if softcap is not None:
        gradient.mul_(logits.div_(softcap).square_().neg_().add_(1.0))
    return gradient if scale == 1.0 else gradient.mul_(scale)


class HeadGradient:
    """The gradient of a head, summed over blocks of rows.

    Several blocks are summed in fp32. Where the head is narrower, the sum is held in slices, each let go when its rows are rounded, so that the two are
    never there whole at once.

    Args:
        head: The head, shape (V, H).
        size: How many of its rows are tokens; those beyond are padding, whose gradient is 0.
        blocks: How many blocks come.
        accumulate: What they are summed in.
    """

    def __init__(self, head: Tensor, size: int, blocks: int, accumulate: torch.dtype) -> None:
        self._shape, self._dtype, self._size, self._empty = head.shape, head.dtype, size, True
        self._whole = head.new_empty(head.shape) if blocks == 1 or head.dtype == accumulate else None
        self._slices = list(self._whole.split(_SLICE_ROWS)) if self._whole is not None else [
            head.new_empty((min(_SLICE_ROWS, len(head) - low), head.shape[1]), dtype=accumulate) for low in range(0, len(head), _SLICE_ROWS)
        ]

    def add(self, slope: Tensor, hidden: Tensor) -> None:
        """Add a block: slopes of its logits, shape (rows, V), times its hidden states, shape (rows, H)."""
        for low, part in zip(range(0, self._size, _SLICE_ROWS), self._slices):
            ours = slope[:, low : low + _SLICE_ROWS].t()
            into = part[: len(ours)]
            if into.dtype == hidden.dtype:
                torch.addmm(into, ours, hidden, beta=0 if self._empty else 1, out=into)
            elif self._empty:
                into.copy_(ours @ hidden)
            else:
                into.add_(ours @ hidden)
        self._empty = False

    def times(self, scale: Tensor) -> Tensor:
        """The sum times a scalar, in the head's dtype; it is given away."""
        used = 0 if self._empty else self._size
        for low, part in zip(range(0, self._shape[0], _SLICE_ROWS), self._slices):
            part[max(0, used - low) :] = 0  # no row reached it, or it is padding
        if self._whole is not None:
            return self._whole.mul_(scale)
        whole = self._slices[0].new_empty(self._shape, dtype=self._dtype)
        for rows in whole.split(_SLICE_ROWS):
            rows.copy_(self._slices.pop(0).mul_(scale))
        return whole


def gradients_times(scale: Tensor, ctx: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients that a forward pass made, each in its input's dtype, as autograd wants it. They are given away and not copied: the head's is as large as the head.

    Args:
        scale: The gradient of the loss, a scalar.
        ctx: The autograd function's context: ``gradients`` of hidden states, head (a `HeadGradient`) and bias, each perhaps None, and ``dtypes`` of hidden states and bias.

    Raises:
        RuntimeError: If they have been given away already.
    """
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        raise RuntimeError("this loss has been walked backward already, and its gradients are given away; compute it anew")
    d_hidden, d_head, d_bias = gradients
    return (
        None if d_hidden is None else d_hidden.mul_(scale).to(ctx.dtypes[0]), None if d_head is None else d_head.times(scale),
        None if d_bias is None else d_bias.mul_(scale).to(ctx.dtypes[1]),
    )
