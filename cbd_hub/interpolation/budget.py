"""The largest size of a chain that fits."""

from __future__ import annotations

from collections.abc import Callable

from cbd_hub.manifest import Manifest


def largest_size(manifest: Manifest, limit: int, realised: Callable[[int], int]) -> int | None:
    """The largest size with no more than ``limit`` parameters.

    Args:
        manifest: The chain.
        limit: Parameters that there is room for.
        realised: The size that comes out for a size asked for: the nearest one that a shape can have.

    Returns:
        A size that can be realised, an anchor's own where only a bridge lies above it; None if even the smallest anchor is too large.
    """
    small = next((anchor for anchor in manifest.anchors if anchor.parameters <= limit), None)
    if small is None or small is manifest.anchors[0]:
        return None if small is None else small.parameters
    large = manifest.anchors[manifest.anchors.index(small) - 1]
    if manifest.link(small, large).kind == "bridge":
        return small.parameters
    # The nearest size may lie above the limit. Asking ever further below it, the first one that fits is the largest one: while the
    # nearest to a wish is still above the limit, the next below is further from the wish than that, and a wish twice as far cannot pass it.
    wish, step = limit, 0
    while (found := realised(wish)) > limit:
        step = max(2 * step, found - limit)
        wish = max(limit - step, small.parameters)
    return found
