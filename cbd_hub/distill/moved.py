"""A model with another vocabulary that learns from what it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from cbd_hub.card_metadata import license_of
from cbd_hub.cards import retokenized_card
from cbd_hub.configs import read_config
from cbd_hub.distill.begun import unfinished
from cbd_hub.distill.checks import check_rate
from cbd_hub.distill.config import ChainDistillerConfig
from cbd_hub.distill.data import split_documents
from cbd_hub.distill.distiller import ChainDistiller
from cbd_hub.distill.progress import show_stage
from cbd_hub.distill.saving import last_checkpoint
from cbd_hub.errors import ArgumentError
from cbd_hub.evaluation import BITS, Losses
from cbd_hub.files import check_absent, disk_told, held, staged_folder, write_text
from cbd_hub.hub import resolve_checkpoint
from cbd_hub.precision import best_device
from cbd_hub.reporting import Progress
from cbd_hub.retokenize import Retokenized, difference_of, measured, retokenize
from cbd_hub.texts import utf8
from cbd_hub.weights import Checkpoint, load_model, load_tokenizer


_BRIDGES = ("span", "vocab", "span+vocab")


def retokenize_and_train(
    model: str | os.PathLike[str], output_dir: str | os.PathLike[str], text: Sequence[str], *, steps: int, keep: int | str | None = None,
    tokenizer: str | os.PathLike[str] | None = None, revision: str | None = None, bridge: str = "span", ce_weight: float = 1.0, learning_rate: float = 1e-4,
    batch_size: int = 8, block_size: int = 128, bf16: bool = True, save_steps: int = 25, heldout: float = 0.05, seed: int = 0, quiet: bool = False,
    progress: Progress | None = None,
) -> Retokenized:
    """Write a model with another vocabulary, as `cbd_hub.retokenize.retokenize` does, after a short distillation from the model itself.

    The work lies in a hidden folder beside the output until that is there, so that a run that was stopped goes on with the same call.

    Args:
        model: Folder or Hub id.
        output_dir: The folder to make.
        text: Texts: some are held out for bits per byte, the others are trained on.
        steps: Optimiser steps.
        keep: Tokens to keep, such as 16000 or "16K".
        tokenizer: Folder or Hub id of another tokenizer.
        revision: Branch, tag or commit of a model on the Hub.
        bridge: ``span``, ``vocab`` or ``span+vocab``.
        ce_weight: Weight of the cross-entropy with the text.
        learning_rate: Peak learning rate.
        batch_size: Blocks a step.
        block_size: Tokens in a block.
        bf16: Whether products run in bf16.
        save_steps: Steps between checkpoints.
        heldout: Share of the texts that nothing is trained on.
        seed: Seed of the split and of the order.
        quiet: Show no progress bar.
        progress: Called with a line for each step of the work.

    Returns:
        What became of the model, with bits per byte before, after the rows were composed, and after training.

    Raises:
        ArgumentError: If an option is none, or the vocabulary cannot be changed so.
        DataError: If there is too little text.
        StorageError: If the folder is in the way or the disk is full, or holds an unfinished run of other options.

    Example:
        >>> retokenize_and_train("org/chain-64M", "./moved", texts, steps=500, tokenizer="openai-community/gpt2")  # doctest: +SKIP
    """
    if bridge not in _BRIDGES:
        raise ArgumentError(f"bridge={bridge!r} is not known here; choose one of {', '.join(_BRIDGES)}")
    if steps < 1:
        raise ArgumentError(f"steps={steps} trains nothing; give 1 or more, or use retokenize")
    check_rate(learning_rate)
    target, say = Path(output_dir).expanduser(), progress or (lambda line: None)
    check_absent(target)
    parts = split_documents(text, heldout, 0.0, seed)
    asked = {
        "model": os.fspath(model), "revision": revision, "keep": keep, "tokenizer": None if tokenizer is None else os.fspath(tokenizer), "steps": steps, "bridge": bridge,
        "ce_weight": ce_weight, "learning_rate": learning_rate, "batch_size": batch_size, "block_size": block_size, "bf16": bf16, "heldout": heldout, "seed": seed,
        "text_sha256": hashlib.sha256(utf8("\0".join(text), "the text")).hexdigest(),
    }
    work = target.absolute().parent / f".{target.absolute().name}.retokenize.work"
    with disk_told(target), held(work, str(target)):
        source = resolve_checkpoint(model, revision)
        found, made = _trained(work, target, source, [*parts.heldout, *parts.calibration], parts.rows(), asked, save_steps, quiet, say)
        with staged_folder(target) as staging:
            for path in sorted(made.iterdir()):
                shutil.copyfile(path, staging / path.name)
            write_text(staging / "README.md", retokenized_card(target.name, os.fspath(model), asdict(found), trimmed=keep is not None, license=license_of(source)))
    shutil.rmtree(work, ignore_errors=True)
    return found


def _trained(
    work: Path, target: Path, source: Path, heldout: Sequence[str], rows: list[Any], asked: dict[str, Any], save_steps: int, quiet: bool, say: Progress
) -> tuple[Retokenized, Path]:
    """What became of the model, and the folder of the trained one."""
    start, final = work / "start", work / "model"
    old = load_tokenizer(source)
    known = unfinished(work / "made.json", asked, target)
    if known is None:
        shutil.rmtree(start, ignore_errors=True)  # there if it was killed between the two
        known = {"asked": asked, "made": asdict(retokenize(source, start, keep=asked["keep"], tokenizer=asked["tokenizer"]))}
        write_text(work / "made.json", json.dumps(known))
    made = known["made"]
    new = load_tokenizer(start)
    losses = {
        name: Losses.kept(work / f"{name}.npz", partial(measured, folder, tokenizer, heldout)) for name, folder, tokenizer in (("before", source, old), ("after", start, new))
    }
    say(f"bits per byte on {int(losses['before'].tokens.sum()):,} held-out bytes: {losses['before'].mean * BITS:.3f} before, {losses['after'].mean * BITS:.3f} after")
    if not final.is_dir():
        _train(work, source, (start, final), (old, new), rows, asked, save_steps, quiet)
    facts = json.loads((work / "training.json").read_text())
    losses["trained"] = Losses.kept(work / "trained.npz", partial(measured, final, new, heldout))
    before = losses["before"]
    return replace(
        Retokenized(**made), before=before.mean * BITS, after=losses["after"].mean * BITS, trained=losses["trained"].mean * BITS,
        difference=difference_of(losses["after"], before), trained_difference=difference_of(losses["trained"], before), bytes=int(before.tokens.sum()),
        steps=asked["steps"], tokens=facts["tokens"], bridge=asked["bridge"],
    ), final


def _train(
    work: Path, source: Path, folders: tuple[Path, Path], tokenizers: tuple[Any, Any], rows: list[Any], asked: dict[str, Any], save_steps: int, quiet: bool
) -> None:
    start, final = folders
    run_dir = work / "run"
    set_seed(asked["seed"])
    args = ChainDistillerConfig(
        str(run_dir), max_steps=asked["steps"], seed=asked["seed"], bridge=asked["bridge"], ce_weight=asked["ce_weight"], learning_rate=asked["learning_rate"],
        per_device_train_batch_size=asked["batch_size"], block_size=asked["block_size"], bf16=asked["bf16"], save_steps=save_steps, disable_tqdm=quiet, report_to="none",
        logging_steps=min(10, asked["steps"]),
    )
    student, teacher = (load_model(folder, torch.float32).to(best_device()) for folder in (start, source))
    trainer = ChainDistiller(
        model=student, teacher=teacher, args=args, train_dataset=rows, processing_class=tokenizers[1], teacher_processing_class=tokenizers[0],
    )
    show_stage(trainer, "retokenize")
    trainer.train(resume_from_checkpoint=last_checkpoint(run_dir))
    write_text(work / "training.json", json.dumps({"tokens": int(trainer.state.num_input_tokens_seen)}))
    with staged_folder(final) as staging:
        made = trainer.accelerator.unwrap_model(trainer.model)
        made.to(Checkpoint(start, read_config(start)).dtype).save_pretrained(staging)
        tokenizers[1].save_pretrained(staging)
