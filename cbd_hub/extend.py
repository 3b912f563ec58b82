"""A further anchor for a chain, in a repo of its own: how third parties extend a chain that is published."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cbd_hub import shapes
from cbd_hub.card_metadata import license_of, merge_card, read_card
from cbd_hub.cards import chain_card
from cbd_hub.chain import Chain, ChainBuilder, check_pair, unique_name
from cbd_hub.configs import read_config
from cbd_hub.errors import ArgumentError, StorageError
from cbd_hub.families import family_of
from cbd_hub.files import chunk_hashes, sha256, write_bytes, write_text
from cbd_hub.hub import CHECKPOINT_FILES, TOKENIZER_FILES, resolve_checkpoint
from cbd_hub.interpolation.plan import Kept, layer_types
from cbd_hub.links import plain_link
from cbd_hub.manifest import FILE_NAME, Anchor, Blend, FileRecord, Link, Location, Manifest, PathRecord
from cbd_hub.plans import coordinates_of, stored_coordinates
from cbd_hub.publish import commit_index, push_anchor
from cbd_hub.reporting import Progress
from cbd_hub.upload import Publication
from cbd_hub.weights import Checkpoint, settle_tokenizer, weight_files


logger = logging.getLogger(__name__)


def add_anchor(
    chain: Chain, checkpoint: str | Path, repo_id: str, *, token: str | None = None, private: bool | None = None, create_pr: bool = False,
    progress: Progress | None = None,
) -> Publication:
    """Push a checkpoint as an anchor of a chain to a repo of its own, and name it in the chain's index.

    A local chain gets the anchor in its chain.json, pinned to the repo's commit; of a chain on the Hub the index is committed to, or with
    ``create_pr`` a pull request is opened on it. A segment that the anchor splits loses its measured curve and recommended
    sizes: measure the new ones anew. Where its ends share coordinates, as those of a distilled chain do, a model that a distilled chain itself made there, healed or not,
    keeps them; any other brings a segment in which layers and neurons are blended by their place, and a warning of that. The anchor has the licence that the checkpoint's card names, else the chain's, else none.

    Args:
        chain: The chain.
        checkpoint: A model folder or a Hub id.
        repo_id: Where the anchor goes; it may be the checkpoint's own repo.
        token: Hub token; None for the stored one.
        private: Whether a repo made now is private.
        create_pr: Open a pull request on the index, where you may not write to it.
        progress: Called with a line for each step of the work.

    Returns:
        The index's commit (None for a local chain) and the anchor's.

    Raises:
        ArgumentError: If the chain has an anchor of that size.
        ArchitectureError: If it does not fit its neighbours.
        VocabularyMismatchError: If its tokenizer is another.
        StorageError: If the Hub cannot be reached or refuses, or the chain was changed meanwhile.
    """
    folder = resolve_checkpoint(checkpoint, options={"token": token})
    config = read_config(folder)
    Checkpoint(folder, config)
    size, anchors = shapes.parameter_count(config), chain.anchors
    place = sum(anchor.parameters > size for anchor in anchors)
    if any(anchor.parameters == size for anchor in anchors):
        raise ArgumentError(f"{chain.name} has an anchor of {size:,} parameters already; a chain needs anchors of different sizes")
    taken = next((anchor.name for anchor in anchors if anchor.location.repo_id.lower() == repo_id.lower()), None)
    if taken is not None:
        raise ArgumentError(f"{repo_id} holds anchor {taken} of this chain, and another would take its place; give the new one a repo of its own")
    above, below = anchors[place - 1] if place else None, anchors[place] if place < len(anchors) else None
    configs = {}
    for other, larger in ((above, True), (below, False)):
        if other is not None:
            path = chain.files.checked(other, "config.json").parent
            for part in (part for part in TOKENIZER_FILES if part in other.files):
                chain.files.checked(other, part)
            configs[other.name] = read_config(path)
            ends = [(size, folder, config), (other.parameters, path, configs[other.name])]
            (large, large_folder, large_config), small = ends[::-1] if larger else ends
            check_pair(large, large_folder, large_config, *small)
    name = unique_name(size, [anchor.name for anchor in anchors])
    configs[name] = config
    held = None
    if above is not None and below is not None and coordinates_of(chain.files, below, above)[0] is not None and (held := _held(chain, config, above, below)) is None:
        logger.warning(
            "%s and %s share coordinates, which %s is not known to have: sizes around it are blends of layers and neurons by their place, which may lose far more than before; "
            "measure them with cbd eval", below.name, above.name, name,
        )
    files = {path.name: path for path in (*weight_files(folder), *(folder / name for name in CHECKPOINT_FILES)) if path.is_file()}
    license = license_of(folder) or chain.manifest.shared_license(anchors)
    with tempfile.TemporaryDirectory() as temporary:
        builder = ChainBuilder(Path(temporary), chain.name)
        if place == 0:  # the chain's tokenizer is the first anchor's
            files |= _settled(files, builder.anchor_folder(name))
        commit = push_anchor(repo_id, files, chain, size, license=license, token=token, private=private, progress=progress)
        chunks = {path.name: chunk_hashes(path) for path in files.values() if path.suffix == ".safetensors"}
        record = builder.save_chunks(name, chunks)
        maps = None if held is None else builder.save_kept(name, held.kept)
        anchor = _record(name, size, config, files, record, Location(repo_id=repo_id, revision=commit), license)
        # Its neighbour's tokenizer is the same, whatever version of cbd_hub recorded it.
        anchor = anchor.model_copy(update={"tokenizer_sha256": next(other.tokenizer_sha256 for other in (above, below) if other is not None)})
        anchor = anchor if held is None else anchor.model_copy(update={"parent": held.parent, "maps": maps})
        manifest = chain.manifest.model_copy(update={"anchors": [*anchors[:place], anchor, *anchors[place:]]})
        links = {(link.small, link.large): link for link in chain.manifest.links}
        if held is not None:
            links |= {(link.small, link.large): link for link in held.links(chain, anchor)}
        pairs = [(low, high) for high, low in zip(manifest.anchors, manifest.anchors[1:])]
        manifest = manifest.model_copy(update={"links": [links.get((low.name, high.name)) or _link(low, high, configs) for low, high in pairs]})
        manifest = type(manifest).parse(json.loads(manifest.to_json()), "the extended chain")
        beside = {part.path: builder.root / part.path for part in (record, maps) if part is not None}
        if place == 0:
            beside |= {path: files[path] for path in TOKENIZER_FILES if path in files}
        if chain.files.revision is not None:
            return commit_index(chain.files, manifest, beside, anchor, folder, token=token, create_pr=create_pr, progress=progress)
        root = chain.files.root
        if Manifest.read(root) != chain.manifest:
            raise StorageError(f"{chain.name} has changed since it was read; nothing was written to it, run the same command again")
        for target, source in beside.items():
            write_bytes(root / target, source.read_bytes())
    card = root / "README.md"
    text = chain_card(manifest, recipe=(root / "recipe.yaml").is_file())
    write_text(root / "config.json", manifest.config())
    write_text(root / FILE_NAME, manifest.to_json())
    for tokenizer_file in {*TOKENIZER_FILES} - {*beside} if place == 0 else ():
        (root / tokenizer_file).unlink(missing_ok=True)
    write_text(card, merge_card(read_card(card), text))
    return Publication(chain.name, None, {name: (repo_id, commit)})


@dataclass(frozen=True)
class _Held:
    """A model that was made by a chain between two of its anchors, in the coordinates that they share.

    Attributes:
        above: The larger anchor.
        below: The smaller one.
        layers: For each of its layers, the larger anchor's in whose place it stands, rising.
        kept: The units of ``parent`` that it holds.
        parent: The anchor that both, or the smaller one, were cut from.
    """

    above: Anchor
    below: Anchor
    layers: list[int]
    kept: Kept
    parent: str

    def links(self, chain: Chain, anchor: Anchor) -> tuple[Link, Link]:
        """The two segments around it, as an anchor; layers come back in the order in which they did."""
        order = chain.manifest.link(self.below, self.above).order
        return (
            plain_link(anchor, self.above, [layer for layer in order if layer not in self.layers], Blend()),
            plain_link(self.below, anchor, [self.layers.index(layer) for layer in order if layer in self.layers], Blend()),
        )


def _held(chain: Chain, config: Any, above: Anchor, below: Anchor) -> _Held | None:
    """Where a model stands between two anchors whose coordinates are shared; None where its config does not say that it was made there, in these coordinates."""
    made = getattr(config, "cbd", None)
    if not isinstance(made, dict) or below.maps is None or below.parent is None or (made.get("neighbours"), made.get("maps")) != ([below.name, above.name], below.maps.sha256):
        return None
    shared, maps = coordinates_of(chain.files, below, above)
    if shared is None or maps is not None:
        return None
    back = chain.manifest.link(below, above).order[: shapes.shape_of(config).layers - below.shape.layers]
    layers = sorted({*map(int, shared.layers), *back})
    kept, _ = stored_coordinates(chain.files, below.maps)
    own = layers
    if below.parent != above.name and above.maps is not None:
        own = [int(layer) for layer in stored_coordinates(chain.files, above.maps)[0].layers[layers]]
    return _Held(above, below, layers, replace(kept, layers=np.array(own)), below.parent)


def _settled(files: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """A model's tokenizer files as `settle_tokenizer` writes them, in a folder of their own."""
    folder.mkdir(parents=True)
    for name in ("config.json", *TOKENIZER_FILES):
        if name in files:
            shutil.copyfile(files[name], folder / name)
    settle_tokenizer(folder)
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def _link(small: Anchor, large: Anchor, configs: dict[str, Any]) -> Link:
    kept = Kept.even(small.shape, large.shape, layer_types(configs[small.name], configs[large.name]))
    return plain_link(small, large, kept.dropped[::-1], Blend(replicate=True))


def _record(name: str, size: int, config: Any, files: dict[str, Path], chunks: PathRecord, location: Location, license: str | None) -> Anchor:
    records = {path: FileRecord(sha256=sha256(found), bytes=found.stat().st_size) for path, found in files.items()}
    return Anchor(
        name=name, parameters=size, shape=shapes.shape_of(config), family=family_of(config).name,
        location=location, files=records, chunks=chunks, origin="published", license=license,
    )
