"""The official Hub client under our name, and its errors in our words, without a token in any of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, tqdm  # type: ignore[attr-defined]

from cbd_hub.errors import CBDError, IntegrityError, ManifestError, StorageError


NAME: dict[str, Any] = {"library_name": "cbd-hub", "library_version": version("cbd-hub")}
_TRANSPORT = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")  # whichever the client's version stands on


def api(token: str | bool | None = None) -> HfApi:
    """The client."""
    return HfApi(token=token, **NAME)


def headers(token: str | bool | None = None) -> dict[str, str]:
    """Headers of a request of our own."""
    return build_hf_headers(token=token, **NAME)


TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_counter: ContextVar[Callable[[int], None] | None] = ContextVar("counter", default=None)


@contextmanager
def counted(came: Callable[[int], None]) -> Iterator[None]:
    """A block in which ``came`` hears of the bytes of each file that this thread fetches, whether bars are shown or not."""
    token = _counter.set(came)
    try:
        yield
    finally:
        _counter.reset(token)


class Bar(tqdm):
    """The client's progress bar, which also tells who counts the bytes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._counter = _counter.get()
        super().__init__(*args, **kwargs)
        self._tell(kwargs.get("initial") or 0)

    def update(self, n: float | None = 1) -> bool | None:
        """Count bytes that came."""
        self._tell(n or 0)
        return super().update(n)

    def update_transfer(self, n: float | None = 1) -> None:
        """Bytes of the network, which of hf-xet are not those of the file: not counted. That it is there spares a second bar for them."""

    def set_transfer_postfix_str(self, text: str = "", refresh: bool = True) -> None:
        """Their rate, which is not shown."""

    def _tell(self, count: float) -> None:
        if self._counter is not None:
            self._counter(int(count))


def transport_error(error: BaseException) -> bool:
    """Whether a connection failed: the client's versions have different classes for it."""
    return type(error).__module__.split(".")[0] in _TRANSPORT


def reason(error: BaseException, token: Any = None) -> str:
    """The first line of an error's text, without tokens and without what follows a URL's question mark."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "hf_***")
    text = TOKEN.sub("hf_***", re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text))
    return text[:200]


@contextmanager
def explained(repo_id: str, token: Any = None, *, pushing: bool = False) -> Iterator[None]:
    """Turn the client's errors into ours.

    Raises:
        ManifestError: If there is no such repo or revision that this account can see.
        IntegrityError: If the repo lacks a file.
        StorageError: If it is gated, the Hub cannot be reached, refuses, or the disk is full.
    """
    try:
        yield
    except CBDError:
        raise
    except Exception as error:
        # With force_download the client raises a ValueError whose cause is what happened.
        found = _explained(repo_id, error.__cause__ if type(error) is ValueError and error.__cause__ is not None else error, token, pushing)
        if found is None:
            raise
        raise found from error


def _explained(repo_id: str, error: BaseException, token: Any, pushing: bool) -> CBDError | None:
    why = reason(error, token)
    if isinstance(error, GatedRepoError):
        return StorageError(f"{repo_id} is gated; ask for access on its page and log in with `hf auth login`")
    if isinstance(error, RevisionNotFoundError):
        return ManifestError(f"{repo_id} has no such revision ({why}); look at its branches and tags on its page")
    if isinstance(error, LocalEntryNotFoundError):
        cause = reason(error.__cause__ or error, token)
        return StorageError(f"{repo_id} is not in the cache and the Hub cannot be reached ({cause}); check the network or the path")
    if isinstance(error, EntryNotFoundError):
        return IntegrityError(f"{repo_id} lacks a file ({why}); fetch the chain again or tell its owner")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        if pushing:
            return StorageError(f"cannot push to {repo_id}: no such repo that this account may write; check the name, or log in with `hf auth login`")
        return ManifestError(f"{repo_id} is not a folder here and no repo on the Hub that this account can see; check the name, or log in with `hf auth login`")
    if isinstance(error, (HfHubHTTPError, OSError)) or transport_error(error):
        return _storage(repo_id, error, token, pushing)
    return None


def _storage(repo_id: str, error: BaseException, token: Any, pushing: bool) -> StorageError:
    why = reason(error, token)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if pushing:
        if status == 412:
            return StorageError(f"{repo_id} has changed meanwhile ({why}); nothing was written over, run the same command again")
        return StorageError(f"cannot push to {repo_id} ({why}); check the name, log in with `hf auth login`, and push again: it goes on where it stopped")
    if status in (401, 403):
        return StorageError(f"{repo_id}: the Hub refuses this account or its token ({why}); log in anew with `hf auth login`, or pass another token")
    if isinstance(error, OSError) and getattr(error, "errno", None) is not None:
        return StorageError(f"cannot keep {repo_id} in the cache ({error.strerror or why}); free or choose another disk")
    return StorageError(f"{repo_id} is not in the cache and the Hub cannot be reached ({why}); check the network or the path")

