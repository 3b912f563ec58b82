"""Sizes of a chain beside each other and beside other models: what they lose on held-out text, and how many questions they answer right."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cbd_hub.chain import Chain
from cbd_hub.configs import read_config
from cbd_hub.distill.data import as_document, is_conversation, read_rows
from cbd_hub.distill.packing import tokenised
from cbd_hub.distill.same_bytes import SameBytes
from cbd_hub.errors import ArgumentError, DataError
from cbd_hub.evaluation import BITS, Documents, Losses, bits_per_byte, document_losses
from cbd_hub.hub import resolve_checkpoint
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.losses.alignment import rowless_tokens
from cbd_hub.precision import best_device
from cbd_hub.questions import Question, choice_accuracy
from cbd_hub.reporting import Report
from cbd_hub.shapes import check_positions, parameter_count, shape_of
from cbd_hub.sizes import format_size
from cbd_hub.weights import Checkpoint, load_model, load_tokenizer, tokenizer_sha256


@dataclass(frozen=True)
class Evaluated:
    """What was measured, as plain data.

    Attributes:
        results: One row per size, on the text: ``size``, ``parameters``, ``strategy``, ``loss`` (nats per token) with its ``stderr`` over documents,
            ``perplexity`` and ``bits_per_byte``, with several vocabularies with its error, ``bits_per_byte_stderr``. One of another model has its name,
            ``model``, in the place of the strategy. From the second row on also ``difference``, what it loses more than the first one, paired over
            documents, with ``difference_stderr``: in nats per token, and with several vocabularies in bits per byte.
        tasks: One row per size and file of questions: ``size``, ``parameters``, ``strategy``, ``task``, ``questions``, ``accuracy`` and ``accuracy_norm`` with their
            errors; of another model with its name, ``model``.
        counts: How much text that was: ``documents`` and ``tokens``, or ``bytes``; empty without text.
        one_vocabulary: Whether all of them have one; else bits per byte alone, of the same bytes, compare them.
    """

    results: list[dict[str, Any]]
    tasks: list[dict[str, Any]]
    counts: dict[str, int]
    one_vocabulary: bool


@dataclass(frozen=True)
class _Contender:
    """A size, or another model.

    Attributes:
        facts: What is said of it, as plain data.
        name: What to call it.
        source: A key of its tokenizer: contenders with one key share it.
        tokenizer: Loads that.
        model: Loads the model.
        config: The config of another model; None of a size.
    """

    facts: dict[str, Any]
    name: str
    source: str | None
    tokenizer: Callable[[], Any]
    model: Callable[[], Any]
    config: Any = None

    @classmethod
    def size(cls, chain: Chain, size: str | int, wish: Mapping[str, Any]) -> _Contender:
        """A size of a chain."""
        plan = chain.plan(size, **wish)
        source = chain.neighbours(plan.parameters)[0].tokenizer_sha256  # several across a bridge
        name = format_size(plan.parameters)
        facts = {"size": name, "parameters": plan.parameters, "strategy": plan.strategy}
        return cls(facts, name, source, partial(chain.tokenizer, plan.parameters), partial(chain.model, size, **wish))

    @classmethod
    def other(cls, name: str) -> _Contender:
        """A model folder, or a Hub id."""
        folder = resolve_checkpoint(name)
        config = read_config(folder)
        parameters = parameter_count(config)
        facts = {"model": name, "size": format_size(parameters), "parameters": parameters}
        return cls(facts, name, name, partial(load_tokenizer, folder), partial(load_model, folder, Checkpoint(folder, config).dtype), config)

    def check(self, tokenizer: Any, documents: Documents | None) -> None:
        """Refuse another model that cannot read what is to be measured, before anything is.

        Raises:
            ArgumentError: If it has fewer positions than a document.
            DataError: If it has no rows for some of its tokenizer's tokens.
        """
        if self.config is None:
            return
        rows = shape_of(self.config).vocab
        beyond = {place for place in tokenizer.get_vocab().values() if place >= rows} - rowless_tokens(tokenizer, rows)
        if beyond:
            raise DataError(f"{self.name} has {rows:,} rows in its embedding, and its tokenizer tokens up to {max(beyond):,}; give it its own tokenizer")
        if documents is not None:
            longest = max(map(len, documents.ids))
            check_positions(longest, self.config, f"{self.name} is to read {longest:,} tokens (block_size), which")


def evaluate_sizes(
    chain: Chain, sizes: Sequence[str | int] | None = None, *, models: Sequence[str | os.PathLike[str]] = (), text: str | None = None, tasks: Sequence[str] = (), column: str = "text",
    block_size: int = 128, max_tokens: int = 8000, report: Report | None = None, **wish: Any,
) -> Evaluated:
    """Held-out loss of sizes of a chain, and their accuracy on multiple-choice questions; beside those of other models, where they are named.

    Args:
        chain: The chain.
        sizes: The sizes; None for the anchors.
        models: Other models to measure: folders, such as that of a healed size, or Hub ids. One with a vocabulary of its own is compared in bits per byte.
        text: Held-out text: a file or a pattern. Of prompts with completions and of chats the answers count.
        tasks: Files of questions, as `Question.read` takes them.
        column: Column of the text, in files that have columns.
        block_size: Longest document in tokens.
        max_tokens: Tokens of text to use.
        report: Called with what is done, how much of it, and of how much.
        **wish: ``strategy``, ``alpha`` and ``tolerance``, as `CBDModel.from_chain` takes them.

    Raises:
        ArgumentError: If neither text nor tasks are given, or a model has fewer positions than a document.
        DataError: If the text cannot be read or is too short, or a tokenizer has tokens that its model has not.
        SizeError: If a size lies outside the chain.
        StorageError: If a model is neither a folder nor on the Hub.
        ArchitectureError: If its architecture has no axis table.
        WeightsError: If it is no causal language model, or has no tokenizer.

    Example:
        >>> evaluated = evaluate_sizes(Chain.from_pretrained("./chain"), ["117M", "max"], text="heldout.txt")  # doctest: +SKIP
        >>> [(row["size"], row["loss"], row["stderr"]) for row in evaluated.results]  # doctest: +SKIP
    """
    if text is None and not tasks:
        raise ArgumentError("neither text nor tasks were given; name a text file, or a .jsonl file of questions")
    if isinstance(models, str):
        raise ArgumentError(f"models is the text {models!r}; give a list of folders and Hub ids")
    questions = {name: Question.read(name) for name in tasks}
    rows = None if text is None else read_rows(text, column)
    wishes = [anchor.parameters for anchor in chain.anchors] if sizes is None else list(sizes)
    contenders = [*(_Contender.size(chain, size, wish) for size in wishes), *(_Contender.other(os.fspath(model)) for model in models)]
    by_source = {contender.source: contender for contender in contenders}
    tokenizers = {source: contender.tokenizer() for source, contender in by_source.items()}
    chats = rows is not None and is_conversation(rows[0])
    vocabularies = {source: tokenizer_sha256(tokenizer, chats) for source, tokenizer in tokenizers.items()}
    sides = {vocabularies[source]: tokenizers[source] for source in reversed(tokenizers)}  # of several that are alike the first one's
    texts: dict[str, Documents] = {}
    for source, vocabulary in vocabularies.items():
        try:
            if rows is not None and vocabulary not in texts:
                texts[vocabulary] = _documents(rows, sides[vocabulary], block_size, max_tokens, str(text))
        except DataError as error:
            raise DataError(f"{by_source[source].name}: {error}") from error
    for contender in contenders:
        contender.check(tokenizers[contender.source], texts.get(vocabularies[contender.source]))
    same = None
    if rows is not None:
        rest = {anchor.tokenizer_sha256: anchor.parameters for anchor in chain.anchors if anchor.tokenizer_sha256 not in tokenizers}
        others = {tokenizer_sha256(tokenizer, chats): tokenizer for tokenizer in map(chain.tokenizer, rest.values())}
        same = _same_bytes(rows, sides, {**others, **sides}, block_size, max_tokens)
    first: Losses | None = None
    results: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    counts = {"documents": len(documents.ids), "tokens": documents.tokens} if (documents := next(iter(texts.values()), None)) is not None else {}
    for place, contender in enumerate(contenders):
        facts, vocabulary = contender.facts, vocabularies[contender.source]
        if report is not None:
            report(f"measuring {contender.name}", place, len(contenders))
        runner = ModelRunner(contender.model().to(best_device()))
        answers += [{**facts, "task": name, **choice_accuracy(runner, asked, sides[vocabulary])} for name, asked in questions.items()]
        if rows is None:
            continue
        losses = compared = document_losses(runner, texts[vocabulary])
        bits: dict[str, float | None] = {"bits_per_byte": bits_per_byte(losses, texts[vocabulary])}
        if same is not None:
            of_bytes = same.losses(runner, sides[vocabulary])
            bits = {"bits_per_byte": of_bytes.mean * BITS, "bits_per_byte_stderr": None if of_bytes.stderr is None else of_bytes.stderr * BITS}
            if len(sides) > 1:
                counts = {"documents": len(of_bytes.tokens), "bytes": int(of_bytes.tokens.sum())}
                compared = Losses(of_bytes.nats * BITS, of_bytes.tokens)
        results.append({**facts, "loss": losses.mean, "stderr": losses.stderr, "perplexity": losses.perplexity, **bits})
        if first is None:
            first = compared
        else:
            results[-1]["difference"], results[-1]["difference_stderr"] = compared.minus((1.0, first))
    return Evaluated(results, answers, counts, len(sides) == 1)


def _documents(rows: Sequence[Mapping[str, Any]], tokenizer: Any, block_size: int, max_tokens: int, source: str) -> Documents:
    if is_conversation(rows[0]):
        found = Documents.answered(((row.ids, row.labels) for row in tokenised(rows, tokenizer)), tokenizer, block_size, max_tokens)
    else:
        found = Documents.read([row["text"] for row in rows], tokenizer, block_size, max_tokens)
    if found.tokens < 2:
        raise DataError(f"{source} has {found.tokens} token to predict; give a longer text")
    return found


def _same_bytes(rows: Sequence[Mapping[str, Any]], asked: Mapping[str, Any], known: Mapping[str, Any], block_size: int, max_tokens: int) -> SameBytes | None:
    """The text as all known vocabularies read it, whatever sizes are asked for; None where there is one, or where nothing is left and one is asked for."""
    if len(known) == 1:
        return None
    try:
        return SameBytes([as_document(row) for row in rows], list(known.values()), block_size, max_tokens)
    except DataError:
        if len(asked) > 1:
            raise
        return None
