"""What the benchmarks share: fair timing in turns, peak anonymous memory, and results that say where they come from."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any


PACKAGES = ("cbd-hub", "torch", "transformers", "huggingface-hub", "peft", "trl", "liger-kernel", "nvidia-modelopt", "lm-eval")


def anonymous() -> int:
    """Anonymous resident memory of this process, in bytes: pages of mapped files do not count. Linux only."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """The highest anonymous memory inside a ``with`` block above what it was at its start, in ``bytes``, sampled every half millisecond."""

    def __enter__(self) -> Peak:
        """Begin to sample."""
        self._before = self._highest = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.is_set():
            self._highest = max(self._highest, anonymous())
            time.sleep(0.0005)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop."""
        self._done.set()
        self._thread.join()
        self.bytes = max(self._highest, anonymous()) - self._before


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, one after the other in each round; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a figure may depend on, where they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """The machine in a line: what computes, cores, memory, and whether it is quick in bf16."""
    from cbd_hub.precision import best_device, has_bf16  # not before a benchmark has set where the Hub is
    from cbd_hub.speed.stopwatch import device_name
    device = best_device()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    quick = "quick in bf16" if has_bf16(device.type) else "quicker in fp32 than in bf16"
    return f"{device_name(device)}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, {quick}"


def command() -> str:
    """The command as it was typed; of a file elsewhere on this machine the name alone."""
    typed = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv)
    threads = os.environ.get("OMP_NUM_THREADS")
    return " ".join([*([f"OMP_NUM_THREADS={threads}"] if threads else []), "python", shlex.join(typed)])


def whence() -> dict[str, Any]:
    """Where a figure comes from: the command, the machine, the versions and the day."""
    return {"command": command(), "machine": machine(), "versions": versions(), "day": datetime.now(UTC).date().isoformat()}


def write(out: Path, data: Mapping[str, Any]) -> None:
    """Write a benchmark's result as JSON, with where it comes from (what ``data`` says of that itself holds)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**whence(), **data}, indent=1) + "\n")
