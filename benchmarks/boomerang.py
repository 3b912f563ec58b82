"""Boomerang distillation rerun on the demo's own split, against the chain at the middle of its larger segment.

    python benchmarks/boomerang.py --chain demo/chain

Equal teacher, text, batches, optimiser steps and parameters. Boomerang (https://huggingface.co/papers/2510.05064): the student keeps evenly
spaced layers, learns by cross-entropy + 0.1 KL + 2 x mean cosine distance at the block ends, and its blocks are patched back. Its best of both
orders and both embeddings is taken on the held-out text itself, in its favour. Writes benchmarks/results/boomerang.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
import transformers
from measuring import write
from rich.console import Console
from rich.table import Table

from cbd_hub import Chain, ChainDistiller, ChainDistillerConfig, Recipe
from cbd_hub.cut import cut_model, cut_plan
from cbd_hub.distill.packing import packed_dataset
from cbd_hub.distill.stages import read_parts
from cbd_hub.evaluation import Documents, Losses, document_losses
from cbd_hub.interpolation.live import Between, ModelRunner
from cbd_hub.interpolation.patch import patch_plan
from cbd_hub.interpolation.plan import Kept, Segment, Term
from cbd_hub.shapes import count, shape_of
from cbd_hub.sizes import format_size


HELDOUT_TOKENS = 8000


def train(teacher: torch.nn.Module, recipe: Recipe, rows: object, tokenizer: object, layers: int) -> tuple[torch.nn.Module, Kept]:
    """Boomerang's student: evenly spaced layers, its three losses, the stage's own steps and learning rate."""
    shape = shape_of(teacher.config).model_copy(update={"layers": layers})
    kept = Kept.even(shape, shape_of(teacher.config))
    transformers.set_seed(recipe.seed)
    student = cut_model(teacher, cut_plan("teacher", shape, teacher, kept))
    with tempfile.TemporaryDirectory() as folder:
        stage = {**recipe.stage_arguments(recipe.anchors[0]), "ce_weight": 1.0, "kd_weight": 0.1, "hidden_weight": 2.0, "save_strategy": "no"}
        arguments = ChainDistillerConfig(output_dir=folder, seed=recipe.seed, **stage)
        ChainDistiller(
            model=student, teacher=teacher, args=arguments, train_dataset=rows, processing_class=tokenizer, kept=kept
        ).train()
    return student.eval(), kept


def patched(student: torch.nn.Module, teacher: torch.nn.Module, kept: Kept, depth: int, documents: Documents) -> dict[str, Losses]:
    """Held-out losses of the student with blocks put back to a depth, in both orders and with either embedding."""
    small, large = shape_of(student.config), shape_of(teacher.config)
    between = Between({"student": student, "teacher": teacher})
    found = {}
    for order_name, order in (("last first", kept.dropped[::-1]), ("first first", kept.dropped)):
        segment = Segment("student", "teacher", small, large, kept, order, teacher.config, patch=True)
        plan = patch_plan(segment, small.model_copy(update={"layers": depth}))
        for embedding in ("student", "teacher"):
            tensors = {
                name: tuple(Term(embedding, term.tensor, 1.0) for term in terms) if "embed" in name else terms for name, terms in plan.tensors.items()
            }
            with torch.no_grad():
                found[f"{order_name}, {embedding}'s embedding"] = document_losses(between.run(dataclasses.replace(plan, tensors=tensors)), documents)
    return found


def main() -> None:
    """Train boomerang's student, patch it to the middle, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", type=Path, default=Path("demo/chain"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/boomerang.json"))
    options = parser.parse_args()
    console = Console(width=120)
    chain = Chain.from_pretrained(options.chain)
    recipe = Recipe.read(options.chain / "recipe.yaml")
    parts, tokenizer = read_parts(recipe), chain.tokenizer()
    documents = Documents.read(parts.heldout, tokenizer, recipe.data.block_size, HELDOUT_TOKENS)
    teacher = chain.model("max", dtype=torch.float32)
    large, small = chain.anchors[:2]
    shape = shape_of(teacher.config)
    depths = range(1, shape.layers + 1)

    def nearest(size: int) -> int:
        return min(depths, key=lambda depth: abs(count(shape.model_copy(update={"layers": depth}), teacher.config) - size))

    student, kept = train(teacher, recipe, packed_dataset(parts.rows(), tokenizer, recipe.data.block_size), tokenizer, nearest(small.parameters))
    middle = nearest((small.parameters + large.parameters) // 2)
    size = count(shape.model_copy(update={"layers": middle}), teacher.config)
    rivals = patched(student, teacher, kept, middle, documents)
    ours = document_losses(ModelRunner(chain.model(size, dtype=torch.float32)), documents)
    ends = {
        "boomerang's student": document_losses(ModelRunner(student), documents),
        f"anchor {small.name}": document_losses(ModelRunner(chain.model(small.parameters, dtype=torch.float32)), documents),
        "teacher": document_losses(ModelRunner(teacher), documents),
    }
    best = min(rivals, key=lambda name: rivals[name].mean)
    difference = ours.minus((1.0, rivals[best]))
    table = Table("model", "parameters", "loss", title=f"{documents.tokens:,} held-out tokens, nats per token", title_justify="left")
    for name, losses in {**ends, **{f"boomerang, {name}": losses for name, losses in rivals.items()}, "chain": ours}.items():
        parameters = {"teacher": large.parameters, f"anchor {small.name}": small.parameters, "boomerang's student": count(shape_of(student.config), teacher.config)}
        table.add_row(name, format_size(parameters.get(name, size)), f"{losses.mean:.3f} ± {losses.stderr:.3f}")
    console.print(table)
    console.print(f"chain minus boomerang's best ({best}) at {size:,} parameters: {difference[0]:+.3f} ± {difference[1]:.3f} nats per token, paired")
    write(options.out, {
        "parameters": size, "tokens": documents.tokens, "steps": recipe.stage_arguments(recipe.anchors[0])["max_steps"],
        "chain": ours.mean, "boomerang": {name: losses.mean for name, losses in rivals.items()}, "ends": {name: losses.mean for name, losses in ends.items()},
        "difference": difference[0], "stderr": difference[1],
    })


if __name__ == "__main__":
    main()
