"""The commands on speed: speed, draft."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from cbd_hub.commands.options import (
    ChainArgument,
    ColumnOption,
    DtypeOption,
    JsonOption,
    RevisionOption,
    refuse_given,
    sizes_of_text,
)
from cbd_hub.commands.printing import hush_bars, out, print_json, reported, table_of
from cbd_hub.sizes import format_seconds, format_size


commands = typer.Typer()

SizesOption = Annotated[
    str | None, typer.Option("--sizes", help='Sizes, such as "110M,120M"; by default the anchors and between them what is recommended, else the middle.', show_default=False)
]
DeviceOption = Annotated[str | None, typer.Option("--device", help='The device, such as "cpu" or "cuda:0"; the best one by default.', show_default=False)]


@commands.command()
def speed(
    chain: ChainArgument, sizes: SizesOption = None,
    check: Annotated[bool, typer.Option("--check", help="Measure each size too, by a model of its shape with random weights.")] = False,
    recalibrate: Annotated[bool, typer.Option("--recalibrate", help="Time the anchors anew, and keep that.")] = False,
    dtype: DtypeOption = None, device: DeviceOption = None, revision: RevisionOption = None, as_json: JsonOption = False,
) -> None:
    """Say how fast each size answers on this machine; no weight is read.

    The anchors' shapes are timed once, with random weights; sizes in between are predicted. Tokens a second: by greedy decoding of one prompt of 64 tokens,
    after the first new token. Latency: from that prompt to 64 new tokens.
    """
    import torch

    from cbd_hub.chain import Chain
    from cbd_hub.plans import stopwatch
    from cbd_hub.speeds import CLOSE, speed_table
    hush_bars()
    opened = Chain.from_pretrained(chain, revision=revision)
    where = stopwatch(opened.files, dtype, device).text
    with reported() as report:
        rows = speed_table(opened, sizes_of_text(sizes), dtype=dtype, device_map=device, check=check, recalibrate=recalibrate, report=report)
    if as_json:
        print_json({"chain": opened.name, "device": where, "threads": torch.get_num_threads(), "results": [row.summary() for row in rows]})
        return
    shown: list[dict[str, Any]] = []
    for row in rows:
        found = {
            "size": format_size(row.plan.parameters), "shape": row.plan.shape.text, "by": row.plan.strategy, "tokens a second": f"{row.predicted.tokens_per_second:.3g}",
            "latency": format_seconds(row.predicted.latency),
        }
        if row.measured is not None:
            found |= {
                "measured": f"{row.measured.tokens_per_second:.3g}", "latency measured": format_seconds(row.measured.latency),
                "off": f"{row.predicted.off(row.measured):+.0%}",
            }
        shown.append(found)
    table_of(f"{opened.name} on {where}: predicted speed", shown)
    far = [row for row in rows if row.measured is not None and abs(row.predicted.off(row.measured)) > CLOSE]
    if far:
        out.print(f"{len(far)} of {len(rows)} further than {CLOSE:.0%} from what was measured; --recalibrate times anew, best while nothing else runs")


@commands.command()
def draft(
    context: typer.Context,
    chain: ChainArgument,
    target: Annotated[str, typer.Option("--target", help="The size that answers.")] = "max",
    sizes: Annotated[str | None, typer.Option("--sizes", help='Draft sizes, such as "64M,80M"; by default the anchors below the target and between them what is recommended, else the middle.', show_default=False)] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", metavar="FILE", help="Text whose first documents are gone on from; a few short prompts by default.", show_default=False)] = None,
    count: Annotated[int | None, typer.Option("--count", min=1, help="How many of those documents; 8 by default.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")] = 64,
    draft_tokens: Annotated[int | None, typer.Option("--draft-tokens", min=1, help="Most tokens of a draft; transformers' 20 by default.", show_default=False)] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds, of which the median counts.")] = 3,
    dtype: DtypeOption = None, device: DeviceOption = None, column: ColumnOption = "text", revision: RevisionOption = None, as_json: JsonOption = False,
) -> None:
    """Find the size of a chain that drafts best for a larger one: speculative decoding, with the same output.

    Acceptance: of the drafted tokens, the share that the target keeps. Tokens a second: new tokens by the time of whole answers, in turns without and with
    the draft.
    """
    if prompts is None:
        refuse_given(context, ("count", "column"), "is of the documents of --prompts, and no --prompts was given; name a text file, or leave it out")
    from cbd_hub.chain import Chain
    from cbd_hub.drafting import draft_table
    from cbd_hub.speed.stopwatch import named_device
    from cbd_hub.texts import read_texts
    hush_bars()
    opened = Chain.from_pretrained(chain, revision=revision)
    texts = None if prompts is None else read_texts(prompts, column)[: count or 8]
    with reported() as report:
        table = draft_table(
            opened, target, sizes_of_text(sizes), texts, max_new_tokens=max_new_tokens, num_assistant_tokens=draft_tokens, rounds=rounds, dtype=dtype,
            device=None if device is None else named_device(device), report=report,
        )
    if as_json:
        print_json({"chain": opened.name, "text": prompts, **table.summary()})
        return
    table_of(f"{opened.name}: drafts for {format_size(table.target)}, {table.new_tokens:,} new tokens after {table.prompts} prompts", [
        {
            "draft": format_size(row.parameters), "drafted": row.drafted, "accepted": f"{row.acceptance:.0%}", "passes of the target": row.passes,
            "tokens a second alone": f"{row.alone:.3g}", "with it": f"{row.together:.3g}", "speed-up": f"{row.speedup:.2f}x",
            "output": "the same" if not row.ties else f"the same but for {row.ties} ties",
        }
        for row in table.rows
    ])
    best = table.best
    if best is None:
        out.print(f"no draft is faster than {format_size(table.target)} alone on this machine")
        return
    out.print(f"best: {format_size(best.parameters)}, {best.speedup:.2f}x")
    out.print(f'next: model.generate(..., assistant_model=CBDModel.from_chain("{escape(chain)}", {best.parameters}))')
