"""One small declarative table per architecture; `family_of` finds the one of a config."""

from typing import Any

from cbd_hub.errors import ArchitectureError
from cbd_hub.families.gpt2 import GPT2
from cbd_hub.families.llama import LLAMA
from cbd_hub.families.table import Family, TensorSpec


__all__ = ["FAMILIES", "Family", "TensorSpec", "family_named", "family_of"]

FAMILIES: tuple[Family, ...] = (LLAMA, GPT2)


def family_of(config: Any) -> Family:
    """The axis table of a transformers config.

    Raises:
        ArchitectureError: If the architecture has no table.
    """
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ArchitectureError(
        f'architecture "{model_type}" has no axis table; cbd_hub knows {known}. A new one is a table in cbd_hub/families (see CONTRIBUTING.md)'
    )


def family_named(name: str) -> Family:
    """The axis table of that name.

    Raises:
        ArchitectureError: If there is none.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ArchitectureError(f'family "{name}" has no axis table; cbd_hub knows {known}')
