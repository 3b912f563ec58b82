"""Bridges from a teacher of another vocabulary or architecture, in held-out bits per byte, row by row.

    python benchmarks/bridge.py --models models --train train.jsonl --heldout heldout.jsonl --work bridge [--only gemma --only move] [--rival span --rival text] [--tokens 500000]

Rows: ``gemma`` (Gemma-3-270M teaches a 99M cut of SmolLM2-135M), ``move`` (SmolLM2-135M in GPT-2's vocabulary), ``gpt2`` (SmolLM2-135M teaches a GPT-2 of its size
and vocabulary, from random weights and with its embeddings), ``align`` (spans of every pair of tokenizers), ``loss`` (time and memory of the losses alone).

``--models`` is a folder with the transformers folders ``gemma3-270m`` and ``smollm2-135m``, and the tokenizers ``gpt2`` and ``qwen3``. Where one of the models is a
.gguf file beside them (``gemma3-270m.gguf``) it is converted first. In a row every rival has the same student, text, batches (8 blocks of 128 tokens) and steps;
differences are paired over documents of the same held-out bytes. `python benchmarks/inputs.py --models` fetches all of it. GOLD's losses (ULD and hybrid, with the spans that the others have) are rivals where trl 1.16 is
installed. Every loss is kept in ``--work`` and trainings go on where they were. Writes benchmarks/results/bridge.json from all that is there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from gold import GoldDistiller, HybridDistiller, available, gold_inputs, gold_loss
from inputs import unpacked
from measuring import Peak, whence
from rich.console import Console
from rich.table import Table
from transformers.trainer_utils import get_last_checkpoint

from cbd_hub import ChainDistiller, ChainDistillerConfig
from cbd_hub.configs import read_config
from cbd_hub.cut import Cut, cut_model, measure_importance
from cbd_hub.distill.bridging import Bridge
from cbd_hub.evaluation import BITS, Documents, Losses, byte_losses
from cbd_hub.families import family_of
from cbd_hub.files import staged_folder
from cbd_hub.interpolation.live import Head, ModelRunner, Output
from cbd_hub.losses.bridge import byte_spans
from cbd_hub.precision import best_device
from cbd_hub.retokenize import retokenize
from cbd_hub.shapes import count, fill_ffn, shape_of
from cbd_hub.texts import read_texts
from cbd_hub.weights import load_model, load_tokenizer


ROWS = ("gemma", "move", "gpt2", "align", "loss")
BLOCK, BATCH = 128, 8
RIVALS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"bridge": "span", "kd_weight": 0.0, "ce_weight": 1.0}, "text": {"bridge": "text", "max_new_tokens": 64},
    "span": {"bridge": "span", "ce_weight": 1.0}, "vocab": {"bridge": "vocab", "ce_weight": 1.0}, "span+vocab": {"bridge": "span+vocab", "ce_weight": 1.0},
}
GOLD: dict[str, type[ChainDistiller]] = {"GOLD, ULD": GoldDistiller, "GOLD, hybrid": HybridDistiller}
CUT_LAYERS = 20  # of SmolLM2's 30: 99M
console = Console(width=130)


class Bench:
    """Models, texts and kept losses of one work folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, Path(options.work)
        self.rows = [{"text": text} for text in read_texts(str(options.train))]
        self.heldout = read_texts(str(options.heldout))
        for folder in ("losses", "runs", "models"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)

    def folder(self, name: str) -> Path:
        """A model or tokenizer, converted where it is a .gguf file."""
        return unpacked(self.options.models / name)

    def model(self, name: str) -> Any:
        """A model in fp32."""
        return load_model(self.folder(name), torch.float32).to(best_device())

    def made(self, name: str, make: Callable[[], Any]) -> Any:
        """A student before training, made once."""
        folder = self.work / "models" / name
        if not folder.is_dir():
            model = make()
            with staged_folder(folder) as staging:
                model.save_pretrained(staging)
        return load_model(folder, torch.float32).to(best_device())

    def losses(self, name: str, model: Callable[[], Any], tokenizer: Any) -> Losses:
        """Held-out losses in nats and bytes, measured once."""
        def measured() -> Losses:
            found = byte_losses(ModelRunner(model().eval()), tokenizer, self.heldout, max_bytes=self.options.heldout_bytes)
            console.print(f"{name}: {found.mean * BITS:.4f} bits per byte")
            return found

        return Losses.kept(self.work / "losses" / f"{name.replace('/', ', ')}.npz", measured)

    def trained(self, name: str, start: Callable[[], Any], teacher: Any, tokenizers: tuple[Any, Any], rival: str) -> Any:
        """A student after its training, and what its steps took."""
        options, run = self.options, self.work / "runs" / name.replace("/", ", ")
        transformers.set_seed(options.seed)
        gold = GOLD.get(rival)
        config = ChainDistillerConfig(
            str(run), seed=options.seed, max_steps=self.steps, per_device_train_batch_size=options.batch, block_size=BLOCK, bf16=True, save_steps=50, report_to="none",
            learning_rate=options.learning_rate, disable_tqdm=True, logging_steps=10, **(RIVALS["span"] if gold else RIVALS[rival]),
        )
        rows = self.enough(tokenizers[0])
        console.print(f"{name}: {self.steps} steps, {len(rows)} texts")
        trainer = (gold or ChainDistiller)(
            model=start(), teacher=teacher, args=config, train_dataset=rows, processing_class=tokenizers[0], teacher_processing_class=tokenizers[1],
        )
        began = time.perf_counter()
        trainer.train(resume_from_checkpoint=get_last_checkpoint(run) if run.is_dir() else None)
        console.print(f"{name}: {time.perf_counter() - began:.0f} s")
        model = trainer.accelerator.unwrap_model(trainer.model)
        shutil.rmtree(run, ignore_errors=True)
        return model

    def enough(self, tokenizer: Any) -> list[dict[str, str]]:
        """As many texts as fill the budget once, with a fifth to spare: no rival reads others, and the teacher answers no prompt that is not used."""
        ends = itertools.accumulate(len(tokenizer(row["text"])["input_ids"]) for row in self.rows)
        wanted = 1.2 * self.steps * self.options.batch * BLOCK
        return self.rows[: 1 + next((place for place, end in enumerate(ends) if end >= wanted), len(self.rows))]

    @property
    def steps(self) -> int:
        """Optimiser steps of the token budget."""
        return max(1, self.options.tokens // (self.options.batch * BLOCK))

    def compared(self, row: str, start: Callable[[], Any], teacher: Any, tokenizers: tuple[Any, Any], rivals: list[str]) -> dict[str, Losses]:
        """A student untrained and after every rival's training."""
        found = {"untrained": self.losses(f"{row}/untrained", start, tokenizers[0])}
        for rival in (rival for rival in rivals if not self.options.rival or rival in self.options.rival):
            name = f"{row}/{rival}/{self.steps}"
            found[rival] = self.losses(name, functools.partial(self.trained, name, start, teacher, tokenizers, rival), tokenizers[0])
        return found


def gemma(bench: Bench) -> dict[str, Losses]:
    """Gemma-3-270M teaches a 99M cut of SmolLM2."""
    tokenizers = load_tokenizer(bench.folder("smollm2-135m")), load_tokenizer(bench.folder("gemma3-270m"))

    def cut() -> Any:
        model = bench.model("smollm2-135m")
        importance = measure_importance(model, Documents.packed([row["text"] for row in bench.rows[-300:]], tokenizers[0], BLOCK, 4096))
        return cut_model(model, Cut.of(model, shape_of(model.config).model_copy(update={"layers": CUT_LAYERS}), importance, "whole").plan)

    teacher = bench.model("gemma3-270m")
    found = {"teacher": bench.losses("gemma/teacher", lambda: teacher, tokenizers[1])}
    return found | bench.compared("gemma", lambda: bench.made("smollm2-99m", cut), teacher, tokenizers, [*RIVALS, *(GOLD if available() else ())])


def move(bench: Bench) -> dict[str, Losses]:
    """SmolLM2-135M in GPT-2's vocabulary: rows composed, and random ones, untrained and after a span distillation from itself."""
    old, new = load_tokenizer(bench.folder("smollm2-135m")), load_tokenizer(bench.folder("gpt2"))
    teacher = bench.model("smollm2-135m")
    found = {"original": bench.losses("move/original", lambda: teacher, old)}
    folder = bench.work / "models" / "moved"
    if not folder.is_dir():
        retokenize(bench.folder("smollm2-135m"), folder, tokenizer=bench.folder("gpt2"))

    def random_rows() -> Any:
        student = load_model(folder, torch.float32)
        torch.manual_seed(bench.options.seed)
        live = family_of(student.config).parameters(student)
        for spec, _, name in family_of(student.config).stored(student.config):
            if "vocab" in spec.dims:
                live[name].data.copy_(live[name].data.std() * torch.randn_like(live[name].data))
        return student

    for start, make in (("composed rows", lambda: load_model(folder, torch.float32)), ("random rows", random_rows)):
        rivals = ["span", "vocab", "span+vocab", "cross-entropy"] if start == "composed rows" else ["span"]
        part = bench.compared(f"move/{start}", make, teacher, (new, old), rivals)
        found |= {f"{start}, {name}": losses for name, losses in part.items()}
    return found


def gpt2(bench: Bench) -> dict[str, Losses]:
    """SmolLM2-135M teaches a GPT-2 of equal size and its vocabulary, from random weights and with the teacher's embeddings."""
    teacher, tokenizer = bench.model("smollm2-135m"), load_tokenizer(bench.folder("smollm2-135m"))
    whole = shape_of(teacher.config)
    found = {"teacher": bench.losses("gpt2/teacher", lambda: teacher, tokenizer)}

    def start(copied: bool) -> Any:
        torch.manual_seed(bench.options.seed)
        config = transformers.GPT2Config(
            vocab_size=whole.vocab, n_embd=whole.hidden, n_head=whole.heads, n_layer=whole.layers, n_inner=4 * whole.hidden, n_positions=1024,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            architectures=["GPT2LMHeadModel"],
        )
        config.n_inner = fill_ffn(count(whole, teacher.config), shape_of(config), config)
        model = transformers.GPT2LMHeadModel(config)
        if copied:
            model.transformer.wte.weight.data.copy_(teacher.get_input_embeddings().weight.data)
        return model

    for name, copied in (("random", False), ("embeddings copied", True)):
        if bench.options.start and name not in bench.options.start:
            continue
        make = functools.partial(bench.made, f"gpt2-shaped, {name}", functools.partial(start, copied))
        part = bench.compared(f"gpt2/{name}", make, teacher, (tokenizer, tokenizer), ["cross-entropy", "span", "vocab"])
        found |= {f"{name}, {rival}": losses for rival, losses in part.items()}
    return found


def align(bench: Bench) -> dict[str, Any]:
    """Spans of every pair of tokenizers on a megabyte of the training text."""
    text = "\n\n".join(row["text"] for row in bench.rows).encode()[:1_000_000].decode(errors="ignore")
    names = ("smollm2-135m", "gemma3-270m", "gpt2", "qwen3")
    tokenizers = {name: load_tokenizer(bench.folder(name)) for name in names if (bench.options.models / name).is_dir()}
    for tokenizer in tokenizers.values():
        byte_spans("the first call reads the vocabulary", tokenizer, tokenizer)
    found = {}
    for first, second in itertools.combinations(tokenizers, 2):
        began = time.perf_counter()
        spans = byte_spans(text, tokenizers[first], tokenizers[second])
        seconds = time.perf_counter() - began
        lengths = [(ours[1] - ours[0], theirs[1] - theirs[0]) for ours, theirs, _ in spans]
        coarse = min((0, 1), key=lambda side: sum(length[side] for length in lengths))
        found[f"{first}, {second}"] = {
            "bytes": len(text.encode()), "seconds": seconds, "spans": len(spans), "covered": sum(size for *_, size in spans) / len(text.encode()),
            "single on the coarser side": sum(length[coarse] == 1 for length in lengths) / len(spans),
        }
    return found


def loss(bench: Bench) -> dict[str, Any]:
    """CPU seconds and peak memory of a step of each loss alone, backward pass included, from random hidden states and heads of the real models' shapes."""
    folders = bench.folder("smollm2-135m"), bench.folder("gemma3-270m")
    tokenizers = tuple(load_tokenizer(folder) for folder in folders)
    shapes = [(config.vocab_size, config.hidden_size) for config in map(read_config, folders)]
    torch.manual_seed(0)
    heads = [0.05 * torch.randn(*shape) for shape in shapes]
    heads[0].requires_grad_()
    bridges = {kind: Bridge(ChainDistillerConfig("unused", bridge=kind, block_size=BLOCK, report_to="none"), *tokenizers) for kind in ("span", "span+vocab")}
    batch = bridges["span"].rows.collate(list(itertools.islice(bridges["span"].rows.blocks(bench.rows, 4 * BLOCK), bench.options.loss_batch)))
    hidden = [torch.randn(*batch[f"{name}input_ids"].shape, width) for name, (_, width) in zip(("", "teacher_"), shapes)]

    def ours(kind: str) -> None:
        output, target = (Output(state.clone().requires_grad_(), Head(head)) for state, head in zip(hidden, heads))
        bridges[kind].loss(output, target, batch, 1).backward()

    def theirs(made: Any) -> None:
        labels = batch["labels"].clone()
        labels[:, 0] = -100
        logits = (state.clone().requires_grad_(place == 0) @ head.t() for place, (state, head) in enumerate(zip(hidden, heads)))
        made(*logits, **gold_inputs(batch, labels)).sum().backward()

    calls: dict[str, Callable[[], None]] = {kind: functools.partial(ours, kind) for kind in bridges}
    if available():
        for name, hybrid in (("GOLD, ULD", False), ("GOLD, hybrid", True)):
            made = gold_loss(hybrid, *tokenizers)
            made.crossentropy_weight = 0.0
            calls[name] = functools.partial(theirs, made)
    heads[0].grad = torch.zeros_like(heads[0])
    memory: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(bench.options.repeats):  # in turns
        for name, call in calls.items():
            with Peak() as peak:
                began = time.thread_time()
                call()
                seconds[name].append(time.thread_time() - began)
            memory[name] = max(memory.get(name, 0), peak.bytes)
            console.print(f"{name}: {seconds[name][-1]:.2f} CPU seconds, {memory[name] / 2**20:,.0f} MiB")
    return {
        "blocks": bench.options.loss_batch, "tokens": int(batch["labels"].ne(-100).sum()), "teacher_tokens": int(batch["teacher_spans"].ge(0).sum()), "threads": torch.get_num_threads(),
        **{name: {"cpu_seconds": statistics.median(seconds[name]), "peak_bytes": memory[name]} for name in calls},
    }


def report(row: str, found: dict[str, Any]) -> dict[str, Any]:
    """A row's table, printed, as plain data."""
    if not all(isinstance(value, Losses) for value in found.values()):
        console.print_json(json.dumps(found))
        return found
    base = next((losses for name, losses in found.items() if name.endswith("cross-entropy")), next(iter(found.values())))
    table = Table("model", "bits per byte", "to cross-entropy", title=f"{row}, {int(base.tokens.sum()):,} held-out bytes", title_justify="left")
    plain: dict[str, Any] = {"bytes": int(base.tokens.sum())}
    for name, losses in found.items():
        difference, error = losses.minus((1.0, base))
        plain[name] = {"bits_per_byte": losses.mean * BITS, "to_cross_entropy": difference * BITS, "stderr": None if error is None else error * BITS}
        table.add_row(name, f"{losses.mean * BITS:.4f}", f"{difference * BITS:+.4f} ± {(error or 0.0) * BITS:.4f}")
    console.print(table)
    return plain


def main() -> None:
    """Make what is missing, and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("models", "models"), ("train", "train.jsonl"), ("heldout", "heldout.jsonl"), ("work", "bridge")):
        parser.add_argument(f"--{name}", type=Path, default=Path(default))
    parser.add_argument("--only", action="append", choices=ROWS, help="a row; all by default")
    parser.add_argument("--rival", action="append", help="one of a row's rivals; all by default")
    parser.add_argument("--start", action="append", choices=("random", "embeddings copied"), help="of the row gpt2's students; both by default")
    parser.add_argument("--tokens", type=int, default=500_000, help="of a training, at most")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"blocks of {BLOCK} tokens a step")
    parser.add_argument("--heldout-bytes", type=int, default=100_000)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--loss-batch", type=int, default=2, help="blocks of the row loss, whose rivals hold several whole distributions of each token")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds of the row loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bridge.json"))
    options = parser.parse_args()
    bench = Bench(options)
    run: dict[str, Callable[[Bench], dict[str, Any]]] = {"gemma": gemma, "move": move, "gpt2": gpt2, "align": align, "loss": loss}
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for row in options.only or ROWS:
        found = report(row, run[row](bench))
        trained = row not in ("align", "loss")
        plain = {"steps": bench.steps, "tokens": bench.steps * options.batch * BLOCK} if trained else {}
        results[row] = {**plain, **found, **whence()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
