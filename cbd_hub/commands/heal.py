"""The command that heals a size of a chain: heal."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from cbd_hub.commands.options import (
    AlphaOption,
    BudgetOption,
    ChainArgument,
    ColumnOption,
    DtypeOption,
    JsonOption,
    OutOption,
    RevisionOption,
    ShapeOption,
    SizeOption,
    StrategyOption,
    ToleranceOption,
    refuse_given,
    shape_of_text,
)
from cbd_hub.commands.printing import hush_bars, out, print_json, printed, resumable
from cbd_hub.errors import ArgumentError
from cbd_hub.sizes import with_error


commands = typer.Typer()


@commands.command()
def heal(
    context: typer.Context,
    chain: ChainArgument, out_dir: OutOption, size: SizeOption = None, shape: ShapeOption = None, strategy: StrategyOption = "auto", alpha: AlphaOption = None,
    tolerance: ToleranceOption = 0.02, budget: BudgetOption = None, dtype: DtypeOption = None,
    text: Annotated[str | None, typer.Option("--text", help="Text to learn from, a part of it held out: a file or a pattern; .jsonl rows may be prompts with completions or chats.", show_default=False)] = None,
    heldout_text: Annotated[str | None, typer.Option("--heldout-text", help="Text to measure on instead of a part of --text.", show_default=False)] = None,
    cache: Annotated[str | None, typer.Option("--cache", metavar="CACHE", help="A teacher cache of an anchor above the size, to learn from without running it; with --heldout-text.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimiser steps at most; 100 by default.", show_default=False)] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="Tokens to learn from at most, instead.", show_default=False)] = None,
    lora: Annotated[int | None, typer.Option("--lora", metavar="RANK", min=1, help="Train a LoRA of this rank on all linear layers, and merge it.", show_default=False)] = None,
    merge: Annotated[bool, typer.Option("--merge/--no-merge", help="With --lora: the weights with the adapter in them, or the adapter alone, a PEFT folder.")] = True,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="Peak learning rate; 1e-4 by default, 1e-3 with --lora.", show_default=False)] = None,
    kd_weight: Annotated[float | None, typer.Option("--kd-weight", help="Weight of the divergence from the larger neighbour, or from the cache's teacher, beside a cross-entropy of weight 1; 0.1 by default.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Blocks a step and process.")] = 8,
    block_size: Annotated[int | None, typer.Option("--block-size", min=2, help="Tokens in a block; 128, or the cache's.", show_default=False)] = None,
    heldout: Annotated[float, typer.Option("--heldout", help="Share of the text that is held out.")] = 0.05,
    patience: Annotated[int, typer.Option("--patience", min=0, help="Stop after so many evaluations without a new least held-out loss; 0 never stops early.")] = 2,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of what is held out, and of the order of the text.")] = 0,
    column: ColumnOption = "text", revision: RevisionOption = None, as_json: JsonOption = False,
) -> None:
    """Make a size and let it learn from its larger neighbour for a short while; the weights with the least held-out loss are kept.

    Stopped, the same command goes on where it was. On several processes: torchrun --nproc-per-node N -m cbd_hub.cli heal ...
    """
    from cbd_hub.chain import Chain
    from cbd_hub.distill.data import read_rows
    from cbd_hub.distill.heal import heal as run
    from cbd_hub.files import check_absent
    hush_bars()
    if text is None and cache is None:
        raise ArgumentError("neither --text nor --cache was given; name text to learn from, or a teacher cache")
    if not merge and lora is None:
        raise ArgumentError("--no-merge writes the adapter of --lora alone, and no --lora was given; give its rank, such as --lora 16")
    if heldout_text is not None:
        refuse_given(context, ("heldout",), "is the share of --text that is held out, and --heldout-text was given; leave one of them out")
    if text is None and heldout_text is None:
        raise ArgumentError("--cache holds what is trained on, and nothing to measure on came; give --heldout-text too")
    if steps is not None and tokens is not None:
        raise ArgumentError(f"--tokens {tokens} came with --steps {steps}; give one of them")
    check_absent(out_dir)
    rows, held = (None if name is None else read_rows(name, column) for name in (text, heldout_text))
    options: dict[str, Any] = {"max_steps": steps, "learning_rate": learning_rate, "kd_weight": kd_weight, "block_size": block_size}
    opened = Chain.from_pretrained(chain, revision=revision)
    model = opened.model(size, memory_budget=budget, shape=shape_of_text(shape), strategy=strategy, alpha=alpha, tolerance=tolerance, dtype=dtype)
    with resumable():
        healed = run(
            model, opened, rows, output_dir=out_dir, tokens=tokens, eval_dataset=held, heldout=heldout, patience=patience or None, peft_config=None if lora is None else _lora(lora),
            merge=merge, teacher_cache=cache, progress=printed(as_json), per_device_train_batch_size=batch_size, seed=seed,
            disable_tqdm=as_json, **{name: value for name, value in options.items() if value is not None},
        )
    if not _first():
        return
    made = healed.config.cbd
    found = made["healed"]
    if as_json:
        print_json({**made, "output_dir": str(out_dir)})
        return
    what = f"an adapter for {made['parameters']:,} parameters" if not merge else f"{made['parameters']:,} parameters"
    out.print(f"{what} in {escape(str(out_dir))}, healed from {escape(found['teacher'])} on {found['tokens']:,} tokens ({found['by']})")
    out.print(
        f"loss {with_error(found['loss_before'], found['stderr_before'])} before and {with_error(found['loss'], found['stderr'])} after, nats per token "
        f"({with_error(found['difference'], found['difference_stderr'], '+.3f')}, paired; {found['heldout_tokens']:,} held-out tokens)"
    )
    if not merge:
        from cbd_hub.cards import chain_call
        from cbd_hub.shapes import shape_of
        out.print(f'next: PeftModel.from_pretrained({escape(chain_call(chain, made, shape_of(healed.config)))}, "{escape(str(out_dir))}")')
    else:
        out.print(f'next: AutoModelForCausalLM.from_pretrained("{escape(str(out_dir))}")')


def _lora(rank: int) -> Any:
    """A LoRA on all linear layers but the head.

    Raises:
        ArgumentError: If peft is not there.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ArgumentError("--lora needs peft; run `pip install peft`") from error
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _first() -> bool:
    """Whether this process is the one that prints."""
    from accelerate import PartialState
    return bool(PartialState().is_main_process)
