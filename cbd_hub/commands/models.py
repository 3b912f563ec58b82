"""The commands on single models: cut, retokenize, cache-teacher."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.markup import escape
from rich.table import Table

from cbd_hub.commands.options import ColumnOption, JsonOption, ModelRevisionOption, OutOption, refuse_given, shape_of_text
from cbd_hub.commands.printing import cell, hush_bars, out, print_json, printed, resumable
from cbd_hub.errors import ArgumentError
from cbd_hub.sizes import with_error


commands = typer.Typer()


@commands.command()
def cut(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model: local folder or Hub id.", show_default=False)],
    out_dir: OutOption,
    size: Annotated[str | None, typer.Option("--size", help='Parameters wanted, fewer than the model has: "120M".', show_default=False)] = None,
    shape: Annotated[str | None, typer.Option("--shape", help='The shape instead, such as "layers=24,ffn=1192"; with --size the FFN fills the rest.', show_default=False)] = None,
    text: Annotated[str | None, typer.Option("--text", help="Text to choose and measure on; by default the model writes its own.", show_default=False)] = None,
    reconstruct: Annotated[str, typer.Option("--reconstruct", help="Fit what its attention and FFN write on the text, by least squares, to make up for what was cut: stream for all of it, layer for neurons and heads alone (an anchor of a chain to be); none: not at all.")] = "stream",
    column: ColumnOption = "text",
    revision: ModelRevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cut any model to a smaller size by measured importance, without training.

    The loss that it prints is measured on a part of the text on which nothing was chosen. A chain distilled from the same model was better at every size that we measured (SmolLM2-135M, 73M to 126M).
    """
    from cbd_hub.files import check_absent
    from cbd_hub.single import cut_single
    hush_bars()
    if text is None:
        refuse_given(context, ("column",), "is of --text, and none was given; leave it out")
    check_absent(out_dir)
    made = cut_single(
        model, size, shape=shape_of_text(shape), calibration=text, target=None if reconstruct == "none" else cast(Any, reconstruct), column=column, revision=revision,
        progress=printed(as_json),
    )
    made.save_pretrained(out_dir)
    facts = made.summary()
    if as_json:
        print_json({**facts, "output_dir": str(out_dir)})
        return
    out.print(f"{made.plan.parameters:,} parameters ({made.plan.shape.text}) in {escape(str(out_dir))}")
    out.print(
        f"expected loss {with_error(facts['loss'], facts['stderr'])} nats per token on {facts['tokens']:,} held-out tokens of {escape(made.text)}; "
        f"the whole model has {facts['whole_loss']:.3f} (to it {with_error(facts['difference'], facts['difference_stderr'], '+.3f')}, paired)"
        + (f"; before reconstruction {facts['sliced_loss']:.3f}" if reconstruct != "none" else "")
    )
    out.print(f'next: AutoModelForCausalLM.from_pretrained("{escape(str(out_dir))}")')


@commands.command()
def retokenize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model or an anchor: local folder or Hub id.", show_default=False)],
    out_dir: OutOption,
    keep: Annotated[str | None, typer.Option("--keep", help='Trim the vocabulary to so many tokens: "16K".', show_default=False)] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Move to another tokenizer: local folder or Hub id.", show_default=False)] = None,
    text: Annotated[str | None, typer.Option("--text", help="Text on which bits per byte are measured, and with --steps what is trained on.", show_default=False)] = None,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Distil so many steps from the model itself; a part of the text is held out for measuring.")] = 0,
    bridge: Annotated[str, typer.Option("--bridge", help="What it learns by: span, vocab or span+vocab.")] = "span",
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Peak learning rate of that.")] = 1e-4,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Blocks a step.")] = 8,
    block_size: Annotated[int, typer.Option("--block-size", min=8, help="Tokens in a block.")] = 128,
    column: ColumnOption = "text",
    revision: ModelRevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move a model to a smaller vocabulary or to another tokenizer, and with --steps let it learn from what it was.

    Trimmed, it keeps an exact prefix of its merges, so that every text still encodes. For another tokenizer new rows are composed of the old ones by their bytes.
    A training that was stopped goes on with the same command.
    """
    from dataclasses import asdict

    from cbd_hub.distill.moved import retokenize_and_train
    from cbd_hub.retokenize import retokenize as move
    from cbd_hub.texts import read_texts
    hush_bars()
    if steps and text is None:
        raise ArgumentError("--steps trains on text, and none came; give --text too")
    if not steps:
        refuse_given(context, ("bridge", "learning_rate", "batch_size", "block_size"), "is of a training, which --steps asks for; give --steps such as 100, or leave it out")
    if text is None:
        refuse_given(context, ("column",), "is of --text, and none was given; leave it out")
    texts = None if text is None else read_texts(text, column)
    if steps and texts is not None:
        with resumable():
            made = retokenize_and_train(
                model, out_dir, texts, steps=steps, keep=keep, tokenizer=tokenizer, revision=revision, bridge=bridge, learning_rate=learning_rate, batch_size=batch_size,
                block_size=block_size, quiet=as_json, progress=printed(as_json),
            )
    else:
        made = move(model, out_dir, keep=keep, tokenizer=tokenizer, text=texts, revision=revision)
    if as_json:
        print_json({**asdict(made), "output_dir": str(out_dir)})
        return
    out.print(f"{made.parameters:,} parameters in {escape(str(out_dir))}: {made.vocab:,} tokens, {made.copied:,} rows copied and {made.composed:,} composed")
    if made.before is not None and made.difference is not None:
        which = f"{made.bytes:,} {'held-out ' if made.trained is not None else ''}bytes of {escape(str(text))}, paired over documents"
        out.print(f"bits per byte {made.before:.3f} before and {made.after:.3f} after ({with_error(*made.difference)}; {which})")
    if made.trained is not None and made.trained_difference is not None:
        out.print(f"after {made.steps:,} steps ({made.tokens:,} tokens) {made.trained:.3f} ({with_error(*made.trained_difference)} to before)")
    out.print(f'next: AutoModelForCausalLM.from_pretrained("{escape(str(out_dir))}")')


@commands.command("cache-teacher")
def cache_teacher(
    context: typer.Context,
    teacher: Annotated[str, typer.Argument(metavar="MODEL", help="The teacher: local folder or Hub id.", show_default=False)],
    out_dir: OutOption,
    text: Annotated[str | None, typer.Option("--text", help="A file or a pattern: text, or .jsonl rows of prompt and completion or of messages.", show_default=False)] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="The training text of a recipe instead, for its teacher_cache.", show_default=False)] = None,
    anchor: Annotated[str | None, typer.Option("--anchor", help="The anchor of the recipe whose stage is meant; the first by default.", show_default=False)] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Tokens listed at a position.")] = 128,
    tail_draws: Annotated[int | None, typer.Option("--tail-draws", min=0, help="Tokens drawn from the others at a position, beside their sum; a twelfth of --top-k by default.", show_default=False)] = None,
    bits: Annotated[int, typer.Option("--bits", min=4, max=16, help="Precision of a log-probability: 8 costs about 0.00008 nats a token, each bit less four times as much.")] = 8,
    block_size: Annotated[int | None, typer.Option("--block-size", min=2, help="Tokens in a block; the recipe's, or 128.", show_default=False)] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="Stop when so many tokens are reached; the whole text by default.", show_default=False)] = None,
    student: Annotated[str | None, typer.Option("--student", help="A model to measure the cache's error in forward KL with.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Blocks a forward pass.")] = 8,
    column: ColumnOption = "text",
    bos: Annotated[bool, typer.Option("--bos/--no-bos", help="Begin each block of joined text with what the tokenizer puts before a text, as training does.")] = True,
    dtype: Annotated[str | None, typer.Option("--dtype", help="What the models compute in: float32, bfloat16 or float16; that of their weights by default.", show_default=False)] = None,
    push: Annotated[str | None, typer.Option("--push", metavar="ORG/NAME", help="Push the cache to a data set on the Hub.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a teacher's top tokens once, to distil from without running it.

    Stop it and run the same command again: it goes on where it was. Two figures say what the cache costs. "KL of rounding": how far the kept
    log-probabilities are from the teacher's, in nats per token. "tail mass": the probability of the tokens that are not listed, of which the sum and some
    draws are kept, so that the forward KL to a student is right in expectation; --student measures it from the cache and from the teacher itself.
    """
    from cbd_hub.distill.cache_command import cache_text
    hush_bars()
    if recipe is not None:
        refuse_given(context, ("column",), "is of --text, and a --recipe says its own; leave it out")
    with resumable("its last whole shard"):
        cache, facts = cache_text(
            teacher, out_dir, text=text, recipe=recipe, column=column, block_size=block_size, max_tokens=tokens, top_k=top_k, bits=bits,
            student=student, batch_size=batch_size, dtype=dtype, push=push, quiet=as_json, anchor=anchor, bos=bos, tail_draws=tail_draws,
        )
    if as_json:
        print_json({**cache.record.model_dump(), **facts, "output_dir": str(out_dir)})
        return
    table = Table("what", "value", title=f"Teacher cache {escape(str(out_dir))}", title_justify="left")
    for name, value in {**cache.record.table(), **facts}.items():
        table.add_row(name, escape(cell(value)))
    out.print(table)
    place = escape(shlex.quote(push or str(out_dir)))
    out.print(f"next: teacher_cache: {place} in a stage of a recipe, or ChainDistiller(..., teacher_cache=...)")
