"""What a recipe would cost: tokens, memory and time of each stage, measured on a few layers and reckoned up."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import set_seed

from cbd_hub import shapes
from cbd_hub.configs import read_config
from cbd_hub.cut import mixes
from cbd_hub.distill.cache_writing import write_cache
from cbd_hub.distill.checks import check_stages
from cbd_hub.distill.data import Parts
from cbd_hub.distill.distiller import ChainDistiller
from cbd_hub.distill.growing import Finished, made_by
from cbd_hub.distill.schema import Recipe
from cbd_hub.distill.stages import (
    CALIBRATION_TOKENS,
    Stage,
    calibrations,
    plan_stages,
    read_parts,
    stage_rows,
    stage_tokenizers,
    teacher_folder,
)
from cbd_hub.distill.teacher_cache import TeacherCache
from cbd_hub.distill.wrapping import short_attention
from cbd_hub.evaluation import Documents, document_losses
from cbd_hub.interpolation.live import ModelRunner, frozen
from cbd_hub.losses.blocks import block_bytes
from cbd_hub.manifest import Shape
from cbd_hub.measure import ORDER_TOKENS, ORDER_TRIALS, SHARES
from cbd_hub.precision import best_device
from cbd_hub.reporting import Progress
from cbd_hub.weights import load_tokenizer, model_class


if TYPE_CHECKING:
    from cbd_hub.chain import Chain


_DEEP = 5  # layers of the deeper trial
_REPEATS = 5
_NARROW = 256  # tokens of the vocabulary where layers are timed: a whole head would hide them
_SAMPLE = 2**24  # numbers written to see how fast checkpoints are
_ROAD = 11  # trials at each of the sizes where a segment is measured, about
# What a trial leaves out: it has other layers than the teacher, and no text or prompts.
_PLAIN = {
    "path_fraction": 0.0, "hidden_weight": 0.0, "hidden_balance": False, "hidden_layers": None, "on_policy_fraction": 0.0, "objective": "divergence",
    "teacher_answers": False, "bridge": None, "text_weight": 0.0, "disable_tqdm": True, "save_strategy": "no", "report_to": "none", "push_to_hub": False,
}


@dataclass(frozen=True)
class StageCost:
    """What a stage would take on this machine.

    Attributes:
        anchor: The anchor's name.
        shape: Its shape; where the recipe gives a size, a likely one, since the cut is chosen by measuring.
        size: Its parameters.
        steps: Optimiser steps.
        tokens: Tokens of all steps, at most.
        memory: Peak bytes: weights, gradients and optimiser state of the student, the teacher, activations and the loss head.
        training: Seconds of all steps, with clipping, optimiser and checkpoints.
        measuring: Seconds of cutting, evaluating, and of the order, road and curve of the segment above.
    """

    anchor: str
    shape: Shape
    size: int
    steps: int
    tokens: int
    memory: int
    training: float
    measuring: float

    @property
    def seconds(self) -> float:
        """All of the stage."""
        return self.training + self.measuring


def dry_run(recipe: Recipe, progress: Progress | None = None, *, parts: Parts | None = None, chain: Chain | None = None) -> list[StageCost]:
    """Estimate every stage of a recipe without training.

    A step of the stage's own kind and batch is timed with models of its width, random weights and one or five layers, on this machine; time
    and activations grow linearly in layers from there, and so do the forward passes by which a cut is chosen and a segment measured. Steps on the path,
    the hidden-state term, a bridge's second tokenisation and generation are not counted.

    Args:
        recipe: The recipe.
        progress: Called with a line before each trial.
        parts: The recipe's documents, where they have been read already.
        chain: A finished chain that the recipe is to make longer: only what is new is reckoned.

    Raises:
        CBDError: If the recipe cannot be carried out.
    """
    if chain is not None and made_by(chain, recipe):
        return []
    finished = None if chain is None else Finished(chain, recipe)
    source, *made = [teacher_folder(recipe)] if finished is None else finished.folders
    config = read_config(source)
    stages = plan_stages(recipe, source, config, made)
    split, tokenizers = read_parts(recipe) if parts is None else parts, stage_tokenizers(stages, load_tokenizer(source))
    calibrations(recipe, split, tokenizers)
    if finished is not None:
        stages, tokenizers, config = stages[finished.stages :], tokenizers[finished.stages :], finished.config
    check_stages(recipe, stages, config, {stage.name: stage_rows(recipe, stage.anchor, split) for stage in stages}, tokenizers)
    costs = []
    for stage in stages:
        if progress is not None:
            progress(f"{stage.name}: timing steps on a few layers")
        own = base = stage.base(config)
        if stage.checkpoint is None:
            assert stage.size is not None
            own = shapes.config_for(stage.shape or likely_shape(stage.size, own), own)
        costs.append(_cost(stage, own, config, base))
        config = own
    return costs


def likely_shape(size: int, config: Any) -> Shape:
    """A cut to a size that takes from depth and FFN width alike.

    Args:
        size: Parameters wanted.
        config: Config of the anchor above.
    """
    whole = shapes.shape_of(config)
    found = []
    for layers in range(1, whole.layers + 1):
        shape = whole.model_copy(update={"layers": layers})
        width = min(shapes.fill_ffn(size, shape, config), whole.ffn)
        shape = shape.model_copy(update={"ffn": width})
        found.append((abs(shapes.count(shape, config) - size) > 0.005 * size, abs(layers / whole.layers - width / whole.ffn), layers, shape))
    return min(found, key=lambda entry: entry[:3])[-1]


def _cost(stage: Stage, student: Any, teacher: Any, base: Any) -> StageCost:
    layers, above = shapes.shape_of(student).layers, shapes.shape_of(teacher).layers
    if stage.bridged:  # timed in one vocabulary, with as many tokens on both sides
        teacher = _with_vocabulary(teacher, student.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        args = stage.config(folder)
    plain = dataclasses.replace(stage, arguments={**stage.arguments, **_PLAIN})
    if not (plain.arguments.get("kd_weight", 1.0) or plain.arguments.get("ce_weight", 0.0)):
        plain.arguments["kd_weight"] = 1.0  # the hidden-state term, which a trial leaves out, is all
    cached = args.teacher_cache is not None
    whole = _trial(plain, student, teacher, 1, 1)
    low, high = (_with_vocabulary(config, min(_NARROW, student.vocab_size)) for config in (student, teacher))
    deep, tall = min(_DEEP, layers), min(_DEEP, above)
    one = _trial(plain, low, high, 1, 1)
    ours = one if deep == 1 else _trial(plain, low, high, deep, 1)
    theirs = one if tall == 1 else _trial(plain, low, high, 1, tall)

    def rise(further: float, first: float, extra: int, depth: int) -> float:
        return max(further - first, 0.0) * extra / max(depth - 1, 1)

    step = whole.step + rise(ours.step, one.step, layers - 1, deep) + (0.0 if cached else rise(theirs.step, one.step, above - 1, tall))
    saved = whole.saved + (ours.saved - one.saved) * (layers - 1) // max(deep - 1, 1)
    forward = whole.forward + rise(theirs.forward, one.forward, above - 1, tall)  # of the teacher, in seconds a token
    size, taught = shapes.parameter_count(student), shapes.parameter_count(teacher)
    weights = 8 * size + round(whole.moments * size)  # fp32 weights and gradients, and the optimiser's state
    if not cached:
        weights += (6 if args.bf16 else 4) * taught  # also in bf16
    elif not torch.accelerator.is_available():
        weights += 4 * taught  # it waits in this memory for the segment's measuring
    tokens = args.train_batch_size * args.gradient_accumulation_steps * args.block_size
    every = math.ceil(args.max_steps * args.save_steps) if args.save_steps < 1 else int(args.save_steps)
    saves = 0 if args.save_strategy == "no" else -(-args.max_steps // every)
    writing = (3 * saves + 1) * size / _written_a_second()
    measuring = forward * _tokens_measured(stage, student, teacher, base)
    return StageCost(stage.name, shapes.shape_of(student), size, args.max_steps, tokens * args.max_steps, weights + saved, step * args.max_steps + writing, measuring)


def _with_vocabulary(config: Any, size: int) -> Any:
    """A config of a vocabulary without special tokens."""
    config = copy.deepcopy(config)
    config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = size, None, None, None
    return config


def _tokens_measured(stage: Stage, student: Any, teacher: Any, base: Any) -> int:
    """Tokens of all forward passes that choose a cut and measure what is above the anchor, the teacher's counted whole and those of smaller models as much smaller."""
    share = shapes.parameter_count(student) / shapes.parameter_count(teacher)
    passes = 1.0 + share  # importance, and the anchor's loss
    if stage.checkpoint is None:
        passes += share * (1 if stage.shape is not None else len(mixes(stage.size or 0, base)) + 2)
    if stage.bridged:
        return round(CALIBRATION_TOKENS * passes)
    middle = (1 + share) / 2
    passes += 1 + share + middle * len(SHARES) * (_ROAD + 1)
    dropped = shapes.shape_of(teacher).layers - shapes.shape_of(student).layers
    trials = 0 if dropped < 2 else min(2**dropped - 2, ORDER_TRIALS)
    return round(CALIBRATION_TOKENS * passes + ORDER_TOKENS * (1 + trials * middle))


def _written_a_second() -> float:
    """Numbers of fp32 that a checkpoint's files take in a second."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        torch.save(torch.zeros(_SAMPLE), f"{folder}/sample")
        return _SAMPLE / (time.perf_counter() - began)


@dataclass(frozen=True)
class _Trial:
    """What a few steps showed.

    Attributes:
        step: Seconds of an optimiser step.
        saved: Bytes kept for the backward pass of a micro-batch, with the loss head's blocks.
        moments: Bytes of the optimiser's state for each parameter: 8 for AdamW.
        forward: Seconds of the teacher's forward pass for each token.
    """

    step: float
    saved: int
    moments: float
    forward: float


def _trial(stage: Stage, student: Any, teacher: Any, layers: int, above: int) -> _Trial:
    """A few steps with models of a few layers."""
    set_seed(0)
    models = []
    for config, depth in ((student, layers), (teacher, above)):
        small = shapes.config_for(shapes.shape_of(config).model_copy(update={"layers": depth}), config)
        models.append(model_class(small, "the recipe")(small).to(best_device()))
    with tempfile.TemporaryDirectory() as folder:
        args = stage.config(folder)
        rows = torch.randint(0, student.vocab_size, (args.train_batch_size, args.block_size)).tolist()
        dataset: Any = Dataset.from_list([{"input_ids": row} for row in rows])
        if args.teacher_cache is not None:  # one of the same width, of this teacher's
            top_k = min(TeacherCache.open(args.teacher_cache).codec.top_k, student.vocab_size - 1)
            dataset = write_cache(models[1], dataset, f"{folder}/cache", top_k=top_k)
        trainer = ChainDistiller(model=models[0], teacher=models[1], args=args, train_dataset=dataset)
        if args.gradient_checkpointing or getattr(args, "activation_checkpointing", False):
            models[0].gradient_checkpointing_enable()
        trainer.create_optimizer()
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index] for index in range(len(rows))]))
        items = torch.tensor(batch["input_ids"].numel() * args.gradient_accumulation_steps, device=args.device)
        models[0].train()

        def step(parts: int = args.gradient_accumulation_steps) -> None:
            for _ in range(parts):
                trainer.compute_loss(models[0], batch, num_items_in_batch=items).backward()
            if args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(models[0].parameters(), args.max_grad_norm)
            assert trainer.optimizer is not None
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        def forward() -> None:
            document_losses(ModelRunner(models[1]), documents)

        documents = Documents(tuple(torch.tensor(row) for row in rows), (1,) * len(rows))
        kept: dict[int, int] = {}
        own = {parameter.untyped_storage().data_ptr() for model in models for parameter in model.parameters()}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with short_attention(args, *models):  # as training has it
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                step(1)
            seconds = _seconds(step)
        with frozen(models[1]):
            ahead = _seconds(forward)
    blocks = block_bytes(student.vocab_size, models[0].device, torch.bfloat16 if args.bf16 else torch.float32)
    assert trainer.optimizer is not None
    state = sum(part.nbytes for entry in trainer.optimizer.state.values() for part in entry.values() if isinstance(part, torch.Tensor) and part.dim())
    return _Trial(seconds, sum(kept.values()) + blocks, state / shapes.parameter_count(models[0].config), ahead / batch["input_ids"].numel())


def _seconds(act: Callable[[], None]) -> float:
    """Seconds that something takes: the median of a few times."""
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        act()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
