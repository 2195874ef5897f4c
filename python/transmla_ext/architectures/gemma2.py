"""Gemma 2: soft-capped scores and logits, a window in every other layer, a scale of its own, norms on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from .base import Architecture, AttentionShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Gemma2"]


class Gemma2(Architecture):
    model_type = "gemma2"
    models = "Gemma 2 2B, 9B, 27B"
    attention = "soft-capped scores, window in every other layer, query_pre_attn_scalar"
    stock = "no: soft-caps, norms after attention and MLP, GeGLU"
    reads = ("attention_bias", "sliding_window", "layer_types")

    def unsupported(self, config: PretrainedConfig) -> str | None:
        if config.attention_bias:
            return "a key bias does not cancel under its soft-cap; no published Gemma 2 has one"
        if config.use_bidirectional_attention:
            return "its attention is not causal"
        return super().unsupported(config)

    def other_features(self, config: PretrainedConfig) -> Mapping[str, bool]:
        return {"norms after attention and MLP": True, "soft-capped logits": self.logits_softcap(config) > 0}

    def shape(self, config: PretrainedConfig, layer_idx: int = 0) -> AttentionShape:
        return replace(
            super().shape(config, layer_idx),
            softmax_scale=config.query_pre_attn_scalar**-0.5,
            softcap=config.attn_logit_softcapping or 0.0,
        )

    def logits_softcap(self, config: PretrainedConfig) -> float:
        return config.final_logit_softcapping or 0.0
