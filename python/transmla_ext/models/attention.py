"""The attention module of the native format, in plain torch: what conversion builds and training differentiates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from ..config import MLAConfig
from .functional import equal_head_dims, rotate_pairs

__all__ = ["MLAAttention"]


class MLAAttention(nn.Module):
    """Multi-head latent attention with the softmax scale and the RoPE frequencies of the model it replaces.

    The weights carry DeepSeek's names. Per head, the rows of q are nope, then interleaved RoPE pairs, and those of
    kv_b_proj nope keys, then values. RoPE pair j turns with frequency mla.rope_slots[j] of the original model, whatever
    scaling that has. The cache holds the latent and the rotated shared key, one "head" each.

    Args:
        config: of the model; only its hidden size, heads, head_dim and attention dropout are read.
        mla: shape of this layer.
        layer_idx: which layer of the cache is this one's.
    """

    num_key_value_groups = 1  # transformers' attention functions ask; the keys are expanded here
    is_causal = True

    def __init__(self, config: PreTrainedConfig, mla: MLAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.mla = mla
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.scaling = (getattr(config, "head_dim", None) or config.hidden_size // self.num_heads) ** -0.5
        self.rope_slots = list(mla.rope_slots)

        q_dim = self.num_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        kv_dim = self.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        if mla.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, mla.q_lora_rank, bias=False)
            self.q_b_proj = nn.Linear(mla.q_lora_rank, q_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, mla.cache_dim, bias=False)
        self.kv_b_proj = nn.Linear(mla.kv_lora_rank, kv_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * mla.v_head_dim, config.hidden_size, bias=False)

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
            position_embeddings: cosines and sines of the original model, [batch_size or 1, seqlen, head_dim], a
                frequency's value in both halves.
            attention_mask: as the attention implementation of the config wants it.
        """
        mla = self.mla
        q = self.q_proj(hidden_states) if mla.q_lora_rank is None else self.q_b_proj(self.q_a_proj(hidden_states))
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q_nope, q_pe = q.split((mla.qk_nope_head_dim, mla.qk_rope_head_dim), dim=-1)
        kv_a = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)
        latent, k_pe = kv_a.split((mla.kv_lora_rank, mla.qk_rope_head_dim), dim=-1)

        cos, sin = (table[..., self.rope_slots].unsqueeze(1) for table in position_embeddings)
        q_pe, k_pe = rotate_pairs(q_pe, cos, sin), rotate_pairs(k_pe, cos, sin)
        if past_key_values is not None:
            latent, k_pe = past_key_values.update(latent, k_pe, self.layer_idx)

        attend = self._absorbed if self._absorbs(q) else self._expanded
        out, weights = attend(q_nope, q_pe, latent, k_pe, attention_mask, **kwargs)
        return self.o_proj(out.flatten(2)), weights

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
        return attention(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
