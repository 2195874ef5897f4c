"""Mixtral: Mistral with a mixture of experts, which the conversion leaves alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Mixtral"]


class Mixtral(Architecture):
    """Its router is DeepSeek-V2's with renormalised weights; DeepSeek-V3's takes a sigmoid of every logit instead."""

    model_type = "mixtral"
    models = "Mixtral 8x7B, 8x22B"
    attention = "sliding window if set; experts untouched"
    stock = "yes, deepseek_v2: for vLLM and SGLang"
    reads = ("sliding_window",)
    stock_format = "deepseek_v2"

    def stored(self, name: str, config: PretrainedConfig) -> str | list[list[str]]:
        block, found, rest = name.partition(".mlp.")
        if not found:
            return name
        if rest == "gate.weight":
            return f"{block}.block_sparse_moe.gate.weight"
        parts = {"experts.gate_up_proj": ("w1", "w3"), "experts.down_proj": ("w2",)}[rest]
        return [
            [f"{block}.block_sparse_moe.experts.{expert}.{part}.weight" for part in parts]
            for expert in range(config.num_local_experts)
        ]

    def stock_tensors(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        mlp, found, stacked = name.partition(".experts.")
        if not found:
            return {name: tensor}
        parts = ("gate_proj", "up_proj") if stacked == "gate_up_proj" else ("down_proj",)
        # A DeepSeek layer has a shared expert, and no engine can be told that there is none: one of zeros adds nothing.
        experts = {f"experts.{number}": weight for number, weight in enumerate(tensor)}
        experts["shared_experts"] = torch.zeros_like(tensor[0])
        return {
            f"{mlp}.{expert}.{part}.weight": rows
            for expert, weight in experts.items()
            for part, rows in zip(parts, weight.chunk(len(parts)), strict=True)
        }
