"""Coordinates fitted to two models: orders, signs and orthogonal maps under which their weights, and activations on a text, agree most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cbd_hub.errors import ArgumentError
from cbd_hub.families import TensorSpec, family_of
from cbd_hub.interpolation.execute import turned
from cbd_hub.interpolation.live import hooks
from cbd_hub.interpolation.maps import Maps, head_role, linear_half, norms, places, readers, rotates
from cbd_hub.interpolation.matching import assign, common_layers, evenness, kernel_alignment, orthogonal, rotary
from cbd_hub.interpolation.plan import Kept, layer_types
from cbd_hub.manifest import Shape
from cbd_hub.precision import widest
from cbd_hub.reporting import Report
from cbd_hub.shapes import shape_of


Residual = Literal["rotation", "permutation"]
Activations = dict[str, Tensor]
_ROUNDS = 4
_MASSIVE = 10  # times the median length of a layer's states
_NEURONS = 256  # of a layer, looked for in the layers of the other model


def unit_orders(kept: Kept, large: Shape, layer: int, small: Shape | None = None) -> dict[str, np.ndarray]:
    """The larger one's units in the smaller one's order: all of them, or with ``small`` those that it has."""
    chosen = {"ffn": kept.ffn[layer]}
    if kept.hidden is not None:
        chosen["hidden"] = kept.hidden
    if kept.heads is not None:
        chosen["heads"] = kept.heads[layer]
        group = large.heads // large.kv_heads
        chosen["kv_heads"] = kept.heads[layer][::group] // group
    if small is not None:
        chosen = {axis: order[: getattr(small, axis)] for axis, order in chosen.items() if axis != "heads"}
        if kept.heads is not None:
            chosen["heads"] = kept.heads[layer].reshape(large.kv_heads, -1)[: small.kv_heads, : small.heads // small.kv_heads].ravel()
    return chosen


class Fit:
    """The alternation: heads and neurons given the residual stream's map, and the map given them.

    Args:
        model: The smaller model.
        reference: The larger one.
        acts: Activations of both on a text; see `shared_activations`.
        residual: Kind of the map of the residual stream.
        order: The larger one's neurons, heads and, where they are permuted, channels in the order in which those that the smaller one has not are to come
            back; by default neurons by the norm of what they write, the others as they are. A rotation has directions of its own, the strongest first.
    """

    def __init__(
        self, model: Any, reference: Any, acts: tuple[Activations, Activations] | None, residual: Residual | None, order: Kept | None = None
    ) -> None:
        self.models = (model, reference)
        self.family = family = family_of(model.config)
        self.small, self.large = shape_of(model.config), shape_of(reference.config)
        self.weights = tuple({name: tensor.detach().float() for name, tensor in family.parameters(each).items()} for each in self.models)
        free = rotates(family, (self.small, self.large)) and self._gains_hold()
        self.choices: list[Residual] = ["permutation", "rotation"] if free else ["permutation"]
        if residual is not None and residual not in self.choices:
            raise ArgumentError(f"residual={residual!r} is not known for these {family.name} models; choose {' or '.join(self.choices)}")
        self.residual: Residual = residual or ("rotation" if free and not getattr(model.config, family.tied) else "permutation")
        self.head_norms = bool(family.head_norms)
        self.rotary_width = self._rotary_width()
        self.acts = acts
        self.group = self.large.heads // self.large.kv_heads
        heads = np.tile(np.arange(self.large.heads), (self.large.layers, 1)) if self.large.heads else None
        if order is not None and order.heads is not None:
            heads = order.heads
        channels = np.arange(self.large.hidden) if order is None or order.hidden is None else order.hidden
        self.order = Kept(np.arange(self.large.layers), self._by_norm() if order is None else order.ffn, heads, channels)
        even = Kept.even(self.small, self.large, layer_types(model.config, reference.config)).layers
        self.kept = Kept(even, self.order.ffn.copy(), None if heads is None else heads.copy())
        self.matched = self.small.layers == self.large.layers
        size, kv = self.small.head_size, self.small.kv_heads
        same = torch.eye(size, dtype=torch.float32).repeat(self.small.layers, kv, 1, 1)
        self.queries, self.values = same.clone(), same.clone()
        self.neurons = torch.ones(self.small.layers, self.small.ffn, dtype=torch.float32)
        device = next(iter(self.weights[0].values())).device
        self.stream = torch.zeros(self.large.hidden, self.small.hidden, dtype=torch.float32, device=device)
        # Similarity of what tensors make of the norms' outputs, and of activations themselves; no map changes them.
        self.read: dict[tuple[str, str, int, int], Tensor] = {}
        self.products: dict[tuple[str, int, int], Tensor] = {}
        self.channels = np.ones(self.small.hidden, dtype=np.float32)

    def run(self, report: Report | None = None) -> None:
        """Fit all maps."""
        self._fit_stream(self._stream_cross(first=True))
        if not self.matched:
            self.kept, self.matched = replace(self.kept, layers=self._common_layers(report)), True
        for number in range(_ROUNDS + 1):
            if number:
                self._fit_stream(self._stream_cross())
            for place, layer in enumerate(self.kept.layers.tolist()):
                if report is not None:
                    report(f"fitting a {self.residual}", number * len(self.kept.layers) + place, (_ROUNDS + 1) * len(self.kept.layers))
                self._fit_heads(place, layer)
                self._fit_neurons(place, layer)

    def again(self, residual: Residual) -> Fit:
        """A fit of the same models with a map of another kind of the residual stream, and what does not depend on that from this one."""
        other = Fit(*self.models, self.acts, residual, self.order)
        other.kept, other.matched = replace(other.kept, layers=self.kept.layers), True
        other.read, other.products = self.read, self.products
        return other

    def _common_layers(self, report: Report | None) -> np.ndarray:
        """Which of the larger one's layers the smaller one's stand for: those with like neurons, and with like states on the text or, without one, as deep in the model.

        Neurons of a model that was cut from the other one tell, whatever was trained since; strangers' are all alike, and the rest then tells more.
        """
        likeness = evenness(self.small.layers, self.large.layers) if self.acts is None else np.zeros((self.small.layers, self.large.layers))
        for place in range(self.small.layers):
            if report is not None:
                report("matching layers", place, self.small.layers)
            for layer in range(place, self.large.layers - self.small.layers + place + 1):
                likeness[place, layer] += self._neurons_alike(place, layer)
                if self.acts is not None:
                    likeness[place, layer] += kernel_alignment(*(acts[f"state.{at}"] for acts, at in zip(self.acts, (place, layer))))
        return common_layers(likeness, layer_types(self.models[0].config, self.models[1].config))

    def _neurons_alike(self, place: int, layer: int) -> float:
        """Mean over neurons of the smaller one's layer of the largest cosine, by what they read and write, with one of the larger one's."""
        chosen = np.linspace(0, self.small.ffn - 1, min(_NEURONS, self.small.ffn)).round().astype(int)
        plain = torch.zeros(len(chosen), self.large.ffn, dtype=torch.float32, device=self.stream.device)
        signed, squares = plain.clone(), [plain[:, 0].clone(), plain[0].clone()]
        for spec, _, ours, theirs, _ in self._pairs("ffn", place, layer):
            if ours.shape[1] > 1:  # no biases
                ours = ours[torch.from_numpy(chosen).to(ours.device)]
                half = signed if linear_half(self.family, spec) else plain
                half += ours @ self.stream.T @ theirs.T
                squares = [total + tensor.square().sum(1) for total, tensor in zip(squares, (ours, theirs))]
        cosines = (plain + signed.abs()) / (squares[0][:, None] * squares[1]).sqrt().clamp(min=1e-30)
        return float(cosines.amax(1).mean())

    def result(self) -> tuple[Kept, Maps]:
        """The maps as data."""
        known = all(
            head_role(self.family, spec, axes) is not None
            for spec in self.family.tensors for axes in spec.dims if isinstance(axes, tuple) and "head_size" in axes
        )
        maps = Maps(
            neurons=self.neurons if bool((self.neurons < 0).any()) else None, values=self.values if known else None,
            queries=self.queries if known and not self.head_norms else None,
        )
        if self.residual == "permutation":
            return self.kept, replace(maps, channels=torch.from_numpy(self.channels)) if np.any(self.channels < 0) else maps
        stream = self.stream.cpu().double()
        if self.small.hidden < self.large.hidden:
            whole = torch.linalg.qr(torch.cat([stream, self._directions()], 1))[0]
            stream = torch.cat([stream, whole[:, self.small.hidden :]], 1)
        ours, theirs = (
            {name: weights[name].cpu() for name, _ in norms(self.family, shape.layers)} for weights, shape in zip(self.weights, (self.small, self.large))
        )
        return self.kept, replace(maps, rotation=stream.float().cpu(), small_gains=ours, large_gains=theirs)

    def _directions(self) -> Tensor:
        """Directions of the larger one's residual stream beside the smaller one's, the strongest first."""
        spec = next(spec for spec in self.family.tensors if spec.name == self.family.embedding)
        rows = [self.weights[1][spec.name]] if self.acts is None else [self.acts[1][f"state.{layer}"] for layer in range(self.large.layers)]
        wide = widest(self.stream.device)
        states, stream = torch.cat(rows).to(wide), self.stream.to(wide)
        states = states - states @ stream @ stream.T
        vectors = torch.linalg.eigh((states.T @ states).cpu().double())[1].flip(1)
        return vectors[:, : self.large.hidden - self.small.hidden]

    def _gains_hold(self) -> bool:
        """Whether no gain of a norm is so small that it cannot be divided by."""
        return all(
            float(weights[name].abs().min()) > 1e-3 * float(weights[name].abs().mean())
            for weights, shape in zip(self.weights, (self.small, self.large)) for name, _ in norms(self.family, shape.layers)
        )

    def _rotary_width(self) -> int:
        """Channels of a head that rotary positions turn; 0 with learned positions."""
        if any("positions" in spec.dims for spec in self.family.tensors):
            return 0
        settings = getattr(self.models[0].config, "rope_parameters", None)
        share = settings.get("partial_rotary_factor", 1.0) if isinstance(settings, dict) else 1.0
        width = int(self.small.head_size * share)
        return width + width % 2  # transformers turns pairs: of 3 channels, the fourth too

    def _by_norm(self) -> np.ndarray:
        """Neurons of each of the larger one's layers by the norm of what they write, the largest first."""
        spec, dim = self.family.input_of(self.family.ffn_input)
        rows = [self.weights[1][spec.name.format(layer=layer)].movedim(dim, 0).norm(dim=1).cpu().numpy() for layer in range(self.large.layers)]
        return np.argsort(-np.stack(rows), axis=1, kind="stable")

    def _pairs(self, axis: str, place: int, layer: int) -> Iterator[tuple[TensorSpec, int, Tensor, Tensor, str]]:
        """Tensors with an axis, of the smaller and the larger model, each brought to the larger one's coordinates on its other dimensions.

        Yields the spec, which dimension the axis is, both tensors with that dimension first and the others flattened, and the norm that it reads.
        """
        chosen = unit_orders(self.kept, self.large, layer, self.small)
        maps = Maps(neurons=self.neurons, values=self.values, queries=None if self.head_norms else self.queries)
        read = readers(self.family)
        sizes = {**self.family.sizes(self.models[1].config), **self.large.model_dump()}
        for spec in self.family.tensors:
            if not spec.present(self.models[0].config) or self.family.norm_of(spec) is not None or spec.per_layer != (place >= 0):
                continue
            dims = [dim for dim, axes in enumerate(spec.dims) if axis == axes or (isinstance(axes, tuple) and axis == "heads" and "head_size" in axes)]
            if not dims or spec.module in self.family.head_norms:
                continue
            ours, theirs = (self.weights[side][spec.name.format(layer=at)] for side, at in ((0, place), (1, layer)))
            norm = read.get(spec.name, "")
            dim = dims[0]
            if axis == "hidden":
                ours = turned(ours, tuple(turn for turn in maps.turns(self.models[1].config, spec, (place, layer), (self.small, self.large)) if turn.dim != dim))
            for other, axes in enumerate(spec.dims):
                if other == dim:
                    continue
                if axes == "hidden" and norm:
                    gains = [self.weights[side][norm.format(layer=at)] for side, at in ((0, place), (1, layer))]
                    ours, theirs = (tensor * gain.view([-1 if at == other else 1 for at in range(tensor.dim())]) for tensor, gain in zip((ours, theirs), gains))
                index = None if axes == "hidden" else places(axes, chosen, sizes)
                if index is not None:
                    theirs = theirs.index_select(other, torch.from_numpy(index).to(theirs.device))
            if axis == "hidden" and norm:
                gains = [self.weights[side][norm.format(layer=at)] for side, at in ((0, place), (1, layer))]
                ours, theirs = (tensor * gain.view([-1 if at == dim else 1 for at in range(tensor.dim())]) for tensor, gain in zip((ours, theirs), gains))
            yield spec, dim, ours.movedim(dim, 0).flatten(1) if ours.dim() > 1 else ours[:, None], theirs.movedim(dim, 0).flatten(1) if theirs.dim() > 1 else theirs[:, None], norm

    def _cross(self, spec: TensorSpec, ours: Tensor, theirs: Tensor, norm: str, place: int, layer: int, part: str = "") -> Tensor:
        """Similarity of the smaller one's units (rows) and the larger one's, by what they read or write."""
        scale = (ours.norm() * theirs.norm()).clamp(min=1e-30)
        if ours.shape[1] == theirs.shape[1] == 1:
            return ours @ theirs.T / scale
        found = (ours @ self.stream.T) @ theirs.T / scale
        if self.acts is None or not norm:
            return found
        if (key := (spec.name, part, place, layer)) not in self.read:
            states = [acts[norm.rpartition(".")[0].format(layer=at)] for acts, at in zip(self.acts, (place, layer))]
            gains = [self.weights[side][norm.format(layer=at)] for side, at in ((0, place), (1, layer))]
            outputs = [state @ torch.where(gain == 0, 0.0, weights / gain).T for state, weights, gain in zip(states, (ours, theirs), gains)]
            self.read[key] = outputs[0].T @ outputs[1] / (outputs[0].norm() * outputs[1].norm()).clamp(min=1e-30)
        return found + self.read[key]

    def _product(self, name: str, place: int, layer: int) -> Tensor:
        """Similarity of the smaller one's activations (rows) and the larger one's on the text."""
        if (key := (name, place, layer)) not in self.products:
            assert self.acts is not None
            ours, theirs = (acts[f"{name}.{at}"] for acts, at in zip(self.acts, (place, layer)))
            self.products[key] = ours.T @ theirs / (ours.norm() * theirs.norm()).clamp(min=1e-30)
        return self.products[key]

    def _fit_neurons(self, place: int, layer: int) -> None:
        plain = torch.zeros(self.small.ffn, self.large.ffn, dtype=torch.float32, device=self.stream.device)
        signed = plain.clone()
        for spec, _, ours, theirs, norm in self._pairs("ffn", place, layer):
            target = signed if linear_half(self.family, spec) else plain
            target += self._cross(spec, ours, theirs, norm, place, layer)
        if self.acts is not None:
            target = signed if any(linear_half(self.family, spec) for spec in self.family.tensors) else plain
            target += self._product(self.family.ffn_input, place, layer)
        columns, signs = assign(plain, signed if bool(signed.any()) else None)
        self.neurons[place] = torch.from_numpy(signs)
        self.kept.ffn[layer] = _first(columns, self.order.ffn[layer])

    def _fit_heads(self, place: int, layer: int) -> None:
        cross = self._head_cross(place, layer)
        group, kv, size = self.small.heads // self.small.kv_heads, self.small.kv_heads, self.small.head_size
        wide = self.group

        def pairs(role: str, per: tuple[int, int]) -> Tensor:
            """(kv small, kv large, query small, query large, d, d)."""
            found = cross[role].view(kv, per[0], size, self.large.kv_heads, per[1], size)
            return found.permute(0, 3, 1, 4, 2, 5)

        q, o = pairs("q", (group, wide)), pairs("o", (group, wide))
        k, v = (pairs(role, (1, 1))[:, :, 0, 0] for role in "kv")
        scores = self._reach_qk(q) + torch.linalg.svdvals(o).sum(-1)
        inner = np.zeros((kv, self.large.kv_heads, group), dtype=np.int64)
        for a in range(kv):
            for b in range(self.large.kv_heads):
                inner[a, b] = assign(scores[a, b])[0] if wide > 1 else 0
        index = torch.from_numpy(inner).to(q.device)[:, :, :, None, None, None].expand(-1, -1, -1, 1, size, size)
        qk, vo = k + q.gather(3, index).sum((2, 3)), v + o.gather(3, index).sum((2, 3))
        columns = assign(self._reach_qk(qk) + torch.linalg.svdvals(vo).sum(-1))[0]
        rows = np.arange(kv)
        self.values[place] = orthogonal(vo[rows, columns].mT).float().cpu()
        if not self.head_norms:
            self.queries[place] = self._turn_qk(qk[rows, columns])[0].float().cpu()
        if self.kept.heads is not None and self.order.heads is not None:
            groups = self.order.heads[layer].reshape(-1, wide)
            within = {int(group[0]) // wide: group % wide for group in groups}
            own = [_first(inner[a, b], within[b]) + b * wide for a, b in enumerate(columns.tolist())]
            self.kept.heads[layer] = np.concatenate([*own, *(group for group in groups if group[0] // wide not in columns)])

    def _turn_qk(self, cross: Tensor) -> tuple[Tensor, Tensor]:
        if self.head_norms:
            return torch.eye(cross.shape[-1], device=cross.device).expand(cross.shape), cross.diagonal(0, -2, -1).sum(-1)
        if self.rotary_width:
            return rotary(cross, self.rotary_width)
        return orthogonal(cross.mT), torch.linalg.svdvals(cross).sum(-1)

    def _reach_qk(self, cross: Tensor) -> Tensor:
        return self._turn_qk(cross)[1]

    def _head_cross(self, place: int, layer: int) -> dict[str, Tensor]:
        """For each role the similarity of all channels of the smaller one's heads (rows) to the larger one's, unmapped."""
        size = self.small.head_size
        widths = {role: [(shape.heads if role in "qo" else shape.kv_heads) * size for shape in (self.small, self.large)] for role in "qkvo"}
        found = {role: torch.zeros(*width, dtype=torch.float32, device=self.stream.device) for role, width in widths.items()}
        for spec, dim, ours, theirs, norm in self._pairs("heads", place, layer):
            axes = spec.dims[dim]
            assert isinstance(axes, tuple)
            role = head_role(self.family, spec, axes)
            if role is None:
                continue
            pieces = [(role, ours, theirs)]
            if role == "qkv":
                at = axes.index(3)
                split = []
                for tensor, shape in ((ours, self.small), (theirs, self.large)):
                    parts = [part if isinstance(part, int) else getattr(shape, part) for part in axes]
                    split.append(tensor.unflatten(0, parts).movedim(at, 0).flatten(1, len(parts) - 1))
                pieces = list(zip("qkv", *split))
            for name, one, other in pieces:
                found[name] += self._cross(spec, one, other, norm, place, layer, name)
        if self.acts is not None:
            found["o"] += self._product(self.family.heads_input, place, layer)
        return found

    def _stream_cross(self, *, first: bool = False) -> Tensor:
        """Similarity of the larger one's channels (rows) to the smaller one's, by all that reads or writes them and the states themselves."""
        total = torch.zeros(self.large.hidden, self.small.hidden, dtype=torch.float32, device=self.stream.device)
        for place, layer in [(-1, -1), *([] if first else enumerate(self.kept.layers.tolist()))]:
            for _, _, ours, theirs, _ in self._pairs("hidden", place, layer):
                total += theirs @ ours.T / (ours.norm() * theirs.norm()).clamp(min=1e-30)
        if self.acts is not None:
            for place, layer in enumerate(self.kept.layers.tolist()):
                total += self._product("state", place, layer).T
        return total

    def _fit_stream(self, cross: Tensor) -> None:
        if self.residual == "rotation":
            if self.family.centred:
                cross = cross - cross.mean(0) - cross.mean(1, keepdim=True) + cross.mean()
                cross = cross + cross.norm() / cross.shape[1]  # so that the mean direction stays itself
            self.stream = orthogonal(cross).float()
            return
        similarity = cross.T
        columns, self.channels = assign(similarity) if self.family.centred else assign(torch.zeros_like(similarity), similarity)
        self.stream = torch.zeros_like(self.stream)
        self.stream[columns, np.arange(self.small.hidden)] = torch.from_numpy(self.channels).to(self.stream.device)
        assert self.order.hidden is not None
        self.kept = replace(self.kept, hidden=_first(columns, self.order.hidden))


def _first(chosen: np.ndarray, order: np.ndarray) -> np.ndarray:
    """An order that begins with the chosen ones and goes on with the others."""
    return np.concatenate([chosen, order[~np.isin(order, chosen)]])


def shared_activations(model: Any, reference: Any, calibration: Sequence[Tensor]) -> tuple[Activations, Activations]:
    """Activations of two models on the same tokens, but for those of massive activations in either (https://huggingface.co/papers/2402.17762).

    The states of these few, such as the first of a text, are more than ten times as long as most others in some layer. Their share of a product of activations would
    decide it: with them all layers between a model's first and last are alike, and one channel is all that there is to match.
    """
    both = activations(model, calibration), activations(reference, calibration)
    lengths = [value.norm(dim=1) for acts in both for name, value in acts.items() if name.startswith("state.")]
    usual = torch.stack([length <= _MASSIVE * length.median() for length in lengths]).all(0)
    for acts in both:
        for name in acts:
            acts[name] = acts[name][usual]  # one at a time: gigabytes of a real model
    return both


def activations(model: Any, calibration: Sequence[Tensor]) -> Activations:
    """On a text: states after each layer, outputs of the norms, and inputs of what neurons and heads write with; shape (tokens, width) each."""
    family, shape = family_of(model.config), shape_of(model.config)
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, value: Tensor) -> None:
        found.setdefault(name, []).append(value.float().flatten(0, -2))

    def after(name: str) -> Any:
        return lambda _, __, output: keep(name, output[0] if isinstance(output, tuple) else output)

    def before(name: str) -> Any:
        return lambda _, inputs: keep(name, inputs[0])

    with hooks() as handles:
        for layer, block in enumerate(model.get_submodule(family.blocks)):
            handles.append(block.register_forward_hook(after(f"state.{layer}")))
            for module in (family.ffn_input, family.heads_input):
                handles.append(block.get_submodule(module).register_forward_pre_hook(before(f"{module}.{layer}")))
        for name, _ in norms(family, shape.layers):
            module = name.rpartition(".")[0]
            handles.append(model.get_submodule(module).register_forward_hook(after(module)))
        for start in range(0, len(calibration), 8):
            model.base_model(input_ids=torch.stack(list(calibration[start : start + 8])).to(model.device), use_cache=False)
    return {name: torch.cat(parts) for name, parts in found.items()}
