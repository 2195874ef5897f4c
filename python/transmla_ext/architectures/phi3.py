"""Phi-3 and Phi-4: Llama with fused projections; RoPE over a part of the head in some."""

from __future__ import annotations

from torch import Tensor, nn

from .base import Architecture, Projections

__all__ = ["Phi3"]


class Phi3(Architecture):
    model_type = "phi3"
    models = "Phi-3, Phi-3.5, Phi-4, Phi-4-mini"
    attention = "fused qkv, partial RoPE; LongRoPE in transformers only"
    stock = "yes, without LongRoPE or a window"
    reads = ("sliding_window", "partial_rotary_factor")

    def projections(self, attention: nn.Module) -> Projections:
        w_o = attention.get_parameter("o_proj.weight").detach()
        qkv = attention.get_parameter("qkv_proj.weight").detach()
        kv_dim = (len(qkv) - w_o.shape[1]) // 2
        w_q, w_k, w_v = qkv.split((w_o.shape[1], kv_dim, kv_dim))
        return Projections(w_q, w_k, w_v, w_o)

    def stock_tensors(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not name.endswith(".gate_up_proj.weight"):
            return {name: tensor}
        gate, up = tensor.chunk(2)
        return {name.replace("gate_up", part): rows for part, rows in (("gate", gate), ("up", up))}
