"""What lies on the Hub or in a folder, and the one place that knows whether a chain is a local folder or a repo."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from cbd_hub.client import NAME, Bar, api, explained
from cbd_hub.errors import ArgumentError, CBDError, IntegrityError, ManifestError, StorageError, one_line
from cbd_hub.files import CHUNK_BYTES, check_file, inside, sha256
from cbd_hub.manifest import FILE_NAME, MAX_BYTES, Anchor, Manifest, PathRecord
from cbd_hub.ranges import PartialFile


logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt",
)
KEPT_FILE = "cbd_kept.tensors"  # of a model that was cut; in the format of .safetensors, which who reads all of a folder would take for weights
# What is taken over from a checkpoint: nothing that could be code or a pickle.
CHECKPOINT_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES)

_LONG = 3.0  # seconds for a first answer of the Hub
_OTHER_WEIGHTS = ["consolidated*.safetensors"]  # the same weights once more in Mistral's own format


@dataclass(frozen=True)
class ChainFiles:
    """The files of a chain, wherever they are; those on the Hub are fetched when they are asked for, at pinned commits.

    Attributes:
        manifest: The validated chain.json.
        root: Folder that holds chain.json.
        name: What the user called the chain.
        revision: Commit of the index repo; None for a local folder.
        options: ``token``, ``cache_dir``, ``local_files_only`` and ``force_download`` for downloads.
        glance: Whether an anchor's preview in chain.json will do for its config, as for a plan.
    """

    manifest: Manifest
    root: Path
    name: str
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    glance: bool = False
    _here: dict[tuple[str, str, str], Path] = field(default_factory=dict, init=False, repr=False, compare=False)
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @functools.cached_property
    def glanced(self) -> ChainFiles:
        """The same chain at a glance."""
        return self if self.glance else replace(self, glance=True)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made once for this opened chain; not to be changed by who gets it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _fetch(self, repo_id: str, path: str, revision: str, limit: int = MAX_BYTES) -> Path:
        """A file of a pinned commit: looked for once."""
        key = (repo_id, path, revision)
        if key not in self._here:
            self._here[key] = fetch(repo_id, path, revision, self.options, limit)
        return self._here[key]

    def _sound(self, repo_id: str, path: str, revision: str, check: Callable[[Path], None], limit: int = MAX_BYTES) -> Path:
        """A file of a pinned commit that passes a check; fetched once more where a cache or a download was damaged."""
        found = self._fetch(repo_id, path, revision, limit)
        try:
            check(found)
        except IntegrityError:
            if self.options.get("local_files_only") or constants.HF_HUB_OFFLINE:
                raise
            found = fetch(repo_id, path, revision, {**self.options, "force_download": True}, limit)
            check(found)
        return found

    def remote(self, anchor: Anchor) -> tuple[str, str, str] | None:
        """Repo, commit and prefix of an anchor's paths; None where its files are local."""
        location = anchor.location
        prefix = f"{location.subfolder}/" if location.subfolder else ""
        if location.repo_id == ".":
            return None if self.revision is None else (self.name, self.revision, prefix)
        assert location.revision is not None  # the manifest says so
        return location.repo_id, location.revision, prefix

    def checked(self, anchor: Anchor, path: str) -> Path:
        """A small file of an anchor, its hash checked.

        Raises:
            IntegrityError: If it is missing, has no record or differs from it.
        """
        if path not in anchor.files:
            raise IntegrityError(f"anchor {anchor.name} of {self.name} has no record of {path}; fetch or make the chain again")
        record = anchor.files[path]
        found = self.path(anchor, path)
        check_file(found, record.sha256, record.bytes)
        return found

    def path(self, anchor: Anchor, name: str) -> Path:
        """Where an anchor's file is; if it is remote it is fetched whole and its hash checked.

        Raises:
            IntegrityError: If a remote file differs from its record.
            ManifestError: If a symbolic link leads out of a local chain's folder.
        """
        remote = self.remote(anchor)
        if remote is None:
            return inside(self.root, f"{anchor.location.subfolder}/{name}" if anchor.location.subfolder else name)
        repo_id, revision, prefix = remote
        record = anchor.files.get(name)
        if record is None:
            return self._fetch(repo_id, prefix + name, revision)
        return self._sound(repo_id, prefix + name, revision, lambda path: check_file(path, record.sha256, record.bytes), record.bytes)

    def config_folder(self, anchor: Anchor) -> Path:
        """A folder with an anchor's config.json, checked; from its preview at a glance."""
        if not self.glance or anchor.preview is None or self.cached(anchor, "config.json") is not None or self.remote(anchor) is None:
            return self.checked(anchor, "config.json").parent
        key = (anchor.name, "config.json", "preview")
        if key not in self._here:
            folder = tempfile.TemporaryDirectory(prefix="cbd-")
            weakref.finalize(self, folder.cleanup)
            (Path(folder.name) / "config.json").write_text(anchor.preview.config)
            self._here[key] = Path(folder.name)
        return self._here[key]

    def cached(self, anchor: Anchor, name: str) -> Path | None:
        """A remote anchor's file if the standard cache has it whole."""
        remote = self.remote(anchor)
        if remote is None or self.options.get("force_download"):
            return None
        repo_id, revision, prefix = remote
        found = try_to_load_from_cache(repo_id, prefix + name, cache_dir=self.options.get("cache_dir"), revision=revision)
        return Path(found) if isinstance(found, str) else None

    def partial(self, anchor: Anchor, name: str, *, hashes: bool = True) -> PartialFile:
        """A remote anchor's weight file as one that is fetched in parts; without hashes nothing can be fetched, but its place is known."""
        remote, record = self.remote(anchor), anchor.files[name]
        assert remote is not None
        repo_id, revision, prefix = remote
        listed = self.chunks(anchor).get(name, []) if hashes else []
        if hashes and len(listed) != -(-record.bytes // CHUNK_BYTES):
            raise IntegrityError(f"anchor {anchor.name} of {self.name} has {len(listed)} chunk hashes for the {record.bytes:,} bytes of {name}; fetch the chain again")
        return PartialFile(
            repo_id, revision, prefix + name, record.bytes, record.sha256, listed, self.options.get("token"), self.options.get("cache_dir"), bool(self.options.get("force_download"))
        )

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files as the first anchor has them on record: those beside chain.json, else its own.

        Who was killed while a local chain got another first anchor leaves others beside chain.json, or some of both.

        Raises:
            IntegrityError: If one differs from its record.
        """
        first = self.manifest.anchors[0]
        recorded = [name for name in TOKENIZER_FILES if name in first.files]
        if self.revision is not None:
            checks = {name: functools.partial(check_file, recorded=first.files[name].sha256, size=first.files[name].bytes) for name in recorded}
            return [self._sound(self.name, name, self.revision, check) for name, check in checks.items()]
        beside = {name: path for name in TOKENIZER_FILES if (path := inside(self.root, name)).is_file()}
        if beside.keys() == {*recorded}:
            with suppress(IntegrityError):
                for name, path in beside.items():
                    check_file(path, first.files[name].sha256, first.files[name].bytes)
                return list(beside.values())
        return [self.checked(first, name) for name in recorded]

    def extra(self, name: str) -> Path | None:
        """A file beside chain.json that need not be there and of which there is no record."""
        if self.revision is None:
            return inside(self.root, name) if inside(self.root, name).is_file() else None
        if self.options.get("local_files_only") or constants.HF_HUB_OFFLINE:  # the cache need not know of it
            found = try_to_load_from_cache(self.name, name, cache_dir=self.options.get("cache_dir"), revision=self.revision)
            return Path(found) if isinstance(found, str) else None
        try:
            return self._fetch(self.name, name, self.revision)
        except IntegrityError:
            return None

    def side_file(self, record: PathRecord) -> Path:
        """A file beside chain.json, its hash checked.

        Raises:
            IntegrityError: If it is missing or differs from its record.
        """
        def check(path: Path) -> None:
            if not path.is_file():
                raise IntegrityError(f"{path} is missing; fetch or make the chain again")
            try:
                found = sha256(path)
            except OSError as error:
                raise StorageError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
            if found != record.sha256:
                raise IntegrityError(f"{path} differs from its recorded hash; it was changed or damaged: fetch or make the chain again")

        if self.revision is not None:
            # maps are matrices of widths and orders of units: never as many numbers as the largest anchor has
            return self._sound(self.name, record.path, self.revision, check, MAX_BYTES + 4 * self.manifest.anchors[0].parameters)
        path = inside(self.root, record.path)
        check(path)
        return path

    def chunks(self, anchor: Anchor) -> dict[str, list[str]]:
        """Recorded hashes of every 4 MiB of an anchor's weight files."""
        if anchor.chunks is None:
            raise IntegrityError(f"anchor {anchor.name} of {self.name} has no chunk hashes; fetch or make the chain again")
        record = anchor.chunks
        listed: dict[str, list[str]] = self.once(("chunks", record), lambda: self._chunks(record))
        return listed

    def _chunks(self, record: PathRecord) -> dict[str, list[str]]:
        path = self.side_file(record)
        try:
            listed = json.loads(path.read_bytes())["files"]
            return {str(name): [str(value) for value in values] for name, values in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(f"{path} is not a list of chunk hashes ({error}); fetch or make the chain again") from error


class OpenChain(Protocol):
    """A chain that is open, such as a `cbd_hub.Chain`."""

    files: ChainFiles


def local_path(name: str) -> Path:
    """The path that a name of a folder or a repo would be here.

    Raises:
        StorageError: If there can be no such path, and no such repo.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, of no user, with a null character
        raise StorageError(f"{name[:80]} is neither a folder nor a Hub id ({one_line(error)}); check the path") from error
    return path


def open_chain(
    chain: str | os.PathLike[str] | OpenChain | ChainFiles, *, revision: str | None = None, token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None, local_files_only: bool = False, force_download: bool = False,
) -> ChainFiles:
    """The files of a chain: a local folder, or a Hub repo, of which chain.json is fetched.

    Args:
        chain: Folder or repo id; one that is open (a `Chain`, or its files) is given back, and takes none of the options.
        revision: Branch, tag or commit of the index repo.
        token: Hub token; None for the stored one.
        cache_dir: Another place for the Hub's cache.
        local_files_only: Use the cache and make no request.
        force_download: Fetch even what is cached.

    Raises:
        ManifestError: If there is no such chain, or its chain.json is refused.
        StorageError: If the Hub cannot be reached or refuses.
    """
    options = {
        "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only, "force_download": force_download,
    }
    chain = getattr(chain, "files", chain)
    if isinstance(chain, ChainFiles):
        given = [name for name, value in {"revision": revision, **options}.items() if value not in (None, False)]
        if given:
            raise ArgumentError(f"{chain.name} is open already, and {given[0]}= says how a chain is opened; give it to Chain.from_pretrained")
        return chain
    if not isinstance(chain, (str, os.PathLike)):
        raise ArgumentError(f"chain is a {type(chain).__name__}; give a folder, a Hub id or an open Chain")
    name = os.fspath(chain)
    if local_files_only and force_download:
        raise ArgumentError("local_files_only=True and force_download=True contradict each other; leave one of them out")
    folder = local_path(name)
    if folder.is_dir():
        if revision is not None:
            raise ArgumentError(f"revision={revision!r} has no meaning for the local folder {name}; leave it out")
        return ChainFiles(Manifest.read(folder), folder.absolute(), name, None, options)
    if folder.is_file() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ManifestError(f"{name} is neither a folder nor a Hub id such as org/chain; check the path, or make a chain with `cbd distill`")
    try:
        with _patience(name):
            root = fetch(name, FILE_NAME, revision, options, MAX_BYTES).parent
    except IntegrityError as error:
        raise ManifestError(f"{name} is a repo without {FILE_NAME}, so it is no chain; is it one of a chain's anchors?") from error
    return ChainFiles(Manifest.read(root), root, name, root.name, options)


@contextmanager
def _patience(name: str) -> Iterator[None]:
    """Say that a name was taken for one on the Hub, where that takes long: it may be a path with a mistake, and the client asks again and again before it gives up."""
    said = threading.Timer(_LONG, logger.warning, ("%s is no folder here; it is being asked for on the Hub", name))
    said.daemon = True
    said.start()
    try:
        yield
    finally:
        said.cancel()


def fetch(repo_id: str, path: str, revision: str | None, options: dict[str, Any], limit: int | None = None) -> Path:
    """One file of a repo, in the standard cache; one of more than ``limit`` bytes is refused before its body is read.

    Raises:
        ManifestError: If the repo or the revision does not exist.
        IntegrityError: If it lacks the file, or the file is too long.
        StorageError: If it is gated, offline, or the Hub cannot be reached.
    """
    with explained(repo_id, options.get("token")):
        bar = Bar if limit is None else _bar_up_to(limit, f"{repo_id}/{path}", ManifestError if path == FILE_NAME else IntegrityError)
        return Path(hf_hub_download(repo_id, path, revision=revision, tqdm_class=bar, **options, **NAME))


def _bar_up_to(limit: int, name: str, kind: type[CBDError]) -> type[Bar]:
    """A progress bar that ends a download of too many bytes: the client asks it before it reads a body, and for every piece."""

    class Bounded(Bar):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._came, self.disable = 0, True  # as a bar that is refused must be, to be thrown away
            self._check(kwargs.get("total") or 0)
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            self._came += int(n or 0)
            self._check(self._came)
            return super().update(n)

        def _check(self, size: float) -> None:
            if size > limit:
                raise kind(f"{name} has {int(size):,} bytes or more where {limit:,} are the most that it may have; it is refused, nothing was kept")

    return Bounded


def download(repo_id: str, revision: str | None, patterns: list[str], options: dict[str, Any], *, folders: bool = True) -> Path:
    """The folder of a repo's files that match the patterns, in folders of it too if ``folders``, in the standard cache.

    Raises:
        ManifestError: If the repo does not exist, or the id is none.
        StorageError: If it is gated, offline, or the Hub cannot be reached.
    """
    with explained(repo_id, options.get("token")):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=[*_OTHER_WEIGHTS, *([] if folders else ["*/*"])], **options, **NAME))


def resolve_checkpoint(
    checkpoint: str | os.PathLike[str], revision: str | None = None, options: Mapping[str, Any] | None = None, *, weights: bool = True
) -> Path:
    """The local folder of a checkpoint: a folder, or a Hub id that is fetched.

    Args:
        checkpoint: Folder or repo id.
        revision: Branch, tag or commit of a repo.
        options: ``token``, ``cache_dir``, ``local_files_only`` and ``force_download``.
        weights: Whether the weights are wanted too.

    Raises:
        ArgumentError: If a folder comes with a revision.
        StorageError: If there is neither.
    """
    name = os.fspath(checkpoint)
    folder = local_path(name)
    if folder.is_dir():
        if revision is not None:
            raise ArgumentError(f"revision={revision!r} has no meaning for the local folder {name}; leave it out")
        return folder
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if not name or folder.exists() or os.fspath(checkpoint).startswith((".", "/", "~")):
        raise StorageError(f"{checkpoint} is neither a model folder nor a Hub id; check the path")
    return download(name, revision, [*(["*.safetensors", "README.md", KEPT_FILE] if weights else []), *CHECKPOINT_FILES], dict(options or {}), folders=False)


def is_repo_id(name: str) -> bool:
    """Whether a text is a Hub id with its namespace, and no folder here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)) and not Path(name).exists()


def check_repo_id(name: str) -> None:
    """Refuse a name that no repo can have, or that has no namespace, before the work is done that it is for.

    Raises:
        ArgumentError: If it is none.
    """
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("it has no namespace")
    except HFValidationError as error:
        raise ArgumentError(f'"{name}" cannot be the name of a repo ({str(error)[:120]}); give one such as "org/NAME" of letters, digits, ".", "_" and "-", at most 96') from error


def reachable(timeout: float = 5.0) -> bool:
    """Whether the Hub answers within ``timeout`` seconds; False at once in offline mode."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        api().model_info("HuggingFaceTB/SmolLM2-135M-Instruct", timeout=timeout)
    except Exception:  # any transport's way to say no
        return False
    return True
