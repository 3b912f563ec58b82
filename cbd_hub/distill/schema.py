"""What a recipe file may say: validated data, mistakes named by their line."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from cbd_hub.distill.config import ChainDistillerConfig
from cbd_hub.distill.sampling import text_default
from cbd_hub.distill.starts import StartData
from cbd_hub.errors import ArgumentError, CBDError, RecipeError, SizeError
from cbd_hub.manifest import Shape
from cbd_hub.sizes import parse_size


_AT_LEAST_ONE = (
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "block_size", "max_new_tokens", "generation_batch_size", "rollout_batch",
    "inner_epochs",
)
# What a stage may set, and the default of each, whose kind a value must have.
_STAGE_FIELDS = {
    field.name: field.default for field in dataclasses.fields(ChainDistillerConfig) if field.init and field.name not in ("output_dir", "seed")
}

_REFUSED = {
    "hub_token": "a recipe is kept and published with its chain, and a token must not be; log in with `hf auth login` and leave it out",
    "output_dir": "where the chain goes is said when it is made, by --out or output_dir=; leave it out",
    "seed": "a recipe has one, beside stage; set it there",
    "num_train_epochs": "a stage has max_steps, 100 by default, and ends there; give max_steps",
    "save_only_model": "a stage that is killed goes on from its checkpoint, which needs the optimiser too; leave it out, or raise save_steps for fewer of them",
    "include_num_input_tokens_seen": "tokens are counted for the chain's record; leave it out",
    "push_to_hub": "a chain is pushed as a whole, by `cbd push` when it is done; leave it out",
    "enable_jit_checkpoint": "a stage that is stopped goes on from its last checkpoint; leave it out, or lower save_steps for more of them",
}

# What other trainers call a field, where no spelling leads to it.
_ELSEWHERE = {
    "lr": "learning_rate", "batch_size": "per_device_train_batch_size", "micro_batch_size": "per_device_train_batch_size", "epochs": "max_steps", "num_epochs": "max_steps", "steps": "max_steps",
    "seq_len": "block_size", "max_length": "block_size", "max_seq_length": "block_size",
}


# What changes nothing of what comes out: how often is saved and said, and how rows are fetched.
_NEUTRAL = (
    "save_steps", "save_total_limit", "logging_steps", "logging_strategy", "logging_first_step", "log_level", "report_to", "run_name", "disable_tqdm", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "dataloader_persistent_workers",
)


def telling(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments on which a stage's weights depend."""
    return {name: value for name, value in arguments.items() if name not in _NEUTRAL}


def _check_value(where: str, value: Any, default: Any) -> None:
    """Refuse a value of another kind than its field's default, which YAML makes of a slip: 4e-4 is text there, 4.0e-4 a number."""
    key = where.rsplit(".", 1)[-1]
    if key in _AT_LEAST_ONE and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{where}={value!r} must be a whole number of 1 or more")
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{where}={value!r} is neither true nor false")
    elif isinstance(default, (int, float)) and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError(f"{where}={value!r} is no number" + (" (YAML reads 4e-4 as text: write 4.0e-4)" if isinstance(value, str) else ""))


def _check_plain(where: str, value: Any) -> None:
    """Refuse what a recipe that is kept as JSON has no word for, such as the date that YAML makes of 2024-10-05."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key}, a {type(key).__name__} and no text; put it in quotes")
            _check_plain(f"{where}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check_plain(f"{where}.{index}", inner)
    elif not isinstance(value, (str, int, float, type(None))):
        raise ValueError(f"{where}={value} is a {type(value).__name__}, and a recipe holds texts, numbers, true, false, null, lists and mappings; put a text in quotes")


class _Loader(yaml.SafeLoader):
    """Reads YAML; a value that looks like a number or a date and is none has its line in the error."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, ValueError) as error:
            raise yaml.constructor.ConstructorError(None, None, f"{node.value}: {error}", node.start_mark) from error


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RecipeData(_Strict):
    """The text: local files or a Hub data set, and how it is split.

    Attributes:
        path: A file or pattern of local files.
        dataset: A Hub data set instead.
        name: Configuration of the Hub data set.
        split: Split of the Hub data set.
        column: Column that holds the text; files and data sets without it may have chats (``messages``) or prompts with completions instead.
        block_size: Tokens in a training block.
        heldout: Share of the documents that nothing is trained or measured on.
        calibration: Share of the documents for importance, order and curves.
        streaming: Read the training text as a stream, never held as a whole; ``heldout`` and ``calibration`` are then shares of its first
            ``reserve`` documents, which are not trained on.
        reserve: Documents that a stream sets aside.
    """

    path: str | None = None
    dataset: str | None = None
    name: str | None = None
    split: str = "train"
    column: str = "text"
    block_size: int = Field(default=128, ge=8, le=2**20)
    heldout: float = Field(default=0.05, gt=0, lt=1)
    calibration: float = Field(default=0.02, gt=0, lt=1)
    streaming: bool = False
    reserve: int = Field(default=2000, ge=3, le=10**6)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path (local files) or dataset (a Hub id)")
        return self

    @property
    def source(self) -> str:
        """What the text is called."""
        return str(self.path or self.dataset)


class StageData(_Strict):
    """What one anchor's stage reads instead of the recipe's data: only its training part is used."""

    data: RecipeData | None = None
    text_data: RecipeData | None = None


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where a recipe was read, which makes it no other recipe."""

    name: str = dataclasses.field(default="recipe", compare=False)
    lines: Mapping[tuple[str, ...], int] = dataclasses.field(default_factory=dict, compare=False)


class Recipe(_Strict):
    """A whole chain: teacher, anchors in falling size, text and training.

    Attributes:
        teacher: Hub id or folder.
        anchors: Sizes, shapes or checkpoints, in falling size; beyond a bridge also what says its origin (`cbd_hub.distill.starts.StartData`).
        data: What is trained, calibrated and evaluated on.
        text_data: Text of MiniLLM's cross-entropy term, where ``text_weight`` is set; by default that of ``data``.
        stage: Training arguments of every stage.
        stages: What single anchors want otherwise, by size as listed, checkpoint, or shape such as "layers=20,ffn=1024"; ``data`` and ``text_data`` too.
        seed: Seed of the split of the data, of the order of documents and of training.
        align: Whether an anchor that began as a checkpoint is brought into the coordinates of the one above it once it has learned: ``"auto"``: where that helps,
            and not where it was cut from it. True: always, but for those. False: never, as the paper has it.
        reconstruct: What attention and FFN of an anchor that is cut are fitted to before it learns (`cbd_hub.reconstruct.reconstruct`): ``"layer"``: to make up for neurons and heads.
            ``"stream"``: for layers too, by which the anchor gains more and sizes near the one above it lose. False: nothing.
    """

    teacher: str
    anchors: list[str | int | dict[str, Any]] = Field(min_length=1, max_length=100)
    data: RecipeData
    text_data: RecipeData | None = None
    stage: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]] = {}
    seed: int = Field(default=0, ge=0, lt=2**31)
    align: Literal["auto"] | bool = "auto"
    reconstruct: Literal["layer", "stream", False] = "layer"
    _origin: _Origin = PrivateAttr(default_factory=_Origin)

    @field_validator("stages", mode="before")
    @classmethod
    def _named(cls, stages: Any) -> Any:
        return {str(key): own for key, own in stages.items()} if isinstance(stages, dict) else stages  # YAML reads 60000 as a number

    @field_validator("align", mode="before")
    @classmethod
    def _known_align(cls, align: Any) -> Any:
        if align != "auto" and not isinstance(align, bool):
            raise ValueError(f"{align!r} is not known; write auto, true or false")
        return align

    @field_validator("reconstruct", mode="before")
    @classmethod
    def _known_reconstruct(cls, reconstruct: Any) -> Any:
        if reconstruct is not False and reconstruct not in ("layer", "stream"):
            raise ValueError(f"{reconstruct!r} is not known; write layer, stream or false")
        return reconstruct

    @model_validator(mode="after")
    def _known_fields(self) -> Self:
        for field in ("anchors", "stage", "stages"):
            _check_plain(field, getattr(self, field))
        for index, anchor in enumerate(self.anchors):
            if isinstance(anchor, dict) and "origin" in anchor:
                StartData.read(anchor, f"anchors.{index}")
            elif isinstance(anchor, dict):
                if not set(anchor) <= {*Shape.model_fields, "checkpoint"} or ("checkpoint" in anchor and len(anchor) > 1):
                    raise ValueError(
                        f"anchors.{index}: {anchor} is no size, no shape ({', '.join(Shape.model_fields)}) and no checkpoint alone; "
                        "beyond a bridge it may say its origin: cut (of a checkpoint) or random (of a config)"
                    )
            else:
                try:
                    parse_size(anchor)
                except SizeError as error:
                    raise ValueError(f"anchors.{index}: {error}") from error
        for where, fields in (("stage", self.stage), *((f"stages.{name}", fields) for name, fields in self.stages.items())):
            for key in fields:
                if key in _REFUSED:
                    raise ValueError(f"{where}.{key} is no setting of a recipe: {_REFUSED[key]}")
                if where != "stage" and key in StageData.model_fields:
                    _check_data(f"{where}.{key}", fields[key])
                elif key in _STAGE_FIELDS:
                    _check_value(f"{where}.{key}", fields[key], _STAGE_FIELDS[key])
                else:
                    near = _ELSEWHERE.get(key) or difflib.get_close_matches(key, sorted(_STAGE_FIELDS.keys() - _REFUSED.keys()), n=1, cutoff=0.0)[0]
                    raise ValueError(f"{where}.{key} is no field of ChainDistillerConfig; did you mean {near}?")
        known = [anchor_key(anchor) for anchor in self.anchors]
        unknown = sorted(self.stages.keys() - set(known))
        if unknown:
            raise ValueError(f"stages.{unknown[0]} names no anchor of this recipe; its anchors are {', '.join(known)}")
        return self

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Recipe:
        """A recipe from a YAML file.

        Raises:
            RecipeError: If it cannot be read or a key or value is wrong; the message names the line.
        """
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8")
            if any(isinstance(token, yaml.AnchorToken) for token in yaml.scan(text)):
                raise RecipeError(f"{file} uses YAML anchors (&name), which a recipe has no need of; write the values out")
            lines = _lines(yaml.compose(text, Loader=yaml.SafeLoader), f"{file} ")
            values = yaml.load(text, Loader=_Loader)
        except RecursionError as error:
            raise RecipeError(f"{file} is nested too deeply to be a recipe") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f" line {mark.line + 1}" if mark else ""
            raise RecipeError(f"{file}{line}: not valid YAML ({getattr(error, 'problem', error)}); check quotes, colons and indentation") from error
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error}); give a recipe file") from error
        if not isinstance(values, dict):
            raise RecipeError(f"{file} holds no recipe; it needs teacher, anchors and data")
        return cls.parse(values, str(file), lines)

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str = "recipe", lines: Mapping[tuple[str, ...], int] | None = None) -> Recipe:
        """A recipe from plain data.

        Raises:
            RecipeError: If a key or value is wrong.
        """
        try:
            made = cls.model_validate(values)
            made._origin = _Origin(source, lines or {})
            return made
        except ValidationError as error:
            first = min(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")  # a typo explains a missing key
            where = tuple(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                fields = RecipeData.model_fields if where[0] in ("data", "text_data") and len(where) > 1 else cls.model_fields
                near = difflib.get_close_matches(where[-1], list(fields), n=1, cutoff=0.0)[0]
                message = f"{'.'.join(where)} is no key of a recipe; did you mean {near}?"
            elif where:
                message = f"{'.'.join(where)}: {message}"
            line = _line_of(lines or {}, where, message)
            raise RecipeError(f"{source}{f' line {line}' if line else ''}: {message}") from error

    @contextmanager
    def at(self, anchor: str | int | dict[str, Any] | None, key: str = "stages", field: str = "stage") -> Iterator[None]:
        """Let an error inside the block say the line of the file: of the key that its message begins with, else of the anchor's.

        Args:
            anchor: An anchor whose stage the block is about; None for the recipe as a whole.
            key: ``stages`` where the anchor's own fields are meant, ``anchors`` where its entry in the list is.
            field: The recipe's key whose line is said where there is no better one.
        """
        try:
            yield
        except CBDError as error:
            named = (re.match(r"\w*", str(error)) or [""])[0]
            own = () if anchor is None else ("stages", anchor_key(anchor))
            entry = () if anchor is None else ("anchors", str(self.anchors.index(anchor)))
            places = [(*own, named), ("stage", named), ("data", named), *((entry, own) if key == "anchors" else (own, entry)), (field,)]
            line = next((self._origin.lines[place] for place in places if place in self._origin.lines), None)
            kind = RecipeError if isinstance(error, ArgumentError) else type(error)  # the call is right, the recipe is wrong
            raise kind(f"{self._origin.name} line {line}: {error}" if line else str(error)) from error

    def anchor(self, key: str | None = None) -> str | int | dict[str, Any]:
        """The anchor that ``stages`` names so; the first one by default.

        Raises:
            ArgumentError: If there is none.
        """
        known = {anchor_key(anchor): anchor for anchor in self.anchors}
        if key is not None and key not in known:
            raise ArgumentError(f"anchor {key} is none of this recipe; its anchors are {', '.join(known)}")
        return self.anchors[0] if key is None else known[key]

    def stage_arguments(self, anchor: str | int | dict[str, Any]) -> dict[str, Any]:
        """The training arguments of one anchor's stage: what the recipe says, else 100 steps in bf16 on divergence and cross-entropy alike.

        The teacher alone teaches less of the text than text and teacher together (benchmarks/anchors.py).
        """
        own = {key: value for key, value in self.stages.get(anchor_key(anchor), {}).items() if key not in StageData.model_fields}
        said = {**self.stage, **own}
        return {"max_steps": 100, "bf16": True, "block_size": (self.stage_data(anchor).data or self.data).block_size, **text_default(said), **said}

    def stage_data(self, anchor: str | int | dict[str, Any]) -> StageData:
        """The data of one anchor's stage, where it has its own."""
        own = {key: value for key, value in self.stages.get(anchor_key(anchor), {}).items() if key in StageData.model_fields}
        return StageData.model_validate({"text_data": self.text_data, **own})

    def beginning(self, anchors: int) -> Recipe:
        """The same recipe of its first anchors alone."""
        keys = {anchor_key(anchor) for anchor in self.anchors[:anchors]}
        return self.model_copy(update={"anchors": self.anchors[:anchors], "stages": {key: stage for key, stage in self.stages.items() if key in keys}})

    def outcome(self) -> dict[str, Any]:
        """What the recipe says without the settings that change nothing of what comes out."""
        plain = self._said()
        return {**plain, "stage": telling(plain["stage"]), "stages": {key: telling(own) for key, own in plain["stages"].items() if telling(own)}}

    def sha256(self) -> str:
        """Hash of what the recipe says, however it is written."""
        return hashlib.sha256(json.dumps(self._said(), sort_keys=True).encode()).hexdigest()

    def _said(self) -> dict[str, Any]:
        """What the recipe says; a field younger than chains that exist only where it says something, so that these stay of their recipes."""
        return {key: value for key, value in self.model_dump().items() if (key, value) not in UNSAID.items()}

    def to_yaml(self) -> str:
        """The recipe as YAML."""
        return str(yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True))


UNSAID = {name: Recipe.model_fields[name].default for name in ("align", "reconstruct")}  # fields younger than chains and runs that exist, and what these mean without them


def anchor_key(anchor: str | int | dict[str, Any]) -> str:
    """How ``stages`` names an anchor.

    Example:
        >>> anchor_key("99M"), anchor_key({"layers": 20, "ffn": 1024}), anchor_key({"checkpoint": "openai-community/gpt2"})
        ('99M', 'layers=20,ffn=1024', 'openai-community/gpt2')
        >>> anchor_key({"origin": "cut", "checkpoint": "openai-community/gpt2", "size": "99M"})
        'origin=cut,checkpoint=openai-community/gpt2,size=99M'
    """
    if not isinstance(anchor, dict):
        return str(anchor)
    if set(anchor) == {"checkpoint"}:
        return str(anchor["checkpoint"])
    return ",".join(f"{name}={value.get('model_type') if isinstance(value, dict) else value}" for name, value in anchor.items())


def _check_data(where: str, value: Any) -> None:
    """Refuse what is no data of a stage, naming the key."""
    try:
        RecipeData.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join((where, *map(str, first['loc'])))}: {first['msg'].removeprefix('Value error, ')}") from error


def _lines(node: Any, source: str, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Line of every key and item of a YAML document, from 1; ``source`` begins an error."""
    found: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in found:
                raise RecipeError(f"{source}line {key.start_mark.line + 1}: {'.'.join(here)} is given twice; keep one of them")
            found[here] = key.start_mark.line + 1
            found.update(_lines(value, source, here))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            here = (*path, str(index))
            found[here] = value.start_mark.line + 1
            found.update(_lines(value, source, here))
    return found


def _line_of(lines: Mapping[tuple[str, ...], int], where: tuple[str, ...], message: str) -> int | None:
    named = [path for path in lines if re.match(rf"{re.escape('.'.join(path))}(?!\w|\.\w)", message)]
    if named:
        return lines[max(named, key=len)]
    while where:
        if where in lines:
            return lines[where]
        where = where[:-1]
    return None
