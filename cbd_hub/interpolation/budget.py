"""The largest size of a chain that fits, or is fast enough."""

from __future__ import annotations

from collections.abc import Callable

from cbd_hub.manifest import Manifest


_GRID = 64


def largest_meeting(low: int, high: int, meets: Callable[[int], bool]) -> int | None:
    """The largest size between two that meets a condition, which smaller sizes meet sooner than larger ones; None if none does.

    A shape's steps may break that rule by a little: a model may have fewer layers than a smaller one. So 64 sizes are tried from the largest one down,
    and what lies between the first that meets it and the one above is halved until the rest is a 10,000th.

    Args:
        low: Size above which to look; not tried itself.
        high: Size below which to look; not tried itself.
        meets: Whether a size, as it is realised, meets it.

    Example:
        >>> largest_meeting(1_000, 2_000, lambda size: size <= 1_234)
        1234
        >>> largest_meeting(1_000, 2_000, lambda size: False) is None
        True
    """
    above = high
    for step in range(_GRID - 1, 0, -1):
        size = low + (high - low) * step // _GRID
        if low < size < above:
            if meets(size):
                break
            above = size
    else:
        return None
    while above - size > max(1, size // 10_000):
        middle = (size + above) // 2
        size, above = (middle, above) if meets(middle) else (size, middle)
    return size


def largest_size(manifest: Manifest, room: Callable[..., int], realised: Callable[[int], int]) -> int | None:
    """The largest size that there is room for.

    Args:
        manifest: The chain.
        room: Parameters that there is room for in a model of an anchor, or of two neighbours, that are given: they may be stored in several dtypes.
        realised: The size that comes out for a size asked for: the nearest one that a shape can have.

    Returns:
        A size that comes out no larger than that when it is asked for, an anchor's own where only a bridge lies above it; None if even the smallest anchor is too large.
    """
    small = next((anchor for anchor in manifest.anchors if anchor.parameters <= room(anchor)), None)
    if small is None or small is manifest.anchors[0]:
        return None if small is None else small.parameters
    large = manifest.anchors[manifest.anchors.index(small) - 1]
    limit = room(small, large)
    if limit < small.parameters or manifest.link(small, large).kind == "bridge":
        return small.parameters
    # The nearest size may lie above the limit, and what comes out, asked for itself, may come out larger once more. Asking ever further below the limit, the first
    # one that fits is the largest one: while the nearest to a wish is still above, the next below is further from the wish than that, and a wish twice as far cannot pass it.
    wish, step = limit, 0
    while (most := max(found := realised(wish), realised(found))) > limit:
        step = max(2 * step, most - limit)
        wish = max(limit - step, small.parameters)
    return found
