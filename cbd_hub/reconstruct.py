"""Layer-wise reconstruction: a cut's FFN outputs fitted, by least squares, so that its residual stream is the whole model's again. No training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cbd_hub.cut import equal_batches
from cbd_hub.errors import ArgumentError
from cbd_hub.evaluation import Documents
from cbd_hub.families import family_of
from cbd_hub.interpolation.live import frozen, hooks
from cbd_hub.interpolation.plan import Plan, Term
from cbd_hub.losses.hidden import LeastSquares, inverse_square
from cbd_hub.precision import products
from cbd_hub.shapes import check_positions, shape_of


TOKENS = 16384  # on 4,096 there is 40 to 90% of the gain (benchmarks/quality/README.md)
Target = Literal["stream", "layer"]
_Call = tuple[tuple[Any, ...], dict[str, Any]]
_RIDGE, _NOISE = 0.3, 4096  # of each neuron's own square; the second over the positions


def reconstruct(
    student: Any, teacher: Any, plan: Plan, documents: Documents, *, target: Target = "stream", bf16: bool = True
) -> dict[str, Tensor]:
    """Fit what the FFN of each layer of a cut writes, so that the layers and neurons that are gone are missed less.

    Layer by layer, from the first on. With ``A`` the FFN's activations in the cut, ``R`` what its residual stream lacks of the whole model's as that goes into the
    next kept layer, and ``w`` one over the mean square of that stream at a position (the next norm divides by it), the output weight ``W`` becomes ``W + D``::

        D = argmin  sum w |R - D A|^2 + sum_k g_k |D_k|^2,   g_k = (0.3 + 4096 / positions) sum w A_k^2
          = (sum w R A^T) (sum w A A^T + diag g)^-1

    The ridge ``g`` holds each neuron to what it wrote before, without which D would be learned by heart, of a short text above all. The FFN before layers that were dropped makes up for these;
    attention, norms and what the FFN reads stay. A bias is fitted along with the weight, without a ridge. Through a post-norm, R is taken back to first order in D.
    Such a regression for the channels of one layer is that of He et al. (https://huggingface.co/papers/1707.06168); with the stream of the whole model as its target it
    reaches over dropped layers and makes up for what earlier layers lost.

    Args:
        student: The cut; its weights are changed.
        teacher: The model that it was cut from.
        plan: The cut's plan.
        documents: Text to fit on; what is judged by the outcome should be other text.
        target: ``"stream"``: as above. ``"layer"``: R is what a layer of the cut lacks of the whole model's same layer on the same input, so that it makes up for its own
            neurons and heads alone. Anchors of a chain begin so: what makes up for whole layers is in the way where these come back in between. The hidden width has to be the
            whole model's.
        bf16: Whether products of the forward passes run in bf16.

    Returns:
        What was fitted, in fp32, by checkpoint keys.

    Raises:
        ArgumentError: If a document is longer than the model has positions, or the target is not known or does not go with a narrower cut.
    """
    check_target(target, plan.shape.hidden, shape_of(teacher.config).hidden)
    longest = max(len(ids) for ids in documents.ids)
    check_positions(longest, teacher.config, f"a row of {longest:,} tokens")
    student.to(teacher.device)
    family = family_of(student.config)
    spec, dim = family.input_of(family.ffn_input)
    parameters, fitted = family.parameters(student), {}
    places = [*plan.layers[1:], shape_of(teacher.config).layers]  # where the whole model's stream goes into the next kept layer
    with frozen(student, teacher), products(teacher.device, bf16=bf16):
        batches = list(equal_batches(documents))
        streams = list(zip(_streams(student, batches), _streams(teacher, batches)))
        for layer, block in enumerate(student.get_submodule(family.blocks)):
            names = [spec.name.format(layer=layer), spec.name.removesuffix("weight").format(layer=layer) + "bias"]
            fit = _Fit(block.get_submodule(family.ffn_input), *((block.get_submodule(family.post_norms[-1]), family.norm_offset) if family.post_norms else (None, 0.0)))
            for cut, whole in streams:
                if target == "layer":
                    wanted = replace(whole, hidden=cut.hidden, place=plan.layers[layer]).next().float()
                else:
                    whole.to(places[layer])
                    wanted = _channels(whole.hidden, plan.tensors[names[0]][0], 1 - dim)
                fit.add(cut, wanted)
            for name, change in zip(names, fit.changes(dim)):
                fitted[name] = parameters[name].float() + change
                parameters[name].copy_(fitted[name])
            for cut, _ in streams:
                cut.to(layer + 1)
    return fitted


def check_target(target: Any, hidden: int, whole: int) -> None:
    """Refuse what is no target, or none for a cut of that hidden width.

    Raises:
        ArgumentError: Naming those that are.
    """
    if target not in get_args(Target):
        raise ArgumentError(f"reconstruct={target!r} is not known; use {' or '.join(get_args(Target))}, or None (on the command line none)")
    if target == "layer" and hidden != whole:
        raise ArgumentError(f"reconstruct='layer' compares layers one by one, and hidden={hidden} is another width than the whole model's {whole}; use stream or none")


def _channels(stream: Tensor, term: Term, dim: int) -> Tensor:
    """The whole model's residual stream, shape (B, T, H), in the cut's channels and at its scale, as the plan's term has it that writes into it."""
    take = next((take for take in term.takes if take.dim == dim), None)
    chosen = stream if take is None else stream[..., torch.from_numpy(take.index).to(stream.device)]
    return term.weight * chosen.float()


@dataclass
class _Stream:
    """The residual stream of a batch, block by block.

    Attributes:
        blocks: The model's blocks.
        calls: What its own forward pass calls each block with beside hidden states.
        hidden: Shape (B, T, H), before the block at `place`.
        place: The block that comes next.
    """

    blocks: Sequence[Any]
    calls: Sequence[_Call]
    hidden: Tensor
    place: int = 0

    def next(self) -> Tensor:
        """The stream after the block that comes next."""
        args, kwargs = self.calls[self.place]
        output = self.blocks[self.place](self.hidden, *args, **kwargs)
        after: Tensor = output[0] if isinstance(output, tuple) else output
        return after

    def to(self, place: int) -> None:
        """Go on to where the block at a place comes next."""
        while self.place < place:
            self.hidden = self.next()
            self.place += 1


class _Embedded(Exception):
    """Stops a forward pass before the first block."""


def _streams(model: Any, batches: Sequence[Tensor]) -> list[_Stream]:
    """The streams of batches of token ids, shape (B, T) each, before the first block; what blocks are called with is found by one whole forward pass for each shape."""
    found: list[_Stream] = []
    known: dict[torch.Size, _Stream] = {}
    for ids in batches:
        found.append(_stream(model, ids, known.get(ids.shape)))
        known.setdefault(ids.shape, found[-1])
    return found


def _stream(model: Any, ids: Tensor, alike: _Stream | None) -> _Stream:
    """One of them; of a batch of the same shape as another it is known what blocks are called with."""
    blocks = list(model.get_submodule(family_of(model.config).blocks))
    calls: list[_Call] = []
    hidden: list[Tensor] = []

    def on_block(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(("hidden_states",), args)), **kwargs}
        hidden.append(given.pop("hidden_states"))
        calls.append((args[1:], given))
        if alike is not None:
            raise _Embedded

    with hooks() as handles, suppress(_Embedded):
        handles += [block.register_forward_pre_hook(on_block, with_kwargs=True) for block in blocks]
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
    return _Stream(blocks, calls if alike is None else alike.calls, hidden[0])


class _Fit:
    """The regression of one layer.

    Args:
        module: The linear module whose weight is fitted.
        norm: The norm that its output goes through before it is added to the stream, or None.
        offset: What that adds to its stored weight.
    """

    def __init__(self, module: Any, norm: Any, offset: float) -> None:
        self._module, self._norm, self._offset = module, norm, offset
        self._positions = 0
        self._squares: LeastSquares | None = None

    def add(self, stream: _Stream, wanted: Tensor) -> None:
        """One batch more.

        Args:
            stream: The cut's, before the layer.
            wanted: What it should be after it, shape (B, T, H).
        """
        seen: list[Tensor] = []

        def keep(_: Any, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0].float().flatten(0, -2))

        with hooks() as handles:
            handles += [module.register_forward_pre_hook(keep) for module in (self._module, self._norm) if module is not None]
            lack = (wanted - stream.next().float()).flatten(0, -2)
        weight = inverse_square(wanted.flatten(0, -2))
        if self._norm is not None:  # output = gain y / |y|: a change dy moves it by gain dy / |y|, but for what |y| itself changes; where gain is 0 nothing moves it
            gain, square = self._norm.weight.float() + self._offset, inverse_square(seen[1])
            lack = torch.where(gain == 0, 0.0, lack / gain) * square.rsqrt()
            weight = weight * square
        self._positions += len(lack)
        if self._squares is None:
            self._squares = LeastSquares(seen[0].shape[1], lack.shape[1], products=torch.float32)
        self._squares.add(seen[0], lack, weight)

    def changes(self, dim: int) -> list[Tensor]:
        """What is added to the weight, whose dimension ``dim`` is its input, and to the bias where there is one."""
        assert self._squares is not None
        biased = getattr(self._module, "bias", None) is not None
        weight, bias = self._squares.solve(ridge=_RIDGE + _NOISE / self._positions, each=True, bias=biased)
        found = [weight.movedim(1, dim), *([bias] if biased else [])]
        return [change.to(self._module.weight.device, torch.float32) for change in found]
