"""What programs ask of the page, through ``gradio_client`` and as MCP tools, and how refusals reach whoever asked."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from gradio.events import api

from cbd_hub.errors import ArgumentError, CBDError
from cbd_hub.space.desk import Desk
from cbd_hub.space.writing import Sampling


logger = logging.getLogger(__name__)


def polite(act: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose refusals reach the program that called it as a message."""
    if inspect.isgeneratorfunction(act):
        @functools.wraps(act)
        def stream(*arguments: Any, **named: Any) -> Iterator[Any]:
            try:
                yield from act(*arguments, **named)
            except Exception as error:
                raise gr.Error(told(error), print_exception=False) from None
        return stream

    @functools.wraps(act)
    def once(*arguments: Any, **named: Any) -> Any:
        try:
            return act(*arguments, **named)
        except Exception as error:
            raise gr.Error(told(error), print_exception=False) from None
    return once


def told(error: Exception) -> str:
    """What a visitor is told of an error: why, where it is one that can be explained; of any other the log says more."""
    if isinstance(error, CBDError):
        return str(error)
    logger.error("a visitor's request failed", exc_info=error)
    return "something went wrong here, and the log of the Space says what; try again, or another size"


def sampling_of(temperature: float, top_p: float, tokens: float, seed: float) -> Sampling:
    """How tokens are drawn, from the numbers of a page or a program, in which whole ones may come as floats."""
    numbers = [0 if value is None else value for value in (tokens, seed)]
    whole = [int(value) if isinstance(value, float) and value.is_integer() else value for value in numbers]
    return Sampling(temperature, top_p, whole[0], whole[1])  # type: ignore[arg-type]


def text_of(value: Any, name: str) -> str:
    """A program's text.

    Raises:
        ArgumentError: If it is none.
    """
    if not isinstance(value, str):
        raise ArgumentError(f"{name}={str(value)[:40]} is not text; give a string")
    return value


def register(desk: Desk, turn: dict[str, Any]) -> None:
    """Register the functions that programs call, inside the page's block: their names and arguments are the API.

    Args:
        desk: The opened chain.
        turn: How turns queue.
    """

    def sizes() -> dict[str, Any]:
        """List the chain's anchors and recommended sizes, with the measured curve."""
        return {
            "chain": desk.picker.name, "snaps": [vars(snap) for snap in desk.picker.snaps], "curve": [vars(point) for point in desk.picker.points],
            "chat": desk.chats, "new_tokens": desk.limits.new_tokens, "prompt_tokens": desk.limits.prompt_tokens,
        }

    def describe(size: str) -> dict[str, Any]:
        """Say what a size such as "117M" is: parameters, layers, bytes in memory and to download, expected loss. Loads nothing.

        Args:
            size: Parameters wanted, such as "117M", or "min" or "max".
        """
        return desk.picker.facts(size).data()

    def largest(memory: str, dtype: str = "float32") -> dict[str, Any]:
        """Find the largest size whose weights fit into a memory such as "512MB".

        Args:
            memory: Bytes, such as "512MB" or "1.5GiB".
            dtype: float32, bfloat16 or int8.
        """
        return desk.picker.facts(desk.picker.fits(text_of(memory, "memory"), text_of(dtype, "dtype"))).data()

    def snippet(size: str) -> str:
        """Give the Python lines that make a size.

        Args:
            size: Parameters wanted, such as "117M".
        """
        return desk.picker.snippet(size)

    def generate(size: str, prompt: str, temperature: float = 0.0, top_p: float = 1.0, new_tokens: int = 64, seed: int = 0) -> Iterator[dict[str, Any]]:
        """Continue a prompt with a model of a size; streams, and the last answer holds tokens per second and memory.

        Args:
            size: Parameters wanted, such as "117M".
            prompt: Text to continue.
            temperature: 0 takes the likeliest token each time.
            top_p: Nucleus, 0.01 to 1.
            new_tokens: Most tokens to write.
            seed: Seed of the draws.
        """
        for state in desk.generate(size, text_of(prompt, "prompt"), sampling_of(temperature, top_p, new_tokens, seed)):
            yield {**state.data(), "state": state.state}

    def chat(size: str, message: str, temperature: float = 0.0, top_p: float = 1.0, new_tokens: int = 64, seed: int = 0) -> Iterator[dict[str, Any]]:
        """Answer one message with a model of a size, where its tokenizer has a chat template; streams.

        Args:
            size: Parameters wanted, such as "117M".
            message: What the user says.
            temperature: 0 takes the likeliest token each time.
            top_p: Nucleus, 0.01 to 1.
            new_tokens: Most tokens to write.
            seed: Seed of the draws.
        """
        for state in desk.chat(size, [{"role": "user", "content": text_of(message, "message")}], sampling_of(temperature, top_p, new_tokens, seed)):
            yield {**state.data(), "state": state.state}

    def compare(
        sizes: str, prompt: str, text: str = "", temperature: float = 0.0, top_p: float = 1.0, new_tokens: int = 64, seed: int = 0
    ) -> Iterator[list[dict[str, Any]]]:
        """Let two or three sizes answer one prompt, with speed and perplexity of a text; streams.

        Args:
            sizes: Two or three sizes with commas between them, such as "64M,99M,135M".
            prompt: Text to continue.
            text: Text whose perplexity is measured; none where empty.
            temperature: 0 takes the likeliest token each time.
            top_p: Nucleus, 0.01 to 1.
            new_tokens: Most tokens to write.
            seed: Seed of the draws.
        """
        wishes = [wish for wish in text_of(sizes, "sizes").split(",") if wish.strip()]
        for states in desk.compare(wishes, text_of(prompt, "prompt"), sampling_of(temperature, top_p, new_tokens, seed), text_of(text, "text")):
            yield [{**state.data(), "state": state.state} for state in states]

    glances: list[Callable[..., Any]] = [sizes, describe, largest, snippet]
    for glance in glances:
        api(polite(glance), api_name=glance.__name__, queue=False)
    works: list[Callable[..., Any]] = [generate, compare, *([chat] if desk.chats else [])]
    for work in works:
        api(polite(work), api_name=work.__name__, **turn)
