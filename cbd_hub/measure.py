"""What is measured of a segment on calibration text: the order in which layers come back, the road of the blend, the curve."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from cbd_hub.evaluation import Documents, document_losses
from cbd_hub.interpolation.blend import blend_plan
from cbd_hub.interpolation.curve import Chord
from cbd_hub.interpolation.live import Between, ModelRunner, Runner, frozen
from cbd_hub.interpolation.maps import Maps
from cbd_hub.interpolation.patch import patch_plan
from cbd_hub.interpolation.plan import Kept, Plan, Segment, layer_types, small_eps
from cbd_hub.interpolation.planner import road_at, shape_at
from cbd_hub.losses.head import distillation_loss
from cbd_hub.manifest import Aligned, Blend, CurvePoint, Evaluation, Link, Mix, Patch, RoadPoint, Shape, Strategies
from cbd_hub.precision import products
from cbd_hub.reporting import Report
from cbd_hub.shapes import count, shape_of


SHARES = (0.25, 0.5, 0.75)  # where on a segment the curve is measured, in parameters
ORDER_TOKENS = 512
ORDER_TRIALS = 62
_ALPHAS = (1.0, 0.5)
_GAINS = (1.0, 0.6)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A segment as measured.

    Attributes:
        segment: With order, road and curve filled in.
        curve: Calibration loss at each measured size and strategy.
        ends: Calibration losses of the smaller and of the larger anchor.
    """

    segment: Segment
    curve: list[CurvePoint]
    ends: tuple[Evaluation, Evaluation]

    def link(self) -> Link:
        """The link for chain.json; recommended are the measured sizes that are no trough."""
        segment = self.segment
        chord = Chord(segment.small, segment.large, segment.sizes, (self.ends[0].loss, self.ends[1].loss))
        best = {size: min(point.loss for point in self.curve if point.size == size) for size in sorted({point.size for point in self.curve})}
        return Link(
            kind="segment", small=segment.small, large=segment.large, order=list(segment.order),
            strategies=Strategies(blend=segment.blend, patch=Patch() if segment.patch else None),
            curve=self.curve, recommended_sizes=[size for size, loss in best.items() if chord.trough(size, loss) is None],
        )


def divergence_from(large: Any, documents: Documents) -> Callable[[Runner], float]:
    """What gives the mean KL(large || model) of a model in nats per predicted token; the larger one itself is run once, now."""
    ids, mask, labels = documents.batch(range(len(documents.ids)), large.device)
    with products(large.device):
        teacher = ModelRunner(large)(ids, mask)

    def divergence(runner: Runner) -> float:
        with products(large.device):
            student = runner(ids, mask)
            loss = distillation_loss(
                student.hidden.flatten(0, 1), student.head.weight, teacher.hidden.flatten(0, 1), teacher.head.weight, labels.flatten(),
                **student.head.options("student_"), **teacher.head.options("teacher_"),
            )
        return float(loss)

    return divergence


def nested_order(layers: Sequence[int], distance: Callable[[Sequence[int]], float], trials: int = ORDER_TRIALS) -> list[int]:
    """The order in which layers come back that brings a model nearest to the larger neighbour at every depth on the way.

    An order is a path of nested sets. Where all sets can be measured with so many trials, up to 6 layers with 62 sets, it is the path with the least sum
    of distances, exactly, by dynamic programming over the sets (Held and Karp). Else it is greedy, at each step the nearest
    (KLPatch, https://huggingface.co/papers/2607.08170), with about so many trials in all: only the most promising of the rest are tried.

    Args:
        layers: The layers, the most promising first.
        distance: Distance of the model in which these layers are back.
        trials: Bound on the calls of ``distance``.

    Example:
        >>> nested_order([3, 1, 2], lambda back: abs(sum(back) - 3))
        [2, 1, 3]
    """
    if 2 ** len(layers) - 2 <= trials:
        paths: dict[frozenset[int], tuple[float, list[int]]] = {frozenset(): (0.0, [])}
        for depth in range(1, len(layers) + 1):
            for back in map(frozenset, itertools.combinations(layers, depth)):
                total, order = min((paths[back - {layer}][0], [*paths[back - {layer}][1], layer]) for layer in sorted(back))
                own = distance(sorted(back)) if depth < len(layers) else 0.0
                paths[back] = total + own, order
        return paths[frozenset(layers)][1]
    breadth = max(1, trials // len(layers))
    order, rest = [], list(layers)
    while len(rest) > 1:
        best = min(rest[:breadth], key=lambda layer: distance([*order, layer]))
        order.append(best)
        rest.remove(best)
    return order + rest


def best_order(segment: Segment, models: dict[str, Any], documents: Documents, first: Sequence[int]) -> list[int]:
    """The order in which dropped layers come back, by `nested_order` and KL to the larger neighbour on a few blocks of calibration text.

    Args:
        segment: The segment.
        models: Its two models by name.
        documents: Calibration text.
        first: The dropped layers in an order to begin with, the most promising first.
    """
    between = Between(models)
    with frozen(*models.values()):
        divergence = divergence_from(models[segment.large], documents.first(ORDER_TOKENS))

        def distance(back: Sequence[int]) -> float:
            trial = dataclasses.replace(segment, order=[*back, *(layer for layer in first if layer not in back)])
            shape = segment.small_shape.model_copy(update={"layers": len(segment.kept.layers) + len(back)})
            if segment.patch:
                plan = patch_plan(trial, shape)
            else:
                share = len(back) / len(first)
                plan = blend_plan(trial, shape, Mix(alpha=1 - share / 2, layer_gain=(1 + share) / 2, neuron_gain=0.85))
            return divergence(between.run(plan))

        return nested_order(first, distance)


def fit_road(segment: Segment, loss: Callable[[Plan], float], size: int) -> RoadPoint:
    """Shape and mix of the blend with the least loss at a size, by a short search along one of them after the other."""
    share = (size - segment.sizes[0]) / (segment.sizes[1] - segment.sizes[0])
    seen: dict[RoadPoint, float] = {}

    def trial(point: RoadPoint) -> float:
        if point not in seen:
            shape = shape_at(segment, point)
            seen[point] = loss(blend_plan(segment, shape, point)) if shape.layers == point.layers else np.inf
        return seen[point]

    def best(point: RoadPoint, name: str, values: Sequence[float]) -> RoadPoint:
        return min((point, *(point.model_copy(update={name: value}) for value in values)), key=trial)

    small, road = segment.small_shape, road_at(segment, size)
    depths = _depths(segment, road)
    linear = min(depths, key=lambda depth: abs(depth - road.layers))
    point = RoadPoint(size=size, layers=linear, hidden=road.hidden, alpha=1 - share / 2, layer_gain=(1 + share) / 2, neuron_gain=0.85)
    point = best(point, "layers", depths[:1])  # fewest layers, widest FFN
    for step in (-1, 1):
        while point.layers + step in depths and (moved := best(point, "layers", [point.layers + step])) is not point:
            point = moved
    if small.hidden != segment.large_shape.hidden:
        wishes = [point.model_copy(update={"hidden": hidden}) for hidden in (small.hidden, segment.large_shape.hidden)]
        point = best(point, "hidden", sorted({shape_at(segment, wish).hidden for wish in wishes}))
    point = best(point, "alpha", _ALPHAS)
    shape = shape_at(segment, point)
    for axis, name in (("ffn", "neuron_gain"), ("heads", "head_gain"), ("hidden", "channel_gain"), ("layers", "layer_gain")):
        if getattr(shape, axis) > getattr(small, axis):
            point = best(point, name, _GAINS)
    return point


def settled(segment: Segment, point: RoadPoint) -> RoadPoint:
    """A point of the road with a shape's own numbers, which give that shape when they are asked for again; the nearest tried, where none was found that do."""
    for nudge in (0, 1, -1, 2, -2):  # between two shapes that are equally good it goes back and forth; a thousandth of the size decides
        own = point.model_copy(update={"size": round(point.size * (1 + nudge / 1000))})
        for _ in range(8):
            before, shape = own, shape_at(segment, own)
            own = own.model_copy(update={"size": count(shape, segment.config), "layers": shape.layers, "hidden": shape.hidden})
            if own == before:
                return own
    return own


def _depths(segment: Segment, point: RoadPoint) -> list[int]:
    """Numbers of layers, rising, at which the widths can bring the point's size within 0.2%."""
    depths = []
    for depth in range(segment.small_shape.layers, segment.large_shape.layers + 1):
        shape = shape_at(segment, point.model_copy(update={"layers": depth}))
        if shape.layers == depth and abs(count(shape, segment.config) - point.size) <= 0.002 * point.size:
            depths.append(depth)
    return depths or [shape_at(segment, point).layers]


def measure_segment(
    small: Any, large: Any, kept: Kept | None, documents: Documents, dataset: str, *, names: tuple[str, str], first: Sequence[int] | None = None,
    maps: Maps | None = None, aligned: Aligned | None = None, report: Report | None = None,
) -> Measured:
    """Order, road and curve of the segment between two loaded models.

    Args:
        small: The smaller model.
        large: The larger model.
        kept: Units of the larger one that the smaller one was cut from; None for published models.
        documents: Calibration text.
        dataset: What to call the text.
        names: Names of the two anchors, the smaller first.
        first: The dropped layers in an order to begin with; by default from the last one backwards.
        maps: How the smaller model is turned into the larger one's coordinates, where they were aligned.
        aligned: What is said of that in the link.
        report: Called with what is done, how much of it, and of how much.

    Returns:
        What was measured.
    """
    shapes: tuple[Shape, Shape] = (shape_of(small.config), shape_of(large.config))
    kept_map = Kept.even(*shapes, layer_types(small.config, large.config)) if kept is None else kept
    begin = list(first) if first is not None else kept_map.dropped[::-1]
    segment = Segment(
        names[0], names[1], shapes[0], shapes[1], kept_map, begin, large.config, Blend(replicate=kept is None, align=aligned), shapes[0].only_layers_differ(shapes[1]),
        small_eps=small_eps(small.config, large.config), maps=maps,
    )
    models = {names[0]: small, names[1]: large}
    if len(begin) > 1:
        if report is not None:
            report("order of layers", 0, None)
        segment = dataclasses.replace(segment, order=best_order(segment, models, documents, begin))
    between = Between(models)
    low, high = segment.sizes
    sizes = [round(low + share * (high - low)) for share in SHARES]

    def measured(runner: Runner) -> dict[str, Any]:
        with frozen(small, large):
            losses = document_losses(runner, documents)
        return {"loss": losses.mean, "stderr": losses.stderr, "tokens": int(losses.tokens.sum()), "dataset": dataset}

    def loss(plan: Plan) -> float:
        with frozen(small, large):
            return document_losses(between.run(plan), documents).mean

    road = []
    for number, size in enumerate(sizes):
        if report is not None:
            report("fitting shape and mix", number, len(sizes))
        road.append(settled(segment, fit_road(segment, loss, size)))
    unique = {point.size: point for point in road if low < point.size < high}
    segment = dataclasses.replace(segment, blend=Blend(road=[unique[size] for size in sorted(unique)], replicate=kept is None, align=aligned))
    curve = []
    for size, point in sorted(unique.items()):
        shape = shape_at(segment, point)
        plans: dict[Literal["blend", "patch"], Plan] = {"blend": blend_plan(segment, shape, point)}
        if segment.patch:
            plans["patch"] = patch_plan(segment, shape)
        with frozen(small, large):
            curve += [CurvePoint(size=size, strategy=strategy, **measured(between.run(plan))) for strategy, plan in plans.items()]
    ends = Evaluation(**measured(ModelRunner(small))), Evaluation(**measured(ModelRunner(large)))
    return Measured(dataclasses.replace(segment, curve=tuple(curve)), curve, ends)
