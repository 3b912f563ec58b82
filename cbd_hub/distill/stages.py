"""What a recipe means: its stages, checked against the teacher, and the text of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from cbd_hub import shapes
from cbd_hub.chain import check_pair, unique_name
from cbd_hub.configs import read_config
from cbd_hub.cut import cut_model
from cbd_hub.distill.config import BRIDGES, ChainDistillerConfig
from cbd_hub.distill.data import (
    Parts,
    as_document,
    as_row,
    open_stream,
    read_dataset,
    read_rows,
    split_documents,
    split_stream,
)
from cbd_hub.distill.packing import tokenised
from cbd_hub.distill.schema import Recipe, RecipeData, anchor_key
from cbd_hub.distill.starts import Start
from cbd_hub.errors import ArchitectureError, CBDError, DataError, RecipeError, VocabularyMismatchError
from cbd_hub.evaluation import Calibration, Documents
from cbd_hub.hub import resolve_checkpoint
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest import Shape
from cbd_hub.reconstruct import TOKENS, reconstruct
from cbd_hub.reporting import Progress
from cbd_hub.sizes import format_size, matches, parse_size
from cbd_hub.weights import Checkpoint, load_tokenizer
from cbd_hub.wishes import named_shape


CALIBRATION_TOKENS = 4096
HIDDEN_PATH = 0.2  # path_fraction of an anchor of another hidden width, where the stage names none: without it the sizes in between sag (benchmarks/quality/README.md)
_REFUSALS = (AttributeError, ImportError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)  # of training arguments, transformers' and our own
NO_PATH = ("bridge", "teacher_cache", "on_policy_fraction", "neftune_noise_alpha", "fsdp", "deepspeed")  # what path training does not go with


@dataclasses.dataclass(frozen=True)
class Stage:
    """One anchor to make.

    Attributes:
        name: The anchor's name.
        anchor: As the recipe gives it.
        wish: The same as text.
        size: Parameters wanted; None for a checkpoint.
        shape: The exact shape wanted, or None.
        checkpoint: A published checkpoint to start from, or None.
        arguments: Training arguments; with ``bridge`` the anchor is of another vocabulary or architecture than the one above it.
        start: What it begins as where it says its origin, or None.
    """

    name: str
    anchor: str | int | dict[str, Any]
    wish: str
    size: int | None
    shape: Shape | None
    checkpoint: str | None
    arguments: dict[str, Any]
    start: Start | None = None

    @property
    def origin(self) -> Literal["cut", "published", "random"]:
        """Where its first weights are from."""
        return self.start.origin if self.start is not None else "cut" if self.checkpoint is None else "published"

    @property
    def own(self) -> bool:
        """Whether it is cut from the anchor above it."""
        return self.checkpoint is None and self.start is None

    def base(self, above: Any) -> Any:
        """The config that its shape is a change of.

        Args:
            above: That of the anchor above it.
        """
        if self.start is not None:
            return self.start.config
        return above if self.checkpoint is None else read_config(resolve_checkpoint(self.checkpoint))

    @property
    def bridged(self) -> bool:
        """Whether a bridge leads to it."""
        return self.arguments.get("bridge") is not None

    def config(self, output_dir: str, seed: int = 0, check: Callable[[ChainDistillerConfig], None] | None = None) -> ChainDistillerConfig:
        """The stage's training arguments, with what a stage has by default; ``check`` may refuse them too.

        Raises:
            RecipeError: If a value cannot be used.
        """
        defaults = {"disable_tqdm": False, "save_steps": 25, "logging_steps": min(10, self.arguments["max_steps"])}

        def made(arguments: dict[str, Any]) -> ChainDistillerConfig:
            config = ChainDistillerConfig(output_dir=output_dir, seed=seed, **{**defaults, **arguments})
            if check is not None:
                check(config)
            return config

        try:
            return made(self.arguments)
        except _REFUSALS as error:
            said = " ".join(str(error).split())[:400]
            if not said.startswith(tuple(self.arguments)):  # transformers' own, which may not name what it is of
                for name, value in self.arguments.items():
                    with suppress(*_REFUSALS):
                        made({other: kept for other, kept in self.arguments.items() if other != name})
                        said = f"{name}={value!r} is refused: {said}"
                        break
            raise RecipeError(f"{said} (stage of anchor {self.wish})") from error


def plan_stages(recipe: Recipe, teacher: Path, teacher_config: Any, made: Sequence[Path] = ()) -> list[Stage]:
    """The stages of a recipe, checked against its teacher before anything is done.

    Args:
        recipe: The recipe.
        teacher: The teacher's folder.
        teacher_config: Its config.
        made: The folders of the first anchors, where these are made; whatever they were made from is not asked for.

    Raises:
        RecipeError: If the anchors do not fall in size from the teacher on, or one cannot be cut from what is above it.
        CBDError: If a stage's arguments or a checkpoint cannot be used.
    """
    above: int = shapes.parameter_count(teacher_config)
    whole, exact = shapes.shape_of(teacher_config), True  # not exact once a size was asked for, whose layers and FFN are chosen later
    source, own = (above, teacher, teacher_config), teacher_config
    taken = [unique_name(above, [])]
    stages: list[Stage] = []
    for place, wish in enumerate(recipe.anchors):
        shape, checkpoint, start, arguments = None, None, None, recipe.stage_arguments(wish)
        if place < len(made):
            folder, own = made[place], read_config(made[place])
            above, whole, exact = shapes.parameter_count(own), shapes.shape_of(own), True
            source = (above, folder, own)
            stages.append(Stage(folder.name, wish, str(wish), above, whole, str(folder), arguments))
            taken.append(folder.name)
            continue
        if arguments.get("bridge") in BRIDGES and not (isinstance(wish, dict) and {"checkpoint", "origin"} & set(wish)):
            with recipe.at(wish):
                raise RecipeError(
                    f"bridge={arguments['bridge']} leads to an anchor of another vocabulary or architecture; give it as {{checkpoint: ...}} or with its origin, "
                    f"and bridge under stages (stage of anchor {wish})"
                )
        with recipe.at(wish, "anchors"):
            if isinstance(wish, dict) and "origin" in wish:
                if arguments.get("bridge") is None:
                    raise RecipeError(f"anchor {anchor_key(wish)} says its origin, so that nothing can be interpolated between it and the one above it; set a bridge in its stage")
                start = Start.of(wish)
                size, shape, own = start.size, start.shape, start.config
                source, whole, exact = (size, start.tokenizer, own), shape or shapes.shape_of(own), shape is not None
            elif isinstance(wish, dict) and "checkpoint" in wish:
                checkpoint = str(wish["checkpoint"])
                folder = resolve_checkpoint(checkpoint)
                config = read_config(folder)
                Checkpoint(folder, config)
                size = shapes.parameter_count(config)
                if arguments.get("bridge") is None:
                    _check_segment(*source, size, folder, config)
                own = config
                source, whole, exact = (size, folder, config), shapes.shape_of(config), True
            elif isinstance(wish, dict):
                shape = _wished_shape(wish, whole, exact, own)
                narrower, whole = shape.hidden != whole.hidden, shape
                size, exact = shapes.count(shape, own), True
                alone = not arguments.get("kd_weight", 1.0) and not arguments.get("ce_weight")  # hidden states, of which a model in between has none
                if narrower and not alone and not any(arguments.get(name) for name in NO_PATH) and arguments.get("objective") != "minillm":
                    arguments.setdefault("path_fraction", HIDDEN_PATH)
            else:
                size, exact = parse_size(wish), False
            if size >= above or (isinstance(wish, str) and matches(wish, above)):
                raise RecipeError(
                    f"anchor {wish} has {format_size(size)} but the one above it has {format_size(above)}; list anchors in falling size, all smaller "
                    "than the teacher"
                )
            least = shapes.count(whole.model_copy(update={"layers": 1, "ffn": 1}), own)
            if size < least:
                raise RecipeError(f"anchor {wish} is smaller than the embeddings and one layer, {format_size(least)}; ask for more")
        name = unique_name(size, taken)
        stage = Stage(name, wish, str(wish) if start is None else anchor_key(wish), size, shape, checkpoint, arguments, start)
        with recipe.at(wish):
            if stage.config("unused").path_fraction and checkpoint is not None:
                raise RecipeError(f"path_fraction needs an anchor cut from the one above it; set it to 0 for a checkpoint (stage of anchor {wish})")
        stages.append(stage)
        taken.append(name)
        above = size
    return stages


def _check_segment(*pair: Any) -> None:
    """As `check_pair`, with the way across.

    Raises:
        CBDError: If nothing can be interpolated between the two.
    """
    try:
        check_pair(*pair)
    except (ArchitectureError, VocabularyMismatchError) as error:
        raise type(error)(f"{error}. For a bridge, set it in the stage of that anchor: bridge: span") from error


def _wished_shape(wish: Mapping[str, Any], above: Shape, exact: bool, teacher_config: Any) -> Shape:
    """The whole shape that a recipe's partial one means, cut from the anchor above; heads, kv heads and tied hidden width follow from each other.

    Args:
        wish: The recipe's words.
        above: Shape of the anchor above.
        exact: Whether its layers and FFN are known; not where a size was asked for.
        teacher_config: The teacher's config.

    Raises:
        RecipeError: If it names less than is needed, or more than can be cut.
    """
    if not exact and not {"layers", "ffn"} <= set(wish):
        raise RecipeError(f"anchor {dict(wish)} comes after a size, whose layers and ffn are chosen by measuring; name both layers and ffn")
    try:
        shape = named_shape(wish, above, teacher_config)
        shapes.check_cut(shape, above, teacher_config)
    except CBDError as error:
        raise RecipeError(f"anchor {dict(wish)}: {error}") from error
    return shape


def teacher_folder(recipe: Recipe) -> Path:
    """The folder of the recipe's teacher, fetched where it is on the Hub.

    Raises:
        CBDError: If there is none, or it cannot be read, with the recipe's line.
    """
    with recipe.at(None, field="teacher"):
        folder = resolve_checkpoint(recipe.teacher)
        Checkpoint(folder, read_config(folder))
    return folder


def read_parts(recipe: Recipe) -> Parts:
    """The recipe's documents, split.

    Raises:
        DataError: If the text is missing, empty or too short, with the recipe's line.
    """
    with recipe.at(None, field="data"):
        return split_data(recipe.data, recipe.seed)


def split_data(data: RecipeData, seed: int) -> Parts:
    """Documents of a data source, split.

    Raises:
        DataError: If the text is missing, empty or too short.
    """
    if data.streaming:
        stream = open_stream(data.path, data.dataset, data.split, data.column, data.name)
        return split_stream(stream, data.reserve, data.heldout, data.calibration, seed)
    documents: list[Any]
    if data.path is not None:
        documents = [as_document(row) for row in read_rows(data.path, data.column)]
    else:
        assert data.dataset is not None
        documents = read_dataset(data.dataset, data.split, data.column, data.name)
    return split_documents(documents, data.heldout, data.calibration, seed)


def stage_tokenizers(stages: Sequence[Stage], teacher: Any) -> list[Any]:
    """The tokenizers of the teacher and of each stage's anchor: another one from a bridge on."""
    found = [teacher]
    for stage in stages:
        if not stage.bridged:
            found.append(found[-1])
        else:
            found.append(load_tokenizer(resolve_checkpoint(str(stage.checkpoint)) if stage.start is None else stage.start.tokenizer))
    return found


def calibration_of(parts: Parts, tokenizer: Any, block_size: int) -> Calibration:
    """The calibration text; of prompts and chats the answers count alone, as in training.

    Raises:
        DataError: If there is too little.
    """
    if all(isinstance(document, str) for document in parts.calibration):
        return Calibration.read(parts.calibration, tokenizer, block_size, CALIBRATION_TOKENS)
    rows = ((tokens.ids, tokens.labels) for tokens in tokenised(map(as_row, parts.calibration), tokenizer))
    answers = Documents.answered(rows, tokenizer, block_size, CALIBRATION_TOKENS)
    return Calibration(answers, answers)


def training_blocks(parts: Parts, tokenizer: Any, block_size: int, tokens: int) -> Documents:
    """So much of the training text, on which coordinates and reconstructions are fitted: losses are measured on other text.

    Raises:
        DataError: If there is less than a block.
    """
    rows = (row.ids for row in tokenised(parts.rows(), tokenizer))
    return Documents.joined(rows, tokenizer, block_size, tokens, name="the training text")


def untrained(recipe: Recipe, whole: Any, plan: Plan, parts: Parts, tokenizer: Any, progress: Progress = lambda line: None) -> Any:
    """A cut as a stage begins with it: reconstructed on the recipe's training text, where it asks for that.

    Layers of another hidden width cannot be compared one by one, so that such a cut stays as it is by ``reconstruct: layer``; so does one where there is less than a block of text.

    Args:
        recipe: The recipe.
        whole: The model that is cut.
        plan: The cut's plan.
        parts: The recipe's documents.
        tokenizer: The model's.
        progress: Called with a line that says whether it is reconstructed.
    """
    student, target = cut_model(whole, plan), recipe.reconstruct
    if target is False:
        return student
    if target == "layer" and plan.shape.hidden < shapes.shape_of(whole.config).hidden:
        progress("begins as it is cut: layers of another hidden width cannot be compared")
        return student
    try:
        text = training_blocks(parts, tokenizer, recipe.data.block_size, TOKENS)
    except DataError as error:
        progress(f"begins as it is cut, without reconstruction: {error}")
        return student
    progress(f"reconstruction by {target} on {text.tokens:,} tokens")
    reconstruct(student, whole, plan, text, target=target)
    return student


def calibrations(recipe: Recipe, parts: Parts, tokenizers: Sequence[Any]) -> list[Calibration]:
    """The calibration text as each tokenizer reads it, once for each that there is.

    Raises:
        DataError: If there is too little, with the recipe's line.
    """
    with recipe.at(None, field="data"):
        read = {key: calibration_of(parts, tokenizer, recipe.data.block_size) for key, tokenizer in {id(tokenizer): tokenizer for tokenizer in tokenizers}.items()}
    return [read[id(tokenizer)] for tokenizer in tokenizers]


def stage_rows(recipe: Recipe, anchor: str | int | dict[str, Any], parts: Parts) -> tuple[Any, Any]:
    """What an anchor's stage trains on, and where wanted the text of MiniLLM's cross-entropy term; nothing that the recipe sets aside.

    Args:
        recipe: The recipe.
        anchor: As the recipe gives it.
        parts: The recipe's own documents.

    Raises:
        DataError: If the text is missing, empty or too short.
    """
    own, seed = recipe.stage_data(anchor), recipe.seed
    with recipe.at(anchor):
        rows = (parts if own.data is None else split_data(own.data, seed)).rows(without=parts)
        if not recipe.stage_arguments(anchor).get("text_weight"):
            return rows, None
        return rows, rows if own.text_data is None else split_data(own.text_data, seed).rows(without=parts)
