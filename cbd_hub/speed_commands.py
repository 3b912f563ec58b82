"""The commands on speed: speed, draft."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cbd_hub.errors import ArgumentError
from cbd_hub.options import ChainArgument, DtypeOption, JsonOption, RevisionOption
from cbd_hub.printing import hush_bars, out, print_json, reported, table_of
from cbd_hub.sizes import format_seconds, format_size


commands = typer.Typer()

SizesOption = Annotated[
    str | None, typer.Option("--sizes", help='Sizes, such as "110M,120M"; the anchors and what is recommended in between by default.', show_default=False)
]
DeviceOption = Annotated[str | None, typer.Option("--device", help='The device, such as "cpu" or "cuda:0"; the best one by default.', show_default=False)]


def sizes_of_text(text: str | None) -> list[str] | None:
    """Sizes from "110M,120M"."""
    if text is None:
        return None
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise ArgumentError(f'sizes "{text}" name none; write them as "110M,120M"')
    return found


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
