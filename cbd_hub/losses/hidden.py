"""Losses between hidden states of mapped layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cbd_hub.errors import ArgumentError


HIDDEN_LOSSES = ("cosine", "mse")


def hidden_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], keep: Tensor, *, kind: str = "cosine", num_items: int | Tensor | None = None
) -> Tensor:
    """Distance between mapped hidden states, a mean over the mapped layers and the kept positions.

    ``cosine``: 1 - cos(student, teacher), as boomerang distillation aligns layers (https://huggingface.co/papers/2510.05064).
    ``mse``: squared distance, a mean over channels, divided by the teacher's mean square at that position, so that layers of unlike scale
    count alike.

    Args:
        student: One state per mapped layer, shape (B, T, H). Receives the gradient.
        teacher: The state that each is to match, shape (B, T, H).
        keep: Bool, shape (B, T): positions that count.
        kind: ``cosine`` or ``mse``.
        num_items: Kept positions of the whole optimiser step; None for this call's own.

    Returns:
        Scalar without unit, at least 0.

    Raises:
        ArgumentError: If the kind is unknown, no layer is given, or counts or widths differ.

    Example:
        >>> state = torch.randn(2, 3, 8)
        >>> float(hidden_loss([state], [2 * state], torch.ones(2, 3, dtype=torch.bool)).abs() < 1e-6)
        1.0
    """
    if kind not in HIDDEN_LOSSES:
        raise ArgumentError(f"kind={kind!r} is not known; choose one of {', '.join(HIDDEN_LOSSES)}")
    if not student or len(student) != len(teacher):
        raise ArgumentError(f"{len(student)} student states and {len(teacher)} teacher states; give the same number, at least one")
    total = torch.zeros((), device=keep.device)
    for ours, theirs in zip(student, teacher):
        if ours.shape != theirs.shape:
            raise ArgumentError(f"hidden states have shapes {list(ours.shape)} and {list(theirs.shape)}; they must agree")
        wide = torch.promote_types(ours.dtype, torch.float32)
        mine, target = ours[keep].to(wide), theirs[keep].detach().to(wide)
        if kind == "cosine":
            total = total + (1 - F.cosine_similarity(mine, target, dim=-1)).sum()
        else:
            scale = target.square().mean(-1).clamp(min=torch.finfo(wide).tiny)
            total = total + ((mine - target).square().mean(-1) / scale).sum()
    items = keep.sum().clamp(min=1) if num_items is None else num_items
    return total / len(student) / items
