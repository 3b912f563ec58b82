"""What the test Hub holds: repos with commits, branches, tags and pull requests; LFS objects; collections; faults; the request log."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path


EMPTY = "0" * 40
LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".whl")


@functools.lru_cache(maxsize=1024)
def blob_id(data: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@functools.lru_cache(maxsize=1024)
def lfs_id(data: bytes) -> str:
    """The id of a large file."""
    return hashlib.sha256(data).hexdigest()


@dataclass
class Repo:
    """A repo: commits, newest last on main, each a mapping of path to bytes."""

    commits: dict[str, tuple[str, dict[str, bytes]]] = field(default_factory=lambda: {EMPTY: ("initial commit", {})})
    branches: dict[str, str] = field(default_factory=lambda: {"main": EMPTY})
    tags: dict[str, str] = field(default_factory=dict)
    requests: list[dict] = field(default_factory=list)  # title, author and status of pull requests
    private: bool = False
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)

    def at(self, revision):
        """(commit, files) of a branch, tag, pull request or commit; None where there is none."""
        name = revision or "main"
        oid = self.branches.get(name) or self.tags.get(name) or name
        return (oid, self.commits[oid][1]) if oid in self.commits else None

    def commit(self, files, title="commit", branch="main", parent=None):
        """Add a commit to a branch and give its id."""
        parent = parent or self.branches[branch]
        text = json.dumps([parent, title, len(self.commits), {path: blob_id(data) for path, data in sorted(files.items())}])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = (title, dict(files))
        self.branches[branch] = oid
        return oid

    def merge(self, number):
        """Merge a pull request as the Hub does: its files on main."""
        self.requests[number - 1]["status"] = "merged"
        return self.commit(self.at(f"refs/pr/{number}")[1], f"merge #{number}")


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path" holds a text.

    Attributes:
        match: The text.
        times: How often.
        skip: How many matching requests pass before.
        status: Answer this instead.
        headers: With these headers.
        drop: Close the connection ``before`` the request is carried out, or ``after`` it, unanswered.
        kill: The process to kill, at the moment that ``drop`` names.
        cut: Send so many bytes of the body and close the connection.
        more: Send so many bytes more than were asked for.
        delay: Wait so many seconds before each 64 kB.
        change: Function of the body that gives another one; the ETag then changes too.
    """

    match: str = ""
    times: int = 1
    skip: int = 0
    status: int | None = None
    headers: dict = field(default_factory=dict)
    drop: str | None = None
    kill: int | None = None
    cut: int | None = None
    more: int = 0
    delay: float = 0.0
    change: object = None

    def strike(self):
        """Kill the process, if there is one to kill."""
        if self.kill:
            os.kill(self.kill, signal.SIGKILL)


@dataclass
class Entry:
    """One request of the log."""

    method: str
    path: str
    query: str
    range: str | None
    token: str | None
    port: int
    status: int = 0
    sent: int = 0


class Hub:
    """The repos and the request log."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.tokens = {"hf_test": "org", "hf_reader": "reader"}
        self.writers = {"org"}
        self.objects: dict[str, bytes] = {}
        self.collections: dict[str, dict] = {}
        self.faults: list[Fault] = []
        self.log: list[Entry] = []
        self.cdn: str | None = None
        self.multipart: int | None = None
        self.ranges = True
        self.lock = threading.RLock()

    @property
    def requests(self):
        """(method, path) of every request."""
        return [(entry.method, entry.path) for entry in self.log]

    @property
    def sent(self):
        """Bytes of files sent."""
        return sum(entry.sent for entry in self.log if entry.method == "GET" and ("/resolve/" in entry.path or entry.path.startswith("/cdn/")))

    def forget(self):
        """Empty the log."""
        self.log.clear()

    def fail(self, match="", **what):
        """Let a request go wrong; see `Fault`."""
        self.faults.append(Fault(match, **what))

    def fault(self, line):
        """The fault that a request meets, if any."""
        with self.lock:
            for fault in self.faults:
                if fault.match in line and fault.times > 0:
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def upload_folder(self, repo_id, folder):
        """Put a local folder into a repo and give the commit."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}
        return self.repos.setdefault(repo_id, Repo()).commit(files)

    def entry(self, path, data):
        """A file as the tree lists it."""
        listed = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
        if path.endswith(LFS_SUFFIXES):
            listed["lfs"] = {"oid": lfs_id(data), "size": len(data), "pointerSize": 134}
        return listed

    @contextlib.contextmanager
    def counted(self):
        """The requests of a block: a list that is filled when it ends."""
        found, start = [], len(self.log)
        yield found
        found.extend(self.log[start:])
