"""From a plan to tensors: on live parameters with gradients, or lazily from checkpoints with bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cbd_hub.interpolation.plan import Plan, Take, Term, Turn


_CHUNK_ELEMENTS = 2**21  # 8 MiB in fp32


def select(source: Tensor, takes: tuple[Take, ...]) -> Tensor:
    """A tensor after selections along its dimensions, differentiable in it."""
    for take in takes:
        if (run := take.run) is not None:
            source = source.narrow(take.dim, run.start, run.stop - run.start)
        elif take.dim == source.dim() - 1 and not source.requires_grad:  # four times as fast as index_select there
            source = source.gather(-1, torch.from_numpy(take.index).to(source.device).expand(*source.shape[:-1], -1))
        else:
            source = source.index_select(take.dim, torch.from_numpy(take.index).to(source.device))
        if take.spread:
            source = source.mean(take.dim, keepdim=True).expand([take.spread if dim == take.dim else -1 for dim in range(source.dim())])
    return source


def turned(source: Tensor, turns: tuple[Turn, ...]) -> Tensor:
    """A tensor after linear maps along its dimensions, in its own precision, differentiable in it."""
    for turn in turns:
        factor = turn.factor.to(source.device, source.dtype)
        if factor.dim() == 1:
            source = source * factor.view([-1 if dim == turn.dim else 1 for dim in range(source.dim())])
            continue
        rows = source.movedim(turn.dim, -1)
        with torch.autocast(source.device.type, enabled=False):
            if len(factor) == 1:
                rows = rows @ factor[0].T
            else:
                rows = (rows.unflatten(-1, (len(factor), factor.shape[2])).unsqueeze(-2) @ factor.mT).flatten(-3)  # (..., blocks, 1, in)
        source = rows.movedim(-1, turn.dim)
    return source


Box = tuple[tuple[int, int], ...]  # a part of the target: (dim, start) for each dimension that is split


def _boxes(terms: tuple[Term, ...]) -> dict[Box, list[Term]]:
    """Terms grouped by the part of the target they add into."""
    boxes: dict[Box, list[Term]] = {}
    for term in terms:
        boxes.setdefault(tuple((take.dim, take.start) for take in term.takes), []).append(term)
    return boxes


def combine(terms: tuple[Term, ...], parameters: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """A target tensor from live parameters, differentiable in them.

    Args:
        terms: The terms of one target tensor.
        parameters: Anchor name -> checkpoint key -> tensor.

    Returns:
        The weighted sum; the very parameter where a single whole term has weight 1.
    """
    pieces: dict[Box, Tensor] = {}
    for box, group in _boxes(terms).items():
        total: Tensor | None = None
        for term in group:
            piece = select(turned(parameters[term.anchor][term.tensor], term.turns), term.takes)
            piece = piece if term.weight == 1.0 else piece * term.weight
            piece = piece if term.offset == 0.0 else piece + term.offset
            total = piece if total is None else total + piece
        assert total is not None
        pieces[box] = total
    # Boxes are products of stretches: they are joined along the last dimension, then along the one before it.
    while any(pieces):
        rows: dict[Box, list[Tensor]] = {}
        dim = next(iter(pieces))[-1][0]
        for box in sorted(pieces):
            rows.setdefault(box[:-1], []).append(pieces[box])
        pieces = {box: row[0] if len(row) == 1 else torch.cat(row, dim) for box, row in rows.items()}
    return pieces[()]


def materialise(
    terms: tuple[Term, ...], read: Callable[[str, str], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """A target tensor in its own memory: summed in fp32, chunk by chunk, and rounded once.

    Beyond the result it holds a few chunks of 8 MiB and, for a selection along the first dimension, the selected rows.

    Args:
        terms: The terms of the tensor.
        read: (anchor, key) -> a view on its tensor.
        shape: Shape of the target.
        dtype: Dtype of the target. Weights of 1 alone keep every bit where it is the source's.

    Returns:
        The tensor.
    """
    target = torch.empty(shape, dtype=dtype)
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    for box, group in _boxes(terms).items():
        view = target
        for (dim, start), take in zip(box, group[0].takes):
            view = view.narrow(dim, start, take.length)
        sources = [read(term.anchor, term.tensor) for term in group]
        across = [any(turn.dim == 0 for turn in term.turns) for term in group]
        sources = [turned(source.to(precision), term.turns) if whole else source for source, term, whole in zip(sources, group, across)]
        later = [() if whole else term.turns for term, whole in zip(group, across)]
        rows = max(1, _CHUNK_ELEMENTS // max(source[0].numel() for source in (view, *sources)))
        for first in range(0, len(view), rows):
            part = view[first : first + rows]
            pieces = [_rows(source, term.takes, first, len(part), turns) for source, term, turns in zip(sources, group, later)]
            offset = sum(term.offset for term in group)
            if len(pieces) == 1 and group[0].weight == 1.0 and offset == 0.0:
                part.copy_(pieces[0])
                continue
            total = part if dtype == precision else torch.empty(part.shape, dtype=precision)
            torch.mul(pieces[0].to(precision), group[0].weight, out=total)
            for piece, term in zip(pieces[1:], group[1:]):
                total.add_(piece.to(precision), alpha=term.weight)
            if offset:
                total.add_(offset)
            if total is not part:
                part.copy_(total)
    return target


def _rows(source: Tensor, takes: tuple[Take, ...], first: int, length: int, turns: tuple[Turn, ...] = ()) -> Tensor:
    """Rows first to first + length of a source after its turns, none of which is along its rows, and its selections."""
    along_rows = next((take for take in takes if take.dim == 0), None)
    if along_rows is None:
        source = source[first : first + length]
    elif along_rows.spread:
        takes = (replace(along_rows, spread=length), *(take for take in takes if take.dim != 0))
    else:
        source = select(source, (replace(along_rows, index=along_rows.index[first : first + length]),))
        takes = tuple(take for take in takes if take.dim != 0)
    if source.dtype.itemsize < 4 and (turns or any(take.spread for take in takes)):
        source = source.float()
    return select(turned(source, turns), takes)


class LazyTensor:
    """A tensor of a plan that is made when it is asked for: all that transformers' loader needs of a state dict's values."""

    def __init__(self, make: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._make, self.shape, self.dtype = make, torch.Size(shape), dtype

    def __getitem__(self, index: Any) -> Tensor:
        """The tensor, or a part of it."""
        return self._make()[index]

    def get_shape(self) -> list[int]:
        """Its shape, as safetensors' slices give it."""
        return list(self.shape)


def _as_it_is(terms: tuple[Term, ...], read: Callable[[str, str], Tensor], dtype: torch.dtype) -> Tensor | None:
    """The source's own tensor where the target is that, bit for bit."""
    if len(terms) != 1 or not terms[0].plain:
        return None
    source = read(terms[0].anchor, terms[0].tensor)
    return source if source.dtype == dtype else None


def lazy_state_dict(
    plan: Plan, read: Callable[[str, str], Tensor], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, mapped: bool = True
) -> dict[str, LazyTensor]:
    """The plan's tensors by checkpoint key, each made when it is asked for.

    With ``mapped`` a tensor that is an anchor's own, bit for bit, is a view on its file (copied where it is written to), as transformers' own loader gives
    it; unless it stands in two places.
    """
    uses = Counter((term.anchor, term.tensor) for terms in plan.tensors.values() for term in terms)

    def make(name: str) -> Tensor:
        terms = plan.tensors[name]
        found = _as_it_is(terms, read, dtype) if mapped and uses[terms[0].anchor, terms[0].tensor] == 1 else None
        return materialise(terms, read, shapes[name], dtype) if found is None else found

    return {name: LazyTensor(partial(make, name), shapes[name], dtype) for name in plan.tensors}


def stream(
    plan: Plan, read: Callable[[str, str], Tensor], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype,
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Iterator[Tensor]:
    """The plan's tensors one after the other, in the plan's order; the next one is made while one is used.

    What ``changes`` says is added to a tensor in the precision of the sum, so that it is rounded once.
    """

    def make(name: str) -> Tensor:
        if changes is not None and name in changes:
            return changes[name](materialise(plan.tensors[name], read, shapes[name], torch.float64 if dtype == torch.float64 else torch.float32)).to(dtype)
        found = _as_it_is(plan.tensors[name], read, dtype)
        return materialise(plan.tensors[name], read, shapes[name], dtype) if found is None else found

    with ThreadPoolExecutor(1) as pool:
        ahead: Future[Tensor] | None = None
        for name in plan.tensors:
            made, ahead = ahead, pool.submit(make, name)
            if made is not None:
                yield made.result()
        if ahead is not None:
            yield ahead.result()
