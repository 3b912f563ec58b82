"""Arguments of `ChainDistiller`: transformers.TrainingArguments and what distillation adds."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import is_liger_kernel_available

from cbd_hub.distill.sampling import SamplingArguments, check_sampling
from cbd_hub.errors import ArgumentError
from cbd_hub.losses.bridge import TEMPERATURE
from cbd_hub.losses.divergence import check_options
from cbd_hub.losses.hidden import HIDDEN_LOSSES
from cbd_hub.precision import best_device, has_bf16, say_fp32


logger = logging.getLogger(__name__)

BRIDGES = ("text", "span", "vocab", "span+vocab", "hidden")
_CHECKPOINTING = {"use_reentrant", "context_fn", "preserve_rng_state", "determinism_check", "debug", "early_stop"}
_NUMBERS = ("temperature", "beta", "skew", "kd_weight", "ce_weight", "hidden_weight", "path_fraction", "span_temperature")


@dataclass
class ChainDistillerConfig(SamplingArguments, TrainingArguments):
    """Training arguments of one stage of a chain.

    Everything of ``transformers.TrainingArguments``, with defaults for short distillations, what `cbd_hub.distill.sampling.SamplingArguments` has of where
    the student's tokens come from, and the fields below. Without an accelerator
    ``use_cpu`` is set, so that ``bf16=True`` means bf16 autocast there too; a CPU that has no instructions for it computes in fp32, and says so.

    Args:
        divergence: ``forward_kl``, ``reverse_kl``, ``jensen_shannon`` or ``skew_kl``.
        temperature: Temperature of both distributions in the divergence; the loss is multiplied by its square.
        beta: Teacher's weight in the Jensen-Shannon mixture.
        skew: Teacher's share in the skew mixture.
        kd_weight: Weight of the divergence.
        ce_weight: Weight of the cross-entropy with the text.
        hidden_weight: Weight of the hidden-state term between mapped layers; 0 leaves it out. Where widths differ the student's states go through
            learned projectors, which no export holds.
        hidden_loss: ``cosine`` or ``mse``.
        hidden_layers: Layers of the student that are matched, from 0; None for all.
        hidden_balance: Scale the hidden-state term by the ratio of the other terms to it, a running mean over the steps before (the first value is
            measured on training text), so that ``hidden_weight`` 1 makes it weigh as much as they do.
        path_fraction: Share of the optimiser steps in which a model in between student and teacher takes the student's place, 0 to 1.
        block_size: Tokens in a packed block, for data sets with a text column. Up to 128 a CPU in bf16 trains with ``eager`` attention in the place of ``sdpa``.
        teacher_cache: A folder or Hub data set made by ``cbd cache-teacher``, read instead of running the teacher: at temperature 1, without
            ``hidden_weight`` and ``path_fraction``, which need the teacher itself. With a ``bridge`` it is made with the teacher's tokenizer, in whose tokens
            ``block_size`` then counts.
        bridge: For a teacher with a tokenizer of its own, in the place of the divergence: ``text`` (its answers, by cross-entropy), ``span`` (its likelihood of
            every span that is whole tokens for both), ``vocab`` (its distribution on shared tokens, where both have a border), ``span+vocab`` (``span`` for the
            spans that are no shared token), ``hidden`` (the hidden-state term alone, with ``hidden_weight``, which goes with ``span`` and ``vocab`` too).
        span_temperature: Temperature of the likelihoods in ``span`` (`cbd_hub.losses.bridge`).

    Raises:
        ArgumentError: If a field is outside its range.

    Example:
        >>> config = ChainDistillerConfig("out", max_steps=10, path_fraction=0.3)
        >>> config.divergence, config.learning_rate, config.lr_scheduler_type.value
        ('forward_kl', 0.0004, 'cosine')
    """

    bf16: bool = field(default=False, metadata={"help": "Products in bf16 by autocast; a CPU without instructions for it computes in fp32."})
    learning_rate: float = field(default=4e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up steps, or their share if below 1."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    save_steps: float = field(default=50, metadata={"help": "Steps between checkpoints."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Losses are logged as they are."})
    include_num_input_tokens_seen: str | bool = field(default=True, metadata={"help": "Count the tokens of every step."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept."})
    divergence: str = field(default="forward_kl", metadata={"help": "forward_kl, reverse_kl, jensen_shannon or skew_kl."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the divergence."})
    beta: float = field(default=0.5, metadata={"help": "Teacher's weight in the Jensen-Shannon mixture."})
    skew: float = field(default=0.1, metadata={"help": "Teacher's share in the skew mixture."})
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence."})
    ce_weight: float = field(default=0.0, metadata={"help": "Weight of the cross-entropy."})
    hidden_weight: float = field(default=0.0, metadata={"help": "Weight of the hidden-state term."})
    hidden_loss: str = field(default="cosine", metadata={"help": "cosine or mse."})
    hidden_layers: list[int] | None = field(default=None, metadata={"help": "Layers of the student that are matched; all by default."})
    hidden_balance: bool = field(default=False, metadata={"help": "Scale the hidden-state term to the size of the others."})
    path_fraction: float = field(default=0.0, metadata={"help": "Share of the steps spent on in-between models."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a packed block."})
    teacher_cache: str | None = field(default=None, metadata={"help": "Teacher cache to read instead of running the teacher."})

    bridge: str | None = field(default=None, metadata={"help": "text, span, vocab, span+vocab or hidden, for a teacher of another vocabulary."})
    span_temperature: float = field(default=TEMPERATURE, metadata={"help": "Temperature of the likelihoods of spans."})

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.fp16 and (self.bf16 or self.use_cpu):
            raise ArgumentError("fp16=True " + ("and bf16=True contradict each other; leave one of them out" if self.bf16 else "changes nothing on a CPU; leave it out, or take bf16=True"))
        if self.bf16 and not has_bf16("cpu" if self.use_cpu else best_device().type):
            self.bf16 = False
            say_fp32()
        for name in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ArgumentError(f"{name}={value!r} is no finite number; give one such as 1.0")
            setattr(self, name, float(value))
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):
            raise ArgumentError(f"seed={self.seed!r} is no whole number; give one such as 0")
        noise: Any = self.neftune_noise_alpha
        if noise is not None and (isinstance(noise, bool) or not isinstance(noise, Real)):
            raise ArgumentError(f"neftune_noise_alpha={noise!r} is no number; give one such as 5.0")
        odd = sorted(set(self.gradient_checkpointing_kwargs or {}) - _CHECKPOINTING)
        if odd:
            raise ArgumentError(f"gradient_checkpointing_kwargs has {odd[0]}, which torch.utils.checkpoint does not take; it takes {', '.join(sorted(_CHECKPOINTING))}")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise ArgumentError("use_liger_kernel=True needs liger-kernel; run `pip install liger-kernel`, or leave it out")
        if not isinstance(self.optim_args, (str, type(None))):
            raise ArgumentError(f"optim_args={self.optim_args!r} is no text; write its options as 'name=value, name=value'")
        check_options(self.divergence, self.temperature, self.beta, self.skew)
        if self.bridge is not None:
            self._set_bridge()
        for name in ("kd_weight", "ce_weight", "hidden_weight"):
            if not getattr(self, name) >= 0:
                raise ArgumentError(f"{name}={getattr(self, name)} is negative; give 0 or more")
        if not (self.kd_weight or self.ce_weight or self.hidden_weight):
            raise ArgumentError("kd_weight, ce_weight and hidden_weight are all 0, so there is nothing to learn from; set one of them")
        if not (self.kd_weight or self.ce_weight) and (self.path_fraction or self.hidden_balance):
            name = "hidden_balance" if self.hidden_balance else "path_fraction"
            raise ArgumentError(f"kd_weight and ce_weight are both 0, so that {name} has no other term than that of the hidden states; set one of them, or leave {name} out")
        if not 0.0 <= self.path_fraction <= 1.0:
            raise ArgumentError(f"path_fraction={self.path_fraction} is outside 0 to 1; it is a share of the steps")
        if self.path_fraction and self.neftune_noise_alpha:
            raise ArgumentError(f"neftune_noise_alpha={self.neftune_noise_alpha} is added to the student's own embedding, which steps on the path do not read; set it or path_fraction to 0")
        if self.hidden_loss not in HIDDEN_LOSSES:
            raise ArgumentError(f"hidden_loss={self.hidden_loss!r} is not known; choose one of {', '.join(HIDDEN_LOSSES)}")
        layers = self.hidden_layers
        if layers is not None and not (isinstance(layers, (list, tuple)) and layers and all(isinstance(layer, int) for layer in layers)):
            raise ArgumentError(f"hidden_layers={layers!r} is no list of layers; give some such as [3, 7, 11], or leave it out for all")
        if self.hidden_balance and not self.hidden_weight:
            raise ArgumentError("hidden_balance=True but hidden_weight=0, so there is no hidden-state term to balance; set hidden_weight to 1")
        if self.label_smoothing_factor:
            raise ArgumentError(f"label_smoothing_factor={self.label_smoothing_factor} is not part of this loss, the teacher smooths the labels; leave it at 0")
        if self.block_size < 2:
            raise ArgumentError(f"block_size={self.block_size} holds no token to predict; give 2 or more")
        check_sampling(self)
        if self.teacher_cache is not None:
            self.check_cached()
        super().__post_init__()
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ArgumentError(f"hub_strategy={self.hub_strategy.value} would push the optimiser's state, and a push holds the model alone; choose every_save or end, and keep output_dir for resuming")
        unused: Any = vars(self)["ddp_find_unused_parameters"]
        if unused is None and (self.path_fraction or not (self.kd_weight or self.ce_weight)):
            self.ddp_find_unused_parameters = True  # layers that a step's model lacks, or a head that no term reads; with gradient checkpointing the Trainer would not look for them
        if self.n_gpu > 1:  # the Trainer would split each batch over them by DataParallel, whose parts of a loss have no common count of tokens
            logger.warning("one process was started and %d accelerators are there: it trains on the first; for all of them use torchrun or accelerate launch", self.n_gpu)
            self._n_gpu = 1
        config: Any = self.accelerator_config
        if config.dispatch_batches is None:
            config.dispatch_batches = False  # the first process cannot hand out batches whose rows differ in length

    @property
    def step_rows(self) -> int:
        """Rows of an optimiser step, of all processes."""
        return int(self.train_batch_size * self.gradient_accumulation_steps * self.world_size)

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimiser step where its rows are whole blocks."""
        return self.step_rows * self.block_size

    def facts(self) -> dict[str, str]:
        """What a card says of the loss and of where the tokens come from."""
        taught = f"{self.kd_weight:g} x {self.divergence} at temperature {self.temperature:g}" if self.bridge is None else f"{self.kd_weight:g} x bridge ({self.bridge})"
        hidden = f" + {self.hidden_weight:g} x {self.hidden_loss} of hidden states" if self.hidden_weight else ""
        return {"loss": f"{taught} + {self.ce_weight:g} x cross-entropy{hidden}", **self.sampling_facts()}

    def _set_bridge(self) -> None:
        """Give the fields the values that go with a bridge.

        Raises:
            ArgumentError: If the bridge is unknown, or a field does not go with it.
        """
        if self.bridge not in BRIDGES:
            raise ArgumentError(f"bridge={self.bridge!r} is not known; choose one of {', '.join(BRIDGES)}")
        if not self.span_temperature > 0:
            raise ArgumentError(f"span_temperature={self.span_temperature} is not above 0; the paper's value is {TEMPERATURE:g}")
        plain: dict[str, object] = {
            "divergence": "forward_kl", "temperature": 1.0, "path_fraction": 0.0, "on_policy_fraction": 0.0, "objective": "divergence",
            **({"hidden_weight": 0.0} if self.bridge == "text" else {"teacher_answers": False}),
        }
        if self.teacher_cache is not None and self.bridge in ("text", "hidden"):
            raise ArgumentError(f"bridge={self.bridge} needs the teacher itself, its {'answers' if self.bridge == 'text' else 'hidden states'}; leave teacher_cache out, or use span or vocab")
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise ArgumentError(f"{name}={getattr(self, name)} does not go with bridge={self.bridge}, whose teacher has another vocabulary; leave it at {value}")
        if self.bridge == "text":
            self.teacher_answers, self.kd_weight, self.ce_weight = True, 0.0, self.ce_weight or 1.0
        elif self.bridge == "hidden":
            self.hidden_weight = self.hidden_weight or 1.0

    def check_cached(self) -> None:
        """Refuse what a teacher cache cannot give.

        Raises:
            ArgumentError: Naming the field.
        """
        if self.teacher_cache is not None and not isinstance(self.teacher_cache, str):
            raise ArgumentError(f"teacher_cache={self.teacher_cache!r} is no folder and no Hub id; name what `cbd cache-teacher` made")
        plain = {
            "temperature": 1.0, "hidden_weight": 0.0, "path_fraction": 0.0, "on_policy_fraction": 0.0, "objective": "divergence", "teacher_answers": False,
        }
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise ArgumentError(
                    f"{name}={getattr(self, name)} needs the teacher itself, and a teacher cache has its top tokens at temperature 1 on its own text; "
                    f"set {name} to {value}, or leave teacher_cache out"
                )
