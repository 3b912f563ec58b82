"""Publish a chain: one ordinary transformers repo per anchor, one light index repo, one collection.

All files are checked and all cards validated before the first byte goes up; then the anchors, each in one commit that is read back and
compared; then the index in one atomic commit; then its tag and the collection. Until the index commit the old chain is whole. A push that
was killed goes on when it is started again: what is there already is not sent again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from cbd_hub import shapes
from cbd_hub.adapter_files import CONFIG as ADAPTER_CONFIG
from cbd_hub.adapter_files import WEIGHTS as ADAPTER_WEIGHTS
from cbd_hub.card_metadata import check_card, is_ours, license_of, merge_card, read_card
from cbd_hub.cards import (
    CutLosses,
    Healed,
    Made,
    anchor_card,
    chain_call,
    chain_card,
    curve_picture,
    cut_card,
    interpolant_card,
)
from cbd_hub.client import TOKEN, reason
from cbd_hub.configs import read_config
from cbd_hub.errors import ArgumentError, ManifestError, StorageError, WeightsError
from cbd_hub.families import family_of
from cbd_hub.files import check_file, public
from cbd_hub.hub import KEPT_FILE, TOKENIZER_FILES, ChainFiles, check_repo_id, is_repo_id, open_chain
from cbd_hub.manifest import FILE_NAME, Anchor, Location, Manifest, Preview, Shape
from cbd_hub.plans import anchor_config
from cbd_hub.reporting import Progress
from cbd_hub.sizes import format_bytes, with_error
from cbd_hub.upload import Content, Publication, Publisher, Repo, check_tag_name
from cbd_hub.weights import Checkpoint, read_header


logger = logging.getLogger(__name__)
NEVER = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py", ".h5", ".msgpack")
# What goes when a repo gets another model; all else there is a person's.
_OLD_MODEL = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "generation_config.json", ADAPTER_CONFIG, ADAPTER_WEIGHTS, KEPT_FILE, *TOKENIZER_FILES
)
_MODEL_FILES = ("config.json", ADAPTER_CONFIG, KEPT_FILE, "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES)


def push_chain(
    files: ChainFiles, repo_id: str, *, private: bool | None = None, gated: Literal["auto", "manual"] | None = None, token: str | None = None,
    create_pr: bool = False, commit_message: str | None = None, tag: str | None = None, collection: bool = True, dry_run: bool = False,
    progress: Progress | None = None,
) -> Publication:
    """Publish a chain; see `Chain.push_to_hub`."""
    files = replace(files, manifest=_without_places(files.manifest))
    manifest = files.manifest
    own = [anchor for anchor in manifest.anchors if anchor.location.repo_id == "."]
    repos = {anchor.name: f"{repo_id}-{anchor.name}" if anchor in own else anchor.location.repo_id for anchor in manifest.anchors}
    for name in (repo_id, *repos.values()):
        check_repo_id(name)
    if tag is not None:
        check_tag_name(tag)
        if create_pr:
            raise ArgumentError(f"tag={tag!r} is of the index's commit, which a pull request has none of before it is merged; leave it out")
    publisher = Publisher(token, private, gated, create_pr, commit_message, progress)
    recipe = _recipe(files)
    shared = _shareable(files, recipe)
    anchors = {anchor.name: _anchor_repo(files, anchor, repo_id, repos[anchor.name], recipe) for anchor in own}
    previews = {anchor.name: _preview(files, anchor) for anchor in own}
    pinned = {anchor.name: anchor.location.revision for anchor in manifest.anchors}
    card = chain_card(manifest, repo_id=repo_id, anchor_repos=repos, recipe=shared, datasets=_datasets(recipe))
    if files.revision is None:
        card = merge_card(read_card(files.root / "README.md"), card)
    index = Repo(repo_id, f"Chain {manifest.name}: {', '.join(repos)}", {}, card, ("chunks/*", "maps/*", "curve.png", "recipe.yaml", *TOKENIZER_FILES), index=True)
    index.files = _index_files(files, _published(manifest, repos, dict.fromkeys(repos, "0" * 40), previews), shared)  # what is wrong with it is found before anything is sent
    if dry_run:
        check_card(index.card, repo_id)
        for repo in anchors.values():
            check_card(repo.card, repo.id)
        return Publication(
            repo_id, None, {name: (repos[name], pinned[name]) for name in repos}, {repo.id: repo.bytes for repo in (*anchors.values(), index)}
        )
    for repo in (*anchors.values(), index):
        publisher.look(repo)
    publisher.shut_as((*anchors.values(), index))
    publisher.check_tag(index, tag)
    _say_dropped(publisher, index, manifest)
    for name, repo in anchors.items():
        publisher.progress(f"anchor {name}: {format_bytes(repo.bytes)} to {repo.id}")
        pinned[name] = publisher.put(repo)
    index.files[FILE_NAME] = _published(manifest, repos, pinned, previews).to_json().encode()
    publisher.check_tag(index, tag, sent=True)
    publisher.progress(f"index: {format_bytes(index.bytes)} to {repo_id}")
    commit = publisher.put(index)
    made_tag = slug = None
    if not create_pr:
        made_tag = publisher.tag(repo_id, commit, tag)
        if collection:
            notes = {repo_id: "the chain", **{repo: f"anchor {name}" for name, repo in repos.items()}}
            try:
                slug = publisher.collect(repo_id, notes, bool(publisher.private or index.private))
            except StorageError as error:
                logger.warning("%s is published, but no collection could be made of it (%s); --no-collection leaves it out", repo_id, reason(error.__cause__ or error, token))
    return Publication(
        repo_id, commit, {name: (repos[name], pinned[name]) for name in repos}, {repo.id: repo.bytes for repo in (*anchors.values(), index)}, made_tag,
        slug, publisher.pull_requests,
    )


def push_model(
    folder: Path, repo_id: str, *, private: bool | None = None, gated: Literal["auto", "manual"] | None = None, token: str | None = None,
    create_pr: bool = False, commit_message: str | None = None, dry_run: bool = False, progress: Progress | None = None,
) -> Publication:
    """Publish a model that was made from a chain, healed or not, with a card that names both anchors and the plan.

    Args:
        folder: What `CBDModel.materialize`, `cbd_hub.heal` or ``save_pretrained`` wrote; a PEFT folder of `cbd_hub.heal` or `carry_adapter` is published as an adapter.
        repo_id: The repo.
        private: Whether a repo made now is private.
        gated: Let readers ask for access.
        token: Hub token; None for the stored one.
        create_pr: Open a pull request.
        commit_message: Message of the commit.
        dry_run: Check what is here, send nothing and ask the Hub nothing.
        progress: Called with a line for each step of the work.

    Raises:
        WeightsError: If the folder holds no such model, or a trainer has written it since.
        ArgumentError: If the repo's name or its card is refused.
        StorageError: If the Hub cannot be reached or refuses.
    """
    check_repo_id(repo_id)
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} is neither a chain (it has no {FILE_NAME}) nor a model (no config.json); run `cbd distill` to its end, or give the folder that `cbd make` wrote")
    config = read_config(folder)
    made = getattr(config, "cbd", None)
    if not isinstance(made, dict) or not isinstance(made.get("parameters"), int):
        raise WeightsError(f"{folder} is neither a chain nor a model made from one (its config.json has no cbd); make one with `cbd make`")
    if (folder / "training_args.bin").is_file():
        raise WeightsError(f"{folder} was trained since the chain made it (it holds training_args.bin), and its card would say that it was not; push it with the trainer's push_to_hub")
    adapter = (folder / ADAPTER_CONFIG).is_file()
    if not adapter:
        Checkpoint(folder, config)
    cut = made.get("strategy") == "cut" and "difference" in made  # which the first versions did not write
    try:
        Made.model_validate({name: made[name] for name in Made.model_fields if name in made})
        if cut:
            CutLosses.model_validate({name: made[name] for name in CutLosses.model_fields if name in made})
        healed = None if made.get("healed") is None else Healed.model_validate(made["healed"])
    except ValidationError as error:
        place = ".".join(("cbd", *(["healed"] if error.title == "Healed" else []), *map(str, error.errors()[0]["loc"])))
        raise WeightsError(f"{folder / 'config.json'} is refused at {place} ({error.errors()[0]['msg'][:120]}); make the model again") from error
    chain, manifest, bases, license = None, None, [], license_of(folder) or made.get("license")
    publisher = Publisher(token, private, gated, create_pr, commit_message, progress)
    if is_repo_id(str(made.get("chain"))) and made.get("revision"):
        chain = str(made["chain"])
        try:
            manifest = open_chain(chain, revision=str(made["revision"]), token=token, local_files_only=dry_run).manifest
        except (ManifestError, StorageError):
            if not dry_run:  # which asks the Hub nothing
                raise
    if chain is not None and manifest is not None:
        around = [manifest.anchor(name) for name in made.get("neighbours", [])]
        bases = [chain] if adapter else [chain if anchor.location.repo_id == "." else anchor.location.repo_id for anchor in around]
        license = manifest.shared_license(around)
        if not dry_run:
            publisher.shut_as_chain([chain, *bases])
    told = {
        name.replace("_", " "): ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in made.items() if value is not None and name not in ("healed", "adapter", "maps", "fingerprints", "license")
    }
    facts = {**_shape_facts(shapes.shape_of(config), family_of(config).name), **told, "parameters": f"{made['parameters']:,}"}
    if isinstance(carried := made.get("adapter"), dict) and isinstance(home := carried.get("home"), dict):
        facts["adapter"] = f"{carried.get('adapter')}, of {home.get('size')}"
    files: dict[str, Content] = {path.name: path for path in sorted(folder.iterdir()) if path.name in _MODEL_FILES or path.suffix == ".safetensors"}
    card = interpolant_card(
        repo_id, made["parameters"], chain=chain, anchors=list(dict.fromkeys(bases)), license=license, facts=facts, manifest=manifest, healed=healed, mixed=made.get("strategy") != "anchor",
        base=chain_call(chain or f"path/to/{made.get('chain')}", made, shapes.shape_of(config)) if adapter else None,
    )
    if adapter:
        files[ADAPTER_CONFIG] = _without_place(folder / ADAPTER_CONFIG)
    elif cut:
        card = cut_card(repo_id, {**made, "shape": shapes.shape_of(config).model_dump()}, kept=KEPT_FILE in files, license=license)
    old = read_card(folder / "README.md")
    if adapter and (old is None or not is_ours(old)):
        old = None  # peft's form to fill in
    repo = Repo(repo_id, "Model made with cbd_hub", files, merge_card(old, card), _OLD_MODEL)
    return _push_one(repo, publisher, dry_run)


def _without_place(path: Path) -> bytes:
    """An adapter_config.json that names no folder of this machine as its base model."""
    data = path.read_bytes()
    config = json.loads(data)
    if is_repo_id(str(config.get("base_model_name_or_path"))):
        return data
    return (json.dumps({**config, "base_model_name_or_path": None}, indent=2, sort_keys=True) + "\n").encode()


def push_anchor(
    repo_id: str, files: Mapping[str, Path], chain: Any, parameters: int, *, license: str | None, token: str | None = None, private: bool | None = None,
    progress: Progress | None = None,
) -> str:
    """Push a ready checkpoint as a further anchor of a chain, with its card; gives the commit."""
    check_repo_id(repo_id)
    source = str(chain.name if chain.files.revision is None else chain.files.name)
    card = anchor_card(
        repo_id, parameters, teacher_repo=None, license=license, facts={"anchor of": source}, chain=source if is_repo_id(source) else None,
        manifest=chain.manifest, distilled=False,
    )
    repo = Repo(repo_id, f"Anchor of {source}", dict(files), card, _OLD_MODEL)
    publisher = Publisher(token, private, None, False, None, progress)
    publisher.look(repo)
    publisher.shut_as_chain([source] if is_repo_id(source) else [])
    publisher.progress(f"{format_bytes(repo.bytes)} to {repo_id}")
    return publisher.put(repo)


def commit_index(
    files: ChainFiles, manifest: Manifest, beside: Mapping[str, Path], anchor: Anchor, folder: Path, *, token: str | None = None,
    create_pr: bool = False, progress: Progress | None = None,
) -> Publication:
    """Commit an extended manifest, and the files of its new anchor that lie beside it, to a published chain's index."""
    headers = {name: _header_text(folder / name) for name in anchor.weight_files}
    preview = Preview(config=json.dumps(json.loads((folder / "config.json").read_bytes()), separators=(",", ":")), headers=headers)
    manifest = manifest.model_copy(update={"anchors": [entry.model_copy(update={"preview": preview}) if entry.name == anchor.name else entry for entry in manifest.anchors]})
    repos = {entry.name: files.name if entry.location.repo_id == "." else entry.location.repo_id for entry in manifest.anchors}
    recipe = _recipe(files)
    card = chain_card(manifest, repo_id=files.name, anchor_repos=repos, recipe=recipe is not None, datasets=_datasets(recipe))
    contents: dict[str, Content] = {FILE_NAME: manifest.to_json().encode(), **beside}
    picture = curve_picture(manifest)
    if picture is not None:
        contents["curve.png"] = picture
    stale = ("curve.png", *(TOKENIZER_FILES if anchor.name == manifest.anchors[0].name else ()))  # the chain's tokenizer is the first anchor's
    repo = Repo(files.name, f"Anchor {anchor.name} in {anchor.location.repo_id}", contents, card, stale, index=True)
    publisher = Publisher(token, None, None, create_pr, None, progress)
    publisher.look(repo)
    if repo.main != files.revision:
        raise StorageError(f"{files.name} has changed since it was read; nothing was written, run the same command again")
    commit = publisher.put(repo)
    return Publication(
        files.name, commit, {anchor.name: (anchor.location.repo_id, anchor.location.revision)}, pull_requests=publisher.pull_requests
    )


def _header_text(path: Path) -> str:
    header, start = read_header(path)
    return json.dumps({"start": start, "tensors": header}, separators=(",", ":"))


def _push_one(repo: Repo, publisher: Publisher, dry_run: bool) -> Publication:
    if dry_run:
        check_card(repo.card, repo.id)
        return Publication(repo.id, None, bytes={repo.id: repo.bytes})
    publisher.look(repo)
    publisher.progress(f"{format_bytes(repo.bytes)} to {repo.id}")
    return Publication(repo.id, publisher.put(repo), bytes={repo.id: repo.bytes}, pull_requests=publisher.pull_requests)


def _anchor_repo(files: ChainFiles, anchor: Anchor, chain: str, repo_id: str, recipe: dict[str, Any] | None) -> Repo:
    """An anchor's repo, its files checked against their records."""
    contents: dict[str, Content] = {}
    for name, record in anchor.files.items():
        if name.lower().endswith(NEVER):
            raise WeightsError(f"anchor {anchor.name} holds {name}; pickles and code are never published: remove it and make the chain again")
        path = files.path(anchor, name)
        check_file(path, record.sha256, record.bytes)
        if name != "README.md":
            contents[name] = path
    Checkpoint(files.path(anchor, "config.json").parent, anchor_config(files, anchor))
    teacher, trained = files.manifest.teacher, anchor.training is not None and anchor.training.tokens > 0
    card = anchor_card(
        repo_id, anchor.parameters, teacher_repo=teacher.repo_id if teacher and anchor.origin != "published" else None, license=files.manifest.shared_license([anchor]),
        facts=_anchor_facts(anchor, recipe), chain=chain, manifest=files.manifest, distilled=trained, datasets=_datasets(recipe) if trained else (),
    )
    return Repo(repo_id, f"Anchor {anchor.name} of {chain}", contents, card, _OLD_MODEL, chain=chain)


def _anchor_facts(anchor: Anchor, recipe: dict[str, Any] | None) -> dict[str, str]:
    facts = _shape_facts(anchor.shape, anchor.family)
    if anchor.parent is not None and anchor.origin == "cut":
        facts["cut from" if anchor.training is None else "cut from and taught by"] = f"anchor {anchor.parent}"
    if anchor.training is not None:
        data = (recipe or {}).get("data")
        if isinstance(data, dict) and (source := data.get("dataset") or data.get("path")):
            facts["data"] = ", ".join(public(str(part)) for part in (source if isinstance(source, list) else [source]))
        facts |= {} if anchor.training.objective is None else {"learned by": anchor.training.objective}
        facts["training tokens"] = f"{anchor.training.tokens:,}"
    if anchor.evaluations:
        last = anchor.evaluations[-1]
        facts["measured loss"] = f"{with_error(last.loss, last.stderr)} nats per token on {last.tokens:,} tokens of {last.dataset}"
    return facts


def _shape_facts(shape: Shape, family: str) -> dict[str, str]:
    text = f"{shape.layers} layers, hidden {shape.hidden}, {shape.heads} heads of {shape.head_size} ({shape.kv_heads} kv), FFN {shape.ffn}, vocabulary {shape.vocab:,}"
    return {"shape": text, "family": family}


def _without_places(manifest: Manifest) -> Manifest:
    """A manifest that names no folder of this machine."""
    values = json.loads(manifest.to_json())
    for entry in (*(entry for anchor in values["anchors"] for entry in anchor["evaluations"]), *(point for link in values["links"] for point in link["curve"])):
        entry["dataset"] = public(entry["dataset"])
    if values["teacher"] is not None and not is_repo_id(values["teacher"]["repo_id"] or ""):
        values["teacher"]["repo_id"] = None
    return Manifest.parse(values, "the chain")


def _recipe(files: ChainFiles) -> dict[str, Any] | None:
    """The recipe, where there is one that can be read."""
    path = files.extra("recipe.yaml")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if path is not None else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return recipe if isinstance(recipe, dict) else None


def _datasets(recipe: dict[str, Any] | None) -> list[str]:
    """Hub ids of the data sets that a recipe names."""
    data = (recipe or {}).get("data")
    named = data.get("dataset") if isinstance(data, dict) else None
    return [named] if isinstance(named, str) and is_repo_id(named) else []


def _shareable(files: ChainFiles, recipe: dict[str, Any] | None) -> bool:
    """Whether there is a recipe that names no place on this machine and, comments included, no token."""

    def texts(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [text for entry in value.values() for text in texts(entry)]
        return [text for entry in value for text in texts(entry)] if isinstance(value, list) else [value] if isinstance(value, str) else []

    path = files.extra("recipe.yaml")
    if recipe is None or path is None or TOKEN.search(path.read_text(encoding="utf-8")):
        return False
    return not any(text.startswith(("/", "~", "\\", "file:")) or ":\\" in text for text in texts(recipe))


def _preview(files: ChainFiles, anchor: Anchor) -> Preview:
    """What a plan needs of an anchor before it is fetched."""
    headers = {name: _header_text(files.path(anchor, name)) for name in anchor.weight_files}
    config = json.dumps(json.loads(files.path(anchor, "config.json").read_bytes()), separators=(",", ":"))
    return Preview(config=config, headers=headers)


def _say_dropped(publisher: Publisher, index: Repo, manifest: Manifest) -> None:
    """Say where the chain that is there has nothing in common with this one, and which anchors that others added to it are none of this one's."""
    held = publisher.manifest(index.id, index.head) if FILE_NAME in index.there else None
    ours = {anchor.fingerprint for anchor in manifest.anchors}
    if held is not None and not ours & {anchor.fingerprint for anchor in held.anchors}:
        logger.warning(
            "%s holds the chain %s (%s), which shares no anchor with this one and becomes its earlier revision; if it is another chain, push this one to another name and put that one back by its tag",
            index.id, held.name, ", ".join(anchor.name for anchor in held.anchors),
        )
    for anchor in [] if held is None else held.anchors:
        repo = anchor.location.repo_id
        if anchor.origin == "published" and repo != f"{index.id}-{anchor.name}" and anchor.fingerprint not in ours:
            logger.warning("%s has an anchor %s in %s, which this chain has not: it is no part of %s any more; `cbd add-anchor %s %s --repo %s` brings it back", index.id, anchor.name, repo, index.id, index.id, repo, repo)


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


def _index_files(files: ChainFiles, manifest: Manifest, recipe: bool) -> dict[str, Content]:
    """What the index repo holds besides its card: no weights."""
    contents: dict[str, Content] = {path.name: path for path in files.tokenizer_files()}
    for anchor in manifest.anchors:
        for record in (anchor.chunks, anchor.maps):
            if record is not None:
                contents[record.path] = files.side_file(record)
    if recipe and (path := files.extra("recipe.yaml")) is not None:
        contents["recipe.yaml"] = path
    picture = curve_picture(manifest)
    if picture is not None:
        contents["curve.png"] = picture
    contents["config.json"] = manifest.config().encode()
    contents[FILE_NAME] = manifest.to_json().encode()
    return contents
