"""One push to the Hub: what a repo holds already, one commit that is read back and compared, pull requests, tags, collections."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, Discussion, HfApi, ModelInfo
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from cbd_hub.adapter_files import CONFIG as ADAPTER_CONFIG
from cbd_hub.card_metadata import as_theirs, chains_of, check_card, is_ours, merge_card, read_card
from cbd_hub.client import api, explained
from cbd_hub.errors import ArgumentError, CBDError, IntegrityError, ManifestError
from cbd_hub.files import sha256, write_text
from cbd_hub.hub import fetch
from cbd_hub.manifest import FILE_NAME, MAX_BYTES, Manifest
from cbd_hub.reporting import Progress


_WEIGHTS = (".safetensors", ".bin", ".gguf")
Content = Path | bytes


@dataclass(frozen=True)
class Publication:
    """What a push did, or would do.

    Attributes:
        repo_id: The index repo, or the only one.
        commit: Its commit; None in a dry run.
        anchors: Repo and commit of each anchor.
        bytes: Bytes of each repo's files.
        tag: Tag of the index commit.
        collection: Slug of the collection.
        pull_requests: Addresses of the pull requests that were opened or gone on with.
    """

    repo_id: str
    commit: str | None
    anchors: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    tag: str | None = None
    collection: str | None = None
    pull_requests: list[str] = field(default_factory=list)


@dataclass
class Repo:
    """A repo to write to, with its files and card, and what is there already: on main, or in the pull request that an earlier push opened."""

    id: str
    message: str
    files: dict[str, Content]
    card: str
    stale: tuple[str, ...] = ()  # patterns of files that go when they are not among the new ones
    index: bool = False  # whether it is a chain's index, and not a model's repo
    chain: str | None = None  # whose anchor it is to hold
    main: str | None = None
    head: str | None = None
    request: Discussion | None = None
    there: frozenset[str] = frozenset()
    private: bool | None = None
    gated: Any = None

    @property
    def empty(self) -> bool:
        """Whether nothing is there yet but what comes with a new repo."""
        return self.there <= {".gitattributes"}

    @property
    def contents(self) -> dict[str, Content]:
        """Its files and card."""
        return {**self.files, "README.md": self.card.encode()}

    @property
    def bytes(self) -> int:
        """Bytes of its files and card."""
        return sum(content.stat().st_size if isinstance(content, Path) else len(content) for content in self.contents.values())


class Publisher:
    """One push: the client, how to push, and what came of it."""

    def __init__(
        self, token: str | None, private: bool | None, gated: Literal["auto", "manual"] | None, create_pr: bool, message: str | None, progress: Progress | None
    ) -> None:
        self.client: HfApi = api(token)
        self.token, self.private, self.gated, self.create_pr, self.message = token, private, gated, create_pr, message
        self.progress: Progress = progress or (lambda line: None)
        self.pull_requests: list[str] = []
        self._gated_as_others: Literal["auto", "manual"] | None = None
        self._account: str | None = None

    def look(self, repo: Repo) -> None:
        """What is there, without writing: head, files and hand-written card; the new card is merged with it and validated.

        A chain never takes the place of a model, nor a model that of a chain, of an adapter or of another chain's anchor, nor one of ours that of a model that cbd_hub did not write, unless its weights
        are these very ones: then all that lies beside them stays. With ``create_pr`` an open pull request of the same account and title is what is there: a push that was killed goes on with its own.

        Raises:
            ArgumentError: If the card would be refused, the repo holds something else, it is public and was asked to be private, or a pull request was asked to gate it.
        """
        with explained(repo.id, self.token, pushing=True):
            try:
                found = self.client.model_info(repo.id)
            except RepositoryNotFoundError:
                found = None
            if found is not None:
                repo.main = found.sha
                repo.request = self._own_request(repo) if self.create_pr else None
                if repo.request is not None:
                    found = self.client.model_info(repo.id, revision=repo.request.git_reference)
        if found is not None:
            repo.head, repo.private, repo.gated = found.sha, found.private, found.gated
            repo.there = frozenset(file.rfilename for file in found.siblings or [])
            if self.private and not repo.private:
                raise ArgumentError(f"{repo.id} is public, but private was asked; make it private in its settings, or push to another name")
            chain, model = FILE_NAME in repo.there, any(path == "config.json" or path.endswith(_WEIGHTS) for path in repo.there)
            if chain if not repo.index else model and not chain:
                held, new = ("a chain", "a model") if chain else ("a model", "a chain")
                raise ArgumentError(f"{repo.id} holds {held}, and {new} would take its place; push to another name")
            if self.create_pr and self.gated and repo.gated != self.gated:
                raise ArgumentError(f"{repo.id} is not gated, and a pull request cannot gate it; leave gated out, or gate it in its settings")
            old = read_card(fetch(repo.id, "README.md", repo.head, {"token": self.token}, MAX_BYTES), repo.id) if "README.md" in repo.there else None
            if model and not repo.index:
                self._check_place(repo, old)
            repo.card = merge_card(old, repo.card)
        check_card(repo.card, repo.id)

    def shut_as(self, others: Iterable[Repo | ModelInfo]) -> None:
        """Make repos from here on no more open than others are that belong to them, where the caller did not say: what grows out of a private or gated chain is as shut as that."""
        others = list(others)
        if self.private is None and any(other.private for other in others):
            self.private = True
        ways: tuple[Literal["manual", "auto"], ...] = ("manual", "auto")
        self._gated_as_others = next((way for way in ways if any(other.gated == way for other in others)), None)

    def shut_as_chain(self, repo_ids: Iterable[str]) -> None:
        """The same of repos on the Hub; one that is not there any more, or not to be seen, says nothing."""
        found = []
        for repo_id in dict.fromkeys(repo_ids):
            with suppress(ManifestError), explained(repo_id, self.token):
                found.append(self.client.model_info(repo_id))
        self.shut_as(found)

    def _check_place(self, repo: Repo, old: str | None) -> None:
        """Refuse to take the place of a model that is not to be replaced; the card of one that somebody else wrote stays theirs.

        Raises:
            ArgumentError: If it would.
        """
        whole = any(fnmatchcase(path, "model*.safetensors") for path in repo.there)
        if (ADAPTER_CONFIG in repo.files) if whole else (ADAPTER_CONFIG in repo.there and ADAPTER_CONFIG not in repo.files):
            held, new = ("a model", "an adapter") if whole else ("an adapter", "a model")
            raise ArgumentError(f"{repo.id} holds {held}, and {new} would take its place; push to another name")
        if old is None or not is_ours(old):
            if not self._same_weights(repo):
                raise ArgumentError(f"{repo.id} holds a model that cbd_hub did not write, and another would take its place; push to another name")
            repo.stale, repo.card = (), as_theirs(repo.card)
            return
        others = [] if self.create_pr else [chain for chain in chains_of(old) if chain != repo.chain]  # a pull request replaces nothing
        for chain, manifest in ((chain, self.manifest(chain)) for chain in others):
            held_by = [] if manifest is None else manifest.anchors
            anchor = next((anchor for anchor in held_by if anchor.location.repo_id.lower() == repo.id.lower()), None)
            if anchor is not None and not self._same_weights(repo):
                raise ArgumentError(f"{repo.id} holds anchor {anchor.name} of the chain {chain}, and another model would take its place; push to another name")

    def manifest(self, repo_id: str, commit: str | None = None) -> Manifest | None:
        """The manifest of a chain at a commit, else as the Hub has it now, whatever the cache has; None where there is none that can be read."""
        try:
            if commit is None:
                with explained(repo_id, self.token):
                    commit = self.client.model_info(repo_id).sha
            return Manifest.read(fetch(repo_id, FILE_NAME, commit, {"token": self.token}, MAX_BYTES).parent)
        except CBDError:
            return None

    def _own_request(self, repo: Repo) -> Discussion | None:
        """The open pull request that this account has opened under the push's message."""
        self._account = self._account or self.client.whoami()["name"]
        listed = self.client.get_repo_discussions(repo.id, author=self._account, discussion_type="pull_request", discussion_status="open")
        title = self.message or repo.message
        return next((found for found in listed if found.is_pull_request and (found.title, found.author, found.status) == (title, self._account, "open")), None)

    def put(self, repo: Repo) -> str:
        """Make the repo where it is missing, send what it lacks in one commit, read back and compare; gives the commit.

        Raises:
            StorageError: If the Hub cannot be reached or refuses.
            IntegrityError: If the Hub holds other bytes than were sent.
        """
        with explained(repo.id, self.token, pushing=True):
            if repo.head is None:
                self.client.create_repo(repo.id, private=self.private, exist_ok=True)
                repo.head = self.client.model_info(repo.id).sha
            gated = self.gated or (self._gated_as_others if repo.empty else None)
            if gated and repo.gated != gated:
                self.client.update_repo_settings(repo.id, gated=gated)
            contents = repo.contents
            operations: list[Any] = [CommitOperationAdd(path, content) for path, content in sorted(contents.items())]
            operations += [CommitOperationDelete(path) for path in sorted(repo.there - contents.keys()) if any(fnmatchcase(path, pattern) for pattern in repo.stale)]
            done = self.client.create_commit(
                repo.id, operations, commit_message=self.message or repo.message, parent_commit=repo.head,
                revision=None if repo.request is None else repo.request.git_reference, create_pr=self.create_pr and repo.request is None,
            )
            opened = done.pr_url if repo.request is None else repo.request.url
            if opened is not None:
                self.pull_requests.append(opened)
            self._compare(repo, done.oid, contents)
        return done.oid

    def _differs(self, repo: Repo, commit: str, contents: Mapping[str, Content]) -> str | None:
        """The first file of which the Hub holds other bytes, or none."""
        held = {entry.path: entry for entry in self.client.list_repo_tree(repo.id, recursive=True, revision=commit) if isinstance(entry, RepoFile)}
        for path, content in contents.items():
            entry = held.get(path)
            right = entry is not None and (
                entry.lfs.sha256 == _sha256(content) if entry.lfs is not None else entry.blob_id == _blob_id(content)
            )
            if not right:
                return path
        return None

    def _same_weights(self, repo: Repo) -> bool:
        """Whether the repo holds the very weights that are to be sent."""
        assert repo.head is not None
        with explained(repo.id, self.token, pushing=True):
            return self._differs(repo, repo.head, {path: content for path, content in repo.files.items() if path.endswith(_WEIGHTS)}) is None

    def _compare(self, repo: Repo, commit: str, contents: Mapping[str, Content]) -> None:
        if (path := self._differs(repo, commit, contents)) is not None:
            raise IntegrityError(f"{repo.id} holds other bytes of {path} than were sent; push again, the chain was not changed")

    def check_tag(self, repo: Repo, wanted: str | None, *, sent: bool = False) -> None:
        """Refuse a tag before a repo is written to that could not be made then; once all that it refers to is ``sent``, also one of what it holds now, if that is to change.

        Raises:
            ArgumentError: If it is on another commit.
        """
        if wanted is None or repo.head is None:
            return
        with explained(repo.id, self.token, pushing=True):
            target = self._tags(repo.id).get(wanted)
            elsewhere = target is not None and (target != repo.head or (sent and self._differs(repo, repo.head, repo.contents) is not None))
        if elsewhere:
            raise ArgumentError(f"{repo.id} has the tag {wanted} on another commit; choose a new one, the chain was not changed")

    def _tags(self, repo_id: str) -> dict[str, str]:
        return {tag.name: tag.target_commit for tag in self.client.list_repo_refs(repo_id).tags}

    def tag(self, repo_id: str, commit: str, wanted: str | None) -> str:
        """Tag a commit, with the next v1, v2, ... unless it has such a tag."""
        with explained(repo_id, self.token, pushing=True):
            tags = self._tags(repo_id)
            numbers = [int(found[1]) for name in tags if (found := re.fullmatch(r"v([0-9]{1,9})", name))]
            ours = [name for name, target in tags.items() if target == commit]
            if wanted is None and ours:
                return ours[0]
            name = wanted or f"v{max(numbers, default=0) + 1}"
            self.client.create_tag(repo_id, tag=name, revision=commit, exist_ok=True)
        return name

    def collect(self, repo_id: str, notes: Mapping[str, str], private: bool) -> str:
        """Put the index and the anchors into a collection of the chain's name; ``private`` where it is made now."""
        owner, name = repo_id.split("/")
        with explained(repo_id, self.token, pushing=True):
            made = self.client.create_collection(
                name, namespace=owner, description="A language model in any size: a chain of anchors, made with cbd_hub", private=private, exists_ok=True
            )
            listed = {item.item_id for item in made.items}
            for item, note in notes.items():
                if item not in listed:
                    self.client.add_collection_item(made.slug, item, "model", note=note[:500], exists_ok=True)
        return str(made.slug)


def upload(
    folder: Path, repo_id: str, *, token: str | None = None, private: bool | None = None, revision: str | None = None, message: str,
    repo_type: str | None = None,
) -> Any:
    """Put a folder's files into a repo, which is made where it is not there, in one commit; around a card of ours the words stay that people wrote into the one that is there.

    Returns:
        The client's commit info.

    Raises:
        StorageError: If the Hub cannot be reached or refuses.
        ArgumentError: If the card that is there cannot be read.
    """
    with explained(repo_id, token, pushing=True):
        client = api(token)
        made = client.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type)
        card = read_card(folder / "README.md")
        if card is not None and is_ours(card) and client.file_exists(made.repo_id, "README.md", revision=revision, repo_type=repo_type):
            old = fetch(made.repo_id, "README.md", revision, {"token": token, "repo_type": repo_type}, MAX_BYTES)
            write_text(folder / "README.md", merge_card(read_card(old, made.repo_id), card))
        return client.upload_folder(repo_id=made.repo_id, folder_path=folder, revision=revision, commit_message=message, repo_type=repo_type)


def check_tag_name(tag: str) -> None:
    """Refuse what git would not take for a tag.

    Raises:
        ArgumentError: If it is none.
    """
    if not re.fullmatch(r"\w[\w.+-]*", tag, re.ASCII) or ".." in tag or tag.endswith((".", ".lock")):
        raise ArgumentError(f"tag={tag[:80]!r} is no name for a tag; give letters, digits, '-', '_', '+' and '.'")


def _sha256(content: Content) -> str:
    return sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()


def _blob_id(content: Content) -> str:
    """The id that git gives a file."""
    data = content.read_bytes() if isinstance(content, Path) else content
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
