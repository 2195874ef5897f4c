"""One layer's latent attention over the paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import MLAConfig
from ..models.functional import equal_head_dims, rotate_pairs
from .cache import StepTables

__all__ = ["PagedAttention", "Piece", "Step"]


@dataclass(frozen=True)
class Piece:
    """The new tokens of one sequence in a packed prefill step."""

    new: slice  # of the step's tokens
    seqlen: int  # tokens in the cache, the new ones included
    blocks: Tensor  # [ceil(seqlen / block_size)], int32
    mask: Tensor | None  # [num_new, seqlen], bool; None where the new tokens are the whole sequence


@dataclass(frozen=True)
class Step:
    """What the attention layers of one forward pass share."""

    tables: StepTables
    pieces: Sequence[Piece] | None  # None: one new token for each sequence
    latent_caches: Sequence[Tensor]  # by layer
    cos_sin: Sequence[Tensor]  # by layer, [max_position, qk_rope_head_dim], fp32: cosines, then sines


class PagedAttention(nn.Module):
    """Latent attention with the weights of a native or DeepSeek attention module, which it replaces in a decoder layer.

    One new token for each sequence runs absorbed, through the ops; a prompt expands keys and values once per chunk.

    Args:
        attention: MLAAttention or DeepseekV3Attention.
        mla: its shape.
        layer_idx: which of the step's caches is this layer's.
    """

    def __init__(self, attention: Any, mla: MLAConfig, layer_idx: int) -> None:
        super().__init__()
        self.mla = mla
        self.layer_idx = layer_idx
        self.softmax_scale = float(attention.scaling)
        self.o_proj = attention.o_proj
        self.w_kv_a = attention.kv_a_proj_with_mqa.weight
        self.w_kv_b = attention.kv_b_proj.weight
        self.w_uk, w_uv = self.w_kv_b.unflatten(0, (-1, mla.qk_nope_head_dim + mla.v_head_dim)).split(
            (mla.qk_nope_head_dim, mla.v_head_dim), dim=1
        )
        self.w_uv_t = w_uv.mT
        self.w_q_a = attention.q_a_proj.weight if mla.q_lora_rank is not None else None
        self.w_q = (attention.q_proj if mla.q_lora_rank is None else attention.q_b_proj).weight
        q_a_norm, kv_norm = (getattr(attention, name, None) for name in ("q_a_layernorm", "kv_a_layernorm"))
        self.q_a_norm = None if q_a_norm is None else q_a_norm.weight
        self.kv_norm = None if kv_norm is None else kv_norm.weight
        self.norm_eps = 0.0 if kv_norm is None else float(kv_norm.variance_epsilon)

    def forward(self, hidden_states: Tensor, step: Step, **_: Any) -> tuple[Tensor, None]:
        """Attention output [1, num_tokens, hidden_size] for the packed tokens of a step."""
        attend = self._decode if step.pieces is None else self._prefill
        return self.o_proj(attend(hidden_states[0], step)).unsqueeze(0), None

    def _decode(self, hidden: Tensor, step: Step) -> Tensor:
        tables, latent_cache = step.tables, step.latent_caches[self.layer_idx]
        q = ops.mla_project(
            hidden,
            self.w_q,
            self.w_kv_a,
            self.w_uk,
            step.cos_sin[self.layer_idx],
            tables.positions,
            tables.slot_mapping,
            latent_cache,
            w_q_a=self.w_q_a,
            q_a_norm=self.q_a_norm,
            kv_norm=self.kv_norm,
            norm_eps=self.norm_eps,
        )
        out, _ = ops.mla_decode(
            q.unsqueeze(1),
            latent_cache,
            tables.block_table,
            tables.cache_seqlens,
            self.mla.kv_lora_rank,
            self.softmax_scale,
        )
        return torch.bmm(out.squeeze(1).transpose(0, 1), self.w_uv_t).transpose(0, 1).flatten(1)

    def _prefill(self, hidden: Tensor, step: Step) -> Tensor:
        mla, latent_cache = self.mla, step.latent_caches[self.layer_idx]
        cos, sin = step.cos_sin[self.layer_idx][step.tables.positions].chunk(2, dim=-1)

        kv_a = F.linear(hidden, self.w_kv_a)
        latent, k_pe = kv_a.split((mla.kv_lora_rank, mla.qk_rope_head_dim), dim=-1)
        if self.kv_norm is not None:
            latent = F.rms_norm(latent, latent.shape[-1:], self.kv_norm, self.norm_eps)
        new_rows = torch.cat((latent, rotate_pairs(k_pe, cos, sin).to(latent.dtype)), dim=-1)
        latent_cache.view(-1, mla.cache_dim)[step.tables.slot_mapping] = new_rows

        if self.w_q_a is not None:
            hidden = F.linear(hidden, self.w_q_a)
        if self.q_a_norm is not None:
            hidden = F.rms_norm(hidden, hidden.shape[-1:], self.q_a_norm, self.norm_eps)
        q = F.linear(hidden, self.w_q).unflatten(-1, (self.w_uk.size(0), -1))
        q_nope, q_pe = q.split((mla.qk_nope_head_dim, mla.qk_rope_head_dim), dim=-1)
        q = torch.cat((q_nope, rotate_pairs(q_pe, cos.unsqueeze(1), sin.unsqueeze(1)).to(q.dtype)), dim=-1)

        outs = []
        for piece in step.pieces or ():
            whole = piece.mask is None
            rows = new_rows[piece.new] if whole else latent_cache[piece.blocks].flatten(0, 1)[: piece.seqlen]
            outs.append(self._attend(q[piece.new], rows, piece.mask))
        return torch.cat(outs).flatten(1)

    def _attend(self, q: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Expanded attention of a sequence's new tokens over its cache rows: [num_new, num_heads, v_head_dim]."""
        mla, num_heads = self.mla, q.size(1)
        latent, k_pe = rows.split((mla.kv_lora_rank, mla.qk_rope_head_dim), dim=-1)
        kv = F.linear(latent, self.w_kv_b).unflatten(-1, (num_heads, -1))
        k_nope, value = kv.split((mla.qk_nope_head_dim, mla.v_head_dim), dim=-1)
        key = torch.cat((k_nope, k_pe.unsqueeze(1).expand(-1, num_heads, -1)), dim=-1)
        q, key, value = (x.transpose(0, 1).unsqueeze(0) for x in equal_head_dims(q, key, value))
        out = F.scaled_dot_product_attention(
            q, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale
        )
        return out[0, ..., : mla.v_head_dim].transpose(0, 1)
