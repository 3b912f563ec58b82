"""A chain of anchors distilled from a teacher: every stage, resumable.

    python examples/01_distil.py --teacher HuggingFaceTB/SmolLM2-135M-Instruct --anchors 99M 64M --text "text/*.txt" --steps 100 --out ./chain
    python examples/01_distil.py --smoke

Stopped, it goes on where it was when it is run again. All that a recipe can say is in docs/how-to/recipe.md; `cbd distill recipe.yaml` does the same.
"""

from __future__ import annotations

import argparse
from typing import Any

import smoke

from cbd_hub import Recipe, distill_chain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or folder")
    parser.add_argument("--anchors", nargs="+", default=["99M", "64M"], help="sizes, the largest first")
    parser.add_argument("--text", default="text/*.txt", help="files of text")
    parser.add_argument("--steps", type=int, default=100, help="training steps of each anchor")
    parser.add_argument("--out", default="./chain", help="folder for the chain")
    parser.add_argument("--smoke", action="store_true", help="a tiny teacher, seconds")
    options = parser.parse_args()
    stage: dict[str, Any] = {"max_steps": options.steps, "per_device_train_batch_size": 8, "learning_rate": 4e-4, "bf16": True}
    data: dict[str, Any] = {"path": options.text, "block_size": 128, "heldout": 0.05, "calibration": 0.02}
    if options.smoke:
        options.teacher, options.anchors, options.out = smoke.model(), ["170K", "120K"], smoke.folder() / "chain"
        data = {"path": smoke.text(), "block_size": 32, "heldout": 0.1, "calibration": 0.2}
        stage = {name: value for name, value in smoke.TRAINING.items() if name != "block_size"}

    recipe = Recipe.parse({"teacher": options.teacher, "anchors": options.anchors, "data": data, "stage": {**stage, "divergence": "forward_kl"}, "seed": 0})
    chain = distill_chain(recipe, options.out, progress=print)

    for anchor in chain.anchors:
        print(f"{anchor.name}: {anchor.parameters:,} parameters, {anchor.shape.layers} layers, FFN of {anchor.shape.ffn}")
    middle = sum(anchor.parameters for anchor in chain.anchors[:2]) // 2
    print(chain.plan(middle))


if __name__ == "__main__":
    main()
