"""Model families: one file each says where the weights are and what the family has that Llama has not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from .base import Architecture, AttentionShape, Projections
from .gemma2 import Gemma2
from .granite import Granite
from .llama import Llama
from .mistral import Mistral
from .mixtral import Mixtral
from .phi3 import Phi3
from .qwen2 import Qwen2
from .qwen3 import Qwen3, Qwen3Moe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "ARCHITECTURES",
    "NATIVE_PREFIX",
    "Architecture",
    "AttentionShape",
    "Projections",
    "base_model_type",
    "family",
    "lookup",
    "support_table",
]

NATIVE_PREFIX = "transmla_"

_FAMILIES = (Llama(), Mistral(), Mixtral(), Qwen2(), Qwen3(), Qwen3Moe(), Gemma2(), Phi3(), Granite())
ARCHITECTURES: dict[str, Architecture] = {architecture.model_type: architecture for architecture in _FAMILIES}


def family(model_type: str) -> Architecture:
    """The family of that name; UnsupportedModelError, naming those that are there, if there is none."""
    if model_type.startswith((NATIVE_PREFIX, "deepseek_v")):
        raise UnsupportedModelError(f"model_type '{model_type}' has multi-head latent attention already")
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"model_type '{model_type}' is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type]


def base_model_type(model_type: str) -> str | None:
    """The original's model type of a native one, ``transmla_<base>``; None for any other."""
    base = model_type.removeprefix(NATIVE_PREFIX)
    return base if base != model_type and base in ARCHITECTURES else None


def lookup(config: PretrainedConfig) -> Architecture:
    """The family of a model; UnsupportedModelError if it, or a feature that its config switches on, has no place."""
    architecture = family(config.model_type)
    reason = architecture.unsupported(config)
    if reason is not None:
        raise UnsupportedModelError(f"this {config.model_type} model cannot be converted: {reason}")
    return architecture


def support_table() -> list[tuple[str, str, str, str]]:
    """A row for each family, headings first."""
    rows = [("model_type", "for instance", "attention", "stock export")]
    return rows + [(a.model_type, a.models, a.attention, a.stock) for a in ARCHITECTURES.values()]
