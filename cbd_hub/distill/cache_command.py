"""What ``cbd cache-teacher`` does: models and rows found, a cache written with a progress bar, and pushed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from cbd_hub.distill.cache_writing import write_cache
from cbd_hub.distill.data import read_rows
from cbd_hub.distill.schema import Recipe
from cbd_hub.distill.stages import read_parts, stage_rows
from cbd_hub.distill.teacher_cache import TeacherCache
from cbd_hub.distill.wrapping import cast_weights
from cbd_hub.errors import ArgumentError, VocabularyMismatchError
from cbd_hub.hub import check_repo_id, resolve_checkpoint
from cbd_hub.plans import weight_dtype
from cbd_hub.precision import best_device
from cbd_hub.upload import upload
from cbd_hub.weights import load_model, load_tokenizer, same_vocabulary, tokenizer_file, weight_files


def cache_text(
    teacher: str, out_dir: Path, *, text: str | None = None, recipe: Path | None = None, column: str = "text", block_size: int | None = None,
    max_tokens: int | None = None, top_k: int = 128, bits: int = 8, student: str | None = None, batch_size: int = 8, dtype: str | None = None,
    push: str | None = None, quiet: bool = False, anchor: str | None = None, bos: bool = True, tail_draws: int | None = None,
) -> tuple[TeacherCache, dict[str, Any]]:
    """Cache a teacher on files of text, or on the training text of a recipe.

    Args:
        teacher: Folder or Hub id.
        out_dir: The folder to make.
        text: A file or pattern.
        recipe: A recipe instead: what a stage of it trains on, in its order and packed as the stage does.
        column: Column that holds the text, where files have columns.
        block_size: Tokens in a block; the recipe's, or 128, by default.
        max_tokens: Stop when so many tokens are reached.
        top_k: Tokens listed at a position.
        bits: Precision of a log-probability.
        student: Folder or Hub id of a model to measure the tail's share of the divergence with.
        batch_size: Blocks a forward pass.
        dtype: What the models compute in; that of their weights by default.
        push: A Hub data set to push to.
        quiet: Show no progress bar.
        anchor: The anchor whose stage is meant, as ``stages`` of the recipe names it; the first one by default.
        bos: Begin each block of joined text with what the tokenizer puts before a text, as training on it does.
        tail_draws: Tokens drawn from those that are not listed; a twelfth of ``top_k`` by default.

    Returns:
        The cache, and facts of this run: its seconds, where it was pushed.

    Raises:
        ArgumentError: If not one of text and recipe is given, or the dtype, the anchor or the name to push to is none.
        VocabularyMismatchError: If the student has another tokenizer.
        CBDError: If a model, the text or the folder cannot be used.
    """
    if (text is None) == (recipe is None):
        raise ArgumentError("give either --text (files) or --recipe (the training text of a recipe)")
    if anchor is not None and recipe is None:
        raise ArgumentError(f"anchor {anchor} names a stage of a recipe, and none was given; give --recipe too")
    if push is not None:
        check_repo_id(push)
    compute = None if dtype is None else weight_dtype(dtype, torch.float32)
    if text is not None:
        rows = read_rows(text, column)
    else:
        assert recipe is not None
        read = Recipe.read(recipe)
        stage = read.anchor(anchor)
        block_size = block_size or read.stage_arguments(stage)["block_size"]
        rows, _ = stage_rows(read, stage, read_parts(read))
    folder = resolve_checkpoint(teacher)
    weight_files(folder)
    if student is not None:
        learning = resolve_checkpoint(student)
        if tokenizer_file(learning) is not None and not same_vocabulary(folder, learning):
            raise VocabularyMismatchError(f"{student} reads texts by another tokenizer than {teacher}, so that their tokens cannot be compared; give a student of the teacher's vocabulary")
    model, asked = _load(folder), None if student is None else _load(learning)
    model.config._name_or_path = teacher  # loading leaves the folder of the download there
    if compute is not None and asked is not None:
        asked = cast_weights(asked, compute)
    began = time.monotonic()
    with tqdm(desc="cache", unit="block", disable=quiet) as bar:

        def report(what: str, done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        cache = write_cache(
            model, rows, out_dir, tokenizer=load_tokenizer(folder), block_size=block_size or 128, top_k=top_k, bits=bits, max_tokens=max_tokens,
            batch_size=batch_size, dtype=compute, student=asked, bos=bos, tail_draws=tail_draws, report=report,
        )
    facts: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
    if push is not None:
        upload(out_dir, push, message="Teacher cache", repo_type="dataset")
        facts["pushed"] = push
    return cache, facts


def _load(folder: Path) -> Any:
    """A model in the dtype of its weights."""
    return load_model(folder).to(best_device())
