"""Changes of low rank put through a plan's terms, and back.

The change of a stored weight by a LoRA of rank r is ``dW = s L R`` with L of shape (rows, r) and R of shape (r, columns): L = B and R = A of a linear module,
L = A^T and R = B^T where the weight is stored (in, out) and of an embedding; s = alpha / r, or alpha / sqrt(r) (rsLoRA). A term of a plan makes
``w P W Q^T`` of a weight, where P and Q select, average and turn its rows and its columns. What a plan makes of a change is therefore

    sum_t w_t P_t (s L R) Q_t^T  =  s sum_t w_t (P_t L) (R Q_t^T):

selections and maps of the rows act on L alone, those of the columns on R alone. Terms come as products of stretches i of the rows and j of the columns, with
weights w_ij. Where ``w_ij = u_i v_j``, as in every plan of one anchor, the result has the same rank and is

    s (sum_i u_i P_i L) (sum_j v_j R Q_j^T).

Otherwise stretches whose weights are multiples of each other are joined, of the rows or of the columns, whichever makes fewer, and ranks are concatenated. Both are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cbd_hub.interpolation.execute import select, turned
from cbd_hub.interpolation.plan import Take, Term, Turn


@dataclass(frozen=True, eq=False)
class LowRank:
    """A scaled product of two factors, in the orientation of the stored weight.

    Attributes:
        left: Shape (rows, rank).
        right: Shape (rank, columns).
        scale: The factor on their product.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Columns of the left factor."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """The scaled product, shape (rows, columns)."""
        return self.left @ self.right * self.scale

    def added_to(self, weight: Tensor) -> Tensor:
        """A weight with the change added in place, in the weight's own precision."""
        return weight.addmm_(self.left.to(weight.dtype), self.right.to(weight.dtype), alpha=self.scale)


_Part = Take | None  # None: the whole dimension, as it is


@dataclass(frozen=True, eq=False)
class _Grid:
    """Terms of one source as a product of parts of its two dimensions.

    Attributes:
        parts: Those of the rows and those of the columns.
        weights: The terms' weights, shape (parts of the rows, parts of the columns).
        turns: What is done to the source before.
    """

    parts: tuple[list[_Part], list[_Part]]
    weights: np.ndarray
    turns: tuple[Turn, ...]

    @classmethod
    def of(cls, terms: Sequence[Term]) -> _Grid:
        """The grid of terms that have one source and the same turns."""
        found: tuple[dict[object, int], dict[object, int]] = ({}, {})
        parts: tuple[list[_Part], list[_Part]] = ([], [])
        places = []
        for term in terms:
            place: list[int] = []
            for dim in (0, 1):
                take = next((take for take in term.takes if take.dim == dim), None)
                key = None if take is None else (take.start, take.spread, take.index.tobytes())
                if key not in found[dim]:
                    found[dim][key] = len(parts[dim])
                    parts[dim].append(take)
                place.append(found[dim][key])
            places.append(tuple(place))
        weights = np.zeros((len(parts[0]), len(parts[1])))
        for place_of, term in zip(places, terms):
            weights[place_of] += term.weight
        return cls(parts, weights, terms[0].turns)


def _multiples(weights: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs (u, v) whose outer products sum to the weights: one for each class of rows that are multiples of each other."""
    classes: list[tuple[np.ndarray, np.ndarray]] = []
    for row, values in enumerate(weights):
        if not values.any():
            continue
        for factors, first in classes:
            at = int(np.argmax(np.abs(first)))
            if np.allclose(values, values[at] / first[at] * first, rtol=1e-12, atol=0.0):
                factors[row] = values[at] / first[at]
                break
        else:
            factors = np.zeros(len(weights))
            factors[row] = 1.0
            classes.append((factors, values))
    return classes


def factorised(weights: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs (u, v) with ``weights = sum of outer(u, v)``, as few as rows or columns that are multiples of each other allow.

    Example:
        >>> len(factorised(np.array([[1.0, 0.5], [2.0, 1.0]]))), len(factorised(np.array([[1.0, 0.5], [2.0, 2.0]])))
        (1, 2)
    """
    by_rows, by_columns = _multiples(weights), _multiples(weights.T)
    return by_rows if len(by_rows) <= len(by_columns) else [(v, u) for u, v in by_columns]


def _placed(factor: Tensor, dim: int, parts: list[_Part], weights: np.ndarray, length: int) -> Tensor:
    """The weighted parts of a factor at their places along a dimension of the given length."""
    if parts == [None]:
        return factor if weights[0] == 1.0 else factor * float(weights[0])
    shape = list(factor.shape)
    shape[dim] = length
    target = factor.new_zeros(shape)
    for take, weight in zip(parts, weights):
        if take is None:
            target += factor * float(weight)
        elif weight:
            target.narrow(dim, take.start, take.length).add_(select(factor, (take,)), alpha=float(weight))
    return target


def carried(terms: Sequence[Term], changes: Mapping[str, LowRank], shape: tuple[int, int]) -> LowRank | None:
    """What a plan's terms make of the changes of their sources.

    Args:
        terms: Terms of one target tensor, all of one anchor.
        changes: Source tensor -> its change; a source without one has none.
        shape: Shape of the target.

    Returns:
        The change of the target; None where no source has one.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[Term]] = {}
    for term in terms:
        if term.tensor in changes:
            groups.setdefault((term.tensor, tuple(map(id, term.turns))), []).append(term)
    if not groups:
        return None
    lefts, rights, scale = [], [], changes[next(iter(groups))[0]].scale
    for (name, _), group in groups.items():
        grid, change = _Grid.of(group), changes[name]
        left, right = (turned(factor, tuple(turn for turn in grid.turns if turn.dim == dim)) for dim, factor in enumerate((change.left, change.right)))
        for rows, columns in factorised(grid.weights):
            lefts.append(_placed(left, 0, grid.parts[0], rows if change.scale == scale else rows * (change.scale / scale), shape[0]))
            rights.append(_placed(right, 1, grid.parts[1], columns, shape[1]))
    if not lefts:  # all weights are zero
        first = changes[next(iter(groups))[0]]
        return LowRank(first.left.new_zeros(shape[0], first.rank), first.right.new_zeros(first.rank, shape[1]), scale)
    return LowRank(torch.cat(lefts, 1), torch.cat(rights, 0), scale) if len(lefts) > 1 else LowRank(lefts[0], rights[0], scale)


def carried_back(terms: Sequence[Term], change: LowRank, shape: tuple[int, int]) -> LowRank:
    """The change of the source of which a plan's terms make the given one, zero in units of the source that the target lacks.

    Weights are divided out and orthogonal maps transposed. Where a weight is 0 nothing can be divided out, and the change stays as it is.

    Args:
        terms: Terms of one target tensor, all of one source and with weights that factor into rows and columns.
        change: The change of the target.
        shape: Shape of the source.
    """
    grid = _Grid.of(terms)
    factors = factorised(grid.weights)
    if len(factors) > 1:
        raise ValueError("the weights do not factor into rows and columns")
    rows, columns = factors[0] if factors else (np.ones(len(grid.parts[0])), np.ones(len(grid.parts[1])))
    return LowRank(_taken_back(change.left, 0, grid, rows, shape[0]), _taken_back(change.right, 1, grid, columns, shape[1]), change.scale)


def _taken_back(factor: Tensor, dim: int, grid: _Grid, weights: np.ndarray, length: int) -> Tensor:
    """A factor in the source's coordinates along one dimension."""
    parts = [(take, float(weight)) for take, weight in zip(grid.parts[dim], weights)]
    if len(parts) == 1 and parts[0][0] is None:
        target = factor if parts[0][1] in (0.0, 1.0) else factor / parts[0][1]
    else:
        shape = list(factor.shape)
        shape[dim] = length
        target = factor.new_zeros(shape)
        means = {take.start: (take, weight) for take, weight in parts if take is not None and take.spread}
        plain = [(take, weight) for take, weight in parts if take is not None and not take.spread]
        for take, weight in sorted(plain, key=lambda part: part[0].start in means):  # means are of what stands without one
            piece = factor.narrow(dim, take.start, take.length)
            if take.start in means:
                mean, share = means[take.start]
                piece = piece - share * select(target, (mean,))
            target.index_copy_(dim, torch.from_numpy(take.index), piece if weight in (0.0, 1.0) else piece / weight)
    return turned(target, tuple(_undone(turn) for turn in reversed(grid.turns) if turn.dim == dim))


def _undone(turn: Turn) -> Turn:
    """The turn that undoes one; a map of blocks is orthogonal."""
    return Turn(turn.dim, 1 / turn.factor if turn.factor.dim() == 1 else turn.factor.mT)
