"""What the measured losses of a segment say about its sizes: the chord between the anchors, and troughs below what it promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cbd_hub.manifest import Evaluation, Link, Manifest
from cbd_hub.sizes import format_size


TROUGH = 0.05  # nats per token above the chord that are worth a warning


@dataclass(frozen=True)
class Chord:
    """The straight line between two neighbours' losses, linear in log size.

    Attributes:
        small: Name of the smaller anchor.
        large: Name of the larger anchor.
        sizes: Their parameters.
        losses: Their losses in nats per token; None where one was not measured.

    Example:
        >>> chord = Chord("1M", "4M", (10**6, 4 * 10**6), (5.0, 4.0))
        >>> round(chord.at(2 * 10**6), 3), chord.trough(2 * 10**6, 4.5)
        (4.5, None)
        >>> chord.trough(2 * 10**6, 5.25)
        '2M is expected to lose 5.250 nats per token, 0.25 more than the smaller 1M'
    """

    small: str
    large: str
    sizes: tuple[int, int]
    losses: tuple[float | None, float | None]

    @classmethod
    def of(cls, manifest: Manifest, link: Link) -> Chord:
        """The chord of a link, from its anchors' latest losses on the text of its curve."""
        small, large = manifest.anchor(link.small), manifest.anchor(link.large)
        dataset = link.curve[-1].dataset if link.curve else None
        return cls(
            link.small, link.large, (small.parameters, large.parameters), (last_loss(small.evaluations, dataset), last_loss(large.evaluations, dataset))
        )

    def at(self, size: int) -> float | None:
        """The loss on the line at a size; None where an end was not measured."""
        small, large = self.losses
        return None if small is None or large is None else float(np.interp(np.log(size), np.log(self.sizes), (small, large)))

    def trough(self, size: int, loss: float | None) -> str | None:
        """Why a size of this loss is a poor choice: it is above the smaller anchor's, or more than `TROUGH` above the line; None where it is neither."""
        small, line = self.losses[0], self.at(size)
        if loss is None:
            return None
        if small is not None and loss > small:
            return f"{format_size(size)} is expected to lose {loss:.3f} nats per token, {loss - small:.2g} more than the smaller {self.small}"
        if line is not None and loss > line + TROUGH:
            return f"{format_size(size)} is expected to lose {loss:.3f} nats per token, {loss - line:.3f} above the line from {self.small} to {self.large}"
        return None


def last_loss(evaluations: Sequence[Evaluation], dataset: str | None = None) -> float | None:
    """The latest measured loss, on that dataset if one is named."""
    fitting = [entry for entry in evaluations if dataset is None or entry.dataset == dataset]
    return fitting[-1].loss if fitting else None
