"""Losses between hidden states of mapped layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cbd_hub.errors import ArgumentError
from cbd_hub.precision import widest


HIDDEN_LOSSES = ("cosine", "mse")
_STRIPS = 4  # of a product of which half is wanted
_RIDGE = 1e-4  # of the mean square of the inputs


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


class LeastSquares:
    """The affine map from student states to teacher states that has the least squared error, each position's divided by the teacher's mean square.

    On the same text this is the start from which the ``mse`` of `hidden_loss` cannot be lowered by the projector alone; a ridge of 1e-4 of the
    inputs' mean square decides where there are fewer positions than channels. Ridge regression in closed form::

        W = (sum w (y - y0)(x - x0)^T) (sum w (x - x0)(x - x0)^T + ridge I)^-1,   b = y0 - W x0,   w = 1 / mean(y^2)

    Args:
        width: Channels of the student.
        target: Channels of the teacher.
        products: What the products of one `add` are computed in, sums being in fp64: fp32 where that is enough, on the states' own device and twice as fast.

    Example:
        >>> x, true = torch.randn(200, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
        >>> fit = LeastSquares(3, 5)
        >>> fit.add(x, x @ true.T + 1)
        >>> weight, bias = fit.solve()
        >>> bool((weight - true).abs().max() < 1e-2), bool((bias - 1).abs().max() < 1e-2)
        (True, True)
    """

    def __init__(self, width: int, target: int, *, products: torch.dtype = torch.float64) -> None:
        self._products, self._device = products, torch.device("cpu")
        self._inputs = torch.zeros(width + 1, width + 1, dtype=torch.float64)  # its upper triangle
        self._cross = torch.zeros(width + 1, target, dtype=torch.float64)

    def add(self, student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> None:
        """Take in states of some positions, shapes (N, width) and (N, target), and how much each position weighs, shape (N, 1), where that is not one over the teacher's mean square."""
        self._device = device = torch.device("cpu") if self._products == torch.float64 else student.device
        ours, theirs = (states.detach().to(device).to(self._products) for states in (student, teacher))
        ours = torch.cat([ours, ours.new_ones(len(ours), 1)], -1)
        weight = inverse_square(theirs) if weight is None else weight.to(ours)
        weighed = (weight * ours).t()
        with torch.autocast(device.type, enabled=False):
            step = -(-len(weighed) // _STRIPS)
            for start in range(0, len(weighed), step):
                self._inputs[start : start + step, start:] += (weighed[start : start + step] @ ours[:, start:]).cpu()
            self._cross += (weighed @ theirs).cpu()

    def solve(self, *, ridge: float = _RIDGE, each: bool = False, bias: bool = True) -> tuple[Tensor, Tensor]:
        """Weight, shape (target, width), and bias, shape (target,), in fp64 on the CPU.

        Args:
            ridge: As a share of the inputs' mean square.
            each: Whether it is each input's own mean square instead of that of all.
            bias: Whether there is one; without it W alone is fitted, to states as they are, and the bias is 0.
        """
        tiny = torch.finfo(torch.float32).tiny
        inputs, cross = self._inputs[:-1, :-1], self._cross[:-1]
        mean_in, mean_out = torch.zeros_like(self._inputs[:-1, -1]), torch.zeros_like(self._cross[-1])
        if bias:
            total = self._inputs[-1, -1].clamp(min=tiny)
            mean_in, mean_out = self._inputs[:-1, -1] / total, self._cross[-1] / total
            inputs, cross = inputs - total * torch.outer(mean_in, mean_in), cross - total * torch.outer(mean_in, mean_out)
        own = self._inputs[:-1, :-1].diagonal()
        held = ridge * own + 1e-9 * own.mean() if each else (ridge * own.mean()).expand(len(own))
        home = self._device if widest(self._device) == torch.float64 else torch.device("cpu")
        factor, failed = torch.linalg.cholesky_ex((inputs + torch.diag(held.clamp(min=tiny))).to(home), upper=True)
        weight = torch.cholesky_solve(cross.to(home), factor, upper=True).t().cpu()
        if failed:  # only of what is not finite
            weight = torch.full_like(weight, torch.nan)
        return weight, mean_out - weight @ mean_in


def inverse_square(states: Tensor, eps: float = torch.finfo(torch.float32).tiny) -> Tensor:
    """One over the mean square of each position's state plus eps, shape (N, 1): what a position weighs where states of unlike scale are to count alike."""
    return 1 / (states.square().mean(-1, keepdim=True) + eps)
