"""What an anchor beyond a bridge begins as where it is no ready checkpoint: a cut of one, or random weights of a given shape."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator
from transformers import AutoConfig

from cbd_hub import shapes
from cbd_hub.configs import class_name, read_config
from cbd_hub.errors import ArgumentError, CBDError, RecipeError, one_line
from cbd_hub.families import family_of
from cbd_hub.hub import resolve_checkpoint
from cbd_hub.losses.alignment import rows_needed
from cbd_hub.manifest import Shape
from cbd_hub.sizes import parse_size
from cbd_hub.weights import Checkpoint, check_read_back, load_tokenizer, model_class
from cbd_hub.wishes import named_shape


Axis = Annotated[StrictInt, Field(ge=1, le=2**24)] | None


class StartData(BaseModel):
    """An anchor of a recipe that says its ``origin``.

    Attributes:
        origin: ``cut``: a cut of ``checkpoint``, to a ``size`` or to the axes that are named. ``random``: random weights of ``config`` with the axes that are named.
        checkpoint: Hub id or folder.
        size: Parameters wanted.
        config: Hub id or folder of which the config alone is read, or the config itself with its ``model_type``.
        tokenizer: Hub id or folder; by default that of ``config``. The vocabulary has as many rows as it needs, where ``vocab`` is not named.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    origin: Literal["cut", "random"]
    checkpoint: str | None = None
    size: str | StrictInt | None = None
    config: str | dict[str, Any] | None = None
    tokenizer: str | None = None
    layers: Axis = None
    hidden: Axis = None
    heads: Axis = None
    kv_heads: Axis = None
    head_size: Axis = None
    ffn: Axis = None
    vocab: Axis = None

    @property
    def axes(self) -> dict[str, int]:
        """The axes that are named."""
        return {axis: value for axis in Shape.model_fields if (value := getattr(self, axis)) is not None}

    @model_validator(mode="after")
    def _whole(self) -> Self:
        others = ("config", "tokenizer") if self.origin == "cut" else ("checkpoint", "size")
        odd = next((name for name in others if getattr(self, name) is not None), None)
        if odd is not None:
            raise ValueError(f"{odd} does not go with origin: {self.origin}; leave it out")
        if self.origin == "cut":
            if self.checkpoint is None or (self.size is None) == (not self.axes):
                raise ValueError("origin: cut needs a checkpoint, and either a size or axes of a shape, such as layers: 6")
            if self.size is not None:
                parse_size(self.size)
        elif self.config is None or (isinstance(self.config, dict) and self.tokenizer is None):
            raise ValueError("origin: random needs a config (a Hub id, a folder, or model_type and what else it sets), and a tokenizer where the config is written out")
        return self

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> StartData:
        """Validated data.

        Args:
            values: As the recipe has them.
            where: Their place in the recipe.

        Raises:
            ValueError: Naming the key.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = min(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
            place = ".".join((where, *(str(part) for part in first["loc"][:1])))
            if first["type"] == "extra_forbidden":
                near = difflib.get_close_matches(str(first["loc"][0]), list(cls.model_fields), n=1, cutoff=0.0)[0]
                raise ValueError(f"{place} is no key of an anchor; did you mean {near}?") from error
            raise ValueError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from error


@dataclass(frozen=True)
class Start:
    """What an anchor begins as.

    Attributes:
        origin: ``cut`` or ``random``.
        config: Config of the checkpoint that is cut, or of the model that is made.
        folder: The checkpoint that is cut; None for random weights.
        tokenizer: Folder of its tokenizer.
        size: Parameters of the anchor, or wanted of the cut.
        shape: Its shape; None where it is chosen by measuring.
    """

    origin: Literal["cut", "random"]
    config: Any
    folder: Path | None
    tokenizer: Path
    size: int
    shape: Shape | None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Start:
        """What a recipe's anchor means, with its files fetched.

        Raises:
            RecipeError: If the architecture cannot have the shape, or the tokenizer does not go with it.
            CBDError: If the checkpoint, config or tokenizer cannot be used.
        """
        data = StartData.read(values, "anchors")
        if data.origin == "random":
            return _random(data)
        folder = resolve_checkpoint(str(data.checkpoint))
        config = read_config(folder)
        Checkpoint(folder, config)
        if data.size is not None:
            return cls("cut", config, folder, folder, parse_size(data.size), None)
        whole = shapes.shape_of(config)
        try:
            shape = named_shape(data.axes, whole, config)
            shapes.check_cut(shape, whole, config)
        except CBDError as error:
            raise RecipeError(f"{data.axes} of {data.checkpoint}: {error}") from error
        return cls("cut", config, folder, folder, shapes.count(shape, config), shape)

    def random_model(self) -> Any:
        """A model of its shape with random weights, in fp32."""
        return model_class(self.config, "the recipe")(copy.deepcopy(self.config))


def _random(data: StartData) -> Start:
    assert data.config is not None
    if isinstance(data.config, dict):
        config = _written_out(data.config)
    else:
        config = read_config(resolve_checkpoint(data.config, weights=False))
    place = data.tokenizer if data.tokenizer is not None else str(data.config)
    folder = resolve_checkpoint(place, weights=False)
    tokenizer = load_tokenizer(folder)
    rows = rows_needed(tokenizer)
    whole = shapes.shape_of(config).model_copy(update={"vocab": rows})
    try:
        shape = named_shape(data.axes, whole, config)
        if shape.vocab < rows:
            raise ArgumentError(f"vocab={shape.vocab:,} is less than the {rows:,} tokens of {place}; leave it out, or name {rows:,} or more")
        made = shapes.config_for(shape, config, [layer % whole.layers for layer in range(shape.layers)])
        for role in ("bos", "eos", "pad"):
            setattr(made, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
        made.architectures = [class_name(made, "the recipe")]
        family_of(made)
        check_read_back(tokenizer, made, place)
    except CBDError as error:
        raise RecipeError(f"{data.axes or 'the shape'} of {config.model_type}: {one_line(error)}") from error
    return Start("random", made, None, folder, shapes.parameter_count(made), shape)


def _written_out(values: Mapping[str, Any]) -> Any:
    """A config from a recipe's own words.

    Raises:
        RecipeError: If it has no ``model_type`` that transformers knows, or a key that such a config has not.
    """
    try:
        plain = AutoConfig.for_model(values.get("model_type", ""))
        family_of(plain)
        known = {*plain.to_dict(), *plain.attribute_map}
        odd = sorted(set(values) - known)
        if odd:
            near = difflib.get_close_matches(odd[0], sorted(known), n=1, cutoff=0.0)[0]
            raise ArgumentError(f"{odd[0]} is no field of a {plain.model_type} config; did you mean {near}?")
        return AutoConfig.for_model(**values)
    except Exception as error:  # transformers' configs raise many kinds
        raise RecipeError(f"config: {one_line(error)}") from error
