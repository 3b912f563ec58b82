"""Models and plans that run: last hidden states and output head of a loaded model, or of a model in between two loaded ones."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.initialization import no_init_weights
from transformers.masking_utils import create_causal_mask

from cbd_hub.errors import ArchitectureError
from cbd_hub.families import family_of, head_settings, parts_rows
from cbd_hub.interpolation.execute import combine
from cbd_hub.interpolation.plan import Plan
from cbd_hub.losses.blocks import scaled
from cbd_hub.shapes import check_positions


_SHELLS = 16  # kept at once; they hold no weights

@dataclass(frozen=True)
class Head:
    """An output head: what turns last hidden states into logits.

    Attributes:
        weight: Shape (V, H).
        bias: Shape (V,), or None.
        logit_scale: Factor on the logits.
        softcap: ``cap * tanh(logits / cap)``, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def options(self, whose: str = "") -> dict[str, Any]:
        """All but the weight, as the losses' keywords: ``bias`` and so on, or with ``whose`` "student_" ``student_bias`` and so on."""
        return {f"{whose}bias": self.bias, f"{whose}logit_scale": self.logit_scale, f"{whose}softcap": self.softcap}


@dataclass(frozen=True)
class Output:
    """What a forward pass gives: last hidden states (B, T, H), the head, where asked the states after each layer, and a mixture's router logits."""

    hidden: Tensor
    head: Head
    states: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


class Runner(Protocol):
    """Anything with a forward pass to hidden states and a head."""

    config: Any

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        ...

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, *, states: bool = False
    ) -> Output:
        """Run a batch of token ids, shape (B, T)."""
        ...


def _check_positions(config: Any, input_ids: Tensor, position_ids: Tensor | None) -> None:
    if position_ids is None:  # those of packed rows start anew in each
        check_positions(input_ids.shape[1], config, f"a row of {input_ids.shape[1]:,} tokens")


def _mask(config: Any, attention_mask: Tensor | None, position_ids: Tensor | None, dtype: torch.dtype) -> Any:
    """The mask as given; of packed rows, where the architecture does not part them by their positions, the one that does."""
    if position_ids is None or attention_mask is not None or parts_rows(config):
        return attention_mask
    return create_causal_mask(config, torch.empty(*position_ids.shape, 0, dtype=dtype, device=position_ids.device), None, None, position_ids)


def output_head(model: Any) -> Head:
    """The output head of a loaded causal language model."""
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()  # its weight is read without a call of the module, which would do it
    return Head(head.weight, getattr(head, "bias", None), **head_settings(model.config))


class ModelRunner:
    """A loaded causal language model as a `Runner`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return torch.device(self.model.device)

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, *, states: bool = False
    ) -> Output:
        """Run a batch of token ids, shape (B, T)."""
        _check_positions(self.config, input_ids, position_ids)
        routed = {"output_router_logits": True} if getattr(self.config, "output_router_logits", False) else {}
        output = self.model.base_model(
            input_ids=input_ids, attention_mask=_mask(self.config, attention_mask, position_ids, self.model.dtype), position_ids=position_ids,
            output_hidden_states=states, use_cache=False, **routed
        )
        return Output(
            output.last_hidden_state, output_head(self.model), tuple(output.hidden_states[1:]) if states else None,
            getattr(output, "router_logits", None) if routed else None,
        )


def check_head(model: Any) -> None:
    """Compare a model's logits on a few tokens with what its output head makes of its last hidden states.

    Raises:
        ArchitectureError: If they differ: its architecture does something more to its logits, which a loss from hidden states would not see.
    """
    with frozen(model):
        ids = torch.arange(4, device=model.device)[None] % model.config.vocab_size
        said, output = model(input_ids=ids, use_cache=False).logits.float(), ModelRunner(model)(ids)
        head = output.head
        made = scaled(output.hidden @ head.weight.T, head.bias, head.logit_scale, head.softcap)
    if said.isfinite().all() and not torch.allclose(made, said, rtol=0.0, atol=0.02 * float(said.abs().max())):
        raise ArchitectureError(
            f"{type(model).__name__}: its logits are not what its output head makes of its last hidden states, with the scale and soft cap that its config names, "
            "and the loss is made from these; choose a model of another architecture"
        )


def router_loss(model: Any, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
    """Load balancing loss of a mixture of experts, with the weight that its config gives it, by the model's own formula.

    Args:
        model: A causal language model whose config sets ``output_router_logits``.
        router_logits: Those of each layer, as the forward pass returns them.
        attention_mask: Shape (B, T), or None.
    """
    formula = vars(sys.modules[type(model).__module__])["load_balancing_loss_func"]
    loss: Tensor = formula(router_logits, model.num_experts, model.num_experts_per_tok, attention_mask)
    return loss * float(model.router_aux_loss_coef)


class Between:
    """Models in between loaded anchors, run by plans on their live parameters; gradients reach the parameters that have them.

    Args:
        models: Anchor name -> loaded model, of one architecture.
    """

    def __init__(self, models: Mapping[str, Any]) -> None:
        self._models = dict(models)
        self._shells: dict[Any, Any] = {}

    def run(self, plan: Plan) -> PlanRunner:
        """The plan's model as a `Runner`; its tensors are made once, now."""
        family = family_of(self._models[plan.large].config)
        live = {name: family.parameters(model) for name, model in self._models.items()}
        parameters = {name: combine(terms, live) for name, terms in plan.tensors.items()}
        return PlanRunner(self._shell(plan), parameters, family, checkpointing=any(map(_checkpoints, self._models.values())))

    def _shell(self, plan: Plan) -> Any:
        """A model of the plan's shape without parameters of its own: functional_call brings them."""
        model = self._models[plan.large]
        types = family_of(model.config).layer_types(model.config)
        key = (plan.shape, plan.eps, tuple(types[layer] for layer in plan.layers))
        if key not in self._shells:
            config = plan.config(model.config)
            config._attn_implementation = model.config._attn_implementation
            with no_init_weights(), init_empty_weights(include_buffers=False):
                shell = type(model)(config)
            for name, buffer in shell.named_buffers():
                owner, _, leaf = name.rpartition(".")
                shell.get_submodule(owner)._buffers[leaf] = buffer.to(model.device)
            if len(self._shells) >= _SHELLS:
                self._shells.clear()
            self._shells[key] = shell
        shell = self._shells[key]
        shell.train(model.training or any(other.training for other in self._models.values()))
        return shell


class PlanRunner:
    """A model made of given parameters, run through a shell without any of its own; with gradient checkpointing where that is asked for."""

    def __init__(self, shell: Any, parameters: Mapping[str, Tensor], family: Any, *, checkpointing: bool = False) -> None:
        self.config = shell.config
        self._checkpointing = checkpointing
        self.parameters = parameters
        self._shell = shell
        prefix = shell.base_model_prefix + "."
        self._base = {name.removeprefix(prefix): tensor for name, tensor in parameters.items() if name.startswith(prefix)}
        self._head = parameters.get(family.head, parameters[family.embedding])

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return self._head.device

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, *, states: bool = False
    ) -> Output:
        """Run a batch of token ids, shape (B, T)."""
        _check_positions(self.config, input_ids, position_ids)
        with self._checkpointed():
            output = functional_call(
                self._shell.base_model, dict(self._base), (),
                {
                    "input_ids": input_ids, "attention_mask": _mask(self.config, attention_mask, position_ids, self._head.dtype), "position_ids": position_ids,
                    "output_hidden_states": states, "use_cache": False,
                },
            )
        return Output(output.last_hidden_state, Head(self._head, **head_settings(self.config)), tuple(output.hidden_states[1:]) if states else None)


    @contextlib.contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """A block in which the shell's layers keep nothing but their input for the backward pass, in which they have the parameters again."""
        layers = [module for module in self._shell.base_model.modules() if hasattr(module, "gradient_checkpointing")] if self._checkpointing else []

        def recomputed(forward: Any, *args: Any) -> Any:
            def again(*args: Any) -> Any:
                with _holding(self._shell.base_model, self._base):
                    return forward(*args)

            return checkpoint(again, *args, use_reentrant=False)

        for layer in layers:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, recomputed
        try:
            yield
        finally:
            for layer in layers:  # a shell is shared, and holds nothing
                layer.gradient_checkpointing, layer._gradient_checkpointing_func = False, None


def _checkpoints(model: Any) -> bool:
    """Whether a model's layers are asked to compute anew in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextlib.contextmanager
def _holding(module: Any, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which a module has other parameters, outside a functional call."""
    split = [(module.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2], tensor) for name, tensor in parameters.items()]
    before = [held[leaf] for held, leaf, _ in split]
    for held, leaf, tensor in split:
        held[leaf] = tensor
    try:
        yield
    finally:
        for (held, leaf, _), tensor in zip(split, before):
            held[leaf] = tensor


@contextlib.contextmanager
def hooks() -> Iterator[list[Any]]:
    """A list for handles of hooks, which are removed after the block."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def frozen(*models: Any) -> Iterator[None]:
    """The models in eval mode inside the block, put back afterwards."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, modes):
            model.train(mode)
