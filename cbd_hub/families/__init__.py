"""One small declarative table per architecture; `family_of` finds the one of a config."""

from typing import Any

from cbd_hub.errors import ArchitectureError
from cbd_hub.families.gemma import GEMMA3
from cbd_hub.families.gpt2 import GPT2
from cbd_hub.families.gpt_neox import GPT_NEOX
from cbd_hub.families.llama import LLAMA, MISTRAL
from cbd_hub.families.olmo import OLMO2
from cbd_hub.families.opt import OPT
from cbd_hub.families.qwen import QWEN2, QWEN3
from cbd_hub.families.table import Family, TensorSpec, linear, norm


__all__ = ["FAMILIES", "GPT2", "Family", "TensorSpec", "family_named", "family_of", "head_settings", "linear", "norm", "parts_rows", "register"]

FAMILIES: list[Family] = [LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, GPT2, GPT_NEOX, OPT, OLMO2]

_MULTIPLIED = ("hyperclovax",)  # by ``logits_scaling``, by which others divide
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def register(family: Family) -> Family:
    """Make a table known, in the place of one of the same name."""
    FAMILIES[:] = [known for known in FAMILIES if known.name != family.name] + [family]
    return family


def family_of(config: Any) -> Family:
    """The axis table of a transformers config.

    Raises:
        ArchitectureError: If the architecture has no table, or is a variant that its table is not for.
    """
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            if (unmet := family.unmet(config)) is not None:
                raise ArchitectureError(f"this {family.name} model has {unmet} to its axis table; choose a model without it, or add a table (see CONTRIBUTING.md)")
            return family
    experts = next((count for name in _EXPERTS if isinstance(count := getattr(config, name, None), int) and count > 1), None)
    if experts is not None:
        raise ArchitectureError(
            f'architecture "{model_type}" is a mixture of {experts} experts, which cannot be cut or interpolated; choose a dense model (it can still teach one)'
        )
    raise ArchitectureError(
        f'architecture "{model_type}" has no axis table; cbd_hub knows {_known("model_types")}. A new one is a table in cbd_hub/families (see CONTRIBUTING.md)'
    )


def family_named(name: str) -> Family:
    """The axis table of that name.

    Raises:
        ArchitectureError: If there is none.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ArchitectureError(f'family "{name}" has no axis table; cbd_hub knows {_known("name")}')


def parts_rows(config: Any) -> bool:
    """Whether an architecture tells the rows packed into a block apart by their positions; one without a table is taken to."""
    model_type = getattr(config, "model_type", None)
    return all(family.parts_rows for family in FAMILIES if model_type in family.model_types)


def head_settings(config: Any) -> dict[str, Any]:
    """The scale of a config's logits and their soft cap, of any architecture: a teacher beyond a bridge needs no table."""
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    if factor := getattr(config, "logits_scaling", None):
        scale = factor if config.model_type.startswith(_MULTIPLIED) else 1.0 / factor
    return {"logit_scale": float(scale), "softcap": getattr(config, "final_logit_softcapping", None)}


def _known(attribute: str) -> str:
    names = [getattr(family, attribute) for family in FAMILIES]
    return ", ".join(name for each in names for name in ([each] if isinstance(each, str) else each))
