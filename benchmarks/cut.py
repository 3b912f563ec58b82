"""Models cut without training: as `cbd cut` does it, unfitted, layers dropped, layers folded; beside a chain's size.

    python benchmarks/cut.py --chain demo/chain [--model bench/inputs/models/gemma3-270m]

The chain's largest anchor, and every ``--model`` (where there is a .gguf file instead of the folder it is converted first), at an eighth, a quarter and three eighths fewer parameters in their blocks. Text and split are the chain's:
training text to measure importance, choose and fit on (for ShortGPT and LaCo calibration text), held-out text for all losses here. Rivals: the same without the fit, each at the shape that it chooses for itself; the layers of least influence dropped (ShortGPT,
https://huggingface.co/papers/2403.03853) and LaCo (https://huggingface.co/papers/2402.11187), both at the depth nearest in size. What the chain has at that size cost training. Seconds are of `CBDModel.from_pretrained`, loading included, without imports.
Writes benchmarks/results/cut.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from inputs import unpacked
from measuring import write
from rich.console import Console
from rich.table import Table

from cbd_hub import CBDModel, Chain, Recipe
from cbd_hub.cut import Cut, cut_model, measure_importance
from cbd_hub.distill.stages import CALIBRATION_TOKENS, read_parts
from cbd_hub.evaluation import Documents, Losses, model_losses
from cbd_hub.precision import best_device
from cbd_hub.shapes import count, parameter_count, shape_of
from cbd_hub.sizes import format_size, with_error
from cbd_hub.weights import load_model, load_tokenizer


sys.path.insert(0, str(Path(__file__).parent / "quality"))
from rivals import collapsed


GONE = (1 / 8, 1 / 4, 3 / 8)  # of the blocks' parameters
console = Console(width=150)


class Bench:
    """A model, and the text in its tokens."""

    def __init__(self, name: str, folder: Path, recipe: Recipe, heldout_tokens: int) -> None:
        self.name, self.folder, self.parts = name, folder, read_parts(recipe)
        tokenizer, block = load_tokenizer(folder), recipe.data.block_size
        self.heldout = Documents.read(self.parts.heldout, tokenizer, block, heldout_tokens)
        calibration = Documents.packed(self.parts.calibration, tokenizer, block, CALIBRATION_TOKENS)
        self.whole = load_model(folder, torch.float32).to(best_device())
        self.parameters = parameter_count(self.whole.config)
        self.importance = measure_importance(self.whole, calibration)
        self.text = torch.stack(calibration.ids[:1])
        self.depths = [shape_of(self.whole.config).model_copy(update={"layers": layers}) for layers in range(1, shape_of(self.whole.config).layers)]

    def losses(self, model: Any) -> Losses:
        """Its held-out losses."""
        return model_losses(model.to(best_device()), self.heldout)

    def sizes(self) -> list[int]:
        """The sizes to cut to."""
        per_layer = count(self.depths[-1], self.whole.config) - count(self.depths[-2], self.whole.config)
        return [round(self.parameters - gone * per_layer * (len(self.depths) + 1)) for gone in GONE]

    def cut(self, size: int, target: Any) -> tuple[Any, float]:
        """A cut as users make it, and its seconds."""
        began = time.perf_counter()
        model = CBDModel.from_pretrained(self.folder, size, calibration=self.parts.train, reconstruct=target, dtype=torch.float32)
        return model, time.perf_counter() - began

    def rows(self, chain: Chain | None) -> Iterator[dict[str, Any]]:
        """Each size's losses, and the rivals' less those of `cbd cut`, paired."""
        whole = self.losses(self.whole)
        for size in self.sizes():
            fitted, seconds = self.cut(size, "stream")
            ours, shape = self.losses(fitted), shape_of(fitted.config)
            mere, mere_seconds = self.cut(size, None)
            depth = min(self.depths, key=lambda shape: abs(count(shape, self.whole.config) - size))
            rivals = {
                "unfitted": self.losses(mere),
                "layers dropped (ShortGPT)": self.losses(cut_model(self.whole, Cut.of(self.whole, depth, self.importance, "whole").plan)),
                "LaCo": min((self.losses(collapsed(self.whole, depth.layers, self.text, merged)) for merged in (1, 2)), key=lambda losses: losses.mean),
            }
            if chain is not None:
                rivals["the chain"] = self.losses(CBDModel.from_chain(chain, size, dtype=torch.float32))
            yield {
                "model": self.name, "whole_parameters": self.parameters, "whole_loss": whole.mean, "parameters": count(shape, self.whole.config), "shape": shape.model_dump(),
                "loss": ours.mean, "stderr": ours.stderr, "to_whole": ours.minus((1.0, whole)), "heldout_tokens": self.heldout.tokens,
                "unfitted_shape": shape_of(mere.config).model_dump(), "dropped_parameters": count(depth, self.whole.config), "seconds": {"cut": seconds, "unfitted": mere_seconds},
                "rivals": {name: {"loss": losses.mean, "minus": losses.minus((1.0, ours))} for name, losses in rivals.items()},
            }


def main() -> None:
    """Cut them all and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", type=Path, default=Path("demo/chain"))
    parser.add_argument("--model", type=Path, action="append", default=[], help="a further model: a folder, or its name without .gguf")
    parser.add_argument("--heldout-tokens", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cut.json"))
    options = parser.parse_args()
    chain, recipe = Chain.from_pretrained(options.chain), Recipe.read(options.chain / "recipe.yaml")
    table = Table("model", "size", "shape", "loss", "to the whole", "seconds", "rivals (their loss minus that)", title_justify="left")
    rows: list[dict[str, Any]] = []
    teacher = Path(recipe.teacher).name, options.chain / "anchors" / chain.anchors[0].name, chain
    for name, folder, own in (teacher, *((folder.name, unpacked(folder), None) for folder in options.model)):
        for row in Bench(name, folder, recipe, options.heldout_tokens).rows(own):
            rows.append(row)
            rivals = ", ".join(f"{name} {rival['minus'][0]:+.3f} ± {rival['minus'][1]:.3f}" for name, rival in row["rivals"].items())
            text = f"{row['shape']['layers']} x {row['shape']['ffn']}"
            table.add_row(name, format_size(row["parameters"]), text, with_error(row["loss"], row["stderr"]), "{:+.3f} ± {:.3f}".format(*row["to_whole"]), f"{row['seconds']['cut']:.0f}", rivals)
            write(options.out, {"rows": rows})
    console.print(table)


if __name__ == "__main__":
    main()
