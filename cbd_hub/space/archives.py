"""Checkpoints that visitors download, kept on disk for the next one in no more than so many bytes."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections import OrderedDict
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol


class Packs(Protocol):
    """What packs a size, and takes the archive away after the block."""

    def checkpoint(self, size: str | int) -> AbstractContextManager[Path]:
        """A zip archive of a size."""
        ...


class Archives:
    """Archives by size; the one whose last use is oldest goes first.

    Args:
        desk: What packs them.
        limit: Bytes on disk. The one that is asked for is there however large it is.
    """

    def __init__(self, desk: Packs, limit: int) -> None:
        self.desk, self.limit = desk, limit
        self._held: OrderedDict[int, Path] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, size: int, folder: Path) -> Path:
        """The archive of a size, made in a folder where it is not there yet."""
        with self._lock:
            self._held = OrderedDict((held, path) for held, path in self._held.items() if path.is_file())
            if size not in self._held:
                with self.desk.checkpoint(size) as archive:
                    self._make_room(archive.stat().st_size)
                    place = Path(tempfile.mkdtemp(prefix="cbd-", dir=folder)) / archive.name
                    shutil.move(archive, place)
                self._held[size] = place
            self._held.move_to_end(size)
            return self._held[size]

    def _make_room(self, needed: int) -> None:
        while self._held and sum(path.stat().st_size for path in self._held.values()) + needed > self.limit:
            _, oldest = self._held.popitem(last=False)
            shutil.rmtree(oldest.parent, ignore_errors=True)
