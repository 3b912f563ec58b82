"""The segments of a chain from ready checkpoints: neighbours aligned, and measured where there is text."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cbd_hub.ancestry import Ancestry
from cbd_hub.errors import ManifestError, WeightsError, one_line
from cbd_hub.evaluation import Calibration, Documents
from cbd_hub.hub import KEPT_FILE
from cbd_hub.interpolation.maps import Maps
from cbd_hub.interpolation.plan import Kept, layer_types
from cbd_hub.manifest import Aligned, Anchor, Blend, Evaluation, Link, Patch, Strategies
from cbd_hub.measure import measure_segment
from cbd_hub.precision import best_device
from cbd_hub.reporting import Report
from cbd_hub.shapes import block_size, shape_of
from cbd_hub.weights import load_model, load_tokenizer, weights_sha256


logger = logging.getLogger(__name__)

_TOKENS = 4096


def calibration_of(texts: Sequence[str], folder: Path, configs: Sequence[Any]) -> Calibration:
    """Calibration text as the tokenizer of a checkpoint reads it, in blocks that models of all these configs have positions for.

    Raises:
        DataError: If it is too short.
    """
    return Calibration.read(texts, load_tokenizer(folder), block_size(*configs), _TOKENS)


@dataclass(frozen=True)
class Joined:
    """A segment between two ready anchors.

    Attributes:
        link: As in chain.json.
        kept: The larger one's units that the smaller one's stand for; None where the two were neither aligned nor one cut from the other.
        maps: How the smaller one's are turned; None where they were not.
        ends: Losses of the smaller and of the larger one, where there is text.
    """

    link: Link
    kept: Kept | None = None
    maps: Maps | None = None
    ends: tuple[Evaluation, ...] = ()

    @property
    def cut(self) -> bool:
        """Whether the smaller one was cut from the larger one."""
        return self.kept is not None and self.maps is None


def join(
    anchors: Sequence[Anchor], configs: Sequence[Any], folders: Mapping[str, Path], align: str | bool, calibration: Calibration | None,
    dataset: str = "", report: Report | None = None,
) -> Iterator[Joined]:
    """The segments of anchors in falling size.

    Args:
        anchors: The anchors.
        configs: Their configs.
        folders: Anchor name -> its checkpoint.
        align: ``"auto"``, True or False, as for `assemble_chain`.
        calibration: Calibration text, or None.
        dataset: What to call the text.
        report: Called with what is done, how much of it, and of how much.
    """
    def said(small: Anchor) -> Report | None:
        return None if report is None else lambda what, done, total: report(f"{small.name}: {what}", done, total)

    models: dict[str, Any] = {}
    for large, small, *pair in zip(anchors, anchors[1:], configs, configs[1:]):
        types = layer_types(pair[1], pair[0])
        if align is not False or calibration is not None:
            models = {
                name: models.get(name) or load_model(folders[name], torch.float32).to(best_device()) for name in (large.name, small.name)
            }
        kept, maps, aligned = None, None, None
        if align is not False and (kept := _cut_from(models[small.name], models[large.name], folders[small.name], large.name)) is None:
            kept, maps, aligned = _aligned(models[small.name], models[large.name], align, None if calibration is None else calibration.blocks, said(small))
        if calibration is None:
            shared = Kept.even(small.shape, large.shape, types) if kept is None else kept
            yield Joined(plain_link(small, large, shared.dropped[::-1], Blend(replicate=kept is None, align=aligned)), kept, maps)
            continue
        measured = measure_segment(
            models[small.name], models[large.name], kept, calibration.documents, dataset, names=(small.name, large.name), maps=maps, aligned=aligned,
            report=said(small),
        )
        yield Joined(measured.link(), kept, maps, measured.ends)


def _cut_from(small: Any, large: Any, folder: Path, name: str) -> Kept | None:
    """Which units of the larger model the smaller one was cut from; None where its folder does not say so, or says it of others."""
    ancestry = Ancestry.read(folder)
    if ancestry is None:
        return None
    if ancestry.parent != weights_sha256(large):
        logger.warning("%s was cut from another model than %s, so that the two are aligned as published ones are; cut each anchor from the one above it", folder, name)
        return None
    try:
        ancestry.kept.check(shape_of(small.config), shape_of(large.config))
    except ManifestError as error:
        raise WeightsError(f"{folder / KEPT_FILE} is not that of the model beside it ({one_line(error)}); copy it again from the folder of the cut, or remove it") from error
    from cbd_hub.interpolation.align import is_cut_by
    if not is_cut_by(ancestry.kept, small, large):
        logger.warning("%s is not that of the model beside it, whose weights are nearer to other units of %s; it is left out, and the two are aligned", folder / KEPT_FILE, name)
        return None
    return ancestry.kept


def _aligned(
    small: Any, large: Any, align: str | bool, documents: Documents | None, report: Report | None
) -> tuple[Kept | None, Maps | None, Aligned | None]:
    """The shared coordinates; none where ``auto`` finds that they bring the two no nearer."""
    from cbd_hub.interpolation.align import STEPS, brings_nearer, fit
    ids = None if documents is None else documents.ids
    found = fit(small, large, ids, steps=STEPS, report=report)
    if align == "auto" and not brings_nearer(found, small, large, ids):
        return None, None, None
    return found.kept, found.maps, Aligned(residual=found.residual, error=found.error)


def plain_link(small: Anchor, large: Anchor, order: Sequence[int], blend: Blend) -> Link:
    """A link of which nothing was measured, with the order in which layers come back."""
    return Link(
        kind="segment", small=small.name, large=large.name, order=list(order), strategies=Strategies(blend=blend, patch=Patch() if small.shape.only_layers_differ(large.shape) else None)
    )
