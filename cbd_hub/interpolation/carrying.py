"""Changes of an anchor's weights, or of those of a size in between, carried to another size of one segment.

A change is carried at full strength, as if both neighbours had been changed alike: of the plan that makes the target only the terms of one neighbour are used, with
its weight at 1 in place of its share of the average. Norm and width factors and the gains on units that the target's plan adds stay what they are.

- From the larger neighbour (`blend_plan` with ``share=0``): all that the target holds gets the larger one's change.
- From the smaller one (``share=1``): units that it lacks get none, and so do layers, but for those that the plan replicates.
- From a size in between: first back into the larger neighbour's coordinates by the inverse of the terms that make it from the larger one, then down as from there.
- To the smaller one: the larger one's terms at that shape give its units in common coordinates, and the inverse of its own turns brings them into its own.
- Blocks of the larger neighbour that a patch has put in whole stand in its own order of units: they get and give its changes as they are.
- To and from the smaller one padded without a change of what it computes, which `auto` makes where no mix is better: by way of the smaller one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cbd_hub.families import family_of
from cbd_hub.interpolation.blend import blend_plan, source_layer
from cbd_hub.interpolation.low_rank import LowRank, carried, carried_back
from cbd_hub.interpolation.plan import Plan, Segment, Term
from cbd_hub.interpolation.planner import PADDING
from cbd_hub.manifest import Blend, Mix, Shape
from cbd_hub.shapes import config_for
from cbd_hub.weights import stored_shapes


Changes = Mapping[str, LowRank]  # checkpoint key of a two-dimensional weight -> its change


@dataclass(frozen=True)
class Place:
    """Where in a segment a model stands.

    Attributes:
        shape: Its shape.
        mix: How it was made; gains of 1 where it was patched.
        whole: Layers of the larger neighbour that stand there as they are, by place.
    """

    shape: Shape
    mix: Mix
    whole: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan) -> Place:
        """That of a plan's model."""
        whole = {}
        if plan.strategy == "patch":
            for place, layer in enumerate(plan.layers):
                own = [terms for name, terms in plan.tensors.items() if f".{place}." in name]
                if all(len(terms) == 1 and terms[0].plain and terms[0].anchor == plan.large for terms in own):
                    whole[place] = layer
        return cls(plan.shape, plan.mix or Mix(alpha=0.0), whole)

    @property
    def padded(self) -> bool:
        """Whether it is the smaller neighbour padded."""
        return self.mix == PADDING

    def alike(self, other: Place) -> bool:
        """Whether units stand in the same coordinates at both, so that a change at one is the same at the other."""
        return (self.shape, self.padded, self.whole) == (other.shape, other.padded, other.whole)


def carry(segment: Segment, changes: Changes, source: Place, target: Place) -> Changes:
    """Changes at one place of a segment carried to another; an anchor is the place of its shape.

    Args:
        segment: The segment.
        changes: Changes of a model at ``source``.
        source: Where they come from.
        target: Where they are wanted.

    Returns:
        Those of a model at ``target``; a weight that the source's changes do not reach has none.
    """
    small, large = Place(segment.small_shape, Mix(alpha=1.0)), Place(segment.large_shape, Mix(alpha=0.0))
    if source.alike(target):
        return changes
    plain = replace(segment, blend=Blend(), maps=None)  # a padded model is in the smaller one's own coordinates
    if source.padded and source.shape != small.shape:
        return carry(segment, _back(plain, changes, source, segment.small), small, target)
    if target.padded and target.shape != small.shape:
        return _forth(plain, carry(segment, changes, source, small), target, segment.small)
    if source.shape == small.shape and target.shape != large.shape:
        return _forth(segment, changes, target, segment.small)
    if source.shape == small.shape:
        changes = _back(segment, _forth(segment, changes, large, segment.small), large, segment.large)
    elif source.shape != large.shape:
        changes = _back(segment, changes, source, segment.large)
    if target.shape == large.shape:
        return changes
    changes = _forth(segment, changes, target, segment.large)
    return _back(segment, changes, small, segment.small) if target.shape == small.shape else changes


def terms_of(segment: Segment, place: Place, anchor: str) -> tuple[Plan, dict[str, tuple[Term, ...]]]:
    """The plan of a place as one neighbour alone makes it, and of each tensor that neighbour's terms."""
    plan = blend_plan(segment, place.shape, place.mix, share=1.0 if anchor == segment.small else 0.0)
    return plan, {name: own for name, terms in plan.tensors.items() if (own := tuple(term for term in terms if term.anchor == anchor))}


def _forth(segment: Segment, changes: Changes, target: Place, anchor: str) -> Changes:
    """Changes of a neighbour, carried to a place."""
    shapes = stored_shapes(config_for(target.shape, segment.config))
    found = {}
    for name, terms in terms_of(segment, target, anchor)[1].items():
        if len(shapes[name]) == 2 and (change := carried(terms, changes, _pair(shapes[name]))) is not None:
            found[name] = change
    if target.whole:
        own = changes if anchor == segment.large else carry(segment, changes, Place(segment.small_shape, Mix(alpha=1.0)), Place(segment.large_shape, Mix(alpha=0.0)))
        for spec in (spec for spec in family_of(segment.config).tensors if spec.per_layer):
            for place, layer in target.whole.items():
                found.pop(spec.name.format(layer=place), None)
                if (change := own.get(spec.name.format(layer=layer))) is not None:
                    found[spec.name.format(layer=place)] = change
    return found


def _back(segment: Segment, changes: Changes, source: Place, anchor: str) -> Changes:
    """Changes at a place, carried to a neighbour by the inverse of the terms that make the place from it."""
    own = segment.large_shape if anchor == segment.large else segment.small_shape
    shapes, layers = stored_shapes(config_for(own, segment.config)), blend_plan(segment, source.shape, source.mix).layers
    if anchor == segment.large:  # each of its layers at the place's widths, also one that the place lacks and a replica stands for
        source = replace(source, shape=source.shape.model_copy(update={"layers": own.layers}))
        places = {layer: position for position, layer in enumerate(layers)}
        held = [int(layer) for layer in segment.kept.layers]
        for layer in range(own.layers):
            if layer not in places and (replica := source_layer(segment, layer)) is not None:
                places[layer] = places[held[replica]]
        where = {layer: places.get(layer) for layer in range(own.layers)}
    else:
        where = {position: position for position, layer in enumerate(layers) if layer in segment.kept.layers}
    terms = terms_of(segment, source, anchor)[1]
    found = {}
    for spec in family_of(segment.config).tensors:
        for layer, position in where.items() if spec.per_layer else ((0, 0),):
            name = spec.name.format(layer=layer)
            change = None if position is None else changes.get(spec.name.format(layer=position))
            if change is None or position is None:
                continue
            if spec.per_layer and anchor == segment.large and source.whole.get(position) == layer:
                found[name] = change
            elif name in terms:
                key = terms[name][0].tensor
                found[key] = carried_back(terms[name], change, _pair(shapes[key]))
    return found


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns
