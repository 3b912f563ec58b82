"""Which precision matrix products run in: bf16 where that is quicker on the device, else fp32."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time

import torch


logger = logging.getLogger(__name__)
_QUICKER = 1.25  # times: a Xeon without AMX stands at 0.5; a bound at 1 would have a CPU that is as quick in both decide by chance, run by run


@functools.cache
def has_bf16(device_type: str) -> bool:
    """Whether products in bf16 are quicker than in fp32 on a kind of device.

    A CPU without instructions for them computes them element by element, several times slower and less exactly; one with AVX-512's alone may still take twice as long as
    in fp32. So a CPU that has any is timed, once, in some hundredths of a second. A GPU of Nvidia's before Ampere emulates them.

    Example:
        >>> has_bf16("mps")
        True
    """
    if device_type != "cpu":
        return device_type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and _bf16_speed() > _QUICKER
    except (AttributeError, RuntimeError):  # a torch built without oneDNN
        return False


def _bf16_speed() -> float:
    """How many times as fast as in fp32 a product in bf16 is on a core of this CPU, also where it is busy: the least of several times, taken in turns."""
    least: dict[torch.dtype, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other where other work has their cores
    try:
        with torch.no_grad():
            factors = {dtype: torch.ones(384, 384, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
            for _ in range(20):
                for dtype, factor in factors.items():
                    began = time.perf_counter()
                    torch.nn.functional.linear(factor, factor)
                    least[dtype] = min(least.get(dtype, math.inf), time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return least[torch.float32] / least[torch.bfloat16]


def products(device: torch.device, *, bf16: bool = True) -> contextlib.AbstractContextManager[object]:
    """A block in which products run in bf16 by autocast, where that is wanted and quick.

    Weights are rounded anew for each product: autocast would keep what it has rounded until the block ends, also of a weight that is changed in it.
    """
    if not (bf16 and has_bf16(device.type)):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def quick(dtype: torch.dtype) -> bool:
    """Whether the device here computes quickly in a dtype."""
    device = best_device().type
    return has_bf16(device) if dtype is torch.bfloat16 else device != "cpu" or dtype in (torch.float32, torch.float64)


def widest(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device: Apple's GPUs have no float64.

    Example:
        >>> widest(torch.device("mps")), widest(torch.device("cuda"))
        (torch.float32, torch.float64)
    """
    return torch.float32 if device.type == "mps" else torch.float64


@functools.cache
def say_fp32() -> None:
    """Say once that a device computes in fp32 what was to be bf16."""
    logger.warning("products in bf16 are not quicker on this %s; they run in fp32 (bf16=False)", best_device().type.upper())


def best_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device("cpu")
