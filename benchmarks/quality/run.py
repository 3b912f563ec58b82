"""How good the sizes in between are: four segments under one teacher, against everything else that gives such a model.

    python benchmarks/quality/run.py --demo demo --work quality [--only depth --only "least loss"] [--steps 195] [--share 0.5] [--free] [--seeds 3 | --seed 2 | --scratch 10]

The teacher, text and split are those of `make demo`. Anchors of the same size are cut from the teacher (in depth, in FFN width, in hidden width, and
as the least-loss cut chooses) and distilled alike, that of hidden width with a fifth of its steps on the path, as recipes do, and without, those of least loss and of FFN width without, as recipes do, and with; at a quarter, half and three quarters of each segment the chain's model is compared with the chord of
its two ends, the smaller neighbour, the same shape merely cut, LaCo, weight selection and boomerang distillation; in the middle also with a student distilled for that shape alone, and
after the same heal of all of them, `cbd heal`'s loss and learning rate on a 20th of the stage's steps from the teacher, where that is more than warm-up (5 steps). ``--seeds`` repeats the middle of each segment, its student of its own and, but for hidden width, where it has no goal to meet, the improved boomerang, with other seeds;
``--seed`` does so alone, beside what is there. ``--scratch`` compares the middle, before and after that heal, with a model of its shape from random weights and nothing else: cross-entropy on so many times a stage's tokens.
Held-out loss in nats per token, differences paired over documents. Every model and every loss is kept in ``--work``: a run that was stopped goes on.
Writes benchmarks/results/quality.json, or quality_scratch.json there, after each segment; other segments of earlier runs stay in it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from cbd_hub import Chain, ChainDistiller, ChainDistillerConfig, Recipe
from cbd_hub.cut import Cut, choose_cut, cut_model, cut_plan, measure_importance
from cbd_hub.distill.heal import LEARNING
from cbd_hub.distill.stages import CALIBRATION_TOKENS, HIDDEN_PATH, read_parts, untrained
from cbd_hub.evaluation import Calibration, Documents, Losses, document_losses
from cbd_hub.files import staged_folder
from cbd_hub.interpolation.live import Between, ModelRunner, frozen
from cbd_hub.interpolation.patch import patch_plan
from cbd_hub.interpolation.plan import Kept, Plan, Segment
from cbd_hub.interpolation.planner import segment_plan
from cbd_hub.manifest import Link, Shape
from cbd_hub.measure import SHARES, best_order, measure_segment
from cbd_hub.precision import has_bf16
from cbd_hub.shapes import count, shape_of
from cbd_hub.weights import load_model


sys.path.insert(0, str(Path(__file__).parent.parent))
from measuring import write
from rivals import collapsed, selected


SEGMENTS: dict[str, dict[str, int] | int] = {
    "least loss": 99_000_000, "least loss, path": 99_000_000, "depth": {"layers": 20}, "ffn": {"ffn": 848}, "ffn, path": {"ffn": 848},
    "hidden": {"hidden": 423}, "hidden, no path": {"hidden": 423},
}
PATH = dict.fromkeys(("hidden", "least loss, path", "ffn, path"), HIDDEN_PATH)  # the share of the anchor's steps on the path: recipes have it where hidden width moves
HEAL = 0.05  # of a stage's steps
SCRATCH_RATE = 1e-3  # of AdamW, as in headline.py; not searched
LEAST_HEAL = 5  # steps; with fewer a schedule with warm-up has hardly begun
BOOMERANG: dict[str, Any] = {"ce_weight": 1.0, "kd_weight": 0.1, "hidden_weight": 2.0}
console = Console(width=150)


class Bench:
    """Models and losses of one work folder; each is made once."""

    def __init__(self, demo: Path, work: Path, steps: int, heldout_tokens: int) -> None:
        chain = Chain.from_pretrained(demo / "chain")
        self.recipe, self.work, self.steps = Recipe.read(demo / "chain" / "recipe.yaml"), work, steps
        self.parts, self.tokenizer = read_parts(self.recipe), chain.tokenizer()
        self.rows, block = self.parts.rows(), self.recipe.data.block_size
        self.heldout = Documents.read(self.parts.heldout, self.tokenizer, block, heldout_tokens)
        self.calibration = Calibration.read(self.parts.calibration, self.tokenizer, block, CALIBRATION_TOKENS)
        self.teacher = chain.model("max", dtype=torch.float32)
        self.whole = shape_of(self.teacher.config)
        for folder in ("models", "losses", "segments"):
            (work / folder).mkdir(parents=True, exist_ok=True)
        record, made_by = work / "made_by.json", {"recipe": self.recipe.model_dump(mode="json"), "steps": steps, "heldout_tokens": heldout_tokens}
        if record.is_file() and json.loads(record.read_text()) != made_by:
            raise SystemExit(f"{work} holds models and losses of another recipe, number of steps or held-out tokens; give another --work")
        record.write_text(json.dumps(made_by, indent=1))

    @property
    def heal_steps(self) -> int:
        """Steps of a heal."""
        return round(HEAL * self.steps)

    @functools.cached_property
    def blocks(self) -> Documents:
        """The training text, packed."""
        return Documents.packed(self.parts.train, self.tokenizer, self.recipe.data.block_size, 10**9)

    @functools.cached_property
    def importance(self) -> Any:
        """Importance of the teacher's units on calibration text."""
        return measure_importance(self.teacher, self.calibration.blocks)

    def trained(self, name: str, start: Callable[[], Any], *, steps: int | None = None, seed: int = 0, **options: Any) -> Any:
        """A student that learned from the teacher, by the recipe's settings where ``options`` do not say otherwise."""
        folder = self.work / "models" / name.replace("/", ", ")
        if not folder.is_dir():
            wired = {key: options.pop(key) for key in ("kept", "order") if key in options}
            transformers.set_seed(seed)
            stage = {**self.recipe.stage_arguments(self.recipe.anchors[0]), "max_steps": steps or self.steps, "save_strategy": "no", "report_to": "none", **options}
            console.print(f"{name}: {stage['max_steps']} steps")
            student = start().requires_grad_(True)
            with tempfile.TemporaryDirectory() as temporary:
                arguments = ChainDistillerConfig(temporary, seed=seed, **{"disable_tqdm": True, **stage})
                ChainDistiller(
                    model=student, teacher=self.teacher, args=arguments, train_dataset=self.rows, processing_class=self.tokenizer, **wired
                ).train()
            with staged_folder(folder) as staging:
                student.save_pretrained(staging)
        return load_model(folder, torch.float32)

    def losses(self, name: str, run: Callable[[], Any]) -> Losses:
        """Held-out losses of what ``run`` gives: a model, or a runner."""
        def measured() -> Losses:
            found = run()
            with frozen(self.teacher):
                losses = document_losses(ModelRunner(found.eval()) if isinstance(found, torch.nn.Module) else found, self.heldout)
            console.print(f"{name}: {losses.mean:.4f}")
            return losses

        return Losses.kept(self.work / "losses" / f"{name.replace('/', ', ')}.npz", measured)

    def cut(self, name: str) -> Cut:
        """The cut from the teacher that begins a segment's anchor."""
        wish = SEGMENTS[name]
        if isinstance(wish, int):
            path = self.work / "segments" / f"{_kind(name)}.shape.json"
            if not path.is_file():
                chosen = choose_cut(self.teacher, wish, self.importance, self.calibration.blocks)
                path.write_text(chosen.plan.shape.model_dump_json())
            shape = Shape.model_validate_json(path.read_text())
        else:
            shape = self.whole.model_copy(update=wish)
        return Cut.of(self.teacher, shape, self.importance, "teacher")

    def begun(self, plan: Plan) -> Any:
        """A cut of the teacher as a recipe begins with it."""
        return untrained(self.recipe, self.teacher, plan, self.parts, self.tokenizer)

    def anchor(self, name: str, seed: int = 0) -> Any:
        """A segment's smaller end."""
        cut = self.cut(name)
        return self.trained(
            f"{name}/anchor{_suffix(seed)}", lambda: self.begun(cut.plan), seed=seed, kept=cut.kept, order=self.importance.order(cut.kept),
            path_fraction=PATH.get(name, 0.0),
        )

    def alone(self, name: str, cut: Plan, seed: int = 0) -> tuple[Losses, Callable[[], Any]]:
        """A student distilled for the middle of a segment alone, and how to make it."""
        named = f"{_kind(name)}/0.5/alone, {cut.shape.text}{_suffix(seed)}"
        made = functools.partial(self.trained, named, functools.partial(self.begun, cut), seed=seed)
        return self.losses(named, made), made

    def scratch(self, name: str, plan: Plan, times: int) -> tuple[Losses, Callable[[], Any]]:
        """A model of the middle's shape from random weights, by cross-entropy on so many times a stage's tokens, and how to make it."""
        named = f"{_kind(name)}, 0.5, scratch, {times}x"
        folder, training = self.work / "models" / named, self.work / "training" / named

        def made() -> Any:
            if not folder.is_dir():
                transformers.set_seed(0)
                model = type(self.teacher)(plan.config(self.teacher.config))
                arguments = TrainingArguments(
                    str(training), max_steps=times * self.steps, per_device_train_batch_size=8, learning_rate=SCRATCH_RATE, lr_scheduler_type="cosine", warmup_steps=times * self.steps // 20,
                    bf16=has_bf16(self.teacher.device.type), save_steps=100, save_total_limit=1, report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
                )
                console.print(f"{named}: {arguments.max_steps} steps")
                rows = [{"input_ids": block, "labels": block} for block in self.blocks.ids]
                Trainer(model=model, args=arguments, train_dataset=rows).train(resume_from_checkpoint=get_last_checkpoint(training) if training.is_dir() else None)
                with staged_folder(folder) as staging:
                    model.save_pretrained(staging)
                shutil.rmtree(training)
            return load_model(folder, torch.float32)

        return self.losses(named, made), made

    def healed(self, name: str, start: Callable[[], Any]) -> Losses:
        """Losses of a model after a short distillation from the teacher, by the loss and the learning rate of `heal`."""
        named = f"{name}/healed by {', '.join(f'{key} {value:g}' for key, value in LEARNING.items())}"
        return self.losses(named, lambda: self.trained(named, start, steps=self.heal_steps, **LEARNING))

    def built(self, between: Between, plan: Plan) -> Any:
        """A plan's model with weights of its own."""
        with frozen(self.teacher):
            runner = between.run(plan)
        model = type(self.teacher)(runner.config)
        model.load_state_dict(dict(runner.parameters), strict=False)
        model.tie_weights()
        return model

    def segment(self, name: str, small: Any, seed: int = 0) -> Segment:
        """A segment as the chain's publisher measures it."""
        path, cut = self.work / "segments" / f"{name}{_suffix(seed).replace('/', ', ')}.link.json", self.cut(name)
        if not path.is_file():
            measured = measure_segment(
                small, self.teacher, cut.kept, self.calibration.documents, "calibration", names=("small", "large"), first=self.importance.order(cut.kept)
            )
            path.write_text(measured.link().model_dump_json())
        link = Link.model_validate_json(path.read_text())
        return Segment(
            "small", "large", shape_of(small.config), self.whole, cut.kept, tuple(link.order), self.teacher.config, link.strategies.blend,
            link.strategies.patch is not None, tuple(link.curve),
        )

    def nearest_depth(self, size: int) -> Shape:
        """The teacher's shape at the depth nearest to a size."""
        shapes = [self.whole.model_copy(update={"layers": layers}) for layers in range(1, self.whole.layers + 1)]
        return min(shapes, key=lambda shape: abs(count(shape, self.teacher.config) - size))

    def boomerang(self, depth: Shape, low: int, layers: str = "even", *, seed: int = 0) -> tuple[Losses, Callable[[], Any]]:
        """Boomerang distillation patched to a depth, and how to make it.

        Its small model has every n-th layer (``even``), of the layers but the first every n-th beside that one (``first two``: its authors keep both in a Llama), or those of most ``influence``, which
        come back in the best order; the others from the last on or, of ``first two``, from the first. Of both embeddings and orders the best on the held-out text, in its favour.
        """
        small = self.nearest_depth(low)
        kept = self.importance.kept(small) if layers == "influence" else Kept.even(small, self.whole)
        if layers == "first two":
            kept = dataclasses.replace(kept, layers=np.concatenate([[0], 1 + np.rint(np.linspace(0, self.whole.layers - 2, small.layers - 1)).astype(np.int64)]))
        orders = {"influence": [self.importance.order(kept)], "even": [kept.dropped[::-1]], "first two": [kept.dropped[::-1], kept.dropped]}[layers]
        name = f"{layers}{_suffix(seed)}"
        student = self.trained(f"boomerang/{name}", lambda: cut_model(self.teacher, cut_plan("teacher", small, self.teacher, kept)), seed=seed, kept=kept, **BOOMERANG)
        between = Between({"small": student, "large": self.teacher})
        segment = Segment("small", "large", small, self.whole, kept, orders[0], self.teacher.config, patch=True)
        if layers == "influence":
            path = self.work / "segments" / f"boomerang{_suffix(seed).replace('/', ', ')}.order.json"
            if not path.is_file():
                path.write_text(json.dumps(best_order(segment, {"small": student, "large": self.teacher}, self.calibration.documents, orders[0])))
            orders = [json.loads(path.read_text())]
        found = []
        for place, order in enumerate(orders):
            plan = patch_plan(dataclasses.replace(segment, order=order), depth)
            for end in ("small", "large"):
                swapped = {key: tuple(dataclasses.replace(term, anchor=end) for term in terms) if "embed" in key else terms for key, terms in plan.tensors.items()}
                ended = dataclasses.replace(plan, tensors=swapped)
                losses = self.losses(f"boomerang/{name}/{depth.layers}/{end}{', from the first' if place else ''}", functools.partial(between.run, ended))
                found.append((losses, functools.partial(self.built, between, ended)))
        return min(found, key=lambda pair: pair[0].mean)


def _kind(name: str) -> str:
    """What is cut, whether or not steps are on the path: one shape begins both, and one student is the rival of both where their middles have one shape."""
    return name.partition(",")[0]


def _suffix(seed: int) -> str:
    return f"/seed {seed}" if seed else ""


def rows_of(bench: Bench, name: str, shares: Sequence[float], free: bool) -> Iterator[dict[str, Any]]:
    """The rows of one segment's table: each rival's loss, and its paired difference from the chain's model."""
    small = bench.anchor(name)
    segment = bench.segment(name, small)
    between = Between({"small": small, "large": bench.teacher})
    teacher = bench.losses("teacher", lambda: bench.teacher)
    anchor = bench.losses(f"{name}/anchor", lambda: small)
    low, high = segment.sizes
    text = torch.stack(bench.calibration.blocks.ids[:1])
    for share in sorted(shares, key=lambda share: share != 0.5):
        plan = segment_plan(segment, round(low + share * (high - low)))
        shape, size = plan.shape, plan.parameters
        ours = bench.losses(f"{name}/{share}/chain", functools.partial(between.run, plan))
        sliced = cut_plan("teacher", shape, bench.teacher, bench.importance.kept(shape))
        cut = functools.partial(cut_model, bench.teacher, sliced)
        weights = functools.partial(selected, bench.teacher, shape)
        depth = bench.nearest_depth(size)
        folded = [functools.partial(collapsed, bench.teacher, depth.layers, text, merged) for merged in (1, 2)]
        laco = min(((bench.losses(f"laco/{merged}/{depth.layers}", fold), fold) for merged, fold in enumerate(folded, 1)), key=lambda pair: pair[0].mean)
        rivals: dict[str, tuple[Losses, Callable[[], Any]]] = {
            "smaller neighbour": (anchor, lambda: copy.deepcopy(small)),
            "merely cut": (bench.losses(f"{name}/{share}/cut", cut), cut),
            "weight selection": (bench.losses(f"{name}/{share}/selected", weights), weights),
            "LaCo, same size": laco,
        }
        if not free:
            rivals["boomerang"] = bench.boomerang(depth, low)
            rivals["boomerang, first two layers"] = bench.boomerang(depth, low, "first two")
            rivals["boomerang, improved"] = bench.boomerang(depth, low, "influence")
            if share == 0.5:
                rivals["distilled alone"] = bench.alone(name, sliced)
        weight = math.log(high / size) / math.log(high / low)
        chord = ours.minus((weight, anchor), (1 - weight, teacher))
        yield {**row(name, size, plan.strategy, shape, ours, {rival: losses for rival, (losses, _) in rivals.items()}), "share": share, "to_chord": chord}
        if free or share != 0.5 or bench.heal_steps < LEAST_HEAL:
            continue
        healed = bench.healed(f"{name}/{share}/chain", functools.partial(bench.built, between, plan))
        after = {rival: bench.healed(f"{name}/{share}/{rival}", make) for rival, (_, make) in rivals.items()}
        yield {**row(name, size, f"{plan.strategy}, healed", shape, healed, after), "share": share, "heal": LEARNING}


def middle(bench: Bench, name: str, seed: int = 0) -> tuple[Any, tuple[int, int], Plan, Between]:
    """A segment's smaller end, the sizes of both, the plan of its middle and what runs it."""
    small = bench.anchor(name, seed)
    segment = bench.segment(name, small, seed)
    low, high = segment.sizes
    return small, (low, high), segment_plan(segment, round(low + 0.5 * (high - low))), Between({"small": small, "large": bench.teacher})


def again(bench: Bench, name: str, seed: int, free: bool) -> dict[str, Any]:
    """The middle of a segment with another seed."""
    small, (low, high), plan, between = middle(bench, name, seed)
    teacher = bench.losses("teacher", lambda: bench.teacher)
    ours = bench.losses(f"{name}/0.5/chain{_suffix(seed)}", functools.partial(between.run, plan))
    anchor = bench.losses(f"{name}/anchor{_suffix(seed)}", lambda: small)
    weight = math.log(high / plan.parameters) / math.log(high / low)
    chord = ours.minus((weight, anchor), (1 - weight, teacher))
    others = {"smaller neighbour": anchor}
    if not free:
        cut = cut_plan("teacher", plan.shape, bench.teacher, bench.importance.kept(plan.shape))
        others["distilled alone"], _ = bench.alone(name, cut, seed)
        if _kind(name) != "hidden":
            others["boomerang, improved"], _ = bench.boomerang(bench.nearest_depth(plan.parameters), low, "influence", seed=seed)
    return {**row(name, plan.parameters, f"{plan.strategy}, seed {seed}", plan.shape, ours, others), "share": 0.5, "to_chord": chord}


def from_scratch(bench: Bench, name: str, times: int) -> Iterator[dict[str, Any]]:
    """The middle of a segment against training from scratch, before and after a heal of both."""
    _, _, plan, between = middle(bench, name)
    rival = f"from scratch, {times}x"
    losses, make = bench.scratch(name, plan, times)
    ours = bench.losses(f"{name}/0.5/chain", functools.partial(between.run, plan))
    yield {**row(name, plan.parameters, plan.strategy, plan.shape, ours, {rival: losses}), "share": 0.5}
    if bench.heal_steps >= LEAST_HEAL:
        healed = bench.healed(f"{name}/0.5/chain", functools.partial(bench.built, between, plan))
        after = {rival: bench.healed(f"{name}/0.5/{rival}", make)}
        yield {**row(name, plan.parameters, f"{plan.strategy}, healed", plan.shape, healed, after), "share": 0.5, "heal": LEARNING}


def row(segment: str, size: int, by: str, shape: Shape, ours: Losses, rivals: dict[str, Losses]) -> dict[str, Any]:
    """One size as plain data."""
    return {
        "segment": segment, "parameters": size, "by": by, "shape": shape.model_dump(), "loss": ours.mean, "stderr": ours.stderr,
        "rivals": {name: {"loss": losses.mean, "minus": losses.minus((1.0, ours))} for name, losses in rivals.items()},
    }


def main() -> None:
    """Make what is missing, and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--work", type=Path, default=Path("quality"))
    parser.add_argument("--only", action="append", choices=list(SEGMENTS), help="a segment; all by default")
    parser.add_argument("--steps", type=int, default=195, help="of 8 x 128 tokens: 200k tokens by default")
    parser.add_argument("--share", action="append", type=float, choices=SHARES, help="of the way up a segment; a quarter, half and three quarters by default")
    parser.add_argument("--heldout-tokens", type=int, default=16000)
    parser.add_argument("--free", action="store_true", help="only rivals that need no training")
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--seeds", type=int, default=1, help="the middle of each segment again with other seeds")
    alone.add_argument("--seed", type=int, help="only the middle of each segment, again with this seed")
    alone.add_argument("--scratch", type=int, default=0, metavar="TIMES", help="only the middle, against training from random weights on so many times a stage's tokens")
    parser.add_argument("--out", type=Path, help="benchmarks/results/quality.json, or quality_scratch.json there, where it is not given")
    options = parser.parse_args()
    out: Path = options.out or Path(f"benchmarks/results/quality{'_scratch' if options.scratch else ''}.json")
    bench = Bench(options.demo, options.work, options.steps, options.heldout_tokens)
    for name in options.only or SEGMENTS:
        if options.scratch:
            made = list(from_scratch(bench, name, options.scratch))
        elif options.seed:
            made = [again(bench, name, options.seed, options.free)]
        else:
            made = [*rows_of(bench, name, options.share or SHARES, options.free), *(again(bench, name, seed, options.free) for seed in range(1, options.seeds))]
        found = sorted(made, key=lambda entry: entry["parameters"])
        table = Table("segment", "size", "by", "loss", "to chord", "rivals (their loss minus the chain's)", title_justify="left")
        for entry in found:
            rivals = ", ".join(f"{name} {rival['minus'][0]:+.3f} ± {rival['minus'][1]:.3f}" for name, rival in entry["rivals"].items())
            chord = "{:+.3f} ± {:.3f}".format(*entry["to_chord"]) if "to_chord" in entry else ""
            table.add_row(entry["segment"], f"{entry['parameters']:,}", entry["by"], f"{entry['loss']:.3f} ± {entry['stderr']:.3f}", chord, rivals)
        console.print(table)
        rows = json.loads(out.read_text())["rows"] if out.is_file() else []
        new = {entry["by"] for entry in found} if options.seed else None  # a seed's row takes the place of its own alone, all else that of the segment's
        kept = [entry for entry in rows if entry["segment"] != name or (new is not None and entry["by"] not in new)]
        rows = sorted(kept + found, key=lambda entry: list(SEGMENTS).index(entry["segment"]))
        write(out, {
            "stage_tokens": bench.steps * 1024, "heldout_tokens": bench.heldout.tokens, "rows": rows,
        })


if __name__ == "__main__":
    main()
