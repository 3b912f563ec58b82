"""Models inside what distributes or compiles them: the loss runs within their wrappers, and the teacher is sharded like the student.

Of the paths here those through accelerate's FSDP and DeepSpeed need accelerators and are not run by the tests, which shard with FSDP2
(``fully_shard``) over two CPU processes instead.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import is_peft_available

from cbd_hub.errors import ArgumentError


T = TypeVar("T")
_SHORT = 128  # tokens of a row
_LOOKED_AT = 32  # rows


def without_compiler(model: Any) -> Any:
    """The model in ``torch.compile``'s wrapper; itself where it has none."""
    return getattr(model, "_orig_mod", model)


def inside(wrapper: Any, module: Any, compute: Callable[[], T], *, frozen: bool = False) -> T:
    """Run ``compute`` as the forward pass of a distributed model, so that its parameters are whole and its gradients are seen.

    Args:
        wrapper: The model as prepared: a wrapper (DDP, DeepSpeed, FSDP1), a module sharded in place (FSDP2), or the plain module.
        module: The plain module in it.
        compute: What to run. Of tensors that it returns FSDP2 waits for a backward pass; what is to be kept without one goes another way.
        frozen: No backward pass comes, so that FSDP2 may split the parameters again at once.
    """
    if wrapper is module and not isinstance(module, FSDPModule):
        return compute()
    original = module.forward

    def forward(*_: Any, **__: Any) -> T:
        module.forward = original
        return compute()

    module.forward = forward
    try:
        result: T = wrapper(0)  # DDP on an accelerator takes the first of what it moves there, and there has to be one
        return result
    finally:
        module.forward = original
        if frozen:
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()


def is_peft_model(model: Any) -> bool:
    """Whether a model is wrapped by peft."""
    return is_peft_available() and isinstance(model, import_module("peft").PeftModel)


def plain_model(model: Any) -> Any:
    """The model in peft's wrapper; itself where it has none."""
    return model.get_base_model() if is_peft_model(model) else model


@contextmanager
def unadapted_on_failure(model: Any) -> Iterator[None]:
    """What may put adapters into a model: if it fails, the model has its own modules again, and trains what it trained."""
    modules = [(module, dict(module._modules)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, own in modules:
            module._modules.clear()
            module._modules.update(own)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        model.__dict__.pop("peft_config", None)
        raise


def is_sharded(model: Any) -> bool:
    """Whether a model's parameters are split over processes."""
    return isinstance(model, FSDPModule) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def shards(accelerator: Accelerator) -> bool:
    """Whether training splits the student's parameters over processes."""
    state: Any = accelerator.state
    if accelerator.distributed_type == DistributedType.FSDP:
        return True
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED and state.deepspeed_plugin.zero_stage == 3)


def prepare_teacher(accelerator: Accelerator, teacher: Any) -> Any:
    """The frozen teacher where and as the student will be: on the device, or sharded over the processes under FSDP and ZeRO-3.

    Args:
        accelerator: The trainer's.
        teacher: A loaded model; one that is sharded already is left as it is.

    Raises:
        ArgumentError: If FSDP version 1 is asked for.
    """
    if is_sharded(teacher) or not shards(accelerator):
        return accelerator.prepare_model(teacher, device_placement=not is_sharded(teacher), evaluation_mode=True)
    state: Any = accelerator.state
    if accelerator.distributed_type == DistributedType.FSDP:
        if state.fsdp_plugin.fsdp_version != 2:
            raise ArgumentError("FSDP version 1 would keep a whole teacher on every process; set fsdp_version: 2")
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, teacher)
    deepspeed = import_module("deepspeed")
    config = copy.deepcopy(state.deepspeed_plugin.deepspeed_config)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    config["zero_optimization"] = {key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"}
    return deepspeed.initialize(model=teacher, config=config)[0].eval()


def compile_base(model: Any, backend: str | None, mode: str | None) -> None:
    """Compile the forward pass of a model's body in place; the loss on its head stays as it is, and so do the names of its parameters."""
    settings: dict[str, Any] = {"backend": backend or "inductor"}
    if mode is not None:
        settings["mode"] = mode
    model.base_model.compile(**settings)


def cast_weights(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights in a dtype, in place, as transformers loads one in it: an adapter that is trained stays in fp32, and what is no weight, such as rotary frequencies, as it is."""
    for parameter in model.parameters():
        if not (is_peft_model(model) and parameter.requires_grad):
            parameter.data = parameter.data.to(dtype)
    plain_model(model).config.dtype = dtype
    return model


@contextmanager
def short_attention(args: Any, rows: Any, *models: Any) -> Iterator[None]:
    """Where a CPU trains on short rows in bf16, attention by two plain products while the block runs: the fused kernel's backward pass takes several times as long there.

    Args:
        args: The trainer's `ChainDistillerConfig`.
        rows: What is trained on; the first rows say how long they are, those of a stream by ``block_size``.
        models: Loaded models or None; one whose attention is not the default ``sdpa`` keeps it.
    """
    grows = args.on_policy_fraction or args.is_minillm or args.teacher_answers
    short = args.device.type == "cpu" and args.bf16 and args.block_size <= _SHORT and not grows and _longest(rows) <= _SHORT
    with ExitStack() as stack:
        for model in models:
            if short and model is not None and model.config._attn_implementation == "sdpa":
                model.set_attn_implementation("eager")
                stack.callback(model.set_attn_implementation, "sdpa")
        yield


def _longest(rows: Any) -> int:
    """Tokens of the longest of the first rows, for either tokenizer; 0 of a stream, whose rows come once."""
    if not hasattr(rows, "__len__"):
        return 0
    return max((len(values) for row in itertools.islice(rows, _LOOKED_AT) for name, values in row.items() if name.endswith("input_ids")), default=0)


@contextmanager
def sparse_rows(model: Any) -> Iterator[None]:
    """A forward pass whose tied embedding sends back only the rows that it read: the head's gradient, which is whole, takes them up, and no second one is made.

    Args:
        model: A plain causal language model whose head is in the loss.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = embedding.weight
    tied = type(weight) is torch.nn.Parameter and weight is head.weight and weight.device.type in ("cpu", "cuda") and not hasattr(weight, "ds_id")
    if not tied or embedding.sparse:
        yield
        return
    embedding.sparse = True
    try:
        yield
    finally:
        embedding.sparse = False


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter gathered from its shards, on the CPU; every process must call it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


@torch.no_grad()
def fill(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Give a parameter, whole or sharded, a value that every process has."""
    if isinstance(parameter, DTensor):
        parameter.copy_(distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(value)
