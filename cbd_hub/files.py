"""Files that are either whole or not there, and bytes that are the recorded ones.

Everything is written aside and renamed. What is read is checked against recorded hashes; a verdict is remembered by path, size
and modification time, so that a second read pays nothing.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import constants
from safetensors import SafetensorError

from cbd_hub.errors import CBDError, IntegrityError, ManifestError, StorageError, one_line


try:
    import fcntl
except ImportError:  # no POSIX: what a killed process wrote aside stays
    fcntl = None  # type: ignore[assignment]

CHUNK_BYTES = 4 * 2**20
ASIDE = ".cbd-part"  # ends the name of what is being written
LOCK = "lock"  # in a work folder that one process has
_YOUNG = 3600  # seconds; the lock of a folder on a network may be known to one machine alone
_REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE,
}
_LAST = "chain.json"  # a chain that has one is whole


def disk_error(error: BaseException) -> bool:
    """Whether an error says that a disk is full or refuses, and not that a file or a network is not there; torch and safetensors have texts of their own for it."""
    if isinstance(error, OSError):
        return error.errno in _REFUSALS
    return any(sign in str(error) for sign in ("os error", "inline_container", "No space left", "PytorchStreamWriter"))


@contextmanager
def disk_told(target: Path, todo: str = "free or choose another disk and run again, it goes on") -> Iterator[None]:
    """Say in words of ours that the disk is full or refuses.

    Args:
        target: What is made.
        todo: What to do then.

    Raises:
        StorageError: If so.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have kinds of their own for a full disk
        if isinstance(error, CBDError) or not disk_error(error):
            raise
        raise StorageError(f"cannot write {target}: {getattr(error, 'strerror', None) or one_line(error)}; {todo}") from error


def check_absent(target: Path) -> None:
    """Refuse a folder to make that is there and not empty, but for what a process that was killed wrote aside, or that could not be written to.

    Raises:
        StorageError: If it is in the way, or what it would be made in is no folder or not to be written to.
    """
    target = Path(os.path.realpath(target.expanduser()))
    if target.exists() and (not target.is_dir() or any(not path.name.endswith(ASIDE) for path in target.iterdir())):
        raise StorageError(f"{target} already exists and is not an empty folder; choose another place or remove it")
    above = next(place for place in (target, *target.parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise StorageError(f"{target} cannot be made: {above} is {'no folder' if not above.is_dir() else 'not to be written to'}; choose another place or check its permissions")


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``target`` when the block ends well, and is removed when it does not. Its files may be read by all.

    What a process that was killed an hour ago or more has left of the same target is removed too, where the file system tells that it has ended.

    Args:
        target: The folder to make: absent or empty.

    Raises:
        StorageError: If the target is in the way, or the disk is full or refuses.
    """
    target = Path(os.path.realpath(target.expanduser()))
    check_absent(target)
    staging: Path | None = None
    claim: int | None = None
    try:
        with disk_told(target, "nothing was left behind, free or choose another disk"):
            # A folder that is there already may be a mount point, which cannot be replaced: what is made moves into it.
            place = target if target.is_dir() else target.parent
            place.mkdir(parents=True, exist_ok=True)
            for left in place.glob(f".{glob.escape(target.name)}.*{ASIDE}"):
                _remove_abandoned(left)
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=ASIDE, dir=place))
            claim = _claimed(staging)
            staging.chmod(0o755)
            yield staging
            for path in staging.rglob("*"):
                if path.is_file():
                    path.chmod(0o644)  # some libraries write for their user alone
            if place == target:
                for path in sorted(staging.iterdir(), key=lambda path: path.name == _LAST):
                    os.replace(path, target / path.name)
            else:
                os.replace(staging, target)
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging, ignore_errors=True)
        if claim is not None:
            os.close(claim)


def _claimed(folder: Path) -> int | None:
    """A handle of a folder that no other process has while it is open, however this one ends; None where another has it, or the file system knows no such thing."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_abandoned(folder: Path) -> None:
    """Remove a folder that a process wrote aside, where nothing was written to it for an hour and no process claims it any more."""
    with suppress(OSError):
        latest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
        if time.time() - latest > _YOUNG and (claim := _claimed(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(claim)


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes out of a folder inside the block; a process that ends in any way lets go.

    Args:
        folder: Where the lock is kept; made where it is not there.
        what: What to say is in use.

    Raises:
        StorageError: If another process has it, or the disk refuses.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise StorageError(f"{what} is being written by another process; wait until it ends, or choose another folder") from error
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror or error}; free or choose another disk") from error
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, aside and rename it into place.

    Raises:
        StorageError: If the disk is full or refuses; the old file is then still there.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file aside and rename it into place.

    Raises:
        StorageError: If the disk is full or refuses; the old file is then still there.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=ASIDE, dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; free or choose another disk") from error
    finally:
        if temporary is not None and temporary.exists():
            temporary.unlink()


def sha256(path: Path) -> str:
    """Hash of a whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def chunk_hashes(path: Path) -> list[str]:
    """Hash of every 4 MiB of a file, in order; the last chunk may be shorter."""
    with path.open("rb") as file:
        return [hashlib.sha256(chunk).hexdigest() for chunk in iter(lambda: file.read(CHUNK_BYTES), b"")]


def check_file(path: Path, recorded: str, size: int) -> None:
    """Compare a whole file with its recorded length and hash.

    Raises:
        IntegrityError: If it is missing or differs.
    """
    _check_size(path, size)
    verdicts = Verdicts(path, recorded)
    if 0 not in verdicts.known:
        found = sha256(path)
        if found != recorded:
            raise IntegrityError(f"{path} has sha256 {found[:12]}... but {recorded[:12]}... was recorded; it was changed or damaged: fetch it again")
        verdicts.known.add(0)
        verdicts.save()


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise IntegrityError(f"{path} is missing; fetch or make the chain again")
    if path.stat().st_size != size:
        raise IntegrityError(f"{path} has {path.stat().st_size:,} bytes but {size:,} were recorded; it was cut short or changed: fetch it again")


class CheckedFile:
    """A weight file whose chunks are checked before they are first used.

    Args:
        path: The file.
        size: Its recorded length in bytes.
        chunks: Recorded hash of every 4 MiB.

    Raises:
        IntegrityError: If the file is missing or its length differs.
    """

    def __init__(self, path: Path, size: int, chunks: list[str]) -> None:
        _check_size(path, size)
        if len(chunks) != -(-size // CHUNK_BYTES):
            raise IntegrityError(f"{path} has {-(-size // CHUNK_BYTES)} chunks but {len(chunks)} hashes were recorded; fetch the chain again")
        self.path, self.size, self._chunks = path, size, chunks
        self._verdicts = Verdicts(path, hashlib.sha256("".join(chunks).encode()).hexdigest())
        self._lock = threading.Lock()

    def check(self, start: int, stop: int) -> None:
        """Check the chunks that hold bytes start to stop.

        Raises:
            IntegrityError: If a chunk differs from its recorded hash.
        """
        wrong = self.wrong(set(range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES))))
        if wrong:
            raise IntegrityError(
                f"{self.path} differs from its recorded hash in bytes {min(wrong) * CHUNK_BYTES:,} and on; it was changed or damaged: fetch it again"
            )

    def wrong(self, chunks: set[int]) -> set[int]:
        """Those of some chunks that differ from their recorded hash."""
        with self._lock:
            wanted, wrong = chunks - self._verdicts.known, set()
            if wanted:
                with self.path.open("rb") as file:
                    for index in sorted(wanted):
                        file.seek(index * CHUNK_BYTES)
                        if hashlib.sha256(file.read(CHUNK_BYTES)).hexdigest() != self._chunks[index]:
                            wrong.add(index)
                self._verdicts.known |= wanted - wrong
            return wrong

    def remember(self) -> None:
        """Keep the verdicts for later processes."""
        with self._lock:
            self._verdicts.save()


class Verdicts:
    """Which chunks of a file have been found right, kept in the cache by path, size and modification time."""

    def __init__(self, path: Path, expected: str) -> None:
        state = path.stat()
        self._stamp = [os.path.realpath(path), state.st_size, state.st_mtime_ns, expected]
        name = hashlib.sha256(json.dumps(self._stamp).encode()).hexdigest()[:40]
        self._store = Path(constants.HF_HOME) / "cbd_hub" / "verdicts" / f"{name}.json"
        try:
            self.known: set[int] = set(json.loads(self._store.read_bytes()))
        except (OSError, ValueError, TypeError):
            self.known = set()
        self._saved = set(self.known)

    def save(self) -> None:
        """Write the verdicts where there are new ones; a cache that cannot be written is no reason to fail."""
        if self.known == self._saved:
            return
        try:
            write_text(self._store, json.dumps(sorted(self.known)))
            self._saved = set(self.known)
        except StorageError:
            return


def inside(folder: Path, relative: str) -> Path:
    """The path of a chain's file, with links followed, refused where it leaves the folder.

    A snapshot in the Hub's cache, as ``snapshot_download`` gives it, consists of links to the blobs of its repo, and these may be links to blobs that repos share.

    Raises:
        ManifestError: If a symbolic link leads out of the folder.
    """
    root = Path(os.path.realpath(folder))
    path = os.path.realpath(folder / relative)
    places = [root]
    if root.parent.name == "snapshots":
        repo, cache = root.parents[1], root.parents[2]
        places += [repo / "blobs", *([cache / "blobs"] if (cache / "blobs" / ".huggingface-shared-blobs").is_file() else [])]
    if not any(os.path.commonpath([place, path]) == str(place) for place in places):
        raise ManifestError(f"{folder / relative} leads out of the chain's folder; it is refused")
    return Path(path)


def public(text: str) -> str:
    """A text that names no folder of this machine: of a path its last part stays."""
    return re.sub(r"^(?:[~/]|[A-Za-z]:\\\\?).*[/\\](?=[^/\\]+$)", "", text)
