"""Parameters of two neighbours averaged in shared coordinates, on every axis by one rule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cbd_hub.families import Family, TensorSpec, family_of
from cbd_hub.families.table import Dimension
from cbd_hub.interpolation.maps import stays
from cbd_hub.interpolation.plan import Plan, Segment, Take, Term, Turn
from cbd_hub.manifest import Mix, Shape
from cbd_hub.shapes import count


def blend_plan(
    segment: Segment, shape: Shape, mix: Mix, *, chain: str = "", asked: int | None = None, expected: float | None = None,
    share: float | None = None,
) -> Plan:
    """Parameters of both neighbours averaged in shared coordinates, with the larger one's next units added.

    Paper, Eq. 3 (https://huggingface.co/papers/2605.07783): ``alpha Trans(small) + (1 - alpha) Trans(large)``, with ``Trans`` decided so:

    - Coordinate i of an axis (FFN neurons, heads, residual channels) is the smaller neighbour's unit i and the larger one's unit ``kept[i]``. A
      tensor is the product of its dimensions' stretches: where the smaller neighbour holds all of a part's coordinates, that part is the
      average; the rest is the larger one's, the most important units first.
    - What a unit that only the larger one holds writes into the residual stream is multiplied by its gain (``layer_gain``, ``neuron_gain``,
      ``head_gain``, and ``channel_gain`` on all that is written into a new channel). With alpha 1 and gains of 0 the model computes what the
      smaller neighbour computes: function-preserving zero-padding.
    - The weights of norms are averaged times the square root of the hidden width: a model of width h normalises by the mean over h channels, so
      a weight w of width h is ``w sqrt(h / h_target)`` at the target's width, and eps is averaged as ``eps h / h_target``. Channels that are 0
      can thus come and go under RMSNorm without a change, and a cut keeps the scale of what it keeps.
    - Where norms subtract the mean (LayerNorm) a new channel is ``channel_gain`` times the larger one's plus ``1 - channel_gain`` times the
      mean of the shared channels, and the norm's bias there is multiplied by the gain; so that at gain 0 neither mean nor output move
      (LEMON, https://huggingface.co/papers/2310.07999).
    - Norms that multiply by (1 + w) are averaged as 1 + w. Where eps is fixed (OPT), all that is written into the residual stream is multiplied by
      ``sqrt(h_target / h)`` instead of eps. Where the embedding is read times ``sqrt(h)`` (Gemma), it is stored times ``sqrt(h / h_target)``.
      Where the head is tied to an embedding that is rescaled, the final norm takes the factor back.
    - Where a block ends in post-norms, ``layer_gain`` is on their weights. Norms on queries and keys share eps, so that what feeds them is
      multiplied by its square root. Those over all heads together (OLMo 2) are rescaled by their heads as the others by the hidden width, and
      what feeds them is multiplied by ``head_gain`` in new heads.
    - With ``Blend.replicate`` a layer that only the larger one holds is the average with the smaller one's layer of its type before it, or else
      after it (layer replication).

    Args:
        segment: The two neighbours.
        shape: The shape wanted, between theirs.
        mix: The weights.
        chain: Name of the chain.
        asked: Size asked for; the shape's own by default.
        expected: Loss expected at this size.
        share: Weight of the smaller neighbour instead of ``mix.alpha``, all else as the mix has it: 1 or 0 for what one neighbour alone brings.
    """
    config, kept = segment.config, segment.kept
    blender = Blender(segment, shape, mix, share)
    held = [int(layer) for layer in kept.layers]
    layers = sorted({*held, *segment.order[: shape.layers - len(held)]})
    sources = {layer: source_layer(segment, layer) for layer in layers}
    tensors: dict[str, tuple[Term, ...]] = {}
    for spec in family_of(config).tensors:
        if not spec.present(config):
            continue
        if not spec.per_layer:
            tensors[spec.name] = blender.terms(spec, spec.name, spec.name)
            continue
        for position, layer in enumerate(layers):
            source = sources[layer]
            small = None if source is None else spec.name.format(layer=source)
            tensors[spec.name.format(layer=position)] = blender.terms(spec, small, spec.name.format(layer=layer), layer)
    found = count(shape, config)
    return Plan(
        chain, found if asked is None else asked, found, shape, segment.small, segment.large, "blend", mix, tuple(layers), tensors, expected,
        eps=blender.eps,
    )


def source_layer(segment: Segment, layer: int) -> int | None:
    """The smaller neighbour's layer that stands for one of the larger one's, be it by replication; None where there is none."""
    held = [int(layer) for layer in segment.kept.layers]
    if layer in held:
        return held.index(layer)
    if segment.blend is None or not segment.blend.replicate:
        return None
    types = family_of(segment.config).layer_types(segment.config)
    alike = [index for index, other in enumerate(held) if types[other] == types[layer]]
    return max((index for index in alike if held[index] < layer), default=alike[0] if alike else None)


@dataclass(frozen=True)
class _Coordinates:
    """One dimension of a target tensor in the neighbours' coordinates.

    Attributes:
        large: The larger one's index of each entry.
        small: The smaller one's, where it holds the entry.
        held: Whether it does.
        sizes: Lengths in the smaller and the larger one.
    """

    large: np.ndarray
    small: np.ndarray
    held: np.ndarray
    sizes: tuple[int, int]

    def within(self, inner: _Coordinates) -> _Coordinates:
        """The coordinates of a dimension whose outer part is this and whose inner part is ``inner``."""
        small, large = inner.sizes
        return _Coordinates(
            (self.large[:, None] * large + inner.large).ravel(), (self.small[:, None] * small + inner.small).ravel(),
            (self.held[:, None] & inner.held).ravel(), (self.sizes[0] * small, self.sizes[1] * large),
        )

    @property
    def stretches(self) -> list[slice]:
        """Where the smaller one holds all, or nothing."""
        borders = [0, *(np.flatnonzero(np.diff(self.held)) + 1).tolist(), len(self.held)]
        return list(itertools.starmap(slice, itertools.pairwise(borders)))

    @property
    def plain(self) -> tuple[bool, bool]:
        """Whether all of the smaller, and of the larger one is taken, in order."""
        small, large = (
            len(index) == size and np.array_equal(index, np.arange(size)) for index, size in zip((self.small, self.large), self.sizes)
        )
        return small, large


class Blender:
    """The terms of a segment's tensors at one shape and mix; ``share`` is as in `blend_plan`."""

    def __init__(self, segment: Segment, shape: Shape, mix: Mix, share: float | None = None) -> None:
        self.segment, self.shape, self.mix = segment, shape, mix
        self.alpha = mix.alpha if share is None else share
        self.family: Family = family_of(segment.config)
        self.sizes = {**self.family.sizes(segment.config), **shape.model_dump()}
        self.eps = (mix.alpha * segment.small_eps * segment.small_shape.hidden + (1 - mix.alpha) * segment.large_shape.hidden) / shape.hidden
        self.gains = {"hidden": mix.channel_gain, "ffn": mix.neuron_gain, "heads": mix.head_gain, "kv_heads": mix.head_gain}
        self._found: dict[tuple[Dimension, int], _Coordinates | None] = {}
        self._parted: dict[tuple[Any, ...], list[_Part]] = {}

    def terms(self, spec: TensorSpec, small: str | None, large: str, layer: int = 0) -> tuple[Term, ...]:
        """The terms of one tensor: ``small`` is None where the smaller neighbour has no such layer."""
        alpha = self.alpha if small is not None else 0.0
        family, norm = self.family, self.family.norm_of(spec)
        writes, normed = family.writes(spec), family.head_norm(spec)
        feeds = normed is not None and normed.feeds and normed.joint is not None
        ours = self.scale(spec, self.segment.small_shape, self.segment.small_eps)
        theirs = self.scale(spec, self.segment.large_shape, 1.0)
        turns, large_turns = self.turns(spec, layer, small is not None)
        maps = self.segment.maps
        if norm == "weight" and maps is not None and maps.rotation is not None and not stays(self.segment.config, spec):
            alpha = 0.0  # gains are folded into what reads the norm, in both neighbours alike
        leaves = spec.module in family.post_norms if family.post_norms else writes
        alone = Term(self.segment.large, large, theirs * (self.mix.layer_gain if small is None and leaves else 1.0), turns=large_turns)
        both = [replace(alone, weight=alone.weight * (1 - alpha))] if alpha < 1 else []
        if small is not None and alpha > 0:
            both.insert(0, Term(self.segment.small, small, alpha * ours, turns=turns))
        dims = {dim: found for dim, axes in enumerate(spec.dims) if (found := self.coordinates(axes, layer)) is not None}
        used = (alpha > 0, alpha < 1 or not all(coordinates.held.all() for coordinates in dims.values()))
        parts = []
        for dim, coordinates in dims.items():
            axes = spec.dims[dim]
            gain = self.gain(axes, small is not None) if writes or norm == "bias" or (feeds and axes != "hidden") else 1.0
            way = (dim, used, gain, family.centred and writes and axes == "hidden")
            key = (axes, 0 if axes == "hidden" else layer, *way)
            if key not in self._parted:
                self._parted[key] = _parts(coordinates, *way)
            parts.append(self._parted[key])
        offset = family.norm_offset if norm == "weight" else 0.0
        return tuple(term for box in itertools.product(*filter(None, parts)) for term in self.box(box, both, alone, offset))

    def box(self, box: tuple[_Part, ...], both: list[Term], alone: Term, offset: float = 0.0) -> Iterator[Term]:
        """The terms of a product of parts: the average where both hold all of it, else the larger one's; and the means that it carries.

        What is stored without ``offset`` is summed with it: ``sum of weight (w + offset) - offset``.
        """
        gain = math.prod(part.gain for part in box)
        terms = both if all(part.shared for part in box) else [alone]
        offset *= gain * sum(term.weight for term in terms) - 1
        for term in terms:
            takes = tuple(part.large if term.anchor == self.segment.large else part.small for part in box)
            yield Term(term.anchor, term.tensor, term.weight * gain, takes, term.turns, offset)
            offset = 0.0
        for index, part in enumerate(box):
            if part.mean is not None:
                yield from self.box((*box[:index], part.mean, *box[index + 1 :]), both, alone)

    def scale(self, spec: TensorSpec, source: Shape, eps: float) -> float:
        """A tensor's factor from a neighbour's widths to the target's; exactly 1 where they agree."""
        family, config = self.family, self.segment.config
        ratio = math.sqrt(source.hidden / self.shape.hidden)
        stream = 1 / ratio if family.norm_eps is None else 1.0
        embedding = ratio if family.scaled_embedding else stream
        if (norm := family.norm_of(spec)) is not None:
            scale = ratio if norm == "weight" else 1.0
            return scale / embedding if not spec.per_layer and getattr(config, family.tied) else scale
        if family.writes(spec):
            return embedding if spec.name == family.embedding else stream
        if (normed := family.head_norm(spec)) is not None:
            heads = getattr(source, normed.joint) / getattr(self.shape, normed.joint) if normed.joint is not None else 1.0
            return math.sqrt(self.eps / eps / heads if normed.feeds else heads)
        return 1.0

    def turns(self, spec: TensorSpec, layer: int, held: bool) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
        """What brings the smaller and the larger neighbour's tensor into common coordinates, where they have been aligned."""
        segment = self.segment
        if segment.maps is None:
            return (), ()
        sizes = (segment.small_shape, segment.large_shape)
        place = int(np.searchsorted(segment.kept.layers, layer)) if spec.per_layer else 0
        own = segment.maps.turns(segment.config, spec, (place, layer), sizes) if held else ()
        return own, segment.maps.large_turns(segment.config, spec, layer, sizes)

    def gain(self, axes: Dimension, held: bool) -> float:
        """The gain on what a dimension's new coordinates write; a layer that is new itself has its own for neurons and heads."""
        names = axes if isinstance(axes, tuple) else (axes,)
        return math.prod(self.gains.get(name, 1.0) for name in names if isinstance(name, str) and (held or name == "hidden"))

    def coordinates(self, axes: Dimension, layer: int) -> _Coordinates | None:
        """A stored dimension's coordinates; None where it is the same in every shape."""
        names = axes if isinstance(axes, tuple) else (axes,)
        if not self.gains.keys() & set(names):
            return None
        key = (axes, 0 if axes == "hidden" else layer)
        if key not in self._found:
            found = self._axis(names[0], layer)
            for name in names[1:]:
                found = found.within(self._axis(name, layer))
            self._found[key] = found
        return self._found[key]

    def _axis(self, name: str | int, layer: int) -> _Coordinates:
        small, large, kept = self.segment.small_shape, self.segment.large_shape, self.segment.kept
        if name == "hidden":
            order = np.arange(large.hidden) if kept.hidden is None else kept.hidden
            return _prefix(order[: self.shape.hidden], small.hidden, large.hidden)
        if name == "ffn":
            return _prefix(kept.ffn[layer][: self.shape.ffn], small.ffn, large.ffn)
        if name in ("heads", "kv_heads"):
            groups = (np.arange(large.heads) if kept.heads is None else kept.heads[layer]).reshape(large.kv_heads, -1)
            if name == "kv_heads":
                return _prefix(groups[: self.shape.kv_heads, 0] // groups.shape[1], small.kv_heads, large.kv_heads)
            outer = _prefix(np.arange(self.shape.kv_heads), small.kv_heads, large.kv_heads)
            inner = _prefix(np.arange(self.shape.heads // self.shape.kv_heads), small.heads // small.kv_heads, groups.shape[1])
            found = outer.within(inner)
            return replace(found, large=groups.ravel()[found.large])
        size = name if isinstance(name, int) else self.sizes[name]
        return _prefix(np.arange(size), size, size)


@dataclass(frozen=True)
class _Part:
    """A stretch of a dimension: whether both neighbours hold it, the gain on it, where it comes from, and the mean that it carries."""

    shared: bool
    gain: float
    small: Take
    large: Take
    mean: _Part | None = None


def _parts(coordinates: _Coordinates, dim: int, used: tuple[bool, bool], gain: float, carries_mean: bool) -> list[_Part]:
    """The stretches of a dimension that are treated alike; none where all that is used (of the smaller, of the larger one) is whole and in order."""

    def part(stretch: slice, shared: bool) -> _Part:
        small, large = (Take(dim, stretch.start, index[stretch]) for index in (coordinates.small, coordinates.large))
        return _Part(shared, 1.0 if shared else gain, small, large)

    if coordinates.held.all() or (not used[0] and gain == 1.0):
        whole = all(plain for plain, wanted in zip(coordinates.plain, used) if wanted)
        return [] if whole else [part(slice(0, len(coordinates.held)), True)]
    parts = [part(stretch, bool(coordinates.held[stretch.start])) for stretch in coordinates.stretches]
    if carries_mean and gain < 1.0:  # the stretch of a residual channel: first the shared ones, then the new ones
        shared, new = parts
        small, large = (replace(take, start=new.large.start, spread=new.large.length) for take in (shared.small, shared.large))
        parts = [shared, replace(new, mean=_Part(True, 1.0 - gain, small, large))]
    return parts


def _prefix(order: np.ndarray, small: int, large: int) -> _Coordinates:
    index = np.arange(len(order))
    return _Coordinates(order, index, index < small, (small, large))
