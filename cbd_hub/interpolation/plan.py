"""What a plan is made of: pure data, no weight touched.

A plan says for every tensor of the wanted model which slices of which anchors it is made of, and with which weights. Training on
the path between two anchors and `from_chain` use the same plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from cbd_hub.errors import ManifestError
from cbd_hub.families import family_of
from cbd_hub.manifest import Blend, CurvePoint, Mix, Shape
from cbd_hub.shapes import config_for, count
from cbd_hub.speed.measuring import Speed


if TYPE_CHECKING:
    from cbd_hub.interpolation.maps import Maps


@dataclass(frozen=True)
class Kept:
    """Which units of the larger neighbour the smaller one was cut from: its coordinates.

    On every axis the smaller one holds a prefix of an order of the larger one's units, so that any width in between is a longer prefix, and
    coordinate i stands for the same unit everywhere.

    Attributes:
        layers: For each layer of the smaller one, the larger one's layer it came from, rising; shape (layers_small,).
        ffn: For each layer of the larger one, its FFN neurons in falling importance; shape (layers_large, ffn_large).
        heads: For each layer of the larger one, its query heads: whole groups that share a kv head in falling importance, and within a group the
            heads in falling importance; shape (layers_large, heads_large). A smaller model holds the first heads of the first groups: a shape
            that names heads alone drops whole groups, one that names kv_heads too may thin the groups out, all to the same number. Without
            grouped queries each head is a group. None: by index.
        hidden: Channels of the residual stream in falling importance, one order for the whole model; shape (hidden_large,). None: by index.
    """

    layers: np.ndarray
    ffn: np.ndarray
    heads: np.ndarray | None = None
    hidden: np.ndarray | None = None

    @classmethod
    def even(cls, small: Shape, large: Shape, types: tuple[Sequence[Any], Sequence[Any]] | None = None) -> Kept:
        """The map for anchors that were not cut from each other: layers evenly, all else by index.

        Args:
            small: Shape of the smaller anchor.
            large: Shape of the larger one.
            types: Types of the layers of both (`Family.layer_types`): each layer is matched to one of its type, as evenly as they allow.

        Raises:
            ManifestError: If the types allow no map.
        """
        layers = np.rint(np.linspace(0, large.layers - 1, small.layers)).astype(np.int64)
        if types is not None and any(types[1][layer] != kind for layer, kind in zip(layers, types[0])):
            layers = _evenly(*types)
        return cls(layers, np.tile(np.arange(large.ffn), (large.layers, 1)))

    def arrays(self) -> dict[str, np.ndarray]:
        """All of them under flat names, for a file."""
        return {f"kept.{axis}": order.astype(np.int32) for axis, order in vars(self).items() if order is not None}

    @classmethod
    def read(cls, arrays: Mapping[str, np.ndarray]) -> Kept:
        """From flat names, among which others may be.

        Raises:
            TypeError: If one is missing, or holds no integers.
        """
        found = {axis.name: arrays[f"kept.{axis.name}"] for axis in fields(cls) if f"kept.{axis.name}" in arrays}
        if any(not np.issubdtype(order.dtype, np.integer) for order in found.values()):
            raise TypeError("they are no integers")
        return cls(**{axis: order.astype(np.int64) for axis, order in found.items()})

    @property
    def dropped(self) -> list[int]:
        """Layers of the larger one that the smaller one lacks, rising."""
        return sorted(set(range(len(self.ffn))) - {int(layer) for layer in self.layers})

    def within(self, other: Kept, large: Shape) -> Kept | None:
        """The same units in the coordinates of another model that was cut from the same larger one; None where it does not hold them all in the same order.

        Args:
            other: Which units of the larger one that model kept.
            large: Its shape.
        """
        orders = [(getattr(self, name), getattr(other, name)) for name in ("ffn", "heads", "hidden")]
        alike = all(ours is theirs is None or (ours is not None and theirs is not None and np.array_equal(ours, theirs)) for ours, theirs in orders)
        if not alike or not np.isin(self.layers, other.layers).all():
            return None
        return Kept(np.searchsorted(other.layers, self.layers), np.tile(np.arange(large.ffn), (large.layers, 1)))

    def check_types(self, small: Sequence[Any], large: Sequence[Any]) -> None:
        """Refuse a map that joins layers of two types (`Family.layer_types`), which compute differently.

        Raises:
            ManifestError: Naming the first.
        """
        for place, layer in enumerate(self.layers):
            if small[place] != large[layer]:
                raise ManifestError(
                    f"layer {place} of the smaller anchor ({_text(small[place])}) stands for layer {layer} of the larger one ({_text(large[layer])}), and only layers of one "
                    "type can be blended; cut the smaller one from the larger one, or choose anchors whose layer_types agree"
                )

    def check(self, small: Shape, large: Shape) -> None:
        """Refuse a map that does not fit its two anchors.

        Raises:
            ManifestError: Saying what does not fit.
        """
        wider = [name for name in ("layers", "hidden", "heads", "kv_heads", "ffn") if getattr(small, name) > getattr(large, name)]
        other = [name for name in ("head_size", "vocab") if getattr(small, name) != getattr(large, name)]
        if small.heads * large.kv_heads > large.heads * small.kv_heads:
            wider.append("heads per kv head")
        if wider or other:
            what = f"more {wider[0]}" if wider else f"another {other[0]}"
            raise ManifestError(f"the smaller anchor ({small}) has {what} than the larger one ({large}); nothing can be interpolated between them")
        rising = self.layers.shape == (small.layers,) and bool(np.all(np.diff(self.layers) > 0))
        if not rising or self.layers[0] < 0 or self.layers[-1] >= large.layers:
            raise ManifestError(f"kept layers must be {small.layers} rising layers below {large.layers}; fetch or make the chain again")
        if self.ffn.shape != (large.layers, large.ffn) or not _orders(self.ffn):
            raise ManifestError(f"kept FFN neurons must be orders of {large.ffn} in {large.layers} layers; fetch or make the chain again")
        if self.heads is not None:
            group = large.heads // large.kv_heads
            orders = self.heads.shape == (large.layers, large.heads) and _orders(self.heads)
            if not orders or np.any(np.ptp(self.heads.reshape(large.layers, large.kv_heads, group) // group, axis=2)):
                raise ManifestError(
                    f"kept heads must be orders of {large.heads} in {large.layers} layers, whole groups of {group} together; fetch or make the chain again"
                )
        if self.hidden is not None and (self.hidden.shape != (large.hidden,) or not _orders(self.hidden[None])):
            raise ManifestError(f"kept hidden channels must be an order of {large.hidden}; fetch or make the chain again")


def layer_types(small: Any, large: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """The layers' types of two configs of one architecture."""
    family = family_of(large)
    return family.layer_types(small), family.layer_types(large)


def small_eps(small: Any, large: Any) -> float:
    """Eps of a smaller model's norms in units of a larger one's, from their configs."""
    name = family_of(large).norm_eps
    return 1.0 if name is None else float(getattr(small, name) / getattr(large, name))


def _text(kind: Any) -> str:
    return ", ".join(map(str, kind)) if isinstance(kind, tuple) else str(kind)


def _evenly(small: Sequence[Any], large: Sequence[Any]) -> np.ndarray:
    """Rising layers of the larger anchor, each of its small layer's type, with the least sum of distances from an even spread."""
    ideal = np.linspace(0, len(large) - 1, len(small))
    cost = np.abs(np.arange(len(large)) - ideal[:, None])
    cost[[[kind != other for other in large] for kind in small]] = np.inf
    for row in range(1, len(small)):
        cost[row, 0] = np.inf
        cost[row, 1:] += np.minimum.accumulate(cost[row - 1, :-1])
    if not np.isfinite(cost[-1]).any():
        raise ManifestError(
            f"the {len(small)} layers of the smaller anchor have types ({', '.join(dict.fromkeys(map(_text, small)))}) that do not follow each other so in the "
            f"{len(large)} of the larger one, and only layers of one type can be blended; choose anchors whose layer_types agree"
        )
    layers, end = [], len(large)
    for row in reversed(cost):
        end = int(np.argmin(row[:end]))
        layers.append(end)
    return np.array(layers[::-1])


def _orders(rows: np.ndarray) -> bool:
    """Whether every row holds each of its indices once."""
    return np.array_equal(np.sort(rows, axis=1), np.broadcast_to(np.arange(rows.shape[1]), rows.shape))


@dataclass(frozen=True)
class Take:
    """A selection along one dimension: target[start : start + length] comes from source[index].

    With ``spread`` it is the mean of source[index], repeated so many times.
    """

    dim: int
    start: int
    index: np.ndarray
    spread: int = 0

    @property
    def length(self) -> int:
        """How much of the target it fills."""
        return self.spread or len(self.index)

    @cached_property
    def run(self) -> slice | None:
        """The selection as a slice, where it is one."""
        first = int(self.index[0]) if len(self.index) else 0
        return slice(first, first + len(self.index)) if np.array_equal(self.index, np.arange(first, first + len(self.index))) else None


@dataclass(frozen=True, eq=False)
class Turn:
    """A linear map along one dimension of a source tensor, before anything is selected from it.

    Attributes:
        dim: The dimension.
        factor: A factor for each entry, shape (n,); or maps of equal consecutive blocks, shape (blocks, out, in).
    """

    dim: int
    factor: Tensor


@dataclass(frozen=True)
class Term:
    """A weighted slice of an anchor's tensor, added into a target tensor.

    Attributes:
        anchor: Name of the anchor.
        tensor: Key of its tensor.
        weight: Factor.
        takes: Selections; a dimension without one is taken whole.
        turns: Linear maps of the source, in order, before the selections.
        offset: What is added besides, to every entry.
    """

    anchor: str
    tensor: str
    weight: float
    takes: tuple[Take, ...] = ()
    turns: tuple[Turn, ...] = ()
    offset: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether it is the anchor's whole tensor as it is."""
        return self.weight == 1.0 and self.offset == 0.0 and not self.takes and not self.turns


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
        small_eps: Eps of the smaller anchor's norms, in units of the larger one's.
        maps: How the smaller one's units are turned into the larger one's coordinates, where the anchors have been aligned.
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
    small_eps: float = 1.0
    maps: Maps | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Parameters of the smaller and of the larger anchor."""
        return count(self.small_shape, self.config), count(self.large_shape, self.config)


@dataclass(frozen=True, eq=False, repr=False)
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
        eps: Factor on the eps of the larger neighbour's norms.
        trough: Why the measured curve says that this size is a poor choice, where it does.
        adapter: What is carried to this size besides: where an adapter came from, and what became of it.
        speed: What was predicted of its speed on this machine, where that was asked for.
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
    eps: float = 1.0
    trough: str | None = None
    adapter: Mapping[str, Any] | None = None
    speed: Speed | None = None

    @property
    def note(self) -> str | None:
        """Why the size that comes out is not the one asked for, where they are more than 0.2% apart."""
        if abs(self.parameters - self.asked) <= 0.002 * self.asked:
            return None
        return f"between {self.small} and {self.large} sizes come in steps of whole layers, heads, channels or neurons; this is one beside what was asked ({self.parameters / self.asked - 1:+.2%})"

    def config(self, large: Any) -> Any:
        """The config of the model that comes out, from the larger neighbour's."""
        config = config_for(self.shape, large, list(self.layers))
        name = family_of(large).norm_eps
        if self.eps != 1.0 and name is not None:
            setattr(config, name, getattr(large, name) * self.eps)
        return config

    def sources(self) -> dict[str, set[str]]:
        """For each anchor, the tensors that are read."""
        read: dict[str, set[str]] = {}
        for terms in self.tensors.values():
            for term in terms:
                read.setdefault(term.anchor, set()).add(term.tensor)
        return read

    def rows(self) -> dict[str, dict[str, np.ndarray | None]]:
        """For each anchor and tensor that is read, the indices along its first dimension that are; None for all of them, of which a linear map makes each."""
        takes: dict[tuple[str, str], list[Take | None]] = {}
        for terms in self.tensors.values():
            for term in terms:
                mixed = any(turn.dim == 0 and turn.factor.dim() > 1 for turn in term.turns)
                takes.setdefault((term.anchor, term.tensor), []).append(None if mixed else next((take for take in term.takes if take.dim == 0), None))
        read: dict[str, dict[str, np.ndarray | None]] = {}
        for (anchor, tensor), found in takes.items():
            parts = {id(take): take.index for take in found if take is not None}  # parts that differ in another dimension have this one in common
            read.setdefault(anchor, {})[tensor] = None if any(take is None for take in found) else np.flatnonzero(np.bincount(np.concatenate([*parts.values()])))  # unique, in a tenth of its time
        return read

    def summary(self) -> dict[str, Any]:
        """The plan without its tensors, as plain data."""
        return {
            "chain": self.chain, "asked": self.asked, "parameters": self.parameters, "shape": self.shape.model_dump(),
            "small": self.small, "large": self.large, "strategy": self.strategy, **({} if self.mix is None else self.mix.model_dump()),
            "expected_loss": self.expected, "trough": self.trough, "note": self.note, "adapter": self.adapter,
            **({} if self.speed is None else {"speed": self.speed.summary()}),
            "tensors_read": {anchor: len(names) for anchor, names in sorted(self.sources().items())},
        }

    def __repr__(self) -> str:
        return f"Plan({self.chain} at {self.parameters:,}: {self.shape.text}, {self.strategy} of {' and '.join(dict.fromkeys((self.small, self.large)))})"

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
