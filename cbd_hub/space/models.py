"""Models that are held in memory, and how far a load is."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from cbd_hub.client import counted
from cbd_hub.errors import ArgumentError, BusyError
from cbd_hub.model import load
from cbd_hub.plans import anchor_config, plan_costs, weight_dtype
from cbd_hub.precision import best_device, quick
from cbd_hub.sizes import format_bytes, format_size
from cbd_hub.space.facts import Picker


@dataclass
class Loading:
    """A model on its way into memory, or there.

    Attributes:
        name: Its size.
        bytes: Bytes of its weights.
        terms: Slices of anchors to read in all.
        future: The model, when it is there.
        users: Who holds it now.
        fetched: Whether all bytes are on this machine.
        came: Bytes that have come from the Hub.
        to_come: Bytes that come from there in all.
        read: Slices read so far.
    """

    name: str
    bytes: int
    terms: int
    future: Future[Any] = field(default_factory=Future)
    users: int = 0
    fetched: bool = False
    came: int = 0
    to_come: int = 0
    read: int = 0

    @property
    def share(self) -> float | None:
        """How much of the bytes has come, then how much of the model is made, 0 to 1; None while that cannot be known."""
        if not self.fetched:
            return min(self.came / self.to_come, 1.0) if self.to_come else None
        return min(self.read / self.terms, 1.0)

    def more(self, count: int) -> None:
        """Note bytes that came."""
        self.came += count

    def arrived(self) -> None:
        """Note that all bytes are there."""
        self.fetched = True

    def tick(self) -> None:
        """Note one more slice."""
        self.read += 1


class ModelCache:
    """Models by size, in no more than so many bytes; the one whose last use is oldest goes first, never one in use.

    One model is made at a time, on a thread of its own: who no longer waits for it is free, and it is there for the next one.
    """

    def __init__(self, picker: Picker, limit: int, dtype: Any = None, make: Callable[[int, Loading], Any] | None = None) -> None:
        self.picker, self.limit = picker, limit
        config = anchor_config(picker.files, picker.manifest.anchors[0])
        own = config.dtype or torch.float32
        self.dtype = weight_dtype(dtype, own if quick(own) or 4 * picker.largest > limit else torch.float32)
        self._make = make or self._load
        self._held: OrderedDict[int, Loading] = OrderedDict()
        self._lock = threading.RLock()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="cbd-load")

    def _load(self, size: int, entry: Loading) -> Any:
        plan = self.picker.plan(size)
        entry.to_come = sum(plan_costs(self.picker.files, plan).get("bytes_to_fetch", {}).values())
        with counted(entry.more):
            model = load(self.picker.chain.files, plan, fetched=entry.arrived, tick=entry.tick, dtype=self.dtype)
        return model.to(best_device())

    @property
    def bytes(self) -> int:
        """Bytes of the weights that are held or on their way."""
        with self._lock:
            return sum(entry.bytes for entry in self._held.values())

    @property
    def sizes(self) -> list[int]:
        """Sizes that are held or on their way, the oldest use first."""
        with self._lock:
            return list(self._held)

    @contextmanager
    def hold(self, sizes: Sequence[int]) -> Iterator[list[Loading]]:
        """Hold models inside the block; each is there when its future is done.

        Raises:
            ArgumentError: If they are more than the bound allows at all.
            BusyError: If others are using too much of it now.
        """
        entries = self._take(sizes)
        try:
            yield entries
        finally:
            with self._lock:
                for entry in entries:
                    entry.users -= 1

    def _take(self, sizes: Sequence[int]) -> list[Loading]:
        wanted = {size: size * self.dtype.itemsize for size in dict.fromkeys(sizes)}
        if sum(wanted.values()) > self.limit:
            names = " and ".join(format_size(size) for size in wanted)
            raise ArgumentError(
                f"{names} take {format_bytes(sum(wanted.values()))} and this Space holds {format_bytes(self.limit)} at a time; choose smaller sizes"
                + (", or fewer of them" if len(wanted) > 1 else "")
            )
        with self._lock:
            missing = sum(count for size, count in wanted.items() if size not in self._held)
            free = self.limit - sum(entry.bytes for entry in self._held.values())
            idle = {size: entry for size, entry in self._held.items() if size not in wanted and not entry.users and not entry.future.running()}
            if free + sum(entry.bytes for entry in idle.values()) >= missing:  # or it would throw out models and still refuse
                for size, entry in idle.items():
                    if free >= missing:
                        break
                    if entry.future.done() or entry.future.cancel():
                        del self._held[size]
                        free += entry.bytes
            if free < missing:
                raise BusyError("the Space is busy with other sizes; try again in a moment, or choose a smaller size")
            entries = [self._entry(size, count) for size, count in wanted.items()]
            for entry in entries:
                entry.users += 1
        return entries

    def _entry(self, size: int, count: int) -> Loading:
        """The entry of a size, made and its load begun where there is none; the lock is held."""
        entry = self._held.pop(size, None)
        if entry is None:
            terms = sum(len(terms) for terms in self.picker.plan(size).tensors.values())
            entry = self._held[size] = Loading(format_size(size), count, terms)
            entry.future = self._loader.submit(self._make, size, entry)
            entry.future.add_done_callback(lambda done, size=size, entry=entry: self._forget(size, entry, done))  # type: ignore[misc]
        else:
            self._held[size] = entry
        return entry

    def _forget(self, size: int, entry: Loading, done: Future[Any]) -> None:
        """A load that failed is tried anew the next time."""
        if done.cancelled() or done.exception() is None:
            return
        with self._lock:
            if self._held.get(size) is entry:
                del self._held[size]
