"""chain.json as validated data: what a chain is, and which anchors lie around a size.

A chain.json from a stranger is hostile until it has passed through here: paths that leave the folder, absurd shapes, wrong
hashes and newer schemas are refused with the field named.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cbd_hub.errors import ManifestError, SizeError
from cbd_hub.sizes import format_size, matches, parse_size


logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FILE_NAME = "chain.json"
MODEL_TYPE = "cbd_chain"  # in the config.json beside it
MAX_BYTES = 64 * 2**20
# Several times what the largest published models have: layers times the wider of FFN and heads, and shapes on the way between two anchors.
_MAX_UNITS = 2**24
_MAX_BETWEEN = 2**28


def _safe_path(path: str) -> str:
    """A relative path with forward slashes that stays inside its folder."""
    parts = path.split("/")
    if not path or not path.isprintable() or "\\" in path or ":" in path or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"path {path[:80]!r} is not a plain relative path inside the chain's folder")
    return path


SafePath = Annotated[str, Field(max_length=512), AfterValidator(_safe_path)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
Parameters = Annotated[int, Field(gt=0, le=10**15)]
Loss = Annotated[float, Field(ge=0, le=10**6)]


class Data(BaseModel):
    """Frozen data; a field that this version does not know is dropped with a log line."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _clean(cls, values: Any) -> Any:
        if isinstance(values, dict):
            if any(isinstance(value, str) and not value.isprintable() for value in values.values()):
                raise ValueError("a text holds control characters")
            unknown = sorted(str(key)[:40] for key in values if key not in cls.model_fields)
            if unknown:
                logger.info("%s: ignored unknown fields %s", cls.__name__, ", ".join(unknown[:5]))
        return values


class Shape(Data):
    """The shape of a model: layers, widths and vocabulary.

    Example:
        >>> Shape(layers=12, hidden=768, heads=12, kv_heads=12, head_size=64, ffn=3072, vocab=50257).text
        '12 x 768, ffn 3072'
    """

    layers: int = Field(ge=1, le=4096)
    hidden: int = Field(ge=1, le=2**17)
    heads: int = Field(ge=1, le=4096)
    kv_heads: int = Field(ge=1, le=4096)
    head_size: int = Field(ge=1, le=4096)
    ffn: int = Field(ge=1, le=2**20)
    vocab: int = Field(ge=1, le=2**24)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        units = self.layers * max(self.ffn, self.heads * self.head_size)
        if units > _MAX_UNITS:
            raise ValueError(f"{self.layers:,} layers of {units // self.layers:,} neurons or head channels are {units:,} units, and no more than {_MAX_UNITS:,} are planned for")
        return self

    @property
    def text(self) -> str:
        """Layers x hidden width, and the FFN width."""
        return f"{self.layers} x {self.hidden}, ffn {self.ffn}"

    def only_layers_differ(self, other: Shape) -> bool:
        """Whether another shape has more or fewer layers and is the same otherwise: where whole blocks can be put from one into the other."""
        return self.layers != other.layers and self.model_copy(update={"layers": other.layers}) == other


class Location(Data):
    """Where an anchor's files are: in the chain's own folder ("."), or in a Hub repo pinned to a commit."""

    repo_id: Annotated[str, Field(pattern=r"^(\.|[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})$")]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    subfolder: SafePath | None = None

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if self.repo_id != "." and self.revision is None:
            raise ValueError(f"anchor in repo {self.repo_id} has no revision; a remote anchor is pinned by a full commit hash")
        return self


class FileRecord(Data):
    """Hash and length of one file."""

    sha256: Sha256
    bytes: int = Field(ge=0, le=2**50)


class PathRecord(Data):
    """A side file and its hash."""

    path: SafePath
    sha256: Sha256


class Training(Data):
    """What an anchor has been trained with: tokens seen, last loss in nats per token, the recipe, and the loss in words."""

    tokens: int = Field(ge=0)
    loss: float | None = None
    recipe_sha256: Sha256 | None = None
    objective: str | None = Field(default=None, max_length=512)


class Teacher(Data):
    """The model the chain starts from."""

    repo_id: str | None = Field(default=None, max_length=256)
    revision: str | None = Field(default=None, max_length=64)
    parameters: Parameters
    license: str | None = Field(default=None, max_length=128)


class Evaluation(Data):
    """A measured loss, in nats per token, with its standard error over documents; in bits per byte too where the chain has several vocabularies."""

    loss: Loss
    bits_per_byte: Loss | None = None
    stderr: Loss | None = None
    tokens: int = Field(ge=0)
    dataset: str = Field(max_length=256)


class CurvePoint(Evaluation):
    """A measured loss of an in-between size."""

    size: Parameters
    strategy: Literal["blend", "patch"]


class Preview(Data):
    """What a plan needs to know of an anchor on the Hub before anything of it is fetched; a load checks it against the files.

    Attributes:
        config: The text of its config.json, on one line.
        headers: The text of each weight file's safetensors header.
    """

    config: str = Field(max_length=2**20)
    headers: dict[SafePath, Annotated[str, Field(max_length=2**24)]] = Field(max_length=10_000)


class Anchor(Data):
    """One complete model of the chain; its licence is the teacher's where it has none of its own.

    ``tokenizer_sha256`` is the hash of its tokenizer.json (without one of its tokenizer.model or vocab.json), or of that of another anchor which reads texts
    alike: anchors with one value have one vocabulary.
    """

    name: Name
    parameters: Parameters
    shape: Shape
    family: Name
    tokenizer_sha256: Sha256 | None = None
    location: Location
    files: dict[SafePath, FileRecord] = Field(max_length=10_000)
    chunks: PathRecord | None = None
    parent: Name | None = None
    origin: Literal["source", "cut", "published", "random"]
    maps: PathRecord | None = None
    training: Training | None = None
    evaluations: list[Evaluation] = Field(default=[], max_length=1000)
    preview: Preview | None = None
    license: str | None = Field(default=None, max_length=128)

    @property
    def weight_files(self) -> list[str]:
        """The safetensors files."""
        return sorted(path for path in self.files if path.endswith(".safetensors"))

    @property
    def fingerprint(self) -> str:
        """What tells its weights from others', wherever they lie: a hash of its weight files' hashes."""
        return hashlib.sha256("".join(self.files[name].sha256 for name in self.weight_files).encode()).hexdigest()[:16]


class Mix(Data):
    """The weights of a blend.

    Attributes:
        alpha: Weight of the smaller neighbour where both hold a unit.
        layer_gain: Factor on what a layer that only the larger neighbour holds adds to the residual stream.
        neuron_gain: Factor on what an FFN neuron that only the larger neighbour holds adds to the residual stream.
        head_gain: The same for a head.
        channel_gain: Factor on what is written into a channel of the residual stream that only the larger neighbour holds.
    """

    alpha: float = Field(ge=0, le=1)
    layer_gain: float = Field(default=1.0, ge=0, le=1)
    neuron_gain: float = Field(default=1.0, ge=0, le=1)
    head_gain: float = Field(default=1.0, ge=0, le=1)
    channel_gain: float = Field(default=1.0, ge=0, le=1)

    @property
    def text(self) -> str:
        """The weights in words, without gains of 1."""
        weights = {name: getattr(self, name) for name in Mix.model_fields}
        return ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in weights.items() if name == "alpha" or value != 1)

    def near(self, other: Mix) -> bool:
        """Whether another one makes the same of two anchors, but for rounding."""
        return all(abs(getattr(self, name) - getattr(other, name)) < 0.005 for name in Mix.model_fields)


class RoadPoint(Mix):
    """How a segment's blend was fitted at one size.

    Attributes:
        size: Where on the segment.
        layers: Layers of the in-between model there; the FFN fills the rest.
        hidden: Its hidden width, where that was fitted; None for linear in size.
    """

    size: Parameters
    layers: int = Field(ge=1, le=4096)
    hidden: int | None = Field(default=None, ge=1, le=2**17)


class Aligned(Data):
    """How the smaller anchor was brought into the larger one's coordinates; the maps themselves are in its maps file.

    Attributes:
        residual: Kind of the map of the residual stream.
        error: Largest difference of a logit, on random tokens, between the smaller anchor and the same in those coordinates.
    """

    residual: Literal["rotation", "permutation"]
    error: float = Field(ge=0)


class Blend(Data):
    """Settings of the blend of a segment.

    Attributes:
        align: Set where the anchors have no common ancestor and were aligned.
        road: Fitted points in rising size; empty for the default rule.
        replicate: Whether a layer that the smaller neighbour lacks is filled from below by replicating its layer before
            (paper, Eq. 3). Off where the anchors share coordinates: there the larger neighbour's layer comes back.
    """

    road: list[RoadPoint] = Field(default=[], max_length=1000)
    replicate: bool = False
    align: Aligned | None = None


class Patch(Data):
    """Settings of the patch of a segment: none besides the link's order."""


class Strategies(Data):
    """The ways in which a segment can be filled; None where one does not apply."""

    blend: Blend | None = None
    patch: Patch | None = None


class Link(Data):
    """Two neighbouring anchors: a segment, or a bridge that no size can lie on."""

    kind: Literal["segment", "bridge"]
    small: Name
    large: Name
    order: list[Annotated[int, Field(ge=0, lt=4096)]] = Field(default=[], max_length=4096)
    strategies: Strategies = Strategies()
    curve: list[CurvePoint] = Field(default=[], max_length=10_000)
    recommended_sizes: list[Parameters] = Field(default=[], max_length=1000)


class Manifest(Data):
    """A chain: its anchors in falling size and the links between neighbours."""

    schema_version: Annotated[int, Field(ge=1, strict=True)] = SCHEMA_VERSION
    name: Name
    created_with: str = Field(max_length=64)
    teacher: Teacher | None = None
    anchors: list[Anchor] = Field(min_length=1, max_length=1000)
    links: list[Link] = Field(default=[], max_length=1000)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [anchor.name for anchor in self.anchors]
        if len(set(names)) != len(names):
            raise ValueError("two anchors have the same name")
        sizes = [anchor.parameters for anchor in self.anchors]
        if any(larger <= smaller for larger, smaller in zip(sizes, sizes[1:])):
            raise ValueError("anchors are not in falling size")
        pairs = list(zip(names[1:], names))
        if [(link.small, link.large) for link in self.links] != pairs:
            raise ValueError(f"links must join the neighbours {pairs} in this order")
        for link in self.links:
            small, large = self.anchor(link.small), self.anchor(link.large)
            if link.kind == "segment" and (between := _between(small.shape, large.shape)) > _MAX_BETWEEN:
                raise ValueError(f"link {link.small}-{link.large}: {between:,} shapes lie between its anchors, and no more than {_MAX_BETWEEN:,} are searched")
            dropped = large.shape.layers - small.shape.layers
            sizes = [point.size for point in link.strategies.blend.road] if link.strategies.blend is not None else []
            if sizes != sorted(set(sizes)) or any(not small.parameters < size < large.parameters for size in sizes):
                raise ValueError(f"link {link.small}-{link.large}: road must hold rising sizes between its anchors")
            if any(not small.parameters <= point.size <= large.parameters for point in link.curve):
                raise ValueError(f"link {link.small}-{link.large}: curve holds a size outside its anchors")
            wrong = len(set(link.order)) != len(link.order) or len(link.order) != max(dropped, 0) or any(layer >= large.shape.layers for layer in link.order)
            if link.kind == "segment" and wrong:
                raise ValueError(f"link {link.small}-{link.large}: order must hold {max(dropped, 0)} different layers of {link.large}")
        return self

    def anchor(self, name: str) -> Anchor:
        """The anchor of that name."""
        for anchor in self.anchors:
            if anchor.name == name:
                return anchor
        raise ManifestError(f'no anchor is named "{name}"; there are {", ".join(a.name for a in self.anchors)}')

    def shared_license(self, anchors: Iterable[Anchor]) -> str | None:
        """The licence of some anchors, each one's own or else the teacher's; None where it is unknown or they differ."""
        inherited = self.teacher.license if self.teacher is not None else None
        found = {anchor.license or inherited for anchor in anchors}
        return found.pop() if len(found) == 1 else None

    def size(self, wish: str | int) -> int:
        """The parameters that a wish means: text, an int, "min" or "max".

        Text that an anchor's size rounds to, within 5%, means that anchor.

        Raises:
            SizeError: If it cannot be read or lies outside the chain.
        """
        smallest, largest = self.anchors[-1].parameters, self.anchors[0].parameters
        named = wish.strip().lower() if isinstance(wish, str) else None
        if named == "max":
            return largest
        if named == "min":
            return smallest
        wanted = parse_size(wish)
        if isinstance(wish, str):
            near = [anchor.parameters for anchor in self.anchors if matches(wish, anchor.parameters)]
            if near:
                return min(near, key=lambda parameters: abs(parameters - wanted))
        if not smallest <= wanted <= largest:
            raise SizeError(
                f"size={wish!r} is outside the chain {self.name}, which spans {format_size(smallest)} to {format_size(largest)} "
                f"({smallest:,} to {largest:,} parameters); ask for a size in that range, or distil a further anchor"
            )
        return wanted

    def neighbours(self, parameters: int) -> tuple[Anchor, Anchor]:
        """The smaller and the larger anchor around a size; the same one twice at an anchor's own size.

        Raises:
            SizeError: If the size lies outside the chain, or in the gap across a bridge.
        """
        self.size(parameters)
        small = next(anchor for anchor in self.anchors if anchor.parameters <= parameters)
        if small.parameters == parameters:
            return small, small
        large = self.anchors[self.anchors.index(small) - 1]
        if self.link(small, large).kind == "bridge":
            raise SizeError(
                f"size {parameters:,} lies across the bridge between {small.name} and {large.name}, where nothing can be interpolated; "
                f"ask for {format_size(small.parameters)} or less, or {format_size(large.parameters)} or more"
            )
        return small, large

    def link(self, small: Anchor, large: Anchor) -> Link:
        """The link between two neighbours."""
        return next(link for link in self.links if (link.small, link.large) == (small.name, large.name))

    def to_json(self) -> str:
        """The text of chain.json."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def config(self) -> str:
        """The text of the config.json beside it: for `cbd_hub.auto`, and for peft, which takes a vocabulary of another size for one that was resized in training."""
        return json.dumps({"model_type": MODEL_TYPE, "size": None, "vocab_size": self.anchors[0].shape.vocab}, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a chain folder.

        Raises:
            ManifestError: If chain.json is missing, broken, newer than this version, or refused.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise ManifestError(f"{folder} is not a chain: it has no {FILE_NAME}; make one with `cbd distill` or `cbd assemble`")
        if path.stat().st_size > MAX_BYTES:
            raise ManifestError(f"{path} has {path.stat().st_size:,} bytes, more than any chain needs ({MAX_BYTES:,}); it is refused")
        try:
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise ManifestError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{path} is not valid JSON ({str(error)[:100]}); fetch or make the chain again") from error
        return cls.parse(values, str(path))

    @classmethod
    def parse(cls, values: Any, source: str) -> Manifest:
        """The manifest from decoded JSON; ``source`` names it in errors."""
        version = values.get("schema_version") if isinstance(values, dict) else None
        if isinstance(version, (int, float)) and version > SCHEMA_VERSION:
            raise ManifestError(f"{source} has schema {version} and this cbd_hub reads up to {SCHEMA_VERSION}; run `pip install -U cbd-hub`")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole file"
            message = re.sub(r"^Value error, ", "", first["msg"])
            more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
            raise ManifestError(f"{source} is refused at {where[:120]}: {message[:300]}{more}; fetch or make the chain again") from error


def _between(small: Shape, large: Shape) -> int:
    """How many shapes the search for a size between two may see."""
    def span(first: int, second: int) -> int:
        return abs(first - second) + 1

    groups = span(small.heads // small.kv_heads, large.heads // large.kv_heads)
    return span(small.layers, large.layers) * span(small.kv_heads, large.kv_heads) * groups * max(span(small.hidden, large.hidden), 2**10)
