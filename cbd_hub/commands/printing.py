"""What the command ``cbd`` prints: tables, and JSON for machines."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cbd_hub.reporting import Progress, Report
from cbd_hub.sizes import format_bytes, format_size, with_error


# Into a file or a pipe a table is printed whole, whatever the width.
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, soft_wrap=True, highlight=False)


def show_chain(chain: Any) -> None:
    """The tables of a chain."""
    from cbd_hub.interpolation.curve import Chord
    anchors = []
    for anchor in chain.anchors:
        row = {
            "anchor": anchor.name, "parameters": anchor.parameters, "shape": anchor.shape.text, "origin": anchor.origin,
            "tokens": anchor.training.tokens if anchor.training else 0,
        }
        if anchor.evaluations:
            last = anchor.evaluations[-1]
            if last.bits_per_byte is None:
                row["loss"] = with_error(last.loss, last.stderr)
            else:
                row["bits/byte"] = last.bits_per_byte
        anchors.append(row)
    table_of(f"Chain {chain.name}: {len(anchors)} anchors of the {' and '.join(dict.fromkeys(anchor.family for anchor in chain.anchors))} family", anchors)
    for link in chain.manifest.links:
        names = f"{link.kind} {link.small} to {link.large}"
        aligned = link.strategies.blend.align if link.strategies.blend is not None else None
        if aligned is not None:
            out.print(f"{link.small} in {link.large}'s coordinates, by a {aligned.residual} of the residual stream: a logit moves by up to {aligned.error:.1e}")
        if link.curve:
            chord = Chord.of(chain.manifest, link)
            rows = [
                {
                    "size": format_size(point.size), "parameters": point.size, "strategy": point.strategy, "loss": with_error(point.loss, point.stderr),
                    "to chord": "" if (line := chord.at(point.size)) is None else f"{point.loss - line:+.3f}",
                }
                for point in link.curve
            ]
            table_of(names, rows)
            if link.recommended_sizes:
                out.print(f"recommended: {', '.join(format_size(size) for size in link.recommended_sizes)}")
        elif link.kind == "segment":
            out.print(f"{names}: not measured")
        else:
            out.print(f"{names}: no sizes in between")
    measured = [anchor.evaluations[-1] for anchor in chain.anchors if anchor.evaluations]
    if measured and measured[-1].bits_per_byte is None:
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(f"loss: nats per token ± standard error on {measured[-1].tokens:,} tokens of {escape(measured[-1].dataset)}")


def tell_chain(chain: Any, as_json: bool) -> None:
    """A chain as tables, or as JSON."""
    if as_json:
        print_json(json.loads(chain.manifest.to_json()))
    else:
        show_chain(chain)


def show_costs(costs: list[Any], parts: Any, as_json: bool) -> None:
    """What a recipe's stages would take, and how its documents are split."""
    counts = {"train": len(parts.train) if isinstance(parts.train, list) else None, "calibration": len(parts.calibration), "heldout": len(parts.heldout)}
    if as_json:
        print_json({"stages": [{**dataclasses.asdict(cost), "seconds": cost.seconds, "shape": cost.shape.model_dump()} for cost in costs], "documents": counts})
        return
    if not costs:
        out.print("the chain is whole: nothing is left to train")
        return
    table_of("Stages, reckoned from steps timed on a few layers", [
        {
            "anchor": cost.anchor, "shape": cost.shape.text, "size": cost.size, "steps": cost.steps, "tokens": cost.tokens,
            "memory": format_bytes(cost.memory), "training": duration(cost.training), "measuring": duration(cost.measuring),
        }
        for cost in costs
    ])
    out.print("documents: " + ", ".join(f"{name} {'a stream' if count is None else f'{count:,}'}" for name, count in counts.items()))
    out.print(
        f"{duration(sum(cost.seconds for cost in costs))} in all. training: steps with clipping and optimiser, checkpoints; measuring: cut, loss, order, curve. "
        "Sampling, hidden states, steps on the path, reconstruction and aligning come on top"
    )


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def table_of(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of one kind as a table."""
    table = Table(title=escape(title), title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right" if isinstance(rows[0][name], (int, float)) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell(row.get(name, ""))) for name in rows[0]))
    out.print(table)


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_json(value: Any) -> None:
    """Print one JSON object on a line; a number that is not finite, as the perplexity of a broken model, is null."""
    sys.stdout.write(json.dumps(_finite(value), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printed(as_json: bool) -> Progress | None:
    """What prints the lines of a command's progress; none beside JSON."""
    return None if as_json else lambda line: err.print(escape(line))


@contextmanager
def reported() -> Iterator[Report]:
    """A bar on a terminal, and a line for each kind of work elsewhere; called with what is done, how much of it, and of how much where that is known.

    The bar begins with the first call: until then others may have theirs.
    """
    seen: set[str] = set()
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeElapsedColumn())
    bar = bars.Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
    task = bar.add_task("", total=None)

    def report(what: str, done: int, total: int | None) -> None:
        if not err.is_terminal and what not in seen:
            err.print(escape(what))
        seen.add(what)
        bar.start()
        bar.update(task, description=escape(what), completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()


@contextmanager
def resumable(place: str = "its last checkpoint") -> Iterator[None]:
    """Stopped by Ctrl-C, say that the same command goes on, and exit with 130."""
    try:
        yield
    except KeyboardInterrupt:
        err.print(f"\nstopped; run the same command again, it goes on from {place}")
        raise typer.Exit(130) from None


def hush_bars() -> None:
    """No bars for what takes less than a second; downloads and training keep theirs."""
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    if "datasets" in sys.modules:
        from datasets.utils.logging import disable_progress_bar as hush_datasets
        hush_datasets()
    else:
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when it is imported, which takes a second


def adapter_text(lineage: Mapping[str, Any]) -> str:
    """A carried adapter in words."""
    ranks, modules = lineage["ranks"], lineage["modules"]
    moved = "at its own size" if not lineage["steps"] else f"carried from {lineage['home']['size']}"
    lost = "" if modules["home"] == modules["target"] else f" (of {modules['home']} there)"
    return f"{lineage['adapter']}, {moved}: rank {ranks['target']}, {modules['target']} modules{lost}"
