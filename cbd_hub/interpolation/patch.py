"""Whole blocks of the larger neighbour put back into the smaller one."""

from __future__ import annotations

from cbd_hub.families import family_of
from cbd_hub.interpolation.blend import Blender
from cbd_hub.interpolation.plan import Plan, Segment, Term
from cbd_hub.manifest import Mix, Shape
from cbd_hub.shapes import count


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
    if segment.maps is not None or segment.kept.hidden is not None:
        return _aligned(segment, shape, layers, chain, asked, expected)
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


def _aligned(
    segment: Segment, shape: Shape, layers: list[tuple[str, int, int]], chain: str, asked: int | None, expected: float | None
) -> Plan:
    """The same with all layers in common coordinates of the residual stream."""
    blender = Blender(segment, shape, Mix(alpha=1.0))
    tensors: dict[str, tuple[Term, ...]] = {}
    for spec in family_of(segment.config).tensors:
        if not spec.present(segment.config):
            continue
        for target, (anchor, source, place) in enumerate(layers if spec.per_layer else layers[:1]):
            small = spec.name.format(layer=source) if anchor == segment.small or not spec.per_layer else None
            tensors[spec.name.format(layer=target)] = blender.terms(spec, small, spec.name.format(layer=place), place)
    found = count(shape, segment.config)
    return Plan(
        chain, found if asked is None else asked, found, shape, segment.small, segment.large, "patch", None,
        tuple(place for *_, place in layers), tensors, expected,
    )
