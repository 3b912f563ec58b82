"""The commands on sizes of a chain: plan, make, generate, eval."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cbd_hub.commands.options import (
    AdapterOption,
    AdapterSizeOption,
    AlphaOption,
    BudgetOption,
    ChainArgument,
    ColumnOption,
    DtypeOption,
    JsonOption,
    LatencyOption,
    OutOption,
    RateOption,
    RevisionOption,
    ShapeOption,
    SizeOption,
    StrategyOption,
    ToleranceOption,
    names_of_text,
    refuse_given,
    shape_of_text,
    sizes_of_text,
)
from cbd_hub.commands.printing import (
    adapter_text,
    err,
    hush_bars,
    out,
    print_json,
    reported,
    table_of,
)
from cbd_hub.errors import ArgumentError
from cbd_hub.sizes import format_bytes, format_size, with_error


if TYPE_CHECKING:
    from cbd_hub.interpolation.plan import Plan


commands = typer.Typer()


@commands.command()
def plan(
    chain: ChainArgument, size: SizeOption = None, shape: ShapeOption = None, strategy: StrategyOption = "auto", alpha: AlphaOption = None,
    tolerance: ToleranceOption = 0.02, budget: BudgetOption = None, rate: RateOption = None, latency: LatencyOption = None, adapter: AdapterOption = None,
    adapter_size: AdapterSizeOption = None, dtype: DtypeOption = None, revision: RevisionOption = None, as_json: JsonOption = False,
) -> None:
    """Say what a size would be made of, and what would be fetched, without touching a weight."""
    from cbd_hub.adapters import carried_to, check_home
    from cbd_hub.hub import open_chain
    from cbd_hub.plans import plan_costs, plan_in, warn_of_trough
    check_home(adapter, adapter_size)
    files = open_chain(chain, revision=revision).glanced
    planned = plan_in(
        files, size, memory_budget=budget, min_tokens_per_second=rate, max_latency=latency, dtype=dtype, shape=shape_of_text(shape), strategy=strategy, alpha=alpha,
        tolerance=tolerance,
    )
    if adapter is not None:
        planned = carried_to(files, planned, adapter, adapter_size, weights=False).plan
    costs = plan_costs(files, planned, dtype)
    if as_json:
        print_json({**planned.summary(), **costs})
        return
    table = Table("what", "value", title=f"{planned.chain} at {format_size(planned.parameters)}", title_justify="left")
    whole = planned.shape
    rows = {
        "asked": f"{planned.asked:,} parameters",
        "made": f"{planned.parameters:,} parameters ({planned.parameters / planned.asked - 1:+.2%})",
        "shape": whole.text,
        "neighbours": planned.small if planned.small == planned.large else f"{planned.small} and {planned.large}",
        "strategy": planned.strategy,
    }
    if planned.mix is not None:
        rows["weights"] = planned.mix.text
    if planned.note is not None:
        rows["note"] = planned.note
    rows["expected loss"] = "not measured" if planned.expected is None else f"{planned.expected:.3f} nats per token"
    rows["read"] = ", ".join(f"{format_bytes(count)} of {name}" for name, count in costs["bytes_read"].items())
    if "bytes_to_fetch" in costs:
        rows["fetch"] = ", ".join(f"{format_bytes(count)} of {name}" for name, count in costs["bytes_to_fetch"].items())
    rows["in memory"] = ", ".join(f"{format_bytes(count)} in {dtype}" for dtype, count in costs["bytes_in_memory"].items())
    if planned.adapter is not None:
        rows["adapter"] = adapter_text(planned.adapter)
    if planned.speed is not None:
        rows["speed"] = f"{planned.speed.text} (predicted)"
    for name, value in rows.items():
        table.add_row(name, escape(value))
    out.print(table)
    warn_of_trough(files, planned)
    _say_idle(planned, strategy, alpha)


@commands.command()
def make(
    chain: ChainArgument, out_dir: OutOption, size: SizeOption = None, shape: ShapeOption = None, strategy: StrategyOption = "auto",
    alpha: AlphaOption = None, tolerance: ToleranceOption = 0.02, budget: BudgetOption = None, rate: RateOption = None, latency: LatencyOption = None,
    dtype: DtypeOption = None, adapter: AdapterOption = None, adapter_size: AdapterSizeOption = None, revision: RevisionOption = None, as_json: JsonOption = False,
) -> None:
    """Write a model of a size to disk: an ordinary transformers checkpoint with its tokenizer."""
    from cbd_hub.model import CBDModel
    with reported() as report:
        made = CBDModel.materialize(
            chain, size, output_dir=out_dir, memory_budget=budget, min_tokens_per_second=rate, max_latency=latency, shape=shape_of_text(shape), strategy=strategy,
            alpha=alpha, tolerance=tolerance, dtype=dtype, adapter=adapter, adapter_size=adapter_size, revision=revision, report=report,
        )
    if as_json:
        print_json({**made.summary(), "output_dir": str(out_dir)})
        return
    out.print(f"{made.parameters:,} parameters ({made.shape.text}, {made.strategy}) in {escape(str(out_dir))}")
    _say_idle(made, strategy, alpha)
    if made.adapter is not None:
        out.print(f"with the adapter {escape(adapter_text(made.adapter))}, merged")
    if made.speed is not None:
        out.print(f"predicted here: {made.speed.text}")
    out.print(f'next: AutoModelForCausalLM.from_pretrained("{escape(str(out_dir))}")')


@commands.command()
def generate(
    context: typer.Context,
    chain: Annotated[str, typer.Argument(metavar="CHAIN", help="A chain: local folder or Hub id; or a model folder, such as that of cbd make.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)], size: SizeOption = None,
    shape: ShapeOption = None, strategy: StrategyOption = "auto", alpha: AlphaOption = None, tolerance: ToleranceOption = 0.02,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Nucleus of the sampling.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
    budget: BudgetOption = None, rate: RateOption = None, latency: LatencyOption = None, dtype: DtypeOption = None, revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt with a model of a size, or with one that was made."""
    import torch
    from transformers import TextStreamer

    from cbd_hub.chain import Chain
    from cbd_hub.hub import local_path
    from cbd_hub.manifest import FILE_NAME
    from cbd_hub.precision import best_device
    from cbd_hub.speed.measuring import GREEDY
    hush_bars()
    if not prompt:
        raise ArgumentError("the prompt is empty; give a few words to continue")
    if not temperature:
        refuse_given(context, ("top_p", "seed"), "is of sampling, and --temperature 0 takes the likeliest token each time; give a --temperature such as 0.8")
    folder = local_path(chain)
    if (folder / "config.json").is_file() and not (folder / FILE_NAME).is_file():
        refuse_given(context, _WISHES, f"is of a chain, and {chain} is a model; leave it out, or name the chain")
        model, tokenizer = _made(folder, dtype)
    else:
        opened = Chain.from_pretrained(chain, revision=revision)
        model = opened.model(
            size, memory_budget=budget, min_tokens_per_second=rate, max_latency=latency, shape=shape_of_text(shape), strategy=strategy, alpha=alpha, tolerance=tolerance,
            dtype=dtype,
        )
        tokenizer = opened.tokenizer(model.config.cbd["parameters"])
    model.to(best_device())
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    room = getattr(model.config, "max_position_embeddings", None)
    wanted = inputs["input_ids"].shape[1] + max_new_tokens
    if room is not None and wanted > room:
        raise ArgumentError(f"prompt and new tokens are {wanted:,} but the model has {room:,} positions; shorten the prompt or lower --max-new-tokens")
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else GREEDY
    torch.manual_seed(seed)
    ids = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=max_new_tokens,
        streamer=None if as_json else TextStreamer(tokenizer, skip_special_tokens=True), pad_token_id=tokenizer.pad_token_id, **sampling,
    )
    if as_json:
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        print_json({"prompt": prompt, "text": text, "new_tokens": ids.shape[1] - inputs["input_ids"].shape[1], **getattr(model.config, "cbd", {})})


def _say_idle(planned: Plan, strategy: str, alpha: float | None) -> None:
    """Say which options an anchor's own size leaves without effect."""
    idle = [name for name, given in (("--strategy", strategy != "auto"), ("--alpha", alpha is not None)) if given]
    if planned.strategy == "anchor" and idle:
        err.print(f"note: {format_size(planned.parameters)} is an anchor, and is itself whatever {' and '.join(idle)} {'say' if len(idle) > 1 else 'says'}")


_WISHES = ("size", "shape", "strategy", "alpha", "tolerance", "budget", "rate", "latency", "revision")  # what is asked of a chain


def _made(folder: Path, dtype: str | None) -> tuple[Any, Any]:
    """The model of a folder, in a dtype, and its tokenizer."""
    import torch

    from cbd_hub.adapter_files import CONFIG
    from cbd_hub.plans import weight_dtype
    from cbd_hub.weights import load_model, load_tokenizer
    if (folder / CONFIG).is_file() and not any(folder.glob("model*.safetensors")):
        raise ArgumentError(f"{folder} holds an adapter alone; make the size with it by cbd make CHAIN --size SIZE --adapter {shlex.quote(str(folder))} --out MODEL, and name MODEL")
    return load_model(folder, None if dtype in (None, "auto") else weight_dtype(dtype, torch.float32)), load_tokenizer(folder)


@commands.command("eval")
def evaluate(
    context: typer.Context,
    chain: ChainArgument,
    text: Annotated[str | None, typer.Option("--text", help="Held-out text: a file or a pattern; of prompts with completions and of chats the answers count.", show_default=False)] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Multiple-choice questions: .jsonl files, with commas between them, of query, choices, answer.", show_default=False)
    ] = None,
    sizes: Annotated[str | None, typer.Option("--sizes", help='Sizes, such as "110M,120M"; the anchors by default.', show_default=False)] = None,
    models: Annotated[
        str | None, typer.Option("--models", help="Other models to measure beside them, with commas between: folders, such as that of a healed size, or Hub ids.", show_default=False)
    ] = None,
    strategy: StrategyOption = "auto", alpha: AlphaOption = None, tolerance: ToleranceOption = 0.02,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of text to use.")] = 8000,
    block_size: Annotated[int, typer.Option("--block-size", min=2, help="Longest document in tokens.")] = 128,
    column: ColumnOption = "text",
    revision: RevisionOption = None, as_json: JsonOption = False,
) -> None:
    """Measure held-out loss, perplexity and bits per byte of sizes, or the accuracy of tasks, with standard errors."""
    if text is None and tasks is None:
        raise ArgumentError("neither --text nor --tasks was given; name a text file, or a .jsonl file of questions")
    if text is None:
        refuse_given(context, ("max_tokens", "block_size", "column"), "is of --text, and none was given; leave it out")
    from cbd_hub.chain import Chain
    from cbd_hub.comparing import evaluate_sizes
    hush_bars()
    opened = Chain.from_pretrained(chain, revision=revision)
    with reported() as report:
        found = evaluate_sizes(
            opened, sizes_of_text(sizes), models=names_of_text(models, "models", "./model,org/name"), text=text, tasks=names_of_text(tasks, "tasks", "a.jsonl,b.jsonl"), column=column,
            block_size=block_size, max_tokens=max_tokens, report=report, strategy=strategy, alpha=alpha, tolerance=tolerance,
        )
    if as_json:
        print_json({"chain": opened.name, "text": text, **found.counts, "results": found.results, "tasks": found.tasks})
        return
    if found.tasks:
        table_of(f"{opened.name}: share of right answers ± standard error; norm: by characters of the choice", [
            {
                "size": row["size"], **_named(row, found.tasks), "task": row["task"], "questions": row["questions"], "accuracy": with_error(row["accuracy"], row["accuracy_stderr"]),
                "norm": with_error(row["accuracy_norm"], row["accuracy_norm_stderr"]),
            }
            for row in found.tasks
        ])
    if not found.results:
        return
    what = (
        f"{found.counts['tokens']:,} tokens; loss in nats per token ± standard error" if found.one_vocabulary
        else f"{found.counts['bytes']:,} bytes, the same for each vocabulary; bits per byte ± standard error"
    )
    table_of(f"{opened.name} on {text}, {found.counts['documents']} documents: {what}", [
        {
            "size": row["size"], "parameters": row["parameters"], "by": row.get("strategy", row.get("model")),
            **({"loss": with_error(row["loss"], row["stderr"]), "perplexity": row["perplexity"]} if found.one_vocabulary else {}),
            "bits/byte": with_error(row["bits_per_byte"], row["bits_per_byte_stderr"]) if "bits_per_byte_stderr" in row else row["bits_per_byte"],
            **({"less the first, paired": with_error(row["difference"], row["difference_stderr"], "+.3f") if "difference" in row else ""} if len(found.results) > 1 else {}),
        }
        for row in found.results
    ])


def _named(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    """The column of other models' names, where there are any."""
    return {"model": row.get("model", "")} if any("model" in row for row in rows) else {}
