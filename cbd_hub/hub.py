"""All transfer from the Hub, and the one place that knows whether a chain is a local folder or a repo."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from cbd_hub.errors import ArgumentError, IntegrityError, ManifestError, StorageError
from cbd_hub.files import check_file, sha256
from cbd_hub.manifest import FILE_NAME, Anchor, Manifest, PathRecord, inside


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt",
)
# What is taken over from a checkpoint: nothing that could be code or a pickle.
CHECKPOINT_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES)


@dataclass(frozen=True)
class ChainFiles:
    """The files of a chain, wherever they are.

    Attributes:
        manifest: The validated chain.json.
        root: Folder that holds chain.json.
        name: What the user called the chain.
        revision: Commit of the index repo; None for a local folder.
        options: ``token``, ``cache_dir``, ``local_files_only`` and ``force_download`` for downloads of anchors.
    """

    manifest: Manifest
    root: Path
    name: str
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def anchor_folder(self, anchor: Anchor) -> Path:
        """The folder of an anchor's files, downloaded whole at its pinned commit where it is remote."""
        location = anchor.location
        if location.repo_id == ".":
            return inside(self.root, location.subfolder) if location.subfolder else self.root
        patterns = [f"{location.subfolder}/{path}" if location.subfolder else path for path in anchor.files]
        folder = download(location.repo_id, location.revision, patterns, self.options)
        return folder / location.subfolder if location.subfolder else folder

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
        """Where an anchor's file is.

        Raises:
            ManifestError: If a symbolic link leads out of a local chain's folder.
        """
        if anchor.location.repo_id == "." and self.revision is None:
            return inside(self.root, f"{anchor.location.subfolder}/{name}" if anchor.location.subfolder else name)
        return self.anchor_folder(anchor) / name  # the Hub's cache is made of links

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files beside chain.json, each the one that the first anchor has on record.

        Raises:
            IntegrityError: If one has no record or differs from it.
        """
        found = []
        for name in TOKENIZER_FILES:
            path = inside(self.root, name) if self.revision is None else self.root / name
            if not path.is_file():
                continue
            record = self.manifest.anchors[0].files.get(name)
            if record is None:
                raise IntegrityError(f"{path} has no record in {FILE_NAME}; fetch or make the chain again")
            check_file(path, record.sha256, record.bytes)
            found.append(path)
        return found

    def side_file(self, record: PathRecord) -> Path:
        """A file beside chain.json, its hash checked.

        Raises:
            IntegrityError: If it is missing or differs from its record.
        """
        path = inside(self.root, record.path) if self.revision is None else self.root / record.path
        if not path.is_file():
            raise IntegrityError(f"{path} is missing; fetch or make the chain again")
        try:
            found = sha256(path)
        except OSError as error:
            raise StorageError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
        if found != record.sha256:
            raise IntegrityError(f"{path} differs from its recorded hash; it was changed or damaged: fetch or make the chain again")
        return path

    def chunks(self, anchor: Anchor) -> dict[str, list[str]]:
        """Recorded hashes of every 4 MiB of an anchor's weight files."""
        if anchor.chunks is None:
            raise IntegrityError(f"anchor {anchor.name} of {self.name} has no chunk hashes; fetch or make the chain again")
        path = self.side_file(anchor.chunks)
        try:
            listed = json.loads(path.read_bytes())["files"]
            return {str(name): [str(value) for value in values] for name, values in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(f"{path} is not a list of chunk hashes ({error}); fetch or make the chain again") from error


def open_chain(
    chain: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None, local_files_only: bool = False, force_download: bool = False,
) -> ChainFiles:
    """The files of a chain: a local folder, or a Hub repo whose light index is fetched.

    Args:
        chain: Folder or repo id.
        revision: Branch, tag or commit of the index repo.
        token: Hub token; None for the stored one.
        cache_dir: Another place for the Hub's cache.
        local_files_only: Use the cache and make no request.
        force_download: Fetch even what is cached.

    Raises:
        ManifestError: If there is no such chain, or its chain.json is refused.
        StorageError: If the Hub cannot be reached or refuses.
    """
    name = os.fspath(chain)
    options = {
        "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only, "force_download": force_download,
    }
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ArgumentError(f"revision={revision!r} has no meaning for the local folder {name}; leave it out")
        return ChainFiles(Manifest.read(folder), folder.absolute(), name, None, options)
    if folder.is_file() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ManifestError(f"{name} is neither a folder nor a Hub id such as org/chain; check the path, or make a chain with `cbd distill`")
    root = download(name, revision, [FILE_NAME, "maps/*", "chunks/*", *TOKENIZER_FILES], options)
    return ChainFiles(Manifest.read(root), root, name, root.name, options)


def download(repo_id: str, revision: str | None, patterns: list[str], options: dict[str, Any]) -> Path:
    """The folder of a repo's files that match the patterns, in the standard cache.

    Raises:
        ManifestError: If the repo does not exist, or the id is none.
        StorageError: If it is gated, offline, or the Hub cannot be reached.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, **options))
    except GatedRepoError as error:
        raise StorageError(f"{repo_id} is gated; ask for access on its page and log in with `hf auth login`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ManifestError(
            f"{repo_id} is not a folder here and no repo on the Hub that this account can see; check the name, or log in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise StorageError(f"{repo_id} is not in the cache and the Hub cannot be reached ({reason}); check the network or the path") from error


def resolve_checkpoint(checkpoint: str | os.PathLike[str], revision: str | None = None, options: Mapping[str, Any] | None = None) -> Path:
    """The local folder of a checkpoint: a folder, or a Hub id that is fetched.

    Args:
        checkpoint: Folder or repo id.
        revision: Branch, tag or commit of a repo.
        options: ``token``, ``cache_dir``, ``local_files_only`` and ``force_download``.

    Raises:
        ArgumentError: If a folder comes with a revision.
        StorageError: If there is neither.
    """
    name = os.fspath(checkpoint)
    folder = Path(name).expanduser()
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
    return download(name, revision, ["*.safetensors", "README.md", *CHECKPOINT_FILES], dict(options or {}))


def is_repo_id(name: str) -> bool:
    """Whether a text is a Hub id with its namespace, and no folder here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)) and not Path(name).exists()


def check_repo_id(name: str) -> None:
    """Refuse a name that no repo can have, before the work is done that it is for.

    Raises:
        ArgumentError: If it is none.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ArgumentError(f'"{name}" cannot be the name of a repo; give one such as "org/name" of letters, digits, ".", "_" and "-"') from error


def upload(
    folder: Path, repo_id: str, *, token: str | None = None, private: bool | None = None, revision: str | None = None, message: str,
    repo_type: str | None = None,
) -> Any:
    """Put a folder's files into a repo, which is made where it is not there, in one commit.

    Returns:
        The client's commit info.

    Raises:
        StorageError: If the Hub cannot be reached or refuses.
    """
    api = HfApi(library_name="cbd-hub", library_version=version("cbd-hub"))
    try:
        made = api.create_repo(repo_id, token=token, private=private, exist_ok=True, repo_type=repo_type)
        return api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, token=token, revision=revision, commit_message=message, repo_type=repo_type
        )
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise StorageError(f"cannot push to {repo_id} ({reason}); check the name, log in with `hf auth login`, and push again") from error


def reachable(timeout: float = 5.0) -> bool:
    """Whether the Hub answers within ``timeout`` seconds; False at once in offline mode."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi(library_name="cbd-hub").model_info("HuggingFaceTB/SmolLM2-135M-Instruct", timeout=timeout)
    except Exception:  # any transport's way to say no
        return False
    return True
