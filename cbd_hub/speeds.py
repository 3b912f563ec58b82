"""A chain's sizes with their speed on this machine: predicted from the anchors' shapes, and measured where that is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cbd_hub.chain import Chain
from cbd_hub.interpolation.plan import Plan
from cbd_hub.plans import anchor_config, speed_of, stopwatch, usual_sizes
from cbd_hub.reporting import Report
from cbd_hub.sizes import format_size
from cbd_hub.speed.measuring import Speed, measure_in_turns, measure_speed
from cbd_hub.speed.stopwatch import CLOSE


__all__ = ["CLOSE", "SizeSpeed", "Speed", "measure_speed", "speed_table"]


_AT_ONCE = 4 * 10**9  # bytes of models that are measured in turns; a larger one is measured alone


@dataclass(frozen=True)
class SizeSpeed:
    """The speed of a size.

    Attributes:
        plan: What the size is made of.
        predicted: Its predicted speed.
        measured: Its measured speed, where that was asked for.
    """

    plan: Plan
    predicted: Speed
    measured: Speed | None = None

    def summary(self) -> dict[str, Any]:
        """The row as plain data."""
        found = {"size": format_size(self.plan.parameters), "parameters": self.plan.parameters, "shape": self.plan.shape.model_dump(), "strategy": self.plan.strategy, **self.predicted.summary()}
        if self.measured is None:
            return found
        return {**found, **{f"measured_{name}": value for name, value in self.measured.summary().items()}, "off": self.predicted.off(self.measured)}


def speed_table(
    chain: Chain | str | os.PathLike[str], sizes: Sequence[str | int] | None = None, *, dtype: Any = None, device_map: Any = None, attn_implementation: str | None = None,
    check: bool = False, recalibrate: bool = False, runs: int = 5, report: Report | None = None,
) -> list[SizeSpeed]:
    """The speed of a chain's sizes on this machine, as `Speed` says it; no weight of the chain is read.

    The anchors are timed, or what was timed before is read; sizes in between are predicted.

    Args:
        chain: The chain.
        sizes: Sizes; by default the anchors and between them the recommended sizes, else the middle.
        dtype: Dtype of the weights; by default the anchors'.
        device_map: The one device; by default the best one that there is.
        attn_implementation: As transformers takes it.
        check: Whether to measure each size too, in turns, by a model of its shape with random weights.
        recalibrate: Whether to time the anchors anew.
        runs: Runs of each size that is measured.
        report: Called with what is done, how much of it, and of how much.

    Returns:
        A row for each size.

    Raises:
        SizeError: If a size cannot be realised.
        ArgumentError: If an argument cannot be used.
    """
    opened = Chain.from_pretrained(chain)
    files = opened.files.glanced
    usual = [opened.plan(size, tolerance=0.5) for size in usual_sizes(opened.manifest)] if sizes is None else [opened.plan(size) for size in sizes]
    plans = list({plan.parameters: plan for plan in usual}.values())
    watch = stopwatch(opened.files, dtype, device_map, attn_implementation, again=recalibrate, report=report)
    rows = [SizeSpeed(plan, speed_of(files, plan, watch)) for plan in plans]
    if not check:
        return rows
    measured: list[Speed] = []
    for group in _groups(plans, watch.dtype.itemsize):
        models = [watch.random_model(plan.config(anchor_config(files, files.manifest.anchor(plan.large)))) for plan in group]
        measured += measure_in_turns(models, runs=runs, report=None if report is None else partial(report, f"measuring {format_size(group[0].parameters)}"))
        del models
    return [replace(row, measured=speed) for row, speed in zip(rows, measured)]


def _groups(plans: Sequence[Plan], itemsize: int) -> list[list[Plan]]:
    """Plans whose models are in memory at the same time."""
    groups: list[list[Plan]] = []
    for plan in plans:
        if not groups or itemsize * sum(other.parameters for other in (*groups[-1], plan)) > _AT_ONCE:
            groups.append([])
        groups[-1].append(plan)
    return groups
