"""A smaller model cut from a larger one where it hurts least, by importance measured on calibration text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cbd_hub.errors import ArgumentError, SizeError
from cbd_hub.evaluation import Documents, document_losses
from cbd_hub.families import family_of
from cbd_hub.interpolation.execute import combine
from cbd_hub.interpolation.live import Between, frozen
from cbd_hub.interpolation.planner import Kept, Plan, Segment, blend_plan
from cbd_hub.manifest import Mix, Shape
from cbd_hub.shapes import config_for, count, fill_ffn, shape_of
from cbd_hub.sizes import format_size
from cbd_hub.weights import LOADING


_DEPTHS = (1.0, 0.9, 0.8, 0.75, 0.7, 0.6, 0.5)  # shares of the layers that are tried


@dataclass(frozen=True)
class Importance:
    """How much each unit of a model matters on a text.

    Attributes:
        layers: Block influence of each layer, 1 - cosine of its input and output, shape (layers,)
            (ShortGPT, https://huggingface.co/papers/2403.03853).
        ffn: Mean |activation| of each FFN neuron times the norm of what it writes, shape (layers, ffn).
    """

    layers: np.ndarray
    ffn: np.ndarray

    def kept(self, depth: int) -> Kept:
        """The map to a model of so many layers: the most influential ones, neurons in falling importance."""
        strongest = np.argsort(-self.layers, kind="stable")[:depth]
        return Kept(np.sort(strongest), np.argsort(-self.ffn, axis=1, kind="stable"))

    def order(self, kept: Kept) -> list[int]:
        """The layers that a cut dropped, the most influential first."""
        return sorted(kept.dropped, key=lambda layer: -float(self.layers[layer]))


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure_importance(model: Any, documents: Documents, *, bf16: bool = True) -> Importance:
    """Importance of a model's layers and FFN neurons on a text.

    Args:
        model: A transformers model with an axis table.
        documents: Calibration text; a few thousand tokens are enough.
        bf16: Whether products run in bf16.

    Returns:
        The importance.
    """
    family = family_of(model.config)
    blocks = list(model.get_submodule(family.blocks))
    spec, dim = family.output_of_ffn()
    influence = np.zeros(len(blocks))
    activation = [torch.zeros(()) for _ in blocks]
    positions = 0

    def on_block(index: int) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            influence[index] += float((1 - F.cosine_similarity(inputs[0].float(), after.float(), dim=-1)).double().sum())
        return hook

    def on_ffn(index: int) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            activation[index] = activation[index] + inputs[0].float().abs().flatten(0, -2).sum(0).double().cpu()
        return hook

    handles = [block.register_forward_hook(on_block(index)) for index, block in enumerate(blocks)]
    handles += [block.get_submodule(family.ffn_input).register_forward_pre_hook(on_ffn(index)) for index, block in enumerate(blocks)]
    with frozen(model), _hooks(handles):
        for ids in _equal_batches(documents):  # no padding: every position counts
            positions += ids.numel()
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
                model.base_model(input_ids=ids.to(model.device), use_cache=False)
    weights = dict(model.named_parameters())
    ffn = []
    for index, total in enumerate(activation):
        weight = weights[spec.name.format(layer=index)].detach().double().cpu()
        norm = weight.norm(dim=[other for other in range(weight.dim()) if other != dim])
        ffn.append((total / positions * norm).numpy())
    return Importance(influence / positions, np.stack(ffn))


def _equal_batches(documents: Documents) -> Iterator[Tensor]:
    """Documents of equal length together, at most 16 at a time."""
    by_length: dict[int, list[Tensor]] = {}
    for ids in documents.ids:
        by_length.setdefault(len(ids), []).append(ids)
    for _, group in sorted(by_length.items()):
        for start in range(0, len(group), 16):
            yield torch.stack(group[start : start + 16])


def cut_plan(name: str, shape: Shape, model: Any, kept: Kept, layers: list[int] | None = None) -> Plan:
    """The plan of a cut: kept layers and the first FFN neurons in order of importance, all from the one model.

    Args:
        name: Name of the model in the plan's terms.
        shape: The shape to cut to.
        model: The model.
        kept: Layers that stay, and the order of the neurons.
        layers: Further layers that stay.
    """
    segment = Segment("", name, shape.model_copy(update={"layers": len(kept.layers)}), shape_of(model.config), kept, layers or [], model.config)
    return blend_plan(segment, shape, Mix(alpha=0.0))


def cut_model(model: Any, plan: Plan) -> Any:
    """A model of its own, made by a cut's plan from the model's parameters."""
    config = config_for(plan.shape, model.config, list(plan.layers))
    live = {plan.large: {name: tensor.detach() for name, tensor in model.named_parameters()}}
    state = {name: combine(terms, live).clone() for name, terms in plan.tensors.items()}
    with LOADING:
        return type(model).from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)


def mixes(size: int, model: Any, wish: Shape | None = None) -> list[Shape]:
    """Shapes of a size that mix fewer layers and narrower FFN; at least one.

    Raises:
        SizeError: If the model cannot be cut to that size in layers and FFN.
    """
    whole = shape_of(model.config)
    if wish is not None:
        return [wish]
    found: dict[int, Shape] = {}
    for share in _DEPTHS:
        shape = whole.model_copy(update={"layers": max(1, round(share * whole.layers))})
        width = min(fill_ffn(size, shape, model.config), whole.ffn)
        shape = shape.model_copy(update={"ffn": width})
        if abs(count(shape, model.config) - size) <= 0.005 * size:
            found[shape.layers] = shape
    if not found:
        smallest = count(whole.model_copy(update={"layers": 1, "ffn": 1}), model.config)
        raise SizeError(
            f"a model of {format_size(count(whole, model.config))} cannot be cut to {format_size(size)} in layers and FFN width; "
            f"its embeddings and one layer alone have {format_size(smallest)}: ask for a size well between these"
        )
    return list(found.values())


@dataclass(frozen=True)
class Cut:
    """A chosen cut, and what every tried shape lost.

    Attributes:
        plan: The cut.
        kept: Which units stay, in order of importance.
        tried: Loss in nats per token of each shape that was tried, untrained.
    """

    plan: Plan
    kept: Kept
    tried: dict[Shape, float]

    @classmethod
    def of(cls, model: Any, shape: Shape, importance: Importance, name: str) -> Cut:
        """The cut of a model to a shape."""
        kept = importance.kept(shape.layers)
        return cls(cut_plan(name, shape, model, kept), kept, {})


def choose_cut(model: Any, size: int, importance: Importance, documents: Documents, *, name: str = "large", wish: Shape | None = None) -> Cut:
    """The cut to a size that loses least on calibration text, untrained.

    Several depths are tried, the FFN filling the rest of the size; then the depths beside the best one.

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
    """
    whole = shape_of(model.config)
    tried: dict[Shape, float] = {}
    between = Between({name: model})

    def loss(shape: Shape) -> float:
        if shape not in tried:
            plan = cut_plan(name, shape, model, importance.kept(shape.layers))
            with frozen(model):
                tried[shape] = document_losses(between.run(plan), documents).mean
        return tried[shape]

    shapes = mixes(size, model, wish)
    for shape in shapes:
        for field in Shape.model_fields:
            larger = getattr(shape, field) > getattr(whole, field)
            if larger or (field not in ("layers", "ffn") and getattr(shape, field) != getattr(whole, field)):
                raise ArgumentError(f"shape {field}={getattr(shape, field)} cannot be cut from a model with {field}={getattr(whole, field)}")
    best = min(shapes, key=loss)
    if len(shapes) > 1:
        beside = [best.model_copy(update={"layers": best.layers + step}) for step in (-1, 1)]
        beside = [shape.model_copy(update={"ffn": fill_ffn(size, shape, model.config)}) for shape in beside if 1 <= shape.layers <= whole.layers]
        best = min([best, *(shape for shape in beside if shape.ffn <= whole.ffn)], key=loss)
    return replace(Cut.of(model, best, importance, name), tried=tried)
