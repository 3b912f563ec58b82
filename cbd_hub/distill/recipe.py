"""`distill_chain`: a recipe carried out, stage by stage, resumable."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from cbd_hub import shapes
from cbd_hub.card_metadata import license_of
from cbd_hub.chain import Chain, ChainBuilder, chain_name, check_pair, copy_checkpoint, unique_name
from cbd_hub.configs import read_config
from cbd_hub.cut import Cut, Importance, choose_cut, cut_model, measure_importance
from cbd_hub.distill.begun import Begun, dependencies, fingerprint
from cbd_hub.distill.checks import check_stages
from cbd_hub.distill.distiller import ChainDistiller
from cbd_hub.distill.growing import Finished, made_by
from cbd_hub.distill.progress import METRICS, show_stage
from cbd_hub.distill.same_bytes import SameBytes
from cbd_hub.distill.saving import last_checkpoint
from cbd_hub.distill.schema import Recipe
from cbd_hub.distill.stages import (
    CALIBRATION_TOKENS,
    Stage,
    calibrations,
    plan_stages,
    read_parts,
    stage_rows,
    stage_tokenizers,
    teacher_folder,
    training_blocks,
    untrained,
)
from cbd_hub.errors import ArgumentError, DataError, RecipeError, StorageError, TrainingError
from cbd_hub.evaluation import BITS, Calibration, model_losses
from cbd_hub.files import ASIDE, disk_told, held, staged_folder, write_text
from cbd_hub.hub import TOKENIZER_FILES, resolve_checkpoint
from cbd_hub.interpolation.live import ModelRunner, frozen
from cbd_hub.interpolation.plan import Kept
from cbd_hub.links import FIT_TOKENS, cut_from, measured_pair
from cbd_hub.manifest import Anchor, Evaluation, Link, PathRecord, Shape, Teacher, Training
from cbd_hub.measure import measure_segment
from cbd_hub.precision import best_device
from cbd_hub.reporting import Progress
from cbd_hub.sizes import format_size
from cbd_hub.weights import load_model, load_tokenizer, settle_tokenizer


_WORK = ".work"


def distill_chain(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str], output_dir: str | os.PathLike[str], *,
    progress: Progress | None = None,
) -> Chain:
    """Carry out a recipe: every anchor cut from the one above it, distilled, and the segments between them measured.

    Finished stages are skipped and a stage goes on from its last checkpoint, so that a run that was stopped is run again with the same call.
    The same recipe gives the same chain, bit for bit, on the same machine at a fixed number of threads. A recipe may be corrected in between: anchors that are
    made or begun stay, as long as it asks for them as before. Every stage is checked before the first one trains. A finished chain grows by the recipe that made
    it with further anchors at the end of its list; until they are done it stays what it was.

    Args:
        recipe: A `Recipe`, its plain data, or a YAML file.
        output_dir: The chain's folder: absent, empty, an unfinished run of this recipe, or a chain made by the beginning of it.
        progress: Called with a line for each step of the work.

    Returns:
        The chain.

    Raises:
        ArgumentError: If a launcher has started several processes.
        RecipeError: If the recipe is wrong, asks otherwise for what the folder's run has begun, or is not that of the chain in the folder.
        DataError: If the text is missing, empty or too short, or not the one that the chain in the folder was measured on.
        IntegrityError: If a file of that chain is missing or differs from its record.
        ManifestError: If its chain.json is refused.
        StorageError: If the folder is in the way, another process writes or has changed it, its anchors lie in repos of their own, or the disk is full.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ArgumentError(
            f"a chain is distilled by one process, and {processes} were launched; run it without a launcher, or train single stages with examples/09_multi_gpu.py and put the anchors together with assemble_chain"
        )
    if not isinstance(recipe, Recipe):
        recipe = Recipe.parse(recipe) if isinstance(recipe, Mapping) else Recipe.read(recipe)
    target = Path(output_dir).expanduser()
    chain = Chain.from_pretrained(target) if (target / "chain.json").is_file() else None
    if chain is not None and made_by(chain, recipe):
        _forget(target / _WORK, chain)
        return chain
    run = _Run(recipe, target, progress or (lambda line: None), chain)
    with disk_told(target), held(run.work, str(target)):
        run.carry_out()
        shutil.rmtree(run.work, ignore_errors=True)
    return Chain.from_pretrained(target)


def _forget(work: Path, chain: Chain) -> None:
    """Remove the work folder of a run that was killed at its very end; not one that makes the chain longer."""
    if work.is_dir():
        with suppress(StorageError), held(work, str(work.parent)):  # another process may be at it
            if Begun.names(work) <= {anchor.name for anchor in chain.anchors}:
                shutil.rmtree(work, ignore_errors=True)


class _Run:
    """One carrying-out of a recipe; everything done is on disk, so that the next run skips it.

    Args:
        recipe: The recipe.
        target: The chain's folder.
        progress: Called with a line for each step.
        chain: The finished chain in the folder, where there is one, which the recipe is to make longer.
    """

    def __init__(self, recipe: Recipe, target: Path, progress: Progress, chain: Chain | None = None) -> None:
        self.recipe, self.target, self.progress = recipe, target, progress
        self.finished = None if chain is None else Finished(chain, recipe)
        self.work = target / _WORK
        self.builder = ChainBuilder(target, chain_name(target) if chain is None else chain.name)
        self._check_target()
        self.source, *made = [teacher_folder(recipe)] if self.finished is None else self.finished.folders
        self.teacher_config = read_config(self.source)
        self.stages = plan_stages(recipe, self.source, self.teacher_config, made)
        self.teacher_name = unique_name(shapes.parameter_count(self.teacher_config), [])
        self.parts = read_parts(recipe)
        self.begun = Begun(self.work, dependencies(recipe, self.teacher_name, self.stages, self.parts), [] if self.finished is None else self.finished.names)
        self.begun.check()
        self.tokenizers = stage_tokenizers(self.stages, load_tokenizer(self.source))
        size = recipe.data.block_size
        self.calibrations = calibrations(recipe, self.parts, self.tokenizers)  # of the teacher, then of each stage
        bridged = any(stage.bridged for stage in self.stages)  # across a bridge losses are compared in bits per byte
        self.same_bytes = None
        if bridged:
            try:
                self.same_bytes = SameBytes(self.parts.calibration, list({id(tokenizer): tokenizer for tokenizer in self.tokenizers}.values()), size, CALIBRATION_TOKENS)
            except DataError as error:
                self.progress(f"no bits per byte, by which the sides of a bridge compare: {error}")
        self.dataset = f"{recipe.data.source} (calibration)"
        if self.finished is not None:
            self.dataset = self.finished.dataset(self.dataset)
        done, above = (0, self.teacher_config) if self.finished is None else (self.finished.stages, self.finished.config)
        self.new = self.stages[done:]
        self.rows = {stage.name: stage_rows(recipe, stage.anchor, self.parts) for stage in self.new}
        check_stages(recipe, self.new, above, self.rows, self.tokenizers[done:])

    def _place(self, name: str) -> int:
        """An anchor's place: 0 for the teacher."""
        return next((place for place, stage in enumerate(self.stages, 1) if stage.name == name), 0)

    def _check_target(self) -> None:
        """Refuse a folder that is something else."""
        if self.finished is None and not Begun.names(self.work) and self.target.exists() and (not self.target.is_dir() or any(path != self.work for path in self.target.iterdir())):
            raise StorageError(f"{self.target} already exists and is no run of a recipe; choose another folder or remove it")

    def carry_out(self) -> None:
        if self.finished is None and (self.target / "chain.json").is_file():
            raise StorageError(f"{self.target} was finished by another process meanwhile; run again")
        self._check_target()  # both once more, now that no other process can change it
        self.begun.check()
        self.begun.forget()
        folders = {stage.name: self.builder.anchor_folder(stage.name) for stage in self.new}
        unknown = [str(folder) for name, folder in folders.items() if folder.exists() and not (self.work / f"{name}.training.json").is_file()]
        if unknown:
            raise StorageError(f"{self.work} does not say how {' and '.join(unknown)} came about; remove {'it' if len(unknown) == 1 else 'them'} to make that anew")
        anchors, links = ([self._teacher()], []) if self.finished is None else self._made(self.finished)
        large = self._load(anchors[-1].name)
        if self.finished is not None:
            self.finished.check_text(Evaluation(**self._evaluation(large, anchors[-1].name)))
        for stage in self.new:
            small, cut, importance = self._anchor(stage, large, anchors)
            links.append(self._link(stage, small, large, cut, importance, anchors))
            large = small
        self._clear()
        if self.finished is None:
            repo, commit = (None, None) if Path(self.recipe.teacher).expanduser().exists() else (self.recipe.teacher, self.source.name)
            teacher: Teacher | None = Teacher(repo_id=repo, revision=commit, parameters=anchors[0].parameters, license=license_of(self.source))
        else:
            self.finished.check_unchanged()
            teacher = self.finished.chain.manifest.teacher
        self.builder.finish(anchors, links, teacher, recipe=self._recipe_text())

    def _recipe_text(self) -> str:
        """What recipe.yaml is to hold: in its own words where it says the same already."""
        file = self.target / "recipe.yaml"
        with suppress(RecipeError):
            if file.is_file() and Recipe.read(file).sha256() == self.recipe.sha256():
                return file.read_text(encoding="utf-8")
        return self.recipe.to_yaml()

    def _made(self, finished: Finished) -> tuple[list[Anchor], list[Link]]:
        """A finished chain's anchors and links, once its files are what they were."""
        finished.check_unchanged()  # since it was opened, by a process that was before this one
        self.progress(f"{self.target} has {', '.join(finished.names)}, which stay")
        anchors = finished.anchors()
        self.builder.know(anchors)
        for place, anchor in enumerate(anchors if self.same_bytes is not None else []):  # anew: the bytes are those that the new anchors' tokenizers read too
            entries = [
                entry.model_copy(update={"bits_per_byte": self._bits(anchor.name, None)}) if entry.dataset == self.dataset else entry for entry in anchor.evaluations
            ]
            anchors[place] = anchor.model_copy(update={"evaluations": entries})
        return anchors, list(finished.chain.manifest.links)

    def _clear(self) -> None:
        """Remove what a run that was killed while it wrote has left: by the names under which it writes, and nothing else that is hidden."""
        names = [self.teacher_name, *(stage.name for stage in self.stages)]
        ours = {
            self.target: ("recipe.yaml", "README.md", "config.json", "chain.json", *TOKENIZER_FILES), self.target / "anchors": (*names, *(f"{name}.{METRICS}" for name in names)),
            self.target / "chunks": tuple(f"{name}.json" for name in names),
        }
        for folder, files in ours.items():
            for path in (path for name in files for path in folder.glob(f".{name}.*{ASIDE}")):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _load(self, name: str) -> Any:
        return load_model(self.builder.anchor_folder(name), torch.float32).to(best_device())

    def _remembered(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A small result, made once and kept in the work folder."""
        path = self.work / f"{key}.json"
        if not path.is_file():
            self._remember(key, make())
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def _remember(self, key: str, result: Mapping[str, Any]) -> None:
        write_text(self.work / f"{key}.json", json.dumps(result))

    def _evaluation(self, model: Any, name: str) -> dict[str, Any]:
        documents = self.calibrations[self._place(name)].documents
        losses = model_losses(model, documents)
        if not math.isfinite(losses.mean):
            raise TrainingError(f"a model of {self.target} has the loss {losses.mean} on the calibration text; lower learning_rate, or look at the weights")
        entry = Evaluation(loss=losses.mean, stderr=losses.stderr, tokens=int(losses.tokens.sum()), dataset=self.dataset)
        return entry.model_dump()

    def _bits(self, name: str, model: Any) -> float | None:
        """Bits per byte of an anchor, loaded where no model is given, on the bytes that all of the chain's tokenizers read; None without a bridge."""
        if self.same_bytes is None:
            return None
        same = self.same_bytes

        def measure() -> dict[str, Any]:
            loaded = self._load(name) if model is None else model
            with frozen(loaded):
                losses = same.losses(ModelRunner(loaded), self.tokenizers[self._place(name)])
            return {"bits_per_byte": losses.mean * BITS}

        bits: float = self._remembered(f"{name}.bits-{fingerprint(same.documents)[:16]}", measure)["bits_per_byte"]
        return bits

    def _teacher(self) -> Anchor:
        name = self.teacher_name
        folder = self.builder.anchor_folder(name)
        self.begun.note(name)
        if not folder.exists():
            self.progress(f"teacher: {self.recipe.teacher} becomes anchor {name}")
            with staged_folder(folder) as staging:
                copy_checkpoint(self.source, staging)
                settle_tokenizer(staging)
        entry = self._remembered(f"{name}.evaluation", lambda: self._evaluation(self._load(name), name))
        return self.builder.record(name, origin="source", evaluations=[Evaluation(**{**entry, "bits_per_byte": self._bits(name, None)})])

    def _anchor(self, stage: Stage, large: Any, anchors: list[Anchor]) -> tuple[Any, Cut | None, Importance | None]:
        """Make one anchor, or pick it up where it was; it is added to ``anchors``."""
        parent = anchors[-1]
        self.begun.note(stage.name)
        cut = importance = None
        maps: PathRecord | None = None
        folder = self.builder.anchor_folder(stage.name)
        if stage.checkpoint is not None and stage.size is not None and not stage.bridged:  # only now is the shape above it known for sure
            source = resolve_checkpoint(stage.checkpoint)
            check_pair(parent.parameters, self.builder.anchor_folder(parent.name), large.config, stage.size, source, read_config(source))
        if stage.own:
            importance = measure_importance(large, self.calibrations[self._place(stage.name)].blocks)
            cut = self._cut(stage, large, importance, parent)
            maps = self.builder.save_kept(stage.name, cut.kept)
        if not folder.exists():
            self._train(stage, large, cut, importance, folder, parent)
            gc.collect()  # trainer and student refer to themselves, and an accelerator's memory is wanted for what comes next
        small = self._load(stage.name)
        entry = self._remembered(f"{stage.name}.evaluation", lambda: self._evaluation(small, stage.name))
        result = json.loads((self.work / f"{stage.name}.training.json").read_text())
        begun_as = stage.checkpoint if stage.start is None else stage.start.folder
        anchors.append(self.builder.record(
            stage.name, license=None if begun_as is None else license_of(resolve_checkpoint(begun_as)), origin=stage.origin, parent=None if cut is None else parent.name, maps=maps,
            training=Training(tokens=result["tokens"], loss=result["loss"], recipe_sha256=self.recipe.sha256(), objective=result.get("objective")),
            evaluations=[Evaluation(**{**entry, "bits_per_byte": self._bits(stage.name, small)})],
        ))
        return small, cut, importance

    def _cut(self, stage: Stage, large: Any, importance: Importance, parent: Anchor) -> Cut:
        """The stage's cut; the choice of its shape is remembered, and so are the units that an anchor kept: where a run goes on elsewhere importance may order them otherwise."""
        assert stage.size is not None
        size, wish = stage.size, stage.shape

        def choose() -> dict[str, Any]:
            if wish is None:
                self.progress(f"{stage.name}: which mix of layers and FFN loses least")
            cut = choose_cut(large, size, importance, self.calibrations[self._place(stage.name)].blocks, name=parent.name, wish=wish)
            for shape, loss in sorted(cut.tried.items(), key=lambda entry: entry[1]):
                self.progress(f"  {shape.text:<22}{loss:.3f} nats untrained")
            return {"shape": cut.plan.shape.model_dump()}

        shape = Shape(**self._remembered(f"{stage.name}.cut", choose)["shape"])
        if shapes.count(shape, large.config) >= parent.parameters:
            raise RecipeError(f"anchor {stage.wish} comes out as large as the one above it ({format_size(parent.parameters)}); ask for a smaller one")
        return Cut.of(large, shape, importance, parent.name, self.builder.kept(stage.name))

    def _beginning(self, stage: Stage, parent: Anchor) -> Any:
        """The untrained student of a stage that is not cut from the anchor above it."""
        if stage.start is None:
            return load_model(resolve_checkpoint(str(stage.checkpoint)), torch.float32)
        if stage.start.folder is None:
            return stage.start.random_model()
        whole = load_model(stage.start.folder, torch.float32).to(best_device())
        importance = measure_importance(whole, self.calibrations[self._place(stage.name)].blocks)
        return self._cut_student(stage, whole, self._cut(stage, whole, importance, parent))

    def _cut_student(self, stage: Stage, whole: Any, cut: Cut) -> Any:
        """The untrained student of a stage that is cut; not fitted where a checkpoint brings its weights."""
        if last_checkpoint(self.work / stage.name) is not None:
            return cut_model(whole, cut.plan)
        tokenizer = self.tokenizers[self._place(stage.name)]
        return untrained(self.recipe, whole, cut.plan, self.parts, tokenizer, lambda line: self.progress(f"{stage.name}: {line}"))

    def _train(self, stage: Stage, large: Any, cut: Cut | None, importance: Importance | None, folder: Path, parent: Anchor) -> None:
        run_dir = self.work / stage.name
        set_seed(self.recipe.seed)
        student = self._beginning(stage, parent) if cut is None else self._cut_student(stage, large, cut)
        kept: Kept | None = None if cut is None else cut.kept
        order = None if cut is None or importance is None else importance.order(cut.kept)
        arguments = stage.config(str(run_dir), self.recipe.seed)
        rows, text = self.rows[stage.name]
        place = self._place(stage.name)
        tokenizer = self.tokenizers[place]
        trainer = ChainDistiller(
            model=student, teacher=large, args=arguments, train_dataset=rows, processing_class=tokenizer, kept=kept, order=order,
            text_dataset=text, teacher_processing_class=self.tokenizers[place - 1] if stage.bridged else None,
        )
        show_stage(trainer, stage.name)
        last = last_checkpoint(run_dir)
        self.progress(f"{stage.name}: {'goes on from ' + Path(last).name if last else 'learns'}, {arguments.max_steps} steps")
        started = time.monotonic()
        large.to("cpu" if arguments.teacher_cache is not None else arguments.device)  # where a cache stands in its place, an accelerator's memory is the student's
        trainer.train(resume_from_checkpoint=last)
        if trainer.state.global_step < arguments.max_steps:
            with self.recipe.at(stage.anchor):
                raise RecipeError(
                    f"max_steps={arguments.max_steps} could not be taken, but {trainer.state.global_step}: the text gives no more batches; lower per_device_train_batch_size, or leave dataloader_drop_last out "
                    f"(stage of anchor {stage.wish})"
                )
        large.to(best_device())
        tokens = int(trainer.state.num_input_tokens_seen)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]  # a checkpoint keeps it
        self._remember(f"{stage.name}.training", {
            "tokens": tokens, "loss": losses[-1] if losses else None, "seconds": time.monotonic() - started, "objective": "; ".join(arguments.facts().values()),
        })
        student = trainer.accelerator.unwrap_model(trainer.model)
        write_text(self.builder.anchor_folder(f"{stage.name}.{METRICS}"), (run_dir / METRICS).read_text() if (run_dir / METRICS).is_file() else "")
        with staged_folder(folder) as staging:
            student.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        shutil.rmtree(run_dir, ignore_errors=True)

    def _link(
        self, stage: Stage, small: Any, large: Any, cut: Cut | None, importance: Importance | None, anchors: list[Anchor]
    ) -> Link:
        names = (anchors[-1].name, anchors[-2].name)
        if stage.bridged:
            return Link(kind="bridge", small=names[0], large=names[1])

        def report(what: str, done: int, total: int | None) -> None:
            self.progress(f"  {what}{'' if total is None else f', {done + 1} of {total}'}")

        def measure() -> dict[str, Any]:
            self.progress(f"{names[0]} to {names[1]}: order, alpha and curve of the segment")
            documents = self.calibrations[self._place(stage.name)].documents
            if cut is not None and importance is not None:
                return measure_segment(small, large, cut.kept, documents, self.dataset, names=names, first=importance.order(cut.kept), report=report).link().model_dump()
            self.builder.maps_file(names[0]).unlink(missing_ok=True)  # of a run that was killed meanwhile
            kept = cut_from(resolve_checkpoint(str(stage.checkpoint)), names[1], lambda: small, lambda: large) if self.recipe.align else None
            fitted = documents if kept is not None or not self.recipe.align else training_blocks(
                self.parts, self.tokenizers[self._place(stage.name)], self.recipe.data.block_size, FIT_TOKENS
            )
            joined = measured_pair(names, small, large, kept, self.recipe.align, Calibration(fitted, documents), self.dataset, report)
            if joined.kept is not None:
                self.builder.save_kept(names[0], joined.kept, joined.maps)
            return joined.link.model_dump()

        link = Link(**self._remembered(f"{stage.name}.link", measure))
        if cut is None and self.builder.maps_file(names[0]).is_file():
            aligned = link.strategies.blend is not None and link.strategies.blend.align is not None
            anchors[-1] = anchors[-1].model_copy(update={"parent": names[1], "maps": self.builder.maps_record(names[0]), **({} if aligned else {"origin": "cut"})})
        return link
