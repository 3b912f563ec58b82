"""Evaluation of the student by the loss that it is trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput

from cbd_hub.distill.config import ChainDistillerConfig
from cbd_hub.distill.packing import next_tokens, packed_dataset
from cbd_hub.distill.rows import check_ready, first_row
from cbd_hub.distill.saving import AnchorTrainer
from cbd_hub.distill.sharing import Endless, Filled, Grouped, rows_in, without_rows
from cbd_hub.errors import DataError
from cbd_hub.evaluation import IGNORED
from cbd_hub.shapes import check_positions


class EvaluatingTrainer(AnchorTrainer):
    """A Trainer whose evaluation loss is a mean per kept token of the whole evaluation set, however it is divided into batches and processes."""

    _student: Any
    _summed: tuple[float, int] = (0.0, 0)  # loss in nats, and the tokens it is of

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches of an evaluation set; rows of text are packed as the training set's are."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = with_tokens(eval_dataset, self.processing_class, self.args, self._student)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Batches of a set to predict, packed likewise."""
        return super().get_test_dataloader(with_tokens(test_dataset, self.processing_class, self.args, self._student))

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of a batch; logits are never formed."""
        inputs = self._without_repeats(inputs, self.args.eval_batch_size)
        kept = int((next_tokens(inputs) != IGNORED).sum())
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=1)
        self._summed = self._summed[0] + float(loss), self._summed[1] + kept
        return loss / max(kept, 1), None, None

    def _without_repeats(self, batch: Any, size: int) -> Any:
        """A batch, of so many rows, in which those that come again do not count: they even out the last batches of several processes."""
        state, processes, rows = self.accelerator.gradient_state, self.accelerator.num_processes, rows_in(batch, size)
        if processes == 1 or not state.end_of_dataloader:
            return batch
        left = state.remainder
        if left < 0:  # unknown to accelerate in an epoch that is gone on with
            loader = state.active_dataloader
            left = 0 if isinstance(loader.dataset, IterableDataset) or self.args.dataloader_drop_last else len(loader.dataset) % (rows * processes)
        return without_rows(batch, max(0, left - self.accelerator.process_index * rows), rows) if left > 0 else batch

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        """Batches; of a stream every process reads all and takes its rows, so that they may differ in length. One to train on has no end, unless its end is waited for."""
        most = self.args.dataloader_num_workers
        if isinstance(dataset, datasets.IterableDataset) and most:
            most = max(count for count in range(1, most + 1) if dataset.num_shards % count == 0)
        waited = "epoch" in (self.args.eval_strategy, self.args.save_strategy, self.args.logging_strategy)
        if isinstance(dataset, IterableDataset) and description == "Training" and not waited:
            dataset = Endless(dataset)
        elif self.args.world_size > 1 and isinstance(dataset, IterableDataset):
            dataset = Filled(dataset, batch_size * self.args.world_size)
        workers, self.args.dataloader_num_workers = self.args.dataloader_num_workers, most
        try:  # as many shards to each worker; rows that are packed as they come are one shard: were there two workers, the first would read its share alone
            return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        finally:
            self.args.dataloader_num_workers = workers

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The order of the rows: of seed and epoch alone, those of like length together too, so that a run that is gone on with takes the same."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return Grouped(sampler.batch_size, sampler.lengths, self.args.seed if self.args.data_seed is None else self.args.data_seed)
        return sampler

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate.

        Raises:
            DataError: If no token of the evaluation set counts.
        """
        self._summed = 0.0, 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nats, kept = (sum(values) for values in zip(*gather_object([self._summed])))
        if not kept:
            raise DataError("no token of the evaluation set counts; give rows with text or answers")
        output.metrics[f"{metric_key_prefix}_loss"] = nats / kept
        return output


def with_tokens(dataset: Any, tokenizer: Any, args: ChainDistillerConfig, model: Any) -> Any:
    """A data set, or several by name, with ``input_ids``: as given, or their rows tokenised and packed into blocks.

    Args:
        dataset: Rows; None stays None.
        tokenizer: A transformers tokenizer, or None where rows have ``input_ids``.
        args: Says how long a block is.
        model: Says how long it may be.

    Raises:
        ArgumentError: If a block is longer than the model's positions.
        DataError: If a row cannot be read, or a tokenizer is missing.
    """
    if isinstance(dataset, Mapping):
        return {name: with_tokens(rows, tokenizer, args, model) for name, rows in dataset.items()}
    first = first_row(dataset)
    if first is None:
        return dataset
    if "input_ids" in first:
        check_ready(first)
        return dataset
    if tokenizer is None:
        raise DataError(f"the data set has the columns {', '.join(first)} but no tokenizer came; pass processing_class=")
    check_positions(args.block_size, model.config, f"block_size={args.block_size}")
    return packed_dataset(dataset, tokenizer, args.block_size)
