"""`CBDModel`: an ordinary transformers model of any size from a chain."""

from __future__ import annotations

import difflib
import inspect
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cbd_hub.adapter_files import lora_config
from cbd_hub.adapters import carried_to, check_home
from cbd_hub.configs import GENERATION_CONFIG, StoredConfig, read_generation_config, stored_generation_config, whole_config
from cbd_hub.errors import ArgumentError, WeightsError
from cbd_hub.files import staged_folder, write_text
from cbd_hub.hub import TOKENIZER_FILES, ChainFiles, OpenChain, open_chain
from cbd_hub.interpolation.execute import lazy_state_dict, stream
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest import Anchor, Shape
from cbd_hub.plans import anchor_config, made_config, plan_in, stopwatch, warn_of_trough, weight_dtype
from cbd_hub.remote import open_weights
from cbd_hub.reporting import Report
from cbd_hub.sizes import format_size
from cbd_hub.speed.stopwatch import Stopwatch
from cbd_hub.weights import LOADING, Checkpoint, common_dtype, model_class, stored_shapes, write_safetensors


# What transformers 5's loader takes besides what from_chain names itself. Passed through untouched.
LOADER_ARGUMENTS = frozenset({
    "attn_implementation", "code_revision", "device_map", "disable_mmap", "distributed_config", "dtype", "experts_implementation",
    "fusion_config", "generation_config", "kernel_config", "allow_all_kernels", "max_memory", "offload_buffers", "offload_folder",
    "output_loading_info", "quantization_config", "torch_dtype", "tp_plan", "tp_size", "device_mesh", "tqdm_class", "trust_remote_code", "use_kernels",
    "use_safetensors", "weights_only",
})
# What a checkpoint on disk would not show.
_OF_A_LOAD = ("generation_config", "quantization_config", "output_loading_info")
# What transformers accepts and drops.
_DROPPED = frozenset({"low_cpu_mem_usage", "from_tf", "from_flax", "mirror", "_fast_init", "offload_state_dict", "proxies"})
_REFUSED = {
    "config": "the config follows from the shape; change model.config afterwards",
    "state_dict": "the weights follow from the shape",
    "gguf_file": "weights are read from safetensors",
    "ignore_mismatched_sizes": "cbd_hub never re-initialises a tensor",
    "key_mapping": "tensors keep their checkpoint keys",
    "variant": "there is one set of weights; choose dtype instead",
    "subfolder": "name the folder or repo itself",
    "use_auth_token": "it is token= in transformers 5",
    "load_in_8bit": "it is quantization_config=BitsAndBytesConfig(load_in_8bit=True) in transformers 5",
    "load_in_4bit": "it is quantization_config=BitsAndBytesConfig(load_in_4bit=True) in transformers 5",
    "adapter_kwargs": "name the adapter by from_chain's adapter=, with its revision as org/lora@revision",
}


@dataclass(frozen=True)
class _Prepared:
    """A plan with the opened anchors it reads."""

    files: ChainFiles
    plan: Plan
    config: StoredConfig
    checkpoints: Mapping[str, Checkpoint]
    nearest: Anchor
    tick: Callable[[], None] = lambda: None

    def read(self, anchor: str, tensor: str) -> Tensor:
        self.tick()
        return self.checkpoints[anchor][tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The anchors' common dtype; the wider one where they differ."""
        return common_dtype(checkpoint.dtype for checkpoint in self.checkpoints.values())

    def remember(self) -> None:
        for checkpoint in self.checkpoints.values():
            checkpoint.remember()


def _check_loader_arguments(arguments: Mapping[str, Any], caller: Callable[..., Any]) -> dict[str, Any]:
    """The arguments for transformers that came to ``caller`` besides its own, unknown and unusable ones refused.

    Raises:
        ArgumentError: Naming the nearest valid argument.
    """
    kept = {}
    for name, value in arguments.items():
        if name in _REFUSED:
            raise ArgumentError(f"{name}= cannot be used with {caller.__name__}: {_REFUSED[name]}")
        if name in _DROPPED:
            continue
        if name not in LOADER_ARGUMENTS:
            own = [known.name for known in inspect.signature(caller).parameters.values() if known.kind is known.KEYWORD_ONLY]
            near = difflib.get_close_matches(name, ["size", *own, *LOADER_ARGUMENTS], n=1, cutoff=0.0)[0]
            raise ArgumentError(f"{name}= is no argument of {caller.__name__}; did you mean {near}=?")
        kept[name] = value
    if "torch_dtype" in kept:
        warnings.warn("torch_dtype= is deprecated in transformers 5; use dtype=", FutureWarning, stacklevel=3)
        old = kept.pop("torch_dtype")
        kept["dtype"] = old if kept.get("dtype") is None else kept["dtype"]
    return kept


# What makes a model other than the plain weights on one device that are timed.
_UNTIMED = ("quantization_config", "tp_plan", "tp_size", "device_mesh", "distributed_config")


def _watch(files: ChainFiles, arguments: Mapping[str, Any], *wishes: Any) -> Stopwatch | None:
    """What times a chain's anchors as loading arguments say; None where no speed is wished for.

    Raises:
        ArgumentError: If the model will not be plain weights on one device.
    """
    if all(wish is None for wish in wishes):
        return None
    for name in _UNTIMED:
        if arguments.get(name) is not None:
            raise ArgumentError(f"{name}= came with a speed to reach, which is timed with plain weights on one device; leave it out, or ask for a size")
    return stopwatch(files, arguments.get("dtype"), arguments.get("device_map"), arguments.get("attn_implementation"))


def _prepare(files: ChainFiles, plan: Plan) -> _Prepared:
    anchors = {name: files.manifest.anchor(name) for name in sorted({plan.small, plan.large})}
    nearest = min(anchors.values(), key=lambda anchor: abs(anchor.parameters - plan.parameters))
    rows: dict[str, Any] = dict.fromkeys(anchors) if plan.strategy == "anchor" else plan.rows()
    read = {name: open_weights(files, anchor, anchor_config(files, anchor), rows[name]) for name, anchor in anchors.items() if name in plan.sources()}
    return _Prepared(files, plan, made_config(files, plan), read, nearest)


def load(files: ChainFiles, plan: Plan, *, fetched: Callable[[], None], tick: Callable[[], None], **arguments: Any) -> Any:
    """The model of a plan in an opened chain, for callers that show how far it is.

    Args:
        files: The chain.
        plan: The plan.
        fetched: Called when all that the plan reads is there.
        tick: Called before each term of the plan is read, from several threads.
        **arguments: What transformers' loader takes.
    """
    prepared = replace(_prepare(files, plan), tick=tick)
    fetched()
    return _load(prepared, _check_loader_arguments(arguments, load))


class CBDModel:
    """Ordinary transformers models of any size from a chain of anchors."""

    @staticmethod
    def plan(
        chain: str | os.PathLike[str] | OpenChain, size: str | int | None = None, *, memory_budget: str | int | None = None,
        min_tokens_per_second: str | float | None = None, max_latency: str | float | None = None,
        shape: Shape | Mapping[str, int] | None = None, strategy: str = "auto", alpha: float | None = None, tolerance: float = 0.02,
        adapter: str | os.PathLike[str] | None = None, adapter_size: str | int | None = None, revision: str | None = None, token: str | bool | None = None, cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False, force_download: bool = False, **transformers_kwargs: Any,
    ) -> Plan:
        """What `from_chain` would do, without touching a weight: ``print`` it for a table.

        Args:
            chain: A local folder or a Hub id.
            size: Unique parameters wanted: "138M", "1.1B", an int, "min" or "max". Text that an anchor's size rounds to, within 5%, means that anchor.
            memory_budget: Bytes that the weights may take in the chosen dtype instead, such as "300MB": the largest size that fits. ``max_memory``
                stays what it is in transformers.
            min_tokens_per_second: Speed that it must reach instead: the largest size that does. New tokens a second after the first one, by greedy decoding
                at batch 1 with a KV cache after a prompt of 64 tokens, in the chosen dtype, on the one device of ``device_map``, else on the best one that
                there is, with torch's current number of threads. The anchors' shapes are timed for some seconds each, with random weights, and what was found is
                kept in the Hub's cache folder (``cbd speed --recalibrate`` times anew); sizes in between are predicted from them. With
                ``memory_budget`` both hold.
            max_latency: Time that it may take from a prompt of 64 tokens to an answer of 64, measured so: "1.5s", "200ms", or seconds.
            shape: The exact shape instead, whole or in the fields in which the neighbours differ.
            strategy: ``blend``, ``patch``, or ``auto`` for what measured best at that size.
            alpha: Weight of the smaller neighbour in a blend, 0 to 1; by default the fitted mix, else by size distance. A given one is the
                paper's plain formula: units that only the larger neighbour holds are added as they are.
            tolerance: Largest accepted distance from the size, as a share of it.
            adapter: A LoRA of another size that is to be carried to this one, as in `carry_adapter`: its home is found and the way there checked.
            adapter_size: The size that the adapter was trained at, where its files and shapes do not tell.
            revision: Branch, tag or commit of the chain's index repo.
            token: Hub token; None for the stored one.
            cache_dir: Another place for the Hub's cache.
            local_files_only: Make no request.
            force_download: Fetch even what is cached.
            **transformers_kwargs: Checked as `from_chain` checks them; they change no plan.

        Returns:
            The plan.

        Raises:
            SizeError: If the size cannot be read, lies outside the chain or cannot be realised within ``tolerance``, or no size is fast enough.
            ManifestError: If there is no such chain or its chain.json is refused.
            ArgumentError: If an option is unknown or out of its range.
        """
        arguments = _check_loader_arguments(transformers_kwargs, CBDModel.plan)
        check_home(adapter, adapter_size)
        files = open_chain(
            chain, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download
        )
        watch = _watch(files, arguments, min_tokens_per_second, max_latency)
        plan = plan_in(
            files.glanced, size, memory_budget=memory_budget, min_tokens_per_second=min_tokens_per_second, max_latency=max_latency,
            dtype=arguments.get("dtype"), shape=shape, strategy=strategy, alpha=alpha, tolerance=tolerance, watch=watch,
        )
        warn_of_trough(files, plan)
        return plan if adapter is None else carried_to(files, plan, adapter, adapter_size, weights=False).plan

    @staticmethod
    def from_chain(
        chain: str | os.PathLike[str] | OpenChain, size: str | int | None = None, *, memory_budget: str | int | None = None,
        min_tokens_per_second: str | float | None = None, max_latency: str | float | None = None,
        shape: Shape | Mapping[str, int] | None = None, strategy: str = "auto", alpha: float | None = None, tolerance: float = 0.02,
        adapter: str | os.PathLike[str] | None = None, adapter_size: str | int | None = None, revision: str | None = None, token: str | bool | None = None, cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False, force_download: bool = False, **transformers_kwargs: Any,
    ) -> Any:
        """A model of any size: the architecture's plain class, in eval mode, in the anchors' dtype unless ``dtype`` is given.

        At an anchor's size it is that anchor, bit for bit. Elsewhere the neighbours' parameters are combined in fp32, tensor by tensor, and
        rounded once; peak anonymous memory is that of the model, twice its largest tensor and 64 MB. A tensor that is an anchor's own, bit for bit, is
        mapped from its file as by transformers' own loader, and copied where it is written to, unless ``disable_mmap`` is given. ``model.config.cbd`` says
        where it came from. Arguments up to ``force_download`` are those of `plan`.

        Args:
            chain: A local folder or a Hub id, or an open `Chain`, as for `plan` and `materialize`.
            size: Unique parameters wanted.
            memory_budget: Bytes for the weights in the chosen dtype instead.
            min_tokens_per_second: Speed that it must reach instead, on the device of ``device_map``, else on the best one, where the model then is.
            max_latency: Time that an answer may take instead, likewise.
            shape: The exact shape instead.
            strategy: ``blend``, ``patch`` or ``auto``.
            alpha: Weight of the smaller neighbour in a blend.
            tolerance: Largest accepted distance from the size, as a share of it.
            adapter: A LoRA, folder or Hub id (``org/lora@revision``), trained at any size of the chain: carried to this one as in `carry_adapter` and loaded by peft.
            adapter_size: The size that the adapter was trained at, where its files and shapes do not tell.
            revision: Revision of the chain's index repo.
            token: Hub token.
            cache_dir: Another place for the Hub's cache.
            local_files_only: Make no request.
            force_download: Fetch even what is cached.
            **transformers_kwargs: What transformers' ``from_pretrained`` takes: ``dtype``, ``device_map``, ``attn_implementation``, ...

        Returns:
            The model; with ``output_loading_info=True`` a pair of it and a dict that also holds the plan.

        Raises:
            SizeError: If the size cannot be read, lies outside the chain or cannot be realised within ``tolerance``, or no size is fast enough.
            ManifestError: If there is no such chain or its chain.json is refused.
            IntegrityError: If a file differs from its recorded hash.
            WeightsError: If a tensor is missing, extra or mis-shaped.
            ArgumentError: If an argument is unknown or out of its range.
        """
        arguments = _check_loader_arguments(transformers_kwargs, CBDModel.from_chain)
        check_home(adapter, adapter_size)
        files = open_chain(
            chain, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download
        )
        watch = _watch(files, arguments, min_tokens_per_second, max_latency)
        plan = plan_in(
            files, size, memory_budget=memory_budget, min_tokens_per_second=min_tokens_per_second, max_latency=max_latency, dtype=arguments.get("dtype"),
            shape=shape, strategy=strategy, alpha=alpha, tolerance=tolerance, watch=watch,
        )
        warn_of_trough(files, plan)
        if watch is not None and watch.device.type != "cpu" and arguments.get("device_map") is None:
            arguments["device_map"] = {"": watch.device}  # where it was timed
        carried = None if adapter is None else carried_to(files, plan, adapter, adapter_size)
        if carried is not None:
            lora_config(carried.config)  # refused before the work, not after it
        made = _load(_prepare(files, plan if carried is None else carried.plan), arguments)
        model = made[0] if isinstance(made, tuple) else made
        if carried is not None:
            carried.load_into(model)
        if watch is not None and watch.fresh and plan.speed is not None:
            watch.check(model, plan.speed)
        return made

    @staticmethod
    def materialize(
        chain: str | os.PathLike[str] | OpenChain, size: str | int | None = None, *, output_dir: str | os.PathLike[str],
        memory_budget: str | int | None = None, min_tokens_per_second: str | float | None = None, max_latency: str | float | None = None,
        shape: Shape | Mapping[str, int] | None = None, strategy: str = "auto", alpha: float | None = None, tolerance: float = 0.02,
        adapter: str | os.PathLike[str] | None = None, adapter_size: str | int | None = None, dtype: Any = None, revision: str | None = None, token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None, local_files_only: bool = False, force_download: bool = False,
        report: Report | None = None, **transformers_kwargs: Any,
    ) -> Plan:
        """An ordinary checkpoint on disk, written tensor by tensor, with tokenizer, chat template and generation config.

        It loads with plain transformers, without cbd_hub, and gives the same logits as `from_chain` in the same dtype. Other arguments are
        those of `plan`.

        Args:
            chain: A local folder or a Hub id.
            size: Unique parameters wanted.
            output_dir: The folder to make: absent or empty. Nothing is left behind on failure.
            memory_budget: Bytes for the weights in the chosen dtype instead.
            min_tokens_per_second: Speed that it must reach instead.
            max_latency: Time that an answer may take instead.
            shape: The exact shape instead.
            strategy: ``blend``, ``patch`` or ``auto``.
            alpha: Weight of the smaller neighbour in a blend.
            tolerance: Largest accepted distance from the size, as a share of it.
            adapter: A LoRA as in `from_chain`, merged: added to the weights in fp32, which are then rounded once.
            adapter_size: The size that the adapter was trained at, where its files and shapes do not tell.
            dtype: Dtype on disk; by default the anchors'.
            revision: Revision of the chain's index repo.
            token: Hub token.
            cache_dir: Another place for the Hub's cache.
            local_files_only: Make no request.
            force_download: Fetch even what is cached.
            report: Called with what is done, how much of it, and of how much.
            **transformers_kwargs: Checked as `from_chain` checks them; what is about devices has no meaning on disk.

        Returns:
            The plan that was carried out.

        Raises:
            StorageError: If the folder is in the way or the disk is full.
            ArgumentError: If an argument would not show in what is written.
            CBDError: As `from_chain`.
        """
        arguments = _check_loader_arguments({"dtype": dtype, **transformers_kwargs}, CBDModel.materialize)
        for name in _OF_A_LOAD:
            if arguments.get(name):
                raise ArgumentError(f"{name}= is of a load, and nothing on disk would show it; give it to from_pretrained of what is written here, or to from_chain")
        check_home(adapter, adapter_size)
        dtype = arguments.get("dtype")
        files = open_chain(
            chain, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download
        )
        plan = plan_in(
            files, size, memory_budget=memory_budget, min_tokens_per_second=min_tokens_per_second, max_latency=max_latency, dtype=dtype, shape=shape, strategy=strategy,
            alpha=alpha, tolerance=tolerance, watch=_watch(files, arguments, min_tokens_per_second, max_latency),
        )
        warn_of_trough(files, plan)
        carried = None if adapter is None else carried_to(files, plan, adapter, adapter_size)
        changes = None if carried is None else {name: change.added_to for name, change in carried.changes().items()}
        plan = plan if carried is None else carried.plan
        prepared = _prepare(files, plan)
        chosen = weight_dtype(dtype, prepared.dtype)
        with staged_folder(Path(output_dir)) as folder:
            for path in (files.checked(prepared.nearest, name) for name in TOKENIZER_FILES if name in prepared.nearest.files):
                shutil.copyfile(path, folder / path.name)
            if GENERATION_CONFIG in prepared.nearest.files:
                write_text(folder / GENERATION_CONFIG, stored_generation_config(files.checked(prepared.nearest, GENERATION_CONFIG).parent))
            prepared.config.save_pretrained(folder, chosen)
            stored = stored_shapes(prepared.config)
            layout = {name: (chosen, stored[name]) for name in plan.tensors}
            write_safetensors(folder / "model.safetensors", layout, _told(stream(plan, prepared.read, stored, chosen, changes), len(layout), report))
        prepared.remember()
        return plan

    @staticmethod
    def from_pretrained(
        model: str | os.PathLike[str], size: str | int | None = None, *, shape: Shape | Mapping[str, int] | None = None, calibration: Any = None, reconstruct: Literal["stream", "layer"] | None = "stream",
        revision: str | None = None, token: str | bool | None = None, cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False, force_download: bool = False, **transformers_kwargs: Any,
    ) -> Any:
        """Any supported model cut by measured importance to a smaller size: no chain, no training.

        Several mixes of fewer layers and narrower FFN are tried on calibration text, and the one that loses least is made. What its attention and FFN write is then fitted
        to make up for what was cut (`cbd_hub.reconstruct.reconstruct`), and where there is text enough to tell them apart other depths are tried so. Half of the text is held out: ``model.config.cbd`` holds the loss there with its standard error,
        ``sliced_loss`` before the fit, the whole model's loss, and what the text was.

        Args:
            model: A model folder or a Hub id.
            size: Unique parameters wanted, fewer than the model's.
            shape: The shape instead, in the fields that are to be smaller; with a size, the FFN fills the rest where it is not named.
            calibration: A text file or a pattern, a list of texts, or a ``datasets.Dataset`` with a column ``text``. None: the model writes its own, at
                temperature 1 from its first token on. Its loss
                is that of the model's own text, lower than of any other.
            reconstruct: What to fit to: ``"stream"``, all that was cut; ``"layer"``, neurons and heads, for an anchor of a chain to be; None: nothing, and the model is slices of
                the whole one.
            revision: Branch, tag or commit of a repo.
            token: Hub token; None for the stored one.
            cache_dir: Another place for the Hub's cache.
            local_files_only: Make no request.
            force_download: Fetch even what is cached.
            **transformers_kwargs: As `from_chain` takes them.

        Returns:
            The model, as `from_chain` returns it.

        Raises:
            SizeError: If the size is not below the model's, or layers and FFN cannot be cut to it.
            ArchitectureError: If the architecture has no axis table, or cannot have the shape.
            ArgumentError: If an argument cannot be used.
            DataError: If the text is missing, empty or too short.
            WeightsError: If the model's files cannot be used.
            StorageError: If there is no such model.

        Example:
            >>> model = CBDModel.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", size="120M")  # doctest: +SKIP
            >>> model.config.cbd["loss"], model.config.cbd["stderr"]  # doctest: +SKIP
        """
        arguments = _check_loader_arguments(transformers_kwargs, CBDModel.from_pretrained)
        options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only, "force_download": force_download}
        weight_dtype(arguments.get("dtype"), torch.float32)  # refused before the work, not after it
        from cbd_hub.single import cut_single  # measures with live models, which a load from a chain does not need
        cut = cut_single(model, size, shape=shape, calibration=calibration, target=reconstruct, revision=revision, options=options)
        return _load_plan(cut.plan, cut.config, cut.read, cut.checkpoint.dtype, cut.source, cut.generation_config, arguments)


def _told(tensors: Iterator[Tensor], total: int, report: Report | None) -> Iterator[Tensor]:
    """Tensors as they come, each told of."""
    for done, tensor in enumerate(tensors):
        if report is not None:
            report("writing tensors", done, total)
        yield tensor


def _generation_config(prepared: _Prepared) -> Any:
    if GENERATION_CONFIG not in prepared.nearest.files:
        return None
    return read_generation_config(prepared.files.checked(prepared.nearest, GENERATION_CONFIG).parent)


def _load(prepared: _Prepared, arguments: dict[str, Any]) -> Any:
    made = _load_plan(
        prepared.plan, whole_config(prepared.config), prepared.read, prepared.dtype, prepared.files.name, lambda: _generation_config(prepared), arguments
    )
    prepared.remember()
    return made


def _load_plan(
    plan: Plan, config: Any, read: Callable[[str, str], Tensor], dtype: torch.dtype, name: str, generation: Callable[[], Any],
    arguments: dict[str, Any],
) -> Any:
    """The plan's model in its plain class, in ``dtype`` unless the arguments say otherwise."""
    plain_class = model_class(config, name)
    want_info = arguments.pop("output_loading_info", False)
    dtype = weight_dtype(arguments.pop("dtype", None), dtype)
    own = generation() if arguments.get("generation_config") is None else None
    state = lazy_state_dict(plan, read, stored_shapes(config), dtype, mapped=not arguments.pop("disable_mmap", False))
    with LOADING:
        model, info = plain_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **arguments)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            raise WeightsError(f"{name}: loading {format_size(plan.parameters)} left {what} {sorted(map(str, info[what]))[:3]}; report this")
    if own is not None:  # the loader's copy of it would count as changed, and be refused by save_pretrained where the file has settings that do not agree
        model.generation_config = own
    model.config._name_or_path = model.name_or_path = name
    return (model, {**info, "plan": plan}) if want_info else model
