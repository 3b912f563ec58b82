"""What a stage shows and writes while it trains: a progress bar, and its metrics as lines of JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SaveStrategy

from cbd_hub.files import write_text


METRICS = "metrics.jsonl"
_OF_THIS_PROCESS = ("_runtime", "_per_second", "train_loss", "total_flos")  # of the part since the last resume


def _step(line: str) -> float:
    """The step of a line; of one that was cut off while it was written, later than all."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class MetricsFile(TrainerCallback):
    """Appends every log line to ``metrics.jsonl`` in the output folder, whatever ``report_to`` names.

    After a resume, lines of steps that are taken again are dropped first, and what a clock says is left out, so that a run that was stopped
    writes what one that was not stopped writes.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what comes after the checkpoint."""
        path = Path(args.output_dir) / METRICS
        if state.is_world_process_zero and path.is_file():
            lines = [line for line in path.read_text().splitlines() if _step(line) <= state.global_step]
            write_text(path, "".join(f"{line}\n" for line in lines) if state.global_step else "")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log where a checkpoint is made, or may be after an evaluation: it keeps no part of a mean, and a run that goes on from it would write another one."""
        saves = control.should_save or (control.should_evaluate and args.save_strategy == SaveStrategy.BEST)
        control.should_log = control.should_log or saves

    on_epoch_end = on_step_end

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Write a line."""
        kept = {name: value for name, value in (logs or {}).items() if not name.endswith(_OF_THIS_PROCESS)}
        if state.is_world_process_zero and kept.keys() - {"epoch", "num_input_tokens_seen"}:
            path = Path(args.output_dir) / METRICS
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **kept}) + "\n")


def show_stage(trainer: Trainer, name: str) -> None:
    """Show a stage's own bar instead of the Trainer's."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(StageProgress(name, trainer.args))


class StageProgress(TrainerCallback):
    """Shows a stage while it trains.

    Args:
        name: What to call it.
        args: Its `ChainDistillerConfig`.
    """

    def __init__(self, name: str, args: Any) -> None:
        self._name = name
        self._tokens = args.step_tokens
        self._disabled = bool(args.disable_tqdm)
        self._bar: Any = None
        self._began = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self._name, unit="step", disable=self._disabled)
            self._began = (state.global_step, time.monotonic())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show loss and speed."""
        if self._bar is not None and logs and "loss" in logs:
            steps, seconds = state.global_step - self._began[0], time.monotonic() - self._began[1]
            self._bar.set_postfix_str(f"loss {float(logs['loss']):.3f}, {steps * self._tokens / max(seconds, 1e-9):,.0f} tokens/s")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
