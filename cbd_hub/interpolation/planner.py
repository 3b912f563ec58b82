"""From a chain's manifest and a size to a plan: pure data, no weight touched.

A plan says for every tensor of the wanted model which slices of which anchors it is made of, and with which weights. Training on
the path between two anchors and `from_chain` use the same plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cbd_hub.errors import ArgumentError, ManifestError, SizeError
from cbd_hub.families import TensorSpec, family_of
from cbd_hub.manifest import Anchor, Blend, CurvePoint, Evaluation, Link, Manifest, Mix, RoadPoint, Shape
from cbd_hub.shapes import check_tolerance, complete_shape, config_for, count, shape_between


STRATEGIES = ("auto", "blend", "patch")


@dataclass(frozen=True)
class Kept:
    """Which units of the larger neighbour the smaller one was cut from.

    Attributes:
        layers: For each layer of the smaller one, the larger one's layer it came from, rising; shape (layers_small,).
        ffn: For each layer of the larger one, its FFN neurons in falling importance; shape (layers_large, ffn_large). The smaller one
            holds the first ``ffn_small`` of them in this order, so that any width in between is a longer prefix.
    """

    layers: np.ndarray
    ffn: np.ndarray

    @classmethod
    def even(cls, small: Shape, large: Shape) -> Kept:
        """The map for anchors that were not cut from each other: layers evenly, neurons by index."""
        layers = np.rint(np.linspace(0, large.layers - 1, small.layers)).astype(np.int64)
        return cls(layers, np.tile(np.arange(large.ffn), (large.layers, 1)))

    @property
    def dropped(self) -> list[int]:
        """Layers of the larger one that the smaller one lacks, rising."""
        return sorted(set(range(len(self.ffn))) - {int(layer) for layer in self.layers})

    def check(self, small: Shape, large: Shape) -> None:
        """Refuse a map that does not fit its two anchors.

        Raises:
            ManifestError: Saying what does not fit.
        """
        rising = self.layers.shape == (small.layers,) and bool(np.all(np.diff(self.layers) > 0))
        if not rising or self.layers[0] < 0 or self.layers[-1] >= large.layers:
            raise ManifestError(f"kept layers must be {small.layers} rising layers below {large.layers}; fetch or make the chain again")
        if self.ffn.shape != (large.layers, large.ffn) or not np.array_equal(
            np.sort(self.ffn, axis=1), np.tile(np.arange(large.ffn), (large.layers, 1))
        ):
            raise ManifestError(f"kept FFN neurons must be orders of {large.ffn} in {large.layers} layers; fetch or make the chain again")


@dataclass(frozen=True)
class Take:
    """A selection along one dimension: target[start : start + len(index)] comes from source[index]."""

    dim: int
    start: int
    index: np.ndarray

    @property
    def run(self) -> slice | None:
        """The selection as a slice, where it is one."""
        first = int(self.index[0]) if len(self.index) else 0
        return slice(first, first + len(self.index)) if np.array_equal(self.index, np.arange(first, first + len(self.index))) else None


@dataclass(frozen=True)
class Term:
    """A weighted slice of an anchor's tensor, added into a target tensor.

    Attributes:
        anchor: Name of the anchor.
        tensor: Key of its tensor.
        weight: Factor.
        takes: Selections; a dimension without one is taken whole.
    """

    anchor: str
    tensor: str
    weight: float
    takes: tuple[Take, ...] = ()


@dataclass(frozen=True)
class Segment:
    """Two neighbours and what is known about the road between them.

    Attributes:
        small: Name of the smaller anchor.
        large: Name of the larger anchor.
        small_shape: Shape of the smaller anchor.
        large_shape: Shape of the larger anchor.
        kept: Units of the larger one that the smaller one holds.
        order: Layers of the larger one that the smaller one lacks, in the order in which they come back.
        config: transformers config of the larger anchor.
        blend: Settings of the blend, or None where it does not apply.
        patch: Whether patching applies: only layers differ.
        curve: Measured points.
    """

    small: str
    large: str
    small_shape: Shape
    large_shape: Shape
    kept: Kept
    order: Sequence[int]
    config: Any
    blend: Blend | None = field(default_factory=Blend)
    patch: bool = False
    curve: Sequence[CurvePoint] = ()

    @property
    def sizes(self) -> tuple[int, int]:
        """Parameters of the smaller and of the larger anchor."""
        return count(self.small_shape, self.config), count(self.large_shape, self.config)


@dataclass(frozen=True, eq=False)
class Plan:
    """How a model of a size is made.

    Attributes:
        chain: Name of the chain.
        asked: The size asked for.
        parameters: The size that comes out, in unique parameters.
        shape: The shape that comes out.
        small: Name of the smaller neighbour.
        large: Name of the larger neighbour; the same at an anchor's own size.
        strategy: ``anchor``, ``blend`` or ``patch``.
        mix: Weights of the blend; None elsewhere.
        layers: For each layer, the larger neighbour's layer in whose place it stands.
        tensors: For every checkpoint key, the terms it is the sum of.
        expected: Measured or interpolated loss in nats per token at this size, where the chain has a curve.
    """

    chain: str
    asked: int
    parameters: int
    shape: Shape
    small: str
    large: str
    strategy: str
    mix: Mix | None
    layers: tuple[int, ...]
    tensors: Mapping[str, tuple[Term, ...]]
    expected: float | None = None

    def sources(self) -> dict[str, set[str]]:
        """For each anchor, the tensors that are read."""
        read: dict[str, set[str]] = {}
        for terms in self.tensors.values():
            for term in terms:
                read.setdefault(term.anchor, set()).add(term.tensor)
        return read

    def summary(self) -> dict[str, Any]:
        """The plan without its tensors, as plain data."""
        return {
            "chain": self.chain, "asked": self.asked, "parameters": self.parameters, "shape": self.shape.model_dump(),
            "small": self.small, "large": self.large, "strategy": self.strategy, **({} if self.mix is None else self.mix.model_dump()),
            "expected_loss": self.expected,
            "tensors_read": {anchor: len(names) for anchor, names in sorted(self.sources().items())},
        }

    def __str__(self) -> str:
        rows = []
        for name, value in self.summary().items():
            if value is None:
                continue
            if isinstance(value, Mapping):
                value = ", ".join(f"{key} {part}" for key, part in value.items())
            rows.append((name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)))
        return "\n".join(f"{name:<14}{value}" for name, value in rows)


def anchor_plan(chain: str, asked: int, anchor: str, shape: Shape, config: Any, expected: float | None = None) -> Plan:
    """The plan of an anchor's own size: every tensor is the anchor's, bit for bit."""
    own = config_for(shape, config)
    tensors = {name: (Term(anchor, name, 1.0),) for _, _, name in family_of(own).stored(own)}
    return Plan(
        chain, asked, count(shape, config), shape, anchor, anchor, "anchor", None, tuple(range(shape.layers)), tensors, expected
    )


def blend_plan(
    segment: Segment, shape: Shape, mix: Mix, *, chain: str = "", asked: int | None = None, expected: float | None = None
) -> Plan:
    """Parameters of both neighbours averaged in shared coordinates, with the larger one's next units added.

    Paper, Eq. 3 (https://huggingface.co/papers/2605.07783): ``alpha Trans(small) + (1 - alpha) Trans(large)``. For a unit that both hold
    (a layer, an FFN neuron), that is the average. A unit that only the larger one holds comes from it, the most important first, and what it
    adds to the residual stream is multiplied by a gain: at gain 0 this is the function-preserving zero-padding of the smaller neighbour.
    With ``Blend.replicate`` a layer that only the larger one holds is the average with the smaller one's layer before it (layer replication).

    Args:
        segment: The two neighbours.
        shape: The shape wanted, between theirs in layers and FFN.
        mix: The weights.
        chain: Name of the chain.
        asked: Size asked for; the shape's own by default.
        expected: Loss expected at this size.
    """
    family, kept, config = family_of(segment.config), segment.kept, segment.config
    held = [int(layer) for layer in kept.layers]
    layers = sorted({*held, *segment.order[: shape.layers - len(held)]})
    replicate = segment.blend is not None and segment.blend.replicate
    endings = tuple(f".{name}" for name in family.residual)
    tensors: dict[str, tuple[Term, ...]] = {}
    for spec in family.tensors:
        if not spec.present(config):
            continue
        if not spec.per_layer:
            tensors[spec.name] = _average(segment, spec.name, spec.name, mix.alpha)
            continue
        for position, layer in enumerate(layers):
            name = spec.name.format(layer=position)
            source = spec.name.format(layer=layer)
            if layer in held:
                small = spec.name.format(layer=held.index(layer))
                tensors[name] = _blend_ffn(segment, spec, small, source, kept.ffn[layer], shape.ffn, mix)
            elif replicate:
                before = max((index for index, other in enumerate(held) if other < layer), default=0)
                tensors[name] = _blend_ffn(segment, spec, spec.name.format(layer=before), source, kept.ffn[layer], shape.ffn, mix)
            else:
                weight = mix.layer_gain if spec.name.endswith(endings) else 1.0
                takes = _ffn_take(spec, kept.ffn[layer][: shape.ffn], segment.large_shape.ffn)
                tensors[name] = (Term(segment.large, source, weight, takes),)
    found = count(shape, config)
    return Plan(
        chain, found if asked is None else asked, found, shape, segment.small, segment.large, "blend", mix, tuple(layers), tensors, expected
    )


def patch_plan(
    segment: Segment, shape: Shape, *, chain: str = "", asked: int | None = None, expected: float | None = None
) -> Plan:
    """Whole blocks of the larger neighbour put back into the smaller one.

    A block is a kept layer with the dropped layers that follow it, as in boomerang distillation
    (https://huggingface.co/papers/2510.05064). As soon as one of a block's dropped layers comes back, the block is the larger
    neighbour's: its kept layer and those of its dropped layers that are back. All other layers, the embeddings and the final norm stay
    the smaller neighbour's, bit for bit.

    Args:
        segment: The two neighbours; they differ in layers only.
        shape: The shape wanted.
        chain: Name of the chain.
        asked: Size asked for; the shape's own by default.
        expected: Loss expected at this size.
    """
    family, config = family_of(segment.config), segment.config
    held = [int(layer) for layer in segment.kept.layers]
    back = set(segment.order[: shape.layers - len(held)])
    starts = [0, *held[1:], segment.large_shape.layers]
    layers: list[tuple[str, int, int]] = []  # (anchor, its layer, place in the larger one)
    for position, layer in enumerate(held):
        block = [other for other in range(starts[position], starts[position + 1]) if other == layer or other in back]
        if len(block) > 1:
            layers += [(segment.large, other, other) for other in block]
        else:
            layers.append((segment.small, position, layer))
    tensors: dict[str, tuple[Term, ...]] = {}
    for spec in family.tensors:
        if not spec.present(config):
            continue
        if spec.per_layer:
            for target, (anchor, source, _) in enumerate(layers):
                tensors[spec.name.format(layer=target)] = (Term(anchor, spec.name.format(layer=source), 1.0),)
        else:
            tensors[spec.name] = (Term(segment.small, spec.name, 1.0),)
    found = count(shape, config)
    return Plan(
        chain, found if asked is None else asked, found, shape, segment.small, segment.large, "patch", None,
        tuple(place for *_, place in layers), tensors, expected,
    )


def _average(segment: Segment, small: str, large: str, alpha: float) -> tuple[Term, ...]:
    terms = (Term(segment.small, small, alpha), Term(segment.large, large, 1.0 - alpha))
    return tuple(term for term in terms if term.weight)


def _ffn_take(spec: TensorSpec, index: np.ndarray, width: int, start: int = 0) -> tuple[Take, ...]:
    """The selection along a tensor's FFN dimension; none where it has no such dimension or all is taken in order."""
    if "ffn" not in spec.dims or (start == 0 and len(index) == width and np.array_equal(index, np.arange(width))):
        return ()
    return (Take(spec.dims.index("ffn"), start, index),)


def _blend_ffn(
    segment: Segment, spec: TensorSpec, small: str, large: str, order: np.ndarray, width: int, mix: Mix
) -> tuple[Term, ...]:
    """A blend whose first FFN neurons are shared and whose further ones are the larger neighbour's, with a gain on what they add."""
    family, alpha = family_of(segment.config), mix.alpha
    shared, wide = segment.small_shape.ffn, segment.large_shape.ffn
    if "ffn" not in spec.dims:
        return _average(segment, small, large, alpha)
    gain = mix.neuron_gain if spec is family.output_of_ffn()[0] else 1.0
    if alpha == 0.0 and gain == 1.0:
        return (Term(segment.large, large, 1.0, _ffn_take(spec, order[:width], wide)),)
    if alpha == 1.0 and width == shared:
        return (Term(segment.small, small, 1.0),)
    dim = spec.dims.index("ffn")
    terms = []
    if alpha > 0.0:
        terms.append(Term(segment.small, small, alpha, (Take(dim, 0, np.arange(shared)),)))
    if alpha < 1.0:
        terms.append(Term(segment.large, large, 1.0 - alpha, (Take(dim, 0, order[:shared]),)))
    if width > shared:
        terms.append(Term(segment.large, large, gain, (Take(dim, shared, order[shared:width]),)))
    return tuple(terms)


def road_at(segment: Segment, size: int) -> RoadPoint:
    """Layers and mix at a size: between the fitted points linearly, without them by size distance and with gains of 1.

    The road begins at the smaller neighbour (alpha 1) and ends at the larger one (alpha 0, gains 1).
    """
    low, high = segment.sizes
    fitted = list(segment.blend.road) if segment.blend is not None else []
    start = fitted[0] if fitted else Mix(alpha=1.0)
    points = [
        RoadPoint(
            size=low, layers=segment.small_shape.layers, alpha=1.0, layer_gain=start.layer_gain, neuron_gain=start.neuron_gain
        ),
        *fitted,
        RoadPoint(size=high, layers=segment.large_shape.layers, alpha=0.0),
    ]
    sizes = [point.size for point in points]

    def at(name: str) -> float:
        return float(np.interp(size, sizes, [getattr(point, name) for point in points]))

    return RoadPoint(
        size=size, layers=round(at("layers")), alpha=at("alpha"), layer_gain=at("layer_gain"), neuron_gain=at("neuron_gain")
    )


def strategy_at(segment: Segment, size: int) -> str:
    """What ``auto`` means at a size: the strategy with the lower measured loss at the nearest measured sizes.

    Without a curve it is ``patch`` where that applies, else ``blend``.
    """
    measured = {point.strategy for point in segment.curve if segment.patch or point.strategy != "patch"}
    if not measured:
        return "patch" if segment.patch else "blend"
    return min(sorted(measured), key=lambda strategy: _on_curve(segment, size, strategy))


def _on_curve(segment: Segment, size: int, strategy: str) -> float:
    points = sorted((point.size, point.loss) for point in segment.curve if point.strategy == strategy)
    sizes, losses = zip(*points)
    return float(np.interp(size, sizes, losses))


def expected_loss(segment: Segment, size: int, strategy: str, ends: tuple[float | None, float | None]) -> float | None:
    """Loss at a size from the measured curve, linear in log size between its points; None without one."""
    points = sorted((point.size, point.loss) for point in segment.curve if point.strategy == strategy)
    small, large = ends
    if not points:
        return None
    if small is not None:
        points.insert(0, (segment.sizes[0], small))
    if large is not None:
        points.append((segment.sizes[1], large))
    sizes, losses = zip(*points)
    return float(np.interp(np.log(size), np.log(sizes), losses))


def segment_plan(
    segment: Segment, size: int, *, shape: Shape | Mapping[str, int] | None = None, strategy: str = "auto",
    alpha: float | None = None, tolerance: float = 0.02, chain: str = "", ends: tuple[float | None, float | None] = (None, None),
) -> Plan:
    """The plan of a size, or of a shape, inside a segment.

    Raises:
        ArgumentError: If a strategy is unknown or does not apply, alpha is outside 0 to 1, or alpha comes with ``patch``.
        SizeError: If no shape comes within ``tolerance`` of the size.
    """
    if strategy not in STRATEGIES:
        raise ArgumentError(f"strategy={strategy!r} is not known; choose one of {', '.join(STRATEGIES)}")
    if alpha is not None and not 0.0 <= alpha <= 1.0:
        raise ArgumentError(f"alpha={alpha} is outside 0 to 1; it is the weight of the smaller neighbour")
    if alpha is not None and strategy == "patch":
        raise ArgumentError('alpha has no meaning for strategy="patch"; leave it out, or choose "blend"')
    chosen = ("blend" if alpha is not None else strategy_at(segment, size)) if strategy == "auto" else strategy
    if chosen == "patch" and not segment.patch:
        raise ArgumentError(
            f'strategy="patch" needs neighbours that differ in layers only, but {segment.small} is {segment.small_shape.text} and '
            f'{segment.large} is {segment.large_shape.text}; choose "blend"'
        )
    point = road_at(segment, size)
    if shape is not None:
        found = complete_shape(shape, segment.small_shape, segment.large_shape)
    else:
        wish = point.layers if chosen == "blend" else None
        found = shape_between(size, segment.small_shape, segment.large_shape, segment.config, wish, tolerance)
        check_tolerance(size, found, segment.small_shape, segment.large_shape, segment.config, tolerance)
    for name, anchor_shape, loss in ((segment.small, segment.small_shape, ends[0]), (segment.large, segment.large_shape, ends[1])):
        if found == anchor_shape:
            return anchor_plan(chain, size, name, anchor_shape, segment.config, loss)
    expected = None if alpha is not None or shape is not None else expected_loss(segment, count(found, segment.config), chosen, ends)
    if chosen == "patch":
        return patch_plan(segment, found, chain=chain, asked=size, expected=expected)
    mix = Mix(alpha=point.alpha, layer_gain=point.layer_gain, neuron_gain=point.neuron_gain) if alpha is None else Mix(alpha=alpha)
    return blend_plan(segment, found, mix, chain=chain, asked=size, expected=expected)


def segment_of(manifest: Manifest, small: Anchor, large: Anchor, kept: Kept | None, config: Any) -> Segment:
    """The segment between two neighbours of a chain.

    Raises:
        SizeError: If the link is a bridge.
        ManifestError: If the stored map does not fit.
    """
    link: Link = manifest.link(small, large)
    if link.kind == "bridge":
        raise SizeError(f"{small.name} and {large.name} are joined by a bridge, where nothing can be interpolated; choose another size")
    kept = Kept.even(small.shape, large.shape) if kept is None else kept
    kept.check(small.shape, large.shape)
    if set(link.order) != set(kept.dropped):
        raise ManifestError(f"link {small.name}-{large.name}: order {link.order[:5]}... does not hold the layers that {small.name} lacks; fetch the chain again")
    differs = [name for name in Shape.model_fields if getattr(small.shape, name) != getattr(large.shape, name)]
    return Segment(
        small.name, large.name, small.shape, large.shape, kept, tuple(link.order), config,
        link.strategies.blend, link.strategies.patch is not None and differs == ["layers"], tuple(link.curve),
    )


def last_loss(evaluations: Sequence[Evaluation], dataset: str | None = None) -> float | None:
    """The latest measured loss, on that dataset if one is named."""
    fitting = [entry for entry in evaluations if dataset is None or entry.dataset == dataset]
    return fitting[-1].loss if fitting else None
