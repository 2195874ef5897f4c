"""What the conversion, the native model and the runtime have to know about a model family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Architecture", "AttentionShape", "Projections"]


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """GQA/MHA attention of one layer; head h reads KV head h // (num_heads // num_kv_heads).

    Args:
        rotary_dim: numbers of a head that RoPE turns, the first ones; pair p is rows p and p + rotary_dim / 2.
        softmax_scale: applied to q·k before the soft-cap and the softmax.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        sliding_window: a query sees itself and the sliding_window - 1 tokens before it; 0 is off.
        qkv_bias, o_bias: biases of the query, key and value projections; of the output projection.
        qk_norm_eps: epsilon of the RMSNorm that each head's query and key pass before RoPE; None without such a norm.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    softmax_scale: float
    softcap: float = 0.0
    sliding_window: int = 0
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm_eps: float | None = None

    @property
    def num_frequencies(self) -> int:
        """RoPE pairs of a head."""
        return self.rotary_dim // 2

    @property
    def kv_dim(self) -> int:
        """Numbers of all KV heads' keys; as many values."""
        return self.num_kv_heads * self.head_dim

    @property
    def rope_dim(self) -> int:
        """Numbers of all KV heads' keys that RoPE turns."""
        return self.num_kv_heads * self.rotary_dim

    @property
    def cache_dim(self) -> int:
        """Numbers cached per token before the conversion."""
        return 2 * self.kv_dim

    def check_ranks(self, kv_lora_rank: int, qk_rope_head_dim: int) -> None:
        """ValueError for a latent and a RoPE key that the attention cannot be converted to."""
        if qk_rope_head_dim < 8 or qk_rope_head_dim % 8 or self.rotary_dim % qk_rope_head_dim:
            raise ValueError(
                f"qk_rope_head_dim must be a multiple of 8 that divides the {self.rotary_dim} numbers of a head that "
                f"RoPE turns, got {qk_rope_head_dim}; kv_lora_rank='full' keeps RoPE on all of them"
            )
        most = self.cache_dim - qk_rope_head_dim
        if not 8 <= kv_lora_rank <= most or kv_lora_rank % 8:
            raise ValueError(
                f"kv_lora_rank must be a multiple of 8 from 8 to {most} (nothing lost), got {kv_lora_rank}"
            )


@dataclass(frozen=True)
class Projections:
    """Weights of one attention layer, rows grouped by head; None for what the family does not have."""

    w_q: Tensor  # [num_heads * head_dim, hidden_size]
    w_k: Tensor  # [num_kv_heads * head_dim, hidden_size]
    w_v: Tensor  # [num_kv_heads * head_dim, hidden_size]
    w_o: Tensor  # [hidden_size, num_heads * head_dim]
    b_q: Tensor | None = None  # [num_heads * head_dim]
    b_k: Tensor | None = None  # [num_kv_heads * head_dim]
    b_v: Tensor | None = None  # [num_kv_heads * head_dim]
    b_o: Tensor | None = None  # [hidden_size]
    q_norm: Tensor | None = None  # [head_dim], RMSNorm weight of each head's query
    k_norm: Tensor | None = None  # [head_dim], of each head's key


class Architecture:
    """One family, over the modules that transformers has for it: `model.model.layers[i].self_attn`.

    The methods here are right for a family like Llama: RMSNorm, SwiGLU, rotate-half RoPE over the whole head. A file of
    this package overrides what its family does otherwise; no other part of the package asks which family it has.
    """

    model_type: ClassVar[str]
    models: ClassVar[str]  # the best-known ones
    attention: ClassVar[str]  # what its attention may have that is worth knowing
    stock: ClassVar[str]  # whether it has a stock export, and if not why
    # Which of attention_bias, sliding_window, layer_types and partial_rotary_factor its attention reads in the config;
    # a config may hold the others and mean nothing by it.
    reads: ClassVar[tuple[str, ...]] = ()
    stock_format: ClassVar[Literal["deepseek_v3", "deepseek_v2"]] = "deepseek_v3"

    def unsupported(self, config: PretrainedConfig) -> str | None:
        """Why this model cannot be converted at all, or None."""
        shape = self.shape(config)
        if shape.rotary_dim % 2 or not 0 < shape.rotary_dim <= shape.head_dim:
            return f"RoPE needs an even part of head_dim={shape.head_dim}, got {shape.rotary_dim}"
        if shape.num_heads % shape.num_kv_heads:
            return f"num_attention_heads={shape.num_heads} is no multiple of num_key_value_heads={shape.num_kv_heads}"
        return None

    def no_stock_export(self, config: PretrainedConfig) -> str | None:
        """What of this model a DeepSeek checkpoint has no place for, or None."""
        shapes = [self.shape(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        context = config.max_position_embeddings
        rope_type = config.rope_parameters.get("rope_type", "default")
        act = getattr(config, "hidden_act", None) or config.hidden_activation
        mlp_bias = getattr(config, "mlp_bias", False)
        features = {
            "a norm of queries and keys": shapes[0].qk_norm_eps is not None,
            "biases, which engines skip silently": shapes[0].qkv_bias or shapes[0].o_bias or mlp_bias,
            "soft-capped scores": shapes[0].softcap > 0,
            f"a window of less than its {context} positions": any(0 < s.sliding_window < context for s in shapes),
            f"RoPE of type {rope_type}": rope_type not in ("default", "llama3"),
            f"the activation {act}": act != "silu",
            **self.other_features(config),
        }
        return ", ".join(feature for feature, present in features.items() if present) or None

    def other_features(self, config: PretrainedConfig) -> Mapping[str, bool]:
        """What else than its attention has no place in a DeepSeek checkpoint, and whether this model has it."""
        return {}

    def shape(self, config: PretrainedConfig, layer_idx: int = 0) -> AttentionShape:
        """Of one layer; the layers of a model differ in their sliding_window at most."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        bias = "attention_bias" in self.reads and config.attention_bias
        windowed = "layer_types" not in self.reads or config.layer_types[layer_idx] == "sliding_attention"
        window = config.sliding_window if "sliding_window" in self.reads and windowed else None
        partial = config.rope_parameters["partial_rotary_factor"] if "partial_rotary_factor" in self.reads else 1.0
        return AttentionShape(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            rotary_dim=int(head_dim * partial),
            softmax_scale=head_dim**-0.5,
            sliding_window=window or 0,
            qkv_bias=bias,
            o_bias=bias,
        )

    def projections(self, attention: nn.Module) -> Projections:
        """The weights of an attention module."""
        weights = {name: parameter.detach() for name, parameter in attention.named_parameters()}
        return Projections(
            *(weights[f"{name}_proj.weight"] for name in "qkvo"),
            *(weights.get(f"{name}_proj.bias") for name in "qkvo"),
            *(weights.get(f"{name}_norm.weight") for name in "qk"),
        )

    def embedding_scale(self, config: PretrainedConfig) -> float:
        """What the model multiplies its token embeddings by, where the embedding module does not."""
        return 1.0

    def residual_scale(self, config: PretrainedConfig) -> float:
        """What the output of each attention and MLP is multiplied by on its way into the residual stream."""
        return 1.0

    def logits_scale(self, config: PretrainedConfig) -> float:
        """What the head's output is multiplied by."""
        return 1.0

    def logits_softcap(self, config: PretrainedConfig) -> float:
        """Logits become softcap * tanh(logits / softcap) after that; 0 is off."""
        return 0.0

    def logits(self, config: PretrainedConfig, raw: Tensor) -> Tensor:
        """Logits from the output of the head."""
        scale, softcap = self.logits_scale(config), self.logits_softcap(config)
        logits = raw if scale == 1 else raw * scale
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    def stored(self, name: str, config: PretrainedConfig) -> str | list[list[str]]:
        """Where published checkpoints keep the tensor that transformers calls `name`.

        A list is for experts that transformers stacks: one entry an expert, the tensors whose rows follow one another.
        """
        return name

    def stock_tensors(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What a DeepSeek checkpoint makes of a tensor that is no attention weight."""
        return {name: tensor}
