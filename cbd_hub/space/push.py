"""Deploy the Space of a published chain."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shlex
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution, version
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, SpaceInfo

from cbd_hub.chain import Chain
from cbd_hub.client import api, explained
from cbd_hub.errors import ArgumentError
from cbd_hub.hub import TOKENIZER_FILES, ChainFiles, check_repo_id
from cbd_hub.manifest import FILE_NAME


# Parameters up to which a largest anchor has room on a kind of hardware, and the memory for weights there.
_HARDWARE = ((500 * 10**6, "cpu-basic", "8GB"), (3 * 10**9, "cpu-upgrade", "20GB"), (8 * 10**9, "l4x1", "18GB"), (10**15, "a100-large", "64GB"))


_SECRET = "HF_TOKEN"


@dataclass(frozen=True)
class Deployment:
    """What was, or would be, deployed.

    Attributes:
        repo_id: The Space.
        url: Its address.
        commit: Its commit; None in a dry run.
        files: Bytes of each file.
        hardware: Hardware that its README suggests.
        secret: Name of the secret that it needs to read the chain; None where anybody can.
    """

    repo_id: str
    url: str
    commit: str | None
    files: dict[str, int]
    hardware: str
    secret: str | None = None


def space_files(
    chain: Chain, repo_id: str, *, public: bool = True, hardware: str | None = None, limits: Mapping[str, Any] | None = None, dtype: str | None = None
) -> dict[str, bytes]:
    """The files of a Space for a published chain.

    Args:
        chain: The chain, opened from the Hub.
        repo_id: The Space.
        public: Whether all its repos are public, so that they can be preloaded; else the README says which secret reads them.
        hardware: Hardware to suggest; by default by the largest anchor.
        limits: As `push_space` takes them.
        dtype: Dtype of the weights; by default the anchors'.

    Raises:
        ArgumentError: If the chain is a local folder.
    """
    if chain.files.revision is None:
        raise ArgumentError(
            f"a Space cannot read the local folder {chain.files.name}; publish the chain with `cbd push {shlex.quote(str(chain.files.name))} org/NAME`, then `cbd space org/NAME --push {repo_id}`"
        )
    folder = package_files("cbd_hub.spaces").joinpath("size_picker")
    app, readme, requirements = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("app.py", "README.md", "requirements.txt"))
    body = readme.split("---\n", 2)[2]
    data: dict[str, Any] = yaml.safe_load(readme.split("---\n", 2)[1])
    remote = [(anchor, place) for anchor in chain.anchors if (place := chain.files.remote(anchor)) is not None]
    data.update({
        "title": f"{chain.files.name.split('/')[-1]}: pick a size", "sdk_version": version("gradio"), "suggested_hardware": hardware or hardware_for(chain.anchors[0].parameters),
        "models": list(dict.fromkeys([chain.files.name, *(repo for _, (repo, _, _) in remote)])), "preload_from_hub": preloads(chain.files),
    })
    if not public:
        del data["preload_from_hub"]
        body += f"\nThe chain is private or gated: the Space reads it with the secret `{_SECRET}`, a token that may (Settings, Variables and secrets).\n"
    memory = {name: room for _, name, room in _HARDWARE}.get(data["suggested_hardware"], "8GB")
    made = {
        "app.py": app.encode(), "README.md": f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)}---\n{body}".encode(),
        "space.json": (json.dumps({"chain": chain.files.name, "revision": chain.files.revision, "dtype": dtype, "limits": {"memory": memory, **(limits or {})}}) + "\n").encode(),
    }
    if is_release(distribution("cbd-hub")):
        pinned = requirements.replace("cbd-hub[space]", f"cbd-hub[space]=={version('cbd-hub')}")
    else:
        name, made_wheel = wheel()
        made[name] = made_wheel
        pinned = requirements.replace("cbd-hub[space]", "\n".join(requirements_of(distribution("cbd-hub"))))
    made["requirements.txt"] = pinned.encode()
    return made


def preloads(files: ChainFiles) -> list[str]:
    """Lines of ``preload_from_hub``: the index and each anchor, file by file at its commit."""
    manifest = files.manifest
    index = [FILE_NAME, *(name for name in TOKENIZER_FILES if name in manifest.anchors[0].files)]
    for anchor in manifest.anchors:
        index += [record.path for record in (anchor.chunks, anchor.maps) if record is not None]
    lines = [f"{files.name} {','.join(index)} {files.revision}"]
    for anchor in manifest.anchors:
        place = files.remote(anchor)
        if place is not None:
            repo, revision, prefix = place
            lines.append(f"{repo} {','.join(prefix + name for name in sorted(anchor.files))} {revision}")
    return lines


def hardware_for(parameters: int) -> str:
    """Hardware that a chain's largest anchor runs on.

    Example:
        >>> hardware_for(134_515_008), hardware_for(7 * 10**9)
        ('cpu-basic', 'l4x1')
    """
    return next(name for most, name, _ in _HARDWARE if parameters <= most)


def is_release(installed: Distribution) -> bool:
    """Whether a distribution was installed from an index, under a version that is no development one; a source tree was not."""
    from_index = installed.read_text("INSTALLER") is not None and installed.read_text("direct_url.json") is None
    return from_index and re.fullmatch(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?", installed.version) is not None


def requirements_of(installed: Distribution) -> list[str]:
    """What a distribution and its extra ``space`` need, as lines of requirements.txt."""
    from packaging.requirements import Requirement
    found = [Requirement(line) for line in installed.requires or []]
    chosen = [need for need in found if need.marker is None or need.marker.evaluate({"extra": "space"})]
    return sorted(f"{need.name}{'[' + ','.join(sorted(need.extras)) + ']' if need.extras else ''}{need.specifier}" for need in chosen if need.name != "torch")


def wheel() -> tuple[str, bytes]:
    """File name and bytes of a wheel of the cbd_hub that is running, however it was installed."""
    installed = distribution("cbd-hub")
    base = f"cbd_hub-{installed.version}"
    contents = dict(sorted(_package("cbd_hub", Path(str(package_files("cbd_hub"))))))
    for name in ("model_cards", "spaces"):
        contents.update(_package(f"cbd_hub/{name}", Path(str(package_files(f"cbd_hub.{name}")))))
    contents[f"{base}.dist-info/METADATA"] = (installed.read_text("METADATA") or installed.read_text("PKG-INFO") or "").encode()
    contents[f"{base}.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: cbd_hub\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    contents[f"{base}.dist-info/entry_points.txt"] = (installed.read_text("entry_points.txt") or "").encode()
    record = "".join(f"{path},sha256={_digest(data)},{len(data)}\n" for path, data in contents.items())
    contents[f"{base}.dist-info/RECORD"] = f"{record}{base}.dist-info/RECORD,,\n".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for path, data in contents.items():
            packed.writestr(zipfile.ZipInfo(path), data, zipfile.ZIP_DEFLATED)  # a fixed date: the same code gives the same bytes
    return f"{base}-py3-none-any.whl", buffer.getvalue()


def _package(name: str, folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
            yield f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def push_space(
    chain: Chain, repo_id: str, *, private: bool | None = None, hardware: str | None = None, token: str | None = None, dry_run: bool = False,
    limits: Mapping[str, Any] | None = None, dtype: str | None = None,
) -> Deployment:
    """Deploy the Space of a published chain in one commit; a Space that is there is brought up to date.

    Args:
        chain: The chain, opened from the Hub.
        repo_id: The Space, such as ``org/SPACE``.
        private: Whether a Space made now is private; by default where a repo of the chain is private or gated.
        hardware: Hardware to suggest.
        token: Hub token; None for the stored one.
        dry_run: Say what would be sent, and send nothing.
        limits: Fields of `Limits` that the Space begins with; variables of the Space go before them. The memory is by default that of the hardware.
        dtype: Dtype of the weights; by default the anchors'.

    Raises:
        ArgumentError: If the chain is a local folder, the name is none, the Space holds another app, or it is public and was asked to be private.
        StorageError: If the Hub cannot be reached or refuses.
    """
    check_repo_id(repo_id)
    space_files(chain, repo_id)  # refuses a local chain before a request is made
    client = api(token)
    shut = False
    for repo in sorted({chain.files.name, *(place[0] for anchor in chain.anchors if (place := chain.files.remote(anchor)) is not None)}):
        with explained(repo, token):
            info = client.model_info(repo)
            shut = shut or bool(info.private or info.gated)
    with explained(repo_id, token, pushing=True):
        there = client.space_info(repo_id) if client.repo_exists(repo_id, repo_type="space") else None
        if there is not None:
            _check_place(there, repo_id, private)
        made = space_files(chain, repo_id, public=not shut, hardware=hardware, limits=limits, dtype=dtype)
        sizes, chosen = {name: len(data) for name, data in made.items()}, yaml.safe_load(made["README.md"].decode().split("---\n")[1])["suggested_hardware"]
        secret = _SECRET if shut else None
        if dry_run:
            return Deployment(repo_id, f"{client.endpoint}/spaces/{repo_id}", None, sizes, chosen, secret)
        url = client.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=shut or None if private is None else private, exist_ok=True)
        head = there or client.space_info(repo_id)
        old = [file.rfilename for file in head.siblings or [] if re.fullmatch(r"cbd_hub-[^/]*\.whl", file.rfilename) and file.rfilename not in made]
        operations: list[Any] = [CommitOperationAdd(name, data) for name, data in sorted(made.items())] + [CommitOperationDelete(name) for name in old]
        done = client.create_commit(repo_id, operations, repo_type="space", commit_message=f"Pick a size of {chain.files.name}", parent_commit=head.sha)
    return Deployment(repo_id, str(url), done.oid, sizes, chosen, secret)


def _check_place(there: SpaceInfo, repo_id: str, private: bool | None) -> None:
    """Refuse to take the place of an app of somebody's, or to leave one open that was asked to be private."""
    files = {file.rfilename for file in there.siblings or []}
    if "space.json" not in files and files - {".gitattributes", "README.md"}:
        raise ArgumentError(f"the Space {repo_id} holds an app that `cbd space` did not deploy, and this one would take its place; deploy it under another name")
    if private and not there.private:
        raise ArgumentError(f"the Space {repo_id} is public, but private was asked; make it private in its settings, or deploy it under another name")
