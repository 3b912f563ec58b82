"""The command that carries an adapter to another size: carry."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from cbd_hub.commands.options import (
    AdapterSizeOption,
    AlphaOption,
    JsonOption,
    OutOption,
    RevisionOption,
    ShapeOption,
    SizeOption,
    StrategyOption,
    ToleranceOption,
    shape_of_text,
)
from cbd_hub.commands.printing import adapter_text, out, print_json


commands = typer.Typer()


@commands.command()
def carry(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A LoRA of any size of the chain: PEFT folder or Hub id.", show_default=False)],
    chain: Annotated[str, typer.Argument(metavar="CHAIN", help="The chain: local folder or Hub id.", show_default=False)],
    out_dir: OutOption, size: SizeOption = None, shape: ShapeOption = None, strategy: StrategyOption = "auto", alpha: AlphaOption = None, tolerance: ToleranceOption = 0.02,
    adapter_size: AdapterSizeOption = None,
    base: Annotated[str | None, typer.Option("--base", help="What to name as the base model, such as a folder of `cbd make`; the chain by default.", show_default=False)] = None,
    revision: RevisionOption = None, as_json: JsonOption = False,
) -> None:
    """Carry a LoRA to another size without training: a PEFT folder for the model that `cbd make` writes with the same options."""
    from cbd_hub.adapters import carry_adapter
    made = carry_adapter(
        adapter, chain, size, output_dir=out_dir, shape=shape_of_text(shape), strategy=strategy, alpha=alpha, tolerance=tolerance, adapter_size=adapter_size, base_model=base, revision=revision,
    )
    lineage = made.plan.adapter or {}
    if as_json:
        print_json({**lineage, "output_dir": str(out_dir)})
        return
    out.print(f"{escape(adapter_text(lineage))}, for {made.plan.parameters:,} parameters ({made.plan.shape.text}) in {escape(str(out_dir))}")
    from cbd_hub.cards import chain_call
    again = chain_call(chain, {**made.plan.summary(), "revision": revision}, made.plan.shape)
    out.print(f'next: PeftModel.from_pretrained({escape(again)}, "{escape(str(out_dir))}")')
