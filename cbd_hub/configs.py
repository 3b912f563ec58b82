"""Configs as transformers reads them, and remembered: plans, checks and files need no more than their fields, and transformers takes longer to import than they do."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from cbd_hub.errors import CBDError, StorageError, WeightsError, one_line
from cbd_hub.families import family_of
from cbd_hub.files import write_text
from cbd_hub.manifest import FILE_NAME, MODEL_TYPE


GENERATION_CONFIG = "generation_config.json"
_RECORD = 2  # raised where something else is remembered


class StoredConfig:
    """The fields of a transformers config as attributes, for all that reads a config without running a model.

    Args:
        fields: What its config.json holds.
        defaults: The other fields that its class declares.
        aliases: Other names of fields.

    Example:
        >>> config = StoredConfig({"model_type": "gpt2", "n_layer": 12, "dtype": "bfloat16"}, {"n_inner": None}, {"num_hidden_layers": "n_layer"})
        >>> config.num_hidden_layers, config.n_inner, config.dtype, hasattr(config, "rope_theta")
        (12, None, torch.bfloat16, False)
    """

    _fields: dict[str, Any]
    _defaults: Mapping[str, Any]
    _aliases: Mapping[str, str]

    def __init__(self, fields: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, aliases: Mapping[str, str] | None = None) -> None:
        vars(self).update(_fields=dict(fields), _defaults=defaults or {}, _aliases=aliases or {})

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and "_fields" in vars(self):  # before it is made it has none
            name = self._aliases.get(name, name)
            for fields in (self._fields, self._defaults):
                if name in fields:
                    return fields[name]
        raise AttributeError(f"the config has no {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        self._fields[self._aliases.get(name, name)] = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredConfig) and vars(self) == vars(other)

    def __copy__(self) -> StoredConfig:
        return copy.deepcopy(self)

    @property
    def architectures(self) -> list[str] | None:
        """Names of model classes."""
        return self._fields.get("architectures")

    @property
    def dtype(self) -> torch.dtype | None:
        """The weights' dtype; None where it is not told."""
        named = getattr(torch, str(self._fields.get("dtype")), None)
        return named if isinstance(named, torch.dtype) else None

    def to_dict(self) -> dict[str, Any]:
        """All fields, as transformers' own gives them."""
        return copy.deepcopy({**self._defaults, **self._fields})

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write it to a folder as config.json.

        Args:
            folder: The folder.
            dtype: Dtype of the weights; None for what the config says.
        """
        fields = self._fields if dtype is None else {**self._fields, "dtype": str(dtype).removeprefix("torch.")}
        write_text(folder / "config.json", json.dumps(fields, indent=2, sort_keys=True) + "\n")


def class_name(config: Any, source: str) -> str:
    """Name of the class that runs an architecture as a causal language model, whatever its config names: as ``AutoModelForCausalLM`` reads it.

    Raises:
        WeightsError: If there is none.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = config.architectures if isinstance(config.architectures, list) else []
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, *named[:1])
    if not isinstance(name, str):
        raise WeightsError(f"{source} names no architecture, and transformers {transformers.__version__} has no causal language model of {config.model_type}; name its class")
    return name


def adapter_alone(folder: Path) -> WeightsError:
    """What to say of an adapter's folder where a model is wanted."""
    return WeightsError(f"{folder} is an adapter, not a model; merge it into its base model, or carry it to a size by cbd make --adapter or cbd carry")


def read_config(folder: Path) -> Any:
    """The transformers config of a model folder, freed of anything that would run code.

    Raises:
        WeightsError: If there is none that can be read, or the weights are quantised.
        ArchitectureError: If its architecture has no axis table.
    """
    try:
        import transformers
        path = folder / "config.json"
        if (folder / "adapter_config.json").is_file() and not path.is_file():
            raise adapter_alone(folder)
        raw = {"model_type": MODEL_TYPE} if (folder / FILE_NAME).is_file() and not path.is_file() else json.loads(path.read_bytes())
        if raw.get("model_type") == MODEL_TYPE:
            raise WeightsError(f"{folder} is a chain, not a model; name one of its anchors, or take a size of it by CBDModel.from_chain or cbd make")
        if "auto_map" in raw or not isinstance(raw.get("model_type"), str):
            raise ValueError("its architecture needs code of its own, which is never run")
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        family_of(config)
    except CBDError:
        raise
    except Exception as error:  # a hostile config can fail in any way
        raise WeightsError(f"{folder} has no config.json that can be used ({one_line(error)}); it is no transformers model folder") from error
    if getattr(config, "quantization_config", None) is not None:
        raise WeightsError(f"{folder} holds quantised weights; interpolate before quantising")
    config.architectures = [class_name(config, str(folder))]
    config._attn_implementation = None
    if hasattr(config, "_model_name_or_path"):
        del config._model_name_or_path  # left behind by conversions
    return config


def stored_config(folder: Path) -> StoredConfig:
    """`read_config` as fields. What transformers makes of a config.json is remembered by its content, so that a second process need not import it.

    Raises:
        WeightsError: If there is none that can be read, or the weights are quantised.
        ArchitectureError: If its architecture has no axis table.
    """
    def read() -> dict[str, Any]:
        whole = read_config(folder)
        fields = json.loads(whole.to_json_string())
        others = {name: value for name, value in json.loads(whole.to_json_string(use_diff=False)).items() if name not in fields}
        return {"fields": fields, "defaults": others, "aliases": dict(type(whole).attribute_map)}

    config = StoredConfig(**_remembered(folder / "config.json", read))
    family_of(config)
    return config


def stored_generation_config(folder: Path) -> str:
    """The text of `read_generation_config`'s file as transformers would write it, remembered in the same way.

    Raises:
        WeightsError: If it cannot be used.
    """
    text: str = _remembered(folder / GENERATION_CONFIG, lambda: {"text": read_generation_config(folder).to_json_string()})["text"]
    return text


def read_generation_config(folder: Path) -> Any:
    """The transformers generation config of a folder; None where it has none.

    Raises:
        WeightsError: If it cannot be used.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return None
    try:
        from transformers import GenerationConfig
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a broken one
        raise WeightsError(f"{path} is no generation config ({one_line(error)}); fetch or make it again") from error


def whole_config(config: Any) -> Any:
    """The transformers config of a stored one; a transformers config as it is.

    Raises:
        WeightsError: If transformers refuses it.
    """
    if not isinstance(config, StoredConfig):
        return config
    with tempfile.TemporaryDirectory() as folder:  # it decodes more than what its class takes
        config.save_pretrained(Path(folder))
        try:
            found = read_config(Path(folder))
        except WeightsError as error:
            raise WeightsError(f"transformers refuses the {config.model_type} config that is wanted: {one_line(error.__cause__ or error)}") from error
    found._name_or_path = ""
    return found


def _remembered(path: Path, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is made of a small file: by this version of transformers, from its content alone."""
    try:
        content = path.read_bytes()
    except OSError:
        return read()
    key = hashlib.sha256(f"{_RECORD} {path.name} {version('transformers')}\n".encode() + content).hexdigest()
    store = Path(constants.HF_HOME) / "cbd_hub" / "configs" / f"{key[:40]}.json"
    try:
        found: dict[str, Any] = json.loads(store.read_bytes())
    except (OSError, ValueError):
        found = read()
        with suppress(StorageError):  # a cache that cannot be written is no reason to fail
            write_text(store, json.dumps(found))
    return found
