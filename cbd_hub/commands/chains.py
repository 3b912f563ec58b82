"""The commands that make a chain, and show it: distill, assemble, show."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from cbd_hub.commands.options import (
    ChainArgument,
    JsonOption,
    OutOption,
    RevisionOption,
)
from cbd_hub.commands.printing import (
    hush_bars,
    out,
    printed,
    reported,
    resumable,
    show_costs,
    tell_chain,
)


commands = typer.Typer()


@commands.command()
def distill(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder for the chain.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe and print what each stage would take here; train nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Distil a whole chain from a recipe: every stage, resumable.

    Stop it with Ctrl-C and run the same command again: it goes on where it was. A finished chain grows: write further, smaller anchors at the end of the recipe's
    list and run the command again.
    """
    from cbd_hub.distill.recipe import distill_chain
    from cbd_hub.distill.schema import Recipe
    hush_bars()
    read = Recipe.read(recipe)
    if dry_run:
        from cbd_hub.chain import Chain
        from cbd_hub.distill.dry_run import dry_run as estimate
        from cbd_hub.distill.stages import read_parts
        parts = read_parts(read)
        chain = Chain.from_pretrained(out_dir) if out_dir is not None and (out_dir.expanduser() / "chain.json").is_file() else None
        costs = estimate(read, printed(as_json), parts=parts, chain=chain)
        show_costs(costs, parts, as_json)
        return
    if out_dir is None:
        raise typer.BadParameter("give --out, the chain's folder", param_hint="--out")
    with resumable():
        chain = distill_chain(read, out_dir, progress=printed(as_json))
    _made(chain, out_dir, as_json)


@commands.command()
def assemble(
    checkpoints: Annotated[list[str], typer.Argument(metavar="CKPT CKPT ...", help="Model folders or Hub ids.", show_default=False)],
    out_dir: OutOption,
    text: Annotated[str | None, typer.Option("--text", help="Text on which order, alpha and curve are measured; where anchors are aligned, one half of it is for their coordinates.", show_default=False)] = None,
    align: Annotated[
        bool | None, typer.Option("--align/--no-align", help="Bring each anchor into the larger one's coordinates, where it was not cut from it; by default where it helps.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a chain from ready checkpoints, without training."""
    from cbd_hub.chain import assemble_chain
    hush_bars()
    with reported() as report:
        chain = assemble_chain(checkpoints, out_dir, align="auto" if align is None else align, calibration=text, report=report)
    _made(chain, out_dir, as_json)


@commands.command()
def show(chain: ChainArgument, revision: RevisionOption = None, as_json: JsonOption = False) -> None:
    """Show a chain: its anchors, its links, and how good the sizes in between are."""
    from cbd_hub.chain import Chain
    opened = Chain.from_pretrained(chain, revision=revision)
    tell_chain(opened, as_json)


def _made(chain: Any, out_dir: Path, as_json: bool) -> None:
    """Show a chain that was made, and what to do with it."""
    tell_chain(chain, as_json)
    if not as_json:
        from cbd_hub.cards import example_size
        out.print(f"\nnext: cbd make {escape(shlex.quote(str(out_dir)))} --size {example_size(chain.manifest)} --out ./model")
