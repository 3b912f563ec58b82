"""The chunks of a remote file that are needed and no others: ranges fetched in parallel into a sparse file that later reads add to.

The sparse file has the remote one's length and lies in the cache under its hash, so that equal files of several repos are one. A chunk
is there when its bytes hash to what was recorded; nothing else is remembered, and a process killed at any instant harms nothing.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import WeakFileLock, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from cbd_hub.client import Bar, explained, headers, transport_error
from cbd_hub.errors import IntegrityError, StorageError
from cbd_hub.files import CHUNK_BYTES, CheckedFile


_JOB_CHUNKS = 16  # in one request
_CONNECTIONS = 8
_TRIES = 5
_RETRIED = (408, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0


def chunks_of(spans: Iterable[tuple[int, int]]) -> set[int]:
    """Indices of the chunks that hold stretches of bytes.

    Example:
        >>> sorted(chunks_of([(0, 8), (2**22 - 1, 2**22 + 1)]))
        [0, 1]
    """
    return {index for start, stop in spans for index in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES))}


def chunk_bytes(chunks: Iterable[int], size: int) -> int:
    """Bytes of chunks of a file of ``size`` bytes."""
    return sum(min(CHUNK_BYTES, size - index * CHUNK_BYTES) for index in chunks)


class _NoRangesError(Exception):
    """The server sends whole files only."""


@dataclass(frozen=True)
class PartialFile:
    """A remote file of which some chunks are in the cache.

    Attributes:
        repo_id: Its repo.
        revision: Commit.
        name: Its path there.
        size: Its recorded length.
        sha256: Its recorded hash.
        chunks: Recorded hash of every 4 MiB.
        token: Hub token.
        cache_dir: Another place for the Hub's cache.
        again: Fetch even what is there: over it, since another process may be reading it.
    """

    repo_id: str
    revision: str
    name: str
    size: int
    sha256: str
    chunks: list[str]
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    again: bool = False
    _came: set[int] = field(default_factory=set, init=False, repr=False, compare=False)
    _opened: dict[int, CheckedFile] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def path(self) -> Path:
        """Where the sparse file is, or will be: beside the Hub's cache where that is in its usual place, else inside of it."""
        home, cache = Path(constants.HF_HOME), Path(constants.HF_HUB_CACHE if self.cache_dir is None else self.cache_dir)
        base = home / "cbd_hub" if cache == home / "hub" else cache / ".cbd_hub"
        return base / "partial" / self.sha256 / Path(self.name).name

    def missing(self, wanted: set[int]) -> list[int]:
        """Chunks that are not there yet, rising."""
        if self.again:
            return sorted(wanted - self._came)
        try:
            state = self.path.stat()
        except FileNotFoundError:
            return sorted(wanted)
        if state.st_size != self.size:
            return sorted(wanted)
        absent = self._holes(wanted)
        checked = self._opened.get(state.st_mtime_ns) or CheckedFile(self.path, self.size, self.chunks)
        self._opened[state.st_mtime_ns] = checked
        wrong = checked.wrong(wanted - absent)
        checked.remember()
        return sorted(absent | wrong)

    def _holes(self, wanted: set[int]) -> set[int]:
        """Chunks without any data on disk, which need no hashing."""
        holes = set()
        with self.path.open("rb") as file:
            for index in wanted:
                start = index * CHUNK_BYTES
                try:
                    first = os.lseek(file.fileno(), start, os.SEEK_DATA)
                except OSError as error:
                    first = self.size if error.errno == errno.ENXIO else start
                except AttributeError:  # a system that does not know holes
                    first = start
                if first >= min(start + CHUNK_BYTES, self.size):
                    holes.add(index)
        return holes

    def fetch(self, spans: Iterable[tuple[int, int]]) -> bool:
        """Bring the chunks that hold stretches of bytes, each checked before it counts as there.

        Several processes may ask at once: one fetches and the others wait.

        Returns:
            False if the server sends whole files only; nothing was fetched then.

        Raises:
            IntegrityError: If bytes differ from what was recorded.
            StorageError: If the Hub cannot be reached or refuses, or the disk is full.
        """
        wanted = chunks_of(spans)
        if not self.missing(wanted):
            return True
        with explained(self.repo_id, self.token):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(str(self.path) + ".lock"):
                missing = self.missing(wanted)
                if not missing:
                    return True
                with self.path.open("r+b" if self.path.exists() else "w+b") as file:
                    file.truncate(self.size)
                    try:
                        self._fetch(missing, file.fileno())
                    except _NoRangesError:
                        return False
        return True

    def _fetch(self, missing: list[int], handle: int) -> None:
        runs = [[index for _, index in group] for _, group in itertools.groupby(enumerate(missing), lambda pair: pair[1] - pair[0])]
        jobs = [list(job) for run in runs for job in itertools.batched(run, _JOB_CHUNKS)] if hasattr(itertools, "batched") else [
            run[start : start + _JOB_CHUNKS] for run in runs for start in range(0, len(run), _JOB_CHUNKS)
        ]
        stop = Event()
        bar = Bar(total=chunk_bytes(missing, self.size), unit="B", unit_scale=True, desc=f"{self.repo_id}/{self.name} (parts)"[-60:])
        with bar, ThreadPoolExecutor(min(_CONNECTIONS, len(jobs))) as pool:
            futures = [pool.submit(self._job, job, handle, bar, stop) for job in jobs]
            try:
                for future in futures:
                    future.result()
            finally:  # after an error or Ctrl-C the others end with the piece that they are reading
                stop.set()
                for future in futures:
                    future.cancel()

    def _job(self, job: list[int], handle: int, bar: Any, stop: Event) -> None:
        """Fetch neighbouring chunks in one request, and what a broken connection left out in further ones, until told to stop."""
        tries = 0
        while job and not stop.is_set():
            try:
                done = self._request(job, handle, bar, stop)
                wait = 0.0
            except Exception as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                if tries + 1 >= _TRIES or not (transport_error(error) or status in _RETRIED):
                    raise
                done, wait = 0, _wait(error, tries)
            tries = 0 if done else tries + 1
            job = job[done:]
            if job and tries >= _TRIES:
                raise StorageError(f"{self.repo_id}: the connection breaks before 4 MiB of {self.name} have come; check the network and try again")
            stop.wait(wait)

    def _request(self, job: list[int], handle: int, bar: Any, stop: Event) -> int:
        """Write the chunks that come, each checked; how many came whole before the end or a broken connection."""
        start, end = job[0] * CHUNK_BYTES, min((job[-1] + 1) * CHUNK_BYTES, self.size)
        url = hf_hub_url(self.repo_id, self.name, revision=self.revision)
        asked = {**headers(self.token), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        done, buffer = 0, bytearray()
        try:
            with get_session().stream("GET", url, headers=asked, follow_redirects=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
                if response.status_code == 416:
                    raise IntegrityError(f"{self.repo_id}/{self.name} is shorter than the recorded {self.size:,} bytes; it was replaced or cut short: tell its owner")
                if response.status_code not in (200, 206):
                    response.read()
                hf_raise_for_status(response)
                if response.status_code != 206:
                    raise _NoRangesError
                if response.headers.get("Content-Range") != f"bytes {start}-{end - 1}/{self.size}":
                    raise IntegrityError(
                        f"{self.repo_id}/{self.name} answered bytes {response.headers.get('Content-Range')} where {start}-{end - 1}/{self.size} were asked; it was replaced: "
                        "fetch the chain again or tell its owner"
                    )
                for piece in response.iter_raw():  # as it comes: nothing that was packed small grows in memory
                    if stop.is_set():
                        break
                    if done == len(job):
                        raise IntegrityError(f"{self.repo_id}/{self.name} answers with more bytes than were asked; its server cannot be trusted: tell its owner")
                    buffer += piece
                    while done < len(job) and len(buffer) >= (length := min(CHUNK_BYTES, self.size - job[done] * CHUNK_BYTES)):
                        self._keep(job[done], bytes(buffer[:length]), handle)
                        del buffer[:length]
                        done += 1
                        bar.update(length)
        except Exception as error:
            if not (done and transport_error(error)):
                raise
        return done

    def _keep(self, index: int, data: bytes, handle: int) -> None:
        if hashlib.sha256(data).hexdigest() != self.chunks[index]:
            raise IntegrityError(
                f"{self.repo_id}/{self.name} differs from its recorded hash in bytes {index * CHUNK_BYTES:,} and on; it was changed or damaged: tell its owner"
            )
        offset = index * CHUNK_BYTES
        while data:
            written = os.pwrite(handle, data, offset)
            data, offset = data[written:], offset + written
        self._came.add(index)


def _wait(error: BaseException, tries: int) -> float:
    """Seconds before the next try: what the server asks for, else ever longer."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(asked) if asked.isascii() and asked.isdigit() else 0.5 * 2**tries, _LONGEST_WAIT)
