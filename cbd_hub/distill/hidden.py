"""The hidden-state term of a trainer: which layers are matched, projectors between unlike widths, and the balance with the other terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cbd_hub.distill.config import ChainDistillerConfig
from cbd_hub.distill.wrapping import fill, whole
from cbd_hub.errors import ArgumentError
from cbd_hub.interpolation.live import Output
from cbd_hub.interpolation.plan import Kept
from cbd_hub.losses.hidden import LeastSquares, hidden_loss


FILE = "hidden_term.safetensors"
_NAME = "cbd_projectors"  # the student's attribute while it trains
_FIT_TOKENS = 4096
# Student's output, teacher's output, kept positions (B, T), and the other terms summed over these.
Batch = tuple[Output, Output, Tensor, Tensor]
_MEMORY = 0.9  # of the balance, per optimiser step


def matched_layers(student: int, teacher: int, kept: Kept | None) -> list[int]:
    """For every layer of the student the teacher's layer whose state it is to match: the last one of the block that it stands for.

    Args:
        student: Layers of the student.
        teacher: Layers of the teacher.
        kept: Where the student was cut from the teacher; None divides the teacher evenly.

    Example:
        >>> matched_layers(3, 12, None)
        [3, 7, 11]
    """
    if kept is not None:
        return [int(layer) - 1 for layer in kept.layers[1:]] + [teacher - 1]
    return [round((layer + 1) * teacher / student) - 1 for layer in range(student)]


def check_layers(args: ChainDistillerConfig, layers: int) -> None:
    """Refuse ``hidden_layers`` that a student of so many layers does not have.

    Raises:
        ArgumentError: Naming the first.
    """
    missing = [layer for layer in args.hidden_layers or () if not 0 <= layer < layers]
    if args.hidden_weight and missing:
        raise ArgumentError(f"hidden_layers names layer {missing[0]}, and the student has layers 0 to {layers - 1}; name some of these")


class HiddenTerm:
    """Hidden-state term between a student and its teacher.

    Args:
        student: The plain student.
        teacher: The teacher.
        kept: Where the student was cut from the teacher, or None.
        args: The trainer's arguments.

    Raises:
        ArgumentError: If a layer is named that the student does not have, or models cannot be matched.
    """

    def __init__(self, student: Any, teacher: Any, kept: Kept | None, args: ChainDistillerConfig) -> None:
        ours, theirs = student.config, teacher.config
        ends = matched_layers(ours.num_hidden_layers, theirs.num_hidden_layers, kept)
        layers = range(len(ends)) if args.hidden_layers is None else args.hidden_layers
        check_layers(args, len(ends))
        if not set(ends) <= set(range(theirs.num_hidden_layers)):
            raise ArgumentError(f"a student of {len(ends)} layers cannot be matched to a teacher of {theirs.num_hidden_layers}; leave hidden_weight at 0")
        self.pairs = [(layer, ends[layer]) for layer in layers]
        self.kind, self.weight = args.hidden_loss, args.hidden_weight
        self.projectors: list[torch.nn.Linear] = []
        self.balanced = args.hidden_balance
        self.ready = False
        self._balance = (1.0, 1.0)  # running means of the other terms and of this one
        self._first = self._balance  # before the first step
        self._step: list[Tensor] = []
        self._seen: list[float] = []
        if ours.hidden_size != theirs.hidden_size:
            self.projectors = [_linear(ours.hidden_size, theirs.hidden_size, student) for _ in self.pairs]

    @property
    def _layers(self) -> str:
        return ", ".join(f"{layer} to {end}" for layer, end in self.pairs)

    @property
    def scale(self) -> float:
        """Factor on the hidden loss in training."""
        return self.weight * self._balance[0] / self._balance[1] if self.balanced else self.weight

    @property
    def first_scale(self) -> float:
        """Factor on the hidden loss in evaluation, that of the first step: the losses of two steps are of one kind."""
        return self.weight * self._first[0] / self._first[1] if self.balanced else self.weight

    @property
    def begins(self) -> bool:
        """Whether projectors or balance still wait for their start from the training text, before which the term means nothing."""
        return not self.ready and bool(self.projectors or self.balanced)

    def untouched(self) -> Tensor:
        """Nothing, with a graph to the projectors: what distributes training waits for every parameter's gradient."""
        return torch.stack([0.0 * parameter.sum() for parameter in self._parameters().values()]).sum()

    # -- while training --------------------------------------------------------------------------------------------------

    def attach(self, student: Any) -> None:
        """Make the projectors a part of the student, for the optimiser and what distributes it; no export ever holds them."""
        if self.projectors:
            setattr(student, _NAME, torch.nn.ModuleList(self.projectors))
            student._keys_to_ignore_on_save = {*(student._keys_to_ignore_on_save or ()), *self._parameters()}

    def detach(self, student: Any) -> None:
        """Leave an ordinary model behind."""
        if hasattr(student, _NAME):
            delattr(student, _NAME)
            student._keys_to_ignore_on_save = set(student._keys_to_ignore_on_save) - self._parameters().keys()

    def _parameters(self) -> dict[str, Tensor]:
        """The projectors' parameters by their names in the student."""
        return {f"{_NAME}.{name}": parameter for name, parameter in torch.nn.ModuleList(self.projectors).named_parameters()}

    def loss(self, output: Output, target: Output, keep: Tensor, num_items: int | Tensor | None) -> Tensor:
        """Unscaled hidden loss of a batch."""
        assert output.states is not None
        assert target.states is not None
        ours = [output.states[layer] for layer, _ in self.pairs]
        if self.projectors:
            ours = [projector(state.to(projector.weight.dtype)) for projector, state in zip(self.projectors, ours)]
        return hidden_loss(ours, [target.states[end] for _, end in self.pairs], keep, kind=self.kind, num_items=num_items)

    def note(self, other: Tensor, hidden: Tensor) -> None:
        """Remember a micro-batch's terms."""
        self._step.append(torch.stack([other.detach().float(), hidden.detach().float()]))

    def settle(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """At the end of an optimiser step: its terms, summed over processes, move the balance.

        The scale of a step is thus a function of the steps before it, and accumulation and several processes change nothing.
        """
        if not self._step:
            return
        other, hidden = (float(value) for value in reduce(torch.stack(self._step).sum(0)))
        self._step = []
        self._seen.append(hidden)
        self._balance = (
            _MEMORY * self._balance[0] + (1 - _MEMORY) * other, max(_MEMORY * self._balance[1] + (1 - _MEMORY) * hidden, torch.finfo(torch.float32).tiny)
        )

    def logs(self) -> dict[str, float]:
        """What to log of the steps since the last call."""
        if not self._seen:
            return {}
        mean = sum(self._seen) / len(self._seen)
        self._seen = []
        return {"hidden_loss": mean, **({"hidden_scale": self.scale} if self.balanced else {})}

    # -- before training -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """Give the projectors their closed-form start and the balance its first value.

        Args:
            batches: Called for some training text, once for each of the two.
        """
        if not self.begins:
            return
        if self.projectors:
            fits = [LeastSquares(projector.in_features, projector.out_features) for projector in self.projectors]
            for output, target, keep, _ in _until(batches(), _FIT_TOKENS):
                assert output.states is not None
                assert target.states is not None
                for fit, (layer, end) in zip(fits, self.pairs):
                    fit.add(output.states[layer][keep], target.states[end][keep])
            for fit, projector in zip(fits, self.projectors):
                weight, bias = fit.solve()
                projector.weight.copy_(weight)
                projector.bias.copy_(bias)
        if self.balanced:
            sums = [
                (float(other), float(self.loss(output, target, keep, 1)), int(keep.sum()))
                for output, target, keep, other in _until(batches(), _FIT_TOKENS)
            ]
            tokens = sum(count for *_, count in sums) or 1
            self._balance = (sum(other for other, *_ in sums) / tokens or 1.0, sum(hidden for _, hidden, _ in sums) / tokens or 1.0)
            self._first = self._balance
        self.ready = True

    # -- beside a checkpoint ---------------------------------------------------------------------------------------------

    def save(self, folder: Path, write: bool) -> None:
        """Write projectors and balance; every process calls, those with ``write`` write."""
        tensors = {"balance": torch.tensor(self._balance, dtype=torch.float64), "first_balance": torch.tensor(self._first, dtype=torch.float64)}
        tensors.update({name: whole(parameter) for name, parameter in self._parameters().items()})
        if write:
            save_file(tensors, folder / FILE, metadata={"layers": self._layers})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read projectors and balance back.

        Raises:
            ArgumentError: If the checkpoint is of a run without this term, or with other layers.
        """
        if not (folder / FILE).is_file():
            raise ArgumentError(f"{folder} is a checkpoint without {FILE}, of a run without this hidden-state term; start anew, or set hidden_weight as it was")
        with safe_open(folder / FILE, "pt") as file:
            found = (file.metadata() or {}).get("layers")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if found != self._layers:
            raise ArgumentError(f"{folder} matched the layers {found} and these are {self._layers}; resume with the same hidden_layers and teacher, or start anew")
        self._balance = tuple(tensors.pop("balance").tolist())
        self._first = tuple(tensors.pop("first_balance", torch.tensor(self._balance)).tolist())  # which the first versions did not write
        for name, parameter in self._parameters().items():
            fill(parameter, tensors[name])
        self.ready = True


def _linear(width: int, target: int, like: Any) -> torch.nn.Linear:
    """A linear map, left unset: no random number is drawn for it."""
    parameter = next(like.parameters())
    made: torch.nn.Linear = torch.nn.utils.skip_init(torch.nn.Linear, width, target, device=parameter.device, dtype=torch.float32)
    return made


def _until(batches: Iterable[Batch], tokens: int) -> Iterable[Batch]:
    """Batches until so many kept tokens have come."""
    for batch in batches:
        yield batch
        tokens -= int(batch[2].sum())
        if tokens <= 0:
            return


