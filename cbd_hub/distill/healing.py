"""What `cbd_hub.distill.heal` trains with: held-out loss document by document, early stopping, and the best weights, those at the start among them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import IterableDataset
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from cbd_hub.distill.data import Parts, as_document, as_row, is_conversation, split_documents
from cbd_hub.distill.distiller import ChainDistiller
from cbd_hub.distill.packing import row_documents
from cbd_hub.distill.rows import check_ready, check_row
from cbd_hub.distill.wrapping import plain_model, shards
from cbd_hub.errors import ArgumentError, DataError, one_line
from cbd_hub.evaluation import IGNORED, Documents, Losses, model_losses


def divided(dataset: Any, eval_dataset: Any, heldout: float, seed: int, vocab: float = math.inf) -> tuple[Any, list[Mapping[str, Any]]]:
    """Rows to train on and rows to measure on; no document is in both.

    Args:
        dataset: Rows; None where a teacher cache is trained from.
        eval_dataset: Rows to measure on; None to take a part of ``dataset``.
        heldout: That part, as a share of its different documents.
        seed: Seed of the division, which depends on nothing but the documents' text.
        vocab: Tokens of the model, which those of ready rows are compared with.

    Raises:
        ArgumentError: If a stream came without rows to measure on.
        DataError: If there are no rows, or too few, or one cannot be read.
    """
    held = None if eval_dataset is None else _rows(eval_dataset, "eval_dataset", vocab)
    if dataset is None:
        return None, held or []
    if isinstance(dataset, IterableDataset):
        if held is None:
            raise ArgumentError("dataset is a stream, of which no part can be held out; pass eval_dataset, rows to measure on")
        return dataset, held
    documents = [as_document(row) for row in _rows(dataset, "dataset", vocab)]
    if held is not None:
        rows = Parts(documents, [], []).rows(without=Parts([], [], [as_document(row) for row in held]))
        if not rows:
            raise DataError("all documents of dataset are in eval_dataset too, and none is left to train on; give others")
        return rows, held
    parts = split_documents(documents, heldout, 0.0, seed)
    return parts.rows(), [as_row(document) for document in (*parts.heldout, *parts.calibration)]


def _rows(dataset: Any, what: str, vocab: float) -> list[Mapping[str, Any]]:
    """Rows that can be read, all of one kind, as a list."""
    if isinstance(dataset, (str, bytes, os.PathLike)) or not isinstance(dataset, Iterable):
        raise ArgumentError(f"{what} is a {type(dataset).__name__}; give a datasets.Dataset, or a list of rows")
    rows: list[Mapping[str, Any]] = []
    for number, row in enumerate(dataset):
        where = f"{what} row {number:,}"
        if not isinstance(row, Mapping):
            raise DataError(f"{where} is no row but {type(row).__name__}; give one split of a datasets.Dataset, or a list of rows")
        if "input_ids" in row:
            row = _plain(row, where, vocab)
        else:
            check_row(row, where)
        if rows and _kind(row) != _kind(rows[0]):
            raise DataError(f"{where} has {_kind(row)}, and the rows before it have {_kind(rows[0])}; give rows of one kind")
        rows.append(row)
    if not rows:
        raise DataError(f"{what} holds no rows; give some with text, prompt and completion, messages, or input_ids")
    return rows


def _kind(row: Mapping[str, Any]) -> str:
    """What is learned from a row."""
    if "input_ids" in row:
        return "input_ids"
    return "prompts with answers" if is_conversation(row) else "text" if "text" in row else "a prompt alone"


def _plain(row: Mapping[str, Any], where: str, vocab: float) -> dict[str, Any]:
    """A row of token ids, in lists or tensors, as one in lists.

    Raises:
        DataError: If it holds no ids of the model, or other labels than ids and -100 for each, or a mask of another length.
    """
    check_ready(row)
    found = {name: value for name, value in row.items() if value is not None or name not in ("labels", "attention_mask")}
    for name in (name for name in ("input_ids", "labels") if name in found):
        try:
            values = torch.as_tensor(found[name])
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{where}: {name} cannot be read ({one_line(error)}); give a list of token ids") from error
        if values.dim() != 1 or not len(values) or values.is_floating_point() or len(values) != len(found["input_ids"]):
            raise DataError(f"{where}: {name} is no list of token ids, one for each token, but {values.dtype} of shape {tuple(values.shape)}; tokenise it again")
        wrong = values[((values < 0) | (values >= vocab)) & ((values != IGNORED) | (name == "input_ids"))]
        if len(wrong):
            raise DataError(f"{where}: {name} holds {int(wrong[0])}, and the model's vocabulary has {vocab:,} tokens; tokenise it with the chain's tokenizer")
        found[name] = values.tolist()
    if "attention_mask" in found:
        mask = torch.as_tensor(found["attention_mask"])
        if mask.shape != (len(found["input_ids"]),):
            raise DataError(f"{where}: attention_mask has the shape {tuple(mask.shape)} and there are {len(found['input_ids'])} tokens; give 1 for each token and 0 for padding")
        found["attention_mask"] = mask.tolist()
    return found


def documents_of(rows: Sequence[Mapping[str, Any]], tokenizer: Any, block_size: int, max_tokens: int) -> Documents:
    """Rows one by one, as `row_documents` reads them, and ready ``input_ids`` too.

    Raises:
        DataError: If no token counts, or a prompt has no answer.
    """
    if _kind(rows[0]) == "a prompt alone":
        raise DataError("the rows to measure on have a prompt and no answer; give each its completion, or pass eval_dataset with rows that have one")
    if "input_ids" in rows[0]:
        return Documents.answered((_unpadded(row) for row in rows), tokenizer, block_size, max_tokens)
    return row_documents(rows, tokenizer, block_size, max_tokens)


def _unpadded(row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Ids and labels of a ready row, without what its mask says is padding."""
    labels, mask = row.get("labels", row["input_ids"]), row.get("attention_mask", [1] * len(row["input_ids"]))
    real = [place for place, there in enumerate(mask) if there]
    return [row["input_ids"][place] for place in real], [labels[place] for place in real]


class Healer(ChainDistiller):
    """A `ChainDistiller` that keeps the weights with the least loss on held-out documents, those it began with among them.

    Args:
        documents: The held-out documents.
        patience: Evaluations without a new least loss before it stops; None never stops it.
        **kwargs: What `ChainDistiller` takes.

    Attributes:
        start: The losses before.

    Raises:
        ArgumentError: If training would split the model over processes.
        CBDError: As `ChainDistiller`.
    """

    control: TrainerControl

    def __init__(self, documents: Documents, patience: int | None, **kwargs: Any) -> None:
        cache = kwargs.get("teacher_cache")
        super().__init__(eval_dataset=[] if cache is None else cache, **kwargs)  # the Trainer wants one; it is the documents that are measured on
        if shards(self.accelerator):
            raise ArgumentError("heal keeps the model whole on every process; train with DDP, or distil it with ChainDistiller")
        self._documents = documents
        self.start = self.losses()
        self.add_callback(_Start(self))
        if patience is not None:
            self.add_callback(EarlyStoppingCallback(patience))

    def losses(self) -> Losses:
        """Loss of the student, as it is now, on each held-out document."""
        return model_losses(plain_model(self.accelerator.unwrap_model(self.model)), self._documents)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean loss on the held-out documents, the same on every process."""
        losses = self.losses()
        found = [{f"{metric_key_prefix}_loss": losses.mean, **({} if losses.stderr is None else {f"{metric_key_prefix}_stderr": losses.stderr})}]
        if self.args.world_size > 1:
            broadcast_object_list(found)
        self.log(found[0])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found[0])
        return found[0]

    def train(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, and load the best weights; a run that had come to its end takes no further step."""
        if isinstance(resume_from_checkpoint, (str, os.PathLike)):
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            stopper: Any = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
            if state.global_step >= self.args.max_steps or (stopper and stopper["attributes"]["early_stopping_patience_counter"] >= stopper["args"]["early_stopping_patience"]):
                self.state = state
                self._load_best_model()
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def keep_start(self) -> None:
        """Make the weights as they are a checkpoint, and their loss the one to beat."""
        self.state.best_metric = self.start.mean
        self.state.best_model_checkpoint = os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-0")
        self._save_checkpoint(self.model, None)

    @property
    def best(self) -> tuple[int, int]:
        """Step of the best weights, and the tokens that they have learned from."""
        step = int(self.state.best_global_step or 0)
        entries = [entry for entry in self.state.log_history if entry["step"] == step and "eval_loss" in entry]
        return step, int(entries[-1]["num_input_tokens_seen"]) if step else 0


class _Start(TrainerCallback):
    """Keeps the weights that training begins with."""

    def __init__(self, trainer: Healer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep them, unless it goes on from a checkpoint."""
        if state.best_metric is None:
            self._trainer.keep_start()
