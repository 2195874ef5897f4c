"""vLLM's plug-in: native checkpoints as models of vLLM."""

from __future__ import annotations

from ...architectures import ARCHITECTURES

__all__ = ["register"]


def register() -> None:
    """Tells vLLM's registry of every native architecture; an entry point of `vllm.general_plugins`.

    vLLM calls it in each of its processes. The classes are named and not imported, so that a process which only
    schedules stays light; importing this package has made AutoConfig know their configs.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    for base in ARCHITECTURES:
        name = f"TransMLA{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[base]}"
        ModelRegistry.register_model(name, f"{__name__}.model:{name}")
