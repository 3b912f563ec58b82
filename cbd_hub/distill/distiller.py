"""`ChainDistiller`: the HF Trainer with distillation, hidden-state and path training."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from cbd_hub.ancestry import Ancestry
from cbd_hub.distill.bridge_rows import COLUMNS
from cbd_hub.distill.config import ChainDistillerConfig
from cbd_hub.distill.evaluating import with_tokens
from cbd_hub.distill.hidden import Batch, HiddenTerm
from cbd_hub.distill.on_policy import SamplingTrainer, unpacked
from cbd_hub.distill.packing import CACHED, check_collator, collate, next_tokens
from cbd_hub.distill.path import path_plan, segment_to
from cbd_hub.distill.progress import MetricsFile
from cbd_hub.distill.saving import last_checkpoint
from cbd_hub.distill.teacher_cache import TeacherCache
from cbd_hub.distill.wiring import wired
from cbd_hub.distill.wrapping import (
    cast_weights,
    compile_base,
    inside,
    is_sharded,
    plain_model,
    prepare_teacher,
    shards,
    short_attention,
    sparse_rows,
    unadapted_on_failure,
    without_compiler,
)
from cbd_hub.errors import ArgumentError, DataError, TrainingError
from cbd_hub.hub import KEPT_FILE, resolve_checkpoint
from cbd_hub.interpolation.live import Between, ModelRunner, Output, frozen, router_loss
from cbd_hub.interpolation.plan import Kept, Plan
from cbd_hub.losses.head import Listed, distillation_loss


logger = logging.getLogger(__name__)

T = TypeVar("T")


class ChainDistiller(SamplingTrainer):
    """Distils a student from the anchor above it.

    The loss is ``kd_weight x divergence + ce_weight x cross-entropy + hidden_weight x hidden term``, each a sum over the kept tokens of
    the whole optimiser step divided by their number, so that accumulation and several processes change nothing. The student's logits are
    never formed whole.

    With ``path_fraction`` the student's place is taken in that share of the steps by a model in between student and teacher, built by the plan
    that `CBDModel.from_chain` uses where no mix has been fitted yet (that is done once the anchor has learned), at a size drawn anew each step from seed
    and step alone. For whole blocks this is module replacing (https://huggingface.co/papers/2002.02925).

    With ``on_policy_fraction``, ``objective="minillm"`` or ``teacher_answers`` the completions are the student's own, drawn from student and teacher, or the
    teacher's; `cbd_hub.distill.sampling.SamplingArguments` says how.

    Args:
        model: The student; with ``path_fraction`` a cut of the teacher.
        teacher: The model to learn from: same tokenizer. Frozen, in bf16 where ``bf16`` is set. With a teacher cache it is only compared with
            the cache's fingerprint and may be None.
        args: A `ChainDistillerConfig`.
        train_dataset: Rows with ``input_ids`` (and where wanted ``labels``, -100 for tokens that do not count), or with ``text``, ``prompt`` and
            ``completion``, or chat ``messages``, which are packed into blocks; of prompts and chats only the answers count.
        eval_dataset: The same for evaluation, several of them by name, or None.
        processing_class: The tokenizer; needed unless rows have ``input_ids``.
        kept: Which units of the teacher the student was cut from, or the folder or Hub id of what `cbd cut` wrote, which says it and whose word is saved with the student, for `assemble_chain`; needed for
            ``path_fraction``. Hidden states are matched by it, and evenly without.
        text_dataset: Text for MiniLLM's cross-entropy term, rows as ``train_dataset`` has them; with ``text_weight`` only.
        order: Layers of the teacher that the student lacks, in the order in which they come back; by default from the last one backwards.
        teacher_cache: A `TeacherCache`, its folder or its Hub id, as ``args.teacher_cache``: its blocks are the training data and its top tokens the
            teacher, which is not run. ``train_dataset`` may be left out; one that is given must be what the cache was made of.
        teacher_processing_class: The teacher's tokenizer, with ``args.bridge``: the teacher may then be of any architecture and vocabulary.
        peft_config: Train an adapter on the student instead of its weights; not on the output head, and not with ``path_fraction``.
        **kwargs: What ``transformers.Trainer`` takes.

    Raises:
        ArgumentError: If ``kept`` is missing where it is needed, a teacher where there is no cache, or a tokenizer with ``bridge``.
        DataError: If the teacher cache was made for another teacher, tokenizer, text or sequence packing.
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
        self, model: Any, teacher: Any = None, args: ChainDistillerConfig | None = None, train_dataset: Any = None, eval_dataset: Any = None,
        processing_class: Any = None, *, kept: Kept | str | os.PathLike[str] | None = None, order: Sequence[int] | None = None,
        teacher_cache: TeacherCache | str | os.PathLike[str] | None = None, peft_config: Any = None, text_dataset: Any = None, teacher_processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, ChainDistillerConfig):
            raise ArgumentError(f"args is a {type(args).__name__}; pass a ChainDistillerConfig")
        if not issubclass(type(model), torch.nn.Module):  # isinstance would have mypy know less of it further down
            raise ArgumentError(f"model is a {type(model).__name__}; pass a loaded student, such as one of AutoModelForCausalLM.from_pretrained")
        if hasattr(type(train_dataset), "__len__") and not len(train_dataset):
            raise DataError("train_dataset has no rows; give some")
        if isinstance(train_dataset, Mapping):
            raise ArgumentError(f"train_dataset has the splits {', '.join(train_dataset)}; pass one of them, such as train_dataset[\"{next(iter(train_dataset), 'train')}\"]")
        if isinstance(kept, (str, os.PathLike)):
            self.ancestry = Ancestry.read(resolve_checkpoint(kept))
            if self.ancestry is None:
                raise ArgumentError(f"{os.fspath(kept)} has no {KEPT_FILE}, so that nobody knows what it was cut from; name the folder that cbd cut wrote, or leave kept out")
            kept = self.ancestry.kept
        no_logits = "logits are never formed"
        for name, why in (
            ("compute_loss_func", "the loss is that of args (divergence, kd_weight, ce_weight, hidden_weight)"), ("compute_metrics", no_logits), ("preprocess_logits_for_metrics", no_logits),
            ("model_init", "model is the student"),
        ):
            if kwargs.get(name) is not None:
                raise ArgumentError(f"{name} would never be called: {why}; leave it out")
        with unadapted_on_failure(model) if peft_config is not None else nullcontext():
            wiring = wired(
                args, model, teacher, cache=teacher_cache, tokenizers=(processing_class, teacher_processing_class), train_dataset=train_dataset,
                eval_dataset=eval_dataset, kept=kept, peft_config=peft_config,
            )
            self.teacher_cache, self.bridge, self._student, self._vocab_size = wiring.cache, wiring.bridge, model, wiring.vocab_size
            student, model, teacher, kept = model, wiring.model, wiring.teacher, wiring.kept
            padded = functools.partial(collate, pad_token_id=getattr(processing_class, "pad_token_id", None) or 0)
            own_collator = kwargs.get("data_collator") is not None
            kwargs["data_collator"] = kwargs.get("data_collator") or (padded if self.bridge is None else self.bridge.rows.collate)
            rows = unpacked(wiring.train_dataset, processing_class, args)
            use_cache = getattr(student.config, "use_cache", None)
            try:
                super().__init__(
                    model=model, args=args,
                    train_dataset=self._set_up_sampling(args, teacher, *(with_tokens(found, processing_class, args, model) for found in (rows, text_dataset))),
                    eval_dataset=with_tokens(wiring.eval_dataset, processing_class, args, model), processing_class=processing_class, **kwargs,
                )
            finally:
                if use_cache is not None:
                    student.config.use_cache = use_cache  # the Trainer switches it off, for good; no pass of ours leaves it to the config
            if own_collator:
                check_collator(self._get_collator_with_removed_columns(self.data_collator), self.train_dataset)
            self.model_accepts_loss_kwargs = True  # so that the Trainer counts the kept tokens of the whole step
            self.add_callback(MetricsFile())
            self.kept = kept
            self.teacher = self._segment = self.hidden = self._neighbour = None
            if teacher is None:
                return
            teacher.requires_grad_(False).eval()
            self._segment = None if kept is None else segment_to(student, teacher, kept, order)
            self.hidden = HiddenTerm(student, teacher, kept, args) if args.hidden_weight else None
            if self.hidden is not None:
                self.add_callback(_Settle(self))
                if self.hidden.projectors and kwargs.get("optimizers", (None, None))[0] is not None:
                    raise ArgumentError(
                        "the optimizer of optimizers= does not hold the projectors between unlike hidden widths, which would not learn; "
                        "pass optimizer_cls_and_kwargs= instead, or set hidden_weight to 0"
                    )
            if args.path_fraction:
                if shards(self.accelerator) or is_sharded(student) or is_sharded(teacher):
                    raise ArgumentError("path_fraction reads whole parameters of student and teacher, which are sharded here; set it to 0, or train with DDP")
                if teacher.dtype != student.dtype and not args.bf16:
                    raise ArgumentError(
                        f"path_fraction mixes the teacher's weights, {teacher.dtype}, with the student's, {student.dtype}, in one model; load both in one dtype, or set bf16=True"
                    )
                teacher = teacher.to(args.device)
            if self.hidden is not None and self.hidden.projectors and (is_sharded(student) or self.is_deepspeed_enabled):
                raise ArgumentError("projectors between unlike hidden widths cannot be fitted on a student that is sharded already; set hidden_weight to 0")
            self._between = Between({"student": student, "teacher": teacher})
            self._neighbour = teacher if args.path_fraction else None
            if args.bf16 and teacher.dtype == torch.float32 and not is_sharded(teacher):
                # Autocast would cast the frozen weights anew at every step. The path needs the exact ones, and so may the caller.
                teacher = cast_weights(copy.deepcopy(teacher), torch.bfloat16)
            if args.torch_compile:
                for compiled in (student, teacher):
                    compile_base(compiled, args.torch_compile_backend, args.torch_compile_mode)
            self.teacher = prepare_teacher(self.accelerator, teacher)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "attention_mask", "position_ids", "labels", *CACHED, *COLUMNS]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches of an evaluation set, read by both tokenizers where the teacher has its own."""
        return super().get_eval_dataloader(eval_dataset if isinstance(eval_dataset, str) else self._read_by_both(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Batches of a set to predict, read likewise."""
        return super().get_test_dataloader(self._read_by_both(test_dataset))

    def _read_by_both(self, dataset: Any) -> Any:
        """Rows read by both tokenizers where the teacher has its own."""
        if self.bridge is None or self.args.bridge == "text":
            return dataset
        return self.bridge.rows.with_tokens(dataset, self._student, self.accelerator.unwrap_model(self.teacher))

    # -- the loss ------------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The loss of a batch, a sum over its kept tokens divided by ``num_items_in_batch``."""
        compute = self._policy_loss if "policy" in inputs else self._loss
        loss = self._beside_teacher(model, inputs, lambda student, target: compute(student, target, inputs, num_items_in_batch))
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {float(loss.detach())} at step {self.state.global_step} on the batch that begins with tokens {inputs['input_ids'][0][:8].tolist()}; "
                "lower learning_rate, or look at that text"
            )
        return (loss, {"loss": loss}) if return_outputs else loss

    def _beside_teacher(self, model: Any, inputs: dict[str, Any], compute: Callable[[Any, Output | None], T]) -> T:
        """What ``compute`` makes of the plain student and the teacher's output, run inside what distributes either; cached top tokens, its answers and cross-entropy alone need no teacher."""
        model = without_compiler(model)
        module = self.accelerator.unwrap_model(model)
        student = plain_model(module)
        untaught = not self.args.kd_weight and self.hidden is None
        if untaught or "top_ids" in inputs or "teacher_log_probs" in inputs or self.args.bridge == "text":
            with self.accelerator.autocast():
                return inside(model, module, lambda: compute(student, None), frozen=not torch.is_grad_enabled())
        if self.teacher is None:
            raise ArgumentError("these rows have no top tokens and there is no teacher to run on them; evaluate on a TeacherCache")
        teacher = self.accelerator.unwrap_model(self.teacher)
        grad = torch.is_grad_enabled()
        found: list[T] = []

        @torch.no_grad()
        def run() -> None:  # no tensor comes back from it, so that FSDP2 waits for no backward pass of the teacher
            target = ModelRunner(teacher)(*_batch(inputs, "teacher_" if "teacher_input_ids" in inputs else ""), states=self.hidden is not None)
            with torch.set_grad_enabled(grad):
                found.append(inside(model, module, lambda: compute(student, target), frozen=not grad))

        with self.accelerator.autocast():
            inside(self.teacher, teacher, run, frozen=True)
        return found[0]

    def _loss(self, student: Any, target: Output | None, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        args: ChainDistillerConfig = self.args
        labels = next_tokens(inputs)
        keep = labels != -100
        training = student.training
        plan = self._path_plan() if training else None
        hidden = self.hidden if plan is None and self.hidden is not None and not self.hidden.begins else None
        if num_items is None:
            num_items = keep.sum().clamp(min=1)
        runner = ModelRunner(student) if plan is None else self._between.run(plan)
        whole_head = training and plan is None and self.bridge is None and not args.torch_compile and bool(args.kd_weight or args.ce_weight)
        with sparse_rows(student) if whole_head else nullcontext():
            output = runner(*_batch(inputs), states=hidden is not None)
        loss = self._head_loss(output, target, labels, num_items, 0.0 if "own" in inputs else args.ce_weight, inputs)
        if hidden is not None and target is not None:
            matched: tuple[Output, Output, Tensor] = (output, target, keep) if self.bridge is None else self.bridge.at_borders(output, target, inputs)
            term = hidden.loss(*matched, num_items=num_items)
            if training:
                hidden.note(loss, term)
            loss = loss + (hidden.scale if training else hidden.first_scale) * term
        elif training and self.hidden is not None and self.hidden.projectors:
            loss = loss + self.hidden.untouched()
        if output.router_logits is not None and training:
            loss = loss + router_loss(student, output.router_logits, inputs.get("attention_mask")) * keep.sum() / num_items
        if training and args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            loss = loss * self.accelerator.num_processes  # the count is of all processes, and their gradients are averaged
        return loss

    def _head_loss(
        self, output: Output, target: Output | None, labels: Tensor, num_items: Tensor | int, ce_weight: float, inputs: Mapping[str, Any]
    ) -> Tensor:
        args: ChainDistillerConfig = self.args
        ours = output.head
        if not (args.kd_weight or ce_weight):
            return output.hidden.new_zeros(())  # the hidden-state term is all
        bridged = None
        if self.bridge is not None and (target is not None or "teacher_log_probs" in inputs):
            bridged = args.kd_weight * self.bridge.loss(output, target, inputs, num_items) if args.kd_weight else None
            if bridged is not None and not ce_weight:
                return bridged
            target = None
        top = Listed(*(inputs[name].flatten(0, 1) for name in CACHED if name in inputs)) if "top_ids" in inputs else None
        theirs = {} if target is None else target.head.options("teacher_")
        loss = distillation_loss(
            output.hidden.flatten(0, 1), ours.weight, None if target is None else target.hidden.flatten(0, 1),
            None if target is None else target.head.weight, labels.flatten(), teacher_top=top, divergence=args.divergence,
            temperature=args.temperature, beta=args.beta, skew=args.skew, kd_weight=args.kd_weight if self.bridge is None else 0.0,
            ce_weight=ce_weight, num_items=num_items, vocab_size=self._vocab_size,
            **ours.options("student_"), **theirs,
        )
        return loss if bridged is None else loss + bridged

    # -- the hidden term -----------------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate, with the hidden-state term also before training, for which it takes its start now."""
        if self.hidden is not None and self.hidden.begins and self.train_dataset is not None:
            self._draw_answers()
            self._start_hidden()
        return super().evaluation_loop(*args, **kwargs)

    def _start_hidden(self) -> None:
        """Closed-form start of projectors and balance, on the first rows of the training text: the same on every process."""
        assert self.hidden is not None

        def batches() -> Iterator[Batch]:
            rows, batched = iter(self.train_dataset), self._get_collator_with_removed_columns(self.data_collator)
            while taken := list(itertools.islice(rows, self.args.train_batch_size)):
                inputs = self._prepare_input(dict(batched(taken)))
                labels = next_tokens(inputs)

                def batch(student: Any, target: Output | None, inputs: dict[str, Any] = inputs, labels: Tensor = labels) -> Batch:
                    assert target is not None
                    output = ModelRunner(student)(*_batch(inputs), states=True)
                    other = self._head_loss(output, target, labels, 1, self.args.ce_weight, inputs)
                    return (output, target, labels != -100, other) if self.bridge is None else (*self.bridge.at_borders(output, target, inputs), other)

                yield self._beside_teacher(self.model, inputs, batch)

        if not is_sharded(self.model):
            self.model.to(self.args.device)  # where the Trainer moves it only with training's first step, as it does under FSDP
            for projector in self.hidden.projectors:  # which are not attached yet
                projector.to(self.args.device)
        with frozen(self.model):
            self.hidden.start(batches)

    def save_beside(self, folder: Path) -> None:
        """Write the hidden-state term's own tensors beside a checkpoint."""
        super().save_beside(folder)
        if self.hidden is not None:
            self.hidden.save(folder, self.args.should_save)

    def load_beside(self, folder: Path) -> None:
        """Read them again."""
        super().load_beside(folder)
        if self.hidden is not None:
            self.hidden.load(folder)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.hidden is not None and self.state.best_model_checkpoint is not None:
            self.hidden.load(Path(self.state.best_model_checkpoint))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the hidden-state term beside the loss."""
        if self.hidden is not None and "loss" in logs:
            logs = {**logs, **self.hidden.logs()}
        super().log(logs, start_time)

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

    def train(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as ``transformers.Trainer.train``; a checkpoint of the last step is loaded and no step is taken from it."""
        if isinstance(resume_from_checkpoint, os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                logger.warning("%s has no whole checkpoint to go on from; training starts anew", self.args.output_dir)
        last = resume_from_checkpoint
        if isinstance(last, str):
            if not os.path.isfile(os.path.join(last, TRAINER_STATE_NAME)):
                raise ArgumentError(f"resume_from_checkpoint={last!r} is no checkpoint of a trainer; name a folder such as {self.args.output_dir}/checkpoint-100, or give True for the last one")
            state = TrainerState.load_from_json(os.path.join(last, TRAINER_STATE_NAME))
            if 0 < self.args.max_steps <= state.global_step:  # the Trainer would take one step too many
                self._load_from_checkpoint(last)
                self.state = state
                if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                    self._load_best_model()
                return TrainOutput(state.global_step, 0.0, {})
        student = plain_model(self.model)
        with short_attention(self.args, self.train_dataset, student, self.teacher, self._neighbour):
            if self.hidden is None:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            if not isinstance(last, str):
                self._draw_answers()
                self._start_hidden()
            self.hidden.attach(student)
            try:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self.hidden.detach(student)


class _Settle(TrainerCallback):
    """Tells the hidden-state term that an optimiser step is over."""

    def __init__(self, trainer: ChainDistiller) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Settle the balance."""
        assert self._trainer.hidden is not None
        kind = "sum" if args.average_tokens_across_devices else "mean"
        self._trainer.hidden.settle(lambda terms: self._trainer.accelerator.reduce(terms, kind))


def _batch(inputs: Mapping[str, Any], whose: str = "") -> tuple[Tensor, Tensor | None, Tensor | None]:
    return inputs[f"{whose}input_ids"], inputs.get(f"{whose}attention_mask"), inputs.get(f"{whose}position_ids")
