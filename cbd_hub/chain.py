"""`Chain`: the object people hold, and how a chain's folder is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from safetensors.numpy import load_file, save

from cbd_hub import shapes
from cbd_hub.ancestry import Ancestry
from cbd_hub.card_metadata import license_of, merge_card, read_card
from cbd_hub.cards import chain_card
from cbd_hub.configs import read_config
from cbd_hub.errors import ArchitectureError, ArgumentError, VocabularyMismatchError, WeightsError
from cbd_hub.families import family_of
from cbd_hub.files import CHUNK_BYTES, chunk_hashes, sha256, staged_folder, write_bytes, write_text
from cbd_hub.hub import CHECKPOINT_FILES, TOKENIZER_FILES, ChainFiles, OpenChain, open_chain, resolve_checkpoint
from cbd_hub.interpolation.maps import Maps
from cbd_hub.interpolation.plan import Kept, Plan, layer_types
from cbd_hub.manifest import (
    FILE_NAME,
    Anchor,
    Evaluation,
    FileRecord,
    Link,
    Location,
    Manifest,
    PathRecord,
    Shape,
    Teacher,
    Training,
)
from cbd_hub.model import CBDModel
from cbd_hub.plans import plan_in
from cbd_hub.publish import NEVER, push_chain
from cbd_hub.reporting import Progress, Report
from cbd_hub.sizes import format_size
from cbd_hub.texts import texts_of
from cbd_hub.upload import Publication
from cbd_hub.weights import Checkpoint, load_tokenizer, same_vocabulary, settle_tokenizer, tokenizer_file, weight_files


class Chain:
    """A chain of anchors: a local folder, or a Hub repo.

    Example:
        >>> chain = Chain.from_pretrained("./chain")  # doctest: +SKIP
        >>> [anchor.name for anchor in chain.anchors]  # doctest: +SKIP
        ['135M', '99M', '64M']
    """

    def __init__(self, files: ChainFiles) -> None:
        self.files = files

    @classmethod
    def from_pretrained(
        cls, chain: str | os.PathLike[str] | OpenChain, *, revision: str | None = None, token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None, local_files_only: bool = False, force_download: bool = False,
    ) -> Chain:
        """A chain from a local folder or a Hub id; of one that is open, the same with what it has read.

        Raises:
            ManifestError: If there is no such chain, or its chain.json is refused.
        """
        return cls(open_chain(
            chain, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download
        ))

    @property
    def manifest(self) -> Manifest:
        """The validated chain.json."""
        return self.files.manifest

    @property
    def name(self) -> str:
        """Its name."""
        return self.manifest.name

    @property
    def anchors(self) -> list[Anchor]:
        """The anchors in falling size."""
        return list(self.manifest.anchors)

    def neighbours(self, size: str | int) -> tuple[Anchor, Anchor]:
        """The smaller and the larger anchor around a size; the same one twice at an anchor's own size.

        Raises:
            SizeError: If the size lies outside the chain, or in the gap across a bridge.
        """
        return self.manifest.neighbours(self.manifest.size(size))

    def plan(
        self, size: str | int | None = None, *, memory_budget: str | int | None = None, min_tokens_per_second: str | float | None = None,
        max_latency: str | float | None = None, dtype: Any = None, shape: Shape | Mapping[str, int] | None = None, strategy: str = "auto",
        alpha: float | None = None, tolerance: float = 0.02,
    ) -> Plan:
        """The plan of a size, a shape, a budget or a speed, as `CBDModel.plan` gives it."""
        return plan_in(
            self.files.glanced, size, memory_budget=memory_budget, min_tokens_per_second=min_tokens_per_second, max_latency=max_latency, dtype=dtype,
            shape=shape, strategy=strategy, alpha=alpha, tolerance=tolerance,
        )

    def model(self, size: str | int | None = None, **options: Any) -> Any:
        """A model of a size, as `CBDModel.from_chain` gives it."""
        return CBDModel.from_chain(self, size, **options)

    def tokenizer(self, size: str | int | None = None) -> Any:
        """The chain's tokenizer; across a bridge that of a size's own side.

        Args:
            size: A size; None for the largest anchor.

        Raises:
            SizeError: If the size lies outside the chain, or in the gap across a bridge.
            IntegrityError: If its files differ from their recorded hashes.
            WeightsError: If there is none that can be used.
        """
        first = self.anchors[0]
        anchor = first if size is None else self.neighbours(size)[0]
        if anchor.tokenizer_sha256 == first.tokenizer_sha256:
            found = self.files.tokenizer_files()
            return load_tokenizer(found[0].parent if found else self.files.root)
        own = [self.files.checked(anchor, name) for name in TOKENIZER_FILES if name in anchor.files]
        if not own:
            raise WeightsError(f"anchor {anchor.name} reads texts otherwise than {first.name}, and has no tokenizer among its files; add one to it")
        return load_tokenizer(own[0].parent)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Copy the chain, with every anchor, to a local folder: absent or empty.

        Raises:
            IntegrityError: If a file of this chain differs from its record.
            StorageError: If the folder is in the way or the disk is full.
        """
        with staged_folder(Path(folder)) as target:
            builder = ChainBuilder(target, self.name)
            anchors = []
            for anchor in self.anchors:
                builder.anchor_folder(anchor.name).mkdir(parents=True)
                for name in anchor.files:
                    if not name.lower().endswith(NEVER) and "/" not in name:  # a stranger's list may hold anything
                        shutil.copyfile(self.files.checked(anchor, name), builder.anchor_folder(anchor.name) / name)
                kept = None
                if anchor.maps is not None:
                    path = target / "maps" / f"{anchor.name}.safetensors"
                    path.parent.mkdir(exist_ok=True)
                    shutil.copyfile(self.files.side_file(anchor.maps), path)
                    kept = PathRecord(path=f"maps/{anchor.name}.safetensors", sha256=sha256(path))
                anchors.append(builder.record(
                    anchor.name, origin=anchor.origin, parent=anchor.parent, maps=kept, training=anchor.training,
                    evaluations=list(anchor.evaluations), license=anchor.license,
                ))
            for name in ("recipe.yaml", "README.md"):
                found = self.files.extra(name)
                if found is not None:
                    shutil.copyfile(found, target / name)
            builder.finish(anchors, list(self.manifest.links), self.manifest.teacher)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, gated: Literal["auto", "manual"] | None = None, token: str | None = None,
        create_pr: bool = False, commit_message: str | None = None, tag: str | None = None, collection: bool = True, dry_run: bool = False,
        progress: Progress | None = None,
    ) -> Publication:
        """Publish the chain: one ordinary transformers repo per anchor (``org/NAME-138M``), one light index repo, one collection.

        All is checked before the first byte goes up, and the index commit comes last: killed at any moment, the old chain stays whole, and the
        same call goes on. Anchors that lie in repos of their own stay there. A README that is there keeps what people wrote into it.

        Args:
            repo_id: The index repo, such as ``org/NAME``.
            private: Whether repos made now, and the collection, are private.
            gated: Let readers ask for access, granted at once (``auto``) or by hand (``manual``).
            token: Hub token; None for the stored one.
            create_pr: Open pull requests on repos that are there, where you may not write to them; there is no tag and no collection then.
            commit_message: Message of the commits.
            tag: Tag of the index commit; by default the next of v1, v2, ...
            collection: Whether to put all repos into a collection.
            dry_run: Check what is here, send nothing and ask the Hub nothing, and say what would be sent.
            progress: Called with a line for each step of the work.

        Returns:
            Repos, commits, bytes, tag and collection.

        Raises:
            ArgumentError: If a name or a card's metadata would be refused, or a public repo was asked to be private.
            IntegrityError: If a file differs from its record, or the Hub holds other bytes than were sent.
            StorageError: If the Hub cannot be reached or refuses.
        """
        return push_chain(
            self.files, repo_id, private=private, gated=gated, token=token, create_pr=create_pr, commit_message=commit_message, tag=tag,
            collection=collection, dry_run=dry_run, progress=progress,
        )

    def __repr__(self) -> str:
        sizes = " > ".join(anchor.name for anchor in self.anchors)
        return f"Chain({self.name}: {sizes})"


@dataclass(frozen=True)
class ChainBuilder:
    """Writes a chain's folder piece by piece; chain.json comes last, so that a folder with one is whole.

    Attributes:
        root: The folder.
        name: Name of the chain.
    """

    root: Path
    name: str
    _tokenizers: dict[str, Path] = field(default_factory=dict, repr=False)  # hash -> the first folder that has it, of each vocabulary

    def anchor_folder(self, name: str) -> Path:
        """Where an anchor's files go."""
        return self.root / "anchors" / name

    def save_kept(self, name: str, kept: Kept, maps: Maps | None = None) -> PathRecord:
        """Write an anchor's maps into its parent's coordinates."""
        write_bytes(self.maps_file(name), save({**kept.arrays(), **({} if maps is None else maps.arrays())}))
        return self.maps_record(name)

    def maps_record(self, name: str) -> PathRecord:
        """The record of what `save_kept` wrote."""
        path = self.maps_file(name)
        return PathRecord(path=path.relative_to(self.root).as_posix(), sha256=sha256(path))

    def kept(self, name: str) -> Kept | None:
        """What `save_kept` wrote for an anchor, if it did."""
        path = self.maps_file(name)
        return Kept.read(load_file(path)) if path.is_file() else None

    def maps_file(self, name: str) -> Path:
        """Where an anchor's maps are, if it has any."""
        return self.root / "maps" / f"{name}.safetensors"

    def save_chunks(self, name: str, chunks: Mapping[str, list[str]]) -> PathRecord:
        """Write the hashes of every 4 MiB of an anchor's weight files."""
        listing = self.root / "chunks" / f"{name}.json"
        write_text(listing, json.dumps({"chunk_bytes": CHUNK_BYTES, "files": chunks}))
        return PathRecord(path=f"chunks/{name}.json", sha256=sha256(listing))

    def _tokenizer(self, folder: Path, files: Mapping[str, FileRecord]) -> str | None:
        """The hash of a folder's tokenizer, or of an earlier anchor's that reads texts alike."""
        path = tokenizer_file(folder)
        if path is None:
            return None
        found = files[path.name].sha256
        if found not in self._tokenizers:
            alike = next((known for known, other in self._tokenizers.items() if same_vocabulary(folder, other)), None)
            if alike is not None:
                return alike
            self._tokenizers[found] = folder
        return found

    def know(self, anchors: Sequence[Anchor]) -> None:
        """Take in the tokenizers of anchors that are there already."""
        for anchor in anchors:
            if anchor.tokenizer_sha256 is not None:
                self._tokenizers.setdefault(anchor.tokenizer_sha256, self.anchor_folder(anchor.name))

    def record(
        self, name: str, *, origin: Literal["source", "cut", "published", "random"], parent: str | None = None, maps: PathRecord | None = None, training: Training | None = None,
        evaluations: Sequence[Evaluation] = (), license: str | None = None,
    ) -> Anchor:
        """Hash an anchor's files and describe it.

        Raises:
            WeightsError: If a tensor is missing, extra or mis-shaped.
        """
        folder = self.anchor_folder(name)
        config = read_config(folder)
        Checkpoint(folder, config)
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        files = {path.name: FileRecord(sha256=sha256(path), bytes=path.stat().st_size) for path in paths}
        chunks = {path.name: chunk_hashes(path) for path in paths if path.suffix == ".safetensors"}
        return Anchor(
            name=name, parameters=shapes.parameter_count(config), shape=shapes.shape_of(config), family=family_of(config).name,
            tokenizer_sha256=self._tokenizer(folder, files),
            location=Location(repo_id=".", subfolder=f"anchors/{name}"), files=files,
            chunks=self.save_chunks(name, chunks), parent=parent, origin=origin, maps=maps,
            training=training, evaluations=list(evaluations), license=license,
        )

    def finish(self, anchors: list[Anchor], links: list[Link], teacher: Teacher | None, *, recipe: str | None = None) -> Manifest:
        """Write the tokenizer, config.json, the card (around it what people wrote into one that is there), the recipe where there is one, and at last chain.json."""
        manifest = Manifest(
            name=self.name, created_with=f"cbd_hub {version('cbd-hub')}", teacher=teacher, anchors=anchors, links=links
        )
        for name in TOKENIZER_FILES:
            if name in anchors[0].files:
                write_bytes(self.root / name, (self.anchor_folder(anchors[0].name) / name).read_bytes())
        card = self.root / "README.md"
        write_text(card, merge_card(read_card(card), chain_card(manifest, recipe=recipe is not None or (self.root / "recipe.yaml").is_file())))
        if recipe is not None:
            write_text(self.root / "recipe.yaml", recipe)
        write_text(self.root / "config.json", manifest.config())
        write_text(self.root / FILE_NAME, manifest.to_json())
        return manifest


def unique_name(parameters: int, taken: Sequence[str]) -> str:
    """An anchor's name: its size in three significant digits, made unique.

    Example:
        >>> unique_name(134_515_008, ["135M"])
        '135M-2'
    """
    name = format_size(parameters)
    candidates = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 3))]
    return next(candidate for candidate in candidates if candidate not in taken)


def chain_name(folder: Path) -> str:
    """A chain's name, from the name of its folder."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", folder.resolve().name) if not unicodedata.combining(letter))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")[:96] or "chain"


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a model folder's weights, config and tokenizer, and nothing that could be code."""
    target.mkdir(parents=True, exist_ok=True)
    for path in [*weight_files(source), *(source / name for name in CHECKPOINT_FILES)]:
        if path.is_file():
            shutil.copyfile(path, target / path.name)


def assemble_chain(
    checkpoints: Sequence[str | os.PathLike[str]], output_dir: str | os.PathLike[str], *, align: str | bool = "auto",
    calibration: Any = None, report: Report | None = None,
) -> Chain:
    """A chain from ready checkpoints, without training: the paper's way.

    The smaller anchor of each segment is brought into the larger one's coordinates (`interpolation.align`); where it is not, layers are mapped evenly and
    neurons, heads and channels by index. One that `cbd cut` cut from the larger one, trained since or not, has them already, as the file beside its weights says. The anchors themselves stay what they were, bit for bit: the maps lie beside
    them and are part of every plan in between. Without calibration text layers come back last block first, alpha goes by size distance, and ``auto`` is
    ``patch`` where only layers differ, else ``blend``.

    Args:
        checkpoints: Two or more model folders or Hub ids, in any order.
        output_dir: The folder to make: absent or empty.
        align: ``"auto"``: where that brings the neighbours nearer (with text: where the middle loses less), and not where one was cut from the other. True: always, but for those. False: the anchors' own coordinates.
        calibration: Text on which order, road and curve of each segment are measured: a file or a pattern, a list of texts, or a ``datasets.Dataset`` with a
            column ``text``. Where neighbours are aligned, coordinates are fitted and importance is measured on half of the texts, and all of that on the others.
        report: Called with what is done, how much of it, and of how much where that is known.

    Returns:
        The chain.

    Raises:
        ArgumentError: If there are fewer than two checkpoints, two of one size, or an unknown ``align``.
        ArchitectureError: If they differ in architecture or head size, or a smaller one is deeper or wider than a larger one.
        VocabularyMismatchError: If they differ in vocabulary.
        DataError: If there is no text, or too little.
        WeightsError: If a checkpoint's files cannot be used, or hold a value that is no finite number where its models are run.
        StorageError: If ``output_dir`` is in the way or the disk is full.
    """
    from cbd_hub.links import Texts, join  # live models, which an opened chain has no use for
    if align != "auto" and not isinstance(align, bool):
        raise ArgumentError(f'align={align!r} is not known; use align="auto", True or False')
    if isinstance(checkpoints, (str, os.PathLike)):
        raise ArgumentError("checkpoints is a list; name two or more")
    if len(checkpoints) < 2:
        raise ArgumentError(f"a chain needs two checkpoints or more, {len(checkpoints)} came; name the larger and the smaller ones")
    texts, dataset = (None, "") if calibration is None else texts_of(calibration)
    found = []
    for checkpoint in checkpoints:
        folder = resolve_checkpoint(checkpoint)
        config = read_config(folder)
        Checkpoint(folder, config)
        Ancestry.read(folder)
        found.append((shapes.parameter_count(config), folder, config))
    found.sort(key=lambda entry: -entry[0])
    for (large, large_folder, large_config), (small, small_folder, small_config) in zip(found, found[1:]):
        check_pair(large, large_folder, large_config, small, small_folder, small_config)
    calibrated = None if texts is None else Texts.read(texts, found[0][1], [config for *_, config in found])
    target = Path(output_dir).expanduser()
    with staged_folder(target) as root:
        builder = ChainBuilder(root, chain_name(target))
        anchors: list[Anchor] = []
        for parameters, folder, _ in found:
            if report is not None:
                report("copying", len(anchors), len(found))
            name = unique_name(parameters, [anchor.name for anchor in anchors])
            copy_checkpoint(folder, builder.anchor_folder(name))
            if not anchors:
                settle_tokenizer(builder.anchor_folder(name))
            anchors.append(builder.record(name, origin="published", license=license_of(folder)))
        links = []
        folders = {anchor.name: folder for anchor, (_, folder, _) in zip(anchors, found)}
        for place, joined in enumerate(join(anchors, [config for *_, config in found], folders, align, calibrated, dataset, report), 1):
            links.append(joined.link)
            if joined.kept is not None:
                maps = builder.save_kept(anchors[place].name, joined.kept, joined.maps)
                origin = {"origin": "cut"} if joined.cut else {}
                anchors[place] = anchors[place].model_copy(update={"parent": anchors[place - 1].name, "maps": maps, **origin})
            for at, entry in zip((place, place - 1), joined.ends):
                anchors[at] = anchors[at].model_copy(update={"evaluations": [entry]})
        builder.finish(anchors, links, None)
    return Chain.from_pretrained(target)


def check_pair(large: int, large_folder: Path, large_config: Any, small: int, small_folder: Path, small_config: Any) -> None:
    """Refuse two checkpoints between which nothing can be interpolated.

    Raises:
        ArgumentError: If they have one size.
        ArchitectureError: If they differ in architecture, head size or in what they compute, or the smaller one is wider somewhere.
        ManifestError: If their layers' types allow no map.
        VocabularyMismatchError: If they differ in vocabulary.
    """
    pair = f"{large_folder} ({format_size(large)}) and {small_folder} ({format_size(small)})"
    if large == small:
        raise ArgumentError(f"{pair} have the same size; a chain needs anchors of different sizes")
    if family_of(large_config) is not family_of(small_config):
        raise ArchitectureError(f"{pair} are a {large_config.model_type} and a {small_config.model_type}; a segment needs one architecture")
    big, little = shapes.shape_of(large_config), shapes.shape_of(small_config)
    if big.vocab != little.vocab or not same_vocabulary(large_folder, small_folder):
        raise VocabularyMismatchError(
            f"{pair} have different tokenizers (vocabularies of {big.vocab:,} and {little.vocab:,} rows); a segment needs one vocabulary. Where they should be one, copy the tokenizer's files of either folder to the other"
        )
    if big.head_size != little.head_size:
        raise ArchitectureError(f"{pair} have head_size {big.head_size} and {little.head_size}; anchors must agree in the size of their heads")
    differs = shapes.other_differences(large_config, small_config)
    if differs:
        raise ArchitectureError(f"{pair} differ in {', '.join(differs[:4])}; anchors must agree in all but layers and widths")
    wider = [(name, getattr(little, name), getattr(big, name)) for name in ("layers", "hidden", "heads", "kv_heads", "ffn")]
    for name, ours, theirs in (*wider, ("heads per kv head", little.heads // little.kv_heads, big.heads // big.kv_heads)):
        if ours > theirs:
            raise ArchitectureError(f"{pair}: the smaller one has more {name} ({ours} against {theirs}); that is not supported")
    Kept.even(little, big, layer_types(small_config, large_config))
