"""Speculative decoding inside one chain: which size drafts best for a larger one, measured."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from cbd_hub.chain import Chain
from cbd_hub.errors import ArgumentError, CBDError, SizeError, VocabularyMismatchError
from cbd_hub.manifest import Anchor
from cbd_hub.plans import usual_sizes
from cbd_hub.precision import best_device
from cbd_hub.reporting import Report
from cbd_hub.shapes import check_ids, check_positions
from cbd_hub.sizes import check_counts, format_size
from cbd_hub.speed.measuring import GREEDY


PROMPTS = (
    "The history of the city begins with a small harbour at the mouth of the river, where",
    "To make bread at home you need flour, water, salt and yeast. First,",
    "def fibonacci(n):\n    \"\"\"Return the first n Fibonacci numbers as a list.\"\"\"\n",
    "Question: Why is the sky blue during the day and red in the evening?\nAnswer:",
)
ROUNDS = 3
FASTER = 1.02  # a speed-up below it is within the noise of a quiet machine


@dataclass
class _Counted(BaseStreamer):
    """Counts what a target checks and accepts of one prompt's drafts.

    Each of its forward passes reads a draft and what comes before it, and hands on what it accepts of the draft and one token of its own.

    Attributes:
        prompt: Tokens of the prompt.
        drafted: Tokens that were drafted.
        accepted: Those that were accepted.
        passes: Forward passes of the target.
    """

    prompt: int
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    _begun: bool = False

    def put(self, value: Any) -> None:
        if self._begun:
            self.accepted += value.numel() - 1
        self._begun = True  # the first thing that comes is the prompt

    def end(self) -> None:
        pass

    def look(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The target is about to read: in its first pass the prompt and a draft, later the last token and a draft."""
        self.drafted += kwargs["input_ids"].shape[1] - (1 if self.passes else self.prompt)
        self.passes += 1


@dataclass(frozen=True)
class Draft:
    """A size as the draft of another.

    Attributes:
        parameters: Its size.
        drafted: Tokens that it drafted, over all prompts.
        accepted: Those that the target accepted.
        passes: Forward passes of the target.
        alone: Tokens a second of the target without it, median over rounds.
        together: Tokens a second with it, median over rounds.
        speedup: Median over rounds of the time without it by the time with it, in the same round.
        ties: Prompts whose output is another one, from a token on where the target holds two to be equally likely within its own precision.
    """

    parameters: int
    drafted: int
    accepted: int
    passes: int
    alone: float
    together: float
    speedup: float
    ties: int

    @property
    def acceptance(self) -> float:
        """Accepted tokens by drafted ones."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def summary(self) -> dict[str, Any]:
        """The row as plain data."""
        return {
            "size": format_size(self.parameters), "parameters": self.parameters, "drafted": self.drafted, "accepted": self.accepted, "acceptance": self.acceptance, "target_passes": self.passes,
            "tokens_per_second_alone": self.alone, "tokens_per_second": self.together, "speedup": self.speedup, "ties": self.ties,
        }


@dataclass(frozen=True)
class DraftTable:
    """Draft sizes of a target.

    Attributes:
        target: The target's size.
        rows: The drafts, in falling size.
        prompts: How many prompts.
        new_tokens: Tokens that were made of all prompts, by the target alone.
    """

    target: int
    rows: tuple[Draft, ...]
    prompts: int
    new_tokens: int

    @property
    def best(self) -> Draft | None:
        """The draft with the largest speed-up; None where none is faster than the target alone by 2% or more."""
        first = max(self.rows, key=lambda row: row.speedup)
        return first if first.speedup >= FASTER else None

    def summary(self) -> dict[str, Any]:
        """The table as plain data."""
        best = self.best
        return {
            "target": self.target, "prompts": self.prompts, "new_tokens": self.new_tokens, "best": None if best is None else best.parameters,
            "results": [row.summary() for row in self.rows],
        }


@dataclass
class _Target:
    """A model with its prompts."""

    model: Any
    prompts: list[Tensor]
    max_new_tokens: int

    def answer(self, prompt: Tensor, **more: Any) -> Tensor:
        """Token ids of a prompt and its answer, shape (T,), by greedy decoding."""
        known = self.model.generation_config.pad_token_id
        return self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=self.max_new_tokens, pad_token_id=0 if known is None else known, **GREEDY, **more
        )[0]

    def answers(self, **more: Any) -> list[Tensor]:
        """Those of all prompts."""
        return [self.answer(prompt, **more) for prompt in self.prompts]

    def counted(self, assistant: Any) -> tuple[list[Tensor], list[_Counted]]:
        """The answers with a draft model, and what was counted of each."""
        answers, counts = [], []
        for prompt in self.prompts:
            counts.append(_Counted(prompt.shape[1]))
            handle = self.model.register_forward_pre_hook(counts[-1].look, with_kwargs=True)
            try:
                answers.append(self.answer(prompt, assistant_model=assistant, streamer=counts[-1]))
            finally:
                handle.remove()
        return answers, counts

    @torch.no_grad()
    def is_tie(self, alone: Tensor, together: Tensor) -> bool:
        """Whether two answers part at a token where the model holds both to be equally likely, within what its precision can tell."""
        shared = min(len(alone), len(together))
        places = (alone[:shared] != together[:shared]).nonzero()
        if not len(places):
            return False
        place = int(places[0])
        logits = self.model(alone[None, :place]).logits[0, -1].float()
        precision = max(1e-4, 8 * torch.finfo(self.model.dtype).eps)
        return float((logits[alone[place]] - logits[together[place]]).abs()) <= precision * float(logits.abs().max())


def draft_table(
    chain: Chain | str | os.PathLike[str], target: str | int = "max", sizes: Sequence[str | int] | None = None, prompts: Sequence[str] | None = None, *,
    max_new_tokens: int = 64, prompt_tokens: int = 64, num_assistant_tokens: int | None = None, rounds: int = ROUNDS, dtype: Any = None, device: Any = None,
    clock: Callable[[], float] = time.perf_counter, report: Report | None = None,
) -> DraftTable:
    """How much faster a size of a chain answers when a smaller size drafts for it (speculative decoding, transformers' ``assistant_model=``).

    Greedy decoding, one prompt at a time. The draft writes some tokens ahead, the target reads them in one pass and keeps those that it would have
    written itself, so that the output is the target's own; this is checked. In each round the target answers all prompts alone and then with the draft.

    Args:
        chain: The chain.
        target: The size that answers.
        sizes: Draft sizes, all below the target; by default the anchors below it and between them the recommended sizes, else the middle.
        prompts: Texts to go on from; by default four short ones.
        max_new_tokens: Most tokens of an answer.
        prompt_tokens: Most tokens of a prompt; the rest is left out.
        num_assistant_tokens: Most tokens of a draft; by default transformers' 20. A draft also ends where the draft model is less sure than its
            ``assistant_confidence_threshold``, which transformers adapts as it goes where scikit-learn is installed.
        rounds: Rounds that are timed, after one that is not.
        dtype: Dtype of the weights; by default the anchors'.
        device: The device; by default the best one that there is.
        clock: Gives seconds.
        report: Called with what is done, how much of it, and of how much.

    Returns:
        The table.

    Raises:
        SizeError: If a size cannot be made, or no draft size lies below the target.
        VocabularyMismatchError: If a draft size has another vocabulary, beyond a bridge.
        ArgumentError: If an argument cannot be used.
        CBDError: If the output is another one, and not by a tie.

    Example:
        >>> table = draft_table("./chain", target="135M")  # doctest: +SKIP
        >>> table.best and (table.best.parameters, round(table.best.speedup, 2))  # doctest: +SKIP
    """
    if isinstance(prompts, str):
        raise ArgumentError(f"prompts is {prompts[:40]!r} alone; give a list of texts")
    opened = Chain.from_pretrained(chain)
    check_counts(max_new_tokens=max_new_tokens, prompt_tokens=prompt_tokens, rounds=rounds, num_assistant_tokens=num_assistant_tokens)
    goal = opened.plan(target).parameters
    drafts = draft_sizes(opened, goal, sizes)
    place = best_device() if device is None else device
    say = report or (lambda what, done, total: None)
    say("making the target", 0, None)
    model = opened.model(goal, dtype=dtype).to(place)
    bench = _Target(model, _encoded(opened.tokenizer(goal), PROMPTS if prompts is None else prompts, prompt_tokens, model), max_new_tokens)
    check_positions(max(prompt.shape[1] for prompt in bench.prompts) + max_new_tokens, model.config, "prompt and new tokens together")
    alone = bench.answers()
    made = sum(len(answer) - prompt.shape[1] for answer, prompt in zip(alone, bench.prompts))
    rows = []
    for size in drafts:
        say(f"{format_size(size)} drafts", 0, rounds)
        draft = opened.model(size, dtype=dtype).to(place)
        if num_assistant_tokens is not None:
            draft.generation_config.num_assistant_tokens = num_assistant_tokens
        rows.append(_measured(bench, draft, alone, made, rounds, clock, lambda done, size=size: say(f"{format_size(size)} drafts", done, rounds)))  # type: ignore[misc]
        del draft
    return DraftTable(int(model.config.cbd["parameters"]), tuple(rows), len(bench.prompts), made)


def draft_sizes(chain: Chain, target: int, sizes: Sequence[str | int] | None = None) -> list[int]:
    """The sizes that can draft for a target, in falling order; by default those that are usual.

    Raises:
        SizeError: If one is not below the target, or there is none.
        VocabularyMismatchError: If one has another vocabulary.
    """
    manifest = chain.manifest
    own = manifest.neighbours(target)[0]

    def fits(anchor: Anchor) -> bool:
        return anchor.shape.vocab == own.shape.vocab and anchor.tokenizer_sha256 == own.tokenizer_sha256

    if sizes is None:
        found = [chain.plan(size, tolerance=0.5).parameters for size in usual_sizes(manifest) if size < target and fits(manifest.neighbours(size)[0])]
        found = sorted({size for size in found if size < target}, reverse=True)
        if not found:
            raise SizeError(f"no size of {manifest.name} with the vocabulary of {format_size(target)} lies below it, so that none can draft for it; choose a larger target")
        return found
    found = sorted({manifest.size(size) for size in sizes}, reverse=True)
    for size in found:
        if size >= target:
            raise SizeError(f"{format_size(size)} cannot draft for {format_size(target)}, which is no larger; choose smaller draft sizes, or a larger target")
        if not fits(manifest.neighbours(size)[0]):
            least = min(anchor.parameters for anchor in manifest.anchors if fits(anchor))
            raise VocabularyMismatchError(
                f"{format_size(size)} lies beyond a bridge and has another vocabulary than {format_size(target)}; choose draft sizes from {format_size(least)} up, or give both "
                "models with tokenizer= and assistant_tokenizer= to transformers' generate"
            )
    return list({chain.plan(size).parameters: size for size in found}.values())  # two wishes may be one model


def _encoded(tokenizer: Any, prompts: Sequence[str], most: int, model: Any) -> list[Tensor]:
    found = [tokenizer(prompt, truncation=True, max_length=most, return_tensors="pt")["input_ids"].to(model.device) for prompt in prompts]
    found = [ids.long() for ids in found if ids.shape[1]]
    for ids in found:
        check_ids(int(ids.max()), model.config)
    if not found:
        raise ArgumentError("there is no prompt with a token in it; give a few lines of text to go on from")
    return found


def _measured(
    bench: _Target, draft: Any, alone: list[Tensor], made: int, rounds: int, clock: Callable[[], float], report: Callable[[int], None]
) -> Draft:
    """A draft model, counted in a first round and timed in the others."""
    answers, counts = bench.counted(draft)
    ties = 0
    for number, (ours, theirs) in enumerate(zip(answers, alone)):
        if not torch.equal(ours, theirs):
            if not bench.is_tie(theirs, ours):
                raise CBDError(f"with a draft of {format_size(draft.config.cbd['parameters'])} the answer to prompt {number + 1} is another one, and not by a tie; report this")
            ties += 1
    seconds: list[tuple[float, float]] = []
    for turn in range(rounds):
        began = clock()
        bench.answers()
        between = clock()
        bench.answers(assistant_model=draft)
        seconds.append((between - began, clock() - between))
        report(turn + 1)
    with_it = sum(len(ours) - prompt.shape[1] for ours, prompt in zip(answers, bench.prompts))
    return Draft(
        parameters=int(draft.config.cbd["parameters"]), drafted=sum(count.drafted for count in counts), accepted=sum(count.accepted for count in counts),
        passes=sum(count.passes for count in counts), alone=statistics.median(made / apart for apart, _ in seconds),
        together=statistics.median(with_it / both for _, both in seconds), speedup=statistics.median((apart / made) / (both / with_it) for apart, both in seconds),
        ties=ties,
    )
