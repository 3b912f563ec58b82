"""`heal`: a short distillation of a model in between two anchors from its larger neighbour."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, extract_model_from_parallel, wait_for_everyone
from transformers import set_seed

from cbd_hub.cards import Healed
from cbd_hub.chain import Chain
from cbd_hub.distill.begun import fingerprint, unfinished
from cbd_hub.distill.checks import check_optimiser, check_rate
from cbd_hub.distill.config import ChainDistillerConfig
from cbd_hub.distill.healing import Healer, divided, documents_of
from cbd_hub.distill.progress import show_stage
from cbd_hub.distill.sampling import text_default
from cbd_hub.distill.saving import last_checkpoint
from cbd_hub.distill.schema import telling
from cbd_hub.distill.teacher_cache import TeacherCache
from cbd_hub.distill.wiring import check_adapter
from cbd_hub.distill.wrapping import cast_weights, is_peft_model, plain_model, unadapted_on_failure
from cbd_hub.errors import ArgumentError, DataError, SizeError, TrainingError, one_line
from cbd_hub.evaluation import Documents, model_losses
from cbd_hub.files import check_absent, disk_told, held, staged_folder, write_text
from cbd_hub.hub import TOKENIZER_FILES
from cbd_hub.manifest import Anchor
from cbd_hub.plans import made_elsewhere
from cbd_hub.reporting import Progress
from cbd_hub.shapes import check_positions, parameter_count, shape_of
from cbd_hub.sizes import check_counts, format_size, with_error
from cbd_hub.weights import weights_sha256


logger = logging.getLogger(__name__)

STEPS = 100
_EVALUATIONS = 5  # in a run, if eval_steps does not say otherwise
_DEFAULTS: dict[str, Any] = {"bf16": True, "per_device_train_batch_size": 8, "seed": 0, "report_to": "none", "save_total_limit": 2}
LEARNING: dict[str, Any] = {"kd_weight": 0.1, "ce_weight": 1.0, "learning_rate": 1e-4}  # of a whole model on text; with both weights alike, as in a stage, it gains little: benchmarks/quality/README.md
_ADAPTER_RATE = 1e-3
_OWN = {
    "output_dir": "it is heal's own", "teacher_cache": "it is heal's own", "num_train_epochs": "give max_steps, or tokens", "bridge": "neighbours have one vocabulary",
    "path_fraction": "the model is itself one on the path", "eval_strategy": "eval_steps says when", "save_strategy": "eval_steps says when", "save_steps": "eval_steps says when",
    "load_best_model_at_end": "the best weights are always kept", "metric_for_best_model": "it is the held-out loss", "greater_is_better": "it is the held-out loss",
    "push_to_hub": "push the folder with `cbd push`", "save_only_model": "a heal that is stopped goes on from its checkpoint, which needs the optimiser too",
    "include_num_input_tokens_seen": "tokens are counted for the model's record", "enable_jit_checkpoint": "a heal that is stopped goes on from its last checkpoint",
}


def heal(
    model: Any, chain: Chain | str | os.PathLike[str], dataset: Any = None, *, output_dir: str | os.PathLike[str] | None = None, tokens: int | None = None,
    eval_dataset: Any = None, heldout: float = 0.05, heldout_tokens: int = 8192, patience: int | None = 2, peft_config: Any = None, merge: bool = True,
    teacher_cache: TeacherCache | str | os.PathLike[str] | None = None, revision: str | None = None, progress: Progress | None = None, **training: Any,
) -> Any:
    """Distil a model in between two anchors for a short while from the larger one, and give back the weights with the least held-out loss.

    The loss is `ChainDistiller`'s, by default cross-entropy and a tenth of forward KL, which learns the given text and may lose some of other text; with ``kd_weight=1``,
    as in a stage, the demo's 117M gained little and lost little (benchmarks/quality/README.md, Heals). The held-out loss is measured on documents
    one by one, as `cbd eval` does, before, some times on the way, and after; if no evaluation is below the start, the model comes back as it was. Under ``torchrun`` or
    ``accelerate launch`` every process calls it with the same arguments, and updates are those of one process.

    ``model.config.cbd["healed"]`` holds what it learned from and how (``teacher``, ``by``, ``objective``), ``steps`` and ``tokens`` of the weights that were kept, ``loss`` and
    ``loss_before`` with their standard errors, the paired ``difference`` with its own, in nats per token, and the ``documents`` and ``heldout_tokens`` of which.

    Args:
        model: What `CBDModel.from_chain` gave for a size in between; trained in place, in fp32, and given back in its own dtype; where that fails or is stopped, as it came, for which a copy of its weights is held.
        chain: The chain that it was made from: a `Chain`, a local folder or a Hub id.
        dataset: Rows as `ChainDistiller` takes them: a ``datasets.Dataset``, a stream, or a list; of a teacher cache, what it was made of, or None.
        output_dir: A folder to make: a whole model with tokenizer, chat template and generation config, or a PEFT folder. The work lies in a hidden folder beside it
            until that is there, so that a run that was stopped goes on with the same call.
        tokens: How much to learn from, in tokens, instead of ``max_steps`` (by default 100 optimiser steps).
        eval_dataset: Rows to measure on; by default a part of ``dataset`` that is then not trained on. Needed with a teacher cache and with streams.
        heldout: That part, as a share of the different documents. The division is that of a recipe with the same text, share and seed.
        heldout_tokens: Where measuring stops.
        patience: Evaluations without a new least loss before it stops; None never stops it.
        peft_config: Train an adapter, such as a ``peft.LoraConfig``, instead of the weights themselves.
        merge: Whether the adapter is merged into the model at the end; else a ``PeftModel`` comes back.
        teacher_cache: A `TeacherCache`, its folder or its Hub id, made with an anchor above the model, which is then not run.
        revision: Branch, tag or commit of a chain on the Hub; by default the one that the model was made from.
        progress: Called with a line for each step of the work.
        **training: Fields of `ChainDistillerConfig`, such as ``max_steps``, ``learning_rate`` (1e-4, of an adapter 1e-3), ``kd_weight`` (0.1) and ``ce_weight`` (1;
            where the model's own answers are judged they are 1 and 1, and 1 and 0 for MiniLLM), ``eval_steps``, ``block_size`` or ``seed``.

    Returns:
        The model in eval mode: of its plain class, or a ``PeftModel``.

    Raises:
        ArgumentError: If the model was not made from this chain, or an option cannot be used.
        SizeError: If its size is an anchor's.
        DataError: If there is too little text, or the teacher cache is of something else.
        StorageError: If the folder is in the way or the disk is full, or holds an unfinished run of other options.

    Example:
        >>> model = heal(CBDModel.from_chain("./chain", size="117M"), "./chain", dataset, tokens=100_000)  # doctest: +SKIP
        >>> model.config.cbd["healed"]["loss"], model.config.cbd["healed"]["stderr"]  # doctest: +SKIP
    """
    made = _made(model)
    if peft_config is not None:
        check_adapter(model, peft_config)
    opened = chain if isinstance(chain, Chain) else Chain.from_pretrained(chain, revision=revision or _revision(made, os.fspath(chain)))
    _check_neighbours(model, made, opened)
    if isinstance(dataset, TeacherCache):
        dataset, teacher_cache = None, dataset
    cache = teacher_cache if isinstance(teacher_cache, TeacherCache) or teacher_cache is None else TeacherCache.open(teacher_cache)
    tokenizer = opened.tokenizer(made["parameters"])
    teacher = opened.neighbours(made["parameters"])[1] if cache is None else _cached_anchor(cache, opened, made["parameters"])
    args = _arguments(training, tokens, cache, adapter=peft_config is not None)
    check_positions(args.block_size, model.config, f"block_size={args.block_size}")
    if not 0 < heldout < 1:
        raise ArgumentError(f"heldout={heldout} is no share of the text; give a number between 0 and 1, such as 0.05")
    check_counts(heldout_tokens=heldout_tokens, patience=patience)
    if eval_dataset is None and (dataset is None or cache is not None):
        raise ArgumentError("a teacher cache holds what is trained on, and nothing to measure on came; pass eval_dataset (--heldout-text)" if cache is not None else "neither dataset nor teacher_cache came; pass one")
    rows, held_rows = divided(dataset, eval_dataset, heldout, args.seed, model.config.vocab_size)
    documents = documents_of(held_rows, tokenizer, args.block_size, heldout_tokens)
    asked = {
        "chain": made["chain"], "teacher": teacher.name, "model": weights_sha256(model), "text": fingerprint([rows if isinstance(rows, list) else [], held_rows]),
        **({} if cache is None else {"cache": fingerprint(cache.record.source.model_dump())}),
        "peft_config": None if peft_config is None else json.dumps(peft_config.to_dict(), sort_keys=True, default=_as_text), "merge": merge, "heldout_tokens": heldout_tokens, "patience": patience,
        **telling(training), **{name: getattr(args, name) for name in (*LEARNING, "block_size", "max_steps")}, "processes": args.world_size,
    }
    target, first = None if output_dir is None else Path(output_dir).expanduser(), args.process_index == 0
    dtype = model.dtype
    before = {} if peft_config is not None else {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}
    with _workplace(target, asked, args) as work:
        args.output_dir = str(work / "run")
        set_seed(args.seed)
        try:
            with unadapted_on_failure(model):
                healer = Healer(
                    documents, patience, model=cast_weights(model, torch.float32), teacher=opened.model(teacher.parameters, dtype=torch.bfloat16 if args.bf16 and cache is None else None),
                    args=args, train_dataset=rows, processing_class=tokenizer, teacher_cache=cache, peft_config=peft_config,
                )
                _train(healer, teacher.name, progress if progress is not None and first else lambda line: None)
        except BaseException:
            cast_weights(extract_model_from_parallel(model, keep_fp32_wrapper=False), dtype)
            for name, parameter in model.named_parameters():  # as it came, so that the same call goes on
                if name in before:
                    parameter.data.copy_(before[name])
            raise
        healed = _result(healer, dtype, merge)
        record = _record(healed, healer, documents, teacher=teacher.name, by=_way(peft_config), objective="; ".join(args.facts().values()), earlier=made.get("healed"))
        healed.config.cbd = {**made, "healed": record.model_dump()}
        if progress is not None and first:
            told = record.table()
            progress(f"after {told['on']}: {told['held-out loss after']} ({told['difference']}, paired)")
        if target is not None and first:
            _save(healed, opened, made, target)
    return healed


def _train(healer: Healer, teacher: str, say: Progress) -> None:
    """Let it learn, from its last checkpoint on where there is one.

    Raises:
        TrainingError: If a loss is no number.
    """
    start, output_dir, size = healer.start, healer.args.output_dir, format_size(healer.model.config.cbd["parameters"])
    if not math.isfinite(start.mean):
        raise TrainingError(f"the model has the loss {start.mean} on the held-out text before anything is learned; look at its weights, and make it anew")
    show_stage(healer, f"heal {size}")
    last = last_checkpoint(output_dir)
    say(
        f"{size}: {with_error(start.mean, start.stderr)} nats per token on {int(start.tokens.sum()):,} held-out tokens; "
        f"{'goes on from ' + Path(last).name if last else 'learns'} from {teacher}, {healer.args.max_steps:,} steps at most"
    )
    healer.train(last)
    if not healer.best[0]:
        logger.warning("no evaluation was below the loss at the start, and the model is as it was; lower learning_rate, or give more text")
    wait_for_everyone()


def _record(model: Any, healer: Healer, documents: Documents, **facts: Any) -> Healed:
    """What came of it, measured on the model as it is given back."""
    after = model_losses(plain_model(model), documents)
    (step, tokens), (difference, error) = healer.best, after.minus((1.0, healer.start))
    return Healed(
        steps=step, tokens=tokens, loss=after.mean, stderr=after.stderr, loss_before=healer.start.mean, stderr_before=healer.start.stderr, difference=difference,
        difference_stderr=error, documents=len(documents.ids), heldout_tokens=documents.tokens, **facts,
    )


def _made(model: Any) -> dict[str, Any]:
    """What the model's config says of where it came from.

    Raises:
        ArgumentError: If it was not made from a chain, or cannot be trained as it is.
    """
    if is_peft_model(model) or getattr(model, "_hf_peft_config_loaded", False):
        raise ArgumentError("the model has an adapter; merge it first (merge_and_unload), and pass peft_config for a new one")
    made = getattr(getattr(model, "config", None), "cbd", None)
    if not isinstance(made, dict) or not {"chain", "neighbours", "parameters"} <= made.keys():
        raise ArgumentError(f"the model ({type(model).__name__}) was not made from a chain: its config says no neighbours; make one with CBDModel.from_chain")
    if getattr(model, "is_quantized", False):
        raise ArgumentError("the model is quantised; heal it before quantising")
    return made


def _revision(made: Mapping[str, Any], chain: str) -> str | None:
    """The commit that a model was made from, where it is one of the chain asked for."""
    return made.get("revision") if made["chain"] == chain and not Path(chain).expanduser().is_dir() else None


def _check_neighbours(model: Any, made: Mapping[str, Any], chain: Chain) -> None:
    """Refuse a model of another chain, and one that is an anchor.

    Raises:
        ArgumentError: If it was made from another chain.
        SizeError: If its size is an anchor's.
    """
    size, names = made["parameters"], list(made["neighbours"])
    try:
        around = list(dict.fromkeys(anchor.name for anchor in chain.neighbours(size)))
    except SizeError:
        around = []
    shape = shape_of(model.config)
    if made_elsewhere(chain.files, made) or around != names or parameter_count(model.config) != size or shape.vocab != chain.neighbours(size)[0].shape.vocab:
        raise ArgumentError(
            f"the model was made from {made['chain']} with {size:,} parameters, between {' and '.join(names)}, and has the shape {shape.text} and {parameter_count(model.config):,}: "
            f"that is no size of {chain.files.name}; pass its own chain, or make it anew with CBDModel.from_chain"
        )
    if len(around) == 1:
        raise SizeError(f"{format_size(size)} is the anchor {around[0]} of {chain.files.name}, which needs no healing; ask for a size in between, or distil on with ChainDistiller")


def _cached_anchor(cache: TeacherCache, chain: Chain, size: int) -> Anchor:
    """The anchor that a teacher cache was made with.

    Raises:
        DataError: If it is none of the chain that is larger than the model.
    """
    parameters = cache.record.source.teacher.parameters
    found = next((anchor for anchor in chain.anchors if anchor.parameters == parameters > size), None)
    if found is None:
        above = ", ".join(f"{anchor.name} ({anchor.parameters:,})" for anchor in chain.anchors if anchor.parameters > size)
        raise DataError(f"{cache.name} was made with a teacher of {parameters:,} parameters; give one of an anchor above the model: {above}")
    return found


def _arguments(training: Mapping[str, Any], tokens: int | None, cache: TeacherCache | None, adapter: bool) -> ChainDistillerConfig:
    """The training arguments, with what healing has by default.

    Raises:
        ArgumentError: If a field is unknown, not to be set here, or outside its range.
    """
    known = {field.name for field in dataclasses.fields(ChainDistillerConfig) if field.init}
    for name in training:
        if name in _OWN:
            raise ArgumentError(f"{name}= cannot be set here: {_OWN[name]}; leave it out")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known - _OWN.keys()), n=1)
            raise ArgumentError(f"{name}= is no argument of heal and no field of ChainDistillerConfig; {f'did you mean {near[0]}=?' if near else 'give such as max_steps=, learning_rate= or seed='}")
    if tokens is not None and "max_steps" in training:
        raise ArgumentError(f"tokens={tokens} came with max_steps={training['max_steps']}; give one of them")
    steps = training.get("max_steps", STEPS)
    check_counts(tokens=tokens, max_steps=steps, eval_steps=training.get("eval_steps"))
    block_size = {} if cache is None else {"block_size": cache.record.source.packing.block_size or max(len(cache.ids(0)), 2)}
    text = text_default(training)
    judged = not text or training.get("on_policy_fraction")  # on its own answers the teacher's word is what there is to learn
    learning = {**text, **({} if judged else {"kd_weight": LEARNING["kd_weight"]}), "learning_rate": _ADAPTER_RATE if adapter else LEARNING["learning_rate"]}
    always = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "restore_callback_states_from_checkpoint": True}
    try:
        args = ChainDistillerConfig("unused", **{**_DEFAULTS, **learning, **block_size, **training, **always, "eval_steps": 1, "save_steps": 1, "max_steps": steps})
    except ArgumentError:
        raise
    except (TypeError, ValueError, KeyError, ImportError, RuntimeError) as error:  # transformers' own
        raise ArgumentError(one_line(error)) from error
    if not (args.kd_weight or args.hidden_weight or args.teacher_answers):
        raise ArgumentError("kd_weight=0 leaves nothing to learn from the larger neighbour; give a small one such as 0.01, or train on the text alone with transformers' Trainer")
    if tokens is not None:
        args.max_steps = steps = -(-tokens // args.step_tokens)
    args.eval_steps = args.save_steps = training.get("eval_steps", -(-steps // _EVALUATIONS))
    if "logging_steps" not in training:
        args.logging_steps = min(10, steps)
    check_rate(args.learning_rate)
    with tempfile.TemporaryDirectory() as args.output_dir:
        check_optimiser(args)
    return args


@contextmanager
def _workplace(target: Path | None, asked: Mapping[str, Any], args: ChainDistillerConfig) -> Iterator[Path]:
    """Where checkpoints lie: a hidden folder beside the output, which outlives a run that was stopped; without an output one that does not.

    Raises:
        StorageError: If the output is in the way, another process writes it, or an unfinished run was asked for something else.
    """
    with ExitStack() as stack:
        places: list[Any] = [None]
        if args.process_index == 0:
            if target is None:
                places = [stack.enter_context(tempfile.TemporaryDirectory())]
            else:
                check_absent(target)
                stack.enter_context(disk_told(target))
                places = [str(target.absolute().parent / f".{target.absolute().name}.work")]
                stack.enter_context(held(Path(places[0]), str(target)))
                record = Path(places[0]) / "asked.json"
                if unfinished(record, asked, target) is None:
                    write_text(record, json.dumps({"asked": asked}, default=str))
        if args.world_size > 1:
            broadcast_object_list(places)
        yield Path(places[0])
        wait_for_everyone()
    if target is not None and args.process_index == 0:
        shutil.rmtree(places[0], ignore_errors=True)


def _result(healer: Healer, dtype: torch.dtype, merge: bool) -> Any:
    """The healed model in its own dtype, in eval mode."""
    model = healer.accelerator.unwrap_model(healer.model, keep_fp32_wrapper=False)
    if is_peft_model(model) and merge:
        model = model.merge_and_unload().requires_grad_(True)
    return cast_weights(model, dtype).eval()


def _save(model: Any, chain: Chain, made: Mapping[str, Any], target: Path) -> None:
    """Write the model, or the adapter with the config of what it belongs on, with the tokenizer of the nearer anchor."""
    adapter = is_peft_model(model)
    nearest = min(chain.neighbours(made["parameters"]), key=lambda anchor: abs(anchor.parameters - made["parameters"]))
    with staged_folder(target) as staging:
        if adapter:
            for config in model.peft_config.values():
                config.base_model_name_or_path = chain.files.name
        model.save_pretrained(staging, **({"save_embedding_layers": False} if adapter else {}))
        if adapter:
            model.config.save_pretrained(staging)
            (staging / "README.md").unlink(missing_ok=True)  # a form to fill in; `cbd push` writes the card
        for path in (chain.files.checked(nearest, name) for name in TOKENIZER_FILES if name in nearest.files):
            shutil.copyfile(path, staging / path.name)


def _way(peft_config: Any) -> str:
    """How the weights were moved."""
    if peft_config is None:
        return "full"
    kind = str(peft_config.peft_type.value).lower()
    return f"{kind}, rank {peft_config.r}" if hasattr(peft_config, "r") else kind


def _as_text(value: Any) -> Any:
    """What JSON has no word for: sets in one order, whatever the process, and the rest as text."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)
