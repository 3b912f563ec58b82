"""Sizes of a chain beside each other: what they lose on held-out text, and how many questions they answer right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cbd_hub.chain import Chain
from cbd_hub.distill.data import as_document, is_conversation, read_rows
from cbd_hub.distill.packing import tokenised
from cbd_hub.distill.same_bytes import SameBytes
from cbd_hub.errors import ArgumentError, DataError
from cbd_hub.evaluation import BITS, Documents, bits_per_byte, document_losses
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.precision import best_device
from cbd_hub.questions import Question, choice_accuracy
from cbd_hub.reporting import Report
from cbd_hub.sizes import format_size


@dataclass(frozen=True)
class Evaluated:
    """What was measured, as plain data.

    Attributes:
        results: One row per size, on the text: ``size``, ``parameters``, ``strategy``, ``loss`` (nats per token) with its ``stderr`` over documents,
            ``perplexity`` and ``bits_per_byte``, in a chain of several vocabularies with its error, ``bits_per_byte_stderr``.
        tasks: One row per size and file of questions: ``size``, ``parameters``, ``task``, ``questions``, ``accuracy`` and ``accuracy_norm`` with their errors.
        counts: How much text that was: ``documents`` and ``tokens``, or ``bytes``; empty without text.
        one_vocabulary: Whether all these sizes have one; else bits per byte alone, of the same bytes, compare them.
    """

    results: list[dict[str, Any]]
    tasks: list[dict[str, Any]]
    counts: dict[str, int]
    one_vocabulary: bool


def evaluate_sizes(
    chain: Chain, sizes: Sequence[str | int] | None = None, *, text: str | None = None, tasks: Sequence[str] = (), column: str = "text",
    block_size: int = 128, max_tokens: int = 8000, report: Report | None = None, **wish: Any,
) -> Evaluated:
    """Held-out loss of sizes of a chain, and their accuracy on multiple-choice questions.

    Args:
        chain: The chain.
        sizes: The sizes; None for the anchors.
        text: Held-out text: a file or a pattern. Of prompts with completions and of chats the answers count.
        tasks: Files of questions, as `Question.read` takes them.
        column: Column of the text, in files that have columns.
        block_size: Longest document in tokens.
        max_tokens: Tokens of text to use.
        report: Called with what is done, how much of it, and of how much.
        **wish: ``strategy``, ``alpha`` and ``tolerance``, as `CBDModel.from_chain` takes them.

    Raises:
        ArgumentError: If neither text nor tasks are given.
        DataError: If the text cannot be read or is too short.
        SizeError: If a size lies outside the chain.

    Example:
        >>> evaluated = evaluate_sizes(Chain.from_pretrained("./chain"), ["117M", "max"], text="heldout.txt")  # doctest: +SKIP
        >>> [(row["size"], row["loss"], row["stderr"]) for row in evaluated.results]  # doctest: +SKIP
    """
    if text is None and not tasks:
        raise ArgumentError("neither text nor tasks were given; name a text file, or a .jsonl file of questions")
    wishes = [anchor.parameters for anchor in chain.anchors] if sizes is None else list(sizes)
    plans = [chain.plan(size, **wish) for size in wishes]
    questions = {name: Question.read(name) for name in tasks}
    rows = None if text is None else read_rows(text, column)
    vocabularies = [chain.neighbours(plan.parameters)[0].tokenizer_sha256 for plan in plans]  # several across a bridge
    sides = {vocabulary: chain.tokenizer(plan.parameters) for vocabulary, plan in dict(zip(vocabularies, plans)).items()}
    texts = {} if rows is None else {vocabulary: _documents(rows, tokenizer, block_size, max_tokens, str(text)) for vocabulary, tokenizer in sides.items()}
    same = None if rows is None else _same_bytes(chain, rows, sides, block_size, max_tokens)
    results: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    counts = {"documents": len(documents.ids), "tokens": documents.tokens} if (documents := next(iter(texts.values()), None)) is not None else {}
    for place, (size, plan, vocabulary) in enumerate(zip(wishes, plans, vocabularies)):
        facts = {"size": format_size(plan.parameters), "parameters": plan.parameters}
        if report is not None:
            report(f"measuring {facts['size']}", place, len(plans))
        runner = ModelRunner(chain.model(size, **wish).to(best_device()))
        answers += [{**facts, "task": name, **choice_accuracy(runner, asked, sides[vocabulary])} for name, asked in questions.items()]
        if rows is None:
            continue
        losses = document_losses(runner, texts[vocabulary])
        bits: dict[str, float | None] = {"bits_per_byte": bits_per_byte(losses, texts[vocabulary])}
        if same is not None:
            of_bytes = same.losses(runner, sides[vocabulary])
            bits = {"bits_per_byte": of_bytes.mean * BITS, "bits_per_byte_stderr": None if of_bytes.stderr is None else of_bytes.stderr * BITS}
            counts = {"documents": len(of_bytes.tokens), "bytes": int(of_bytes.tokens.sum())} if len(sides) > 1 else counts
        results.append({**facts, "strategy": plan.strategy, "loss": losses.mean, "stderr": losses.stderr, "perplexity": losses.perplexity, **bits})
    return Evaluated(results, answers, counts, len(sides) == 1)


def _documents(rows: Sequence[Mapping[str, Any]], tokenizer: Any, block_size: int, max_tokens: int, source: str) -> Documents:
    if is_conversation(rows[0]):
        found = Documents.answered(((row.ids, row.labels) for row in tokenised(rows, tokenizer)), tokenizer, block_size, max_tokens)
    else:
        found = Documents.read([row["text"] for row in rows], tokenizer, block_size, max_tokens)
    if found.tokens < 2:
        raise DataError(f"{source} has {found.tokens} token to predict; give a longer text")
    return found


def _same_bytes(chain: Chain, rows: Sequence[Mapping[str, Any]], sides: Mapping[Any, Any], block_size: int, max_tokens: int) -> SameBytes | None:
    """The text as all vocabularies of a chain read it, whatever sizes are asked for; None where it has one, or where nothing is left and one is asked for."""
    others = {anchor.tokenizer_sha256: anchor.parameters for anchor in chain.anchors if anchor.tokenizer_sha256 not in sides}
    if len(sides) + len(others) == 1:
        return None
    try:
        return SameBytes([as_document(row) for row in rows], [*sides.values(), *map(chain.tokenizer, others.values())], block_size, max_tokens)
    except DataError:
        if len(sides) > 1:
            raise
        return None
