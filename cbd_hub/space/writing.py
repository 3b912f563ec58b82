"""A text that a model writes, token by token: it computes nothing between two steps, so that to stop is not to take the next one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from cbd_hub.errors import ArgumentError
from cbd_hub.interpolation.live import output_head
from cbd_hub.losses.log_probs import token_losses


_STEP_TOKENS = 32  # tokens of a text that are read in a step on a CPU: what a stop waits for at most
_STEP_PRODUCTS = 4 * 10**9  # of a CPU's step: large models read fewer tokens in one
_DEVICE_TOKENS = 512  # elsewhere


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0, or less than a hundredth, takes the likeliest token each time.
        top_p: Nucleus, above 0 to 1.
        new_tokens: Most tokens to write.
        seed: Seed of the draws: the same one gives the same text.

    Raises:
        ArgumentError: If a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0.0, 5.0), ("top_p", 0.01, 1.0), ("new_tokens", 1, 10**6), ("seed", 0, 2**63 - 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ArgumentError(f"{name.replace('_', ' ')} {str(value)[:40]} is outside {low:g} to {high:g}; choose a value in that range")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken: logits divided by less than this can be no finite numbers."""
        return self.temperature < 0.01

    def warpers(self) -> LogitsProcessorList:
        """What is done to logits before a draw."""
        found = LogitsProcessorList()
        if not self.greedy and self.temperature != 1.0:
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_p < 1.0:
            found.append(TopPLogitsWarper(float(self.top_p)))
        return found


class Writer:
    """One model that goes on from a prompt.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer.
        ids: The prompt, shape (T,).
        sampling: How tokens are drawn.
    """

    def __init__(self, model: Any, tokenizer: Any, ids: Sequence[int], sampling: Sampling) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.ids = torch.tensor([list(ids)], device=model.device)
        self.new: list[int] = []
        self.done = not sampling.new_tokens
        self.seconds = self.first_seconds = 0.0
        self._read = 0
        self._cache, self._part = DynamicCache(config=model.config), step_tokens(model)
        self._warpers = sampling.warpers()
        self._draws = torch.Generator(model.device).manual_seed(int(sampling.seed))
        self._ends = _end_tokens(model, tokenizer)

    @torch.inference_mode()
    def step(self) -> None:
        """Read a part of the prompt, or write one token."""
        started = time.perf_counter()
        part = self.ids[:, self._read : self._read + self._part]
        last = self._read + part.shape[1] == self.ids.shape[1]
        mask = torch.ones(1, self._read + part.shape[1], dtype=torch.long, device=self.ids.device)
        output = self.model(
            input_ids=part, attention_mask=mask, past_key_values=self._cache, use_cache=True, logits_to_keep=1,
        )
        self._read += part.shape[1]
        if last:
            token = self._draw(output.logits[:, -1].float())
            first = not self.new
            self.new.append(token)
            self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], dim=1)
            self.done = token in self._ends or len(self.new) >= int(self.sampling.new_tokens)
            if first:
                self.first_seconds = self.seconds + time.perf_counter() - started
        self.seconds += time.perf_counter() - started

    def _draw(self, logits: Tensor) -> int:
        if self.sampling.greedy:
            return int(logits.argmax())
        weights = torch.softmax(self._warpers(self.ids, logits), -1)
        return int(torch.multinomial(weights, 1, generator=self._draws))

    @property
    def text(self) -> str:
        """What has been written; a character that is not whole yet is held back."""
        text: str = self.tokenizer.decode(self.new, skip_special_tokens=True)
        return text if self.done else text.rstrip("�")

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens written in a second of computing, after the first one; None of fewer than two."""
        spent = self.seconds - self.first_seconds
        return (len(self.new) - 1) / spent if len(self.new) > 1 and spent > 0 else None


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    found = set(ends) if isinstance(ends, list) else {ends}
    return {int(token) for token in found | {tokenizer.eos_token_id} if token is not None}


def step_tokens(model: Any) -> int:
    """Tokens of a text that a model reads in well under a second: the same for every text, so that a seed gives the same one again."""
    if model.device.type != "cpu":
        return _DEVICE_TOKENS
    return max(1, min(_STEP_TOKENS, _STEP_PRODUCTS // max(model.num_parameters(), 1)))


def prompt_ids(tokenizer: Any, prompt: str, messages: Sequence[dict[str, str]] | None = None) -> list[int]:
    """Token ids of a prompt, or of a chat whose answer comes next."""
    if messages is None:
        found: list[int] = tokenizer(prompt)["input_ids"]
        return found
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    chat: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return chat


class Measure:
    """Perplexity of a text, part by part: that of one document, each token after all that stands before it.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        ids: The text, two tokens or more.
    """

    def __init__(self, model: Any, tokenizer: Any, ids: Sequence[int]) -> None:
        self.model, self.nats, self.tokens = model, 0.0, 0
        self.ids = torch.tensor([list(ids)], device=model.device)
        self.bytes = len(tokenizer.decode(list(ids[1:])).encode())
        self._cache = DynamicCache(config=model.config)

    def steps(self) -> Iterator[None]:
        """Measure a part a step."""
        size, count = step_tokens(self.model), self.ids.shape[1]
        for start in range(0, count - 1, size):
            self._step(start, min(start + size, count - 1))
            yield

    @torch.inference_mode()
    def _step(self, start: int, stop: int) -> None:
        head = output_head(self.model)
        mask = torch.ones(1, stop, dtype=torch.long, device=self.ids.device)
        hidden = self.model.base_model(
            input_ids=self.ids[:, start:stop], attention_mask=mask, past_key_values=self._cache, use_cache=True
        ).last_hidden_state[0]
        targets = self.ids[0, start + 1 : stop + 1]
        self.nats += float(token_losses(hidden, head.weight, targets, **head.options()).sum())
        self.tokens += stop - start

    @property
    def perplexity(self) -> float | None:
        """Exp of the nats per token read so far."""
        return math.exp(min(self.nats / self.tokens, 700.0)) if self.tokens else None

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of the text, once it is read: what compares across vocabularies."""
        return self.nats / math.log(2) / self.bytes if self.bytes and self.tokens == self.ids.shape[1] - 1 else None
