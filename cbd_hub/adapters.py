"""Adapters that move along the chain: a LoRA that was trained at one size, carried to another by the plans that make the weights.

A LoRA changes a weight by ``s B A``. The plan of a size puts it through the same selections, maps and factors as the weight itself, on B's rows and A's columns
(`interpolation.low_rank` has the formula, `interpolation.carrying` which terms are used); over several segments step by step, over the anchors in between. No
training, no weight is read, and the rank stays what it is. At its own size an adapter is itself, bit for bit.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cbd_hub.adapter_files import (
    CONFIG,
    LINEAGE,
    WEIGHTS,
    Adapter,
    Module,
    config_of,
    lora_config,
    read_adapter,
    same_weight,
    tensors_of,
)
from cbd_hub.adapter_home import Stand, home_of, paths_of
from cbd_hub.errors import ArgumentError, SizeError, WeightsError
from cbd_hub.families import Family, TensorSpec, family_of
from cbd_hub.files import check_absent, public, staged_folder, write_text
from cbd_hub.hub import TOKENIZER_FILES, ChainFiles, open_chain
from cbd_hub.interpolation.carrying import Changes, Place, carry
from cbd_hub.interpolation.execute import materialise
from cbd_hub.interpolation.low_rank import LowRank
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest import Mix, Shape
from cbd_hub.plans import anchor_config, made_config, plan_in, segment_between
from cbd_hub.remote import open_weights
from cbd_hub.sizes import format_size
from cbd_hub.weights import LOADING, stored_shapes


logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CarriedAdapter:
    """A LoRA at another size.

    Attributes:
        plan: The plan of the model that it is for; ``plan.adapter`` holds where it came from and what became of it.
        config: Its adapter_config.json.
        tensors: Its adapter_model.safetensors.
        source: What was carried.
        model_config: The config of the model that it is for.
        modules: What it changes.
    """

    plan: Plan
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    source: Adapter
    model_config: Any
    modules: tuple[Module, ...] = field(repr=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a PEFT folder that ``PeftModel.from_pretrained`` loads on the model of its size.

        Besides the two files of peft it holds that model's config.json, cbd_adapter.json with the lineage, and the tokenizer's files that lay beside the adapter.

        Raises:
            StorageError: If the folder is in the way or the disk is full.
        """
        with staged_folder(Path(folder)) as target:
            if self.config == self.source.config:
                shutil.copyfile(self.source.folder / CONFIG, target / CONFIG)
            else:
                write_text(target / CONFIG, json.dumps(self.config, indent=2, sort_keys=True) + "\n")
            if self.plan.adapter is not None and self.plan.adapter["steps"] == 0:
                shutil.copyfile(self.source.folder / WEIGHTS, target / WEIGHTS)
            else:
                save_file(self.tensors, target / WEIGHTS, metadata={"format": "pt"})
            for name in TOKENIZER_FILES:
                if (self.source.folder / name).is_file():
                    shutil.copyfile(self.source.folder / name, target / name)
            self.model_config.save_pretrained(target)
            write_text(target / LINEAGE, json.dumps(self.plan.adapter, indent=1) + "\n")

    def load_into(self, model: Any) -> None:
        """Load it into the model of its size by transformers' own integration of peft.

        Raises:
            ArgumentError: If peft is not there.
            WeightsError: If the model has not just the modules that it changes.
        """
        config = lora_config(self.config)
        tensors = {name: tensor for name, tensor in self.tensors.items() if ".lora_" in name}  # without copies of weights
        with LOADING:
            info = model.load_adapter(peft_config=config, adapter_state_dict=tensors)
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if getattr(info, what):
                raise WeightsError(f"adapter {self.source.name}: loading it left {what} {sorted(map(str, getattr(info, what)))[:3]}; report this")

    def changes(self) -> dict[str, LowRank]:
        """The change of each weight by its checkpoint key.

        Raises:
            ArgumentError: If merging would change more than the adapter does.
        """
        family = family_of(self.model_config)
        if getattr(self.model_config, family.tied) and any(_known(family, module.path)[0].name == family.embedding for module in self.modules):
            raise ArgumentError(f"adapter {self.source.name} changes the embedding, which the head shares: merged, it would change both; keep it apart with CBDModel.from_chain(..., adapter=)")
        return changes_of(family, self.source, self.modules)


def carry_adapter(
    adapter: str | os.PathLike[str], chain: str | os.PathLike[str], size: str | int | None = None, *, output_dir: str | os.PathLike[str] | None = None,
    shape: Shape | Mapping[str, int] | None = None, strategy: str = "auto", alpha: float | None = None, tolerance: float = 0.02, adapter_size: str | int | None = None,
    base_model: str | None = None, revision: str | None = None, token: str | bool | None = None, cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False, force_download: bool = False,
) -> CarriedAdapter:
    """A LoRA carried to another size of the chain, without training and without a weight of the chain being read.

    It loads with ``PeftModel.from_pretrained`` on what `CBDModel.from_chain` gives for the same size, shape, strategy and alpha.

    Args:
        adapter: A PEFT folder, or a Hub id: ``org/lora`` or ``org/lora@revision``. LoRA and rsLoRA, with ranks and alphas by pattern; safetensors only.
        chain: The chain: a local folder or a Hub id.
        size: Unique parameters wanted.
        output_dir: A folder to write it to: absent or empty.
        shape: The exact shape instead, as in `CBDModel.plan`.
        strategy: As for the model.
        alpha: As for the model.
        tolerance: As for the model.
        adapter_size: The size that it was trained at, where its files and shapes do not tell.
        base_model: What the folder names as its base model; by default an anchor's repo at an anchor's size, else the chain.
        revision: Revision of the chain's index repo.
        token: Hub token.
        cache_dir: Another place for the Hub's cache.
        local_files_only: Make no request.
        force_download: Fetch even what is cached.

    Returns:
        The carried adapter.

    Raises:
        ArgumentError: If it is of a kind that cannot be carried, or it fits no size of the chain, or more than one.
        SizeError: If a bridge lies between the two sizes, or the size cannot be had.
        WeightsError: If its files are missing, pickled or broken.
        StorageError: If the folder is in the way.

    Example:
        >>> carried = carry_adapter("org/lora-135M", "org/chain", size="117M", output_dir="./lora-117M")  # doctest: +SKIP
        >>> PeftModel.from_pretrained(CBDModel.from_chain("org/chain", size="117M"), "./lora-117M")  # doctest: +SKIP
    """
    if output_dir is not None:
        check_absent(Path(output_dir))
    files = open_chain(chain, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download)
    plan = plan_in(files.glanced, size, shape=shape, strategy=strategy, alpha=alpha, tolerance=tolerance)
    made = carried_to(files, plan, adapter, adapter_size, base_model)
    if output_dir is not None:
        made.save(output_dir)
    return made


def check_home(adapter: str | os.PathLike[str] | None, adapter_size: str | int | None) -> None:
    """Refuse a size at which an adapter was trained where no adapter came.

    Raises:
        ArgumentError: If so.
    """
    if adapter is None and adapter_size is not None:
        raise ArgumentError(f"adapter_size={adapter_size!r} is the size at which an adapter was trained, and no adapter came; name it, or leave adapter_size out")


def carried_to(
    files: ChainFiles, plan: Plan, adapter: str | os.PathLike[str], size: str | int | None = None, base_model: str | None = None, *, weights: bool = True,
) -> CarriedAdapter:
    """An adapter carried to a plan's model.

    Args:
        files: The chain.
        plan: The plan.
        adapter: A PEFT folder or a Hub id.
        size: The size that it was trained at, where that is to be said.
        base_model: What to name as its base model.
        weights: Whether copies of weights that it holds are compared with the chain's.
    """
    source, glance = read_adapter(adapter, files.options), files.glanced
    home, target = home_of(glance, source, size), Stand.of(glance, plan)
    steps = route(glance, home, target)
    if home.place.shape == target.place.shape and home.plan.strategy == target.plan.strategy == "blend" and not home.place.mix.near(target.place.mix):
        logger.warning("adapter %s was trained on the blend of %s with %s, and this one has %s; name the alpha (alpha=%.4g) for that one", source.name, home.named(glance), home.place.mix.text, target.place.mix.text, home.place.mix.alpha)
    family, anchors = family_of(home.config), files.manifest.anchors
    copied = _copied(source, home.config)
    if weights and copied:
        _check_copies(files, source, home, copied)
    changes: Changes = changes_of(family, source, source.modules)
    for large, start, goal in steps:
        changes = carry(segment_between(glance, anchors[large + 1], anchors[large]), changes, start, goal)
    modules = _modules(source, target.config, changes) if steps else source.modules
    if not modules:
        raise ArgumentError(f"adapter {source.name} changes only layers that {target.named(files)} does not hold; ask for a larger size")
    lineage = {
        "adapter": public(source.name), "revision": source.revision, "chain": files.name if files.revision is not None else plan.chain, "chain_revision": files.revision,
        "home": {"size": home.named(files), "parameters": home.parameters, "shape": home.place.shape.text, "found_by": home.by},
        "target": {"size": target.named(files), "parameters": plan.parameters, "shape": plan.shape.text}, "steps": len(steps),
        "modules": {"home": len(source.modules), "target": len(modules)}, "ranks": {"home": source.ranks, "target": replace(source, modules=modules).ranks},
    }
    renamed = {} if base_model is None else {"base_model_name_or_path": base_model}
    config = config_of(source, modules, paths_of(target.config), base_model or _base(files, plan)) if steps else {**source.config, **renamed}
    made = replace(plan, adapter=lineage)
    model_config = made_config(files if weights else glance, made)
    return CarriedAdapter(made, config, tensors_of(modules) if steps else dict(source.tensors), source, model_config, modules)


def route(files: ChainFiles, home: Stand, target: Stand) -> list[tuple[int, Place, Place]]:
    """The way between two places: for each step the segment, as its larger anchor's place among the anchors, and the places in it; none where both are one.

    Raises:
        SizeError: If a bridge lies between them.
    """
    anchors, steps = files.manifest.anchors, []

    def at(index: int) -> Place:
        return Place(anchors[index].shape, Mix(alpha=1.0))

    if (home.small, home.large) == (target.small, target.large):
        return [] if home.place.alike(target.place) else [(home.large, home.place, target.place)]
    down = home.small <= target.large
    first, last = (home.small, target.large) if down else (home.large, target.small)
    if home.small != home.large:
        steps.append((home.large, home.place, at(first)))
    for index in range(first, last, 1 if down else -1):
        steps.append((index if down else index - 1, at(index), at(index + 1 if down else index - 1)))
    if target.small != target.large:
        steps.append((target.large, at(last), target.place))
    for large, _, _ in steps:
        if files.manifest.link(anchors[large + 1], anchors[large]).kind == "bridge":
            raise SizeError(
                f"the adapter is of {home.named(files)} ({home.parameters:,} parameters) and {target.named(files)} ({target.parameters:,}) was asked for, but the bridge between "
                f"{anchors[large + 1].name} and {anchors[large].name} lies between them, and no adapter crosses one: ask for {format_size(anchors[large].parameters)} or more on its one side, "
                f"{format_size(anchors[large + 1].parameters)} or less on the other, whichever is the adapter's"
            )
    return steps


def changes_of(family: Family, adapter: Adapter, modules: Iterable[Module]) -> dict[str, LowRank]:
    """The change of each weight by its checkpoint key, in the stored orientation and float64."""
    found = {}
    for module in modules:
        spec, _, key = _known(family, module.path)
        a, b = module.a.double(), module.b.double()
        found[key] = LowRank(*((a.T, b.T) if family.transposed(spec) else (b, a)), adapter.scaling(module))
    return found


def _modules(source: Adapter, config: Any, changes: Changes) -> tuple[Module, ...]:
    """Modules of a model from the changes of its weights, in the dtype of the adapter."""
    family = family_of(config)
    dtype = max((module.a.dtype for module in source.modules), key=lambda dtype: torch.finfo(dtype).bits)
    made = []
    for spec, _, key in family.stored(config):
        if (change := changes.get(key)) is None:
            continue
        b, a = (change.right.T, change.left.T) if family.transposed(spec) else (change.left, change.right)
        alpha = change.scale * (math.sqrt(change.rank) if source.rslora else change.rank)
        near = round(alpha)
        path = key.removesuffix(".weight") if spec.name not in family.live else family.live[spec.name].removesuffix(".weight")
        made.append(Module(path, a.to(dtype), b.to(dtype), near if math.isclose(alpha, near, rel_tol=1e-12) else alpha, family.embeds(spec)))
    return tuple(made)


def _known(family: Family, path: str) -> tuple[TensorSpec, int | None, str]:
    """A module's weight; that it is known has been checked with the adapter's home."""
    found = family.weight_of(path)
    assert found is not None
    return found


def _base(files: ChainFiles, plan: Plan) -> str:
    """What an adapter at a plan's size belongs on: an anchor's own repo or folder, else the chain."""
    if plan.strategy != "anchor":
        return files.name
    anchor = files.manifest.anchor(plan.large)
    remote = files.remote(anchor)
    if remote is None:
        return str(files.root / (anchor.location.subfolder or ""))
    return files.name if anchor.location.subfolder else remote[0]


def _copied(adapter: Adapter, config: Any) -> dict[str, str]:
    """Module path -> checkpoint key of each weight that an adapter holds a copy of.

    Raises:
        ArgumentError: If one is neither beneath its factors nor of the vocabulary, of which PEFT keeps copies.
    """
    family, own, found = family_of(config), {module.path for module in adapter.modules}, {}
    for path in adapter.copies:
        known = family.weight_of(path)
        if known is None or (path not in own and "vocab" not in known[0].dims):
            raise ArgumentError(f"adapter {adapter.name} holds a weight of {path[:120]}, which is no factor of a LoRA and cannot be carried; train it as a plain LoRA")
        found[path] = known[2] if known[0].present(config) else family.embedding  # a head that is tied to it
    return found


def _check_copies(files: ChainFiles, adapter: Adapter, home: Stand, keys: Mapping[str, str]) -> None:
    """Refuse copies of weights that are not the weights that the adapter is carried away from: they were trained or resized, and would be lost.

    Raises:
        ArgumentError: Naming the first.
    """
    part = replace(home.plan, tensors={key: home.plan.tensors[key] for key in keys.values()})
    opened = {name: open_weights(files, anchor, anchor_config(files, anchor), rows) for name, rows in part.rows().items() for anchor in [files.manifest.anchor(name)]}
    shapes = stored_shapes(home.config)
    for path, key in keys.items():
        weight = materialise(part.tensors[key], lambda name, tensor: opened[name][tensor], shapes[key], torch.float32)
        if not same_weight(adapter.copies[path], weight):
            raise ArgumentError(
                f"adapter {adapter.name} holds a weight of {path[:120]} that is not the one of {home.named(files)}: it was trained or resized beside the LoRA, which cannot be carried: "
                "train it as a plain LoRA; or its model is another one of that shape: name its size by adapter_size="
            )
