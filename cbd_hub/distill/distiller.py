"""`ChainDistiller`: the HF Trainer with distillation, hidden-state and path training."""

from __future__ import annotations

import copy
import functools
import logging
import os
import random
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from transformers.utils import is_peft_available

from cbd_hub.distill.config import ChainDistillerConfig
from cbd_hub.distill.packing import collate, packed_dataset
from cbd_hub.distill.progress import MetricsFile
from cbd_hub.distill.saving import AnchorTrainer
from cbd_hub.errors import ArchitectureError, ArgumentError, DataError, TrainingError, VocabularyMismatchError
from cbd_hub.families import family_of
from cbd_hub.interpolation.live import Between, ModelRunner, Output
from cbd_hub.interpolation.planner import Kept, Plan, Segment, blend_plan, patch_plan, road_at, shape_at
from cbd_hub.losses.head import distillation_loss
from cbd_hub.losses.hidden import hidden_loss
from cbd_hub.manifest import Shape
from cbd_hub.shapes import shape_of


logger = logging.getLogger(__name__)


class ChainDistiller(AnchorTrainer):
    """Distils a student from the anchor above it.

    The loss is ``kd_weight x divergence + ce_weight x cross-entropy + hidden_weight x hidden term``, each a sum over the kept tokens of
    the whole optimiser step divided by their number, so that accumulation and several processes change nothing. The student's logits are
    never formed whole.

    With ``path_fraction`` the student's place is taken in that share of the steps by a model in between student and teacher, built by the plan
    that `CBDModel.from_chain` uses, at a size drawn anew each step from seed and step alone. For whole blocks this is module replacing
    (https://huggingface.co/papers/2002.02925).

    Args:
        model: The student; with ``path_fraction`` or ``hidden_weight`` a cut of the teacher.
        teacher: The model to learn from: same tokenizer. Frozen, in bf16 where ``bf16`` is set.
        args: A `ChainDistillerConfig`.
        train_dataset: Rows with ``input_ids`` (and where wanted ``labels``, -100 for tokens that do not count), or with ``text``, ``prompt`` and
            ``completion``, or chat ``messages``, which are packed into blocks; of prompts and chats only the answers count.
        eval_dataset: The same for evaluation, or None.
        processing_class: The tokenizer; needed unless rows have ``input_ids``.
        kept: Which units of the teacher the student was cut from; needed for ``path_fraction`` and ``hidden_weight``.
        order: Layers of the teacher that the student lacks, in the order in which they come back; by default from the last one backwards.
        peft_config: Train an adapter on the student instead of its weights; not on the output head, and not with ``path_fraction``.
        **kwargs: What ``transformers.Trainer`` takes.

    Raises:
        ArgumentError: If ``kept`` is missing where it is needed.
        ArchitectureError: If student and teacher have no common axis table where one is needed.
        VocabularyMismatchError: If the vocabularies differ.

    Example:
        >>> trainer = ChainDistiller(model=student, teacher=teacher, args=ChainDistillerConfig("out", max_steps=100),
        ...                          train_dataset=dataset, processing_class=tokenizer)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    # The loss is a sum over the whole accumulated batch's tokens already divided by their number.
    loss_is_scaled_for_ga = True

    def __init__(
        self, model: Any, teacher: Any, args: ChainDistillerConfig, train_dataset: Any = None, eval_dataset: Any = None,
        processing_class: Any = None, *, kept: Kept | None = None, order: Sequence[int] | None = None, peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, ChainDistillerConfig):
            raise ArgumentError(f"args is a {type(args).__name__}; pass a ChainDistillerConfig")
        if not isinstance(teacher, torch.nn.Module):
            raise ArgumentError(f"teacher is a {type(teacher).__name__}; pass a loaded model")
        self._vocab_size = _shared_vocabulary(model, teacher, processing_class)
        if kept is None and (args.path_fraction or args.hidden_weight):
            raise ArgumentError("path_fraction and hidden_weight need kept=, the map from the student's layers and neurons to the teacher's")
        student = model
        if peft_config is not None:
            model = _with_adapter(model, peft_config, args)
        kwargs.setdefault("data_collator", functools.partial(collate, pad_token_id=getattr(processing_class, "pad_token_id", None) or 0))
        super().__init__(
            model=model, args=args, train_dataset=_tokenised(train_dataset, processing_class, args),
            eval_dataset=_tokenised(eval_dataset, processing_class, args), processing_class=processing_class, **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts the kept tokens of the whole step
        teacher.requires_grad_(False).eval()
        self.add_callback(MetricsFile())
        self.kept = kept
        self._segment = None if kept is None else _segment(student, teacher, kept, order)
        if args.path_fraction:
            teacher = teacher.to(args.device)
        self._between = Between({"student": student, "teacher": teacher})
        if args.bf16 and teacher.dtype == torch.float32:
            # Autocast would cast the frozen weights anew at every step. The path needs the exact ones, and so may the caller.
            teacher = copy.deepcopy(teacher).to(torch.bfloat16)
        self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "attention_mask", "position_ids", "labels"]

    # -- the loss ------------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The loss of a batch, a sum over its kept tokens divided by ``num_items_in_batch``."""
        module = self.accelerator.unwrap_model(model)
        student = module.get_base_model() if is_peft_model(module) else module
        loss = self._through(model, module, lambda: self._loss(student, inputs, num_items_in_batch))
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {float(loss.detach())} at step {self.state.global_step} on the batch that begins with tokens {inputs['input_ids'][0][:8].tolist()}; "
                "lower learning_rate, or look at that text"
            )
        return (loss, {"loss": loss}) if return_outputs else loss

    @staticmethod
    def _through(wrapper: Any, module: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Run ``compute`` inside the forward pass of a distributed wrapper, which then sees every gradient."""
        if wrapper is module:
            return compute()
        original = module.forward

        def forward(*_: Any, **__: Any) -> Tensor:
            module.forward = original
            return compute()

        module.forward = forward
        try:
            return wrapper()
        finally:
            module.forward = original

    def _loss(self, student: Any, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        args: ChainDistillerConfig = self.args
        batch = (inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids"))
        labels = inputs["labels"]
        shifted = torch.full_like(labels, -100)
        shifted[:, :-1] = labels[:, 1:]
        keep = shifted != -100
        training = student.training
        plan = self._path_plan() if training else None
        want_states = bool(args.hidden_weight) and plan is None
        with self.accelerator.autocast():
            with torch.no_grad():
                target = ModelRunner(self.teacher)(*batch, states=want_states)
            output = (ModelRunner(student) if plan is None else self._between.run(plan))(*batch, states=want_states)
            if num_items is None:
                num_items = keep.sum().clamp(min=1)
            loss = self._head_loss(output, target, shifted, num_items)
            if want_states:
                hidden = hidden_loss(*self._mapped(output, target), keep, kind=args.hidden_loss, num_items=num_items)
                loss = loss + args.hidden_weight * hidden
        if training and self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            loss = loss * self.accelerator.num_processes  # the count is of all processes, and their gradients are averaged
        return loss

    def _head_loss(self, output: Output, target: Output, labels: Tensor, num_items: Tensor | int) -> Tensor:
        args: ChainDistillerConfig = self.args
        ours, theirs = output.head, target.head
        return distillation_loss(
            output.hidden.flatten(0, 1), ours.weight, target.hidden.flatten(0, 1), theirs.weight, labels.flatten(),
            divergence=args.divergence, temperature=args.temperature, beta=args.beta, skew=args.skew, kd_weight=args.kd_weight,
            ce_weight=args.ce_weight, num_items=num_items, student_bias=ours.bias, teacher_bias=theirs.bias,
            student_logit_scale=ours.logit_scale, teacher_logit_scale=theirs.logit_scale, student_softcap=ours.softcap,
            teacher_softcap=theirs.softcap, vocab_size=self._vocab_size,
        )

    def _mapped(self, output: Output, target: Output) -> tuple[list[Tensor], list[Tensor]]:
        """The student's states and the teacher's states they are to match: those at the end of the block each layer stands for."""
        assert self.kept is not None
        assert output.states is not None
        assert target.states is not None
        ends = [int(layer) - 1 for layer in self.kept.layers[1:]] + [len(target.states) - 1]
        return list(output.states), [target.states[end] for end in ends]

    # -- the path ------------------------------------------------------------------------------------------------------------

    def _path_plan(self) -> Plan | None:
        """The plan of this step's in-between model, or None for the student itself: a function of seed and step."""
        if self._segment is None or not self.args.path_fraction:
            return None
        draw = random.Random(f"{self.args.seed} {self.state.global_step}")
        if draw.random() >= self.args.path_fraction:
            return None
        low, high = self._segment.sizes
        return path_plan(self._segment, round(low + draw.random() * (high - low)))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as ``transformers.Trainer.train``; a checkpoint of the last step is loaded and no step is taken from it."""
        last = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if isinstance(last, str):
            state = TrainerState.load_from_json(os.path.join(last, TRAINER_STATE_NAME))
            if state.global_step >= (self.args.max_steps if self.args.max_steps > 0 else state.max_steps):  # the Trainer would take one step too many
                self._load_from_checkpoint(last)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)


def path_plan(segment: Segment, size: int) -> Plan:
    """The plan of an in-between model as path training uses it: a patch where only layers differ, else the blend at its road."""
    point = road_at(segment, size)
    shape = shape_at(segment, point)
    if segment.patch:
        return patch_plan(segment, shape)
    return blend_plan(segment, shape, point)


def _segment(student: Any, teacher: Any, kept: Kept, order: Sequence[int] | None) -> Segment:
    if family_of(student.config) is not family_of(teacher.config):
        raise ArchitectureError(f"the student is a {student.config.model_type} and the teacher a {teacher.config.model_type}; kept= joins one architecture only")
    small, large = shape_of(student.config), shape_of(teacher.config)
    kept.check(small, large)
    differs = [name for name in Shape.model_fields if getattr(small, name) != getattr(large, name)]
    return Segment(
        "student", "teacher", small, large, kept, list(order) if order is not None else kept.dropped[::-1], teacher.config,
        patch=differs == ["layers"],
    )


def is_peft_model(model: Any) -> bool:
    """Whether a model is wrapped by peft."""
    return is_peft_available() and isinstance(model, import_module("peft").PeftModel)


def _with_adapter(model: Any, peft_config: Any, args: ChainDistillerConfig) -> Any:
    """The student with a fresh adapter.

    Raises:
        ArgumentError: If peft is not there, or the adapter cannot be trained by this loss.
    """
    if not is_peft_available():
        raise ArgumentError("peft_config needs peft; run `pip install peft`")
    peft = import_module("peft")
    if is_peft_model(model):
        raise ArgumentError("the student already has an adapter; pass the plain model with peft_config, or the adapted one without")
    if args.path_fraction:
        raise ArgumentError("path_fraction trains the student's own weights and cannot be combined with peft_config; choose one")
    if peft_config.is_prompt_learning:
        raise ArgumentError("prompt learning changes the sequence, which this loss cannot follow; use LoRA")
    adapted = peft.get_peft_model(model, peft_config)
    if type(adapted.get_base_model().get_output_embeddings()) is not torch.nn.Linear:
        raise ArgumentError("the adapter is on the output head, which the loss reads as a plain matrix; leave lm_head out of target_modules")
    if args.gradient_checkpointing or getattr(args, "activation_checkpointing", False):  # the newer name, transformers 5.23
        adapted.enable_input_require_grads()
    return adapted


def _shared_vocabulary(student: Any, teacher: Any, tokenizer: Any) -> int | None:
    """Rows of both heads that are real tokens, where they are padded to different lengths; None where they agree."""
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    if ours == theirs:
        return None
    real = None if tokenizer is None else len(tokenizer)
    if real is None or real > min(ours, theirs):
        raise VocabularyMismatchError(
            f"the student has a vocabulary of {ours:,} and the teacher of {theirs:,}"
            + ("; pass their tokenizer as processing_class if one is only padded" if real is None else f", but the tokenizer has {real:,} tokens")
            + ". Distillation on logits needs one vocabulary; models of different ones need a bridge"
        )
    logger.info("heads of %d and %d rows are padded; the loss uses the tokenizer's %d tokens", ours, theirs, real)
    return real


def _tokenised(dataset: Any, tokenizer: Any, args: ChainDistillerConfig) -> Any:
    """A data set with input_ids: the given one, or its rows tokenised and packed."""
    first = None if dataset is None else next(iter(dataset), None)
    if first is None or "input_ids" in first:
        return dataset
    if tokenizer is None:
        raise DataError(f"the data set has the columns {', '.join(first)} but no tokenizer came; pass processing_class=")
    return packed_dataset(dataset, tokenizer, args.block_size)
