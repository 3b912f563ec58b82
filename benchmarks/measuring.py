"""What the benchmarks share: fair timing in turns, and peak anonymous memory."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType


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
