"""Tensors read one by one from safetensors checkpoints, and written one by one."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import struct
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cbd_hub.configs import adapter_alone, class_name, read_config
from cbd_hub.errors import IntegrityError, StorageError, VocabularyMismatchError, WeightsError, one_line
from cbd_hub.families import family_of
from cbd_hub.files import CheckedFile, sha256
from cbd_hub.hub import TOKENIZER_FILES
from cbd_hub.manifest import FILE_NAME, FileRecord


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
MAX_HEADER = 100 * 2**20

# transformers patches module-wide state while it loads, so that two loads at once can leave it broken.
LOADING = threading.Lock()


def common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds the numbers of all.

    Example:
        >>> common_dtype([torch.bfloat16, torch.float32]), common_dtype([torch.bfloat16, torch.float16])
        (torch.float32, torch.float32)
    """
    return functools.reduce(torch.promote_types, dtypes)


def stored_dtype(headers: Iterable[Mapping[str, Any]], config: Any) -> torch.dtype:
    """The dtype in which a model's weights are stored, from the headers of its files.

    Args:
        headers: For each file, key -> entry with its ``dtype``.
        config: Its transformers config.
    """
    family = family_of(config)
    found = {_DTYPES.get(entry.get("dtype"), torch.uint8) for header in headers for key, entry in header.items() if family.canonical(key) is not None}
    return common_dtype(found) if found and all(dtype.is_floating_point for dtype in found) else config.dtype or torch.float32


def model_class(config: Any, source: str) -> Any:
    """The class that runs an architecture as a causal language model.

    Raises:
        WeightsError: If this transformers has none.
    """
    import transformers
    name = class_name(config, source)
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and getattr(found, "config_class", None) is type(config)):
        raise WeightsError(f"{source} names the architecture {name[:80]}, which is not one of {config.model_type} in transformers {transformers.__version__}")
    return found


def load_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A model folder loaded whole from safetensors, in a dtype, by default that of its weights, with every tensor where its table says, in eval mode.

    Raises:
        WeightsError: If tensors are missing, extra or mis-shaped, or hold a value that is no finite number.
    """
    config = read_config(folder)
    stored = Checkpoint(folder, config).dtype
    with LOADING:
        model = model_class(config, str(folder)).from_pretrained(
            folder, config=config, dtype=dtype or stored, local_files_only=True, use_safetensors=True, trust_remote_code=False
        ).eval()
    check_finite(model, str(folder))
    return model


def check_finite(model: Any, source: str) -> None:
    """Refuse a model with a weight that is no finite number; ``source`` names it.

    Raises:
        WeightsError: Naming the first such tensor.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.detach().isfinite().all()):
            raise WeightsError(f"{source}: {name} holds values that are no finite numbers; fetch or make the model again")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        WeightsError: If there is none that can be used.
    """
    try:
        from transformers import AutoTokenizer, PreTrainedConfig
        chain = {"config": PreTrainedConfig()} if (folder / FILE_NAME).is_file() else {}  # whose config.json is no model's
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **chain)
    except Exception as error:  # transformers raises many kinds for a broken or missing tokenizer
        raise WeightsError(f"{folder} has no tokenizer that can be used ({one_line(error)}); save one there with save_pretrained") from error


def stored_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Checkpoint key -> shape of every tensor that a model of this config stores."""
    family = family_of(config)
    sizes = family.sizes(config)
    shapes = {spec.name: spec.shape(sizes) for spec in family.tensors}  # the same in every layer
    return {name: shapes[spec.name] for spec, _, name in family.stored(config)}


class Checkpoint:
    """The weights of one model folder, read tensor by tensor through the page cache.

    On opening, the stored names and shapes are compared with the axis table of the architecture: a missing, extra or
    mis-shaped tensor is an error that names it. A head stored beside the embedding that it is tied to must be the same, where that one is read.

    Args:
        folder: A transformers model folder.
        config: Its transformers config.
        files: Recorded length and hash of each file; None skips the checks of a folder that has no record.
        chunks: Recorded hashes of every 4 MiB of each weight file; needed with ``files``.
        places: Where each weight file is, if not in the folder.
        rows: For each tensor that is read, the rows of its first dimension that are; None for all, and for a whole checkpoint. The rest
            of a file need not be there.

    Raises:
        WeightsError: If tensors are missing, extra or mis-shaped.
        IntegrityError: If bytes differ from what was recorded.
    """

    def __init__(
        self, folder: Path, config: Any, files: dict[str, FileRecord] | None = None, chunks: dict[str, list[str]] | None = None,
        places: Mapping[str, Path] | None = None, rows: Mapping[str, np.ndarray | None] | None = None,
    ) -> None:
        self.folder = folder
        self._rows = rows
        self.family = family_of(config)
        self._where: dict[str, tuple[Path, str]] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        self._heights: dict[str, int] = {}
        self._checked: dict[Path, CheckedFile] = {}
        self._handles: dict[Path, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: set[torch.dtype] = set()
        spare_head: tuple[Path, str] | None = None
        if files is None:
            paths = weight_files(folder)
        else:
            names = sorted(name for name in files if name.endswith(".safetensors"))
            paths = [folder / name if places is None else places[name] for name in names]
            records = dict(zip(paths, names))
        if not paths:
            raise WeightsError(f"{folder} has no .safetensors file; save the model with save_pretrained (pickle is never read)")
        for path in paths:
            if files is not None and chunks is not None:
                self._checked[path] = CheckedFile(path, files[records[path]].bytes, chunks.get(records[path], []))
                self._checked[path].check(0, 8)
            header, start = read_header(path)
            if path in self._checked:
                self._checked[path].check(0, start)
            for key, entry in header.items():
                name = self.family.canonical(key)
                if name is None:
                    continue
                if name == self.family.head and getattr(config, self.family.tied):
                    spare_head = (path, key)
                    continue
                if name in self._where:
                    raise WeightsError(f"{folder} stores {name} twice; save the model again with save_pretrained")
                self._where[name] = (path, key)
                first, last = entry["data_offsets"]
                self._spans[name] = (start + first, start + last)
                shapes[name] = tuple(entry["shape"])
                self._heights[name] = shapes[name][0] if shapes[name] else 1
                dtypes.add(_DTYPES.get(entry["dtype"], torch.uint8))
        self._compare(config, shapes)
        if not all(dtype.is_floating_point for dtype in dtypes):
            raise WeightsError(f"{folder} holds tensors that are not floating point (quantised weights?); interpolate before quantising")
        self.dtype = common_dtype(dtypes)
        if spare_head is not None and reads_whole(rows, self.family.embedding):
            path, key = spare_head
            with safe_open(path, framework="pt") as file:
                if not torch.equal(file.get_tensor(key), self[self.family.embedding]):
                    raise WeightsError(f"{folder} ties its head to its embedding, but stores another {key}; set tie_word_embeddings to false or save it again")

    def _compare(self, config: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        expected = stored_shapes(config)
        for what, names in (("lacks", sorted(expected.keys() - shapes.keys())), ("has unexpected", sorted(shapes.keys() - expected.keys()))):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise WeightsError(f"{self.folder} {what} tensors {', '.join(names[:3])}{more}; save the model again or fetch it again")
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise WeightsError(f"{self.folder}: {name} has shape {list(shapes[name])} but its config asks for {list(shape)}; fetch or save it again")

    def __getitem__(self, name: str) -> Tensor:
        """A tensor by its table's key: a view on the page cache, not to be written to."""
        path, key = self._where[name]
        if path in self._checked:
            for span in row_spans(self._spans[name], self._heights[name], None if self._rows is None else self._rows.get(name)):
                self._checked[path].check(*span)
        if path not in self._handles:
            self._handles[path] = safe_open(path, framework="pt")
        return self._handles[path].get_tensor(key)

    def remember(self) -> None:
        """Keep the verdicts of the checks for later processes."""
        for checked in self._checked.values():
            checked.remember()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's model, as transformers chooses them: ``model.safetensors``, else those of the index, else all ``.safetensors``.

    Others may lie beside them: the same weights in a format of its maker's own, or an adapter.

    Raises:
        WeightsError: If there is none, or the index cannot be used.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        if found := sorted(path for path in folder.glob("*.safetensors") if path.name != "adapter_model.safetensors"):
            return found
        if (folder / "adapter_config.json").is_file():
            raise adapter_alone(folder)
        raise WeightsError(f"{folder} has no .safetensors file; save the model with save_pretrained (pickle is never read)")
    try:
        names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} is no index of weight files ({one_line(error)}); save the model again with save_pretrained") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise WeightsError(f"{index} names the weight file {name[:80]!r}, which is not in its folder; fetch the model again, or save it again with save_pretrained")
    return [folder / name for name in names]


def reads_whole(rows: Mapping[str, np.ndarray | None] | None, name: str) -> bool:
    """Whether all of a tensor is read, where these rows of each tensor are; None for all of all."""
    return rows is None or (name in rows and rows[name] is None)


def row_spans(span: tuple[int, int], height: int, rows: np.ndarray | None) -> list[tuple[int, int]]:
    """The stretches of a file that hold some rows of a tensor.

    Args:
        span: Where the tensor begins and ends, in bytes.
        height: Its length along the first dimension.
        rows: Rising indices along it; None for all.

    Example:
        >>> row_spans((100, 140), 4, np.array([0, 1, 3]))
        [(100, 120), (130, 140)]
    """
    if rows is None or not height:
        return [span]
    if not len(rows):
        return []
    start, width = span[0], (span[1] - span[0]) // height
    gap = np.diff(rows) != 1
    firsts, lasts = rows[np.concatenate([[True], gap])].tolist(), rows[np.concatenate([gap, [True]])].tolist()
    return [(start + first * width, min(start + (last + 1) * width, span[1])) for first, last in zip(firsts, lasts)]


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, without its metadata, and the offset at which the tensors begin.

    Raises:
        IntegrityError: If it is not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt"):  # the library checks offsets, overlaps and lengths
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER:
                raise ValueError(f"header of {length:,} bytes")
            header = json.loads(file.read(length))
    except PermissionError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except (SafetensorError, OSError, ValueError, RecursionError, struct.error) as error:
        raise IntegrityError(f"{path} is not a whole safetensors file ({str(error)[:120]}); fetch it again") from error
    header.pop("__metadata__", None)
    return header, 8 + length


def write_safetensors(path: Path, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file tensor by tensor, holding one of them at a time.

    Args:
        path: The file.
        layout: Dtype and shape of each tensor, in the order in which they come.
        tensors: The tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in layout.items():
        length = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, (dtype, shape)), tensor in zip(layout.items(), tensors, strict=True):
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise WeightsError(f"{name} came as {tensor.dtype} {list(tensor.shape)}, planned was {dtype} {list(shape)}; report this")
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def weights_sha256(model: Any) -> str:
    """Fingerprint of a loaded model's weights: names, shapes and values.

    It is the same however the weights are spread over files, and in whatever wider dtype they are loaded; tied weights count once.
    """
    digest, seen = hashlib.sha256(), set()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        value = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any, chats: bool = True) -> str:
    """Fingerprint of what a tokenizer makes of a text, and of a chat or a prompt with its answer where those count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = {"vocab": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    for state in ("truncation", "padding"):  # of the last call
        facts.pop(state, None)
    if chats:
        facts["cbd"] = [tokenizer.eos_token_id, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_read_back(tokenizer: Any, config: Any, name: str) -> None:
    """Refuse a tokenizer that would not be read from a model folder as it is: of some architectures transformers reads every tokenizer in a way of their own.

    Args:
        tokenizer: The tokenizer.
        config: The model's config.
        name: What the user called the tokenizer.

    Raises:
        VocabularyMismatchError: If so.
    """
    with TemporaryDirectory() as temporary:
        config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        found = load_tokenizer(Path(temporary))
    if tokenizer_sha256(found, chats=False) != tokenizer_sha256(tokenizer, chats=False):
        raise VocabularyMismatchError(
            f"in a folder of a {config.model_type} transformers reads {name} as a {type(found).__name__}, which makes other tokens of a text; give a tokenizer made for {config.model_type}, or take a model of another architecture"
        )


def settle_tokenizer(folder: Path) -> None:
    """Write the tokenizer of a chain's first anchor as transformers reads it there, where its files alone, as they lie beside chain.json, would be read otherwise."""
    if tokenizer_file(folder) is None:
        return
    tokenizer = load_tokenizer(folder)
    with TemporaryDirectory() as temporary:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(temporary) / name)
        try:
            alone = tokenizer_sha256(load_tokenizer(Path(temporary)), chats=False)
        except WeightsError:  # files of old, which say nothing of how they are read
            alone = None
    if alone != tokenizer_sha256(tokenizer, chats=False):
        tokenizer.save_pretrained(folder)


def tokenizer_file(folder: Path) -> Path | None:
    """The file of a folder that says most of its tokenizer; None where it has none."""
    return next((folder / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json") if (folder / name).is_file()), None)


def same_vocabulary(first: Path, second: Path) -> bool:
    """Whether the tokenizers of two folders make the same of a text, whatever version wrote them; folders without one have the same.

    Files that are the same are not read; others are compared as transformers reads them.

    Raises:
        WeightsError: If one cannot be read.
    """
    files = tokenizer_file(first), tokenizer_file(second)
    if files[0] is None or files[1] is None:
        return files == (None, None)
    if _text_facts(first) == _text_facts(second):
        return True
    return len({tokenizer_sha256(load_tokenizer(folder), chats=False) for folder in (first, second)}) == 1


def _text_facts(folder: Path) -> list[Any]:
    """What of a tokenizer's files decides how a text is read: all but its config, of which one field does."""
    config = folder / "tokenizer_config.json"
    try:
        prefix = json.loads(config.read_bytes()).get("add_prefix_space") if config.is_file() else None
    except (ValueError, AttributeError):
        prefix = None  # of no use, as whoever reads it says
    names = ("tokenizer.json",) if (folder / "tokenizer.json").is_file() else ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
    return [prefix, *(sha256(folder / name) if (folder / name).is_file() else None for name in names)]
