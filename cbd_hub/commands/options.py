"""Arguments and options that commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cbd_hub.errors import ArgumentError


ChainArgument = Annotated[str, typer.Argument(metavar="CHAIN", help="A chain: local folder or Hub id.", show_default=False)]
SizeOption = Annotated[str | None, typer.Option("--size", help='Parameters wanted: "138M", "1.1B", "min" or "max".', show_default=False)]
ShapeOption = Annotated[str | None, typer.Option("--shape", help='The exact shape instead, such as "layers=24,ffn=1192" or "hidden=540".', show_default=False)]
StrategyOption = Annotated[str, typer.Option("--strategy", help="How the gap is filled: blend, patch, or auto for what measured best.")]
AlphaOption = Annotated[float | None, typer.Option("--alpha", help="Weight of the smaller neighbour in a blend, 0 to 1, with gains of 1; by default alpha and gains are the fitted ones.", show_default=False)]
ToleranceOption = Annotated[float, typer.Option("--tolerance", help="Largest accepted distance from the size, as a share of it.")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a chain on the Hub.", show_default=False)]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; the anchors' by default.", show_default=False)]
BudgetOption = Annotated[
    str | None, typer.Option("--memory-budget", help='Bytes for the weights in the dtype instead, such as "300MB": the largest size that fits.', show_default=False)
]
AdapterOption = Annotated[str | None, typer.Option("--adapter", help="A LoRA of any size of the chain, carried to this one: PEFT folder or Hub id.", show_default=False)]
AdapterSizeOption = Annotated[str | None, typer.Option("--adapter-size", help="The size that the LoRA was trained at, where its files and shapes do not tell.", show_default=False)]
RateOption = Annotated[
    str | None,
    typer.Option("--min-tokens-per-second", metavar="N", help="The largest size that decodes so many tokens a second on this machine instead, timed once.", show_default=False),
]
LatencyOption = Annotated[
    str | None,
    typer.Option("--max-latency", metavar="TIME", help='The largest size that answers a prompt of 64 tokens with 64 in such a time instead: "1.5s", "200ms".', show_default=False),
]
PrivateOption = Annotated[bool | None, typer.Option("--private/--public", help="Whether repos made now are private; the account's default otherwise.", show_default=False)]
GatedOption = Annotated[str | None, typer.Option("--gated", metavar="auto|manual", help="Let readers ask for access.", show_default=False)]
PullRequestOption = Annotated[bool, typer.Option("--create-pr", help="Open pull requests instead, where you may not write.")]
MessageOption = Annotated[str | None, typer.Option("--message", help="Message of the commits.", show_default=False)]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check what is here, send nothing and ask the Hub nothing, and say what would be sent.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
OutOption = Annotated[Path, typer.Option("--out", help="The folder to make.", show_default=False)]
ColumnOption = Annotated[str, typer.Option("--column", help="Column of .jsonl, .csv and .parquet files.")]
ModelRevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a model on the Hub.", show_default=False)]


def refuse_given(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Refuse options that would change nothing.

    Args:
        context: The call.
        names: The options, by the names of their parameters.
        why: What to say behind the name of the first that was given.

    Raises:
        ArgumentError: If one was given.
    """
    for parameter in context.command.params:
        source = None if parameter.name is None else context.get_parameter_source(parameter.name)
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise ArgumentError(f"{parameter.opts[0]} {why}")


def shape_of_text(text: str | None) -> dict[str, int] | None:
    """A shape from "layers=24,ffn=1192"."""
    if text is None:
        return None
    try:
        pairs = [(name.strip(), int(value)) for name, value in (part.split("=") for part in text.split(","))]
    except ValueError as error:
        raise ArgumentError(f'shape "{text}" cannot be read; write it as "layers=24,ffn=1192"') from error
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ArgumentError(f'shape "{text}" gives {twice} twice; give each field once')
    return dict(pairs)


def sizes_of_text(text: str | None) -> list[str] | None:
    """Sizes from "110M,120M"."""
    if text is None:
        return None
    return names_of_text(text, "sizes", "110M,120M")


def names_of_text(text: str | None, what: str, example: str) -> list[str]:
    """Names with commas between them; none of None.

    Args:
        text: The names.
        what: What to call them.
        example: How they are written.

    Raises:
        ArgumentError: If a text names none.
    """
    if text is None:
        return []
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise ArgumentError(f'{what} "{text}" name none; write them as "{example}"')
    return found
