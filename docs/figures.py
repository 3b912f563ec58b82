"""The pictures of docs/explanation.md, drawn from real plans without a weight.

python docs/figures.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from transformers import LlamaConfig

from cbd_hub.interpolation.patch import patch_plan
from cbd_hub.interpolation.plan import Kept, Plan, Segment
from cbd_hub.interpolation.planner import segment_plan
from cbd_hub.manifest import Shape
from cbd_hub.shapes import count, shape_of
from cbd_hub.sizes import format_size


matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "cbd_hub", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
from matplotlib import pyplot as plt  # noqa: E402


FOLDER = Path(__file__).parent / "figures"
SMALL, LARGE, BOTH = "#d95f02", "#1b6ca8", "#8a5fa8"
CONFIG = LlamaConfig(
    vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
)
WHOLE = shape_of(CONFIG)


def segment(small: Shape, large: Shape, *, patch: bool = False) -> Segment:
    """A segment of anchors that agree by index."""
    kept = Kept.even(small, large)
    return Segment(format_size(count(small, CONFIG)), format_size(count(large, CONFIG)), small, large, kept, kept.dropped[::-1], CONFIG, patch=patch)


def save(figure: plt.Figure, name: str) -> None:
    """Write a picture without a date in it."""
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight", transparent=False)
    plt.close(figure)


def road(anchors: list[Shape]) -> None:
    """Layers and FFN width over size."""
    plans: list[Plan] = []
    for small, large in zip(anchors[:0:-1], anchors[-2::-1]):
        low, high = count(small, CONFIG), count(large, CONFIG)
        plans += [segment_plan(segment(small, large), int(size)) for size in np.linspace(low, high, 41)]
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 2.6))
    for axis, name, label in zip(axes, ("layers", "ffn"), ("layers", "FFN width")):
        axis.plot([plan.parameters / 1e6 for plan in plans], [getattr(plan.shape, name) for plan in plans], color=BOTH, marker=".", markersize=3, linewidth=1)
        axis.scatter([count(shape, CONFIG) / 1e6 for shape in anchors], [getattr(shape, name) for shape in anchors], color=LARGE, zorder=3, label="anchors")
        axis.set(xlabel="million parameters", ylabel=label)
    axes[0].legend(frameon=False)
    save(figure, "road")


def blend(small: Shape, large: Shape) -> None:
    """Where the entries of a down projection come from."""
    made = segment(small, large)
    plan = segment_plan(made, 117_000_000, strategy="blend")
    held = [int(layer) for layer in made.kept.layers]
    place = next(index for index, layer in enumerate(plan.layers) if layer in held)
    terms = plan.tensors[f"model.layers.{place}.mlp.down_proj.weight"]
    figure, axis = plt.subplots(figsize=(7.5, 1.9))
    stretches: dict[tuple[int, int], list[str]] = {}
    for term in terms:
        take = next(take for take in term.takes if take.dim == 1)
        stretches.setdefault((take.start, take.length), []).append(term.anchor)
    for (start, length), anchors in stretches.items():
        shared = len(anchors) > 1
        axis.add_patch(plt.Rectangle((start, 0), length, plan.shape.hidden, color=BOTH if shared else LARGE, alpha=0.75, linewidth=0))
        text = f"both: alpha {made.small} + (1 - alpha) {made.large}" if shared else f"{made.large} alone"
        axis.text(start + length / 2, plan.shape.hidden / 2, text, ha="center", va="center", color="white", fontsize=8, rotation=0 if shared else 90)
    axis.set(xlim=(0, plan.shape.ffn), ylim=(plan.shape.hidden, 0), xlabel="FFN neuron, in falling importance", ylabel="hidden channel")
    save(figure, "blend")


def patch(small: Shape, large: Shape) -> None:
    """Which layers come from which neighbour, depth by depth."""
    made = segment(small, large, patch=True)
    figure, axis = plt.subplots(figsize=(7.5, 2.6))
    for row, layers in enumerate(range(small.layers, large.layers + 1)):
        shape = small.model_copy(update={"layers": layers})
        plan = patch_plan(made, shape)
        for index, place in enumerate(plan.layers):
            (term,) = plan.tensors[f"model.layers.{index}.mlp.down_proj.weight"]
            axis.add_patch(plt.Rectangle((place + 0.06, row + 0.1), 0.88, 0.8, color=SMALL if term.anchor == made.small else LARGE, linewidth=0))
    rows = large.layers - small.layers + 1
    axis.set(xlim=(0, large.layers), ylim=(0, rows), xlabel=f"place in {made.large}", ylabel="layers")
    axis.set_yticks(np.arange(rows) + 0.5, [str(small.layers + row) for row in range(rows)])
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (SMALL, LARGE)]
    axis.legend(handles, [made.small, made.large], frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    save(figure, "patch")


def main() -> None:
    """Draw them all."""
    middle, least = WHOLE.model_copy(update={"layers": 24, "ffn": 1192}), WHOLE.model_copy(update={"layers": 17, "ffn": 704})
    road([WHOLE, middle, least])
    blend(middle, WHOLE)
    patch(WHOLE.model_copy(update={"layers": 20}), WHOLE)


if __name__ == "__main__":
    main()
