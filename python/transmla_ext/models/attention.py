"""The attention module of the native format, in plain torch: what conversion builds and training differentiates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from ..architectures import base_model_type, family
from ..config import MLAConfig
from .functional import equal_head_dims, rotate_pairs

__all__ = ["MLAAttention"]


class MLAAttention(nn.Module):
    """Multi-head latent attention that takes the place of another model's.

    The weights carry DeepSeek's names. Per head, the rows of q are nope, then interleaved RoPE pairs, and those of
    kv_b_proj nope keys, then values. RoPE pair j turns with frequency mla.rope_slots[j] of the original model, whatever
    scaling that has. The cache holds the latent and the rotated shared key, one "head" each.

    What else the original's attention has (scale, soft-cap, window, biases) its Architecture says. Where it normalises
    queries and keys, q_proj, kv_proj, q_norm and k_norm are the original's; the nope part of a query is then its head's
    normalised query, q_rope_proj gives the RoPE part, and kv_a_proj_with_mqa compresses [normalised keys; values]
    (architectures/qwen3.py).

    Args:
        config: of the model, original or native.
        mla: shape of this layer.
        layer_idx: which layer of the model, and of the cache, is this one.
    """

    num_key_value_groups = 1  # transformers' attention functions ask; the keys are expanded here
    is_causal = True

    def __init__(self, config: PreTrainedConfig, mla: MLAConfig, layer_idx: int) -> None:
        super().__init__()
        architecture = family(base_model_type(config.model_type) or config.model_type)
        self.shape = shape = architecture.shape(config, layer_idx)
        self.config = config
        self.mla = mla
        self.layer_idx = layer_idx
        self.num_heads = shape.num_heads
        self.scaling = shape.softmax_scale
        self.rope_slots = list(mla.rope_slots)
        hidden_size, bias, normed = shape.hidden_size, shape.qkv_bias, shape.qk_norm_eps is not None

        q_dim = shape.head_dim if normed else mla.qk_nope_head_dim + mla.qk_rope_head_dim
        if mla.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, self.num_heads * q_dim, bias=bias)
        else:
            self.q_a_proj = nn.Linear(hidden_size, mla.q_lora_rank, bias=False)
            self.q_b_proj = nn.Linear(mla.q_lora_rank, self.num_heads * q_dim, bias=bias)
        if normed:
            self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.qk_norm_eps)
            self.q_rope_proj = nn.Linear(shape.head_dim, shape.num_kv_heads * mla.qk_rope_head_dim, bias=False)
            self.kv_proj = nn.Linear(hidden_size, 2 * shape.kv_dim, bias=bias)
            self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.qk_norm_eps)
        kv_a_in = 2 * shape.kv_dim if normed else hidden_size
        self.kv_a_proj_with_mqa = nn.Linear(kv_a_in, mla.cache_dim, bias=bias and not normed)
        kv_dim = self.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        self.kv_b_proj = nn.Linear(mla.kv_lora_rank, kv_dim, bias=False)
        # A value bias adds the same vector to every output, so it is part of this one.
        self.o_proj = nn.Linear(
            self.num_heads * mla.v_head_dim, hidden_size, bias=shape.o_bias or (bias and not normed)
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output [batch_size, seqlen, hidden_size], and the weights where the implementation has them.

        Args:
            hidden_states: [batch_size, seqlen, hidden_size].
            position_embeddings: cosines and sines of the original model, [batch_size or 1, seqlen, rotary_dim], a
                frequency's value in both halves.
            attention_mask: as the attention implementation of the config wants it.
        """
        mla = self.mla
        q_nope, q_pe = (q.transpose(1, 2) for q in self.queries(hidden_states))
        latent, k_pe = self.latents(hidden_states).unsqueeze(1).split((mla.kv_lora_rank, mla.qk_rope_head_dim), dim=-1)

        cos, sin = (table[..., self.rope_slots].unsqueeze(1) for table in position_embeddings)
        q_pe, k_pe = rotate_pairs(q_pe, cos, sin), rotate_pairs(k_pe, cos, sin)
        if past_key_values is not None:
            latent, k_pe = past_key_values.update(latent, k_pe, self.layer_idx)

        attend = self._absorbed if self._absorbs(q_pe) else self._expanded
        out, weights = attend(q_nope, q_pe, latent, k_pe, attention_mask, **kwargs)
        return self.o_proj(out.flatten(2)), weights

    def queries(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[..., num_heads, qk_nope_head_dim] and [..., num_heads, qk_rope_head_dim], before RoPE."""
        mla, shape = self.mla, self.shape
        q = self.q_proj(hidden_states) if mla.q_lora_rank is None else self.q_b_proj(self.q_a_proj(hidden_states))
        q = q.unflatten(-1, (self.num_heads, -1))
        if shape.qk_norm_eps is None:
            return tuple(q.split((mla.qk_nope_head_dim, mla.qk_rope_head_dim), dim=-1))
        q = self.q_norm(q)
        w_rope = self.q_rope_proj.weight.unflatten(0, (shape.num_kv_heads, -1))
        groups = q.unflatten(-2, (shape.num_kv_heads, -1))
        q_pe = torch.einsum("...gnd,gpd->...gnp", groups, w_rope).flatten(-3, -2)
        return q[..., : mla.qk_nope_head_dim], q_pe

    def latents(self, hidden_states: Tensor) -> Tensor:
        """[..., kv_lora_rank + qk_rope_head_dim]: the latent, then the shared key before RoPE."""
        kv = hidden_states
        if self.shape.qk_norm_eps is not None:
            k, v = self.kv_proj(hidden_states).chunk(2, dim=-1)
            k = self.k_norm(k.unflatten(-1, (self.shape.num_kv_heads, -1))).flatten(-2)
            kv = torch.cat((k, v), dim=-1)
        latents: Tensor = self.kv_a_proj_with_mqa(kv)
        return latents

    def _absorbs(self, q: Tensor) -> bool:
        # One query does not pay for expanding every cached token. Other implementations than these two encode
        # causality in ways that do not survive heads taking the place of queries.
        return q.size(2) == 1 and not torch.is_grad_enabled() and self._implementation in ("sdpa", "eager")

    @property
    def _implementation(self) -> str:
        # None on a config that no model was built from: the layer stands alone, and without a mask only sdpa is causal.
        return self.config._attn_implementation or "sdpa"

    def _expanded(
        self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        mla = self.mla
        kv = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope, value = kv.split((mla.qk_nope_head_dim, mla.v_head_dim), dim=-1)
        query = torch.cat((q_nope, q_pe), dim=-1)
        key = torch.cat((k_nope, k_pe.expand(-1, self.num_heads, -1, -1)), dim=-1)
        out, weights = self._attend(*equal_head_dims(query, key, value), attention_mask, **kwargs)
        return out[..., : mla.v_head_dim], weights

    def _absorbed(
        self, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        mla = self.mla
        w_uk, w_uv = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1)).split(
            (mla.qk_nope_head_dim, mla.v_head_dim), dim=1
        )
        query = torch.cat((torch.einsum("bhtn,hnr->bthr", q_nope, w_uk), q_pe.transpose(1, 2)), dim=-1)
        key = torch.cat((latent, k_pe), dim=-1)
        out, weights = self._attend(query, key, latent, attention_mask, **kwargs | {"is_causal": False})
        out = torch.einsum("bhtr,hvr->bthv", out, w_uv)
        return out, None if weights is None else weights.transpose(1, 2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        attention: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self._implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        features = {"sliding_window": self.shape.sliding_window or None, "softcap": self.shape.softcap or None}
        return attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **features, **kwargs
        )
