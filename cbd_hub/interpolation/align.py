"""Models without a common ancestor brought into one another's coordinates, so that their parameters can be averaged."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cbd_hub.errors import ArchitectureError, ArgumentError
from cbd_hub.families import family_of
from cbd_hub.interpolation.blend import blend_plan
from cbd_hub.interpolation.execute import combine, turned
from cbd_hub.interpolation.fitting import Fit, Residual, shared_activations, unit_orders
from cbd_hub.interpolation.live import Between, Runner, frozen
from cbd_hub.interpolation.maps import Maps, places
from cbd_hub.interpolation.plan import Kept, Segment, layer_types, small_eps
from cbd_hub.interpolation.refine import JUDGED, middle, middle_loss, refine
from cbd_hub.manifest import Mix
from cbd_hub.reporting import Report
from cbd_hub.shapes import block_size, check_positions, other_differences, shape_of
from cbd_hub.weights import LOADING, check_finite


logger = logging.getLogger(__name__)
STEPS = 120
_ACTIVATIONS = 4096  # tokens on which activations are compared: gigabytes of a real model
_PROBE = 64  # most tokens on which a fit is tried
_MOST = 1e-2  # difference of a logit on them


@dataclass(frozen=True)
class Alignment:
    """The coordinates that a smaller model shares with a larger one.

    Attributes:
        kept: The larger model's unit that each of the smaller one's stands for.
        maps: Signs, maps within heads, and of the residual stream.
        residual: ``rotation`` or (signed) ``permutation``.
        error: Largest difference of a logit between the smaller model and the same in the larger one's coordinates, on random tokens.
    """

    kept: Kept
    maps: Maps
    residual: Residual
    error: float


def align(model: Any, reference: Any, calibration: Sequence[Tensor] | None = None) -> Any:
    """The same function in the reference's coordinates, or with tied heads one near it: its order of channels, heads and neurons, its signs, its widths.

    What leaves a transformer's function alone is used to bring one trained model as near as it goes to another: FFN neurons and heads in another
    order (whole groups that share a kv head, then the query heads inside), the sign of a gated neuron's linear half, orthogonal maps of each head's
    values, rotations of each frequency's pair in queries and keys (any orthogonal map without rotary positions, none under norms of queries and
    keys), and on the residual stream an orthogonal map with the gains of norms folded into what reads them; a signed permutation where heads are
    tied or blocks normalise what they write, and an unsigned one where norms subtract the mean (an orthogonal one that keeps the mean where widths
    agree). Fitted on weights by assignment and Procrustes in turns; with text also on activations, and the orthogonal maps then by gradient
    (https://huggingface.co/papers/2506.22712). With text tied heads get an orthogonal map too where that loses less half way, though norm gains cannot be folded away
    exactly there: a warning says by how much the logits move. A quarter of the text, at most 16 rows, is not fitted on: the gradient goes as far as that loses less.

    Args:
        model: A transformers model, in no dimension larger than the reference.
        reference: A model of the same architecture and vocabulary.
        calibration: Token ids, equally long, shape (T,) each: text on which activations are compared, on 4,096 tokens at most, and maps fitted by gradient,
            from 4 rows on, on all.

    Returns:
        A model of the reference's widths and the model's own depth.

    Raises:
        ArchitectureError: If they differ in more than depth and widths.
        ManifestError: If the model is larger somewhere, of another head size or vocabulary, or their layers' types allow no map.
        ArgumentError: If one is no transformers model, or the calibration no list of equally long token ids that both can read.
        WeightsError: If a weight is no finite number.

    Example:
        >>> aligned = align(small, large, documents.ids)  # doctest: +SKIP
    """
    found = fit(model, reference, calibration)
    if found.error > _MOST:
        logger.warning("the aligned model computes nearly what the model did: on random tokens its logits differ by %.2g at most", found.error)
    return apply(found, model, reference)


def fit(
    model: Any, reference: Any, calibration: Sequence[Tensor] | None = None, *, residual: Residual | None = None, steps: int = STEPS,
    order: Kept | None = None, report: Report | None = None,
) -> Alignment:
    """How a model is brought into a reference's coordinates; see `align`.

    Args:
        model: The smaller model.
        reference: The larger one.
        calibration: Token ids, equally long.
        residual: Kind of the map of the residual stream; by default the richest that is exact, and for tied heads what loses less half way on the text.
        steps: Gradient steps on the text after the fit, at most.
        order: The reference's units in the order in which those that the model has not come back in between; see `Fit`.
        report: Called with what is done, how much of it, and of how much.
    """
    for name, one in (("model", model), ("reference", reference)):
        if not isinstance(one, PreTrainedModel):
            raise ArgumentError(f"the {name} to align is {type(one).__name__}; give a loaded transformers model")
    model, reference = (_exact(one, reference.device) for one in (model, reference))
    family = family_of(model.config)
    if family is not family_of(reference.config):
        raise ArchitectureError(f"a {family.name} and a {family_of(reference.config).name} are of two architectures; only models of one can be aligned")
    differs = [name for name in other_differences(model.config, reference.config) if name != family.norm_eps]
    if differs:
        raise ArchitectureError(
            f"the model and the reference differ in {', '.join(differs[:4])}; only models that agree in all but layers and widths can be aligned"
        )
    small, large = shape_of(model.config), shape_of(reference.config)
    Kept.even(small, large, layer_types(model.config, reference.config)).check(small, large)
    if calibration is not None:
        _check_calibration(calibration, model.config, reference.config)
        calibration = list(calibration)
    check_finite(model, "the model")
    check_finite(reference, "the reference")
    models = {"small": model, "large": reference}
    with frozen(model, reference):
        watched = () if calibration is None else calibration[: min(JUDGED, len(calibration) // 4)]
        ids = None if calibration is None else calibration[len(watched) :]
        few = None if ids is None else ids[: max(1, _ACTIVATIONS // len(ids[0]))]
        fitted = Fit(model, reference, None if few is None else shared_activations(model, reference, few), residual, order)
        best = _tried(fitted, model, reference, report)
        if ids is None:
            return best
        if residual is None and fitted.residual == "permutation" and "rotation" in fitted.choices:
            other = _tried(fitted.again("rotation"), model, reference, report)
            best = min((best, other), key=lambda one: middle_loss(segment_with(one, model, reference), models, watched or ids))
        fitted.acts = None  # gigabytes of a real model
        if steps and watched:
            maps = refine(
                segment_with(best, model, reference), models, ids, watched, steps=steps, rotary_width=fitted.rotary_width, centred=fitted.family.centred,
                report=report,
            )
            best = replace(best, maps=maps)
            best = replace(best, error=_error(best, model, reference))
    return best


def _exact(model: Any, device: torch.device) -> Any:
    """The model where it computes in fp32 or wider on a device, else a copy that does."""
    if model.device == device and torch.finfo(model.dtype).bits >= 32:
        return model
    return copy.deepcopy(model).to(device=device, dtype=torch.promote_types(model.dtype, torch.float32))


def _check_calibration(calibration: Sequence[Tensor], *configs: Any) -> None:
    """Refuse what is no list of equally long token ids that models of both configs can read."""
    first = calibration[0] if len(calibration) and isinstance(calibration[0], Tensor) else None
    if first is None or first.dim() != 1 or any(not isinstance(ids, Tensor) or ids.shape != first.shape for ids in calibration):
        raise ArgumentError("calibration for alignment is a list of token ids, tensors of one length; give Documents.packed(texts, tokenizer, 128).ids, or None")
    kinds = sorted({str(ids.dtype) for ids in calibration if ids.dtype not in (torch.int64, torch.int32)})
    if kinds:
        raise ArgumentError(f"calibration for alignment is of {kinds[0]}; token ids are of torch.int64 or torch.int32")
    if len(first) < 2:
        raise ArgumentError(f"calibration for alignment has rows of length {len(first)}; give two tokens or more, such as 128")
    low, high = min(int(ids.min()) for ids in calibration), max(int(ids.max()) for ids in calibration)
    for config in configs:
        if low < 0 or high >= shape_of(config).vocab:
            raise ArgumentError(f"calibration for alignment holds the token id {low if low < 0 else high}, and the vocabulary has {shape_of(config).vocab:,}; use the models' tokenizer")
        check_positions(len(first), config, f"a row of {len(first):,} tokens")


def _tried(fitted: Fit, model: Any, reference: Any, report: Report | None = None) -> Alignment:
    fitted.run(report)
    found = Alignment(*fitted.result(), fitted.residual, 0.0)
    found = replace(found, error=_error(found, model, reference))
    if found.error > _MOST and found.maps.queries is not None:  # an architecture whose positions are of another kind
        other = replace(found, maps=replace(found.maps, queries=None))
        other = replace(other, error=_error(other, model, reference))
        found = other if other.error < _MOST else found
    return found


def brings_nearer(alignment: Alignment, model: Any, reference: Any, loss: Callable[[Runner], float] | None = None) -> bool:
    """Whether an alignment brings two models nearer than their own coordinates, layers mapped evenly.

    With a loss: whether the blend half way between them has less of it. Without: whether their weights lie nearer to each other.
    """
    kept = Kept.even(shape_of(model.config), shape_of(reference.config), layer_types(model.config, reference.config))
    segments = [segment_with(one, model, reference) for one in (alignment, Alignment(kept, Maps(), "permutation", 0.0))]
    models = {"small": model, "large": reference}
    with frozen(model, reference):
        aligned, plain = (_distance(one, models) if loss is None else loss(Between(models).run(middle(one, 0.5))) for one in segments)
    return aligned < plain


def is_cut_by(kept: Kept, model: Any, reference: Any) -> bool:
    """Whether a smaller model's weights lie nearer to the units of the larger one that it is said to have been cut from than to the same with all neurons exchanged."""
    models, exchanged = {"small": model, "large": reference}, replace(kept, ffn=np.roll(kept.ffn, 1, axis=1))
    near, far = (_distance(segment_with(Alignment(one, Maps(), "permutation", 0.0), model, reference), models) for one in (kept, exchanged))
    return near < 0.95 * far


@torch.no_grad()
def _distance(segment: Segment, models: dict[str, Any]) -> float:
    """Mean over tensors of 1 - cosine between the two models' values in the smaller one's shape."""
    live = {name: family_of(segment.config).parameters(model) for name, model in models.items()}
    plans = [blend_plan(segment, segment.small_shape, Mix(alpha=alpha)).tensors for alpha in (1.0, 0.0)]
    pairs = [[combine(tensors[name], live).flatten() for tensors in plans] for name in plans[0] if live["small"][name].dim() > 1]
    return 1 - sum(torch.cosine_similarity(ours, theirs, dim=0).item() for ours, theirs in pairs) / len(pairs)


def segment_with(alignment: Alignment, model: Any, reference: Any) -> Segment:
    """The segment between two models, "small" and "large", in the coordinates that they share."""
    kept = alignment.kept
    return Segment(
        "small", "large", shape_of(model.config), shape_of(reference.config), kept, kept.dropped[::-1], reference.config, maps=alignment.maps,
        small_eps=small_eps(model.config, reference.config),
    )


def apply(alignment: Alignment, model: Any, reference: Any) -> Any:
    """The model in the reference's coordinates, by fitted maps; in its own dtype, to which it is rounded once."""
    family, small, large = family_of(model.config), shape_of(model.config), shape_of(reference.config)
    kept, maps, segment = alignment.kept, alignment.maps, segment_with(alignment, model, reference)
    widened = large.model_copy(update={"layers": small.layers})
    plan = blend_plan(segment, widened, Mix(alpha=1.0, layer_gain=0.0, neuron_gain=0.0, head_gain=0.0, channel_gain=0.0))
    live = {name: family.parameters(_exact(one, model.device)) for name, one in (("small", model), ("large", reference))}
    config = plan.config(reference.config)
    state: dict[str, Tensor] = {}
    for spec, layer, name in family.stored(config):
        tensor = combine(plan.tensors[name], live).detach()
        place = int(kept.layers[layer]) if layer is not None else 0
        tensor = turned(tensor, maps.large_turns(config, spec, place, (small, large), back=True))
        for dim, axes in enumerate(spec.dims):
            order = places(axes, unit_orders(kept, large, place), {**family.sizes(config), **large.model_dump()})
            if order is not None:
                tensor = tensor.index_select(dim, torch.from_numpy(np.argsort(order)).to(tensor.device))
        state[name] = tensor.clone()
    with LOADING:
        made = type(model).from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    return made.to(model.device).eval()


@torch.no_grad()
def _error(alignment: Alignment, model: Any, reference: Any) -> float:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(shape_of(model.config).vocab, (1, block_size(model.config, reference.config, most=_PROBE)), generator=draw).to(model.device)
    return float((apply(alignment, model, reference)(input_ids=ids).logits - model(input_ids=ids).logits).abs().max())


