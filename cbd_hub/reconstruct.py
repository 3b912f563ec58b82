"""Layer-wise reconstruction: what a cut's attention and FFN write, fitted by least squares so that its residual stream is the whole model's again. No training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cbd_hub.cut import Cut, Importance, at_depth, cut_model, equal_batches
from cbd_hub.errors import ArgumentError, WeightsError
from cbd_hub.evaluation import Documents, model_losses
from cbd_hub.families import family_of
from cbd_hub.interpolation.live import frozen, hooks
from cbd_hub.interpolation.plan import Plan, Term
from cbd_hub.losses.hidden import LeastSquares, inverse_square
from cbd_hub.manifest import Shape
from cbd_hub.precision import products
from cbd_hub.reporting import Progress
from cbd_hub.shapes import shape_of


TOKENS = 16384  # on 4,096 there is 40 to 90% of the gain (benchmarks/quality/README.md)
Target = Literal["stream", "layer"]
_Call = tuple[tuple[Any, ...], dict[str, Any]]
_TRIAL = (1024, 3072)  # tokens on which a shape is fitted and judged when it is tried; fewer do not tell which is better
_EPS = 1e-5  # of a family whose config has none
_GAIN = 0.03  # of the mean square of a post-norm's gains: how small a gain is too small to be made up for by what goes through it
_RIDGE, _NOISE = 0.3, 4096  # of each neuron's own square; the second over the positions


def reconstruct(
    student: Any, teacher: Any, plan: Plan, documents: Documents, *, target: Target = "stream", bf16: bool = True
) -> dict[str, Tensor]:
    """Fit what attention and FFN of each layer of a cut write, so that the layers, heads and neurons that are gone are missed less.

    Layer by layer, from the first on, attention before FFN. With ``A`` what the output projection reads (the heads' outputs, the FFN's activations), ``R`` what the residual stream
    lacks of the whole model's after it (of attention: after that layer's attention; of the FFN: where the stream goes into the next kept layer), and ``w`` one over the mean
    square of the whole model's at a position (RMSNorm divides by it, LayerNorm by nearly the same), the output weight ``W`` becomes ``W + D``::

        D = argmin  sum w |R - D A|^2 + sum_k g_k |D_k|^2,   g_k = (0.3 + 4096 / positions) sum w A_k^2
          = (sum w R A^T) (sum w A A^T + diag g)^-1

    The ridge ``g`` holds each input to what it wrote before, without which D would be learned by heart, of a short text above all. The FFN before layers that were dropped makes up for these;
    norms and what attention and FFN read stay. A bias is fitted along with the weight, without a ridge. Where a norm follows the projection (post-norm: it adds ``gain y / |y|``), R is taken back through its derivative: what
    lies along y cannot be had, channels whose gain is small get only a part, and w is divided by the square of ``|y|``.
    Such a regression for the channels of one layer is that of He et al. (https://huggingface.co/papers/1707.06168); with the stream of the whole model as its target it
    reaches over dropped layers and makes up for what earlier layers lost.

    Args:
        student: The cut; its weights are changed.
        teacher: The model that it was cut from.
        plan: The cut's plan.
        documents: Text to fit on; what is judged by the outcome should be other text.
        target: ``"stream"``: as above. ``"layer"``: R is what a layer of the cut lacks of the whole model's same layer on the same input, so that it makes up for its own
            neurons and heads alone (attention that kept all of its heads stays as it is). Anchors of a chain begin so: what makes up for whole layers is in the way where these
            come back in between. The hidden width has to be the whole model's.
        bf16: Whether products of the forward passes run in bf16.

    Returns:
        What was changed, in fp32, by checkpoint keys.

    Raises:
        DataError: If a document holds a token for which the model has no row.
        ArgumentError: If a document is longer than the model has positions, or the target is not known or does not go with a narrower cut.
        WeightsError: If what is fitted is not finite, as activations then were not.
    """
    whole_shape = shape_of(teacher.config)
    check_target(target, plan.shape.hidden, whole_shape.hidden)
    documents.check(teacher.config)
    student.to(teacher.device)
    family = family_of(student.config)
    parameters, fitted = family.parameters(student), {}
    places = [*plan.layers, whole_shape.layers]
    norms = family.post_norms or (None, None)
    eps = _EPS if family.norm_eps is None else float(getattr(teacher.config, family.norm_eps))
    sites = [_Site(family.ffn_input, norms[-1], True)]
    if target == "stream" or plan.shape.heads < whole_shape.heads:
        sites.insert(0, _Site(family.heads_input, norms[0], False))
    with frozen(student, teacher), products(teacher.device, bf16=bf16):
        batches = list(equal_batches(documents))
        calls: dict[torch.Size, list[_Call]] = {}
        wholes = [_stream(teacher, ids, calls) for ids in batches]
        kept = {shape: [calls[shape][layer] for layer in plan.layers] for shape in calls}
        streams = [(_stream(student, ids, kept), whole) for ids, whole in zip(batches, wholes)]
        for layer, block in enumerate(student.get_submodule(family.blocks)):
            for site in sites:
                spec, dim = family.input_of(site.module)
                names = [spec.name.format(layer=layer), spec.name.removesuffix("weight").format(layer=layer) + "bias"]
                fit = _Fit(block, site, eps, family.norm_offset)
                for cut, whole in streams:
                    if target == "layer":
                        wanted = replace(whole, hidden=cut.hidden, place=places[layer]).at(site).after.float()
                    else:
                        whole.to(places[layer + site.ends])
                        wanted = _channels(whole.hidden if site.ends else whole.at(site).after, plan.tensors[names[0]][0], 1 - dim)
                    fit.add(cut.at(site), wanted)
                for name, change in zip(names, fit.changes(dim)):
                    if not change.isfinite().all():
                        raise WeightsError(f"{name} would come out of the reconstruction with values that are no finite numbers; use float32 weights, or reconstruct=None (on the command line none, in a recipe false)")
                    if change.any():
                        fitted[name] = parameters[name].float() + change
                        parameters[name].copy_(fitted[name])
            for (cut, _), hidden in zip(streams, fit.streams()):  # of the FFN, which ends the layer
                cut.hidden, cut.place = hidden, layer + 1
    return fitted


def choose_reconstructed(
    cut: Cut, model: Any, importance: Importance, documents: Documents, size: int, *, name: str = "large", target: Target = "stream", progress: Progress = lambda line: None
) -> Cut:
    """The cut to a size that loses least once it is reconstructed, found from the one that loses least as it is.

    Layers that are gone are made up for better than neurons, which a choice among mere cuts (`choose_cut`) does not see. Depths around the best one are tried, first a
    tenth of the layers away, then half as far and so on.

    Args:
        cut: Where to begin.
        model: What it is a cut of.
        importance: Measured on the model.
        documents: Text: 1,024 tokens to fit on and 3,072 more to judge by. Where there are fewer nothing is tried: they do not tell one depth from the next.
        size: Parameters wanted.
        name: Name of the model in the plan's terms.
        target: What is fitted to; see `reconstruct`.
        progress: Called with a line for each shape tried.
    """
    if documents.tokens < sum(_TRIAL):
        progress(f"  no other depths are tried with reconstruction: {documents.tokens:,} tokens are less than the {sum(_TRIAL):,} that tell one from the next")
        return cut
    few, rest = documents.first(_TRIAL[0]), documents.after(_TRIAL[0]).first(_TRIAL[1])
    tried: dict[Shape, float] = {}

    def loss(shape: Shape) -> float:
        if shape not in tried:
            plan = Cut.of(model, shape, importance, name).plan
            student = cut_model(model, plan)
            reconstruct(student, model, plan, few, target=target)
            tried[shape] = model_losses(student, rest).mean
            progress(f"  {shape.text:<22}{tried[shape]:.3f} nats per token, reconstructed on {few.tokens:,} tokens")
        return tried[shape]

    best, step = cut.plan.shape, max(1, round(shape_of(model.config).layers / 10))
    while step:
        around = [shape for layers in (best.layers - step, best.layers + step) if (shape := at_depth(size, layers, model.config)) is not None]
        if (other := min([best, *around], key=loss)) == best:
            step //= 2
        best = other
    return replace(Cut.of(model, best, importance, name), tried=cut.tried)


def check_target(target: Any, hidden: int, whole: int) -> None:
    """Refuse what is no target, or none for a cut of that hidden width.

    Raises:
        ArgumentError: Naming those that are.
    """
    if target not in get_args(Target):
        raise ArgumentError(f"reconstruct={target!r} is not known; use {', '.join(get_args(Target))} or none (None in Python)")
    if target == "layer" and hidden != whole:
        raise ArgumentError(f"reconstruct='layer' compares layers one by one, and hidden={hidden} is another width than the whole model's {whole}; use stream or none")


def _channels(stream: Tensor, term: Term, dim: int) -> Tensor:
    """The whole model's residual stream, shape (B, T, H), in the cut's channels and at its scale, as the plan's term has it that writes into it."""
    take = next((take for take in term.takes if take.dim == dim), None)
    chosen = stream if take is None else stream[..., torch.from_numpy(take.index).to(stream.device)]
    return term.weight * chosen.float()


@dataclass(frozen=True)
class _Site:
    """A linear module of a block that writes into the residual stream: its name, that of the norm in between (post-norm) or None, and whether it ends the block."""

    module: str
    norm: str | None
    ends: bool


@dataclass(frozen=True)
class _Written:
    """A batch at a site: what the module read, shape (B, T, width), what it gave, (B, T, H), and the stream after it."""

    read: Tensor
    gave: Tensor
    after: Tensor


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

    def at(self, site: _Site) -> _Written:
        """What happens at a site of the block that comes next."""
        seen: list[Tensor] = []
        block, after = self.blocks[self.place], self.hidden

        def on_module(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.extend(part.reshape(*self.hidden.shape[:2], -1) for part in (inputs[0], output))  # some call it with (B T, width)

        def on_attention(_: Any, __: Any, output: Tensor) -> None:
            seen.append(output.reshape(self.hidden.shape))
            raise _Enough

        with hooks() as handles, suppress(_Enough):
            handles.append(block.get_submodule(site.module).register_forward_hook(on_module))
            if not site.ends:
                handles.append(block.get_submodule(site.norm or site.module).register_forward_hook(on_attention))
            after = self.next()
        return _Written(seen[0], seen[1], after if site.ends else self.hidden + seen[2])

    def to(self, place: int) -> None:
        """Go on to where the block at a place comes next."""
        while self.place < place:
            self.hidden = self.next()
            self.place += 1


class _Enough(Exception):
    """Stops a forward pass where the rest is not needed."""


def _stream(model: Any, ids: Tensor, known: dict[torch.Size, list[_Call]]) -> _Stream:
    """The stream of token ids, shape (B, T), before the first block.

    What blocks are called with is found by one whole forward pass for each shape, where it is not known; the layers of a cut are called as the whole model's are that they were.
    """
    blocks = list(model.get_submodule(family_of(model.config).blocks))
    calls: list[_Call] = []
    hidden: list[Tensor] = []

    def on_block(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(("hidden_states",), args)), **kwargs}
        hidden.append(given.pop("hidden_states"))
        calls.append((args[1:], given))
        if ids.shape in known:
            raise _Enough

    with hooks() as handles, suppress(_Enough):
        handles += [block.register_forward_pre_hook(on_block, with_kwargs=True) for block in blocks]
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
    return _Stream(blocks, known.setdefault(ids.shape, calls), hidden[0])


class _Fit:
    """The regression of one layer's attention or FFN.

    Args:
        block: The layer.
        site: The module whose weight is fitted.
        eps: What norms add to a mean square.
        offset: What a norm adds to its stored weight.
    """

    def __init__(self, block: Any, site: _Site, eps: float, offset: float) -> None:
        self._module = block.get_submodule(site.module)
        self._norm = None if site.norm is None else block.get_submodule(site.norm)
        self._eps, self._offset = eps, offset
        self._batches: list[_Written] = []
        self._positions = 0
        self._squares: LeastSquares | None = None
        self._change: tuple[Tensor, Tensor] | None = None  # of weight (output, input) and bias

    def add(self, batch: _Written, wanted: Tensor) -> None:
        """One batch of the cut's more, and what the stream should be after it, shape (B, T, H)."""
        lack, weight = (wanted - batch.after.float()).flatten(0, -2), inverse_square(wanted.flatten(0, -2), self._eps)
        if self._norm is not None:  # it adds gain y / |y|, which a change of y along y leaves as it is, and one across it moves by gain / |y|: a small gain by next to nothing
            gain, gave = self._norm.weight.float() + self._offset, batch.gave.float().flatten(0, -2)
            square = inverse_square(gave, self._eps)
            unit, squares = gave * square.sqrt(), gain.square()
            lack = lack * gain / (squares + _GAIN * squares.mean()).clamp(min=torch.finfo(torch.float32).tiny)
            lack = (lack - unit * (unit * lack).mean(-1, keepdim=True)) * square.rsqrt()
            weight = weight * square
        self._batches.append(batch)
        self._positions += len(lack)
        if self._squares is None:
            self._squares = LeastSquares(batch.read.shape[-1], lack.shape[1], products=torch.float32)
        self._squares.add(batch.read.flatten(0, -2), lack, weight)

    def changes(self, dim: int) -> list[Tensor]:
        """What is added to the weight, whose dimension ``dim`` is its input, and to the bias where there is one."""
        assert self._squares is not None
        biased = getattr(self._module, "bias", None) is not None
        found = self._squares.solve(ridge=_RIDGE + _NOISE / self._positions, each=True, bias=biased)
        weight, bias = (change.to(self._module.weight.device, torch.float32) for change in found)
        self._change = weight, bias
        return [weight.movedim(1, dim), *([bias] if biased else [])]

    def streams(self) -> Iterator[Tensor]:
        """The stream of each batch after the layer, changed."""
        assert self._change is not None
        for batch in self._batches:
            change = F.linear(batch.read.float(), *self._change)
            if self._norm is not None:
                change = self._norm(batch.gave.float() + change) - self._norm(batch.gave.float())
            yield (batch.after + change).to(batch.after.dtype)
