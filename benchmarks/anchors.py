"""An anchor trained in a chain against students trained only for its size, with the same cut, text, batches and steps.

    python benchmarks/anchors.py --chain demo/chain

The chain's first anchor as its recipe trains it (default settings), a student with boomerang's losses (cross-entropy + 0.1 KL + 2 x mean cosine
distance, https://huggingface.co/papers/2510.05064), a student by KL alone, and the default with 30% of the steps on the path. All start from the cut that the chain stores.
Held-out loss with its standard error over documents, differences paired. Writes benchmarks/results/anchors.json.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from boomerang import HELDOUT_TOKENS
from measuring import write
from rich.console import Console
from rich.table import Table

from cbd_hub import Chain, ChainDistiller, ChainDistillerConfig, Recipe
from cbd_hub.cut import Cut, measure_importance
from cbd_hub.distill.stages import CALIBRATION_TOKENS, read_parts, untrained
from cbd_hub.evaluation import Documents, Losses, document_losses
from cbd_hub.interpolation.live import ModelRunner


RIVALS: dict[str, dict[str, Any]] = {
    "default": {}, "KL alone": {"ce_weight": 0.0}, "boomerang's losses": {"ce_weight": 1.0, "kd_weight": 0.1, "hidden_weight": 2.0}, "30% of the steps on the path": {"path_fraction": 0.3},
}


def main() -> None:
    """Train them and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", type=Path, default=Path("demo/chain"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/anchors.json"))
    options = parser.parse_args()
    chain = Chain.from_pretrained(options.chain)
    recipe = Recipe.read(options.chain / "recipe.yaml")
    parts, tokenizer = read_parts(recipe), chain.tokenizer()
    heldout = Documents.read(parts.heldout, tokenizer, recipe.data.block_size, HELDOUT_TOKENS)
    calibration = Documents.packed(parts.calibration, tokenizer, recipe.data.block_size, CALIBRATION_TOKENS)
    teacher = chain.model("max", dtype=torch.float32)
    importance = measure_importance(teacher, calibration)
    cut = Cut.of(teacher, chain.anchors[1].shape, importance, "teacher")
    begins = untrained(recipe, teacher, cut.plan, parts, tokenizer)
    losses: dict[str, Losses] = {}
    for name, fields in RIVALS.items():
        transformers.set_seed(recipe.seed)
        student = copy.deepcopy(begins)
        with tempfile.TemporaryDirectory() as folder:
            stage = {**recipe.stage_arguments(recipe.anchors[0]), "save_strategy": "no", **fields}
            ChainDistiller(
                model=student, teacher=teacher, args=ChainDistillerConfig(folder, seed=recipe.seed, **stage), train_dataset=parts.rows(),
                processing_class=tokenizer, kept=cut.kept, order=importance.order(cut.kept),
            ).train()
        losses[name] = document_losses(ModelRunner(student.eval()), heldout)
    differences = {name: found.minus((1.0, losses["default"])) for name, found in losses.items() if name != "default"}
    table = Table("trained by", "loss", "minus default", title=f"anchor {chain.anchors[1].name}, {heldout.tokens:,} held-out tokens, nats per token", title_justify="left")
    for name, found in losses.items():
        difference = differences.get(name)
        table.add_row(name, f"{found.mean:.3f} ± {found.stderr:.3f}", "" if difference is None else f"{difference[0]:+.3f} ± {difference[1]:.3f}")
    Console(width=110).print(table)
    write(options.out, {
        "parameters": chain.anchors[1].parameters, "tokens": heldout.tokens,
        "losses": {name: found.mean for name, found in losses.items()}, "to_default": differences,
    })


if __name__ == "__main__":
    main()
