"""What can be known of a stage before any stage is trained."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from cbd_hub.distill.bridging import Bridge, check_vocabularies
from cbd_hub.distill.config import ChainDistillerConfig
from cbd_hub.distill.data import is_conversation
from cbd_hub.distill.hidden import check_layers
from cbd_hub.distill.on_policy import check_sources
from cbd_hub.distill.packing import is_joined, no_block, pack
from cbd_hub.distill.teacher_cache import TeacherCache
from cbd_hub.errors import ArgumentError, CBDError, DataError, RecipeError, one_line
from cbd_hub.shapes import check_positions, parameter_count, shape_of
from cbd_hub.sizes import format_size


if TYPE_CHECKING:
    from cbd_hub.distill.schema import Recipe
    from cbd_hub.distill.stages import Stage

_SIZE = 0.05  # how far the anchor of a size that was asked for may be from it, and more


def check_stages(recipe: Recipe, stages: Sequence[Stage], teacher_config: Any, rows: Mapping[str, tuple[Any, Any]], tokenizers: Sequence[Any]) -> None:
    """Check every stage's arguments against its student and its data.

    Of an anchor that is given as a size the number of layers is not known before it is cut, only that it is not above that of its teacher.

    Args:
        recipe: The recipe.
        stages: Its stages.
        teacher_config: The teacher's config.
        rows: What each stage trains on, and its text for MiniLLM's cross-entropy term.
        tokenizers: The tokenizers of the teacher and of each stage's anchor.

    Raises:
        CBDError: Naming the recipe's line, the anchor and the argument.
    """
    layers = shape_of(teacher_config).layers
    with recipe.at(None):
        check_positions(recipe.data.block_size, teacher_config, f"block_size={recipe.data.block_size}")
    above, size = teacher_config, parameter_count(teacher_config)
    caches: dict[str, str] = {}
    for stage, theirs, tokenizer in zip(stages, tokenizers, tokenizers[1:]):
        teacher_config, teacher_size, size = above, size, stage.size or size
        above = stage.base(above)
        if stage.bridged:
            with recipe.at(None, field="data"):
                check_positions(recipe.data.block_size, above, f"the recipe's data.block_size={recipe.data.block_size}, in blocks of which anchor {stage.wish} is measured,")
        if not stage.own:
            layers = shape_of(above).layers
        if stage.shape is not None:
            layers = stage.shape.layers
        with recipe.at(stage.anchor), tempfile.TemporaryDirectory() as folder:
            args = stage.config(folder, check=_check_trainer)
            try:
                if args.teacher_cache is not None and (first := caches.setdefault(args.teacher_cache, stage.wish)) != stage.wish:
                    raise ArgumentError(f"teacher_cache={args.teacher_cache} is of one teacher, and the stage of {first} has another; name it under stages, for one of them")
                cache = None if args.teacher_cache is None else TeacherCache.open(args.teacher_cache)
                if cache is not None and not math.isclose(found := cache.record.source.teacher.parameters, teacher_size, rel_tol=_SIZE):
                    raise DataError(f"teacher_cache={args.teacher_cache} was made with a teacher of {format_size(found)}, and this stage's is the anchor of {format_size(teacher_size)} above it; make one of that anchor, once it has learned")
                check_layers(args, layers)
                check_positions(args.block_size, above if stage.bridged else teacher_config, f"block_size={args.block_size}")
                check_sources(args, *rows[stage.name])
                _check_text(args, cache, rows[stage.name][0], theirs if args.bridge == "text" or (args.bridge and args.teacher_cache) else tokenizer)
                if args.bridge is not None:
                    check_vocabularies(Bridge(args, tokenizer, theirs).rows, above.vocab_size, teacher_config.vocab_size)
            except CBDError as error:
                raise type(error)(f"{error} (stage of anchor {stage.wish})") from error


def _check_trainer(args: ChainDistillerConfig) -> None:
    """Refuse what a stage's Trainer would refuse.

    Raises:
        CBDError: If it would.
    """
    if args.eval_strategy != "no" or args.eval_on_start:
        name = "eval_on_start=True" if args.eval_strategy == "no" else f"eval_strategy={args.eval_strategy.value}"
        raise RecipeError(f"{name} needs an evaluation set, and a recipe has none; leave it out, `cbd eval` measures the chain")
    if args.save_strategy == "no" or not args.save_steps > 0:
        name = "save_strategy=no" if args.save_strategy == "no" else f"save_steps={args.save_steps}"
        raise RecipeError(f"{name} makes no checkpoint, from which a stage that is stopped goes on; leave it out, or raise save_steps for fewer of them")
    check_optimiser(args)


def check_rate(learning_rate: float) -> None:
    """Refuse a learning rate of a short training that would teach nothing.

    Raises:
        ArgumentError: If it is not above 0, or no finite number.
    """
    if not 0 < learning_rate < math.inf:
        raise ArgumentError(f"learning_rate={learning_rate} teaches nothing; give a number above 0, such as 1e-4")


def check_optimiser(args: ChainDistillerConfig) -> None:
    """Let transformers' Trainer say what it would refuse, on a model of one number.

    Raises:
        ArgumentError: If it refuses.
    """
    try:
        trainer = Trainer(model=torch.nn.Linear(1, 1), args=args, train_dataset=[{}], eval_dataset=[{}])
        trainer.create_optimizer_and_scheduler(max(args.max_steps, 1))
        trainer.get_train_dataloader()
    except (ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ArgumentError(one_line(error)) from error


def _check_text(args: ChainDistillerConfig, cache: TeacherCache | None, rows: Any, tokenizer: Any) -> None:
    """Compare the teacher cache with the text; without one, see that the text fills a block.

    Raises:
        DataError: If it does not, or the cache is another text's.
    """
    if cache is not None:
        cache.check(tokenizer=tokenizer, rows=rows, block_size=args.block_size)
    elif not ((args.is_minillm or args.teacher_answers) and is_conversation(next(iter(rows), {}))) and next(pack(rows, tokenizer, args.block_size), None) is None:
        raise no_block(args.block_size, joined=is_joined(next(iter(rows), {"text": ""})))
