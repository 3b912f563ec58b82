"""Other ways to a smaller model without training, restated from their papers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from cbd_hub.cut import cut_model, cut_plan
from cbd_hub.families import family_of
from cbd_hub.interpolation.plan import Kept
from cbd_hub.manifest import Shape
from cbd_hub.shapes import shape_of


_Placed = tuple[int, torch.nn.Module]  # a layer of the whole model, where it stood there


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
    blocks = list(enumerate(best.get_submodule(family.blocks)))
    lists = {name: values for name in family.single_layer_fields if (values := getattr(model.config, name, None)) is not None}

    @torch.no_grad()
    def states(blocks: list[_Placed]) -> torch.Tensor:
        best.set_submodule(family.blocks, torch.nn.ModuleList(block for _, block in blocks))
        for name, values in lists.items():  # a layer's type travels with it
            setattr(best.config, name, [values[place] for place, _ in blocks])
        setattr(best.config, family.fields["layers"], len(blocks))
        return best.base_model(input_ids=text.to(model.device), use_cache=False).last_hidden_state

    target = states(blocks)
    while len(blocks) > layers:
        step = min(merged, len(blocks) - layers)
        trials = [_fold(blocks, at, step) for at in range(len(blocks) - 1 - step, 0, -1)]
        blocks = max(trials, key=lambda trial: float(torch.nn.functional.cosine_similarity(states(trial), target, dim=-1).mean()))
    states(blocks)
    return best


@torch.no_grad()
def _fold(blocks: list[_Placed], at: int, step: int) -> list[_Placed]:
    """The blocks with those at + 1 to at + step folded into the one at ``at``."""
    place, into = blocks[at]
    folded = copy.deepcopy(into)
    for _, other in blocks[at + 1 : at + 1 + step]:
        for name, tensor in folded.named_parameters():
            tensor.add_(other.get_parameter(name) - into.get_parameter(name))
    return [*blocks[:at], (place, folded), *blocks[at + 1 + step :]]
