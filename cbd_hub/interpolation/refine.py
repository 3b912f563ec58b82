"""Fitted coordinates refined by gradient: orthogonal maps of the residual stream and of heads, moved until models in between lose least on a text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cbd_hub.interpolation.blend import blend_plan
from cbd_hub.interpolation.live import Between, ModelRunner, Runner, frozen
from cbd_hub.interpolation.maps import Maps
from cbd_hub.interpolation.plan import Plan, Segment
from cbd_hub.interpolation.planner import road_at, shape_at
from cbd_hub.losses.head import distillation_loss
from cbd_hub.manifest import Mix
from cbd_hub.reporting import Report


SHARES = (0.25, 0.5, 0.75)
JUDGED = 16  # blocks on which a middle is judged, at most
_RATE = 0.01
_BATCH_TOKENS = 1024
_EVERY = 10  # steps between two measurements
_PATIENCE = 4  # measurements in a row without gain


def refine(
    segment: Segment, models: dict[str, Any], ids: Sequence[Tensor], watched: Sequence[Tensor], *, steps: int, rotary_width: int, centred: bool,
    report: Report | None = None,
) -> Maps:
    """The segment's maps after gradient steps on the cross-entropy of models in between, each map still orthogonal.

    A map M becomes ``exp(A - A^T) M``: of the residual stream any generator A (one that leaves the mean alone where norms subtract it), of queries and
    keys only what commutes with rotary positions. Whatever it finds, each neighbour computes what it did, nearly so where heads are tied and the residual
    stream is turned: only what lies between them moves. Orders and signs stay. Where the middle already loses no more than its ends, nothing is done.

    What few tokens of text teach so many numbers need not hold elsewhere: every few steps the loss is measured on text that no step sees. The maps that
    lose least there are taken, and steps end where it has not fallen for some time.

    Args:
        segment: The segment, with fitted maps.
        models: Its two models by name.
        ids: Calibration text as token ids, equally long.
        watched: Other text, on which the steps are judged.
        steps: Most gradient steps of about a thousand tokens, at sizes drawn along the segment.
        rotary_width: Channels of a head that rotary positions turn.
        centred: Whether norms subtract the mean.
        report: Called with what is done, how much of it, and of how much.
    """
    assert segment.maps is not None
    fitted = segment.maps
    generators = {
        name: torch.zeros_like(base, requires_grad=True)
        for name in ("values", "queries", "rotation") if (base := getattr(fitted, name)) is not None
    }
    if not generators or not _sags(segment, models, watched):
        return fitted

    def now() -> Maps:
        found = {}
        for name, generator in generators.items():
            if name == "rotation" and centred:
                generator = generator - generator.mean(0)
                generator = generator - generator.mean(1, keepdim=True)
            if name == "queries" and rotary_width:
                generator = generator * _commuting(generator.shape[-1], rotary_width)
            found[name] = torch.linalg.matrix_exp(generator - generator.mT) @ getattr(fitted, name)
        return replace(fitted, **found)

    draw = random.Random(0)
    between = Between(models)
    flags = {parameter: parameter.requires_grad for model in models.values() for parameter in model.parameters()}
    optimizer = torch.optim.Adam(list(generators.values()), lr=_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    batch = max(1, _BATCH_TOKENS // len(ids[0]))

    def measured() -> tuple[float, Maps]:
        with torch.no_grad():
            maps = now()
        return sum(middle_loss(replace(segment, maps=maps), models, watched, share) for share in SHARES), maps

    (least, best), since = measured(), 0
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            for step in range(steps):
                if report is not None:
                    report("refining by gradient", step, steps)
                chosen = torch.stack(draw.choices(list(ids), k=batch))
                plan = middle(replace(segment, maps=now()), draw.choice(SHARES))
                optimizer.zero_grad()
                _loss(between.run(plan), chosen).backward()
                optimizer.step()
                schedule.step()
                if (step + 1) % _EVERY and step + 1 < steps:
                    continue
                loss, maps = measured()
                if loss < least:
                    least, best, since = loss, maps, 0
                elif (since := since + 1) == _PATIENCE:
                    break
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return best


def middle_loss(segment: Segment, models: dict[str, Any], ids: Sequence[Tensor], share: float = 0.5) -> float:
    """Cross-entropy in nats per token half way between two neighbours, or at another share of the way, on the first few blocks of a text."""
    with frozen(*models.values()):
        return float(_loss(Between(models).run(middle(segment, share)), torch.stack(list(ids[:JUDGED]))))


def _sags(segment: Segment, models: dict[str, Any], ids: Sequence[Tensor]) -> bool:
    """Whether the middle of a segment loses more than the mean of its ends."""
    few = torch.stack(list(ids[:JUDGED]))
    with frozen(*models.values()):
        ends = sum(float(_loss(ModelRunner(model), few)) for model in models.values()) / 2
    return middle_loss(segment, models, ids) > ends + 1e-3


def middle(segment: Segment, share: float) -> Plan:
    """The plain blend at a share of the segment's size; of models of one size, alpha takes the share."""
    low, high = segment.sizes
    if low == high:
        return blend_plan(segment, segment.large_shape, Mix(alpha=1 - share))
    size = round(low + share * (high - low))
    shape = shape_at(segment, road_at(segment, size), size)
    return blend_plan(segment, shape, Mix(alpha=1 - share))


def _commuting(size: int, width: int) -> Tensor:
    """Where the generator of a map that commutes with rotary positions may differ from 0; shape (size, size)."""
    mask = torch.zeros(size, size)
    index = torch.arange(width // 2)
    mask[index, index + width // 2] = 1
    mask[width:, width:] = 1
    return mask


def _loss(runner: Runner, ids: Tensor) -> Tensor:
    """Cross-entropy in nats per token, shape (); ``ids`` has shape (B, T)."""
    ids = ids.to(runner.device)
    output = runner(ids)
    labels = ids.new_full(ids.shape, -100)
    labels[:, :-1] = ids[:, 1:]
    hidden, head = output.hidden.flatten(0, 1), output.head
    return distillation_loss(
        hidden, head.weight, hidden.detach(), head.weight.detach(), labels.flatten(), kd_weight=0.0, ce_weight=1.0,
        **head.options("student_"), **head.options("teacher_"),
    )
