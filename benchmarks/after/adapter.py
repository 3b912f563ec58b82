"""How much of its gain a LoRA keeps when it is carried to another size without training.

    python benchmarks/after/adapter.py --chain demo/chain --text other_domain.txt

A LoRA is trained on the largest anchor on a text of another domain than the chain's, by cross-entropy. Carried to sizes of the segment below it, and to the smaller anchor, without a step of
training, it is compared with the model of that size without it, and at the middle of the segment with a LoRA trained anew there on the same text with the same settings. All losses are on
held-out documents of that text, in nats per token, differences paired. What it keeps at a size is its gain there (loss without it less loss with it) as a share of its gain on its own
anchor; the goal is 80% at the middle. Losses and adapters are kept in ``--work``: a run that was stopped goes on. Writes benchmarks/results/adapter.json.
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
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainingArguments

from cbd_hub import Chain, carry_adapter
from cbd_hub.distill.data import split_documents
from cbd_hub.evaluation import Documents, Losses, document_losses
from cbd_hub.files import staged_folder
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.sizes import format_size
from cbd_hub.texts import read_texts


sys.path.insert(0, str(Path(__file__).parent.parent))
from measuring import write


SHARES = (0.75, 0.5, 0.25, 0.0)  # of the way from the smaller neighbour to the larger one


class Bench:
    """The models, the adapters, and their losses on the held-out documents."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.chain = options, Chain.from_pretrained(options.chain)
        tokenizer = self.chain.tokenizer()
        parts = split_documents(read_texts(options.text, options.column), options.heldout, 0.0, options.seed)
        self.heldout = Documents.read(parts.heldout, tokenizer, options.block_size, options.heldout_tokens)
        self.steps = max(1, options.tokens // (options.batch_size * options.block_size))
        blocks = Documents.packed(parts.train, tokenizer, options.block_size, 2 * options.tokens).ids
        self.rows = [{"input_ids": block, "labels": block} for block in blocks]
        options.work.mkdir(parents=True, exist_ok=True)

    def model(self, size: int) -> Any:
        """The chain's model of a size, in fp32."""
        return self.chain.model(size, dtype=torch.float32)

    def losses(self, name: str, make: Callable[[], Any]) -> Losses:
        """Losses of a model, which is made once."""
        return Losses.kept(self.options.work / f"{name}.npz", lambda: document_losses(ModelRunner(make().eval()), self.heldout, bf16=False))

    def base(self, size: int) -> Losses:
        """Losses of the model of a size as it is."""
        return self.losses(f"{size}.base", lambda: self.model(size))

    def trained(self, size: int) -> Path:
        """A LoRA trained at a size; its folder."""
        folder: Path = self.options.work / f"{size}.lora"
        if folder.is_dir():
            return folder
        transformers.set_seed(self.options.seed)
        config = LoraConfig(r=self.options.rank, lora_alpha=2 * self.options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(self.model(size).train(), config)
        with tempfile.TemporaryDirectory() as work:
            arguments = TrainingArguments(
                work, max_steps=self.steps, per_device_train_batch_size=self.options.batch_size, learning_rate=self.options.learning_rate, lr_scheduler_type="cosine", warmup_steps=self.steps // 20,
                seed=self.options.seed, save_strategy="no", report_to="none", logging_steps=10, use_cpu=not torch.cuda.is_available(),
            )
            Trainer(model=model, args=arguments, train_dataset=self.rows).train()
        with staged_folder(folder) as staging:
            model.save_pretrained(staging)
        return folder

    def with_adapter(self, size: int, folder: Path) -> Any:
        """The model of a size with an adapter of that size, merged."""
        return PeftModel.from_pretrained(self.model(size), str(folder)).merge_and_unload()

    def carried(self, home: int, size: int) -> Any:
        """The model of a size with the LoRA of another."""
        with tempfile.TemporaryDirectory() as folder:
            carry_adapter(self.trained(home), self.options.chain, size, output_dir=Path(folder) / "carried", adapter_size=home)
            return self.with_adapter(size, Path(folder) / "carried")

    def run(self) -> dict[str, Any]:
        """All that is found."""
        large, small = (anchor.parameters for anchor in self.chain.anchors[:2])
        before, after = self.base(large), self.losses(f"{large}.own", lambda: self.with_adapter(large, self.trained(large)))
        gain = before.minus((1.0, after))
        rows = []
        for share in SHARES:
            size = self.chain.plan(round(small + share * (large - small)), tolerance=0.1).parameters
            base, carried = self.base(size), self.losses(f"{size}.from.{large}", lambda size=size: self.carried(large, size))  # type: ignore[misc]
            own = base.minus((1.0, carried))
            kept = own[0] / gain[0]
            error = base.minus((1.0, carried), (kept, before), (-kept, after))[1]  # of a ratio of paired differences, linearised
            row: dict[str, Any] = {
                "parameters": size, "shape": self.chain.plan(size).shape.text, "base": [base.mean, base.stderr], "carried": [carried.mean, carried.stderr], "gain": own,
                "kept": [kept, None if error is None else error / abs(gain[0])],
            }
            if share == 0.5 and not self.options.carried_only:
                anew = self.losses(f"{size}.anew", lambda size=size: self.with_adapter(size, self.trained(size)))  # type: ignore[misc]
                row |= {"anew": [anew.mean, anew.stderr], "anew_gain": base.minus((1.0, anew)), "carried_to_anew": carried.minus((1.0, anew))}
            rows.append(row)
        return {
            "anchor": {"parameters": large, "base": [before.mean, before.stderr], "adapted": [after.mean, after.stderr], "gain": gain}, "rows": rows,
        }


def main() -> None:
    """Train, carry, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", type=Path, default=Path("demo/chain"))
    parser.add_argument("--text", required=True, help="text of another domain: a file or a pattern")
    parser.add_argument("--column", default="text")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/models/adapter"), help="where losses and adapters are kept")
    parser.add_argument("--tokens", type=int, default=102_400, help="tokens that a LoRA is trained on")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--heldout", type=float, default=0.1, help="share of the documents that is held out")
    parser.add_argument("--heldout-tokens", type=int, default=8000)
    parser.add_argument("--carried-only", action="store_true", help="train none anew at the middle")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapter.json"))
    options = parser.parse_args()
    bench = Bench(options)
    found = bench.run()
    anchor = found["anchor"]
    title = f"LoRA of rank {options.rank} on {format_size(anchor['parameters'])}: {anchor['base'][0]:.3f} before, {anchor['adapted'][0]:.3f} after, gain {pair(anchor['gain'])}"
    table = Table("size", "without it", "carried", "gain", "kept", "trained anew", "carried to anew", title=title, title_justify="left")
    for row in found["rows"]:
        table.add_row(
            format_size(row["parameters"]), f"{row['base'][0]:.3f}", f"{row['carried'][0]:.3f}", pair(row["gain"]), f"{row['kept'][0]:.1%}", f"{row['anew'][0]:.3f}" if "anew" in row else "",
            pair(row["carried_to_anew"]) if "anew" in row else "",
        )
    Console(width=150).print(table)
    write(options.out, {
        "seed": options.seed, "tokens": bench.steps * options.batch_size * options.block_size, "rank": options.rank,
        "learning_rate": options.learning_rate, "heldout_tokens": bench.heldout.tokens, "documents": len(bench.heldout.ids), **found,
    })


def pair(values: Any) -> str:
    """A difference with its standard error."""
    return f"{values[0]:+.3f}" + ("" if values[1] is None else f" ± {values[1]:.3f}")


if __name__ == "__main__":
    main()
