"""The maps that bring a smaller neighbour into the larger one's coordinates, as data: on every axis an order, and signs or small matrices beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cbd_hub.errors import ManifestError
from cbd_hub.families import Family, TensorSpec, family_of
from cbd_hub.families.table import Dimension
from cbd_hub.interpolation.plan import Turn
from cbd_hub.manifest import Shape


Gains = Mapping[str, Tensor]


@dataclass(frozen=True)
class Maps:
    """How units of the smaller neighbour are turned where they meet the larger one's, beside the order that `Kept` holds.

    Attributes:
        channels: Sign of each channel of the residual stream, shape (hidden_small,).
        neurons: Sign of the linear half of each gated FFN neuron, shape (layers_small, ffn_small).
        values: Orthogonal map of each kv head's values, undone where heads write, shape (layers_small, kv_heads_small, head_size, head_size).
        queries: Orthogonal map of each kv head's keys and of its queries, of the same shape: whatever leaves their products alone.
        rotation: Orthogonal, shape (hidden_large, hidden_large); its first columns are the smaller one's channels in the larger one's coordinates.
            Instead of ``channels``; the gains of norms are then folded into what reads them.
        small_gains: With ``rotation``, the smaller one's norm weights by key.
        large_gains: The larger one's, which the result takes over.
    """

    channels: Tensor | None = None
    neurons: Tensor | None = None
    values: Tensor | None = None
    queries: Tensor | None = None
    rotation: Tensor | None = None
    small_gains: Gains = field(default_factory=dict)
    large_gains: Gains = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of them under flat names, for a file."""
        found: dict[str, Tensor] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                found[f"align.{name}"] = value
            elif value:
                found |= {f"align.{name}.{key}": gains for key, gains in value.items()}
        return {name: np.ascontiguousarray(value.detach().float().cpu().numpy()) for name, value in found.items()}

    @classmethod
    def read(cls, arrays: Mapping[str, np.ndarray]) -> Maps | None:
        """From flat names; None where there are none.

        Raises:
            ManifestError: If one is unknown, or no finite fp32 array.
        """
        values: dict[str, Any] = {}
        for key, array in arrays.items():
            _, _, rest = key.partition("align.")
            name, _, norm = rest.partition(".")
            if not key.startswith("align.") or name not in {entry.name for entry in fields(cls)}:
                continue
            if array.dtype != np.float32 or not np.isfinite(array).all() or bool(norm) != name.endswith("_gains"):
                raise ManifestError(f"alignment map {key} is unknown, or not finite fp32; fetch or make the chain again")
            if norm:
                values.setdefault(name, {})[norm] = torch.from_numpy(array)
            else:
                values[name] = torch.from_numpy(array)
        return cls(**values) if values else None

    def check(self, small: Shape, large: Shape, config: Any) -> None:
        """Refuse maps that do not fit their two anchors.

        Raises:
            ManifestError: Naming the map.
        """
        blocks = (small.layers, small.kv_heads, small.head_size, small.head_size)
        wanted = {
            "channels": (small.hidden,), "neurons": (small.layers, small.ffn), "values": blocks, "queries": blocks, "rotation": (large.hidden, large.hidden),
        }
        for name, shape in wanted.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ManifestError(f"alignment map {name} has shape {list(array.shape)}, the anchors ask for {list(shape)}; fetch or make the chain again")
            if array is not None and not (_orthogonal(array) if name in ("values", "queries", "rotation") else bool((array.abs() == 1).all())):
                raise ManifestError(f"alignment map {name} is not orthogonal; fetch or make the chain again")
        family = family_of(config)
        if self.rotation is not None and not rotates(family, (small, large)):
            raise ManifestError(f"alignment map rotation is not known for {family.name} anchors of hidden width {small.hidden} and {large.hidden}; make the chain again")
        for side, gains, anchor in (("small", self.small_gains, small), ("large", self.large_gains, large)):
            names = {key for key, _ in norms(family, anchor.layers)} if self.rotation is not None else set()
            if gains.keys() != names or any(array.shape != (anchor.hidden,) or not bool(array.all()) for array in gains.values()):
                raise ManifestError(f"alignment gains of the {side} anchor do not fit its norms; fetch or make the chain again")

    def turns(self, config: Any, spec: TensorSpec, layers: tuple[int, int], sizes: tuple[Shape, Shape]) -> tuple[Turn, ...]:
        """What is done to one of the smaller one's tensors before its units are averaged with the larger one's.

        Args:
            config: A transformers config of the architecture.
            spec: The tensor.
            layers: Its layer, and the larger one's that it stands for.
            sizes: Shapes of the smaller and the larger one.
        """
        found: list[Turn] = []
        family = family_of(config)
        for dim, axes in enumerate(spec.dims):
            if axes == "hidden" and self.rotation is not None:
                found += self._rotated(config, spec, dim, layers, sizes)
            elif axes == "hidden" and self.channels is not None and family.norm_of(spec) != "weight":
                found.append(Turn(dim, self.channels))
            elif axes == "ffn" and self.neurons is not None and linear_half(family, spec):
                found.append(Turn(dim, self.neurons[layers[0]]))
            elif isinstance(axes, tuple) and "head_size" in axes:
                blocks = head_blocks(family, spec, axes, sizes[0], *(None if maps is None else maps[layers[0]] for maps in (self.queries, self.values)))
                if blocks is not None:
                    found.append(Turn(dim, blocks))
        return tuple(found)

    def _rotated(self, config: Any, spec: TensorSpec, dim: int, layers: tuple[int, int], sizes: tuple[Shape, Shape]) -> list[Turn]:
        small, large = sizes
        assert self.rotation is not None
        family = family_of(config)
        norm, turns = family.norm_of(spec), small.hidden == large.hidden
        turn = [Turn(dim, self.rotation[None])] if turns else []
        if norm == "weight":
            return [Turn(dim, self.rotation.square()[None])] if turns and stays(config, spec) else []
        if family.writes(spec):
            return turn
        name = spec.name.removesuffix("bias") + "weight" if norm == "bias" else readers(family)[spec.name]
        ours, theirs = self.small_gains[name.format(layer=layers[0])], self.large_gains[name.format(layer=layers[1])][: small.hidden]
        ratio = math.sqrt(small.hidden / large.hidden)
        before, after = (1 / (ours * ratio), theirs) if norm == "bias" else (ours * ratio, 1 / theirs)
        return [Turn(dim, before), *turn, Turn(dim, after)]

    def large_turns(self, config: Any, spec: TensorSpec, layer: int, sizes: tuple[Shape, Shape], *, back: bool = False) -> tuple[Turn, ...]:
        """What is done to one of the larger one's tensors: where widths differ it is rotated so that its first channels are the smaller one's.

        Args:
            config: A transformers config of the architecture.
            spec: The tensor.
            layer: Its layer.
            sizes: Shapes of the smaller and the larger one.
            back: From those coordinates into the larger one's own instead.
        """
        family = family_of(config)
        if self.rotation is None or sizes[0].hidden == sizes[1].hidden or (family.norm_of(spec) is not None and not stays(config, spec)):
            return ()
        found: list[Turn] = []
        for dim in (dim for dim, axes in enumerate(spec.dims) if axes == "hidden"):
            turn = Turn(dim, (self.rotation if back else self.rotation.T)[None])
            if stays(config, spec):
                found.append(replace(turn, factor=turn.factor.square()))
            elif family.writes(spec):
                found.append(turn)
            else:
                gains = self.large_gains[readers(family)[spec.name].format(layer=layer)]
                found += [Turn(dim, gains), turn, Turn(dim, 1 / gains)]
        return tuple(found)


def _orthogonal(maps: Tensor) -> bool:
    """Whether square maps are orthogonal, tried on one vector: of a wide residual stream a whole product would take longer than the plan."""
    array = maps.detach().float().cpu().numpy()  # whose products no autocast rounds
    probe = np.random.default_rng(0).standard_normal((array.shape[-1], 1)).astype(array.dtype)
    return np.allclose(array.swapaxes(-1, -2) @ (array @ probe), probe, rtol=1e-5, atol=1e-2)


def norms(family: Family, layers: int) -> Iterator[tuple[str, TensorSpec]]:
    """Keys of the weights of norms over the hidden width."""
    for spec in family.tensors:
        if family.norm_of(spec) == "weight":
            yield from ((spec.name.format(layer=layer), spec) for layer in range(layers if spec.per_layer else 1))


def readers(family: Family) -> dict[str, str]:
    """For every tensor that reads the residual stream, the name of the weight of the norm before it.

    The norms of a block are in the order of its attention and its FFN; a single one is for both. Empty where a block also normalises what it writes.
    """
    block = [name for name in family.norms if any(spec.module == name and spec.per_layer for spec in family.tensors)]
    if family.post_norms or len(block) not in (1, 2):
        return {}
    by_module = {spec.module: spec.name for spec in family.tensors if family.norm_of(spec) == "weight"}
    final = next(name for module, name in by_module.items() if module not in block)
    found = {}
    for spec in family.tensors:
        if "hidden" in spec.dims and family.norm_of(spec) is None and not family.writes(spec):
            found[spec.name] = (by_module[block[-1 if "ffn" in spec.dims else 0]]) if spec.per_layer else final
    return found


def stays(config: Any, spec: TensorSpec) -> bool:
    """Whether a tensor is the gain of the final norm before a tied head, which nothing can take: a rotation is then only near (its diagonal)."""
    family = family_of(config)
    return bool(getattr(config, family.tied)) and not spec.per_layer and family.norm_of(spec) == "weight"


def rotates(family: Family, sizes: tuple[Shape, Shape]) -> bool:
    """Whether orthogonal maps of the residual stream are known: the gains of norms can be folded, and what subtracts the mean has one width."""
    return bool(readers(family)) and (not family.centred or sizes[0].hidden == sizes[1].hidden)


def linear_half(family: Family, spec: TensorSpec) -> bool:
    """Whether an FFN tensor may change its sign neuron by neuron: what a gate multiplies, and what it is then written with."""
    gated = any(other.module.endswith("gate_proj") for other in family.tensors)
    return gated and (spec.module.endswith("up_proj") or spec.module == family.ffn_input)


def head_role(family: Family, spec: TensorSpec, axes: tuple[str | int, ...]) -> str | None:
    """What a dimension of heads is: ``qkv`` where the three are fused, else ``q``, ``k``, ``v`` or ``o``; None where its name does not say."""
    if 3 in axes:
        return "qkv"
    if spec.module == family.heads_input:
        return "o"
    letter = spec.module.rpartition(".")[2].partition("_")[0]
    return letter if letter in ("q", "k", "v") else None


def head_blocks(
    family: Family, spec: TensorSpec, axes: tuple[str | int, ...], shape: Shape, queries: Tensor | None, values: Tensor | None
) -> Tensor | None:
    """The maps of a dimension of heads, head by head: shape (entries before head_size, head_size, head_size); None where nothing is done."""
    role = head_role(family, spec, axes)
    if role is None or (queries is None and values is None):
        return None
    lengths = [part if isinstance(part, int) else getattr(shape, part) for part in axes[:-1]]
    entries = np.indices(lengths).reshape(len(lengths), -1)
    at = next(index for index, part in enumerate(axes) if part in ("heads", "kv_heads"))
    heads = entries[at] * shape.kv_heads // lengths[at]
    roles = np.array(list("qkv"))[entries[axes.index(3)]] if role == "qkv" else np.full(len(heads), role)
    same = torch.eye(shape.head_size, dtype=torch.float32).expand(shape.kv_heads, -1, -1)
    ours = [same if maps is None else maps for maps in (queries, values)]
    return torch.cat(ours)[torch.from_numpy(heads + shape.kv_heads * np.isin(roles, list("vo")))]


def places(axes: Dimension, chosen: Mapping[str, np.ndarray], shape: Mapping[str, int]) -> np.ndarray | None:
    """Indices into a dimension, where units of some of its axes are chosen; None where it is whole."""
    parts = axes if isinstance(axes, tuple) else (axes,)
    if not chosen.keys() & set(parts):
        return None
    lengths = [part if isinstance(part, int) else shape[part] for part in parts]
    grid = np.meshgrid(*(chosen.get(str(part), np.arange(length)) for part, length in zip(parts, lengths)), indexing="ij")
    return np.ravel_multi_index([part.ravel() for part in grid], lengths)
