"""Which precision matrix products run in: bf16 where the device has instructions for it, else fp32."""

from __future__ import annotations

import contextlib
import functools
import logging

import torch


logger = logging.getLogger(__name__)


@functools.cache
def has_bf16(device_type: str) -> bool:
    """Whether products in bf16 are quick on a kind of device.

    A CPU without AVX-512 or its like computes them element by element, several times slower than in fp32, and more exactly in fp32.

    Example:
        >>> has_bf16("cuda")
        True
    """
    if device_type != "cpu":
        return True
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch built without oneDNN
        return False


def products(device: torch.device, *, bf16: bool = True) -> contextlib.AbstractContextManager[object]:
    """A block in which products run in bf16 by autocast, where that is wanted and quick."""
    if not (bf16 and has_bf16(device.type)):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@functools.cache
def say_fp32() -> None:
    """Say once that a CPU computes in fp32 what was to be bf16."""
    logger.warning("this CPU has no instructions for bf16 products, in which they would take several times as long; they run in fp32 (bf16=False)")


def best_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device("cpu")
