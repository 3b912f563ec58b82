"""Shapes: read from and written to transformers configs, counted exactly, and found between two others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from math import prod
from typing import Any

from cbd_hub.errors import ArchitectureError, ArgumentError, SizeError
from cbd_hub.families import Family, family_of
from cbd_hub.manifest import Shape
from cbd_hub.sizes import format_size


_FIELDS = tuple(Shape.model_fields)


def shape_of(config: Any) -> Shape:
    """The shape of a transformers config.

    Raises:
        ArchitectureError: If the architecture has no axis table.
    """
    sizes = family_of(config).sizes(config)
    return Shape(**{name: sizes[name] for name in _FIELDS})


def parameter_count(config: Any) -> int:
    """Unique parameters of a model of this config; tied weights count once and nothing is allocated.

    Raises:
        ArchitectureError: If the architecture has no axis table.

    Example:
        >>> from transformers import GPT2Config
        >>> parameter_count(GPT2Config())
        124439808
    """
    family = family_of(config)
    return _count(family, config, family.sizes(config))


def count(shape: Shape, config: Any) -> int:
    """Unique parameters of a model like ``config`` but of this shape."""
    family = family_of(config)
    return _count(family, config, {**family.sizes(config), **shape.model_dump()})


def _count(family: Family, config: Any, sizes: Mapping[str, int]) -> int:
    return sum(
        prod(spec.shape(sizes)) * (sizes["layers"] if spec.per_layer else 1)
        for spec in family.tensors if spec.present(config)
    )


def config_for(shape: Shape, config: Any, layers: list[int] | None = None) -> Any:
    """A config like ``config`` with another shape.

    Args:
        shape: The shape wanted.
        config: A transformers config of the same architecture.
        layers: Layer of ``config`` that each layer comes from, for what a config keeps per layer; the first ones by default.

    Raises:
        ArchitectureError: If the architecture cannot have that shape.
    """
    family = family_of(config)
    made = copy.deepcopy(config)
    for axis in _FIELDS:
        attribute = family.fields[axis]
        if hasattr(made, attribute):
            setattr(made, attribute, getattr(shape, axis))
    for attribute in family.single_layer_fields:
        values = getattr(config, attribute, None)
        if values is not None:
            setattr(made, attribute, [values[layer] for layer in (layers or range(shape.layers))])
    if shape_of(made) != shape:
        raise ArchitectureError(
            f"{family.name} cannot have the shape {shape}: its config gives {shape_of(made)}; choose widths that fit its heads"
        )
    return made


# What a config says about origin and use, not about what the model computes.
_NO_MATTER = {
    "_name_or_path", "architectures", "cbd", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range", "pretraining_tp",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "return_dict", "output_hidden_states", "output_attentions",
    "task_specific_params", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "id2label",
    "label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder", "n_ctx", "attn_implementation",
}


def other_differences(first: Any, second: Any) -> list[str]:
    """Config fields, besides the shape's, in which two models compute differently: position bases, activations, biases, tied heads."""
    family = family_of(first)
    shape = {family.fields[axis] for axis in _FIELDS} | set(family.single_layer_fields)
    ours, theirs = first.to_dict(), second.to_dict()
    names = (ours.keys() | theirs.keys()) - shape - _NO_MATTER
    return sorted(name for name in names if ours.get(name) != theirs.get(name) and not name.endswith(("pdrop", "dropout")))


def complete_shape(wish: Shape | Mapping[str, int], small: Shape, large: Shape) -> Shape:
    """A whole shape from a partial one; what is not named is taken from the neighbours where they agree.

    Raises:
        ArgumentError: If a field is unknown, missing where the neighbours differ, or outside their range.
    """
    values = wish.model_dump() if isinstance(wish, Shape) else dict(wish)
    for name, value in values.items():
        if name not in _FIELDS:
            raise ArgumentError(f'shape has no field "{name}"; its fields are {", ".join(_FIELDS)}')
        low, high = sorted((getattr(small, name), getattr(large, name)))
        if not isinstance(value, int) or not low <= value <= high:
            raise ArgumentError(f"shape {name}={value!r} is outside the neighbours' range {low} to {high}; choose a value inside it")
    for name in _FIELDS:
        if name not in values:
            if getattr(small, name) != getattr(large, name):
                raise ArgumentError(
                    f"shape gives no {name}, and the neighbours differ in it ({getattr(small, name)} and {getattr(large, name)}); name it"
                )
            values[name] = getattr(small, name)
    return Shape(**values)


def fill_ffn(size: int, shape: Shape, config: Any, within: float = 0.001) -> int:
    """The FFN width, at least 1, that brings a shape nearest to a size.

    A multiple of 8, which tensor cores want, where that costs at most ``within`` of the size.
    """
    fixed = count(shape.model_copy(update={"ffn": 0}), config)
    step = count(shape.model_copy(update={"ffn": 1}), config) - fixed
    exact = (size - fixed) / step
    width = 8 * round(exact / 8)
    if abs(width - exact) * step > within * size:
        width = round(exact)
    return max(width, 1)


def shape_between(
    size: int, small: Shape, large: Shape, config: Any, layers: int | None = None, tolerance: float = 0.002
) -> Shape:
    """The shape of a size between two neighbours of one hidden width.

    Layers go linearly with size (or are given), the FFN fills the rest within the neighbours' range; where it cannot, the
    next nearest number of layers is taken.

    Args:
        size: Parameters wanted.
        small: Shape of the smaller neighbour.
        large: Shape of the larger neighbour.
        config: Config of either neighbour.
        layers: Layers wished for; by default linear in size.
        tolerance: Distance from the size, as a share of it, that counts as meeting it; more than 0.2% never does where another depth is nearer.

    Returns:
        The shape nearest in layers of those that meet the size, else the nearest in size; the caller checks how near it is.
    """
    low, high = count(small, config), count(large, config)
    share = (size - low) / max(high - low, 1)
    wish = small.layers + share * (large.layers - small.layers) if layers is None else layers
    accept = min(tolerance, 0.002)
    candidates = [
        (abs(shape.layers - wish), abs(count(shape, config) - size), shape) for shape in _depths_at(size, small, large, config, accept / 2)
    ]
    fitting = [entry for entry in candidates if entry[1] <= accept * size]
    if fitting:
        return min(fitting, key=lambda entry: entry[:2])[2]
    return min(candidates, key=lambda entry: (entry[1], entry[0]))[2]


def _depths_at(size: int, small: Shape, large: Shape, config: Any, within: float) -> list[Shape]:
    """For every number of layers between two neighbours, the shape nearest to a size."""
    narrow, wide = sorted((small.ffn, large.ffn))
    found = []
    for depth in range(min(small.layers, large.layers), max(small.layers, large.layers) + 1):
        shape = small.model_copy(update={"layers": depth})
        found.append(shape.model_copy(update={"ffn": min(max(fill_ffn(size, shape, config, within), narrow), wide)}))
    return found


def check_tolerance(size: int, shape: Shape, small: Shape, large: Shape, config: Any, tolerance: float) -> None:
    """Refuse a shape that is further from the wish than ``tolerance``.

    Raises:
        SizeError: Naming the nearest realisable sizes.
    """
    found = count(shape, config)
    if abs(found - size) <= tolerance * size:
        return
    sizes = {count(shape, config) for shape in _depths_at(size, small, large, config, 0.0)}
    real = sorted(sizes, key=lambda real: abs(real - size))[:2]
    near = " or ".join(f"{format_size(parameters)} ({parameters:,})" for parameters in sorted(real))
    raise SizeError(
        f"no shape between the neighbours has {size:,} parameters within {tolerance:.1%}; the nearest have {near}: "
        "ask for one of these, or raise tolerance"
    )
