"""Units matched by similarity: assignments, orthogonal maps, heads, layers. Tensors in, indices and small matrices out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cbd_hub.precision import widest


def assign(similarity: Tensor, signed: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The assignment of rows to different columns with the largest sum.

    Args:
        similarity: Shape (rows, columns), no more rows than columns.
        signed: Similarity of a part that may be taken with either sign, added by its absolute value.

    Returns:
        The column of each row, and the sign of each row's part (1 without one); shape (rows,).

    Example:
        >>> columns, signs = assign(torch.zeros(2, 2), torch.tensor([[0.1, -2.0], [1.0, 0.5]]))
        >>> columns.tolist(), signs.tolist()
        ([1, 0], [-1.0, 1.0])
    """
    total = similarity if signed is None else similarity + signed.abs()
    columns = linear_sum_assignment(total.cpu().double().numpy(), maximize=True)[1]
    signs = np.ones(len(columns), dtype=np.float32)
    if signed is not None:
        signs[signed.cpu().numpy()[np.arange(len(columns)), columns] < 0] = -1
    return columns, signs


def orthogonal(cross: Tensor) -> Tensor:
    """The map with orthonormal columns (or rows) nearest to a matrix: the solution of the Procrustes problem for a cross-product.

    Args:
        cross: Shape (..., n, m).

    Example:
        >>> turn = orthogonal(torch.tensor([[0.0, -3.0], [2.0, 0.0]]))
        >>> torch.allclose(turn.float(), torch.tensor([[0.0, -1.0], [1.0, 0.0]]), atol=1e-6)
        True
    """
    left, _, right = torch.linalg.svd(cross.to(widest(cross.device)), full_matrices=False)
    return left @ right


def rotary(cross: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The best map of a head that commutes with rotary positions: a rotation of each frequency's pair, any orthogonal map of what is not rotated.

    Args:
        cross: Cross-product of the smaller and the larger model's head, shape (..., d, d).
        width: Channels that are rotated, the first ones: channel i is paired with i + width / 2.

    Returns:
        The map from the smaller to the larger one's channels, shape (..., d, d), and the similarity that it reaches, shape (...).
    """
    half, size = width // 2, cross.shape[-1]
    diagonal, offset = cross.diagonal(0, -2, -1), cross[..., :half, half:width].diagonal(0, -2, -1)
    cosine = diagonal[..., :half] + diagonal[..., half:width]
    sine = offset - cross[..., half:width, :half].diagonal(0, -2, -1)
    reach = torch.hypot(cosine, sine)
    safe = reach.clamp(min=1e-30)
    cosine, sine = torch.where(reach > 0, cosine / safe, torch.ones_like(reach)), sine / safe
    turn = cross.new_zeros(cross.shape)
    index = torch.arange(half, device=cross.device)
    turn[..., index, index] = turn[..., index + half, index + half] = cosine.to(turn.dtype)
    turn[..., index + half, index], turn[..., index, index + half] = sine.to(turn.dtype), -sine.to(turn.dtype)
    total = reach.sum(-1)
    if width < size:
        rest = cross[..., width:, width:]
        turn[..., width:, width:] = orthogonal(rest.mT).to(turn.dtype)
        total = total + torch.linalg.svdvals(rest).sum(-1)
    return turn, total


def common_layers(similarity: np.ndarray, types: tuple[Sequence[Any], Sequence[Any]]) -> np.ndarray:
    """Rising columns, one for each row, with the largest sum of similarities and equal types: dynamic programming.

    Args:
        similarity: How like each layer of the smaller model (rows) is to each of the larger one.
        types: Types of the layers of both.

    Example:
        >>> common_layers(np.array([[1.0, 0.2, 0.9], [0.3, 0.1, 0.8]]), (((),) * 2, ((),) * 3)).tolist()
        [0, 2]
    """
    score = np.where([[ours == theirs for theirs in types[1]] for ours in types[0]], similarity, -np.inf)
    for row in range(1, len(score)):
        score[row, 0] = -np.inf
        score[row, 1:] += np.maximum.accumulate(score[row - 1, :-1])
    layers, end = [], score.shape[1]
    for row in score[::-1]:
        end = int(np.argmax(row[:end]))
        layers.append(end)
    return np.array(layers[::-1])


def evenness(rows: int, columns: int) -> np.ndarray:
    """Minus the difference in relative depth of two models' layers, shape (rows, columns): 0 where they are as deep, -1 from first to last.

    Example:
        >>> evenness(2, 3).tolist()
        [[0.0, -0.5, -1.0], [-1.0, -0.5, 0.0]]
    """
    ours, theirs = (np.linspace(0, 1, count) if count > 1 else np.array([0.5]) for count in (rows, columns))
    return 0.0 - np.abs(ours[:, None] - theirs)


def kernel_alignment(first: Tensor, second: Tensor) -> float:
    """Linear CKA of two models' states on the same tokens, 0 to 1 (https://huggingface.co/papers/1905.00414).

    Args:
        first: Shape (N, h).
        second: Shape (N, k).
    """
    first, second = first - first.mean(0), second - second.mean(0)
    return float((first.T @ second).square().sum() / ((first.T @ first).norm() * (second.T @ second).norm()).clamp(min=1e-30))
