"""How little a healed model needs: tokens to reach the loss of a model of its shape that was distilled on its own.

    python benchmarks/after/heal.py --chain demo/chain

A model in between, 3/4 of the teacher's parameters and half way between the two largest anchors, is healed from its larger neighbour on a 40th, a 20th, a 10th and a 5th of the
tokens T of a stage. Its rival has the same shape, is cut from the teacher where the same calibration text says it hurts least, and is distilled from the teacher with a stage's own
settings on all T. Both read the recipe's training text; healing measures itself on calibration text, and all losses here are on held-out documents that neither has seen, in nats per
token, differences paired. Every loss is kept in ``--work``: a run that was stopped goes on. Writes benchmarks/results/heal.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from cbd_hub import Chain, ChainDistiller, ChainDistillerConfig, Recipe, heal
from cbd_hub.cut import Cut, cut_model, measure_importance
from cbd_hub.distill.data import as_row
from cbd_hub.distill.heal import LEARNING
from cbd_hub.distill.stages import calibration_of, read_parts
from cbd_hub.evaluation import Documents, Losses, document_losses
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.interpolation.plan import Plan
from cbd_hub.sizes import format_size


sys.path.insert(0, str(Path(__file__).parent.parent))
from measuring import write


HELDOUT_TOKENS = 8000
PARTS = (40, 20, 10, 5)


class Bench:
    """The models, and their losses on the held-out documents."""

    def __init__(self, chain: Path, work: Path) -> None:
        self.chain, self.work, self.recipe = Chain.from_pretrained(chain), work, Recipe.read(chain / "recipe.yaml")
        self.parts, self.tokenizer = read_parts(self.recipe), self.chain.tokenizer()
        self.block = self.recipe.data.block_size
        self.heldout = Documents.read(self.parts.heldout, self.tokenizer, self.block, HELDOUT_TOKENS)
        self.stage = self.recipe.stage_arguments(self.recipe.anchors[0])
        self.tokens = self.stage["max_steps"] * self.stage["per_device_train_batch_size"] * self.block
        work.mkdir(parents=True, exist_ok=True)

    def losses(self, name: str, make: Callable[[], Any]) -> Losses:
        """Losses of a model, which is made once."""
        return Losses.kept(self.work / f"{name}.npz", lambda: document_losses(ModelRunner(make().eval()), self.heldout))

    def alone(self, plan: Plan) -> Any:
        """A model of the plan's shape, cut from the teacher and distilled on its own."""
        teacher = self.chain.model("max", dtype=torch.float32)
        importance = measure_importance(teacher, calibration_of(self.parts, self.tokenizer, self.block).blocks)
        cut = Cut.of(teacher, plan.shape, importance, "teacher")
        transformers.set_seed(self.recipe.seed)
        student = cut_model(teacher, cut.plan)
        with tempfile.TemporaryDirectory() as folder:
            args = ChainDistillerConfig(folder, seed=self.recipe.seed, **{**self.stage, "save_strategy": "no"})
            ChainDistiller(model=student, teacher=teacher, args=args, train_dataset=self.parts.rows(), processing_class=self.tokenizer, kept=cut.kept).train()
        return student

    def healed(self, plan: Plan, tokens: int, **options: Any) -> Any:
        """The chain's model, healed by default on so many tokens."""
        rows = [as_row(document) for document in self.parts.calibration]
        return heal(
            self.chain.model(plan.parameters, dtype=torch.float32), self.chain, self.parts.rows(), eval_dataset=rows, tokens=tokens, patience=None, heldout_tokens=2048,
            block_size=self.block, per_device_train_batch_size=self.stage["per_device_train_batch_size"], seed=self.recipe.seed, **options,
        )

    def row(self, size: int, parts: tuple[int, ...], options: dict[str, Any]) -> dict[str, Any]:
        """What is found at a size."""
        plan = self.chain.plan(size)
        name = str(plan.parameters)
        alone = self.losses(f"{name}.alone", lambda: self.alone(plan))
        found = {0: self.losses(f"{name}.0", lambda: self.chain.model(plan.parameters, dtype=torch.float32))}
        tag = "".join(f".{key}={value}" for key, value in options.items())  # of another loss or rate the losses are others
        for part in parts:
            tokens = self.tokens // part
            found[tokens] = self.losses(f"{name}.{tokens}{tag}", lambda tokens=tokens: self.healed(plan, tokens, **options))  # type: ignore[misc]
        curve: list[dict[str, Any]] = [{"tokens": tokens, "loss": losses.mean, "stderr": losses.stderr, "to_alone": losses.minus((1.0, alone))} for tokens, losses in found.items()]
        return {
            "parameters": plan.parameters, "shape": plan.shape.text, "neighbours": [plan.small, plan.large], "alone": {"tokens": self.tokens, "loss": alone.mean, "stderr": alone.stderr},
            "curve": curve, "reached": next((point["tokens"] for point in curve if point["to_alone"][0] <= 0), None),
        }


def main() -> None:
    """Heal, distil, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", type=Path, default=Path("demo/chain"))
    parser.add_argument("--work", type=Path, default=Path("benchmarks/models/heal"), help="where losses are kept")
    parser.add_argument("--parts", default=",".join(map(str, PARTS)), help="healed on T divided by each of these")
    parser.add_argument("--learning-rate", type=float, default=LEARNING["learning_rate"], help="heal's own by default")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/heal.json"))
    options = parser.parse_args()
    bench = Bench(options.chain, options.work)
    largest, second = (anchor.parameters for anchor in bench.chain.anchors[:2])
    settings = {**LEARNING, "learning_rate": options.learning_rate}
    rows = []
    for size in (3 * largest // 4, (largest + second) // 2):
        row = bench.row(size, tuple(map(int, options.parts.split(","))), settings)
        rows.append(row)
        alone = row["alone"]
        title = f"{format_size(row['parameters'])} ({row['shape']}); distilled on its own on {alone['tokens']:,} tokens: {alone['loss']:.3f} ± {alone['stderr']:.3f}"
        table = Table("healed on", "loss", "to its own", title=title, title_justify="left")
        for point in row["curve"]:
            difference = point["to_alone"]
            table.add_row(f"{point['tokens']:,} tokens", f"{point['loss']:.3f} ± {point['stderr']:.3f}", f"{difference[0]:+.3f} ± {difference[1]:.3f}")
        Console(width=120).print(table)
        write(options.out, {
            "heldout_tokens": bench.heldout.tokens, "documents": len(bench.heldout.ids), "heal": settings, "rows": rows,
        })


if __name__ == "__main__":
    main()
