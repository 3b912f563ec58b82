"""Other ways to a smaller model without training, restated from their papers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from cbd_hub.cut import cut_model, cut_plan
from cbd_hub.families import family_of
from cbd_hub.interpolation.planner import Kept
from cbd_hub.manifest import Shape
from cbd_hub.shapes import shape_of


def selected(model: Any, shape: Shape) -> Any:
    """Weight selection (https://huggingface.co/papers/2311.18823): the first layers, and evenly spaced units on every other axis."""
    whole = shape_of(model.config)

    def even(wanted: int, there: int) -> np.ndarray:
        first = np.rint(np.linspace(0, there - 1, wanted)).astype(np.int64)
        return np.concatenate([first, np.setdiff1d(np.arange(there), first)])

    kept = Kept(np.arange(shape.layers), np.tile(even(shape.ffn, whole.ffn), (whole.layers, 1)), None, even(shape.hidden, whole.hidden))
    return cut_model(model, cut_plan("teacher", shape, model, kept))


def collapsed(model: Any, layers: int, text: torch.Tensor, merged: int = 2) -> Any:
    """LaCo (https://huggingface.co/papers/2402.11187): layers folded into the one below them as the sum of their differences from it.

    From the top down, ``merged`` layers at a time are folded where the states after the last layer stay nearest; here the nearest place is
    searched at every step, without the paper's threshold, until the depth is reached.

    Args:
        model: The model.
        layers: Depth wanted.
        text: Token ids on which the states are compared, shape (B, T).
        merged: Layers folded at a time.
    """
    family = family_of(model.config)
    best = copy.deepcopy(model)

    def states(candidate: Any) -> torch.Tensor:
        with torch.no_grad():
            return candidate.base_model(input_ids=text.to(model.device), use_cache=False).last_hidden_state

    target = states(model)
    while len(blocks := best.get_submodule(family.blocks)) > layers:
        step = min(merged, len(blocks) - layers)
        found = []
        for at in range(len(blocks) - 1 - step, 0, -1):
            trial = _fold(best, at, step)
            found.append((float(torch.nn.functional.cosine_similarity(states(trial), target, dim=-1).mean()), at))
        best = _fold(best, max(found)[1], step)
    return best


def _fold(model: Any, at: int, step: int) -> Any:
    """Layers at + 1 to at + step folded into layer ``at``."""
    family = family_of(model.config)
    folded = copy.deepcopy(model)
    blocks = folded.get_submodule(family.blocks)
    base = {name: tensor.detach().clone() for name, tensor in blocks[at].named_parameters()}
    with torch.no_grad():
        for other in blocks[at + 1 : at + 1 + step]:
            for name, tensor in blocks[at].named_parameters():
                tensor += other.get_parameter(name) - base[name]
    del blocks[at + 1 : at + 1 + step]
    setattr(folded.config, family.fields["layers"], len(blocks))
    return folded
