"""Qwen3, dense and with experts: queries and keys are normalised, head by head, before RoPE."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from .base import Architecture, AttentionShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Qwen3", "Qwen3Moe"]


class Qwen3(Architecture):
    """The norm of a key divides by the size of all its components, so it has to come before any of them is dropped.

    A converted layer therefore computes the original's keys and values, normalises the keys, and compresses those: the
    latent holds normalised keys, the cache needs nothing else, and decoding absorbs W_UK as in every other family. The
    price is the original's two projections in front of the latent's, for each new token only. Queries are normalised
    as they were; their RoPE components are taken after that.
    """

    model_type = "qwen3"
    models = "Qwen3"
    attention = "RMSNorm of queries and keys"
    stock = "no: norm of queries and keys"
    reads: ClassVar[tuple[str, ...]] = ("attention_bias", "sliding_window", "layer_types")

    def shape(self, config: PretrainedConfig, layer_idx: int = 0) -> AttentionShape:
        return replace(super().shape(config, layer_idx), qk_norm_eps=config.rms_norm_eps)


class Qwen3Moe(Qwen3):
    model_type = "qwen3_moe"
    models = "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder"
    attention = "RMSNorm of queries and keys; experts untouched"
    stock = "no: norm of queries and keys"
    reads = ("attention_bias", "sliding_window")

    def stored(self, name: str, config: PretrainedConfig) -> str | list[list[str]]:
        mlp, found, stacked = name.partition(".experts.")
        if not found:
            return name
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[stacked]
        return [[f"{mlp}.experts.{expert}.{part}.weight" for part in parts] for expert in range(config.num_experts)]
