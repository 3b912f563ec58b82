"""Where in a chain an adapter was trained: an anchor, or a size in between, as its files say or its tensors show."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cbd_hub.adapter_files import Adapter, Module
from cbd_hub.configs import read_config
from cbd_hub.errors import ArchitectureError, ArgumentError, IntegrityError, SizeError, WeightsError
from cbd_hub.families import Family, family_of
from cbd_hub.families.table import Dimension, dimension_size
from cbd_hub.files import check_file
from cbd_hub.hub import ChainFiles
from cbd_hub.interpolation.carrying import Place
from cbd_hub.interpolation.plan import Plan
from cbd_hub.interpolation.planner import mixed_plan
from cbd_hub.manifest import FILE_NAME, Anchor, Mix, Shape
from cbd_hub.plans import anchor_config, made_elsewhere, plan_in, segment_between
from cbd_hub.shapes import config_for, count, shape_of
from cbd_hub.sizes import format_size
from cbd_hub.wishes import complete_shape


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stand:
    """Where a model stands in a chain.

    Attributes:
        small: Place of the smaller neighbour among the anchors, largest first.
        large: That of the larger one; the same for an anchor.
        place: Where in their segment it stands.
        config: Its transformers config.
        by: How that was found.
        plan: The plan that makes it.
    """

    small: int
    large: int
    place: Place
    config: Any
    by: str
    plan: Plan

    @property
    def parameters(self) -> int:
        """Its size."""
        return count(self.place.shape, self.config)

    @classmethod
    def of(cls, files: ChainFiles, plan: Plan, by: str = "") -> Stand:
        """That of a plan's model."""
        names = [anchor.name for anchor in files.manifest.anchors]
        config = plan.config(anchor_config(files, files.manifest.anchor(plan.large)))
        return cls(names.index(plan.small), names.index(plan.large), Place.of(plan), config, by, plan)

    def named(self, files: ChainFiles) -> str:
        """It in words."""
        anchors = files.manifest.anchors
        return anchors[self.small].name if self.small == self.large else f"{format_size(self.parameters)} between {anchors[self.small].name} and {anchors[self.large].name}"


def home_of(files: ChainFiles, adapter: Adapter, size: str | int | None = None) -> Stand:
    """Where an adapter was trained.

    As ``size`` says, made as the config.json below records it where that is of this size; else the config.json beside it or in its base model's folder, if cbd_hub
    wrote it; else its base model's name, where that is an anchor's, or a folder with the weights of one; else the one place that its modules and their shapes fit, as a chain makes it by its size.
    All are checked against the modules and the shapes. Where no size is said, a base model that is another one for all that can be read of it here is refused; one of which nothing can be read is warned of.

    Args:
        files: The chain.
        adapter: The adapter.
        size: The size that it was trained at, as in `CBDModel.plan`.

    Raises:
        ArgumentError: If it fits nothing, or more than one thing, or was trained on a model that is not this chain's.
    """
    files = files.glanced
    base = adapter.config.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base.isprintable() else ""  # of others there is no path
    recorded = anchor = None
    try:
        recorded = _recorded(files, adapter, adapter.folder, "config.json")
        if recorded is None and base and (anchor := _named(files, base)) is None:
            recorded = _recorded(files, adapter, _path(base), "base_model_name_or_path")
    except ArgumentError as error:
        if size is None:
            raise
        logger.warning("%s; it is carried as what adapter_size says", error)
    if size is not None:
        said = Stand.of(files, plan_in(files, size), "adapter_size")
        if recorded is not None and recorded.parameters == said.parameters:  # the same size, and besides how it was made
            return recorded
        _check(files, adapter, said, f"adapter_size={size!r}")
        return said
    if recorded is not None:
        return recorded
    if anchor is not None:
        found = Stand.of(files, plan_in(files, anchor.parameters), "base_model_name_or_path")
        _check(files, adapter, found, f"base_model_name_or_path is {base}")
        return found
    found = _by_shapes(files, adapter)
    if base and base != files.name and _path(base).resolve() != files.root.resolve():
        if os.path.isfile(_path(base) / "config.json") and not os.path.isfile(_path(base) / FILE_NAME):
            raise ArgumentError(
                f"adapter {adapter.name}: its base model {base} has the files of no anchor of {files.name}, though {found.named(files)} has its shape; give the chain that its model is from, or say by adapter_size= that it is of that size"
            )
        logger.warning("adapter %s names the base model %s, of which %s knows nothing: by its shapes it is of %s; adapter_size= says another", adapter.name, base, files.name, found.named(files))
    return found


def _check(files: ChainFiles, adapter: Adapter, found: Stand, said: str) -> None:
    misfit = misfit_of(adapter, found.config)
    if misfit is not None:
        raise ArgumentError(f"adapter {adapter.name}: {said}, which is {found.named(files)} of {files.name}, but {misfit}; name the size that it was trained at by adapter_size=")


def _recorded(files: ChainFiles, adapter: Adapter, folder: Path, by: str) -> Stand | None:
    """The place that a folder's config.json says, where it says one that the adapter fits.

    Raises:
        ArgumentError: If it is that of a model of another architecture or another chain.
    """
    if not os.path.isfile(folder / "config.json") or os.path.isfile(folder / FILE_NAME):
        return None
    try:
        config = read_config(folder)
    except WeightsError:
        return None
    except ArchitectureError:
        config = None
    strange = _strange(files, config)
    if strange is not None:
        model = "the model of its config.json" if by == "config.json" else f"its base model {folder}"
        raise ArgumentError(f"adapter {adapter.name}: {model} {strange}, and so is no model of {files.name}; give the chain that its model is from, or its size by adapter_size=")
    made = getattr(config, "cbd", None)
    try:
        if not isinstance(made, Mapping) or misfit_of(adapter, config) is not None:
            return None
        shape, strategy = shape_of(config), made.get("strategy")
        plan = plan_in(files, shape=shape, strategy=strategy if strategy in ("blend", "patch") else "auto")
        if "alpha" in made and plan.strategy != "anchor":
            segment = segment_between(files, files.manifest.anchor(plan.small), files.manifest.anchor(plan.large))
            plan = mixed_plan(segment, shape, Mix(**{name: made[name] for name in Mix.model_fields if name in made}), chain=plan.chain)
        found = Stand.of(files, plan, by)
        names = {files.manifest.anchors[place].name for place in (found.small, found.large)}
        return found if names == set(made.get("neighbours", ())) else None
    except (ArchitectureError, ArgumentError, SizeError, ValidationError, TypeError):
        return None


def _strange(files: ChainFiles, config: Any) -> str | None:
    """What a model's config (None of an unknown architecture) says against its being one of a chain, in words that follow its name; None where it says nothing."""
    family = family_of(anchor_config(files, files.manifest.anchors[0]))
    if config is None or family_of(config) is not family:
        return f"is no {family.name}"
    made = getattr(config, "cbd", None)
    if not isinstance(made, Mapping) or "chain" not in made or not made_elsewhere(files, made):
        return None
    named = str(made["chain"])[:120]
    return f"was made from another chain of the name {named}, or before it was made anew" if named in (files.name, files.manifest.name) else f"was made from {named}"


def _named(files: ChainFiles, base: str) -> Anchor | None:
    """The anchor that a model's name or folder means."""
    manifest = files.manifest
    path = _path(base)
    for anchor in manifest.anchors:
        remote, location = files.remote(anchor), anchor.location
        if remote is None:
            if os.path.isdir(path) and path.resolve() == (files.root / (location.subfolder or "")).resolve():
                return anchor
        elif not os.path.isdir(path) and location.subfolder is None and base == remote[0]:
            return anchor
    same = next((anchor for anchor in manifest.anchors if _holds(path, anchor)), None)
    if same is not None:
        return same
    first, teacher = manifest.anchors[0], manifest.teacher
    if teacher is not None and teacher.repo_id == base and first.origin == "source" and first.parameters == teacher.parameters:
        return first
    return None


def _path(name: str) -> Path:
    """A name as a path: also one that no folder can have."""
    return Path(os.path.expanduser(name))


def _holds(folder: Path, anchor: Anchor) -> bool:
    """Whether a folder is the checkpoint that an anchor was made of: its weights are the same, byte for byte."""
    weights = {folder / name: record for name, record in anchor.files.items() if name.endswith(".safetensors")}
    if not weights or not all(os.path.isfile(path) and path.stat().st_size == record.bytes for path, record in weights.items()):
        return False
    try:
        for path, record in weights.items():
            check_file(path, record.sha256, record.bytes)
    except IntegrityError:
        return False
    return True


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
    missing = adapter.among(paths_of(config)) - {module.path for module in adapter.modules}
    if highest >= sizes["layers"] or any((_layer(family, path) or 0) > highest >= 0 for path in missing):
        return f"it has factors of {highest + 1} layers, and there are {sizes['layers']}"
    return f"its config targets {min(missing)[:120]} there too, of which it has no factors" if missing else None


def paths_of(config: Any) -> list[str]:
    """Paths of all modules of a model that a LoRA can change."""
    family = family_of(config)
    live = [family.live.get(spec.name, name) for spec, _, name in family.stored(config) if len(spec.dims) == 2]
    return [name.removesuffix(".weight") for name in live] + ([family.live.get(family.head, family.head).removesuffix(".weight")] if getattr(config, family.tied) else [])


def _layer(family: Family, path: str) -> int | None:
    """The layer of a module; None outside the layers."""
    known = family.weight_of(path)
    return None if known is None else known[1]


def _sides(family: Family, module: Module) -> tuple[Dimension, Dimension]:
    """The axes of a module's input and of its output."""
    known = family.weight_of(module.path)
    assert known is not None
    dims = known[0].dims
    return (dims[0], dims[1]) if family.transposed(known[0]) else (dims[1], dims[0])


def _by_shapes(files: ChainFiles, adapter: Adapter) -> Stand:
    """The one anchor or shape between two that the modules and their tensors fit.

    Raises:
        ArgumentError: If there is none, or more than one.
    """
    anchors = files.manifest.anchors
    homes = [(anchor.shape, anchor.name) for anchor in anchors if misfit_of(adapter, anchor_config(files, anchor)) is None]
    for small, large in zip(anchors[1:], anchors):
        link = files.manifest.link(small, large)
        if link.kind == "segment":
            config, blend = anchor_config(files, large), link.strategies.blend
            found = _between(adapter, small, large, config, aligned=blend is not None and blend.align is not None)
            homes += [(shape, f"{shape.layers} layers ({format_size(count(shape, config))}) between {small.name} and {large.name}") for shape in found]
    if len(homes) == 1:
        plan = plan_in(files, shape=homes[0][0])
        sized = plan_in(files, plan.parameters)
        return Stand.of(files, sized if sized.shape == plan.shape else plan, "shapes")
    if homes:
        named = ", ".join(name for _, name in homes[:3]) + (f" and {len(homes) - 3} more" if len(homes) > 3 else "")
        raise ArgumentError(f"adapter {adapter.name} fits {named} of {files.name} alike ({_shown(adapter)}); say by adapter_size= which it was trained on")
    misfits = "; ".join(f"{anchor.name}: {misfit_of(adapter, anchor_config(files, anchor))}" for anchor in anchors[:3])
    raise ArgumentError(f"adapter {adapter.name} ({_shown(adapter)}) fits no size of {files.name} ({misfits}); give the chain that its model is from, or its size by adapter_size=")


def _shown(adapter: Adapter) -> str:
    """What an adapter shows of its model's shape."""
    base = adapter.config.get("base_model_name_or_path")
    first = adapter.modules[-1]
    return f"{len(adapter.modules)} modules, {first.path[:80]} {first.a.shape[1]} x {first.b.shape[0]}, base model {str(base)[:120]}"


def _between(adapter: Adapter, small: Anchor, large: Anchor, config: Any, aligned: bool) -> list[Shape]:
    """The shapes between two anchors that an adapter fits, one for each number of layers.

    With an anchor's own layers a size in between differs from it in widths only. Where no module shows them, it counts if the anchors were aligned: its
    units then stand in coordinates that are not the anchor's.
    """
    family = family_of(config)
    known = _axes(family, adapter, family.sizes(config))
    ends = small.shape.model_dump(), large.shape.model_dump()
    if known is None or any(not min(ends[0][name], ends[1][name]) <= value <= max(ends[0][name], ends[1][name]) for name, value in known.items()):
        return []
    highest = max((layer for module in adapter.modules if (layer := _layer(family, module.path)) is not None), default=None)
    depths = [{}] if highest is None else [{"layers": layers} for layers in range(max(highest + 1, small.shape.layers), large.shape.layers + 1)]
    found = []
    for depth in depths:
        shape = _completed({**known, **depth}, small.shape, large.shape, config)
        if aligned and shape in (small.shape, large.shape):
            shape = _completed({**known, **depth}, small.shape, large.shape, config, share=0.5)
        if shape is not None and shape not in (small.shape, large.shape) and misfit_of(adapter, config_for(shape, config)) is None:
            found.append(shape)
    return found


def _axes(family: Family, adapter: Adapter, sizes: Mapping[str, int]) -> dict[str, int] | None:
    """The axes that an adapter's tensors show; None where they contradict each other, or the architecture."""
    known = dict[str, int]()
    for module in adapter.modules:
        if family.weight_of(module.path) is None:
            return None
        for axes, length in zip(_sides(family, module), (module.a.shape[1], module.b.shape[0])):
            parts = axes if isinstance(axes, tuple) else (axes,)
            moving = next((part for part in parts if part in ("hidden", "ffn", "heads", "kv_heads")), None)
            rest = dimension_size(tuple(part for part in parts if part != moving), sizes)
            if length % rest or (moving is None and length != rest) or (moving is not None and known.setdefault(str(moving), length // rest) != length // rest):
                return None
    return known


def _completed(known: Mapping[str, int], small: Shape, large: Shape, config: Any, share: float | None = None) -> Shape | None:
    """A shape between two from some of its axes: the others go as far from the smaller one as these, or as said; None where there is none."""
    ends = small.model_dump(), large.model_dump()
    if share is None:
        shares = [(value - ends[0][name]) / (ends[1][name] - ends[0][name]) for name, value in known.items() if ends[0][name] != ends[1][name]]
        share = sum(shares) / len(shares) if shares else 0.5
    guessed = {name: round(ends[0][name] + share * (ends[1][name] - ends[0][name])) for name in ("layers", "ffn", "hidden") if name not in known}
    if not {"heads", "kv_heads"} & known.keys() and not family_of(config).hidden_is_heads:
        guessed["kv_heads"] = round(ends[0]["kv_heads"] + share * (ends[1]["kv_heads"] - ends[0]["kv_heads"]))
    try:
        return complete_shape({**guessed, **known}, small, large, config)
    except (ArgumentError, ArchitectureError):
        return None
