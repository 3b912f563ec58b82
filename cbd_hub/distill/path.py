"""In-between models as path training meets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cbd_hub.errors import ArchitectureError
from cbd_hub.families import family_of
from cbd_hub.interpolation.plan import Kept, Plan, Segment, layer_types, small_eps
from cbd_hub.interpolation.planner import segment_plan
from cbd_hub.shapes import shape_of


def path_plan(segment: Segment, size: int) -> Plan | None:
    """The plan of `from_chain` at a size, as it is before the segment's mix is fitted; None where that is one of the two ends."""
    plan = segment_plan(segment, size, tolerance=1.0)
    return None if plan.strategy == "anchor" else plan


def segment_to(student: Any, teacher: Any, kept: Kept, order: Sequence[int] | None) -> Segment:
    """The segment from a student to the teacher that it was cut from.

    Raises:
        ArchitectureError: If they are of two architectures.
        ManifestError: If the map does not fit them.
    """
    if family_of(student.config) is not family_of(teacher.config):
        raise ArchitectureError(f"the student is a {student.config.model_type} and the teacher a {teacher.config.model_type}; kept= joins one architecture only")
    small, large = shape_of(student.config), shape_of(teacher.config)
    kept.check(small, large)
    kept.check_types(*layer_types(student.config, teacher.config))
    return Segment(
        "student", "teacher", small, large, kept, list(order) if order is not None else kept.dropped[::-1], teacher.config,
        patch=small.only_layers_differ(large), small_eps=small_eps(student.config, teacher.config),
    )
