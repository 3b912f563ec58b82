"""Write the tables of README.md from benchmarks/results/*.json, so that no figure is typed by hand.

python benchmarks/render.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cbd_hub.sizes import format_size


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] + ["---:"] * (len(lines[0]) - 1))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pair(values: list[float] | None) -> str:
    """A difference with its standard error."""
    return "" if values is None else f"{values[0]:+.3f} ± {values[1]:.3f}"


def demo(data: dict[str, Any]) -> str:
    """The demo's table."""
    rows = [
        [
            f"**{format_size(row['parameters'])}**" if row["strategy"] == "anchor" else format_size(row["parameters"]),
            f"{row['shape']['layers']} x {row['shape']['ffn']}", row["strategy"], f"{row['loss']:.3f} ± {row['stderr']:.3f}", f"{row['perplexity']:.1f}",
            "" if row["cut_loss"] is None else f"{row['cut_loss']:.2f}", pair(row["to_small"]), pair(row["to_chord"]),
        ]
        for row in data["rows"]
    ]
    head = ["size", "layers x FFN", "by", "loss", "perplexity", "merely cut", "to small neighbour", "to chord"]
    return f"{table(head, rows)}\n\n{data['tokens']:,} tokens in {data['documents']} documents; nats per token ± standard error over documents."


def boomerang(data: dict[str, Any]) -> str:
    """Boomerang at equal tokens and parameters."""
    best = min(data["boomerang"].values())
    return (
        f"At {format_size(data['parameters'])}, the middle of the demo's larger segment, against boomerang distillation at equal tokens "
        f"({data['steps']} steps) and parameters: {data['chain']:.3f} nats per token against {best:.3f}, {pair([data['difference'], data['stderr']])} (paired). "
        f"`{data['command']}`"
    )


def memory(data: dict[str, Any]) -> str:
    """Peak memory against the limit."""
    rows = [
        [row["size"], row["dtype"], row["strategy"], *(f"{row[name] / 1e6:.0f}" for name in ("model", "peak", "limit"))] for row in data["rows"]
    ]
    return f"{table(['size', 'dtype', 'by', 'model MB', 'peak MB', 'limit MB'], rows)}\n\nPeak anonymous memory of `from_chain` over the import baseline. `{data['command']}`"


def main() -> None:
    """Fill the marked blocks."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    latest = ROOT / "demo" / "results.json"
    if latest.is_file():
        shutil.copyfile(latest, RESULTS / "demo.json")
        shutil.copyfile(ROOT / "demo" / "curve.png", RESULTS / "demo.png")
    for name, render in (("demo", demo), ("boomerang", boomerang), ("memory", memory)):
        path = RESULTS / f"{name}.json"
        if path.is_file():
            before, rest = readme.split(f"<!-- {name}:begin -->")
            after = rest.split(f"<!-- {name}:end -->")[1]
            readme = f"{before}<!-- {name}:begin -->\n{render(json.loads(path.read_text()))}\n<!-- {name}:end -->{after}"
    (ROOT / "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
