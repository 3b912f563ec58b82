"""Sizes of a chain beside each other and beside other models: what they lose on held-out text, and how many questions they answer right."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cbd_hub.chain import Chain
from cbd_hub.configs import read_config
from cbd_hub.distill.data import as_document, as_row, is_conversation, read_rows
from cbd_hub.distill.packing import row_documents, tokenised
from cbd_hub.distill.same_bytes import SameBytes
from cbd_hub.errors import ArgumentError, DataError
from cbd_hub.evaluation import BITS, Documents, Losses, bits_per_byte, document_losses
from cbd_hub.hub import resolve_checkpoint
from cbd_hub.interpolation.live import ModelRunner
from cbd_hub.losses.alignment import rowless_tokens
from cbd_hub.precision import best_device, quick
from cbd_hub.questions import Question, choice_accuracy
from cbd_hub.reporting import Report
from cbd_hub.shapes import check_positions, parameter_count, shape_of
from cbd_hub.sizes import check_counts, format_size
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
        one_vocabulary: Whether all of them read the text with one; else bits per byte alone, of the same bytes, compare them.
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

    def check(self, tokenizer: Any, longest: int) -> None:
        """Refuse another model that cannot read documents of up to ``longest`` tokens, before anything is measured.

        Raises:
            ArgumentError: If it has fewer positions than a document.
            DataError: If it has no rows for some of its tokenizer's tokens.
        """
        rows = shape_of(self.config).vocab
        beyond = {place for place in tokenizer.get_vocab().values() if place >= rows} - rowless_tokens(tokenizer, rows)
        if beyond:
            raise DataError(f"{self.name} has {rows:,} rows in its embedding, and its tokenizer tokens up to {max(beyond):,}; give it its own tokenizer")
        if longest:
            check_positions(longest, self.config, f"{self.name} is to read {longest:,} tokens (block_size), which")


def evaluate_sizes(
    chain: Chain | str | os.PathLike[str], sizes: Sequence[str | int] | None = None, *, models: Sequence[str | os.PathLike[str]] = (), text: str | os.PathLike[str] | None = None, tasks: Sequence[str | os.PathLike[str]] = (), column: str = "text",
    block_size: int = 128, max_tokens: int = 8000, report: Report | None = None, **wish: Any,
) -> Evaluated:
    """Held-out loss of sizes of a chain, and their accuracy on multiple-choice questions; beside those of other models, where they are named.

    Args:
        chain: The chain; or its folder, or its Hub id.
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
        ArgumentError: If neither text nor tasks are given, one stands where a list is wanted, or a model has fewer positions than a document.
        DataError: If the text cannot be read or is too short, or a tokenizer has tokens that its model has not.
        SizeError: If a size lies outside the chain.
        StorageError, ManifestError: If a model is neither a folder nor on the Hub.
        ArchitectureError: If its architecture has no axis table.
        WeightsError: If it is no causal language model, or has no tokenizer.

    Example:
        >>> evaluated = evaluate_sizes(Chain.from_pretrained("./chain"), ["117M", "max"], text="heldout.txt")  # doctest: +SKIP
        >>> [(row["size"], row["loss"], row["stderr"]) for row in evaluated.results]  # doctest: +SKIP
    """
    if text is None and not tasks:
        raise ArgumentError("neither text nor tasks were given; name a text file, or a .jsonl file of questions")
    check_counts(block_size=block_size, max_tokens=max_tokens)
    chain = Chain.from_pretrained(chain)
    for name, given, what in (("sizes", sizes, "sizes"), ("models", models, "folders and Hub ids"), ("tasks", tasks, "files of questions")):
        if isinstance(given, (str, int, os.PathLike)):
            raise ArgumentError(f"{name} is {given!r} alone; give a list of {what}")
    if text is not None and not isinstance(text, (str, os.PathLike)):
        raise ArgumentError(f"text is a {type(text).__name__}; give a file or a pattern")
    questions = {os.fspath(name): Question.read(name) for name in tasks}
    rows = None if text is None else read_rows(os.fspath(text), column)
    wishes = [anchor.parameters for anchor in chain.anchors] if sizes is None else list(sizes)
    contenders = [*(_Contender.size(chain, size, wish) for size in wishes), *(_Contender.other(os.fspath(model)) for model in models)]
    if not contenders:
        raise ArgumentError("sizes and models name none; leave sizes out for the anchors")
    tokenizers = {contender.source: contender.tokenizer() for contender in {contender.source: contender for contender in contenders}.values()}
    texts = None if rows is None else _Texts(chain, contenders, tokenizers, rows, block_size, max_tokens)
    for contender in contenders:
        if contender.config is not None:
            contender.check(tokenizers[contender.source], 0 if texts is None else texts.longest(contender))
    results: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    first: Losses | None = None
    for place, contender in enumerate(contenders):
        if report is not None:
            report(f"measuring {contender.name}", place, len(contenders))
        model = contender.model().to(best_device())
        runner = ModelRunner(model if quick(model.dtype) else model.float())  # its weights as they are, computed with where that is quick
        answers += [{**contender.facts, "task": name, **choice_accuracy(runner, asked, tokenizers[contender.source])} for name, asked in questions.items()]
        if texts is not None:
            measured, compared = texts.measured(runner, contender)
            difference = {} if first is None else dict(zip(("difference", "difference_stderr"), compared.minus((1.0, first))))
            results.append({**contender.facts, **measured, **difference})
            first = first or compared
        del model, runner  # the next one is to have its room
    return Evaluated(results, answers, {} if texts is None else texts.counts, texts is None or texts.one_vocabulary)


class _Texts:
    """Held-out text as the tokenizer of each of several models reads it; where they are several, also the bytes that all of them read.

    Args:
        chain: The chain: a text that not all of its vocabularies read counts for none, whatever sizes are asked for.
        contenders: What is measured.
        tokenizers: Their tokenizers, by key.
        rows: The text, or prompts with completions, or chats.
        block_size: Longest document in tokens.
        max_tokens: Tokens of text to use.

    Raises:
        DataError: If a tokenizer cannot read it, naming whose that is, or it is too short.
    """

    def __init__(
        self, chain: Chain, contenders: Sequence[_Contender], tokenizers: Mapping[str | None, Any], rows: Sequence[Mapping[str, Any]], block_size: int, max_tokens: int
    ) -> None:
        chats = is_conversation(rows[0])
        self._vocabularies = {source: tokenizer_sha256(tokenizer, chats) for source, tokenizer in tokenizers.items()}
        self._tokenizers: dict[str, Any] = {}
        self._documents: dict[str, Documents] = {}
        for contender in contenders:
            vocabulary, tokenizer = self._vocabularies[contender.source], tokenizers[contender.source]
            if vocabulary not in self._documents:
                self._tokenizers[vocabulary] = tokenizer
                self._documents[vocabulary] = _documents(rows, tokenizer, block_size, max_tokens, contender.name)
        self.one_vocabulary = len(self._documents) == 1
        rest = {anchor.tokenizer_sha256: anchor.parameters for anchor in chain.anchors if anchor.tokenizer_sha256 not in tokenizers}
        known = {tokenizer_sha256(tokenizer, chats): tokenizer for tokenizer in map(chain.tokenizer, rest.values())} | self._tokenizers
        self._same = None if len(known) == 1 else self._same_bytes(rows, list(known.values()), block_size, max_tokens)
        documents = next(iter(self._documents.values()))
        self.counts = {"documents": len(documents.ids), "tokens": documents.tokens}

    def _same_bytes(self, rows: Sequence[Mapping[str, Any]], tokenizers: Sequence[Any], block_size: int, max_tokens: int) -> SameBytes | None:
        try:
            return SameBytes([as_document(row) for row in rows], tokenizers, block_size, max_tokens)
        except DataError:
            if self.one_vocabulary:
                return None
            raise

    def longest(self, contender: _Contender) -> int:
        """Tokens of the longest document that a contender reads."""
        vocabulary = self._vocabularies[contender.source]
        same = [] if self._same is None else tokenised(map(as_row, self._same.documents), self._tokenizers[vocabulary])
        return max(*map(len, self._documents[vocabulary].ids), *(len(tokens.ids) for tokens in same), 0)

    def measured(self, runner: ModelRunner, contender: _Contender) -> tuple[dict[str, Any], Losses]:
        """What a contender loses, as plain data, and the losses that compare it with others: in nats per token, or in bits of the same bytes."""
        documents = self._documents[self._vocabularies[contender.source]]
        losses = document_losses(runner, documents)
        facts = {"loss": losses.mean, "stderr": losses.stderr, "perplexity": losses.perplexity, "bits_per_byte": bits_per_byte(losses, documents)}
        if self._same is None:
            return facts, losses
        found = self._same.losses(runner, self._tokenizers[self._vocabularies[contender.source]])
        bits = Losses(found.nats * BITS, found.tokens)
        facts |= {"bits_per_byte": bits.mean, "bits_per_byte_stderr": bits.stderr}
        if self.one_vocabulary:
            return facts, losses
        self.counts = {"documents": len(bits.tokens), "bytes": int(bits.tokens.sum())}
        return facts, bits


def _documents(rows: Sequence[Mapping[str, Any]], tokenizer: Any, block_size: int, max_tokens: int, whose: str) -> Documents:
    try:
        found = row_documents(rows, tokenizer, block_size, max_tokens)
    except DataError as error:
        raise DataError(f"{whose}: {error}") from error
    if found.tokens < 2:
        raise DataError(f"the text has {found.tokens} token to predict; give a longer text")
    return found
