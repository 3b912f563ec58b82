"""Publish a chain: one ordinary transformers repo per anchor, one light index repo, one collection.

All files are checked and all cards validated before the first byte goes up; then the anchors, each in one commit that is read back and
compared; then the index in one atomic commit; then its tag and the collection. Until the index commit the old chain is whole. A push that
was killed goes on when it is started again: what is there already is not sent again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from cbd_hub.cards import anchor_card, chain_card, check_card, curve_picture, interpolant_card, merge_card
from cbd_hub.client import api, explained
from cbd_hub.errors import ArgumentError, IntegrityError, StorageError, WeightsError
from cbd_hub.files import check_file, sha256
from cbd_hub.hub import TOKENIZER_FILES, ChainFiles, fetch, is_repo_id, open_chain
from cbd_hub.manifest import FILE_NAME, Anchor, Location, Manifest, Preview
from cbd_hub.plans import anchor_config
from cbd_hub.sizes import format_bytes
from cbd_hub.weights import Checkpoint, read_config, read_header


Content = Path | bytes
Say = Callable[[str], None]

_NEVER = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py", ".h5", ".msgpack")
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES)


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
        pull_requests: Addresses of the pull requests that were opened.
    """

    repo_id: str
    commit: str | None
    anchors: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    tag: str | None = None
    collection: str | None = None
    pull_requests: list[str] = field(default_factory=list)


@dataclass
class _Repo:
    """A repo to write to, with its files and card, and what is there already."""

    id: str
    files: dict[str, Content]
    card: str
    stale: tuple[str, ...] = ()  # suffixes and prefixes of files that go when they are not among the new ones
    head: str | None = None
    there: frozenset[str] = frozenset()
    private: bool | None = None
    gated: Any = None

    @property
    def bytes(self) -> int:
        return sum(content.stat().st_size if isinstance(content, Path) else len(content) for content in self.files.values()) + len(self.card.encode())


class _Publisher:
    """One push: the client, how to push, and what came of it."""

    def __init__(
        self, token: str | None, private: bool | None, gated: Literal["auto", "manual"] | None, create_pr: bool, message: str | None, say: Say | None
    ) -> None:
        self.client: HfApi = api(token)
        self.token, self.private, self.gated, self.create_pr, self.message = token, private, gated, create_pr, message
        self.say: Say = say or (lambda line: None)
        self.pull_requests: list[str] = []

    def look(self, repo: _Repo) -> None:
        """What is there, without writing: head, files and hand-written card; the new card is merged with it and validated.

        Raises:
            ArgumentError: If the card would be refused, or the repo is public and was asked to be private.
        """
        with explained(repo.id, self.token, pushing=True):
            try:
                found = self.client.model_info(repo.id)
            except RepositoryNotFoundError:
                found = None
        if found is not None:
            repo.head, repo.private, repo.gated = found.sha, found.private, found.gated
            repo.there = frozenset(file.rfilename for file in found.siblings or [])
            if self.private and not repo.private:
                raise ArgumentError(f"{repo.id} is public, but private was asked; make it private in its settings, or push to another name")
            if "README.md" in repo.there:
                path = fetch(repo.id, "README.md", repo.head, {"token": self.token})
                repo.card = merge_card(path.read_text(encoding="utf-8", errors="replace"), repo.card)
        check_card(repo.card, repo.id)

    def put(self, repo: _Repo, message: str) -> str:
        """Make the repo where it is missing, send what it lacks in one commit, read back and compare; gives the commit.

        Raises:
            StorageError: If the Hub cannot be reached or refuses.
            IntegrityError: If the Hub holds other bytes than were sent.
        """
        with explained(repo.id, self.token, pushing=True):
            if repo.head is None:
                self.client.create_repo(repo.id, private=self.private, exist_ok=True)
                repo.head = self.client.model_info(repo.id).sha
            if self.gated and repo.gated != self.gated and not self.create_pr:
                self.client.update_repo_settings(repo.id, gated=self.gated)
            contents: dict[str, Content] = {**repo.files, "README.md": repo.card.encode()}
            operations: list[Any] = [CommitOperationAdd(path, content) for path, content in sorted(contents.items())]
            operations += [
                CommitOperationDelete(path) for path in sorted(repo.there - contents.keys()) if path.endswith(repo.stale) or path.startswith(repo.stale)
            ] if repo.stale else []
            done = self.client.create_commit(
                repo.id, operations, commit_message=self.message or message, parent_commit=repo.head, create_pr=self.create_pr
            )
            if done.pr_url is not None:
                self.pull_requests.append(done.pr_url)
            self._compare(repo, done.oid, contents)
        return done.oid

    def _compare(self, repo: _Repo, commit: str, contents: Mapping[str, Content]) -> None:
        held = {entry.path: entry for entry in self.client.list_repo_tree(repo.id, recursive=True, revision=commit) if isinstance(entry, RepoFile)}
        for path, content in contents.items():
            entry = held.get(path)
            right = entry is not None and (
                entry.lfs.sha256 == _sha256(content) if entry.lfs is not None else entry.blob_id == _blob_id(content)
            )
            if not right:
                raise IntegrityError(f"{repo.id} holds other bytes of {path} than were sent; push again, the chain was not changed")

    def tag(self, repo_id: str, commit: str, wanted: str | None) -> str:
        """Tag a commit, with the next v1, v2, ... unless it has such a tag."""
        with explained(repo_id, self.token, pushing=True):
            tags = {tag.name: tag.target_commit for tag in self.client.list_repo_refs(repo_id).tags}
            numbers = [int(name[1:]) for name in tags if name[:1] == "v" and name[1:].isdigit()]
            ours = [name for name, target in tags.items() if target == commit]
            if wanted is None and ours:
                return ours[0]
            name = wanted or f"v{max(numbers, default=0) + 1}"
            if tags.get(name, commit) != commit:
                raise ArgumentError(f"{repo_id} has the tag {name} on another commit; choose a new one, the chain itself is published")
            self.client.create_tag(repo_id, tag=name, revision=commit, exist_ok=True)
        return name

    def collect(self, repo_id: str, notes: Mapping[str, str]) -> str:
        """Put the index and the anchors into a collection of the chain's name."""
        owner, name = repo_id.split("/")
        with explained(repo_id, self.token, pushing=True):
            made = self.client.create_collection(
                name, namespace=owner, description="A language model in any size: a chain of anchors, made with cbd_hub", private=bool(self.private), exists_ok=True
            )
            listed = {item.item_id for item in made.items}
            for item, note in notes.items():
                if item not in listed:
                    self.client.add_collection_item(made.slug, item, "model", note=note[:500], exists_ok=True)
        return str(made.slug)


def push_chain(
    files: ChainFiles, repo_id: str, *, private: bool | None = None, gated: Literal["auto", "manual"] | None = None, token: str | None = None,
    create_pr: bool = False, commit_message: str | None = None, tag: str | None = None, collection: bool = True, dry_run: bool = False,
    say: Say | None = None,
) -> Publication:
    """Publish a chain; see `Chain.push_to_hub`."""
    files = replace(files, manifest=_without_places(files.manifest))
    manifest = files.manifest
    own = [anchor for anchor in manifest.anchors if anchor.location.repo_id == "."]
    repos = {anchor.name: f"{repo_id}-{anchor.name}" if anchor in own else anchor.location.repo_id for anchor in manifest.anchors}
    for name in (repo_id, *repos.values()):
        _check_repo_id(name)
    publisher = _Publisher(token, private, gated, create_pr, commit_message, say)
    recipe = _shareable_recipe(files)
    anchors = {anchor.name: _anchor_repo(files, anchor, repo_id, repos[anchor.name], recipe) for anchor in own}
    previews = {anchor.name: _preview(files, anchor) for anchor in own}
    pinned = {anchor.name: anchor.location.revision for anchor in manifest.anchors}
    index = _Repo(repo_id, {}, chain_card(manifest, repo_id=repo_id, anchor_repos=repos, recipe=recipe is not None), ("chunks/", "maps/"))
    if dry_run:
        index.files = _index_files(files, _published(manifest, repos, dict.fromkeys(repos, "0" * 40), previews), recipe)
        check_card(index.card, repo_id)
        for repo in anchors.values():
            check_card(repo.card, repo.id)
        return Publication(
            repo_id, None, {name: (repos[name], pinned[name]) for name in repos}, {repo.id: repo.bytes for repo in (*anchors.values(), index)}
        )
    for repo in (*anchors.values(), index):
        publisher.look(repo)
    for name, repo in anchors.items():
        publisher.say(f"anchor {name}: {format_bytes(repo.bytes)} to {repo.id}")
        pinned[name] = publisher.put(repo, f"Anchor {name} of {repo_id}")
    index.files = _index_files(files, _published(manifest, repos, pinned, previews), recipe)
    publisher.say(f"index: {format_bytes(index.bytes)} to {repo_id}")
    commit = publisher.put(index, f"Chain {manifest.name}: {', '.join(repos)}")
    made_tag = slug = None
    if not create_pr:
        made_tag = publisher.tag(repo_id, commit, tag)
        if collection:
            slug = publisher.collect(repo_id, {repo_id: "the chain", **{repo: f"anchor {name}" for name, repo in repos.items()}})
    return Publication(
        repo_id, commit, {name: (repos[name], pinned[name]) for name in repos}, {repo.id: repo.bytes for repo in (*anchors.values(), index)}, made_tag,
        slug, publisher.pull_requests,
    )


def push_model(
    folder: Path, repo_id: str, *, private: bool | None = None, gated: Literal["auto", "manual"] | None = None, token: str | None = None,
    create_pr: bool = False, commit_message: str | None = None, dry_run: bool = False, say: Say | None = None,
) -> Publication:
    """Publish a model that was made from a chain, with a card that names both anchors and the plan.

    Args:
        folder: What `CBDModel.materialize` or ``save_pretrained`` wrote.
        repo_id: The repo.
        private: Whether a repo made now is private.
        gated: Let readers ask for access.
        token: Hub token; None for the stored one.
        create_pr: Open a pull request.
        commit_message: Message of the commit.
        dry_run: Check all and send nothing.
        say: Called with each line of progress.

    Raises:
        WeightsError: If the folder holds no such model.
        ArgumentError: If the repo's name or its card is refused.
        StorageError: If the Hub cannot be reached or refuses.
    """
    _check_repo_id(repo_id)
    config = read_config(folder)
    made = getattr(config, "cbd", None)
    if not isinstance(made, dict) or not isinstance(made.get("parameters"), int):
        raise WeightsError(f"{folder} is neither a chain nor a model made from one (its config.json has no cbd); make one with `cbd make`")
    Checkpoint(folder, config)
    chain, bases, license = None, [], None
    if is_repo_id(str(made.get("chain"))) and made.get("revision"):
        chain = str(made["chain"])
        manifest = open_chain(chain, revision=str(made["revision"]), token=token).manifest
        bases = [manifest.anchor(name).location.repo_id for name in made.get("neighbours", [])]
        bases = [chain if base == "." else base for base in bases]
        license = manifest.teacher.license if manifest.teacher else None
    facts = {name.replace("_", " "): ", ".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in made.items() if value is not None}
    files: dict[str, Content] = {path.name: path for path in sorted(folder.iterdir()) if path.name in _MODEL_FILES or path.suffix == ".safetensors"}
    card = interpolant_card(repo_id, made["parameters"], chain=chain, anchors=list(dict.fromkeys(bases)), license=license, facts=facts)
    return _push_one(_Repo(repo_id, files, card, (".safetensors", ".safetensors.index.json")), _Publisher(token, private, gated, create_pr, commit_message, say), dry_run)


def push_anchor(
    repo_id: str, files: Mapping[str, Path], chain: Any, parameters: int, *, token: str | None = None, private: bool | None = None, say: Say | None = None
) -> str:
    """Push a ready checkpoint as a further anchor of a chain, with its card; gives the commit."""
    _check_repo_id(repo_id)
    source = str(chain.name if chain.files.revision is None else chain.files.name)
    card = anchor_card(
        repo_id, parameters, teacher_repo=None, license=None, facts={"anchor of": source}, chain=source if is_repo_id(source) else None,
        manifest=chain.manifest, distilled=False,
    )
    repo = _Repo(repo_id, dict(files), card, (".safetensors", ".safetensors.index.json"))
    publisher = _Publisher(token, private, None, False, None, say)
    publisher.look(repo)
    publisher.say(f"{format_bytes(repo.bytes)} to {repo_id}")
    return publisher.put(repo, f"Anchor of {source}")


def commit_index(
    files: ChainFiles, manifest: Manifest, chunks: bytes, chunks_path: str, anchor: Anchor, folder: Path, *, token: str | None = None,
    create_pr: bool = False, say: Say | None = None,
) -> Publication:
    """Commit an extended manifest, and the chunk hashes of its new anchor, to a published chain's index."""
    headers = {name: _header_text(folder / name) for name in anchor.weight_files}
    preview = Preview(config=json.dumps(json.loads((folder / "config.json").read_bytes()), separators=(",", ":")), headers=headers)
    manifest = manifest.model_copy(update={"anchors": [entry.model_copy(update={"preview": preview}) if entry.name == anchor.name else entry for entry in manifest.anchors]})
    repos = {entry.name: entry.location.repo_id for entry in manifest.anchors}
    card = chain_card(manifest, repo_id=files.name, anchor_repos=repos, recipe=files.extra("recipe.yaml") is not None)
    contents: dict[str, Content] = {FILE_NAME: manifest.to_json().encode(), chunks_path: chunks}
    repo, publisher = _Repo(files.name, contents, card), _Publisher(token, None, None, create_pr, None, say)
    publisher.look(repo)
    if repo.head != files.revision:
        raise StorageError(f"{files.name} has changed since it was read; nothing was written, run the same command again")
    commit = publisher.put(repo, f"Anchor {anchor.name} in {anchor.location.repo_id}")
    return Publication(
        files.name, commit, {anchor.name: (anchor.location.repo_id, anchor.location.revision)}, pull_requests=publisher.pull_requests
    )


def _header_text(path: Path) -> str:
    header, start = read_header(path)
    return json.dumps({"start": start, "tensors": header}, separators=(",", ":"))


def _push_one(repo: _Repo, publisher: _Publisher, dry_run: bool) -> Publication:
    if dry_run:
        check_card(repo.card, repo.id)
        return Publication(repo.id, None, bytes={repo.id: repo.bytes})
    publisher.look(repo)
    publisher.say(f"{format_bytes(repo.bytes)} to {repo.id}")
    return Publication(repo.id, publisher.put(repo, "Model made with cbd_hub"), bytes={repo.id: repo.bytes}, pull_requests=publisher.pull_requests)


def _anchor_repo(files: ChainFiles, anchor: Anchor, chain: str, repo_id: str, recipe: dict[str, Any] | None) -> _Repo:
    """An anchor's repo, its files checked against their records."""
    contents: dict[str, Content] = {}
    for name, record in anchor.files.items():
        if name.lower().endswith(_NEVER):
            raise WeightsError(f"anchor {anchor.name} holds {name}; pickles and code are never published: remove it and make the chain again")
        path = files.path(anchor, name)
        check_file(path, record.sha256, record.bytes)
        if name != "README.md":
            contents[name] = path
    Checkpoint(files.path(anchor, "config.json").parent, anchor_config(files, anchor))
    teacher = files.manifest.teacher
    card = anchor_card(
        repo_id, anchor.parameters, teacher_repo=teacher.repo_id if teacher else None, license=teacher.license if teacher else None,
        facts=_anchor_facts(anchor, recipe), chain=chain, manifest=files.manifest, distilled=anchor.origin in ("cut", "random"),
    )
    return _Repo(repo_id, contents, card, (".safetensors", ".safetensors.index.json"))


def _anchor_facts(anchor: Anchor, recipe: dict[str, Any] | None) -> dict[str, str]:
    shape = anchor.shape
    facts = {
        "shape": f"{shape.layers} layers, hidden {shape.hidden}, {shape.heads} heads of {shape.head_size} ({shape.kv_heads} kv), FFN {shape.ffn}, vocabulary {shape.vocab:,}",
        "family": anchor.family,
    }
    if anchor.parent is not None:
        facts["cut from and taught by"] = f"anchor {anchor.parent}"
    if recipe is not None and anchor.origin in ("cut", "random"):
        data, stage = recipe.get("data") or {}, {**(recipe.get("stage") or {}), **((recipe.get("stages") or {}).get(anchor.name) or {})}
        if isinstance(data, dict) and (source := data.get("dataset") or data.get("path")):
            facts["data"] = str(source)
        facts["loss"] = ", ".join(f"{name} {stage[name]}" for name in ("objective", "divergence", "temperature", "kd_weight", "ce_weight", "hidden_weight") if stage.get(name))
    if anchor.training is not None:
        facts["training tokens"] = f"{anchor.training.tokens:,}"
    if anchor.evaluations:
        last = anchor.evaluations[-1]
        error = f" ± {last.stderr:.3f}" if last.stderr is not None else ""
        facts["measured loss"] = f"{last.loss:.3f}{error} nats per token on {last.tokens:,} tokens of {last.dataset}"
    return {name: value.replace("|", "\\|") for name, value in facts.items() if value}


def _without_places(manifest: Manifest) -> Manifest:
    """A manifest that names no folder of this machine: of a data set's path its last part stays."""

    def public(text: str) -> str:
        return re.sub(r"^(?:[~/]|[A-Za-z]:\\\\?).*[/\\](?=[^/\\]+$)", "", text)

    values = json.loads(manifest.to_json())
    for entry in (*(entry for anchor in values["anchors"] for entry in anchor["evaluations"]), *(point for link in values["links"] for point in link["curve"])):
        entry["dataset"] = public(entry["dataset"])
    if values["teacher"] is not None and not is_repo_id(values["teacher"]["repo_id"] or ""):
        values["teacher"]["repo_id"] = None
    return Manifest.parse(values, "the chain")


def _shareable_recipe(files: ChainFiles) -> dict[str, Any] | None:
    """The recipe, unless it names a place on this machine."""
    path = files.extra("recipe.yaml")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if path is not None else None
    except (OSError, ValueError, yaml.YAMLError):
        return None

    def texts(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [text for entry in value.values() for text in texts(entry)]
        return [text for entry in value for text in texts(entry)] if isinstance(value, list) else [value] if isinstance(value, str) else []

    return recipe if isinstance(recipe, dict) and not any(text.startswith(("/", "~", "\\")) or ":\\" in text for text in texts(recipe)) else None


def _preview(files: ChainFiles, anchor: Anchor) -> Preview:
    """What a plan needs of an anchor before it is fetched."""
    headers = {name: _header_text(files.path(anchor, name)) for name in anchor.weight_files}
    config = json.dumps(json.loads(files.path(anchor, "config.json").read_bytes()), separators=(",", ":"))
    return Preview(config=config, headers=headers)


def _published(manifest: Manifest, repos: Mapping[str, str], pinned: Mapping[str, str | None], previews: Mapping[str, Preview]) -> Manifest:
    """The manifest of the index: every anchor in its repo, pinned by commit."""
    anchors = [
        anchor.model_copy(update={
            "location": Location(repo_id=repos[anchor.name], revision=pinned[anchor.name], subfolder=anchor.location.subfolder if anchor.name not in previews else None),
            "files": {name: record for name, record in anchor.files.items() if name != "README.md"},
            "preview": previews.get(anchor.name, anchor.preview),
        })
        for anchor in manifest.anchors
    ]
    return Manifest.parse(json.loads(manifest.model_copy(update={"anchors": anchors}).to_json()), "the index")


def _index_files(files: ChainFiles, manifest: Manifest, recipe: dict[str, Any] | None) -> dict[str, Content]:
    """What the index repo holds besides its card: no weights."""
    contents: dict[str, Content] = {path.name: path for path in files.tokenizer_files()}
    for anchor in manifest.anchors:
        for record in (anchor.chunks, anchor.maps):
            if record is not None:
                contents[record.path] = files.side_file(record)
    if recipe is not None and (path := files.extra("recipe.yaml")) is not None:
        contents["recipe.yaml"] = path
    picture = curve_picture(manifest)
    if picture is not None:
        contents["curve.png"] = picture
    contents["config.json"] = json.dumps({"model_type": "cbd_chain", "size": None}, indent=2).encode()
    contents[FILE_NAME] = manifest.to_json().encode()
    return contents


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError("it has no namespace")
    except HFValidationError as error:
        raise ArgumentError(f"{repo_id!r} is no name for a repo ({str(error)[:120]}); write it as org/NAME, of letters, digits, '-', '_' and '.', at most 96") from error


def _sha256(content: Content) -> str:
    return sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()


def _blob_id(content: Content) -> str:
    """The id that git gives a file."""
    data = content.read_bytes() if isinstance(content, Path) else content
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
