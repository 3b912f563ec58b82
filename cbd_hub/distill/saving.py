"""How a trained anchor leaves the trainer: whole checkpoints, and a push to the Hub with the project's card."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, get_last_checkpoint, rotate_checkpoints

from cbd_hub.ancestry import Ancestry
from cbd_hub.card_metadata import license_of
from cbd_hub.cards import anchor_card
from cbd_hub.distill.config import ChainDistillerConfig
from cbd_hub.distill.wrapping import is_peft_model
from cbd_hub.errors import StorageError
from cbd_hub.files import write_text
from cbd_hub.hub import is_repo_id
from cbd_hub.upload import upload


logger = logging.getLogger(__name__)

_STAGING = ".saving"


class AnchorTrainer(Trainer):
    """A Trainer whose checkpoints are whole or not there, and whose pushes hold a model and nothing of its training."""

    teacher: Any
    teacher_cache: Any = None
    ancestry: Ancestry | None = None

    def save_beside(self, folder: Path) -> None:
        """Write what a checkpoint holds besides the Trainer's own; every process calls it."""

    def load_beside(self, folder: Path) -> None:
        """Read it again where a training goes on."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_beside(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:  # by which the Trainer loads the model, without the call above
            self.load_beside(Path(checkpoint))

    # -- the Hub -------------------------------------------------------------------------------------------------------------

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, token: str | None = None, revision: str | None = None,
        private: bool | None = None, **kwargs: Any,
    ) -> Any:
        """Push the student with its tokenizer, the project's card and, of a cut, which units were kept, and nothing else: no arguments, optimiser or projectors.

        Args:
            commit_message: Message of the commit.
            blocking: Kept for transformers' signature; the push is always waited for.
            token: Hub token; by default that of the arguments, else the stored one.
            revision: Branch to push to.
            private: Whether a repo made now is private.
            **kwargs: Kept for transformers' signature.

        Returns:
            The client's commit info; None on processes other than the first.

        Raises:
            StorageError: If the Hub cannot be reached or refuses.
        """
        args: ChainDistillerConfig = self.args
        repo_id = args.hub_model_id or Path(args.output_dir).absolute().name
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_model(str(folder), _internal_call=True)
            if not self.is_world_process_zero():
                return None
            (folder / "training_args.bin").unlink(missing_ok=True)
            write_text(folder / "README.md", self._card(repo_id))
            return upload(
                folder, repo_id, token=token or args.hub_token, private=args.hub_private_repo if private is None else private,
                revision=revision or args.hub_revision, message=commit_message or "End of training",
            )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """The repo is made with the first push."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the project's card into the output folder."""
        if self.is_world_process_zero():
            write_text(Path(self.args.output_dir) / "README.md", self._card(self.args.hub_model_id or Path(self.args.output_dir).name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy != HubStrategy.END:
            try:
                self.push_to_hub(commit_message=f"Training in progress, step {self.state.global_step}")
            except StorageError as error:  # the checkpoint is worth more than its push, and the next one comes
                logger.warning("the push at step %d failed, training goes on: %s", self.state.global_step, error)

    def _card(self, name: str) -> str:
        args: ChainDistillerConfig = self.args
        model = self.accelerator.unwrap_model(self.model)
        teacher = self.teacher_cache.record.source.teacher.repo_id or "" if self.teacher_cache is not None else self.teacher.config._name_or_path
        tokens = int(self.state.num_input_tokens_seen) or self.state.global_step * args.step_tokens
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        facts = {
            **args.facts(),
            "optimiser steps": f"{self.state.global_step:,} ({tokens:,} tokens at most)",
            **({"last training loss": f"{losses[-1]:.3f}"} if losses else {}),
        }
        adapter = is_peft_model(model)
        base = getattr(model.get_base_model().config, "_name_or_path", "") if adapter else ""
        parameters = sum(
            parameter.numel() for key, parameter in model.named_parameters() if "cbd_projectors." not in key and (parameter.requires_grad or not adapter)
        )
        return anchor_card(
            name, parameters, teacher_repo=teacher if is_repo_id(teacher) else None, license=license_of(Path(teacher)) if teacher else None, facts=facts,
            base=(base if is_repo_id(base) else "the base model's folder") if adapter else None, base_repo=base if is_repo_id(base) else None,
        )

    # -- saving --------------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.ancestry is not None and self.args.should_save and not is_peft_model(self.accelerator.unwrap_model(self.model)):  # every process comes here
            self.ancestry.save(Path(output_dir or self.args.output_dir))

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, _STAGING) if getattr(self, "_saving", False) else run_dir

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint is written aside and renamed, so that one that is there is whole."""
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_dir / _STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()  # each process writes its own part there
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.save_beside(staging / name)
        self.accelerator.wait_for_everyone()
        final = run_dir / name
        best = self.state.best_model_checkpoint is not None and Path(self.state.best_model_checkpoint) == staging / name
        if best:  # on every process: each loads it at the end
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            if best:
                self.state.save_to_json(str(staging / name / "trainer_state.json"))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(staging / name, final)
            staging.rmdir()
            rotate_checkpoints(  # by time, as the Trainer: a longer run may have left its checkpoints here
                output_dir=str(run_dir), save_total_limit=self.args.save_total_limit, best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()


def has_checkpoint(run: Path) -> bool:
    """Whether a training has saved one in a folder after its first step: healing saves its start too."""
    last = last_checkpoint(run)
    return last is not None and Path(last).name != f"{PREFIX_CHECKPOINT_DIR}-0"


def last_checkpoint(run: str | os.PathLike[str]) -> str | None:
    """The last checkpoint of a training's folder, which need not be there."""
    found: str | None = get_last_checkpoint(run) if os.path.isdir(run) else None
    return found
