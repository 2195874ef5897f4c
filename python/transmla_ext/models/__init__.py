"""The native format: the original architecture with multi-head latent attention, as ordinary transformers models."""

from __future__ import annotations

import sys
from typing import Any

from ..architectures import ARCHITECTURES, NATIVE_PREFIX, base_model_type

__all__ = ["MLAAttention", "base_model_type", "native_classes", "native_config", "original_config", "register"]


def register() -> None:
    """Makes AutoConfig and AutoModelForCausalLM know the native models; called on ``import transmla_ext``.

    Importing the classes takes seconds. transformers names its own models and imports their modules when a checkpoint
    asks for them, so the native ones are named the same way: this package stands in for the module, and
    ``__getattr__`` below builds the class.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

    for base in ARCHITECTURES:
        CONFIG_MAPPING_NAMES[NATIVE_PREFIX + base] = f"TransMLA{CONFIG_MAPPING_NAMES[base]}"
        sys.modules[f"transformers.models.{NATIVE_PREFIX}{base}"] = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    if name == "MLAAttention":
        from . import attention as module
    elif name in ("native_classes", "native_config", "original_config") or name.startswith("TransMLA"):
        from . import native as module  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
