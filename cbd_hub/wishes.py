"""Whole shapes from the fields that a caller names: what follows from them, and what is taken from the models around."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from cbd_hub.errors import ArgumentError
from cbd_hub.families import family_of
from cbd_hub.manifest import Shape
from cbd_hub.shapes import FIELDS, check_legal, span
from cbd_hub.sizes import as_int


def follow(wish: Mapping[str, int], like: Shape, config: Any) -> dict[str, int]:
    """A partial shape with what follows from it: kv heads and heads from each other, hidden width from heads where it is heads x head size, and back.

    Args:
        wish: Some fields of a shape.
        like: A shape with the query heads per kv head to keep where only one of both is named.
        config: A transformers config of the architecture.
    """
    values = dict(wish)
    group = like.heads // like.kv_heads
    if "kv_heads" in values:
        values.setdefault("heads", values["kv_heads"] * group)
    if family_of(config).hidden_is_heads:
        if "heads" in values:
            values.setdefault("hidden", values["heads"] * like.head_size)
        elif "hidden" in values and values["hidden"] % like.head_size == 0:
            values["heads"] = values["hidden"] // like.head_size
    if "heads" in values and values["heads"] % group == 0:
        values.setdefault("kv_heads", values["heads"] // group)
    return values


def named_fields(wish: Shape | Mapping[str, int]) -> dict[str, Any]:
    """The fields that a shape names, whole numbers of any kind as ints.

    Raises:
        ArgumentError: If it is no mapping, names an unknown field, or a value is no whole number.
    """
    if isinstance(wish, Shape):
        return wish.model_dump()
    if not isinstance(wish, Mapping):
        raise ArgumentError(f'shape={wish!r} is no shape; give its fields, such as {{"layers": 24, "ffn": 1192}}')
    for name in wish:
        if name not in FIELDS:
            raise ArgumentError(f'shape has no field "{name}"; its fields are {", ".join(FIELDS)}')
    values = {name: as_int(value) for name, value in wish.items()}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentError(f"shape {name}={value!r} is no whole number; give one")
    return values


def named_shape(wish: Shape | Mapping[str, int], whole: Shape, config: Any) -> Shape:
    """A whole shape in which the named axes, and what follows from them, are as wished.

    Args:
        wish: The axes.
        whole: The shape that has the others.
        config: A transformers config of the architecture.

    Raises:
        ArgumentError: If a field is unknown, or no shape has such a value.
    """
    values = named_fields(wish)
    try:
        named = Shape.model_validate({**whole.model_dump(), **values}, strict=True).model_dump(include=set(values))
        return Shape.model_validate({**whole.model_dump(), **follow(named, whole, config)})
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{first['loc'][0]}={first['input']!r}" if first["loc"] else str(values)
        raise ArgumentError(f"shape {where}: {first['msg'].removeprefix('Value error, ').lower()}") from error


def outside(values: Mapping[str, int], small: Shape, large: Shape) -> str | None:
    """The first field of a partial shape that is not between the neighbours'; None where all are."""
    for name, value in values.items():
        low, high = sorted((getattr(small, name), getattr(large, name)))
        if not low <= value <= high:
            return name
    return None


def complete_shape(wish: Shape | Mapping[str, int], small: Shape, large: Shape, config: Any) -> Shape:
    """A whole shape from a partial one; what is not named follows from what is, or is taken from the neighbours where they agree.

    Heads, kv heads and hidden width follow from each other as in `follow`; the FFN follows the hidden width where both neighbours have the same
    ratio of them.

    Raises:
        ArgumentError: If a field is unknown, missing where the neighbours differ, or outside their range; if query heads do not share the kv heads
            evenly, or so that a group would hold more or fewer of them than the neighbours' groups do.
        ArchitectureError: If the architecture cannot have the shape.
    """
    values = named_fields(wish)
    if (name := outside(values, small, large)) is not None:
        low, high = sorted((getattr(small, name), getattr(large, name)))
        raise ArgumentError(f"shape {name}={values[name]!r} is outside the neighbours' range {low} to {high}; choose a value inside it")
    if small.heads * large.kv_heads == large.heads * small.kv_heads:
        values = follow(values, large, config)
    if "hidden" in values and small.hidden != large.hidden and small.ffn * large.hidden == large.ffn * small.hidden:
        values.setdefault("ffn", values["hidden"] * large.ffn // large.hidden)
    for name in FIELDS:
        if name not in values:
            if getattr(small, name) != getattr(large, name):
                raise ArgumentError(
                    f"shape gives no {name}, and the neighbours differ in it ({getattr(small, name)} and {getattr(large, name)}); name it"
                )
            values[name] = getattr(small, name)
    shape = Shape(**values)
    groups = span(small.heads // small.kv_heads, large.heads // large.kv_heads)
    if shape.heads not in [shape.kv_heads * group for group in groups]:
        heads = " or ".join(str(shape.kv_heads * group) for group in groups)
        raise ArgumentError(
            f"shape heads={shape.heads} with kv_heads={shape.kv_heads}: the neighbours have {' to '.join(map(str, dict.fromkeys((groups[0], groups[-1]))))} "
            f"query heads per kv head; choose heads={heads}, or other kv_heads"
        )
    check_legal(shape, config)
    return shape
