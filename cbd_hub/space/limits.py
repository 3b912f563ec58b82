"""What the owner of a Space lets a visitor have."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import psutil

from cbd_hub.errors import ArgumentError
from cbd_hub.sizes import parse_bytes


@dataclass(frozen=True)
class Limits:
    """Limits of a Space.

    Attributes:
        memory: Bytes of weights held at a time.
        prompt_tokens: Longest prompt, in tokens; also of a text to measure.
        new_tokens: Longest continuation, in tokens.
        seconds: Longest turn of one visitor.
        waiting: Visitors that may wait for their turn; further ones are told that the Space is busy.
        workers: Turns at a time.
        download: Whether a visitor may download the checkpoint of a size.
    """

    memory: int = 4 * 10**9
    prompt_tokens: int = 1024
    new_tokens: int = 256
    seconds: int = 120
    waiting: int = 20
    workers: int = 1
    download: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int" and getattr(self, field.name) < 1:
                raise ArgumentError(f"{field.name}={getattr(self, field.name)} is not positive; give at least 1")

    @classmethod
    def room(cls, largest: int) -> int:
        """Bytes of weights that an owner's own machine may hold: three models of the largest size, if they leave two fifths of its memory free.

        Args:
            largest: Bytes of the largest model.
        """
        return max(cls.memory, min(3 * largest, int(0.6 * psutil.virtual_memory().total)))

    @property
    def characters(self) -> int:
        """Longest prompt in characters, which is refused before it is tokenised."""
        return 8 * self.prompt_tokens

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Limits from the variables of a Space, such as ``CBD_MEMORY=8GB``, ``CBD_NEW_TOKENS=128`` or ``CBD_DOWNLOAD=1``.

        Raises:
            ArgumentError: If one cannot be read.

        Example:
            >>> Limits.from_environment({"CBD_MEMORY": "8GB", "CBD_DOWNLOAD": "1"})
            Limits(memory=8000000000, prompt_tokens=1024, new_tokens=256, seconds=120, waiting=20, workers=1, download=True)
        """
        found: dict[str, int | bool] = {}
        for field in fields(cls):
            text = environment.get(name := f"CBD_{field.name.upper()}", "").strip()
            if not text:
                continue
            if field.name == "download":
                found[field.name] = text.lower() in ("1", "true", "yes")
            elif field.name == "memory":
                found[field.name] = parse_bytes(text, name)
            elif text.isdecimal():
                found[field.name] = int(text)
            else:
                raise ArgumentError(f"{name}={text[:40]!r} is no count; give a number such as {field.default}")
        return cls(**found)  # type: ignore[arg-type]
