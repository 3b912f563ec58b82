"""The part of the trainer that samples: before each optimiser step its batches are replaced by responses of the student, of a mixture, or of the teacher."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput

from cbd_hub.distill.answers import teacher_answers
from cbd_hub.distill.config import ChainDistillerConfig
from cbd_hub.distill.evaluating import EvaluatingTrainer, with_tokens
from cbd_hub.distill.packing import collate, next_tokens, tokenised
from cbd_hub.distill.rollouts import (
    Prompt,
    Rollout,
    Sampling,
    batch_prompts,
    end_tokens,
    fitting,
    generate,
    positions_of,
    prompts_of,
    rollout_tensors,
    rollouts_from,
)
from cbd_hub.distill.rows import first_row, with_answer
from cbd_hub.errors import ArgumentError, DataError, StorageError
from cbd_hub.evaluation import IGNORED
from cbd_hub.interpolation.live import ModelRunner, Output
from cbd_hub.losses.head import distillation_loss
from cbd_hub.losses.policy import length_normalised, minillm_loss, rewards_to_go


logger = logging.getLogger(__name__)

ROLLOUTS = "rollouts.safetensors"


class Ticks(TorchDataset[dict[str, list[int]]]):
    """Rows that say nothing: they give MiniLLM's steps their number, and the sampled responses take their place."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [0], "labels": [0]}


def endless(count: int, start: int, stop: int, *key: int) -> list[int]:
    """Places start to stop of an endless order of ``count`` rows: shuffled anew each time round, a function of the key alone."""
    rounds = {turn: np.random.default_rng([*key, turn]).permutation(count) for turn in range(start // count, -(-stop // count))}
    return [int(rounds[place // count][place % count]) for place in range(start, stop)]


class SamplingTrainer(EvaluatingTrainer):
    """A Trainer whose tokens may come from the student, the teacher or both.

    All draws are functions of the seed, the optimiser step and the row's place in the step's whole batch: accumulation and the number of processes
    change nothing, and a run that was stopped draws the same again. MiniLLM's responses of a rollout batch outlive the student that gave them, so they
    are saved in each checkpoint that is taken while they are in use.
    """

    train_dataset: Any
    bridge: Any = None
    _student: Any
    _vocab_size: int | None
    _positions: int | None = None  # most tokens that both models can read, or one where the other never reads the same row
    _prompts: Sequence[Prompt] = ()
    _text: Any = None
    _rollouts: tuple[int, list[Rollout]] | None = None  # of which rollout batch, and its responses
    _answered = False

    # -- data ----------------------------------------------------------------------------------------------------------------

    def _set_up_sampling(self, args: ChainDistillerConfig, teacher: Any, dataset: Any, text: Any) -> Any:
        """The data set that the Trainer is to walk; MiniLLM's prompts and text are kept aside.

        A response ends where the models have no position left, and the log says so.

        Raises:
            ArgumentError: If the arguments do not go with each other or with the data.
            DataError: If the data is a stream where it cannot be, or has no prompt.
        """
        check_sources(args, dataset, text)
        if teacher is not None:
            self._positions = positions_of(teacher) if self.bridge is not None else positions_of(self._student, teacher)
        if args.on_policy_fraction and self._positions is not None and args.block_size + args.max_new_tokens > self._positions:
            logger.info("completions end where prompt and completion fill the models' %d positions", self._positions)
        if not args.is_minillm or dataset is None:
            return dataset
        self._prompts, self._text = _all_prompts(dataset, args, self._positions), text
        return Ticks(max(1, len(self._prompts) // args.rollout_batch) * args.inner_epochs * args.rollout_batch)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, on the teacher's answers where they are wanted."""
        config: ChainDistillerConfig = self.args
        samples = config.is_minillm or config.on_policy_fraction or config.teacher_answers
        if samples and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ArgumentError("sampling from a model that is sharded by FSDP or ZeRO-3 is not supported; train on one process, with DDP or with ZeRO-2")
        self._draw_answers()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _draw_answers(self) -> None:
        """Put the teacher's answers in the place of the data, where they are wanted."""
        config: ChainDistillerConfig = self.args
        if config.teacher_answers and not self._answered:
            teacher = self.accelerator.unwrap_model(self.teacher)
            tokenizer = self.processing_class if self.bridge is None else self.bridge.rows.teacher
            with self.accelerator.autocast():
                answers = teacher_answers(
                    teacher, _all_prompts(self.train_dataset, config, self._positions), Path(config.output_dir) / "answers", self._sampling(0.0, teacher, tokenizer=tokenizer),
                    seed=config.seed, tokenizer=tokenizer, process=(config.process_index, config.world_size), wait=self.accelerator.wait_for_everyone,
                )
            self.train_dataset = answers if self.bridge is None else with_tokens(self.bridge.rows.answered(answers), self.processing_class, config, self._student)
            self._answered = True

    def _sampling(self, teacher_mix: float, *models: Any, tokenizer: Any = None) -> Sampling:
        args: ChainDistillerConfig = self.args
        tokenizer = tokenizer or self.processing_class
        return Sampling(
            end_tokens(tokenizer, *models), getattr(tokenizer, "pad_token_id", None) or 0, teacher_mix, args.sampling_temperature, self._vocab_size,
            args.generation_batch_size, self._positions,
        )

    @property
    def _pad(self) -> int:
        return getattr(self.processing_class, "pad_token_id", None) or 0

    # -- batches -------------------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The batches of an optimiser step, sampled where it is that step's turn, and the number of their kept tokens."""
        args: ChainDistillerConfig = self.args
        batches = list(itertools.islice(epoch_iterator, num_batches))
        batches[-1:] = [self._without_repeats(batch, self._train_batch_size) for batch in batches[-1:]]
        if args.is_minillm:
            batches = self._policy_batches(len(batches), device)
        elif args.on_policy_fraction and random.Random(f"{args.seed} on-policy {self.state.global_step}").random() < args.on_policy_fraction:
            batches = self._own_completions(batches)
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | int | None:
        """Tokens of an optimiser step that are predicted and count, of all processes; 1 where there are none.

        The Trainer counts a row's first label for some architectures and versions, and for others not: nothing predicts it.
        """
        predicted = [{**batch, "labels": F.pad(next_tokens(batch)[:, :-1], (1, 0), value=IGNORED)} if "labels" in batch else batch for batch in batch_samples]
        items: Tensor | int | None = super()._get_num_items_in_batch(predicted, device)
        return items.clamp(min=1) if isinstance(items, Tensor) else items if items is None else max(items, 1)

    def _first_row(self, batch: int) -> int:
        """Place of a batch's first row among the rows of the whole optimiser step, over all processes."""
        args: ChainDistillerConfig = self.args
        return (batch * args.world_size + args.process_index) * args.train_batch_size

    def _own_completions(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The batches with the completions that the student gives to their prompts."""
        args: ChainDistillerConfig = self.args
        prompts: list[Prompt] = []
        keys: list[str] = []
        counts = []
        for number, batch in enumerate(batches):
            rows = batch_prompts(batch, args.max_new_tokens, args.prompt_share)
            for row, found in enumerate(rows):
                prompts += found
                keys += (f"{args.seed} step {self.state.global_step} row {self._first_row(number) + row} {place}" for place in range(len(found)))
            counts.append(sum(map(len, rows)))
        with self.accelerator.autocast():
            rollouts = iter(generate(self._student, prompts, keys, self._sampling(0.0, self._student, self.teacher)))
        return [
            {**collate([rollout.row for rollout in itertools.islice(rollouts, count)], self._pad), "own": True} if count else batch
            for batch, count in zip(batches, counts)
        ]

    # -- MiniLLM -------------------------------------------------------------------------------------------------------------

    def _policy_batches(self, count: int, device: torch.device) -> list[dict[str, Any]]:
        """This process's batches of a step: each response of the rollout batch once an inner epoch, in an order of its own."""
        args: ChainDistillerConfig = self.args
        step, batch = self.state.global_step, args.step_rows
        steps = args.rollout_batch // batch
        turn, place = divmod(step, steps * args.inner_epochs)
        rollouts = self._rollout_batch(turn, fresh=place == 0)
        order = endless(args.rollout_batch, 0, args.rollout_batch, args.seed, 1, turn, place // steps)
        made, texts = [], []
        for number in range(count):
            first = place % steps * batch + self._first_row(number)
            made.append(_policy_batch([rollouts[index] for index in order[first : first + args.train_batch_size]], self._pad, args.length_normalised))
            if self._text is not None:
                start = step * batch + self._first_row(number)
                rows = endless(len(self._text), start, start + args.train_batch_size, args.seed, 2)
                texts.append(collate([self._text[index] for index in rows], self._pad))
        if texts:
            items = self._get_num_items_in_batch(texts, device)
            made = [{**one, "text": {**text, "items": items}} for one, text in zip(made, texts)]
        return made

    def _rollout_batch(self, turn: int, fresh: bool) -> list[Rollout]:
        """The responses of a rollout batch, the same on every process; drawn, each process its share, when it begins.

        Raises:
            StorageError: If it began before a checkpoint that does not hold it.
        """
        args: ChainDistillerConfig = self.args
        if self._rollouts is not None and self._rollouts[0] == turn:
            if len(self._rollouts[1]) != args.rollout_batch:
                raise ArgumentError(f"rollout_batch={args.rollout_batch} but the checkpoint holds {len(self._rollouts[1])} responses; resume with that number")
            return self._rollouts[1]
        if not fresh:
            raise StorageError(f"no {ROLLOUTS} was found for step {self.state.global_step}, in the middle of a rollout batch; resume from a whole checkpoint")
        chosen = endless(len(self._prompts), turn * args.rollout_batch, (turn + 1) * args.rollout_batch, args.seed, 0)
        mine = range(args.process_index, args.rollout_batch, args.world_size)
        teacher = self.accelerator.unwrap_model(self.teacher)
        with self.accelerator.autocast():
            rollouts = generate(
                self._student, [self._prompts[chosen[place]] for place in mine], [f"{args.seed} rollout {turn} {place}" for place in mine],
                self._sampling(args.teacher_mix, self._student, teacher), teacher=teacher,
            )
        everyone = dict(gather_object(list(zip(mine, rollouts))))
        self._rollouts = turn, [everyone[place] for place in range(args.rollout_batch)]
        return self._rollouts[1]

    def _policy_loss(self, student: Any, target: Output | None, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        """MiniLLM's loss of sampled responses, and the cross-entropy of the text that came with them."""
        args: ChainDistillerConfig = self.args
        assert target is not None
        labels = next_tokens(inputs)
        output = ModelRunner(student)(inputs["input_ids"], inputs.get("attention_mask"))
        ours, theirs = output.head, target.head
        own = {**ours.options("student_"), "vocab_size": self._vocab_size}
        loss = minillm_loss(
            output.hidden.flatten(0, 1), ours.weight, target.hidden.flatten(0, 1), theirs.weight, labels.flatten(),
            inputs["policy"]["sampled"].flatten(), inputs["policy"]["advantages"].flatten(), ratio_clip=args.ratio_clip, num_items=num_items,
            **theirs.options("teacher_"), **own,
        )
        if "text" in inputs:
            text = inputs["text"]
            output = ModelRunner(student)(text["input_ids"], text.get("attention_mask"), text.get("position_ids"))
            labels = next_tokens(text)
            loss = loss + distillation_loss(
                output.hidden.flatten(0, 1), ours.weight, None, None, labels.flatten(), kd_weight=0.0, ce_weight=args.text_weight,
                num_items=text["items"], **own,
            )
        if args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            loss = loss * self.accelerator.num_processes  # the count is of all processes, and their gradients are averaged
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with what the current rollout batch says of the student."""
        if self._rollouts is not None and "loss" in logs:
            rollouts = self._rollouts[1]
            sampled, student, teacher = (torch.cat([getattr(one, name) for one in rollouts]).double() for name in ("sampled", "student", "teacher"))
            logs["rollout_reverse_kl"] = float(((student - sampled).exp() * (student - teacher)).mean())
            logs["rollout_length"] = len(sampled) / len(rollouts)
        super().log(logs, *args, **kwargs)

    # -- checkpoints ---------------------------------------------------------------------------------------------------------

    def save_beside(self, folder: Path) -> None:
        """Write the rollout batch in use beside a checkpoint."""
        super().save_beside(folder)
        if self._rollouts is not None and self.args.should_save:
            turn, rollouts = self._rollouts
            save_file(rollout_tensors(rollouts), folder / ROLLOUTS, metadata={"turn": str(turn)})

    def load_beside(self, folder: Path) -> None:
        """Read it again; None where a checkpoint has none."""
        super().load_beside(folder)
        path = folder / ROLLOUTS
        self._rollouts = None
        if path.is_file():
            with safe_open(path, "pt") as file:
                self._rollouts = int(file.metadata()["turn"]), rollouts_from({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def check_sources(args: ChainDistillerConfig, dataset: Any, text: Any) -> None:
    """Refuse data that the student's tokens cannot come from as ``args`` say.

    Args:
        args: The arguments.
        dataset: Training rows or blocks, or None.
        text: Rows of MiniLLM's cross-entropy term, or None.

    Raises:
        ArgumentError: If the arguments do not go with each other or with the data.
        DataError: If the data is a stream where it cannot be.
    """
    if bool(args.text_weight) != (text is not None):
        raise ArgumentError(f"text_weight={args.text_weight} and text_dataset is {'missing' if text is None else 'given'}; give both or neither")
    objective = "objective=minillm" if args.is_minillm else "teacher_answers=True" if args.teacher_answers else None
    for what, rows in ((objective, dataset), ("text_weight", text)):
        if what is not None and rows is not None and not hasattr(type(rows), "__len__"):
            raise DataError(f"{what} needs its rows more than once, and a stream has no length; give a data set that is there as a whole")
    if args.is_minillm and args.auto_find_batch_size:
        raise ArgumentError("auto_find_batch_size changes the responses of a step, which rollout_batch must be a multiple of; set per_device_train_batch_size, and leave it out")
    batch = args.step_rows
    if args.is_minillm and args.rollout_batch % batch:
        raise ArgumentError(
            f"rollout_batch={args.rollout_batch} is no multiple of the {batch} responses of an optimiser step (per device {args.train_batch_size} x "
            f"accumulation {args.gradient_accumulation_steps} x processes {args.world_size}); change one of them"
        )


def unpacked(dataset: Any, tokenizer: Any, args: ChainDistillerConfig) -> Any:
    """Rows of prompts and chats tokenised each for itself where only their prompts are wanted, so that no block cuts them; else the data as it is.

    A prompt needs no completion then.

    Raises:
        DataError: If a row cannot be read.
    """
    first = first_row(dataset) if hasattr(type(dataset), "__len__") else None
    if not (args.is_minillm or args.teacher_answers) or tokenizer is None or first is None or "input_ids" in first or not {"prompt", "messages"} & set(first):
        return dataset
    return Dataset.from_list([{"input_ids": row.ids, "labels": row.labels} for row in tokenised(map(with_answer, dataset), tokenizer)])


def _all_prompts(dataset: Any, args: ChainDistillerConfig, positions: int | None) -> list[Prompt]:
    """The prompts of a data set behind which an answer fits.

    Raises:
        DataError: If there is none.
    """
    prompts = [prompt for row in dataset for prompt in prompts_of(row, args.max_new_tokens, args.prompt_share)]
    if not prompts:
        raise DataError("the training data has no prompt that anything could follow; give prompts with completions, chats, or text")
    return fitting(prompts, positions)


def _policy_batch(rollouts: Sequence[Rollout], pad: int, normalised: bool) -> dict[str, Any]:
    """A batch of responses with what the policy gradient needs of each token, at the position that predicts it."""
    batch: dict[str, Any] = collate([rollout.row for rollout in rollouts], pad)
    sampled, advantages = (torch.zeros(batch["input_ids"].shape) for _ in range(2))
    for row, rollout in enumerate(rollouts):
        place = slice(len(rollout.prompt) - 1, len(rollout.prompt) + len(rollout.response) - 1)
        keep = torch.ones(1, len(rollout.response), dtype=torch.bool)
        sums = rewards_to_go((rollout.teacher - rollout.student)[None], keep)
        sampled[row, place] = rollout.sampled
        advantages[row, place] = (length_normalised(sums, keep) if normalised else sums)[0]
    return {**batch, "policy": {"sampled": sampled, "advantages": advantages}}
