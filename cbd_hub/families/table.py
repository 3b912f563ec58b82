"""What an axis table is: for every stored tensor of an architecture, the named axes of its dimensions.

All that cuts, counts, widens or interpolates reads these tables. A new architecture is one new table and one line in a test.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from numbers import Real
from typing import Any, NamedTuple

import numpy as np


# One dimension of a stored tensor: an axis name, a number, or a tuple of them whose product is the dimension
# (outermost first), such as ("heads", "head_size") or (3, "heads", "head_size") for a fused q, k, v.
Dimension = str | int | tuple[str | int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor, or one per layer where the name holds ``{layer}``.

    Attributes:
        name: Checkpoint key, with ``{layer}`` for the layer's number.
        dims: The axes of each dimension, in stored order.
        when: Config attribute that must be true for the tensor to exist.
        unless: Config attribute that must be false for the tensor to exist.
        transposed: Whether it is a linear module's weight that is stored (in, out).
    """

    name: str
    dims: tuple[Dimension, ...]
    when: str | None = None
    unless: str | None = None
    transposed: bool = False

    @property
    def per_layer(self) -> bool:
        """Whether each layer has one."""
        return "{layer}" in self.name

    @property
    def module(self) -> str:
        """The path of its module, within the block where it is in one."""
        return self.name.rpartition(".")[0].rpartition("{layer}.")[2]

    def present(self, config: Any) -> bool:
        """Whether a model of this config stores it."""
        return (self.when is None or bool(getattr(config, self.when, False))) and (
            self.unless is None or not getattr(config, self.unless)
        )

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its stored shape, from the sizes of the axes."""
        return tuple(dimension_size(dim, sizes) for dim in self.dims)


class HeadNorm(NamedTuple):
    """A tensor's part in a norm on queries or keys: whether it feeds it or is its own, and the axis of heads that are normalised together."""

    feeds: bool
    joint: Any


def dimension_size(dim: Dimension, sizes: Mapping[str, int]) -> int:
    """Length of one dimension.

    Example:
        >>> dimension_size((3, "heads", "head_size"), {"heads": 12, "head_size": 64})
        2304
    """
    parts = dim if isinstance(dim, tuple) else (dim,)
    return prod(part if isinstance(part, int) else sizes[part] for part in parts)


def linear(name: str, out: Dimension, into: Dimension, *, bias: bool | str = False, transposed: bool = False) -> tuple[TensorSpec, ...]:
    """The tensors of a linear module.

    Args:
        name: Its path.
        out: Axes of its output.
        into: Axes of its input.
        bias: Whether it has a bias, or the config attribute that says so.
        transposed: Whether the weight is stored (in, out).

    Example:
        >>> [spec.name for spec in linear("mlp.up", "ffn", "hidden", bias=True)]
        ['mlp.up.weight', 'mlp.up.bias']
    """
    weight = TensorSpec(f"{name}.weight", (into, out) if transposed else (out, into), transposed=transposed)
    return (weight, TensorSpec(f"{name}.bias", (out,), when=bias if isinstance(bias, str) else None)) if bias else (weight,)


def norm(name: str, axes: Dimension = "hidden", *, bias: bool = False) -> tuple[TensorSpec, ...]:
    """The tensors of a norm."""
    return tuple(TensorSpec(f"{name}.{leaf}", (axes,)) for leaf in (("weight", "bias") if bias else ("weight",)))


@dataclass(frozen=True)
class Family:
    """The axis table of one architecture.

    Attributes:
        name: As in chain.json.
        model_types: Values of ``config.model_type`` that it covers.
        fields: Axis name -> config attribute.
        defaults: Axis name -> how to get it where the attribute is None or absent, or where there is none: another axis's name for an equal
            size, or a function of the config.
        requires: Config attribute -> the value that the table is for; the name of an axis means that axis's size.
        tensors: Every stored tensor.
        blocks: Path of the module list of layers.
        ffn_input: Module within a block whose input is the FFN's activations.
        heads_input: Module within a block whose input is the heads' outputs.
        norms: Modules that normalise over the hidden width: paths within a block, and the final one's whole path.
        norm_eps: Config attribute with their eps; None where it is fixed.
        norm_offset: What a norm adds to its stored weight: 1 where it multiplies by (1 + w).
        post_norms: Those of a block whose output is added to the residual stream.
        head_norms: Norm of a block on queries or keys -> the module that feeds it.
        centred: Whether the norms over the hidden width subtract the mean (LayerNorm).
        scaled_embedding: Whether the token embedding is multiplied by the square root of the hidden width as it is read.
        hidden_multiple: Axis of whose size the hidden width must be a multiple, or None.
        hidden_is_heads: Whether the hidden width is heads x head size.
        embedding: Key of the token embedding.
        head: Key of the output head, which shares the embedding where ``tied`` is true.
        tied: Config attribute that ties head and embedding.
        residual: Tensors of a block that write into the residual stream, be it through a post-norm; embeddings of tokens and positions do too.
        live: Checkpoint key -> name of the parameter in the loaded model, where they differ.
        base_prefix: Prefix that published checkpoints may leave out.
        buffers: Pattern of stored keys that are no parameters and are passed over.
        single_layer_fields: Config lists with one entry per layer.
        parts_rows: Whether its attention stops where positions start anew, as they do in each of the rows packed into a block; else a mask must say so.
    """

    name: str
    model_types: tuple[str, ...]
    fields: Mapping[str, str]
    tensors: tuple[TensorSpec, ...]
    blocks: str
    ffn_input: str
    heads_input: str
    norms: tuple[str, ...]
    norm_eps: str | None
    embedding: str
    residual: tuple[str, ...]
    norm_offset: float = 0.0
    post_norms: tuple[str, ...] = ()
    head_norms: Mapping[str, str] = field(default_factory=dict)
    centred: bool = False
    scaled_embedding: bool = False
    hidden_multiple: str | None = None
    hidden_is_heads: bool = False
    head: str = "lm_head.weight"
    tied: str = "tie_word_embeddings"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    live: Mapping[str, str] = field(default_factory=dict)
    base_prefix: str = "model."
    buffers: str | None = None
    single_layer_fields: tuple[str, ...] = ("layer_types",)
    parts_rows: bool = True

    def sizes(self, config: Any) -> dict[str, int]:
        """Length of every named axis for a config."""
        sizes: dict[str, int] = {}
        for axis in [*self.fields, *(axis for axis in self.defaults if axis not in self.fields)]:
            value = getattr(config, self.fields[axis], None) if axis in self.fields else None
            if value is None:
                default = self.defaults[axis]
                value = sizes[default] if isinstance(default, str) else default(config)
            sizes[axis] = int(value)
        return sizes

    def layer_types(self, config: Any) -> tuple[tuple[Any, ...], ...]:
        """What a config says of each single layer; layers with the same are of one type."""
        lists = [values for name in self.single_layer_fields if (values := getattr(config, name, None)) is not None]
        return tuple(zip(*lists)) if lists else ((),) * self.sizes(config)["layers"]

    def unmet(self, config: Any) -> str | None:
        """The first thing that the table requires of a config and does not find there, in words."""
        sizes = self.sizes(config)
        for name, value in self.requires.items():
            wanted = sizes[value] if isinstance(value, str) else value
            found = getattr(config, name, wanted)
            if (bool(found) if isinstance(wanted, bool) else found) != wanted:  # a published config may say null for false
                return f"{name}={found!r} where only {wanted!r} is known"
        eps = 1.0 if self.norm_eps is None else getattr(config, self.norm_eps)
        return None if isinstance(eps, Real) and 0 < float(eps) < math.inf else f"{self.norm_eps}={eps!r} where only numbers above 0 are known"

    def parameters(self, model: Any) -> dict[str, Any]:
        """The parameters of a loaded model by their checkpoint keys."""
        keys = {live: key for key, live in self.live.items()}
        return {keys.get(name, name): parameter for name, parameter in model.named_parameters()}

    def stored(self, config: Any) -> Iterator[tuple[TensorSpec, int | None, str]]:
        """Every stored tensor of a config: its spec, its layer (None outside the layers) and its checkpoint key."""
        layers = self.sizes(config)["layers"]
        for spec in self.tensors:
            if not spec.present(config):
                continue
            if spec.per_layer:
                for layer in range(layers):
                    yield spec, layer, spec.name.format(layer=layer)
            else:
                yield spec, None, spec.name

    def weight_of(self, module: str) -> tuple[TensorSpec, int | None, str] | None:
        """The weight of a loaded model's module: its spec, its layer (None outside the layers) and its checkpoint key; None for an unknown one.

        Example:
            >>> from cbd_hub.families import GPT2
            >>> GPT2.weight_of("transformer.h.3.mlp.c_fc")[1:]
            (3, 'transformer.h.3.mlp.c_fc.weight')
        """
        for spec in self.tensors:
            pattern = re.escape(self.live.get(spec.name, spec.name)).replace(r"\{layer\}", "(0|[1-9][0-9]{0,4})")
            if (found := re.fullmatch(pattern, f"{module}.weight")) is not None:
                layer = int(found[1]) if spec.per_layer else None
                return spec, layer, spec.name if layer is None else spec.name.format(layer=layer)
        return None

    def canonical(self, key: str) -> str | None:
        """The table's key for a stored key, or None for one that is passed over."""
        if not key.startswith(self.base_prefix) and key != self.head:
            key = self.base_prefix + key
        return None if self.buffers is not None and re.fullmatch(self.buffers, key) else key

    def writes(self, spec: TensorSpec) -> bool:
        """Whether a tensor's values are added to the residual stream."""
        return self.embeds(spec) or spec.name.endswith(tuple(f".{name}" for name in self.residual))

    def embeds(self, spec: TensorSpec) -> bool:
        """Whether a tensor's rows are looked up: an embedding of tokens or positions."""
        return spec.name == self.embedding or "positions" in spec.dims

    def transposed(self, spec: TensorSpec) -> bool:
        """Whether a weight is stored (in, out): an embedding, or a linear module that says so."""
        return spec.transposed or self.embeds(spec)

    def norm_of(self, spec: TensorSpec) -> str | None:
        """``weight`` or ``bias`` where a tensor is that of a norm over the hidden width."""
        module, _, leaf = spec.name.rpartition(".")
        return leaf if module in self.norms or spec.module in self.norms else None

    def head_norm(self, spec: TensorSpec) -> HeadNorm | None:
        """What a tensor is to a norm on queries or keys; None where it is nothing to any."""
        for name, feeder in self.head_norms.items():
            if spec.module in (name, feeder):
                (axes,) = next(other for other in self.tensors if other.module == name).dims
                outer = axes[0] if isinstance(axes, tuple) else axes
                return HeadNorm(spec.module == feeder, outer if outer in ("heads", "kv_heads") else None)
        return None

    def input_of(self, module: str) -> tuple[TensorSpec, int]:
        """The weight of a linear module of a block, and which dimension its input is: ``ffn_input`` or ``heads_input``."""
        spec = next(spec for spec in self.tensors if spec.name.endswith(f".{module}.weight"))
        return spec, next(dim for dim, axes in enumerate(spec.dims) if axes != "hidden")

    def legal_hidden(self, hidden: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Which hidden widths the architecture can have with the other axes of these sizes; a mask."""
        if self.hidden_is_heads:
            return hidden == sizes["heads"] * sizes["head_size"]
        return hidden % (sizes[self.hidden_multiple] if self.hidden_multiple is not None else 1) == 0
