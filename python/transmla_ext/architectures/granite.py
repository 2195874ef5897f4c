"""Granite 3: Llama with a scale on embeddings, scores, residuals and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .base import Architecture, AttentionShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Granite"]


class Granite(Architecture):
    model_type = "granite"
    models = "Granite 3.x"
    attention = "attention_multiplier"
    stock = "yes"
    reads = ("attention_bias",)

    def shape(self, config: PretrainedConfig, layer_idx: int = 0) -> AttentionShape:
        return replace(super().shape(config, layer_idx), softmax_scale=config.attention_multiplier)

    def embedding_scale(self, config: PretrainedConfig) -> float:
        return float(config.embedding_multiplier)

    def residual_scale(self, config: PretrainedConfig) -> float:
        return float(config.residual_multiplier)

    def logits_scale(self, config: PretrainedConfig) -> float:
        return 1 / float(config.logits_scaling)
