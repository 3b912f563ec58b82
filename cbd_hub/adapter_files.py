"""PEFT folders of a LoRA: read and checked, and written. What cannot be carried is refused by name; nothing is dropped silently."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cbd_hub.errors import ArgumentError, WeightsError, one_line
from cbd_hub.hub import TOKENIZER_FILES, download, local_path
from cbd_hub.weights import read_header


CONFIG, WEIGHTS, LINEAGE = "adapter_config.json", "adapter_model.safetensors", "cbd_adapter.json"
_MAX_CONFIG = 2**20
_PREFIX = "base_model.model."
_LEAVES = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B", ".base_layer.weight": "copy", ".weight": "copy"}
# Fields that may hold anything: they are carried, rewritten, or about training alone.
_FREE = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}
_WHY = {
    "modules_to_save": "whole modules were trained beside the LoRA", "use_dora": "DoRA's magnitudes belong to the norms of one model's weights",
    "lora_bias": "its LoRA has biases of its own", "target_parameters": "it changes parameters that are no modules' weights", "trainable_token_indices": "single tokens were trained beside the LoRA",
    "layer_replication": "its model has replicated layers",
}
_NAMING = {"target_modules": str, "exclude_modules": str, "layers_to_transform": int, "layers_pattern": str}  # which modules are changed: a name or number, or several
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "true", "false")  # the others of PEFT change the weights that they start from


@dataclass(frozen=True, eq=False)
class Module:
    """A module that a LoRA changes.

    Attributes:
        path: Its path in the loaded model.
        a: PEFT's A, shape (rank, in).
        b: PEFT's B, shape (out, rank).
        alpha: As configured, by pattern or for all.
        embedding: Whether it is an embedding.
    """

    path: str
    a: Tensor
    b: Tensor
    alpha: float
    embedding: bool

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA as it lies in its folder.

    Attributes:
        name: What the user called it.
        folder: Where its files are.
        revision: Commit of its repo; None for a local folder.
        config: Its adapter_config.json.
        tensors: Its adapter_model.safetensors.
        modules: What it changes.
        copies: Module path -> a copy of the weight that lies beneath, which PEFT keeps of embeddings and heads.
    """

    name: str
    folder: Path
    revision: str | None
    config: dict[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    modules: tuple[Module, ...] = field(repr=False)
    copies: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def rslora(self) -> bool:
        """Whether alpha is divided by the square root of the rank, not by the rank."""
        return bool(self.config.get("use_rslora"))

    def scaling(self, module: Module) -> float:
        """The factor on B A."""
        return module.alpha / (math.sqrt(module.rank) if self.rslora else module.rank)

    def among(self, paths: Iterable[str]) -> set[str]:
        """Those of some modules that peft would change by its config; those that it has factors of, where the config leaves that open."""
        own = {module.path for module in self.modules}
        targets = self.config.get("target_modules")
        return {path for path in paths if (path in own if targets is None or targets == "all-linear" else targeted(self.config, path))}

    @property
    def ranks(self) -> str:
        """Its ranks in words."""
        found = sorted({module.rank for module in self.modules})
        return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def read_adapter(adapter: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Adapter:
    """A LoRA from a PEFT folder or a Hub id, ``org/lora`` or ``org/lora@revision``.

    Args:
        adapter: The folder or the id.
        options: ``token``, ``cache_dir``, ``local_files_only`` and ``force_download``.

    Raises:
        WeightsError: If files are missing, pickled or broken.
        ArgumentError: If it is of a kind that cannot be carried, or there is neither a folder nor such an id.
        StorageError: If it cannot be fetched.
    """
    name = os.fspath(adapter)
    folder, revision = local_path(name), None
    if not folder.is_dir():
        repo_id, _, wanted = name.partition("@")
        if folder.exists() or name.startswith((".", "/", "~")) or repo_id.count("/") != 1:
            raise ArgumentError(f"adapter {name} is neither a folder nor a Hub id such as org/lora; check the path")
        folder = download(repo_id, wanted or None, [CONFIG, WEIGHTS, "config.json", *TOKENIZER_FILES], dict(options or {}))
        revision = folder.name
    config = _read_config(folder, name)
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file() or revision is not None
        raise WeightsError(f"adapter {name} has no {WEIGHTS}" + ("; a pickle is never read: load it with peft and save it again with save_pretrained" if pickled else "; save it again with save_pretrained"))
    read_header(folder / WEIGHTS)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"adapter {name}: {WEIGHTS} cannot be read ({one_line(error)}); fetch or save it again") from error
    modules, copies = _modules(name, config, tensors)
    read = Adapter(name, folder, revision, config, tensors, modules, copies)
    stray = sorted({module.path for module in modules} - read.among(module.path for module in modules))
    if stray:
        raise WeightsError(f"adapter {name} has factors of {stray[0][:120]}, which its {CONFIG} does not target; fetch or save it again")
    return read


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    """adapter_config.json, with what cannot be carried refused."""
    path = folder / CONFIG
    if not path.is_file():
        raise WeightsError(f"adapter {name} has no {CONFIG}, so it is no PEFT folder; save it with save_pretrained of a PeftModel")
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"adapter {name}: {CONFIG} cannot be read ({one_line(error)}); save it again") from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ArgumentError(f"adapter {name} is of PEFT type {str(kind)[:40]}, and only LORA can be carried: its changes are products of two factors")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ArgumentError(f"adapter {name} is for the task {str(config['task_type'])[:40]}, and the models of a chain are causal language models (CAUSAL_LM)")
    if config.get("bias", "none") != "none":
        raise ArgumentError(f'adapter {name} was trained with bias="{str(config["bias"])[:40]}", and biases are not carried; train it with bias="none"')
    if config.get("init_lora_weights", True) not in _STARTS:
        raise ArgumentError(
            f"adapter {name} was begun with init_lora_weights={str(config['init_lora_weights'])[:40]!r}, which changes the weights beneath it; convert it to a plain LoRA first "
            "(path_initial_model_for_weight_conversion of peft's save_pretrained)"
        )
    for key, value in config.items():
        if key not in _FREE and key != "bias" and value not in (None, False, [], {}, ""):
            raise ArgumentError(f"adapter {name} has {key[:60]}={str(value)[:60]}, which cannot be carried{': ' + _WHY[key] if key in _WHY else ''}; train it as a plain LoRA")
    dropout = config.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise WeightsError(f"adapter {name}: {CONFIG} has lora_dropout={str(dropout)[:60]}, which is no share; save it again")
    for key, kind in _NAMING.items():
        value = config.get(key)
        if not (value is None or isinstance(value, kind) or (isinstance(value, list) and all(isinstance(part, kind) for part in value))):
            raise WeightsError(f"adapter {name}: {CONFIG} has {key}={str(value)[:60]}, which names no modules; save it again")
        try:
            if isinstance(value, str):
                re.compile(value)
        except re.error as error:
            raise WeightsError(f"adapter {name}: {key} of {CONFIG} cannot be read ({one_line(error)}); save it again") from error
    return config


def _modules(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[tuple[Module, ...], dict[str, Tensor]]:
    """What the tensors are: pairs of factors by module, and copies of weights beneath.

    Raises:
        WeightsError: If a tensor has no partner, a shape that no factor has, or a value that is no finite number.
        ArgumentError: If one is no part of a LoRA.
    """
    found: dict[str, dict[str, Tensor]] = {}
    embeddings = set()
    for key, tensor in tensors.items():
        leaf = next((leaf for leaf in _LEAVES if key.endswith(leaf)), None)
        if leaf is None or not key.startswith(_PREFIX):
            raise ArgumentError(f"adapter {name} holds {key[:120]}, which is no factor of a LoRA and cannot be carried; train it as a plain LoRA")
        path = key[len(_PREFIX) : -len(leaf)]
        found.setdefault(path, {})[_LEAVES[leaf]] = tensor
        if "embedding" in leaf:
            embeddings.add(path)
        if tensor.dim() != 2 or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise WeightsError(f"adapter {name}: {key[:120]} is no matrix of finite numbers; fetch or save it again")
    modules = []
    for path, parts in sorted(found.items()):
        if parts.keys() == {"copy"}:  # of a vocabulary that PEFT took for a resized one
            continue
        if not {"A", "B"} <= parts.keys():
            raise WeightsError(f"adapter {name} has not both factors of {path[:120]}; fetch or save it again")
        a, b = parts["A"], parts["B"]
        rank = _by_pattern(name, config, "rank_pattern", "r", path, 8)
        if not a.shape[0] == b.shape[1] == rank or a.shape[0] < 1:
            raise WeightsError(f"adapter {name}: the factors of {path[:120]} have the shapes {list(a.shape)} and {list(b.shape)}, and its config says rank {rank}; fetch or save it again")
        modules.append(Module(path, a, b, float(_by_pattern(name, config, "alpha_pattern", "lora_alpha", path, 8)), path in embeddings))
    if not modules:
        raise WeightsError(f"adapter {name} holds no factors at all; fetch or save it again")
    return tuple(modules), {path: parts["copy"] for path, parts in found.items() if "copy" in parts}


def _by_pattern(name: str, config: Mapping[str, Any], patterns: str, common: str, path: str, default: float) -> float:
    """A number of a module: that of the first pattern that fits the end of its path, as peft reads them, else the common one."""
    value: Any = config.get(common, default)
    try:
        for pattern, own in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                value = own
                break
    except (re.error, AttributeError, TypeError) as error:
        raise WeightsError(f"adapter {name}: {patterns} of {CONFIG} cannot be read ({one_line(error)}); save it again") from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise WeightsError(f"adapter {name}: {CONFIG} gives {path[:120]} {common}={str(value)[:40]}, which is no number; save it again")
    return value


def config_of(adapter: Adapter, modules: Iterable[Module], every: Iterable[str], base: str) -> dict[str, Any]:
    """The adapter_config.json of a carried LoRA.

    Args:
        adapter: What was carried.
        modules: What came of it.
        every: Paths of all modules with weights of the model that it is for.
        base: What to name as its base model.
    """
    modules = list(modules)
    paths, targets = {module.path for module in modules}, adapter.config.get("target_modules")
    narrowed = any(adapter.config.get(name) not in (None, [], "") for name in ("exclude_modules", "layers_to_transform"))
    if narrowed or not isinstance(targets, list) or adapter.among(every) != paths:
        targets = sorted(paths)
    ranks, alphas = Counter(module.rank for module in modules), Counter(module.alpha for module in modules)
    rank, alpha = (counts.most_common(1)[0][0] for counts in (ranks, alphas))
    plain = {module.path: (module.rank, int(module.alpha) if module.alpha == int(module.alpha) else module.alpha) for module in modules}
    return {
        **adapter.config, "base_model_name_or_path": base, "revision": None, "target_modules": targets, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
        "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "rank_pattern": {path: own for path, (own, _) in plain.items() if own != rank},
        "alpha_pattern": {path: own for path, (_, own) in plain.items() if own != alpha}, "init_lora_weights": True, "eva_config": None, "loftq_config": {}, "inference_mode": True,
    }


def targeted(config: Mapping[str, Any], path: str) -> bool:
    """Whether peft changes a module of a model: by ``target_modules``, ``exclude_modules``, ``layers_to_transform`` and ``layers_pattern``, as peft reads them.

    Example:
        >>> targeted({"target_modules": ["q_proj"], "layers_to_transform": [0, 4]}, "model.layers.4.self_attn.q_proj")
        True
    """
    targets, excluded, layers = (config.get(name) for name in ("target_modules", "exclude_modules", "layers_to_transform"))
    if targets is None or not _named(targets, path) or (excluded and _named(excluded, path)):
        return False
    if isinstance(targets, str) or layers in (None, []) or path in targets:  # a whole path is taken whatever its layer
        return True
    patterns = config.get("layers_pattern") or []
    ways = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in ([patterns] if isinstance(patterns, str) else patterns)] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for way in ways if (match := re.match(way, path)) is not None), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _named(names: str | Iterable[str], path: str) -> bool:
    """Whether a pattern fits a path, or one of several names is the path or its end."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def tensors_of(modules: Iterable[Module]) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors."""
    found = {}
    for module in modules:
        for letter, factor in (("A", module.a), ("B", module.b)):
            found[f"{_PREFIX}{module.path}.lora_embedding_{letter}" if module.embedding else f"{_PREFIX}{module.path}.lora_{letter}.weight"] = factor.contiguous()
    return found


def lora_config(config: Mapping[str, Any]) -> Any:
    """The peft config of an adapter_config.json.

    Raises:
        ArgumentError: If peft is not there.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ArgumentError("an adapter is loaded by peft, which is not there; run `pip install peft`, or merge it with CBDModel.materialize") from error
    known = LoraConfig.__dataclass_fields__
    return LoraConfig(**{name: value for name, value in config.items() if name in known and name not in ("peft_type", "runtime_config")})


def same_weight(copy: Tensor, weight: Tensor) -> bool:
    """Whether a copy of a weight is that weight, in the copy's precision."""
    return copy.shape == weight.shape and torch.equal(copy, weight.to(copy.dtype))
