"""How a `ChainDistiller` is put together: a teacher or its cache, one vocabulary or a bridge, the whole student or an adapter, and the rows for them."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from transformers.utils import is_peft_available

from cbd_hub.adapter_files import targeted
from cbd_hub.distill.bridge_cache import BridgedCache
from cbd_hub.distill.bridging import Bridge, check_heads
from cbd_hub.distill.config import ChainDistillerConfig
from cbd_hub.distill.teacher_cache import TeacherCache
from cbd_hub.distill.wrapping import is_peft_model, is_sharded, plain_model
from cbd_hub.errors import ArgumentError, VocabularyMismatchError, one_line
from cbd_hub.interpolation.live import check_head
from cbd_hub.interpolation.plan import Kept
from cbd_hub.losses.alignment import rows_needed


logger = logging.getLogger(__name__)

_PROMPT_LEARNING = "prompt learning changes the sequence, which this loss cannot follow; use LoRA"


@dataclass
class Wiring:
    """What a trainer is given, found to go together.

    Attributes:
        model: What is trained: the student, with its adapter where there is one.
        teacher: The model that is run; None where a cache stands in its place.
        cache: The teacher cache, or None.
        bridge: Between two vocabularies, or None where there is one.
        vocab_size: Rows of both heads that are real tokens; None where that is all, or where a bridge leads from one vocabulary to the other.
        kept: Which units of the teacher the student was cut from; None where it is not known or no teacher is run.
        train_dataset: Rows, those of the cache or those that the bridge has read; None where none came.
        eval_dataset: The same for evaluation.
    """

    model: Any
    teacher: Any
    cache: TeacherCache | None
    bridge: Bridge | None
    vocab_size: int | None
    kept: Kept | None
    train_dataset: Any
    eval_dataset: Any


def wired(
    args: ChainDistillerConfig, student: Any, teacher: Any, *, cache: Any, tokenizers: tuple[Any, Any], train_dataset: Any, eval_dataset: Any,
    kept: Kept | None, peft_config: Any,
) -> Wiring:
    """Put together what a trainer is given.

    Args:
        args: Its arguments.
        student: The student.
        teacher: The teacher; with a cache compared with it, and may be None.
        cache: A `TeacherCache`, its folder or its Hub id; None for that of ``train_dataset`` or ``args``, if any.
        tokenizers: The student's and, with a bridge, the teacher's.
        train_dataset: Rows to train on.
        eval_dataset: Rows to evaluate on, several of them by name, or None.
        kept: Which units of the teacher the student was cut from, or None.
        peft_config: Config of an adapter to train instead of the student's weights, or None.

    Raises:
        ArgumentError: If something is missing, or does not go with the rest.
        DataError: If the cache was made for something else, or a row cannot be read.
        VocabularyMismatchError: If the vocabularies differ.
    """
    found = _cached(args, cache, teacher, tokenizers[0 if args.bridge is None else 1], train_dataset, eval_dataset)
    if found is not None:
        teacher = kept = None
    elif not isinstance(teacher, torch.nn.Module):
        raise ArgumentError(f"teacher is a {type(teacher).__name__}; pass a loaded model, or a teacher_cache")
    elif is_peft_model(teacher):
        raise ArgumentError("the teacher has an adapter, beside whose layers a loss cannot read it; pass teacher.merge_and_unload()")
    elif plain_model(student) is teacher:
        raise ArgumentError("student and teacher are one model, which would be frozen as the teacher; load it twice, or pass a cut of it as the student")
    bridge = vocab_size = None
    if args.bridge is not None:
        bridge = Bridge(args, *tokenizers)
        check_heads(bridge.rows, student, teacher)
        if found is not None:
            train_dataset = _bridged(bridge, found, student, train_dataset, eval_dataset)
    elif found is not None:
        train_dataset, vocab_size = found, _cached_vocabulary(student, found)
    else:
        vocab_size = _shared_vocabulary(student, teacher, tokenizers[0])
    if is_peft_model(student):
        _check_adapted(student, args)
    loaded: list[Any] = [model for model in (student, teacher) if isinstance(model, torch.nn.Module) and not is_sharded(model)]
    if any(parameter.is_meta for model in loaded for parameter in model.parameters()):
        raise ArgumentError("student or teacher holds parameters on the meta device, which have no values; load the model whole")
    for model in loaded:
        check_head(plain_model(model))
    if kept is None and args.path_fraction:
        raise ArgumentError("path_fraction needs kept=, the map from the student's layers and neurons to the teacher's")
    model = student if peft_config is None else _with_adapter(student, peft_config, args)
    half = next((parameter.dtype for parameter in model.parameters() if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16)), None)
    if half is not None:
        logger.warning(
            "the student's weights are in %s, whose rounding loses small steps; load it with dtype=torch.float32 (bf16=True then computes its products in bf16)", str(half).removeprefix("torch.")
        )
    if bridge is not None and args.bridge == "text":
        train_dataset = None if train_dataset is None else bridge.rows.prompts(train_dataset, teacher)
    elif bridge is not None and found is None:
        train_dataset, eval_dataset = (bridge.rows.with_tokens(rows, model, teacher) for rows in (train_dataset, eval_dataset))
    return Wiring(model, teacher, found, bridge, vocab_size, kept, train_dataset, eval_dataset)


def _cached(
    args: ChainDistillerConfig, cache: Any, teacher: Any, tokenizer: Any, train_dataset: Any, eval_dataset: Any
) -> TeacherCache | None:
    """The teacher cache to train from, found to be that of what is given; None where the teacher is to be run."""
    if cache is None:
        cache = train_dataset if isinstance(train_dataset, TeacherCache) else args.teacher_cache
    if cache is None:
        return None
    args.check_cached()
    sets = eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset]
    if any(rows is not None and not isinstance(rows, TeacherCache) for rows in sets):
        raise ArgumentError("evaluation would run the teacher, and a teacher cache stands in its place; pass a TeacherCache as eval_dataset too, or none")
    opened = cache if isinstance(cache, TeacherCache) else TeacherCache.open(cache)
    rows = None if isinstance(train_dataset, TeacherCache) else train_dataset
    opened.check(teacher=teacher, tokenizer=tokenizer, rows=rows, block_size=args.block_size)
    return opened


def _bridged(bridge: Bridge, cache: TeacherCache, student: Any, rows: Any, eval_dataset: Any) -> BridgedCache:
    """The rows of a bridge from a teacher cache.

    Raises:
        ArgumentError: If the documents are missing, or rows to evaluate on came.
    """
    if rows is None or isinstance(rows, TeacherCache):
        raise ArgumentError(f"bridge={bridge.args.bridge} reads the documents of {cache.name} with the student's tokenizer too; pass them as train_dataset")
    if eval_dataset is not None:
        raise ArgumentError("evaluation of a bridge runs the teacher, and a teacher cache stands in its place; leave eval_dataset out, and measure bits per byte")
    room = 4 * bridge.args.block_size
    return BridgedCache(bridge, cache, rows, min(room, getattr(student.config, "max_position_embeddings", None) or room))


def _cached_vocabulary(student: Any, cache: TeacherCache) -> int | None:
    """Rows of the student's head that the cache's tokens are; None where that is all."""
    ours, theirs = student.config.vocab_size, cache.codec.vocab_size
    if ours < theirs:
        raise VocabularyMismatchError(f"the student has a vocabulary of {ours:,} and the cached teacher of {theirs:,}; models of different ones need a bridge")
    return None if ours == theirs else theirs


def _shared_vocabulary(student: Any, teacher: Any, tokenizer: Any) -> int | None:
    """Rows of both heads that are real tokens, where they are padded to different lengths; None where they agree."""
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    if ours == theirs:
        return None
    real = None if tokenizer is None else rows_needed(tokenizer)
    if real is None or real > min(ours, theirs):
        raise VocabularyMismatchError(
            f"the student has a vocabulary of {ours:,} and the teacher of {theirs:,}"
            + ("; pass their tokenizer as processing_class if one is only padded" if real is None else f", but the tokenizer needs {real:,} rows")
            + ". Distillation on logits needs one vocabulary; models of different ones need a bridge"
        )
    logger.info("heads of %d and %d rows are padded; the loss uses the %d of the tokenizer", ours, theirs, real)
    return real


def check_adapter(model: Any, peft_config: Any) -> None:
    """Refuse an adapter that the loss cannot train, before anything is changed in the model.

    Raises:
        ArgumentError: If peft is not there, it is no config of peft, or it is on the output head, or on an embedding that the head shares.
    """
    if not is_peft_available():
        raise ArgumentError("peft_config needs peft; run `pip install peft`")
    if not isinstance(peft_config, import_module("peft").PeftConfig):
        raise ArgumentError(f"peft_config is a {type(peft_config).__name__}; give a config of peft, such as peft.LoraConfig(r=8)")
    if is_peft_model(model):
        raise ArgumentError("the student already has an adapter; pass the plain model with peft_config, or the adapted one without")
    if peft_config.is_prompt_learning:
        raise ArgumentError(_PROMPT_LEARNING)
    config, embedding, head = peft_config.to_dict(), model.get_input_embeddings(), model.get_output_embeddings()
    for path, module in model.named_modules():
        if module is not head and not (module is embedding and embedding.weight is head.weight):
            continue
        saved = any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.get("modules_to_save") or ())
        field = "modules_to_save" if saved else "target_modules" if targeted(config, path) else "trainable_token_indices" if config.get("trainable_token_indices") and module is embedding else None
        if field is not None and module is head:
            raise ArgumentError(f"the adapter is on the output head, which the loss reads as a plain matrix; leave {path} out of {field}")
        if field is not None:
            raise ArgumentError(f"the adapter changes {path} ({field}), whose weights the output head shares, and the two would part; leave {path} out, or train without peft_config")


def _check_adapted(student: Any, args: ChainDistillerConfig) -> None:
    """Refuse an adapted student whose adapter the loss cannot train.

    Raises:
        ArgumentError: If it is on the output head, or on an embedding that the head shares, or whole models are to be trained.
    """
    if student.active_peft_config.is_prompt_learning:
        raise ArgumentError(_PROMPT_LEARNING)
    layer = import_module("peft.tuners.tuners_utils").BaseTunerLayer
    base = student.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if isinstance(head, layer):
        raise ArgumentError("the student's adapter is on the output head, which the loss reads as a plain matrix; leave it out of target_modules")
    if isinstance(embedding, layer) and embedding.weight is head.weight:
        raise ArgumentError("the student's adapter changes the embedding, whose weights the output head shares, and the two would part; leave it out of target_modules")
    if args.path_fraction:
        raise ArgumentError("path_fraction trains the student's own weights, and this student trains an adapter; choose one")


def _with_adapter(model: Any, peft_config: Any, args: ChainDistillerConfig) -> Any:
    """The student with a fresh adapter; the config stays as it is.

    Raises:
        ArgumentError: If peft is not there, or the adapter cannot be trained by this loss, or peft refuses it.
    """
    check_adapter(model, peft_config)
    if args.path_fraction:
        raise ArgumentError("path_fraction trains the student's own weights and cannot be combined with peft_config; choose one")
    try:
        adapted = import_module("peft").get_peft_model(model, copy.deepcopy(peft_config))
    except (ValueError, TypeError, RuntimeError) as error:  # a module that is not there, or of a kind that has no such adapter
        raise ArgumentError(f"peft refuses peft_config: {one_line(error)}; name linear modules in target_modules, such as q_proj") from error
    if args.gradient_checkpointing or getattr(args, "activation_checkpointing", False):  # the newer name, transformers 5.23
        adapted.enable_input_require_grads()
    return adapted
