"""Shapes: read from and written to transformers configs, counted exactly, and found between two others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import numpy as np
from pydantic import ValidationError

from cbd_hub.configs import whole_config
from cbd_hub.errors import ArchitectureError, ArgumentError, DataError, SizeError
from cbd_hub.families import Family, family_of
from cbd_hub.manifest import Shape
from cbd_hub.sizes import format_size


FIELDS = tuple(Shape.model_fields)


def shape_of(config: Any) -> Shape:
    """The shape of a transformers config.

    Raises:
        ArchitectureError: If the architecture has no axis table, or a number is out of all bounds.
    """
    family = family_of(config)
    sizes = family.sizes(config)
    try:
        return Shape(**{name: sizes[name] for name in FIELDS})
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{first['loc'][0]}={first['input']}: " if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ")
        raise ArchitectureError(f"a {family.name} of this config is refused: {where}{message[:1].lower()}{message[1:]}; check its config.json") from error


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
    return int(_count_like(config, shape.model_dump()))


def _count(family: Family, config: Any, sizes: Mapping[str, Any]) -> Any:
    """Parameters; where sizes are arrays, of each of their entries."""
    return sum(
        prod(spec.shape(sizes)) * (sizes["layers"] if spec.per_layer else 1)
        for spec in family.tensors if spec.present(config)
    )


def check_legal(shape: Shape, config: Any) -> None:
    """Refuse a shape that no model of the architecture can have, or that transformers would not load.

    Raises:
        ArchitectureError: Naming the nearest that it can have.
    """
    family = family_of(config)
    if shape.heads % shape.kv_heads:
        near = _nearest(range(shape.kv_heads, 4097, shape.kv_heads), shape.heads)
        raise ArchitectureError(
            f"{family.name} cannot have the shape {shape}: its {shape.heads} heads do not share {shape.kv_heads} kv_heads evenly; the nearest are heads={near}"
        )
    sizes = shape.model_dump()
    if family.legal_hidden(np.array(shape.hidden), sizes):
        return
    if family.hidden_is_heads:
        near = _nearest(range(shape.head_size, 2**17, shape.head_size), shape.hidden, lambda hidden: f"{hidden} with heads={hidden // shape.head_size}")
        rule = f"hidden is heads x head_size ({shape.heads} x {shape.head_size})"
    else:
        widths = np.arange(1, 2 * shape.hidden + shape.heads)
        near = _nearest(widths[family.legal_hidden(widths, sizes)].tolist(), shape.hidden)
        rule = f"hidden must be a multiple of {family.hidden_multiple} ({sizes[str(family.hidden_multiple)]})"
    raise ArchitectureError(f"{family.name} cannot have the shape {shape}: {rule}; the nearest are hidden={near}")


def _nearest(values: Iterable[int], wish: int, text: Callable[[int], str] = str) -> str:
    return " or ".join(text(value) for value in sorted(sorted(values, key=lambda value: abs(value - wish))[:2]))


def config_for(shape: Shape, config: Any, layers: list[int] | None = None) -> Any:
    """A config like ``config`` with another shape.

    Args:
        shape: The shape wanted.
        config: A transformers config of the same architecture.
        layers: Layer of ``config`` that each layer comes from, for what a config keeps per layer; the first ones by default.

    Raises:
        ArchitectureError: If the architecture cannot have that shape, naming the nearest that it can have.
    """
    check_legal(shape, config)
    family = family_of(config)
    made = copy.deepcopy(config)
    fields = {axis: family.fields[axis] for axis in FIELDS if axis in family.fields}
    for axis, attribute in fields.items():
        if hasattr(made, attribute):
            setattr(made, attribute, getattr(shape, axis))
    for axis, attribute in fields.items():
        if family.sizes(made)[axis] != getattr(shape, axis):  # the config's default is for other widths
            setattr(made, attribute, getattr(shape, axis))
    for attribute, axis in family.requires.items():
        if isinstance(axis, str):
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


# What a config class declares of origin and use, not of what the model computes.
_NO_MATTER = {
    "_name_or_path", "architectures", "dtype", "transformers_version", "use_cache", "initializer_range", "init_std", "pretraining_tp",
    "bos_token_id", "eos_token_id", "pad_token_id", "return_dict", "output_hidden_states", "output_attentions",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "id2label",
    "label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder",
    "max_window_layers", "_sliding_window_pattern",  # layer_types says what comes of them
}


def other_differences(first: Any, second: Any) -> list[str]:
    """Config fields, besides the shape's, in which two models compute differently: position bases, activations, biases, tied heads.

    Only what the architecture's config class declares counts; what else a config.json holds is read by nothing.
    """
    if not _differences(first, second, first.to_dict().keys() | second.to_dict().keys()):
        return []
    first, second = whole_config(first), whole_config(second)
    return _differences(first, second, type(first)().to_dict().keys())


def _differences(first: Any, second: Any, names: Iterable[str]) -> list[str]:
    family = family_of(first)
    shape = {family.fields[axis] for axis in FIELDS if axis in family.fields} | set(family.single_layer_fields) | set(family.requires)
    if shape_of(first).hidden != shape_of(second).hidden and family.norm_eps is not None:
        shape.add(family.norm_eps)  # it goes with the hidden width
    ours, theirs = first.to_dict(), second.to_dict()
    return sorted(name for name in set(names) - shape - _NO_MATTER if ours.get(name) != theirs.get(name) and not name.endswith(("pdrop", "dropout")))


def check_ids(last: int, config: Any) -> None:
    """Refuse a token for which a model has no row, as of an image's place, which gemma 3's tokenizers have and its text models have not.

    Args:
        last: The largest id of a text.
        config: A transformers config; one that names no size of its vocabulary has no bound.

    Raises:
        DataError: If the model has fewer rows.
    """
    rows = getattr(config, "vocab_size", None)
    if rows is not None and last >= rows:
        raise DataError(f"the text holds the token {last:,}, and the model has rows for {rows:,}; take what it stands for (such as an image's place) out of the text, or use the model's own tokenizer")


def check_positions(tokens: int, config: Any, what: str) -> None:
    """Refuse more tokens than a model has positions.

    Args:
        tokens: Length of a row.
        config: A transformers config; one that names no number of positions has no bound.
        what: What to call the row.

    Raises:
        ArgumentError: If there are too many.
    """
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and tokens > room:
        raise ArgumentError(f"{what} is more than the model's {room:,} positions; give {room:,} or less")


def block_size(*configs: Any, most: int = 128) -> int:
    """Tokens of a block of calibration text: ``most``, or as many as the positions of the model that has fewest.

    Example:
        >>> from transformers import GPT2Config
        >>> block_size(GPT2Config()), block_size(GPT2Config(), GPT2Config(n_positions=64))
        (128, 64)
    """
    rooms = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min([most, *(room for room in rooms if room is not None)])


def check_cut(shape: Shape, whole: Shape, config: Any) -> None:
    """Refuse a shape that cannot be cut from a model.

    Raises:
        ArgumentError: If it is larger somewhere, or of another head size or vocabulary.
        ArchitectureError: If the architecture cannot have the shape.
    """
    for name in FIELDS:
        wanted, there = getattr(shape, name), getattr(whole, name)
        if wanted > there or (wanted != there and name in ("head_size", "vocab")):
            raise ArgumentError(
                f"{name}={wanted} cannot be cut from {name}={there}; layers, hidden, heads, kv_heads and ffn can be made smaller, head_size and vocab stay"
            )
    check_legal(shape, config)
    group, most = shape.heads // shape.kv_heads, whole.heads // whole.kv_heads
    if group > most:
        raise ArgumentError(
            f"heads={shape.heads} with kv_heads={shape.kv_heads} asks for {group} query heads per kv head, and there are {most}; the most are "
            f"heads={shape.kv_heads * most}"
        )


def fill_ffn(size: int, shape: Shape, config: Any, within: float = 0.001) -> int:
    """The FFN width, at least 1, that brings a shape nearest to a size.

    A multiple of 8, which tensor cores want, where that costs at most ``within`` of the size and no width gives the size exactly.
    """
    return int(_fill(size, shape.model_dump(), config, within))


def _fill(size: int, sizes: Mapping[str, Any], config: Any, within: float) -> Any:
    fixed = _count_like(config, {**sizes, "ffn": 0})
    step = _count_like(config, {**sizes, "ffn": 1}) - fixed
    exact = (size - fixed) / step
    width = 8 * np.rint(exact / 8)
    keep = (exact == np.rint(exact)) | (np.abs(width - exact) * step > within * size)
    width = np.where(keep, np.rint(exact), width)
    return np.maximum(width, 1).astype(np.int64)


def _count_like(config: Any, sizes: Mapping[str, Any]) -> Any:
    family = family_of(config)
    return _count(family, config, {**family.sizes(config), **sizes})


def shape_between(
    size: int, small: Shape, large: Shape, config: Any, layers: int | None = None, tolerance: float = 0.02, hidden: int | None = None
) -> Shape:
    """The shape of a size between two neighbours.

    The path: layers, hidden width, kv heads and query heads per kv head each go linearly with size (or as given) to the nearest that the
    architecture can have, and the FFN fills the rest within the neighbours' range. Where it cannot, the next nearest number of layers is
    taken, and at each the nearest widths that can. So a size comes out within 0.2% where the FFN moves and 1% where hidden width does and the FFN does
    not, unless all else moves in steps that the FFN's range does not bridge: layers alone, or whole heads with the hidden width. Where the FFN does not
    move, a size that is a shape's own is that shape's: what came out comes out again.

    Args:
        size: Parameters wanted.
        small: Shape of the smaller neighbour.
        large: Shape of the larger neighbour.
        config: Config of either neighbour.
        layers: Layers wished for; by default linear in size.
        tolerance: Distance from the size, as a share of it, that counts as meeting it; more than 0.2% (1% where widths move and the FFN does
            not) never does where another shape is nearer.
        hidden: Hidden width wished for; by default linear in size.

    Returns:
        The shape nearest to the path of those that meet the size, else the nearest in size; the caller checks how near it is.
    """
    low, high = count(small, config), count(large, config)
    share = (size - low) / max(high - low, 1)
    wish = small.layers + share * (large.layers - small.layers) if layers is None else layers
    accept = min(tolerance, 0.002 if small.ffn != large.ffn or small.hidden == large.hidden else 0.01)
    nearest: tuple[tuple[float, float], Shape] | None = None
    candidates = _Candidates(small, large, config)
    off = candidates.distance(share, hidden)
    depths = sorted(span(small.layers, large.layers), key=lambda depth: (abs(depth - wish), depth))
    if small.ffn == large.ffn and (found := candidates.exact(size, wish, off)) is not None:
        return found  # sizes come in steps, and one that is asked for again is its shape's
    for depth in depths:
        ffn, sizes = candidates.at(size, depth, accept / 2)
        errors = np.abs(sizes - size)
        fitting = errors <= accept * size
        best = int(np.lexsort((errors, off, ~fitting) if fitting.any() else (off, errors))[0])
        if fitting[best]:
            return candidates.shape(best, depth, ffn)
        if nearest is None or (errors[best], abs(depth - wish)) < nearest[0]:
            nearest = (float(errors[best]), abs(depth - wish)), candidates.shape(best, depth, ffn)
    assert nearest is not None
    return nearest[1]


def span(first: int, second: int) -> range:
    """The whole numbers from one to another, both included, whichever is larger."""
    return range(min(first, second), max(first, second) + 1)


class _Candidates:
    """The widths between two shapes that an architecture can have: kv heads, heads and hidden width, one row each."""

    def __init__(self, small: Shape, large: Shape, config: Any) -> None:
        self.small, self.large, self.config = small, large, config
        family = family_of(config)
        hidden = np.arange(min(small.hidden, large.hidden), max(small.hidden, large.hidden) + 1)
        rows = []
        for kv_heads in span(small.kv_heads, large.kv_heads):
            for group in span(small.heads // small.kv_heads, large.heads // large.kv_heads):
                heads = kv_heads * group
                legal = hidden[family.legal_hidden(hidden, {**small.model_dump(), "heads": heads, "kv_heads": kv_heads})]
                rows.append(np.stack([np.full_like(legal, kv_heads), np.full_like(legal, heads), legal]))
        self.kv_heads, self.heads, self.hidden = np.concatenate(rows, axis=1)

    def distance(self, share: float, hidden: int | None) -> np.ndarray:
        """How far each row is from the path at a share of the size, each axis in units of its range."""
        total = np.zeros(len(self.hidden))
        groups = (self.small.heads // self.small.kv_heads, self.large.heads // self.large.kv_heads)
        for values, low, high, wish in (
            (self.hidden, self.small.hidden, self.large.hidden, hidden), (self.kv_heads, self.small.kv_heads, self.large.kv_heads, None),
            (self.heads // self.kv_heads, *groups, None),
        ):
            if low != high:
                total += np.abs(values - (low + share * (high - low) if wish is None else wish)) / abs(high - low)
        return total

    def at(self, size: int, depth: int, within: float) -> tuple[np.ndarray, np.ndarray]:
        """At a depth, the FFN width with which each row comes nearest to a size, and the sizes that come out."""
        sizes = {"layers": depth, "hidden": self.hidden, "heads": self.heads, "kv_heads": self.kv_heads}
        narrow, wide = sorted((self.small.ffn, self.large.ffn))
        ffn = np.clip(_fill(size, sizes, self.config, within), narrow, wide)
        return ffn, _count_like(self.config, {**sizes, "ffn": ffn})

    def exact(self, size: int, wish: float, off: np.ndarray) -> Shape | None:
        """The shape with exactly this size and the FFN width of both ends that is nearest to a wished number of layers, and ``off`` the path by least; None without one."""
        depths = span(self.small.layers, self.large.layers)
        ffn, least = self.at(size, depths[0], 0.0)
        layer = self.at(size, depths[0] + 1, 0.0)[1] - least  # sizes rise evenly with layers
        more, rest = np.divmod(size - least, layer)
        hits = (rest == 0) & (more >= 0) & (more < len(depths))
        if not hits.any():
            return None
        row = int(np.lexsort((off, np.abs(depths[0] + more - wish), ~hits))[0])
        return self.shape(row, depths[0] + int(more[row]), ffn)

    def shape(self, row: int, depth: int, ffn: np.ndarray) -> Shape:
        """The shape of a row."""
        widths = {"hidden": self.hidden, "heads": self.heads, "kv_heads": self.kv_heads, "ffn": ffn}
        return self.small.model_copy(update={"layers": depth, **{name: int(values[row]) for name, values in widths.items()}})


def check_tolerance(size: int, shape: Shape, small: Shape, large: Shape, config: Any, tolerance: float) -> None:
    """Refuse a shape that is further from the wish than ``tolerance``.

    Raises:
        SizeError: Naming the nearest realisable sizes.
    """
    found = count(shape, config)
    if abs(found - size) <= tolerance * size:
        return
    candidates = _Candidates(small, large, config)
    sizes = {int(parameters) for depth in span(small.layers, large.layers) for parameters in _near(candidates.at(size, depth, 0.0)[1], size)}
    real = sorted(sizes, key=lambda real: abs(real - size))[:2]
    near = " or ".join(f"{format_size(parameters)} ({parameters:,})" for parameters in sorted(real))
    raise SizeError(
        f"no shape between the neighbours has {size:,} parameters within {100 * tolerance:.3g}%; the nearest have {near}: "
        "ask for one of these, or raise tolerance"
    )


def _near(sizes: np.ndarray, size: int) -> np.ndarray:
    return sizes[np.argsort(np.abs(sizes - size), kind="stable")[:2]]
