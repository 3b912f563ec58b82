"""How fast a model answers: the time to its first token, and for each further one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cbd_hub.errors import ArgumentError
from cbd_hub.sizes import format_seconds, parse_rate, parse_seconds


PROMPT_TOKENS = 64
ANSWER_TOKENS = 64
_FEW = 8  # new tokens of a run: short runs in many turns see the same load


@dataclass(frozen=True)
class Speed:
    """How fast a model answers one prompt, by greedy decoding at batch 1 with a KV cache.

    Attributes:
        first: Seconds from a prompt of 64 tokens to the first new token.
        token: Seconds for each further token.

    Example:
        >>> speed = Speed(first=0.37, token=0.01)
        >>> speed.tokens_per_second, round(speed.latency, 2)
        (100.0, 1.0)
    """

    first: float
    token: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second after the first one."""
        return 1 / self.token

    @property
    def latency(self) -> float:
        """Seconds from a prompt of 64 tokens to an answer of 64."""
        return self.first + (ANSWER_TOKENS - 1) * self.token

    @property
    def text(self) -> str:
        """Both, for people."""
        return f"{self.tokens_per_second:.3g} tokens a second, {format_seconds(self.latency)} for {ANSWER_TOKENS} tokens after {PROMPT_TOKENS}"

    def summary(self) -> dict[str, float]:
        """Both, as plain data."""
        return {"tokens_per_second": self.tokens_per_second, "latency": self.latency}

    def off(self, measured: Speed) -> float:
        """How far its tokens per second are from measured ones, as a share of those."""
        return self.tokens_per_second / measured.tokens_per_second - 1


@dataclass(frozen=True)
class SpeedWish:
    """What a model must reach; None where it need not.

    Attributes:
        min_tokens_per_second: Least `Speed.tokens_per_second`.
        max_latency: Most `Speed.latency`, in seconds.
    """

    min_tokens_per_second: float | None = None
    max_latency: float | None = None

    @classmethod
    def read(cls, min_tokens_per_second: str | float | None, max_latency: str | float | None) -> SpeedWish | None:
        """A wish from what users write; None where nothing is wished for.

        Raises:
            ArgumentError: If it is no rate, or no time.
        """
        if min_tokens_per_second is None and max_latency is None:
            return None
        return cls(
            None if min_tokens_per_second is None else parse_rate(min_tokens_per_second), None if max_latency is None else parse_seconds(max_latency, "max_latency")
        )

    def met(self, speed: Speed) -> bool:
        """Whether a speed is enough."""
        fast = self.min_tokens_per_second is None or speed.tokens_per_second >= self.min_tokens_per_second
        return fast and (self.max_latency is None or speed.latency <= self.max_latency)

    @property
    def text(self) -> str:
        """The wish as it is called in errors."""
        rate = [] if self.min_tokens_per_second is None else [f"min_tokens_per_second={self.min_tokens_per_second:g}"]
        return " and ".join(rate + ([] if self.max_latency is None else [f"max_latency={format_seconds(self.max_latency)}"]))


class _Ticks:
    """A streamer: notes when each new token is there; on an accelerator it has been copied from there by then."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.times, self._prompt = clock, [clock()], True

    def put(self, value: Any) -> None:
        if not self._prompt:
            self.times.append(self.clock())
        self._prompt = False

    def end(self) -> None:
        pass


@dataclass
class Stint:
    """What was measured of one model so far, in seconds.

    Attributes:
        first: Times to the first token, one of each run.
        token: Times of further tokens, of all runs.
    """

    first: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)

    @property
    def speed(self) -> Speed:
        """Their medians."""
        return Speed(statistics.median(self.first), statistics.median(self.token))


# The likeliest token each time, whatever a generation config says.
GREEDY = {
    "do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "use_cache": True,
}


def _run(model: Any, prompt_tokens: int, new_tokens: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of each new token of one run; the first one's is from the prompt on."""
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None:
        prompt_tokens = max(1, min(prompt_tokens, room - new_tokens))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, prompt_tokens), generator=generator).to(model.device)
    ticks = _Ticks(clock)
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0, streamer=ticks, **GREEDY
    )
    return [later - before for before, later in zip(ticks.times, ticks.times[1:])]


def measure_in_turns(
    models: Sequence[Any], *, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = _FEW, runs: int = 5, clock: Callable[[], float] = time.perf_counter,
    report: Callable[[int, int], None] | None = None,
) -> list[Speed]:
    """The speeds of several models, each run of one followed by a run of the next, so that a load of the machine falls on all.

    Args:
        models: transformers models with a KV cache, on any devices.
        prompt_tokens: Tokens of the prompt, random ones.
        new_tokens: Tokens that a run makes, at least 2.
        runs: Runs of each, after one to warm up.
        clock: Gives seconds.
        report: Called with how many runs are done, and of how many.

    Returns:
        Median times of each.
    """
    stints, done = [Stint() for _ in models], 0
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        for turn in range(runs + 1):
            for model, stint in zip(models, stints):
                seconds = _run(model, prompt_tokens, new_tokens, clock)
                if turn:
                    stint.first.append(seconds[0])
                    stint.token += seconds[1:]
                done += 1
                if report is not None:
                    report(done, (runs + 1) * len(models))
    finally:
        for model, mode in zip(models, modes):
            model.train(mode)
    return [stint.speed for stint in stints]


def measure_speed(
    model: Any, *, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = 16, runs: int = 3, clock: Callable[[], float] = time.perf_counter
) -> Speed:
    """The speed of a model where it is, with torch's current number of threads, by ``model.generate``.

    Args:
        model: A transformers model with a KV cache.
        prompt_tokens: Tokens of the prompt, random ones.
        new_tokens: Tokens that a run makes, at least 2; the model's end-of-text token does not stop it.
        runs: Runs, after one to warm up.
        clock: Gives seconds.

    Returns:
        Median times over the runs.

    Raises:
        ArgumentError: If a number is too small.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> measure_speed(LlamaForCausalLM(config), prompt_tokens=4, new_tokens=4, runs=1).tokens_per_second > 0
        True
    """
    for name, value, least in (("prompt_tokens", prompt_tokens, 1), ("new_tokens", new_tokens, 2), ("runs", runs, 1)):
        if value < least:
            raise ArgumentError(f"{name}={value} is too few to measure a speed; give {least} or more")
    return measure_in_turns([model], prompt_tokens=prompt_tokens, new_tokens=new_tokens, runs=runs, clock=clock)[0]


