"""From a chain's manifest and a size to a plan: which strategy, at which point of the segment's road, in which shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np

from cbd_hub.errors import ArgumentError, ManifestError, SizeError
from cbd_hub.interpolation.blend import blend_plan
from cbd_hub.interpolation.curve import Chord
from cbd_hub.interpolation.maps import Maps
from cbd_hub.interpolation.patch import patch_plan
from cbd_hub.interpolation.plan import Kept, Plan, Segment, anchor_plan, layer_types, small_eps
from cbd_hub.manifest import Anchor, Blend, Link, Manifest, Mix, RoadPoint, Shape
from cbd_hub.shapes import check_legal, check_tolerance, count, shape_between
from cbd_hub.sizes import format_size
from cbd_hub.wishes import complete_shape


STRATEGIES = ("auto", "blend", "patch")
# The smaller neighbour in a larger shape, without a change of what it computes.
PADDING = Mix(alpha=1.0, layer_gain=0.0, neuron_gain=0.0, head_gain=0.0, channel_gain=0.0)


def road_at(segment: Segment, size: int) -> RoadPoint:
    """Layers, hidden width and mix at a size: between the fitted points linearly, without them by size distance and with gains of 1.

    The road begins at the smaller neighbour (alpha 1) and ends at the larger one (alpha 0, gains 1).
    """
    low, high = segment.sizes
    fitted = list(segment.blend.road) if segment.blend is not None else []
    start, small, large = fitted[0].model_dump() if fitted else {}, segment.small_shape, segment.large_shape
    points = [
        RoadPoint(**{**start, "size": low, "layers": small.layers, "hidden": small.hidden, "alpha": 1.0}),
        *fitted,
        RoadPoint(size=high, layers=large.layers, hidden=large.hidden, alpha=0.0),
    ]

    def at(name: str) -> float:
        known = [point for point in points if getattr(point, name) is not None]
        return float(np.interp(size, [point.size for point in known], [getattr(point, name) for point in known]))

    return RoadPoint(size=size, layers=round(at("layers")), hidden=round(at("hidden")), **{name: at(name) for name in Mix.model_fields})


def shape_at(segment: Segment, point: RoadPoint, size: int | None = None, tolerance: float = 0.02) -> Shape:
    """The shape of a size, by default the point's own, at a point of the road."""
    small, large = segment.small_shape, segment.large_shape
    return shape_between(point.size if size is None else size, small, large, segment.config, point.layers, tolerance, point.hidden)


def strategy_at(segment: Segment, size: int, ends: tuple[float | None, float | None] = (None, None)) -> str:
    """What ``auto`` means at a size: the strategy with the lowest loss there, as `expected_loss` reads it from the measured curve.

    Without a curve it is ``patch`` where that applies, else ``blend``.
    """
    losses = {
        strategy: loss for strategy in ("blend", "patch") if strategy != "patch" or segment.patch
        if (loss := expected_loss(segment, size, strategy, ends)) is not None
    }
    return min(losses, key=losses.__getitem__) if losses else "patch" if segment.patch else "blend"


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


def check_options(strategy: str, alpha: float | None) -> None:
    """Refuse options that have no meaning at any size.

    Raises:
        ArgumentError: If the strategy is unknown, alpha is no number from 0 to 1, or alpha comes with ``patch``.
    """
    if strategy not in STRATEGIES:
        raise ArgumentError(f"strategy={strategy!r} is not known; choose one of {', '.join(STRATEGIES)}")
    if alpha is None:
        return
    if not isinstance(alpha, Real) or not 0.0 <= alpha <= 1.0:
        raise ArgumentError(f"alpha={alpha!r} is outside 0 to 1; it is a number, the weight of the smaller neighbour")
    if strategy == "patch":
        raise ArgumentError('alpha has no meaning for strategy="patch"; leave it out, or choose "blend"')


def segment_plan(
    segment: Segment, size: int, *, shape: Shape | Mapping[str, int] | None = None, strategy: str = "auto",
    alpha: float | None = None, tolerance: float = 0.02, chain: str = "", ends: tuple[float | None, float | None] = (None, None),
) -> Plan:
    """The plan of a size, or of a shape, inside a segment.

    Where the curve says that every strategy loses more than the smaller neighbour, ``auto`` is that neighbour itself, padded to the size without a
    change of what it computes: a size never loses to a smaller one.

    Raises:
        ArgumentError: If a strategy is unknown or does not apply, alpha is outside 0 to 1, or alpha comes with ``patch``.
        SizeError: If no shape comes within ``tolerance`` of the size.
    """
    chosen, found = _chosen(segment, size, shape, strategy, alpha, tolerance, ends)
    for name, anchor_shape, loss in ((segment.small, segment.small_shape, ends[0]), (segment.large, segment.large_shape, ends[1])):
        if found == anchor_shape:
            return anchor_plan(chain, size, name, anchor_shape, segment.config, loss)
    made = count(found, segment.config)
    expected = None if alpha is not None or shape is not None else expected_loss(segment, made, chosen, ends)
    trough = Chord(segment.small, segment.large, segment.sizes, ends).trough(made, expected)
    if strategy == "auto" and expected is not None and ends[0] is not None and expected > ends[0]:
        trough = f"a mix of {format_size(made)} is expected to lose {expected:.3f} nats per token, more than the smaller {segment.small}; this is {segment.small} padded, and no better than it"
        return replace(mixed_plan(segment, found, PADDING, chain=chain, asked=size, expected=ends[0]), trough=trough)
    if chosen == "patch":
        return replace(patch_plan(segment, found, chain=chain, asked=size, expected=expected), trough=trough)
    point = road_at(segment, made)  # what is made, not what was asked: its shape alone says how it is mixed
    mix = Mix(**{name: getattr(point, name) for name in Mix.model_fields}) if alpha is None else Mix(alpha=alpha)
    return replace(blend_plan(segment, found, mix, chain=chain, asked=size, expected=expected), trough=trough)


def mixed_plan(segment: Segment, shape: Shape, mix: Mix, **facts: Any) -> Plan:
    """The blend of a shape by a mix; the smaller neighbour padded stays in its own coordinates, which are exact where turned ones can be near only."""
    return blend_plan(replace(segment, blend=Blend(), maps=None) if mix == PADDING else segment, shape, mix, **facts)


def shape_in(
    segment: Segment, size: int, *, strategy: str = "auto", alpha: float | None = None, tolerance: float = 0.02, ends: tuple[float | None, float | None] = (None, None)
) -> Shape:
    """The shape of `segment_plan` at a size, in a small part of its time."""
    return _chosen(segment, size, None, strategy, alpha, tolerance, ends)[1]


def _chosen(
    segment: Segment, size: int, shape: Shape | Mapping[str, int] | None, strategy: str, alpha: float | None, tolerance: float, ends: tuple[float | None, float | None]
) -> tuple[str, Shape]:
    """Strategy and shape at a size."""
    check_options(strategy, alpha)
    chosen = strategy
    if strategy == "auto":
        # Where only layers move sizes come in steps: what counts is the one that is made.
        real = count(shape_between(size, segment.small_shape, segment.large_shape, segment.config), segment.config) if segment.patch else size
        chosen = "blend" if alpha is not None else strategy_at(segment, real, ends)
    if chosen == "patch" and not segment.patch:
        raise ArgumentError(
            f'strategy="patch" needs neighbours that differ in layers only, but {segment.small} is {segment.small_shape.text} and '
            f'{segment.large} is {segment.large_shape.text}; choose "blend"'
        )
    if shape is not None:
        found = complete_shape(shape, segment.small_shape, segment.large_shape, segment.config)
    else:
        if chosen == "blend":
            found = shape_at(segment, road_at(segment, size), size, tolerance)
        else:
            found = shape_between(size, segment.small_shape, segment.large_shape, segment.config, tolerance=tolerance)
        check_tolerance(size, found, segment.small_shape, segment.large_shape, segment.config, tolerance)
    return chosen, found


def segment_of(
    manifest: Manifest, small: Anchor, large: Anchor, config: Any, small_config: Any, kept: Kept | None, maps: Maps | None
) -> Segment:
    """The segment between two neighbours of a chain; ``config`` is the larger one's.

    Raises:
        SizeError: If the link is a bridge.
        ManifestError: If the stored map does not fit, or joins layers of two types.
        ArchitectureError: If an anchor has a shape that its architecture cannot have.
    """
    link: Link = manifest.link(small, large)
    if link.kind == "bridge":
        raise SizeError(f"{small.name} and {large.name} are joined by a bridge, where nothing can be interpolated; choose another size")
    blend = link.strategies.blend
    if kept is None and blend is not None and blend.align is not None:
        raise ManifestError(f"link {small.name}-{large.name}: its anchors were aligned, but the maps of {small.name} are not there; fetch or make the chain again")
    types = layer_types(small_config, config)
    kept = Kept.even(small.shape, large.shape, types) if kept is None else kept
    kept.check(small.shape, large.shape)
    kept.check_types(*types)
    if maps is not None:
        maps.check(small.shape, large.shape, config)
    for shape in (small.shape, large.shape):
        check_legal(shape, config)
    if set(link.order) != set(kept.dropped):
        raise ManifestError(f"link {small.name}-{large.name}: order {link.order[:5]}... does not hold the layers that {small.name} lacks; fetch the chain again")
    return Segment(
        small.name, large.name, small.shape, large.shape, kept, tuple(link.order), config,
        blend, link.strategies.patch is not None and small.shape.only_layers_differ(large.shape), tuple(link.curve),
        small_eps(small_config, config), maps,
    )
