"""From an opened chain and a wish (a size, a shape, a budget, a speed) to a plan, and what it costs."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cbd_hub import shapes, wishes
from cbd_hub.configs import StoredConfig, stored_config
from cbd_hub.errors import (
    ArchitectureError,
    ArgumentError,
    IntegrityError,
    ManifestError,
    SizeError,
    StorageError,
    WeightsError,
    one_line,
)
from cbd_hub.families import family_named, family_of
from cbd_hub.hub import ChainFiles
from cbd_hub.interpolation.budget import largest_meeting, largest_size
from cbd_hub.interpolation.curve import Chord, last_loss
from cbd_hub.interpolation.maps import Maps
from cbd_hub.interpolation.plan import Kept, Plan, Segment, anchor_plan
from cbd_hub.interpolation.planner import check_options, segment_of, segment_plan, shape_in
from cbd_hub.manifest import Anchor, Manifest, PathRecord, Shape
from cbd_hub.precision import best_device
from cbd_hub.remote import bytes_to_fetch, header_at_hand
from cbd_hub.sizes import format_size, parse_bytes
from cbd_hub.speed.measuring import Speed, SpeedWish
from cbd_hub.speed.prediction import SpeedModel, terms
from cbd_hub.speed.stopwatch import Stopwatch, one_device
from cbd_hub.weights import common_dtype, stored_dtype


logger = logging.getLogger(__name__)


def anchor_config(files: ChainFiles, anchor: Anchor) -> StoredConfig:
    """The config of an anchor, compared with what chain.json says of it; read once for an opened chain, and not to be changed.

    Raises:
        IntegrityError: If config.json differs from its recorded hash.
        ManifestError: If its shape or parameters are not the recorded ones.
        ArchitectureError: If its architecture has no axis table.
    """
    found: StoredConfig = files.once(("config", anchor.name), lambda: _read_config(files, anchor))
    return found


def _read_config(files: ChainFiles, anchor: Anchor) -> StoredConfig:
    config = stored_config(files.config_folder(anchor))
    family = family_named(anchor.family)
    if family_of(config) is not family:
        raise ManifestError(f"anchor {anchor.name} is a {config.model_type} but chain.json says {anchor.family}; fetch the chain again")
    found = shapes.shape_of(config)
    if found != anchor.shape or shapes.parameter_count(config) != anchor.parameters:
        raise ManifestError(
            f"anchor {anchor.name} has {shapes.parameter_count(config):,} parameters and the shape ({found}), but chain.json says {anchor.parameters:,} and "
            f"({anchor.shape}); fetch the chain again"
        )
    return config


def coordinates_of(files: ChainFiles, small: Anchor, large: Anchor) -> tuple[Kept | None, Maps | None]:
    """Which units of a larger anchor a smaller one holds, and how it is turned into its coordinates; None where they share none, or are not aligned.

    They share them where the smaller one was cut from the larger one, or both from a third.

    Raises:
        IntegrityError: If a maps file differs from its recorded hash.
        ManifestError: If it holds no such maps.
    """
    if small.maps is None or small.parent is None:
        return None, None
    if small.parent == large.name:
        return stored_coordinates(files, small.maps)
    if large.maps is None or large.parent != small.parent:
        return None, None
    (kept, maps), (other, others) = stored_coordinates(files, small.maps), stored_coordinates(files, large.maps)
    return (kept.within(other, large.shape) if maps is others is None else None), None


def stored_coordinates(files: ChainFiles, record: PathRecord) -> tuple[Kept, Maps | None]:
    """Which units of its parent an anchor kept, and how it is turned into the parent's coordinates, from its maps file.

    Raises:
        IntegrityError: If the file differs from its recorded hash.
        ManifestError: If it holds no such maps.
    """
    path = files.side_file(record)
    try:
        arrays = load_file(path)
        return Kept.read(arrays), Maps.read(arrays)
    except (SafetensorError, TypeError, AttributeError) as error:  # numpy lacks some of safetensors' dtypes
        raise ManifestError(f"{path} holds no kept.layers and kept.ffn ({one_line(error)}); fetch or make the chain again") from error


def segment_between(files: ChainFiles, small: Anchor, large: Anchor) -> Segment:
    """The segment between two neighbours of a chain.

    Raises:
        ArchitectureError: If they compute differently in more than their shape.
    """
    config, small_config = anchor_config(files, large), anchor_config(files, small)
    differs = shapes.other_differences(config, small_config)
    if differs:
        raise ArchitectureError(f"anchors {small.name} and {large.name} differ in {', '.join(differs[:4])}; nothing can be interpolated between them")
    return segment_of(files.manifest, small, large, config, small_config, *coordinates_of(files, small, large))


def plan_in(
    files: ChainFiles, size: str | int | None = None, *, memory_budget: str | int | None = None, min_tokens_per_second: str | float | None = None,
    max_latency: str | float | None = None, dtype: Any = None, shape: Shape | Mapping[str, int] | None = None, strategy: str = "auto", alpha: float | None = None,
    tolerance: float = 0.02, watch: Stopwatch | None = None,
) -> Plan:
    """The plan of a size, shape, budget or speed in an opened chain; see `CBDModel.plan`.

    Args beyond those: ``watch`` times the anchors; by default one of ``dtype`` on the best device.
    """
    weight_dtype(dtype, torch.float32)  # refused where it is none, whatever it is needed for
    wish = SpeedWish.read(min_tokens_per_second, max_latency)
    must = [name for name, given in (("memory_budget", memory_budget), ("min_tokens_per_second", min_tokens_per_second), ("max_latency", max_latency)) if given is not None]
    if must and (size is not None or shape is not None):
        raise ArgumentError(f"{'=, '.join(must)}= came with size= or shape=; give {'one of them' if len(must) == 1 else 'either these or one of those'}")
    if must:
        check_options(strategy, alpha)
    glance = files.glanced
    if memory_budget is not None:
        size = _size_that_fits(glance, parse_bytes(memory_budget), dtype, strategy, alpha)
    if wish is None:
        return _plan(files, size, shape, strategy, alpha, tolerance)
    watch = stopwatch(files, dtype) if watch is None else watch
    limit = None if size is None else files.manifest.size(size)
    plan = _plan(files, _size_that_is_fast(glance, wish, limit, watch, strategy, alpha), None, strategy, alpha, tolerance)
    return replace(plan, speed=speed_of(glance, plan, watch))


def warn_of_trough(files: ChainFiles, plan: Plan) -> None:
    """Say where a size is expected to be a poor choice, and which sizes between the same anchors are none."""
    if plan.trough is not None:
        sizes = ", ".join(format_size(size) for link in files.manifest.links if link.small == plan.small for size in link.recommended_sizes)
        logger.warning("%s; %s", plan.trough, f"recommended between them: {sizes}" if sizes else "so are all sizes measured between them")


def stopwatch(files: ChainFiles, dtype: Any = None, device_map: Any = None, attn_implementation: str | None = None, **options: Any) -> Stopwatch:
    """What times a chain's anchors: in a dtype, by default the widest of the anchors', on a device, by default the best.

    Raises:
        ArgumentError: If they name no dtype, or not one device.
    """
    return Stopwatch(_dtype_of(files.glanced, files.manifest.anchors, dtype), one_device(device_map, best_device()), attn_implementation, **options)


def speed_of(files: ChainFiles, plan: Plan, watch: Stopwatch) -> Speed:
    """The predicted speed of a plan's model, from the times of its neighbours."""
    configs = [anchor_config(files, files.manifest.anchor(name)) for name in dict.fromkeys((plan.small, plan.large))]
    return watch.model(*configs).at(terms(plan.shape, configs[-1]))


def usual_sizes(manifest: Manifest) -> list[int]:
    """The sizes of a chain to look at first, in falling order: the anchors, and between two of them the recommended sizes, else the middle.

    Where sizes come in steps, a middle may be none that can be made: plan it with a wide tolerance.
    """
    sizes = {anchor.parameters for anchor in manifest.anchors}
    for link in manifest.links:
        if link.kind == "segment":
            middle = (manifest.anchor(link.small).parameters + manifest.anchor(link.large).parameters) // 2
            sizes.update(link.recommended_sizes or [middle])
    return sorted(sizes, reverse=True)


def _plan(files: ChainFiles, size: str | int | None, shape: Shape | Mapping[str, int] | None, strategy: str, alpha: float | None, tolerance: float) -> Plan:
    """The plan of a size or shape."""
    manifest = files.manifest
    if size is None and shape is None:
        raise ArgumentError('neither size nor shape nor memory_budget nor a speed was given; ask for a size such as size="138M"')
    if not isinstance(tolerance, Real) or not 0.0 < tolerance < 1.0:
        raise ArgumentError(f"tolerance={tolerance!r} is outside 0 to 1; it is a number, a share of the size such as 0.02")
    if shape is not None:
        small, large, wanted = _around_shape(files, shape, None if size is None else manifest.size(size))
    else:
        assert size is not None
        wanted = manifest.size(size)
        small, large = manifest.neighbours(wanted)
    if small is large:
        dataset = small.evaluations[-1].dataset if small.evaluations else None
        # An anchor is itself whatever the strategy; the options are still checked.
        check_options(strategy, alpha)
        return anchor_plan(manifest.name, wanted, small.name, small.shape, anchor_config(files, small), last_loss(small.evaluations, dataset))
    segment = segment_between(files, small, large)
    ends = Chord.of(manifest, manifest.link(small, large)).losses
    plan = segment_plan(
        segment, wanted, shape=shape, strategy=strategy, alpha=alpha, tolerance=tolerance, chain=manifest.name, ends=ends
    )
    if shape is not None and size is not None and abs(plan.parameters - wanted) > tolerance * wanted:
        raise SizeError(
            f"the shape has {plan.parameters:,} parameters but size={size!r} was asked for ({wanted:,}); leave one of them out"
        )
    return plan


def _size_that_fits(files: ChainFiles, budget: int, dtype: Any, strategy: str, alpha: float | None) -> int:
    """The largest size of which the weights take no more than so many bytes; nothing but configs and maps is read."""
    found = largest_size(
        files.manifest, lambda *anchors: budget // _dtype_of(files, anchors, dtype).itemsize, lambda size: _plan(files, size, None, strategy, alpha, 0.99).parameters
    )
    if found is None:
        least = files.manifest.anchors[-1]
        chosen = _dtype_of(files, [least], dtype)
        raise SizeError(
            f"memory_budget={budget:,} bytes hold {budget // chosen.itemsize:,} parameters in {str(chosen).removeprefix('torch.')}, but the smallest anchor of {files.manifest.name} has "
            f"{least.parameters:,} ({least.parameters * chosen.itemsize:,} bytes); give more, or a narrower dtype"
        )
    return found


def made_config(files: ChainFiles, plan: Plan) -> StoredConfig:
    """The config of a plan's model, with ``cbd``: where it came from."""
    config: StoredConfig = plan.config(anchor_config(files, files.manifest.anchor(plan.large)))
    small = files.manifest.anchor(plan.small)
    around = [small, *([] if plan.small == plan.large else [files.manifest.anchor(plan.large)])]
    config.cbd = {
        "chain": files.name if files.revision is not None else plan.chain, "revision": files.revision,
        "neighbours": [anchor.name for anchor in around], "fingerprints": [anchor.fingerprint for anchor in around],
        "strategy": plan.strategy, "parameters": plan.parameters, **({} if plan.mix is None else plan.mix.model_dump()),
        **({} if plan.small == plan.large or small.maps is None else {"maps": small.maps.sha256}),
        **({} if (license := files.manifest.shared_license(around)) is None else {"license": license}),
        **({} if plan.adapter is None else {"adapter": dict(plan.adapter)}),
    }
    return config


def made_elsewhere(files: ChainFiles, made: Mapping[str, Any]) -> bool:
    """Whether a model of which `made_config` says where it came from is of another chain: by its anchors' weights and maps, which a copy of its chain has too.

    What was made before these were written down is told by names alone; a local copy of a chain on the Hub, and the other way round, has another name.

    Args:
        files: The chain.
        made: The model's ``config.cbd``.
    """
    names, anchors = made.get("neighbours"), {anchor.name: anchor for anchor in files.manifest.anchors}
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name in anchors for name in names):
        return True
    around = [anchors[name] for name in names]
    if "fingerprints" in made:
        other = made["fingerprints"] != [anchor.fingerprint for anchor in around]
    else:
        other = (made.get("revision") is None) == (files.revision is None) and made.get("chain") not in (files.name, files.manifest.name)
    if len(around) == 1:
        return bool(other or made.get("parameters") != around[0].parameters)
    return bool(other or ("maps" in made and (around[0].maps is None or made["maps"] != around[0].maps.sha256)))


def _dtype_of(files: ChainFiles, anchors: Sequence[Anchor], dtype: Any) -> torch.dtype:
    """The dtype of a model made of some anchors: the wish, else the narrowest that holds theirs."""
    return weight_dtype(dtype, common_dtype(_anchor_dtype(files, anchor) for anchor in anchors))


def _anchor_dtype(files: ChainFiles, anchor: Anchor) -> torch.dtype:
    """The dtype in which an anchor's weights are stored, which its config may not say; the config's where no header of them is at hand."""

    def found() -> torch.dtype:
        headers = []
        with suppress(IntegrityError, StorageError, WeightsError):  # a load will say so; a plan needs no weights
            headers = [header[0] for name in anchor.weight_files if (header := header_at_hand(files, anchor, name)) is not None]
        return stored_dtype(headers, anchor_config(files, anchor))

    made: torch.dtype = files.once(("dtype", anchor.name), found)
    return made


def _size_that_is_fast(files: ChainFiles, wish: SpeedWish, limit: int | None, watch: Stopwatch, strategy: str, alpha: float | None) -> int:
    """The largest size, of no more than ``limit`` parameters, that is predicted to be fast enough.

    Anchors are timed from the smallest one up, and no further than it takes: the largest of a long chain may be too large for this machine.
    """
    manifest = files.manifest
    anchors = [anchor for anchor in reversed(manifest.anchors) if limit is None or anchor.parameters <= limit]
    reached, met = None, True
    for before, anchor in zip([None, *anchors], anchors):
        if not met and before is not None and manifest.link(before, anchor).kind == "segment":
            continue  # larger than one that is too slow already
        met = wish.met(watch.speed(anchor_config(files, anchor)))
        reached = anchor if met else reached
    if reached is None:
        least = anchors[0]
        raise SizeError(
            f"{wish.text} was asked for, but the smallest anchor of {manifest.name}, {least.name}, reaches {watch.speed(anchor_config(files, least)).text} on {watch.text}; "
            "ask for less, or for a narrower dtype or more threads where they are quicker"
        )
    place = manifest.anchors.index(reached)
    if not place or manifest.link(reached, manifest.anchors[place - 1]).kind == "bridge":
        return reached.parameters
    return _fast_between(files, reached, manifest.anchors[place - 1], wish, limit, watch, strategy, alpha) or reached.parameters


def _fast_between(
    files: ChainFiles, small: Anchor, large: Anchor, wish: SpeedWish, limit: int | None, watch: Stopwatch, strategy: str, alpha: float | None
) -> int | None:
    """The largest size inside a segment that is fast enough and no larger than the limit; None if there is none."""
    if limit == small.parameters:
        return None
    segment = segment_between(files, small, large)
    ends = Chord.of(files.manifest, files.manifest.link(small, large)).losses
    model: SpeedModel = watch.model(anchor_config(files, small), segment.config)

    @functools.cache
    def realised(size: int) -> Shape:
        return shape_in(segment, size, strategy=strategy, alpha=alpha, tolerance=0.99, ends=ends)

    def meets(size: int) -> bool:
        shape = realised(size)
        return (limit is None or shapes.count(shape, segment.config) <= limit) and wish.met(model.at(terms(shape, segment.config)))

    found = largest_meeting(small.parameters, large.parameters, meets)
    if found is None:
        return None
    real = shapes.count(realised(found), segment.config)
    return real if small.parameters <= real <= large.parameters and meets(real) else found


def plan_costs(files: ChainFiles, plan: Plan, dtype: Any = None) -> dict[str, Any]:
    """What a plan costs, from shapes and headers alone: bytes read and, on the Hub, fetched of each anchor; bytes of the model in memory in ``dtype``, else in fp32 and bf16."""
    read: dict[str, int] = {}
    for name, tensors in sorted(plan.sources().items()):
        config = anchor_config(files, files.manifest.anchor(name))
        family = family_of(config)
        sizes = family.sizes(config)
        stored = _anchor_dtype(files, files.manifest.anchor(name))
        read[name] = sum(
            stored.itemsize * math.prod(spec.shape(sizes)) for spec, _, key in family.stored(config) if key in tensors
        )
    fetched = {
        name: bytes_to_fetch(files, files.manifest.anchor(name), anchor_config(files, files.manifest.anchor(name)), rows)
        for name, rows in sorted(plan.rows().items())
    }
    kept = [torch.float32, torch.bfloat16] if dtype in (None, "auto") else [weight_dtype(dtype, torch.float32)]
    memory = {str(kind).removeprefix("torch."): kind.itemsize * plan.parameters for kind in kept}
    return {"bytes_read": read, **({} if files.revision is None else {"bytes_to_fetch": fetched}), "bytes_in_memory": memory}


def _around_shape(files: ChainFiles, shape: Shape | Mapping[str, int], size: int | None) -> tuple[Anchor, Anchor, int]:
    """The neighbours whose segment holds a shape, and the shape's size."""
    anchors = files.manifest.anchors
    if size is not None:
        pairs = [files.manifest.neighbours(size)]
    else:
        pairs = [(small, large) for small, large in zip(anchors[1:], anchors) if files.manifest.link(small, large).kind == "segment"]
        pairs += [(anchor, anchor) for anchor in anchors if not any(anchor is end for pair in pairs for end in pair)]  # with a bridge, or nothing, on both sides
    wish = wishes.named_fields(shape)
    error: ArgumentError | None = None
    within: ArgumentError | None = None  # of a segment that holds every field that is named
    for small, large in pairs:
        try:
            whole = wishes.complete_shape(shape, small.shape, large.shape, anchor_config(files, large))
        except ArgumentError as found:
            error = error or found
            if wishes.outside(wish, small.shape, large.shape) is None:
                within = within or found
            continue
        for anchor in (small, large):
            if whole == anchor.shape:
                return anchor, anchor, anchor.parameters
        return small, large, shapes.count(whole, anchor_config(files, large)) if size is None else size
    assert error is not None
    if within is None and len(pairs) > 1:
        named = {anchor.name: f"{anchor.name} ({anchor.shape.text})" for anchor in anchors}
        segments = "; ".join(" to ".join(dict.fromkeys((named[small.name], named[large.name]))) for small, large in pairs)
        raise ArgumentError(f"the shape {wish} lies in no segment of {files.manifest.name}, which has {segments}; choose one inside")
    raise within or error


def weight_dtype(wish: Any, default: torch.dtype) -> torch.dtype:
    """The dtype that a name or a dtype means; the default for None and "auto".

    Raises:
        ArgumentError: If weights cannot be made in it.
    """
    if wish is None or wish == "auto":
        return default
    found = getattr(torch, wish.removeprefix("torch."), None) if isinstance(wish, str) else wish
    if found not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ArgumentError(f'dtype={wish!r} is no dtype that weights can be made in; give torch.bfloat16, "float32", "float16" or "auto"')
    chosen: torch.dtype = found
    return chosen
