"""The paper's headline at our scale: sizes in between against training from scratch, and many sizes by one chain against a distillation each.

    python benchmarks/headline.py --teacher demo/chain/anchors/135M --text demo/wikipedia.jsonl --work headline [--tokens 81920] [--tasks arc_easy,sciq]

The teacher with its vocabulary trimmed to 8K tokens (`cbd retokenize --keep`), so that small models are small in truth; a chain of two anchors below it, each with the same tokens. Then, at the middle
of the lower segment, without a training step:

- against random weights of the same shape, trained by cross-entropy on 1, 3 and 10 times the tokens of the whole chain (text comes again where it is used up; the share is told);
- against the same shape cut from the teacher and distilled on its own with a stage's tokens, at N = 1, 2 and 5 sizes: loss, tokens, teacher passes and seconds of the N, against those of the chain,
  which pays once; the crossover is the least N at which the chain costs less.

Held-out loss in nats per token over documents, differences paired; with ``--tasks`` also zero-shot accuracy, as benchmarks/tasks.py has it. Models and losses are kept in ``--work``: a run that was stopped goes on. Seconds are of the
machine as it was. Writes benchmarks/results/headline.json.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import write
from rich.console import Console
from rich.table import Table
from tasks import TASKS, spread
from tasks import rows as task_rows
from transformers import Trainer, TrainingArguments

from cbd_hub import ChainDistiller, ChainDistillerConfig, Recipe, distill_chain
from cbd_hub.cut import Cut, measure_importance
from cbd_hub.distill.stages import CALIBRATION_TOKENS, read_parts, untrained
from cbd_hub.evaluation import Calibration, Documents, Losses, document_losses
from cbd_hub.files import staged_folder, write_text
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.interpolation.plan import Plan
from cbd_hub.precision import has_bf16
from cbd_hub.questions import choice_accuracy
from cbd_hub.retokenize import retokenize
from cbd_hub.sizes import format_size
from cbd_hub.weights import load_model


TIMES = (1, 3, 10)
SHARES = (0.5, 0.25, 0.75, 0.1, 0.9)  # of the lower segment: the sizes that somebody wants, the middle first
HELDOUT_TOKENS = 8000
console = Console(width=130)


class Bench:
    """The chain, its rivals, and what each of them cost."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        for folder in ("models", "losses"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)
        trimmed = self.work / "teacher"
        if not trimmed.is_dir():
            retokenize(options.teacher, trimmed, keep=options.keep)
        self.batch, self.block = 8, 128
        self.steps = max(1, options.tokens // (self.batch * self.block))
        self.recipe = Recipe.parse({
            "teacher": str(trimmed), "anchors": options.anchors.split(","), "seed": options.seed,
            "data": {"path": str(options.text), "block_size": self.block, "heldout": 0.05, "calibration": 0.02},
            "stage": {"max_steps": self.steps, "per_device_train_batch_size": self.batch, "learning_rate": options.learning_rate, "disable_tqdm": True},
        })
        self.costs_file = self.work / "costs.json"
        self.costs: dict[str, float] = json.loads(self.costs_file.read_text()) if self.costs_file.is_file() else {}
        made = (self.work / "chain" / "chain.json").is_file()
        distil = lambda: distill_chain(self.recipe, self.work / "chain", progress=console.print)  # noqa: E731
        self.chain = distil() if made else self.timed("chain", distil)
        self.parts, self.tokenizer = read_parts(self.recipe), self.chain.tokenizer()
        self.heldout = Documents.read(self.parts.heldout, self.tokenizer, self.block, HELDOUT_TOKENS)
        self.text = Documents.packed(self.parts.train, self.tokenizer, self.block, 10**9)
        self.calibration = Calibration.read(self.parts.calibration, self.tokenizer, self.block, CALIBRATION_TOKENS)
        self.teacher = self.chain.model("max", dtype=torch.float32)
        self.questions = {name: [TASKS[name].question(every[index]) for index in spread(len(every), options.limit)] for name in options.tasks for every in [task_rows(name)]}

    def timed(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives; its seconds are kept, and added up where it went on."""
        began = time.monotonic()
        try:
            return make()
        finally:
            self.costs[name] = self.costs.get(name, 0.0) + time.monotonic() - began
            write_text(self.costs_file, json.dumps(self.costs, indent=1))

    def kept(self, name: str, train: Callable[[], Any]) -> Any:
        """A model that is trained once."""
        folder = self.work / "models" / name
        if not folder.is_dir():
            model = self.timed(name, train)
            with staged_folder(folder) as staging:
                model.save_pretrained(staging)
        return load_model(folder, torch.float32)

    def losses(self, name: str, make: Callable[[], Any]) -> Losses:
        """Held-out losses of a model, measured once."""
        def measured() -> Losses:
            found = document_losses(ModelRunner(make().eval()), self.heldout)
            console.print(f"{name}: {found.mean:.4f}")
            return found

        return Losses.kept(self.work / "losses" / f"{name}.npz", measured)

    def scratch(self, plan: Plan, times: int) -> Any:
        """The plan's shape from random weights, by cross-entropy on so many times the chain's tokens."""
        config = self.chain.model(plan.parameters).config
        transformers.set_seed(self.options.seed)
        model = type(self.teacher)(config).train()
        steps = times * len(self.recipe.anchors) * self.steps
        console.print(f"from scratch, {times}x: {steps} steps")
        rows = [{"input_ids": block, "labels": block} for block in self.text.ids]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=self.batch, learning_rate=self.options.scratch_learning_rate, lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20),
                bf16=has_bf16(self.teacher.device.type), seed=self.options.seed, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            )
            Trainer(model=model, args=arguments, train_dataset=rows).train()
        return model

    def alone(self, plan: Plan) -> Any:
        """The plan's shape cut from the teacher and distilled with a stage's tokens."""
        importance = measure_importance(self.teacher, self.calibration.blocks)
        cut = Cut.of(self.teacher, plan.shape, importance, "teacher")
        transformers.set_seed(self.options.seed)
        student = untrained(self.recipe, self.teacher, cut.plan, self.parts, self.tokenizer).requires_grad_(True)
        console.print(f"{format_size(plan.parameters)} on its own: {self.steps} steps")
        with tempfile.TemporaryDirectory() as folder:
            arguments = ChainDistillerConfig(folder, seed=self.options.seed, **{**self.recipe.stage_arguments(self.recipe.anchors[0]), "save_strategy": "no", "report_to": "none"})
            ChainDistiller(model=student, teacher=self.teacher, args=arguments, train_dataset=self.parts.rows(), processing_class=self.tokenizer, kept=cut.kept).train()
        return student

    def run(self) -> dict[str, Any]:
        """All that is found."""
        low, high = self.chain.anchors[-1].parameters, self.chain.anchors[-2].parameters
        plans = [self.chain.plan(round(low + share * (high - low)), tolerance=0.1) for share in SHARES]
        middle = plans[0]
        ours = self.losses("chain", lambda: self.chain.model(middle.parameters, dtype=torch.float32))
        ends = {anchor.name: self.losses(f"anchor {anchor.name}", lambda anchor=anchor: self.chain.model(anchor.parameters, dtype=torch.float32)) for anchor in self.chain.anchors}  # type: ignore[misc]
        rows = [self.row("the chain's, no training", ours, ours, 0, lambda: self.chain.model(middle.parameters, dtype=torch.float32))]
        for times in TIMES:
            make = lambda times=times: self.kept(f"scratch {times}x", lambda: self.scratch(middle, times))  # noqa: E731
            rows.append(self.row(f"from scratch, {times}x", self.losses(f"scratch {times}x", make), ours, times * len(self.recipe.anchors) * self.steps, make))
        many = []
        for plan in plans:
            name = f"alone {plan.parameters}"
            alone = self.losses(name, lambda plan=plan, name=name: self.kept(name, lambda: self.alone(plan)))  # type: ignore[misc]
            between = self.losses(f"chain {plan.parameters}", lambda plan=plan: self.chain.model(plan.parameters, dtype=torch.float32))  # type: ignore[misc]
            many.append({"parameters": plan.parameters, "alone": [alone.mean, alone.stderr], "chain": [between.mean, between.stderr], "chain_to_alone": between.minus((1.0, alone)), "seconds": self.costs[name]})
        return {
            "parameters": middle.parameters, "shape": middle.shape.text, "anchors": {name: [losses.mean, losses.stderr] for name, losses in ends.items()}, "rows": rows, "sizes": many,
            "costs": self.prices(many), "text_tokens": len(self.text.ids) * self.block, "heldout_tokens": self.heldout.tokens,
        }

    def row(self, name: str, losses: Losses, ours: Losses, steps: int, make: Callable[[], Any]) -> dict[str, Any]:
        """One model at the middle size."""
        tokens = steps * self.batch * self.block
        found: dict[str, Any] = {"name": name, "tokens": tokens, "epochs": tokens / (len(self.text.ids) * self.block), "loss": losses.mean, "stderr": losses.stderr, "to_chain": losses.minus((1.0, ours))}
        if self.questions:
            runner = ModelRunner(make().eval())
            found["tasks"] = {name: choice_accuracy(runner, questions, self.tokenizer) for name, questions in self.questions.items()}
        return found

    def prices(self, many: list[dict[str, Any]]) -> dict[str, Any]:
        """What N sizes cost by the chain, once, and each on its own."""
        stage = self.steps * self.batch * self.block
        chain = {"tokens": stage * len(self.recipe.anchors), "seconds": self.costs["chain"]}
        each = sum(found["seconds"] for found in many) / len(many)
        return {
            "chain": chain, "each": {"tokens": stage, "seconds": each},
            "alone": {str(count): {"tokens": count * stage, "seconds": sum(found["seconds"] for found in many[:count])} for count in (1, 2, len(many))},
            "crossover": {"tokens": math.floor(chain["tokens"] / stage) + 1, "seconds": math.floor(chain["seconds"] / each) + 1},
        }


def main() -> None:
    """Distil, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="demo/chain/anchors/135M")
    parser.add_argument("--text", type=Path, default=Path("demo/wikipedia.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("headline"))
    parser.add_argument("--keep", default="8K", help="tokens of the vocabulary that stay")
    parser.add_argument("--anchors", default="50M,28M")
    parser.add_argument("--tokens", type=int, default=20_480, help="of a stage")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--scratch-learning-rate", type=float, default=1e-3)
    parser.add_argument("--tasks", type=lambda words: words.split(","), default=[], help=f"with commas: {', '.join(TASKS)}")
    parser.add_argument("--limit", type=int, default=100, help="items of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/headline.json"))
    options = parser.parse_args()
    bench = Bench(options)
    found = bench.run()
    table = Table(format_size(found["parameters"]), "tokens", "loss", "to the chain's", title_justify="left")
    for row in found["rows"]:
        table.add_row(row["name"], f"{row['tokens']:,}", f"{row['loss']:.3f} ± {row['stderr']:.3f}", "{:+.3f} ± {:.3f}".format(*row["to_chain"]))
    console.print(table)
    costs = Table("sizes", "by the chain", "each on its own")
    for count, alone in found["costs"]["alone"].items():
        costs.add_row(count, f"{found['costs']['chain']['seconds']:.0f} s", f"{alone['seconds']:.0f} s")
    console.print(costs)
    write(options.out, {
        "seed": options.seed, "stage_tokens": bench.steps * bench.batch * bench.block, **found,
    })


if __name__ == "__main__":
    main()
