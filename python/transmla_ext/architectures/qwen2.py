"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .base import Architecture, AttentionShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Qwen2"]


class Qwen2(Architecture):
    model_type = "qwen2"
    models = "Qwen2, Qwen2.5, QwQ"
    attention = "q, k, v biases; sliding window in upper layers if set"
    stock = "no: biases"
    reads = ("sliding_window", "layer_types")

    def shape(self, config: PretrainedConfig, layer_idx: int = 0) -> AttentionShape:
        return replace(super().shape(config, layer_idx), qkv_bias=True)
