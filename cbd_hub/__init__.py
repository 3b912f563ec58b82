"""A language model in any size you want: distil a chain of anchors once, then get every size in between in seconds.

The names are loaded when they are first used: ``import cbd_hub`` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from cbd_hub.adapters import carry_adapter
    from cbd_hub.chain import Chain, assemble_chain
    from cbd_hub.comparing import evaluate_sizes
    from cbd_hub.distill.config import ChainDistillerConfig
    from cbd_hub.distill.distiller import ChainDistiller
    from cbd_hub.distill.heal import heal
    from cbd_hub.distill.recipe import distill_chain
    from cbd_hub.distill.schema import Recipe
    from cbd_hub.drafting import draft_table
    from cbd_hub.errors import CBDError
    from cbd_hub.model import CBDModel
    from cbd_hub.speed.measuring import measure_speed

__all__ = [
    "CBDError", "CBDModel", "Chain", "ChainDistiller", "ChainDistillerConfig", "Recipe", "assemble_chain", "carry_adapter", "distill_chain", "draft_table", "evaluate_sizes",
    "heal", "measure_speed",
]

_WHERE = {
    "CBDError": "cbd_hub.errors",
    "CBDModel": "cbd_hub.model",
    "Chain": "cbd_hub.chain",
    "ChainDistiller": "cbd_hub.distill.distiller",
    "ChainDistillerConfig": "cbd_hub.distill.config",
    "Recipe": "cbd_hub.distill.schema",
    "assemble_chain": "cbd_hub.chain",
    "carry_adapter": "cbd_hub.adapters",
    "distill_chain": "cbd_hub.distill.recipe",
    "draft_table": "cbd_hub.drafting",
    "evaluate_sizes": "cbd_hub.comparing",
    "heal": "cbd_hub.distill.heal",
    "measure_speed": "cbd_hub.speed.measuring",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("cbd-hub")  # pyproject.toml alone says it
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
