"""A smaller model cut from a larger one where it hurts least, by importance measured on calibration text."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cbd_hub.errors import SizeError
from cbd_hub.evaluation import Documents, document_losses
from cbd_hub.families import family_of
from cbd_hub.interpolation.blend import blend_plan
from cbd_hub.interpolation.execute import combine
from cbd_hub.interpolation.live import Between, frozen, hooks
from cbd_hub.interpolation.plan import Kept, Plan, Segment
from cbd_hub.manifest import Mix, Shape
from cbd_hub.precision import products
from cbd_hub.shapes import check_cut, count, fill_ffn, shape_of
from cbd_hub.sizes import format_size
from cbd_hub.weights import LOADING


_DEPTHS = (1.0, 0.9, 0.8, 0.75, 0.7, 0.6, 0.5)  # shares of the layers that are tried
_MEETS, _NEAR = 0.005, 0.01  # how far a cut may be from its size, as a share of it; the second where no cut is nearer


@dataclass(frozen=True)
class Importance:
    """How much each unit of a model matters on a text.

    Attributes:
        layers: Block influence of each layer, 1 - cosine of its input and output, shape (layers,)
            (ShortGPT, https://huggingface.co/papers/2403.03853).
        ffn: Root mean square of each FFN neuron's activation times the norm of what it writes, shape (layers, ffn)
            (as Wanda weighs inputs, https://huggingface.co/papers/2306.11695).
        heads: Root mean square of what each head writes into the residual stream, shape (layers, heads).
        hidden: Mean |value| of each residual channel after the norms, summed over them, shape (hidden,)
            (Minitron, https://huggingface.co/papers/2407.14679).
        kv_heads: Groups that the heads form.
    """

    layers: np.ndarray
    ffn: np.ndarray
    heads: np.ndarray
    hidden: np.ndarray
    kv_heads: int

    def kept(self, shape: Shape) -> Kept:
        """The map to a model of a shape: the most influential layers, and on each axis that is cut the units in falling importance.

        Heads that share a kv head stay together, ordered by the sum of their importance; an axis that is not cut keeps its order.
        """
        strongest = np.sort(np.argsort(-self.layers, kind="stable")[: shape.layers])
        ffn = np.argsort(-self.ffn, axis=1, kind="stable")
        if shape.ffn == ffn.shape[1]:
            ffn = np.tile(np.arange(shape.ffn), (len(ffn), 1))
        return Kept(
            strongest, ffn, self._heads() if shape.heads < self.heads.shape[1] else None,
            np.argsort(-self.hidden, kind="stable") if shape.hidden < len(self.hidden) else None,
        )

    def _heads(self) -> np.ndarray:
        layers, heads = self.heads.shape
        groups = self.heads.reshape(layers, self.kv_heads, -1)
        within = np.argsort(-groups, axis=2, kind="stable")
        within += np.arange(0, heads, groups.shape[2])[:, None]
        order = np.argsort(-groups.sum(2), axis=1, kind="stable")
        return np.take_along_axis(within, order[:, :, None], axis=1).reshape(layers, heads)

    def order(self, kept: Kept) -> list[int]:
        """The layers that a cut dropped, the most influential first."""
        return sorted(kept.dropped, key=lambda layer: -float(self.layers[layer]))


def measure_importance(model: Any, documents: Documents, *, bf16: bool = True) -> Importance:
    """Importance of a model's layers, FFN neurons, heads and residual channels on a text.

    Args:
        model: A transformers model with an axis table.
        documents: Calibration text; a few thousand tokens are enough.
        bf16: Whether products run in bf16.

    Returns:
        The importance.

    Raises:
        ArgumentError: If a document is longer than the model has positions.
        DataError: If one holds a token for which the model has no row.
    """
    documents.check(model.config)
    family, shape = family_of(model.config), shape_of(model.config)
    blocks = list(model.get_submodule(family.blocks))
    weights = family.parameters(model)
    influence = np.zeros(shape.layers)
    ffn, heads = np.zeros((shape.layers, shape.ffn)), np.zeros((shape.layers, shape.heads))
    hidden = np.zeros(shape.hidden)
    positions = 0

    def written(module: str, layer: int) -> Tensor:
        """What each input of a module writes into the residual stream: shape (inputs, hidden)."""
        spec, dim = family.input_of(module)
        return weights[spec.name.format(layer=layer)].detach().float().movedim(dim, 0)

    def on_block(layer: int) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            influence[layer] += float((1 - F.cosine_similarity(inputs[0].float(), after.float(), dim=-1)).cpu().double().sum())
        return hook

    def on_ffn(layer: int) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            ffn[layer] += _sum(inputs[0].float().square())
        return hook

    def on_heads(layer: int) -> Any:
        output = written(family.heads_input, layer).unflatten(0, (shape.heads, shape.head_size))
        gram = output @ output.mT  # |x W|^2 = x (W W^T) x^T, shape (heads, head_size, head_size)

        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].float().unflatten(-1, (shape.heads, shape.head_size)).transpose(-2, -3)
            squares = ((values @ gram) * values).sum(-1)
            heads[layer] += _sum(squares.clamp(min=0).transpose(-1, -2))
        return hook

    def on_norm(_: Any, __: Any, output: Tensor) -> None:
        hidden[:] += _sum(output.abs())

    norms = {spec.name.removesuffix(".weight") for spec in family.tensors if family.norm_of(spec) == "weight"}
    names = {norm.format(layer=layer) for norm in norms for layer in range(shape.layers)}
    with frozen(model), hooks() as handles:
        for layer, block in enumerate(blocks):
            handles += [
                block.register_forward_hook(on_block(layer)),
                block.get_submodule(family.ffn_input).register_forward_pre_hook(on_ffn(layer)),
                block.get_submodule(family.heads_input).register_forward_pre_hook(on_heads(layer)),
            ]
        handles += [model.get_submodule(name).register_forward_hook(on_norm) for name in sorted(names)]
        for ids in equal_batches(documents):  # no padding: every position counts
            positions += ids.numel()
            with products(model.device, bf16=bf16):
                model.base_model(input_ids=ids.to(model.device), use_cache=False)
    norm = np.stack([written(family.ffn_input, layer).cpu().double().norm(dim=1).numpy() for layer in range(shape.layers)])
    return Importance(influence / positions, np.sqrt(ffn / positions) * norm, np.sqrt(heads / positions), hidden / positions, shape.kv_heads)


def _sum(values: Tensor) -> np.ndarray:
    """Sum over all but the last dimension."""
    total: np.ndarray = values.float().flatten(0, -2).sum(0).cpu().double().numpy()
    return total


def equal_batches(documents: Documents) -> Iterator[Tensor]:
    """Token ids of documents of equal length together, at most 16 at a time: shape (B, T)."""
    by_length: dict[int, list[Tensor]] = {}
    for ids in documents.ids:
        by_length.setdefault(len(ids), []).append(ids)
    for _, group in sorted(by_length.items()):
        for start in range(0, len(group), 16):
            yield torch.stack(group[start : start + 16])


def cut_plan(name: str, shape: Shape, model: Any, kept: Kept, layers: list[int] | None = None) -> Plan:
    """The plan of a cut: kept layers, and the first FFN neurons, heads and channels in order of importance, all from the one model.

    Norm weights are multiplied by the square root of how much narrower the residual stream becomes, and eps by as much (see `blend_plan`): channels
    that are 0 are cut without a change.

    Args:
        name: Name of the model in the plan's terms.
        shape: The shape to cut to.
        model: The model.
        kept: Layers that stay, and the order of all other units.
        layers: Further layers that stay.

    Raises:
        ArgumentError: If the shape is no cut of the model.
        ArchitectureError: If the architecture cannot have it.
    """
    check_cut(shape, shape_of(model.config), model.config)
    segment = Segment("", name, shape.model_copy(update={"layers": len(kept.layers)}), shape_of(model.config), kept, layers or [], model.config)
    return blend_plan(segment, shape, Mix(alpha=0.0))


def cut_model(model: Any, plan: Plan) -> Any:
    """A model of its own, made by a cut's plan from the model's parameters."""
    config = plan.config(model.config)
    live = {plan.large: {name: tensor.detach() for name, tensor in family_of(config).parameters(model).items()}}
    state = {name: combine(terms, live).clone() for name, terms in plan.tensors.items()}
    with LOADING:
        made = type(model).from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    way = copy.deepcopy(model.generation_config)
    with suppress(ValueError):  # of settings that contradict each other, which could not be saved with the cut, it has none
        way.validate(strict=True)
        made.generation_config = way
    return made


def mixes(size: int, config: Any, wish: Shape | None = None) -> list[Shape]:
    """Shapes of a size, each smaller than the whole model, that mix fewer layers and narrower FFN; at least one.

    They keep a few shares of the layers; where all of these are too deep for the size, of as many layers as are not. Where layers and FFN come in
    too coarse steps to meet the size within 0.5%, it is the nearest shape within 1%.

    Raises:
        SizeError: If the model cannot be cut to that size in layers and FFN, naming the nearest to which it can.
    """
    if wish is not None:
        return [wish]
    whole = shape_of(config)
    tried: dict[int, tuple[int, Shape]] = {}  # depth -> how far its shape is from the size, and the shape

    def at(depth: int) -> tuple[int, Shape] | None:
        if depth not in tried and (shape := _narrowed(size, depth, config)) is not None:
            tried[depth] = abs(count(shape, config) - size), shape
        return tried.get(depth)

    for deepest in range(whole.layers, 0, -1):
        depths = dict.fromkeys(max(1, round(share * deepest)) for share in _DEPTHS)
        if found := [made[1] for depth in depths if (made := at(depth)) is not None and made[0] <= _MEETS * size]:
            return found
    away, nearest = min(tried.values(), key=lambda made: made[0], default=(0, None))
    if nearest is not None and away <= _NEAR * size:
        return [nearest]
    real = 0 if nearest is None else count(nearest, config)
    raise SizeError(
        f"a model of {format_size(count(whole, config))} cannot be cut to {format_size(size)} ({size:,} parameters) in layers and FFN width; "
        + (f"the nearest that it can be cut to has {format_size(real)} ({real:,}): ask for size={real}" if real else "it has one layer of one neuron")
    )


def at_depth(size: int, layers: int, config: Any) -> Shape | None:
    """The shape of so many layers with the FFN that makes up a size; None where they and no FFN meet it within 0.5%."""
    shape = _narrowed(size, layers, config) if 1 <= layers <= shape_of(config).layers else None
    return shape if shape is not None and abs(count(shape, config) - size) <= _MEETS * size else None


def _narrowed(size: int, layers: int, config: Any) -> Shape | None:
    """The shape of so many layers with the FFN that brings it nearest to a size; None where only the whole model has so many."""
    whole = shape_of(config)
    shape, widest = whole.model_copy(update={"layers": layers}), whole.ffn - (layers == whole.layers)
    return shape.model_copy(update={"ffn": min(fill_ffn(size, shape, config), widest)}) if widest else None


@dataclass(frozen=True)
class Cut:
    """A chosen cut, and what every tried shape lost.

    Attributes:
        plan: The cut.
        kept: Which units stay, in order of importance.
        tried: Loss in nats per token of each shape that was tried as a mere cut.
    """

    plan: Plan
    kept: Kept
    tried: dict[Shape, float]

    @classmethod
    def of(cls, model: Any, shape: Shape, importance: Importance, name: str, kept: Kept | None = None) -> Cut:
        """The cut of a model to a shape, by importance where it is not said which units stay."""
        kept = kept or importance.kept(shape)
        return cls(cut_plan(name, shape, model, kept), kept, {})


def choose_cut(model: Any, size: int, importance: Importance, documents: Documents, *, name: str = "large", wish: Shape | None = None) -> Cut:
    """The cut to a size that loses least on calibration text, untrained.

    Several depths are tried, the FFN filling the rest of the size; then the depths beside the best one. Hidden width and heads are cut only
    where a wished shape says so: they cost more than as many parameters of the FFN.

    Args:
        model: The model to cut.
        size: Parameters wanted.
        importance: Measured on the model.
        documents: Calibration text.
        name: Name of the model in the plan's terms.
        wish: Try this shape alone.

    Returns:
        The cut.

    Raises:
        SizeError: If no cut has that size.
        ArgumentError: If the wished shape is no cut of the model.
        ArchitectureError: If the architecture cannot have it.
    """
    tried: dict[Shape, float] = {}
    between = Between({name: model})

    def loss(shape: Shape) -> float:
        if shape not in tried:
            plan = cut_plan(name, shape, model, importance.kept(shape))
            with frozen(model):
                tried[shape] = document_losses(between.run(plan), documents).mean
        return tried[shape]

    shapes = mixes(size, model.config, wish)
    best = min(shapes, key=loss)
    if len(shapes) > 1:
        beside = [at_depth(size, best.layers + step, model.config) for step in (-1, 1)]
        best = min([best, *(shape for shape in beside if shape is not None)], key=loss)
    return replace(Cut.of(model, best, importance, name), tried=tried)
