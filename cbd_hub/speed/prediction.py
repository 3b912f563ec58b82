"""The speed of a shape from a few measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from cbd_hub.families import family_of
from cbd_hub.manifest import Shape
from cbd_hub.speed.measuring import Speed


def terms(shape: Shape, config: Any) -> np.ndarray:
    """What the time of a token is made of, shape (4,): 1, layers, parameters of all blocks, parameters of the head.

    Args:
        shape: The shape.
        config: A transformers config of the same architecture.

    Example:
        >>> from transformers import GPT2Config
        >>> from cbd_hub.shapes import shape_of
        >>> terms(shape_of(GPT2Config()), GPT2Config()).astype(int).tolist()
        [1, 12, 85054464, 38597376]
    """
    family = family_of(config)
    sizes = {**family.sizes(config), **shape.model_dump()}
    block = sum(prod(spec.shape(sizes)) for spec in family.tensors if spec.per_layer and spec.present(config))
    return np.array([1, shape.layers, shape.layers * block, shape.vocab * shape.hidden], dtype=np.float64)


@dataclass(frozen=True)
class Probe:
    """A measured shape.

    Attributes:
        terms: Its `terms`, shape (4,).
        speed: Its speed.
    """

    terms: tuple[float, ...]
    speed: Speed


@dataclass(frozen=True)
class SpeedModel:
    """Seconds of the first and of each further token as sums of what a token costs, a layer, a parameter of a block and one of the head.

    None of these is below 0, so that of two shapes the one with more layers and more parameters is never predicted to be the faster one.

    Attributes:
        first: Seconds per term of the first token, shape (4,).
        token: Seconds per term of a further one, shape (4,).
    """

    first: np.ndarray
    token: np.ndarray

    @classmethod
    def fit(cls, probes: Sequence[Probe]) -> SpeedModel:
        """Non-negative least squares of the relative errors.

        Where the probes do not tell two terms apart, as the head's share from what is fixed at one hidden width, they need not be: between
        the probes they are not apart either.

        Example:
            >>> probes = [Probe((1, layers, layers * 1e6, 5e6), Speed(0.1 * layers, 0.002 + 0.001 * layers)) for layers in (2, 8)]
            >>> round(SpeedModel.fit(probes).at((1, 5, 5e6, 5e6)).token, 6)
            0.007
        """
        from scipy.optimize import nnls  # half a second, of which loading a model has no use
        rows = np.array([probe.terms for probe in probes], dtype=np.float64)

        def solved(seconds: np.ndarray) -> np.ndarray:
            scale = rows.max(axis=0)
            return np.asarray(nnls(rows / scale / seconds[:, None], np.ones(len(rows)))[0]) / scale

        return cls(*(solved(np.array([getattr(probe.speed, name) for probe in probes])) for name in ("first", "token")))

    def at(self, terms: Sequence[float] | np.ndarray) -> Speed:
        """The predicted speed of a shape's `terms`."""
        return Speed(float(self.first @ np.asarray(terms)), float(self.token @ np.asarray(terms)))
