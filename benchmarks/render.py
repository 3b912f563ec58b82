"""Write benchmarks/README.md, and the marked blocks of other documents, from benchmarks/results/*.json, so that no figure is typed by hand.

python benchmarks/render.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import claims
import matplotlib.pyplot as plt
import sentences
import tables
from measuring import write

from cbd_hub.sizes import format_size


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SECTIONS = {
    "demo": "The demo's chain", "headline": "Against training from scratch, and many sizes at once", "quality": "Sizes in between, by kind of segment", "quality_trained": "Sizes in between, against models trained for them", "quality_today": "The same with today's cuts", "quality_scratch": "A size in between against a model of its shape from scratch", "quality_rivals": "The same with a tenth of the tokens", "cut": "Models cut without training", "boomerang": "Against boomerang distillation", "anchors": "Anchors against students of their own",
    "alpha": "The paper's sweep of alpha", "align": "Models trained apart, aligned", "step": "A distillation step", "step_fp32": "A distillation step in fp32", "head": "The loss head", "teacher_cache": "Teacher caches",
    "bridge": "Bridges across vocabularies", "loading": "Loading and writing a size", "memory": "Peak memory", "hub": "Loads from the Hub", "heal": "Healing",
    "adapter": "Adapters carried along the chain", "speed": "Predicted and measured speed", "draft": "Drafts for speculative decoding", "deploy": "A size in other formats",
    "tasks": "Multiple-choice tasks", "lm_eval": "The tasks through lm-eval", "paper": "The paper's pipeline at small scale",
}
INTRODUCTION = """# Benchmarks

`make bench` runs what takes minutes, `make bench-full` also what trains rivals for hours; both go on where they were stopped, and write this page from `benchmarks/results/*.json`:
its tables are not typed by hand; a remark in italics may name a figure of a run whose results were not kept. Under each table stand its command and, of most runs since 27 November 2026, machine, versions and day; of others what was kept. The teacher SmolLM2-135M-Instruct is the 4-bit GGUF of a package, dequantised
(Gemma-3-270M likewise), and `benchmarks/inputs.py` makes `other.jsonl`, `heldout.jsonl` and the models of `--models`. Runs take turns and figures are medians where it is time; losses have standard errors
over documents, not over trainings where no seeds are named, and differences are paired. Segments go from 135M to an anchor of about 99M, and are called by what that one lacks: "least loss": layers and FFN neurons, as the cut chooses; "depth": layers; "ffn" and "hidden": width; with "path" (hidden width: without "no path") a fifth of its steps went to models in between. Stages are short: 20,480 tokens are 20 optimiser steps, 81,920 are 80, 199,680 are 195. `make bench` runs some of them with other settings than
the command under the table (fewer items), `make bench-full` with more tokens, items and repeats (bridges: 500,000 tokens instead of 10,240 to 15,360); steps in fp32 on a CPU that has bf16, and lm-eval, are in neither. "The demo's chain" and "Models cut without training" alone are of today's; "Healing" and the two sections on tasks are of that of 29 November 2026, whose anchors began as plain cuts (99M 3.521 instead of 3.483, 64M 4.269 instead of 4.202; sizes of the upper segment alike), all others of the one before, when importance was another (99M 3.562, 117M 3.231 instead of 3.217). Nor were the cuts reconstructed that anchors and models distilled for one size began as in those tables, but for the least-loss segment of "The same with today's cuts"; they are now, by the same commands, which also heal as `cbd heal` does: rows healed by 1 x KL cannot be had again by them. Machines were shared with other work unless said: CPU times and ratios of one run are sounder than seconds. What was tried without success is
in [quality/README.md](quality/README.md).
"""


def result(name: str) -> dict[str, Any]:
    """A benchmark's result.

    Raises:
        FileNotFoundError: If it has not been measured yet.
    """
    return json.loads((RESULTS / f"{name}.json").read_text())


def read(name: str) -> dict[str, Any] | None:
    """A benchmark's result, where there is one."""
    with suppress(FileNotFoundError):
        return result(name)
    return None


def table(name: str) -> str:
    """A benchmark's table; empty where it has no result."""
    data = read(name)
    return "" if data is None else str(getattr(tables, name)(data))


def whence(data: dict[str, Any]) -> str:
    """Where a result comes from."""
    told = data if "versions" in data else next((found for found in data.values() if isinstance(found, dict) and "versions" in found), {})
    if not told:  # of a run before machine and day were kept
        told = {"versions": {name: data[name] for name in ("python", "torch", "transformers") if name in data}}
    parts = [data.get("about"), told.get("machine"), ", ".join(f"{name} {number}" for name, number in told["versions"].items()), told.get("day")]
    return f"*{'; '.join(part for part in parts if part) or 'machine and versions were not kept'}*"


def page() -> str:
    """benchmarks/README.md."""
    parts, missing = [INTRODUCTION], []
    for name, title in SECTIONS.items():
        data = read(name)
        if data is None:
            missing.append(title)
            continue
        picture = RESULTS / f"{name}.png"
        sentence = getattr(sentences, name, None)
        parts.append("\n".join([
            f"## {title}", "", *([f"![{title}](results/{name}.png)", ""] if picture.is_file() else []), *([sentence(data), ""] if sentence else []), getattr(tables, name)(data), "", whence(data), "",
        ]))
    if missing:
        parts.append(f"## Not measured yet\n\n{', '.join(missing)}.\n")
    return "\n".join(parts)


def anchor(title: str) -> str:
    """A heading's anchor as GitHub makes it."""
    return "".join(letter for letter in title.lower().replace(" ", "-") if letter.isalnum() or letter == "-")


def said(name: str) -> str:
    """A benchmark in one sentence, with where its table stands; empty where it has no result."""
    data = read(name)
    if data is None:
        return ""
    about = f" {data['about']}." if data.get("about") else ""
    return f"{getattr(sentences, name)(data)}{about} Table: `benchmarks/README.md`, {SECTIONS[name]}."


def answers(head: str, rows: Mapping[str, tuple[str, Callable[[sentences.Results], str]]]) -> str:
    """A few figures for README.md, each with a link to its table."""
    lines = []
    for what, (name, answer) in rows.items():
        with suppress(FileNotFoundError):  # not measured yet
            lines.append(f"| [{what}](benchmarks/README.md#{anchor(SECTIONS[name])}) | {answer(result)} |")
    return "\n".join([f"| {head} | measured |", "| --- | --- |", *lines])


def fill(document: Path, blocks: dict[str, str]) -> None:
    """Fill the marked blocks of a document; those without text stay as they are."""
    text = document.read_text(encoding="utf-8")
    for name, block in blocks.items():
        if block:
            before, rest = text.split(f"<!-- {name}:begin -->")
            after = rest.split(f"<!-- {name}:end -->")[1]
            text = f"{before}<!-- {name}:begin -->\n{block}\n<!-- {name}:end -->{after}"
    document.write_text(text, encoding="utf-8")


def documents() -> dict[str, dict[str, str]]:
    """Each document's marked blocks."""
    return {
        "README.md": {"demo": table("demo"), "quality": answers("beside a size in between, which took no step, in nats per token", sentences.QUALITY), "cost": answers("cost", sentences.COST)},
        "docs/explanation.md": {"cut": table("cut")},
        "docs/how-to/bridge.md": {"bridge": said("bridge")},
        "docs/how-to/publish.md": {"hub": said("hub")},
        "docs/how-to/heal.md": {"heal": said("heal")},
        "docs/how-to/adapters.md": {"adapter": said("adapter")},
        "docs/how-to/deploy.md": {"speed": said("speed"), "draft": said("draft"), "deploy": table("deploy")},
        "benchmarks/quality/README.md": {name: table(name) for name in ("quality", "quality_trained", "quality_today", "quality_scratch", "quality_rivals")},
        "examples/paper/README.md": {"claims": claims.table(result), **{name: table(name) for name in ("paper", "alpha", "tasks", "lm_eval")}},
    }


def draw() -> None:
    """Pictures of the results that are curves."""
    quality = read("quality")
    if quality is not None:
        figure, axes = plt.subplots(figsize=(8, 4))
        for segment in dict.fromkeys(row["segment"] for row in quality["rows"]):
            rows = sorted((row for row in quality["rows"] if row["segment"] == segment and row.get("to_chord")), key=lambda row: row["share"])
            axes.errorbar([row["share"] for row in rows], [row["to_chord"][0] for row in rows], [row["to_chord"][1] for row in rows], marker="o", capsize=3, label=segment)
        axes.axhline(0, color="0.5", linewidth=1)
        axes.set(xlabel="share of the way from the smaller anchor", ylabel="loss less the chord, nats per token", xticks=[0.25, 0.5, 0.75])
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, "quality")
    alpha = read("alpha")
    if alpha is not None:
        figure, axes = plt.subplots(figsize=(7, 4))
        for row in alpha["rows"]:
            axes.plot([float(name) for name in row["alphas"]], [one["to_fitted"][0] for one in row["alphas"].values()], marker=".", label=format_size(row["parameters"]))
        axes.axhline(0, color="0.5", linewidth=1)
        axes.set(xlabel="alpha, the weight of the smaller anchor", ylabel="loss less that of the fitted mix, nats per token")
        axes.legend(frameon=False, title="size")
        save(figure, "alpha")


def save(figure: Any, name: str) -> None:
    """A picture, the same bytes for the same figures."""
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Write the documents."""
    latest = ROOT / "demo" / "results.json"
    found = json.loads(latest.read_text()) if latest.is_file() else None
    if found is not None and found["rows"] != (read("demo") or {}).get("rows"):
        write(RESULTS / "demo.json", {**found, "command": "make demo"})
        shutil.copyfile(ROOT / "demo" / "curve.png", RESULTS / "demo.png")
    draw()
    (ROOT / "benchmarks" / "README.md").write_text(page(), encoding="utf-8")
    for name, blocks in documents().items():
        fill(ROOT / name, blocks)


if __name__ == "__main__":
    main()
