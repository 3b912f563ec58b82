"""A progress bar for a stage: name, step, loss, tokens per second, time left."""

from __future__ import annotations

import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from cbd_hub.distill.config import ChainDistillerConfig


class StageProgress(TrainerCallback):
    """Shows a stage while it trains.

    Args:
        name: What to call it.
        args: Its training arguments.
    """

    def __init__(self, name: str, args: ChainDistillerConfig) -> None:
        self._name = name
        self._tokens = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * args.block_size
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
