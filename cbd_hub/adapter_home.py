"""Where in a chain an adapter was trained: an anchor, or a size in between, as its files say or its tensors show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cbd_hub.adapter_files import Adapter, Module
from cbd_hub.errors import ArchitectureError, ArgumentError, SizeError, WeightsError
from cbd_hub.families import Family, family_of
from cbd_hub.families.table import Dimension, dimension_size
from cbd_hub.hub import ChainFiles
from cbd_hub.interpolation.carrying import Place
from cbd_hub.interpolation.planner import Plan
from cbd_hub.manifest import Anchor, Mix, Shape
from cbd_hub.plans import anchor_config, plan_in
from cbd_hub.shapes import complete_shape, config_for, count, shape_of
from cbd_hub.sizes import format_size
from cbd_hub.weights import read_config


@dataclass(frozen=True)
class Stand:
    """Where a model stands in a chain.

    Attributes:
        small: Place of the smaller neighbour among the anchors, largest first.
        large: That of the larger one; the same for an anchor.
        place: Where in their segment it stands.
        config: Its transformers config.
        by: How that was found.
    """

    small: int
    large: int
    place: Place
    config: Any
    by: str

    @property
    def parameters(self) -> int:
        """Its size."""
        return count(self.place.shape, self.config)

    @classmethod
    def of(cls, files: ChainFiles, plan: Plan, by: str = "") -> Stand:
        """That of a plan's model."""
        names = [anchor.name for anchor in files.manifest.anchors]
        config = plan.config(anchor_config(files, files.manifest.anchor(plan.large)))
        return cls(names.index(plan.small), names.index(plan.large), Place.of(plan), config, by)

    def named(self, files: ChainFiles) -> str:
        """It in words."""
        anchors = files.manifest.anchors
        return anchors[self.small].name if self.small == self.large else f"{format_size(self.parameters)} between {anchors[self.small].name} and {anchors[self.large].name}"


def home_of(files: ChainFiles, adapter: Adapter, size: str | int | None = None) -> Stand:
    """Where an adapter was trained.

    As ``size`` says; else its own config.json, if cbd_hub wrote it; else its base model's name, where that is an anchor's; else the shapes of its tensors: first an
    anchor, then a size in between. All are checked against the shapes.

    Args:
        files: The chain.
        adapter: The adapter.
        size: The size that it was trained at, as in `CBDModel.plan`.

    Raises:
        ArgumentError: If it fits nothing, or more than one thing.
    """
    files = replace(files, glance=True)
    if size is not None:
        found = Stand.of(files, plan_in(files, size), "adapter_size")
        _check(files, adapter, found, f"adapter_size={size!r}")
        return found
    recorded = _recorded(files, adapter)
    if recorded is not None:
        return recorded
    base = adapter.config.get("base_model_name_or_path")
    anchor = _named(files, base) if isinstance(base, str) else None
    if anchor is not None:
        found = Stand.of(files, plan_in(files, anchor.parameters), "base_model_name_or_path")
        _check(files, adapter, found, f"base_model_name_or_path is {base}")
        return found
    return _by_shapes(files, adapter)


def _check(files: ChainFiles, adapter: Adapter, found: Stand, said: str) -> None:
    misfit = misfit_of(adapter, found.config)
    if misfit is not None:
        raise ArgumentError(f"adapter {adapter.name}: {said}, which is {found.named(files)} of {files.name}, but {misfit}; name the size that it was trained at by adapter_size=")


def _recorded(files: ChainFiles, adapter: Adapter) -> Stand | None:
    """The place that a config.json beside the adapter says, where it is one of this chain that the adapter fits."""
    if not (adapter.folder / "config.json").is_file():
        return None
    try:
        config = read_config(adapter.folder)
        made = getattr(config, "cbd", None)
        if not isinstance(made, Mapping) or misfit_of(adapter, config) is not None:
            return None
        shape = shape_of(config)
        strategy = made.get("strategy")
        found = Stand.of(files, plan_in(files, shape=shape, strategy=strategy if strategy in ("blend", "patch") else "auto"), "config.json")
        if "alpha" in made and found.small != found.large:
            found = replace(found, place=Place(shape, Mix(**{name: made[name] for name in Mix.model_fields if name in made})))
        names = {files.manifest.anchors[place].name for place in (found.small, found.large)}
        return found if names == set(made.get("neighbours", ())) else None
    except (WeightsError, ArchitectureError, ArgumentError, SizeError, ValidationError, TypeError):
        return None


def _named(files: ChainFiles, base: str) -> Anchor | None:
    """The anchor that a model's name or folder means."""
    manifest = files.manifest
    path = Path(base).expanduser()
    for anchor in manifest.anchors:
        remote, location = files.remote(anchor), anchor.location
        if remote is None:
            if path.is_dir() and path.resolve() == (files.root / (location.subfolder or "")).resolve():
                return anchor
        elif not path.is_dir() and location.subfolder is None and base == remote[0]:
            return anchor
    first, teacher = manifest.anchors[0], manifest.teacher
    if teacher is not None and teacher.repo_id == base and first.origin == "source" and first.parameters == teacher.parameters:
        return first
    return None


def misfit_of(adapter: Adapter, config: Any) -> str | None:
    """Why an adapter cannot be one of a model of this config, in words; None where it can."""
    family = family_of(config)
    sizes = family.sizes(config)
    highest = -1
    for module in adapter.modules:
        known = family.weight_of(module.path)
        if known is None or not known[0].present(config):
            tied = known is not None and known[0].name == family.head
            return f"it changes {module.path[:120]}, which {'shares the weights of the embedding' if tied else f'no {family.name} of this kind has'}"
        spec, layer, _ = known
        if layer is not None:
            highest = max(highest, layer)
        wanted = tuple(dimension_size(dim, sizes) for dim in _sides(family, module))
        if (module.a.shape[1], module.b.shape[0]) != wanted:
            return f"{module.path[:120]} is {module.a.shape[1]} x {module.b.shape[0]} in the adapter and {wanted[0]} x {wanted[1]} there"
    if highest >= sizes["layers"] or (adapter.everywhere and 0 <= highest < sizes["layers"] - 1):
        return f"it has factors of {highest + 1} layers, and there are {sizes['layers']}"
    return None


def _sides(family: Family, module: Module) -> tuple[Dimension, Dimension]:
    """The axes of a module's input and of its output."""
    known = family.weight_of(module.path)
    assert known is not None
    dims = known[0].dims
    return (dims[0], dims[1]) if family.transposed(known[0]) else (dims[1], dims[0])


def _by_shapes(files: ChainFiles, adapter: Adapter) -> Stand:
    """The one anchor, or else the one shape between two, that the tensors fit.

    Raises:
        ArgumentError: If there is none, or more than one.
    """
    anchors = files.manifest.anchors
    fitting = [anchor for anchor in anchors if misfit_of(adapter, anchor_config(files, anchor)) is None]
    if len(fitting) == 1:
        return Stand.of(files, plan_in(files, fitting[0].parameters), "shapes")
    if len(fitting) > 1:
        raise ArgumentError(f"adapter {adapter.name} fits the anchors {', '.join(anchor.name for anchor in fitting)} of {files.name} alike ({_shown(adapter)}); say by adapter_size= which it was trained on")
    between: list[Stand] = []
    for small, large in zip(anchors[1:], anchors):
        if files.manifest.link(small, large).kind == "segment":
            shape = _between(adapter, small, large, anchor_config(files, large))
            if shape is not None:
                between.append(Stand.of(files, plan_in(files, shape=shape), "shapes"))
    if len(between) == 1:
        return between[0]
    if between:
        raise ArgumentError(f"adapter {adapter.name} fits {' and '.join(stand.named(files) for stand in between)} of {files.name} alike ({_shown(adapter)}); say by adapter_size= where it was trained")
    misfits = "; ".join(f"{anchor.name}: {misfit_of(adapter, anchor_config(files, anchor))}" for anchor in anchors[:3])
    raise ArgumentError(f"adapter {adapter.name} ({_shown(adapter)}) fits no size of {files.name} ({misfits}); give the chain that its model is from, or its size by adapter_size=")


def _shown(adapter: Adapter) -> str:
    """What an adapter shows of its model's shape."""
    base = adapter.config.get("base_model_name_or_path")
    first = adapter.modules[-1]
    return f"{len(adapter.modules)} modules, {first.path[:80]} {first.a.shape[1]} x {first.b.shape[0]}, base model {str(base)[:120]}"


def _between(adapter: Adapter, small: Anchor, large: Anchor, config: Any) -> Shape | None:
    """The shape between two anchors that the tensors show; what they do not show goes as far from the smaller one as what they do."""
    family = family_of(config)
    sizes, known = family.sizes(config), dict[str, int]()
    if not adapter.everywhere:
        return None
    layers = -1
    for module in adapter.modules:
        spec = family.weight_of(module.path)
        if spec is None or not spec[0].present(config):
            return None
        layers = max(layers, -1 if spec[1] is None else spec[1])
        for axes, length in zip(_sides(family, module), (module.a.shape[1], module.b.shape[0])):
            parts = axes if isinstance(axes, tuple) else (axes,)
            moving = next((part for part in parts if part in ("hidden", "ffn", "heads", "kv_heads")), None)
            rest = dimension_size(tuple(part for part in parts if part != moving), sizes)
            if length % rest or (moving is None and length != rest) or (moving is not None and known.setdefault(str(moving), length // rest) != length // rest):
                return None
    if layers >= 0:
        known["layers"] = layers + 1
    ends = small.shape.model_dump(), large.shape.model_dump()
    if any(not min(ends[0][name], ends[1][name]) <= value <= max(ends[0][name], ends[1][name]) for name, value in known.items()):
        return None
    shares = [(value - ends[0][name]) / (ends[1][name] - ends[0][name]) for name, value in known.items() if ends[0][name] != ends[1][name]]
    share = sum(shares) / len(shares) if shares else 0.5
    guessed = {name: round(ends[0][name] + share * (ends[1][name] - ends[0][name])) for name in ("layers", "ffn", "hidden") if name not in known}
    if not {"heads", "kv_heads"} & known.keys() and not family.hidden_is_heads:
        guessed["kv_heads"] = round(ends[0]["kv_heads"] + share * (ends[1]["kv_heads"] - ends[0]["kv_heads"]))
    try:
        shape = complete_shape({**guessed, **known}, small.shape, large.shape, config)
    except (ArgumentError, ArchitectureError):
        return None
    return shape if shape not in (small.shape, large.shape) and misfit_of(adapter, config_for(shape, config)) is None else None
