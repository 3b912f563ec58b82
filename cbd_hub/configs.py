"""config.json as plain data: plans, checks and files need no more of a config, and transformers takes longer to import than they do."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cbd_hub.errors import WeightsError, one_line
from cbd_hub.families import FAMILIES, Family, family_of
from cbd_hub.files import write_text


_ORIGIN = ("_model_name_or_path",)  # left behind by conversions; it says nothing of the model


class StoredConfig:
    """The fields of a config.json as attributes, for all that reads a config without running a model.

    Args:
        fields: The fields, every one among them that the architecture's axis table reads.

    Example:
        >>> config = StoredConfig({"model_type": "gpt2", "n_layer": 12, "dtype": "bfloat16"})
        >>> config.n_layer, config.dtype, hasattr(config, "n_embd")
        (12, torch.bfloat16, False)
    """

    _fields: dict[str, Any]

    def __init__(self, fields: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_fields", dict(fields))

    def __getattr__(self, name: str) -> Any:
        try:
            return self._fields[name]
        except KeyError:
            raise AttributeError(f"config.json has no {name}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._fields[name] = value

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredConfig:
        return StoredConfig(copy.deepcopy(self._fields, memo))

    @property
    def architectures(self) -> list[str] | None:
        """Names of model classes."""
        return self._fields.get("architectures")

    @property
    def dtype(self) -> torch.dtype | None:
        """The weights' dtype; None where it is not told."""
        named = getattr(torch, str(self._fields.get("dtype", self._fields.get("torch_dtype"))).removeprefix("torch."), None)
        return named if isinstance(named, torch.dtype) else None

    def to_dict(self) -> dict[str, Any]:
        """The fields, as a config.json holds them."""
        fields = {name: value for name, value in copy.deepcopy(self._fields).items() if name != "torch_dtype"}
        return {**fields, "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch.")}

    def save_pretrained(self, folder: Path, dtype: torch.dtype) -> None:
        """Write it to a folder as config.json, of weights in a dtype."""
        fields = {**self.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
        write_text(folder / "config.json", json.dumps(fields, indent=2, sort_keys=True) + "\n")


def read_fields(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says.

    Raises:
        WeightsError: If there is none, or one of a model that needs code of its own.
    """
    try:
        fields = json.loads((folder / "config.json").read_bytes())
        if "auto_map" in fields or not isinstance(fields.get("model_type"), str):
            raise ValueError("its architecture needs code of its own, which is never run")
    except Exception as error:  # a hostile config can fail in any way
        raise _unusable(folder, error) from error
    assert isinstance(fields, dict)
    if fields.get("quantization_config") is not None:
        raise WeightsError(f"{folder} holds quantised weights; interpolate before quantising")
    return fields


def read_config(folder: Path) -> Any:
    """The transformers config of a model folder, freed of anything that would run code.

    Raises:
        WeightsError: If there is none that can be read, or the weights are quantised.
        ArchitectureError: If its architecture has no axis table.
    """
    import transformers
    read_fields(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a hostile config can fail in any way
        raise _unusable(folder, error) from error
    config._attn_implementation = None
    for name in _ORIGIN:
        if hasattr(config, name):
            delattr(config, name)
    family_of(config)
    return config


def _unusable(folder: Path, error: BaseException) -> WeightsError:
    return WeightsError(f"{folder} has no config.json that can be used ({one_line(error)}); it is no transformers model folder")


def stored_config(folder: Path) -> StoredConfig:
    """The config of a model folder, as it is stored.

    One that leaves out a field of its axis table, or gives it a value of another kind, is read by transformers, which knows the defaults.

    Raises:
        WeightsError: If there is none that can be used, or the weights are quantised.
        ArchitectureError: If its architecture has no axis table.
    """
    fields = read_fields(folder)
    family = next((family for family in FAMILIES if fields["model_type"] in family.model_types), None)
    if family is None or not states(fields, family):
        whole = read_config(folder)
        fields = {**json.loads(whole.to_json_string()), **{name: getattr(whole, name) for name in family_of(whole).reads() if hasattr(whole, name)}}
    config = StoredConfig({name: value for name, value in fields.items() if name not in _ORIGIN})
    family_of(config)
    return config


def states(fields: Mapping[str, Any], family: Family) -> bool:
    """Whether fields hold all that a family's table reads, each of the kind that it reads.

    Example:
        >>> from cbd_hub.families import GPT2
        >>> states({"n_layer": 12, "n_embd": 768}, GPT2)
        False
    """
    return all(type(fields[name]) in kinds if name in fields else name in family.optional for name, kinds in family.reads().items())


def whole_config(config: Any) -> Any:
    """The transformers config of a stored one; a transformers config as it is.

    Raises:
        WeightsError: If transformers refuses it.
    """
    if not isinstance(config, StoredConfig):
        return config
    import transformers
    try:
        made = transformers.CONFIG_MAPPING[config.model_type].from_dict(config.to_dict())
    except Exception as error:  # a hostile config can fail in any way
        raise WeightsError(f"transformers refuses a config.json of {config.model_type} ({one_line(error)}); make its model again") from error
    made._attn_implementation = None
    return made
