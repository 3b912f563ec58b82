"""A chain of one: any model cut by measured importance to a smaller size, without training."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from cbd_hub.ancestry import Ancestry
from cbd_hub.card_metadata import license_of
from cbd_hub.cards import cut_card
from cbd_hub.configs import read_config, read_generation_config
from cbd_hub.cut import choose_cut, cut_model, measure_importance, mixes
from cbd_hub.errors import ArgumentError, DataError, SizeError, WeightsError
from cbd_hub.evaluation import Documents, Losses, model_losses
from cbd_hub.files import public, staged_folder, write_text
from cbd_hub.hub import TOKENIZER_FILES, is_repo_id, resolve_checkpoint
from cbd_hub.interpolation.execute import stream
from cbd_hub.interpolation.live import frozen
from cbd_hub.interpolation.plan import Kept, Plan, Term
from cbd_hub.manifest import Shape
from cbd_hub.precision import best_device, quick
from cbd_hub.reconstruct import TOKENS, Target, check_target, choose_reconstructed, reconstruct
from cbd_hub.reporting import Progress
from cbd_hub.shapes import block_size, check_cut, count, fill_ffn, parameter_count, shape_of
from cbd_hub.sizes import format_size, matches, parse_size
from cbd_hub.texts import texts_of
from cbd_hub.weights import Checkpoint, load_model, load_tokenizer, stored_shapes, weights_sha256, write_safetensors
from cbd_hub.wishes import named_fields, named_shape


OWN_TEXT = "text that the model wrote itself"
_TOKENS = (512, 4096)  # least and most tokens of a trial
_WORK = 3e11  # parameters times tokens of a trial: what bounds the time
_ACCELERATED = 50  # times as much of it where there is an accelerator
_MORE = 8  # times as much text is reconstructed on
_SLACK = 0.02  # how far a shape may be from the size that came with it


@dataclass(frozen=True)
class Single:
    """A model cut to a smaller size, not yet made.

    Attributes:
        source: What the caller called the model.
        folder: Where its files are.
        plan: The cut, of the model itself and of what was fitted.
        config: Config of the model that comes out, with ``cbd`` saying where it came from.
        checkpoint: The opened weights.
        kept: Which of its units are kept.
        fitted: What was fitted to make up for what was cut, in fp32, by checkpoint keys.
        text: What importance and losses were measured on.
        tried: Calibration loss in nats per token of each shape that was tried as a mere cut.
        whole: Losses of the whole model on the held-out part of the text.
        losses: Losses of the cut there.
    """

    source: str
    folder: Path
    plan: Plan
    config: Any
    checkpoint: Checkpoint
    kept: Kept
    fitted: Mapping[str, Tensor]
    text: str
    tried: Mapping[Shape, float]
    whole: Losses
    losses: Losses

    def read(self, anchor: str, tensor: str) -> Tensor:
        """A tensor of the model, or one that was fitted."""
        return self.checkpoint[tensor] if anchor == self.source else self.fitted[tensor]

    def generation_config(self) -> transformers.GenerationConfig | None:
        """The model's own, where it has one."""
        return read_generation_config(self.folder)

    def summary(self) -> dict[str, Any]:
        """The cut as plain data; losses in nats per token."""
        return {**self.config.cbd, "shape": self.plan.shape.model_dump()}

    def save_pretrained(self, output_dir: str | os.PathLike[str]) -> None:
        """Write an ordinary checkpoint tensor by tensor, with tokenizer, generation config, card, and which units of which model were kept.

        Raises:
            StorageError: If the folder is in the way or the disk is full.
        """
        dtype = self.checkpoint.dtype
        with staged_folder(Path(output_dir)) as target:
            for name in TOKENIZER_FILES:
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, target / name)
            generation = self.generation_config()
            if generation is not None:
                generation.save_pretrained(target)
            self.config.dtype = dtype
            self.config.save_pretrained(target)
            shapes = stored_shapes(self.config)
            write_safetensors(
                target / "model.safetensors", {name: (dtype, shapes[name]) for name in self.plan.tensors}, stream(self.plan, self.read, shapes, dtype)
            )
            Ancestry(self.kept, weights_sha256(load_model(self.folder, dtype))).save(target)
            write_text(target / "README.md", cut_card(Path(output_dir).resolve().name, self.summary(), kept=True, license=license_of(self.folder)))


def cut_single(
    model: str | os.PathLike[str], size: str | int | None = None, *, shape: Shape | Mapping[str, int] | None = None, calibration: Any = None,
    target: Target | None = "stream", column: str = "text", revision: str | None = None, options: Mapping[str, Any] | None = None, progress: Progress | None = None,
) -> Single:
    """The cut of a model that loses least at a size, untrained; see `CBDModel.from_pretrained`.

    Args:
        model: Folder or Hub id.
        size: Parameters wanted.
        shape: The exact shape, whole or in part; with a size, the FFN fills the rest where it is not named.
        calibration: Text, as `CBDModel.from_pretrained` takes it.
        target: What attention and FFN are fitted to so that they make up for what was cut (`reconstruct`); None: nothing.
        column: Column of the text in files and data sets that have columns.
        revision: Branch, tag or commit of a repo.
        options: What `resolve_checkpoint` takes for the Hub.
        progress: Called with a line for each step of the work.

    Raises:
        CBDError: As `CBDModel.from_pretrained`.
    """
    say = progress or (lambda line: None)
    texts, source = (None, OWN_TEXT) if calibration is None else texts_of(calibration, column)
    folder = resolve_checkpoint(model, revision, options)
    config = read_config(folder)
    checkpoint = Checkpoint(folder, config)
    name, whole = os.fspath(model), parameter_count(config)
    wanted, wish = _wish(name, size, shape, config)
    if target is not None:
        check_target(target, (wish or shape_of(config)).hidden, shape_of(config).hidden)
    live = load_model(folder, checkpoint.dtype if quick(checkpoint.dtype) else torch.float32).to(best_device())
    work = _WORK * (1 if live.device.type == "cpu" else _ACCELERATED)
    tokens, more = (min(max(round(share * work / whole), _TOKENS[0]), most) for share, most in ((1, _TOKENS[1]), (_MORE, TOKENS)))
    if texts is None:
        say(f"{name} writes {tokens:,} tokens of text")
        fit_on, heldout = _own_text(live, tokens)
    else:
        fit_on, heldout = _split(texts, source, load_tokenizer(folder), more, tokens, block_size(config))
    before = model_losses(live, heldout)
    if not math.isfinite(before.mean):
        raise WeightsError(f"{name} has the loss {before.mean} on the held-out text in {live.dtype}, of which nothing can be chosen; look at its weights, or save them as float32 or bfloat16 where float16 is too narrow for it")
    documents = fit_on.first(tokens)
    say(f"importance on {documents.tokens:,} tokens of {source}")
    importance = measure_importance(live, documents)
    cut = choose_cut(live, wanted, importance, documents, name=name, wish=wish)
    for tried, loss in sorted(cut.tried.items(), key=lambda entry: entry[1]):
        say(f"  {tried.text:<22}{loss:.3f} nats per token")
    if target is not None and wish is None:
        cut = choose_reconstructed(cut, live, importance, fit_on, wanted, name=name, target=target, progress=say)
    plan, fitted, student = cut.plan, {}, cut_model(live, cut.plan).to(live.device)
    sliced = after = model_losses(student, heldout)
    if target is not None:
        say(f"reconstruction by {target} on {fit_on.tokens:,} tokens")
        fitted = reconstruct(student, live, plan, fit_on, target=target)
        after = model_losses(student, heldout)
        plan = replace(plan, tensors={**plan.tensors, **{key: (Term(f"{name}, {target}", key, 1.0),) for key in fitted}})
    made, (difference, error) = plan.config(config), after.minus((1.0, before))
    made.cbd = {
        "model": name if is_repo_id(name) else Path(name).resolve().name, "revision": folder.name if is_repo_id(name) else None, "strategy": "cut",
        "parameters": plan.parameters, "whole_parameters": whole, "text": public(source), "tokens": int(after.tokens.sum()), "documents": len(after.tokens),
        "loss": after.mean, "stderr": after.stderr, "whole_loss": before.mean, "difference": difference, "difference_stderr": error,
        "sliced_loss": sliced.mean, "reconstruction": target, "reconstruction_tokens": fit_on.tokens if target is not None else 0,
    }
    return Single(name, folder, plan, made, checkpoint, cut.kept, fitted, source, cut.tried, before, after)


def _wish(name: str, size: str | int | None, shape: Shape | Mapping[str, int] | None, config: Any) -> tuple[int, Shape | None]:
    """The size wanted, and the exact shape where one was given."""
    if size is None and shape is None:
        raise ArgumentError('neither size nor shape was given; ask for a size such as size="120M"')
    above, whole = shape_of(config), parameter_count(config)
    wanted = None if size is None else parse_size(size)
    if wanted is not None and (wanted >= whole or (isinstance(size, str) and matches(size, whole))):
        raise SizeError(f"{name} has {format_size(whole)} ({whole:,} parameters), and a cut is smaller; size={size!r} is not: ask for less")
    if shape is None:
        assert wanted is not None
        mixes(wanted, config)  # refused before the work, not after it
        return wanted, None
    found = named_shape(shape, above, config)
    if wanted is not None and "ffn" not in named_fields(shape):
        found = found.model_copy(update={"ffn": min(fill_ffn(wanted, found, config), above.ffn)})
    check_cut(found, above, config)
    size_found = count(found, config)
    if size_found >= whole:
        raise SizeError(f"the shape {found.text} is all of {name} ({whole:,} parameters), and a cut is smaller; ask for less of something")
    if wanted is not None and abs(size_found - wanted) > _SLACK * wanted:
        raise SizeError(f"the shape {found.text} has {size_found:,} parameters but size={size!r} was asked for ({wanted:,}); leave one of them out")
    return size_found, found


def _split(texts: Sequence[str], source: str, tokenizer: Any, chosen: int, heldout: int, block: int) -> tuple[Documents, Documents]:
    """So many tokens to choose and fit on, and so many to measure the result on; no text is in both."""
    unique = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode(errors="replace")).digest())
    half = len(unique) // 2
    if not half:
        raise DataError(f"{source} has one document, and choosing and measuring need one each; give more, separated by blank lines")
    try:
        return Documents.packed(unique[half:], tokenizer, block, chosen), Documents.read(unique[:half], tokenizer, block, heldout)
    except DataError as error:
        raise DataError(f"{source} is too short: half of it has to fill a block of {block} tokens; give a longer text") from error


def _own_text(model: Any, tokens: int) -> tuple[Documents, Documents]:
    """Text sampled from a model at temperature 1 from its first token on; the second half is held out."""
    settings, block = model.config.get_text_config(), block_size(model.config)
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    start = next((token for token in (settings.bos_token_id, *ends) if token is not None), 0)
    rows = torch.full((tokens // block, 1), start, device=model.device)
    plain = transformers.GenerationConfig(
        do_sample=True, top_k=0, min_new_tokens=block - 1, max_new_tokens=block - 1, eos_token_id=None if ends[0] is None else ends, pad_token_id=start
    )
    own = model.generation_config
    model.generation_config = plain  # what it leaves open would be the model's: an instruct model's often sharpens
    try:
        with torch.random.fork_rng(), frozen(model):
            torch.manual_seed(0)
            ids = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows)).cpu()
    finally:
        model.generation_config = own
    half = len(ids) // 2
    first, second = (Documents(tuple(part), (0,) * len(part)) for part in (ids[:half], ids[half:]))
    return first, second
