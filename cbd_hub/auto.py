"""``import cbd_hub.auto`` lets transformers' Auto classes open a chain, here or on the Hub.

Example:
    >>> import cbd_hub.auto
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("org/chain", size="138M")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cbd_hub.errors import ArgumentError
from cbd_hub.manifest import MODEL_TYPE
from cbd_hub.model import CBDModel


_WISHES = ("size", "memory_budget", "min_tokens_per_second", "max_latency", "shape", "strategy", "alpha", "tolerance")


class CBDChainConfig(PretrainedConfig):
    """The config of a chain's index repo: which model is wanted of it; the fields are arguments of `CBDModel.from_chain`."""

    model_type = MODEL_TYPE

    def __init__(
        self, size: str | int | None = None, memory_budget: str | int | None = None, shape: dict[str, int] | None = None, strategy: str = "auto",
        alpha: float | None = None, tolerance: float = 0.02, min_tokens_per_second: str | float | None = None, max_latency: str | float | None = None, **kwargs: Any,
    ) -> None:
        self.size, self.memory_budget, self.shape = size, memory_budget, shape
        self.min_tokens_per_second, self.max_latency = min_tokens_per_second, max_latency
        self.strategy, self.alpha, self.tolerance = strategy, alpha, tolerance
        super().__init__(**kwargs)


class CBDChainModel(PreTrainedModel):
    """What the Auto classes call; what comes back is the plain class of the chain's architecture."""

    config_class = CBDChainConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any) -> Any:
        """`CBDModel.from_chain` with the wishes that transformers put into the config.

        Raises:
            ArgumentError: If no size was asked for.
            CBDError: As `CBDModel.from_chain`.
        """
        wishes = {name: kwargs.pop(name, getattr(config, name, None)) for name in _WISHES}
        if all(wishes[name] is None for name in ("size", "memory_budget", "min_tokens_per_second", "max_latency", "shape")):
            raise ArgumentError(
                f'{pretrained_model_name_or_path} is a chain, which gives many sizes; say which: from_pretrained("{pretrained_model_name_or_path}", size="...")'
            )
        for name in ("adapter_kwargs", "_from_auto", "_commit_hash", "commit_hash"):  # what the Auto classes add of their own
            kwargs.pop(name, None)
        if getattr(config, "_attn_implementation", None) is not None:  # transformers takes it into the config
            kwargs.setdefault("attn_implementation", config._attn_implementation)
        if not kwargs.get("subfolder"):
            kwargs.pop("subfolder", None)
        return CBDModel.from_chain(pretrained_model_name_or_path, **wishes, **kwargs)


AutoConfig.register(MODEL_TYPE, CBDChainConfig, exist_ok=True)
AutoModelForCausalLM.register(CBDChainConfig, CBDChainModel, exist_ok=True)
