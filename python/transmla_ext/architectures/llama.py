"""Llama: RMSNorm, SwiGLU, rotate-half RoPE over the whole head; also SmolLM2, TinyLlama and their like."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from .base import Architecture, AttentionShape, Projections

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Llama"]


class Llama(Architecture):
    model_type = "llama"

    def unsupported(self, config: PretrainedConfig) -> str | None:
        if config.attention_bias or config.mlp_bias:
            return "it has biases in its linear layers (attention_bias, mlp_bias), which are not handled yet"
        if config.head_dim % 2:
            return f"RoPE needs an even head_dim, got {config.head_dim}"
        if config.num_attention_heads % config.num_key_value_heads:
            return (
                f"num_attention_heads={config.num_attention_heads} is no multiple of "
                f"num_key_value_heads={config.num_key_value_heads}"
            )
        return None

    def no_stock_export(self, config: PretrainedConfig) -> str | None:
        rope_type = config.rope_parameters.get("rope_type", "default")
        if rope_type != "default":
            return f"engines read {rope_type} RoPE parameters of a DeepSeek-V3 model wrongly, and silently"
        if config.hidden_act != "silu":
            return f"DeepSeek-V3 engines compute hidden_act=silu only, got {config.hidden_act}"
        return None

    def shape(self, config: PretrainedConfig) -> AttentionShape:
        return AttentionShape(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            softmax_scale=config.head_dim**-0.5,
        )

    def projections(self, attention: nn.Module) -> Projections:
        weight = {name: attention.get_parameter(f"{name}_proj.weight").detach() for name in "qkvo"}
        return Projections(weight["q"], weight["k"], weight["v"], weight["o"])
