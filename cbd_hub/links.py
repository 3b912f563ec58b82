"""The segments between ready checkpoints, or models that began as such: neighbours aligned, and measured where there is text."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cbd_hub.ancestry import Ancestry
from cbd_hub.cut import measure_importance
from cbd_hub.errors import DataError, ManifestError, WeightsError, one_line
from cbd_hub.evaluation import Calibration, Documents, document_losses
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
_FEW = 512  # with fewer, a measured loss says little
FIT_TOKENS = 2**17  # about as many as the gradient steps of a fit read


@dataclass(frozen=True)
class Texts:
    """Calibration text of a chain to be assembled.

    Attributes:
        texts: One by one.
        tokenizer: The anchors' tokenizer.
        block_size: Tokens that all anchors have positions for.
        together: Both readings of the whole text.
    """

    texts: Sequence[str]
    tokenizer: Any
    block_size: int
    together: Calibration

    @classmethod
    def read(cls, texts: Sequence[str], folder: Path, configs: Sequence[Any]) -> Texts:
        """The texts as the tokenizer of a checkpoint reads them, in blocks that models of all these configs have positions for.

        Raises:
            DataError: If they are too short.
        """
        tokenizer, size = load_tokenizer(folder), block_size(*configs)
        return cls(texts, tokenizer, size, Calibration.read(texts, tokenizer, size, _TOKENS))

    def apart(self) -> Calibration:
        """Blocks of half of the texts, drawn at random, and documents of the other half: what is fitted on the first is measured on the second."""
        texts = random.Random(0).sample(self.texts, len(self.texts))
        half, name = len(texts) // 2, "the half of the calibration text on which coordinates are fitted"
        try:
            documents = Documents.read(texts[half:], self.tokenizer, self.block_size, _TOKENS)
            blocks = Documents.packed(texts[:half], self.tokenizer, self.block_size, FIT_TOKENS, name=name)
        except DataError:
            logger.warning(
                "the calibration text (texts: %d) cannot be parted: coordinates are fitted and losses measured on one and the same, which promises too much; give more texts, such as paragraphs or rows",
                len(texts),
            )
            return self.together
        if documents.tokens < _FEW:
            logger.warning("losses are measured on %d tokens, of each text the first: give more texts, such as paragraphs or rows", documents.tokens)
        return Calibration(blocks, documents)


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
    anchors: Sequence[Anchor], configs: Sequence[Any], folders: Mapping[str, Path], align: str | bool, texts: Texts | None,
    dataset: str = "", report: Report | None = None,
) -> Iterator[Joined]:
    """The segments of anchors in falling size.

    Args:
        anchors: The anchors.
        configs: Their configs.
        folders: Anchor name -> its checkpoint.
        align: ``"auto"``, True or False, as for `assemble_chain`.
        texts: Calibration text, or None.
        dataset: What to call the text.
        report: Called with what is done, how much of it, and of how much.
    """
    def said(small: Anchor) -> Report | None:
        return None if report is None else lambda what, done, total: report(f"{small.name}: {what}", done, total)

    @functools.lru_cache(2)
    def model(name: str) -> Any:
        return load_model(folders[name], torch.float32).to(best_device())

    pairs = list(zip(anchors, anchors[1:]))
    cuts = [None if align is False else cut_from(folders[small.name], large.name, *(functools.partial(model, anchor.name) for anchor in (small, large))) for large, small in pairs]
    fits = align is not False and None in cuts
    calibration = None if texts is None else texts.apart() if fits else texts.together
    for (large, small), kept, *pair in zip(pairs, cuts, configs, configs[1:]):
        if calibration is not None:
            yield measured_pair((small.name, large.name), model(small.name), model(large.name), kept, align, calibration, dataset, said(small))
            continue
        maps, aligned = None, None
        if align is not False and kept is None:
            kept, maps, aligned = _aligned(model(small.name), model(large.name), align, None, said(small))
        shared = Kept.even(small.shape, large.shape, layer_types(pair[1], pair[0])) if kept is None else kept
        yield Joined(plain_link(small, large, shared.dropped[::-1], Blend(replicate=kept is None, align=aligned)), kept, maps)


def measured_pair(
    names: tuple[str, str], small: Any, large: Any, kept: Kept | None, align: str | bool, calibration: Calibration, dataset: str, report: Report | None
) -> Joined:
    """The segment between two loaded models, aligned where one was not cut from the other, and measured.

    Args:
        names: Names of the smaller and of the larger one.
        small: The smaller model.
        large: The larger one.
        kept: Which units of the larger one the smaller one was cut from, where it was.
        align: ``"auto"``, True or False, as for `assemble_chain`.
        calibration: Blocks on which coordinates are fitted, and documents on which all is measured.
        dataset: What to call the documents.
        report: Called with what is done, how much of it, and of how much.
    """
    maps, aligned = None, None
    if align is not False and kept is None:
        kept, maps, aligned = _aligned(small, large, align, calibration, report)
    measured = measure_segment(small, large, kept, calibration.documents, dataset, names=names, maps=maps, aligned=aligned, report=report)
    return Joined(measured.link(), kept, maps, measured.ends)


def cut_from(folder: Path, name: str, small_model: Callable[[], Any], large_model: Callable[[], Any]) -> Kept | None:
    """Which units of a larger model a smaller one was cut from; None where its folder does not say so, or says it of others.

    Args:
        folder: The smaller one's checkpoint, before it learned anything here.
        name: What the larger one is called.
        small_model: Gives the smaller one, asked where the folder says anything.
        large_model: Gives the larger one.
    """
    ancestry = Ancestry.read(folder)
    if ancestry is None:
        return None
    small, large = small_model(), large_model()
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
    small: Any, large: Any, align: str | bool, calibration: Calibration | None, report: Report | None
) -> tuple[Kept | None, Maps | None, Aligned | None]:
    """The shared coordinates; none where ``auto`` finds that they bring the two no nearer."""
    from cbd_hub.interpolation.align import STEPS, brings_nearer, fit
    ids, order = None, None
    if calibration is not None:
        ids, order = calibration.blocks.ids, measure_importance(large, calibration.blocks.first(_TOKENS)).kept(shape_of(small.config))
    found = fit(small, large, ids, steps=STEPS, order=order, report=report)
    loss = None if calibration is None else lambda runner: document_losses(runner, calibration.documents).mean
    if align == "auto" and not brings_nearer(found, small, large, loss):
        return None, None, None
    return found.kept, found.maps, Aligned(residual=found.residual, error=found.error)


def plain_link(small: Anchor, large: Anchor, order: Sequence[int], blend: Blend) -> Link:
    """A link of which nothing was measured, with the order in which layers come back."""
    return Link(
        kind="segment", small=small.name, large=large.name, order=list(order), strategies=Strategies(blend=blend, patch=Patch() if small.shape.only_layers_differ(large.shape) else None)
    )
