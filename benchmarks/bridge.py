"""Bridges from a teacher of another vocabulary or architecture, in held-out bits per byte.

    python benchmarks/bridge.py distil --teacher models/gemma3-270m --student models/smollm2-99m --train train.txt --heldout heldout.txt
    python benchmarks/bridge.py distil --teacher models/smollm2-135m --student models/gpt2-shaped --train train.txt --heldout heldout.txt
    python benchmarks/bridge.py move --model models/smollm2-135m --tokenizer models/gpt2-tokenizer --train train.txt --heldout heldout.txt
    python benchmarks/bridge.py align --tokenizers models/a models/b models/c --heldout heldout.txt

``distil``: the same student, text, batches and steps, by every bridge and by cross-entropy alone. ``move``: a model in another vocabulary, before training and
after a short span distillation from itself, beside a start from random embeddings. ``align``: spans of every pair of tokenizers. Held-out text is the same bytes for all,
differences are paired over documents. Writes benchmarks/results/bridge_<experiment>.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from cbd_hub import ChainDistiller, ChainDistillerConfig
from cbd_hub.evaluation import Losses, byte_losses
from cbd_hub.families import family_of
from cbd_hub.interpolation.live import ModelRunner, best_device
from cbd_hub.losses.bridge import byte_spans
from cbd_hub.retokenize import retokenize
from cbd_hub.texts import read_texts
from cbd_hub.weights import load_model, load_tokenizer


RIVALS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"bridge": "span", "kd_weight": 0.0, "ce_weight": 1.0}, "text": {"bridge": "text", "max_new_tokens": 64},
    "span": {"bridge": "span", "ce_weight": 1.0}, "vocab": {"bridge": "vocab", "ce_weight": 1.0}, "span+vocab": {"bridge": "span+vocab", "ce_weight": 1.0},
}


def _train(student: Any, teacher: Any, tokenizers: tuple[Any, Any], rows: list[dict[str, str]], options: argparse.Namespace, fields: dict[str, Any]) -> float:
    """Train a student in place; seconds that it took."""
    transformers.set_seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        config = ChainDistillerConfig(
            folder, seed=options.seed, max_steps=options.steps, per_device_train_batch_size=8, block_size=128, bf16=True, save_strategy="no", report_to="none",
            learning_rate=options.learning_rate, **fields,
        )
        trainer = ChainDistiller(
            model=student, teacher=teacher, args=config, train_dataset=rows, processing_class=tokenizers[0], teacher_processing_class=tokenizers[1],
        )
        began = time.perf_counter()
        trainer.train()
    return time.perf_counter() - began


def _distil(options: argparse.Namespace, rows: list[dict[str, str]], measure: Callable[[Any, Any], Losses]) -> tuple[dict[str, Losses], dict[str, float]]:
    tokenizers = load_tokenizer(options.student), load_tokenizer(options.teacher)
    teacher = load_model(options.teacher, torch.float32)
    losses = {"teacher": measure(teacher.to(best_device()), tokenizers[1]), "untrained": measure(load_model(options.student, torch.float32).to(best_device()), tokenizers[0])}
    seconds = {}
    for name in options.rivals.split(","):
        student = load_model(options.student, torch.float32)
        seconds[name] = _train(student, teacher, tokenizers, rows, options, RIVALS[name])
        losses[name] = measure(student.eval(), tokenizers[0])
    return losses, seconds


def _move(options: argparse.Namespace, rows: list[dict[str, str]], measure: Callable[[Any, Any], Losses]) -> tuple[dict[str, Losses], dict[str, float]]:
    old, new = load_tokenizer(options.model), load_tokenizer(options.tokenizer)
    teacher = load_model(options.model, torch.float32)
    losses, seconds = {"original": measure(teacher.to(best_device()), old)}, {}
    with tempfile.TemporaryDirectory() as folder:
        retokenize(options.model, Path(folder) / "moved", tokenizer=options.tokenizer)
        for start in ("composed rows", "random rows"):
            student = load_model(Path(folder) / "moved", torch.float32)
            if start == "random rows":
                family = family_of(student.config)
                torch.manual_seed(options.seed)
                for spec, _, name in family.stored(student.config):
                    if "vocab" in spec.dims:
                        rows_of = family.parameters(student)[name].data
                        rows_of.copy_(rows_of.std() * torch.randn_like(rows_of))
            losses[f"{start}, untrained"] = measure(student.to(best_device()), new)
            seconds[start] = _train(student, teacher, (new, old), rows, options, RIVALS["span"])
            losses[f"{start}, trained"] = measure(student.eval(), new)
    return losses, seconds


def _align(options: argparse.Namespace) -> list[dict[str, Any]]:
    text = "\n\n".join(read_texts(str(options.heldout)))[:1_000_000]
    tokenizers = {str(path): load_tokenizer(path) for path in options.tokenizers}
    for tokenizer in tokenizers.values():
        byte_spans("the first call reads the vocabulary", tokenizer, tokenizer)
    found = []
    for first, second in itertools.combinations(tokenizers, 2):
        began = time.perf_counter()
        spans = byte_spans(text, tokenizers[first], tokenizers[second])
        seconds = time.perf_counter() - began
        coarse = int(spans[-1][1][1] < spans[-1][0][1])
        ranges = [(ours, theirs)[coarse] for ours, theirs, _ in spans]
        single = sum(stop - start == 1 for start, stop in ranges) / len(spans)
        covered = sum(size for *_, size in spans) / len(text.encode())
        found.append({"pair": [first, second], "bytes": len(text.encode()), "seconds": seconds, "spans": len(spans), "covered": covered, "single on the coarser side": single})
    return found


def main() -> None:
    """Run one experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("distil", "move", "align"))
    for name in ("teacher", "student", "model", "tokenizer", "train"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--tokenizers", type=Path, nargs="+")
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--rivals", default=",".join(RIVALS))
    parser.add_argument("--steps", type=int, default=480, help="8 blocks of 128 tokens each: 480 are half a million")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    wanted = {"distil": ("teacher", "student", "train"), "move": ("model", "tokenizer", "train"), "align": ("tokenizers",)}[options.experiment]
    missing = [name for name in wanted if getattr(options, name) is None]
    if missing:
        parser.error(f"{options.experiment} needs --{missing[0]}")
    result: dict[str, Any] = {"command": f"python benchmarks/bridge.py {options.experiment}", "torch": torch.__version__}
    if options.experiment == "align":
        result["pairs"] = _align(options)
        Console().print_json(json.dumps(result))
    else:
        heldout = read_texts(str(options.heldout))
        rows = [{"text": text} for text in read_texts(str(options.train))]
        run = _distil if options.experiment == "distil" else _move
        losses, seconds = run(options, rows, lambda model, tokenizer: byte_losses(ModelRunner(model), tokenizer, heldout))
        base = losses["cross-entropy" if "cross-entropy" in losses else next(iter(losses))]
        bits = 1 / math.log(2)
        table = Table("model", "bits per byte", "to the base", "seconds", title=f"{options.experiment}, {int(base.tokens.sum()):,} held-out bytes", title_justify="left")
        for name, found in losses.items():
            difference, error = found.minus((1.0, base))
            result[name] = {"bits_per_byte": found.mean * bits, "to_base": difference * bits, "stderr": None if error is None else error * bits, "seconds": seconds.get(name)}
            table.add_row(name, f"{found.mean * bits:.4f}", f"{difference * bits:+.4f} ± {(error or 0.0) * bits:.4f}", f"{seconds.get(name, 0.0):,.0f}")
        Console(width=110).print(table)
        result |= {"bytes": int(base.tokens.sum()), "steps": options.steps}
    out = options.out or Path(f"benchmarks/results/bridge_{options.experiment}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
