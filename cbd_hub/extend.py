"""A further anchor for a chain, in a repo of its own: how third parties extend a chain that is published."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from cbd_hub import shapes
from cbd_hub.cards import chain_card, license_of, merge_card, read_card, shared_license
from cbd_hub.chain import Chain, check_pair, unique_name
from cbd_hub.configs import read_config
from cbd_hub.errors import ArgumentError
from cbd_hub.families import family_of
from cbd_hub.files import CHUNK_BYTES, chunk_hashes, sha256, write_text
from cbd_hub.hub import CHECKPOINT_FILES, resolve_checkpoint
from cbd_hub.interpolation.planner import Kept, layer_types
from cbd_hub.links import plain_link
from cbd_hub.manifest import FILE_NAME, Anchor, FileRecord, Link, Location, PathRecord
from cbd_hub.publish import commit_index, push_anchor
from cbd_hub.upload import Publication, Say
from cbd_hub.weights import Checkpoint


def add_anchor(
    chain: Chain, checkpoint: str | Path, repo_id: str, *, token: str | None = None, private: bool | None = None, create_pr: bool = False,
    say: Say | None = None,
) -> Publication:
    """Push a checkpoint as an anchor of a chain to a repo of its own, and name it in the chain's index.

    A local chain gets the anchor in its chain.json, pinned to the repo's commit; of a chain on the Hub the index is committed to, or with
    ``create_pr`` a pull request is opened on it. A segment that the anchor splits loses its measured curve and recommended
    sizes: measure the new ones anew. The anchor has the licence that the checkpoint's card names, else the chain's, else none.

    Args:
        chain: The chain.
        checkpoint: A model folder or a Hub id.
        repo_id: Where the anchor goes; it may be the checkpoint's own repo.
        token: Hub token; None for the stored one.
        private: Whether a repo made now is private.
        create_pr: Open a pull request on the index, for who may not write to it.
        say: Called with each line of progress.

    Returns:
        The index's commit (None for a local chain) and the anchor's.

    Raises:
        ArgumentError: If the chain has an anchor of that size.
        ArchitectureError: If it does not fit its neighbours.
        VocabularyMismatchError: If its tokenizer is another.
        StorageError: If the Hub cannot be reached or refuses.
    """
    folder = resolve_checkpoint(checkpoint, options={"token": token})
    config = read_config(folder)
    Checkpoint(folder, config)
    size, anchors = shapes.parameter_count(config), chain.anchors
    place = sum(anchor.parameters > size for anchor in anchors)
    if any(anchor.parameters == size for anchor in anchors):
        raise ArgumentError(f"{chain.name} has an anchor of {size:,} parameters already; a chain needs anchors of different sizes")
    above, below = anchors[place - 1] if place else None, anchors[place] if place < len(anchors) else None
    configs = {}
    for other, larger in ((above, True), (below, False)):
        if other is not None:
            path = chain.files.checked(other, "config.json").parent
            if "tokenizer.json" in other.files:
                chain.files.checked(other, "tokenizer.json")
            configs[other.name] = read_config(path)
            ends = [(size, folder, config), (other.parameters, path, configs[other.name])]
            (large, large_folder, large_config), small = ends[::-1] if larger else ends
            check_pair(large, large_folder, large_config, *small)
    name = unique_name(size, [anchor.name for anchor in anchors])
    configs[name] = config
    files = {path.name: path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors" or path.name in CHECKPOINT_FILES}
    license = license_of(folder) or shared_license(chain.manifest, anchors)
    commit = push_anchor(repo_id, files, chain, size, license=license, token=token, private=private, say=say)
    with tempfile.TemporaryDirectory() as temporary:
        listing = Path(temporary) / f"{name}.json"
        chunks = {path.name: chunk_hashes(path) for path in files.values() if path.suffix == ".safetensors"}
        write_text(listing, json.dumps({"chunk_bytes": CHUNK_BYTES, "files": chunks}))
        record = PathRecord(path=f"chunks/{name}.json", sha256=sha256(listing))
        anchor = _record(name, size, config, files, record, Location(repo_id=repo_id, revision=commit), license)
        manifest = chain.manifest.model_copy(update={"anchors": [*anchors[:place], anchor, *anchors[place:]]})
        links = {(link.small, link.large): link for link in chain.manifest.links}
        pairs = [(low, high) for high, low in zip(manifest.anchors, manifest.anchors[1:])]
        manifest = manifest.model_copy(update={"links": [links.get((low.name, high.name)) or _link(low, high, configs) for low, high in pairs]})
        manifest = type(manifest).parse(json.loads(manifest.to_json()), "the extended chain")
        if chain.files.revision is not None:
            return commit_index(chain.files, manifest, listing.read_bytes(), record.path, anchor, folder, token=token, create_pr=create_pr, say=say)
        write_text(chain.files.root / record.path, listing.read_text())
    card = chain.files.root / "README.md"
    text = chain_card(manifest, recipe=(chain.files.root / "recipe.yaml").is_file())
    write_text(chain.files.root / FILE_NAME, manifest.to_json())
    write_text(card, merge_card(read_card(card), text, shared_license(chain.manifest, chain.anchors)))
    return Publication(chain.name, None, {name: (repo_id, commit)})


def _link(small: Anchor, large: Anchor, configs: dict[str, Any]) -> Link:
    return plain_link(small, large, Kept.even(small.shape, large.shape, layer_types(configs[small.name], configs[large.name])))


def _record(name: str, size: int, config: Any, files: dict[str, Path], chunks: PathRecord, location: Location, license: str | None) -> Anchor:
    records = {path: FileRecord(sha256=sha256(found), bytes=found.stat().st_size) for path, found in files.items()}
    return Anchor(
        name=name, parameters=size, shape=shapes.shape_of(config), family=family_of(config).name,
        tokenizer_sha256=records["tokenizer.json"].sha256 if "tokenizer.json" in records else None, location=location, files=records, chunks=chunks,
        origin="published", license=license,
    )
