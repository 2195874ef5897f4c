"""One layer's latent attention over the paged cache."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import MLAConfig
from ..models.functional import equal_head_dims, rotate_pairs
from .cache import StepTables

__all__ = ["PagedAttention", "Piece", "Step", "cut_pieces"]


@dataclass(frozen=True)
class Piece:
    """The new tokens of one sequence in a packed prefill step."""

    new: slice  # of the step's tokens
    seqlen: int  # tokens in the cache, the new ones included
    blocks: Tensor  # [ceil(seqlen / block_size)], int32
    # By sliding window, [num_new, seqlen], bool; None: the whole sequence, causal. No masks: ops.mla_prefill attends.
    masks: Mapping[int, Tensor | None] | None


@dataclass(frozen=True)
class Step:
    """What the attention layers of one forward pass share."""

    tables: StepTables
    pieces: Sequence[Piece] | None  # None: one new token for each sequence
    latent_caches: Sequence[Tensor]  # by layer
    cos_sin: Sequence[Tensor]  # by layer, [max_position, qk_rope_head_dim], fp32: cosines, then sines
    batch_invariant: bool  # ops.mla_decode's, for one new token each


def cut_pieces(
    num_new: Sequence[int],
    seqlens: Sequence[int],
    block_table: Tensor,
    block_size: int,
    sliding_windows: Collection[int] | None,
) -> list[Piece]:
    """The pieces of a packed prefill step, in order.

    Args:
        num_new, seqlens: of each sequence, new tokens and tokens in the cache, the new ones included.
        block_table: [batch_size, max_blocks], int32.
        sliding_windows: of the layers, where they need masks; None: ops.mla_prefill attends.
    """
    pieces = []
    start = 0
    for num, seqlen, blocks in zip(num_new, seqlens, block_table, strict=True):
        masks = None
        if sliding_windows is not None:
            masks = {window: _mask(num, seqlen, window, block_table.device) for window in sliding_windows}
        pieces.append(Piece(slice(start, start + num), seqlen, blocks[: -(-seqlen // block_size)], masks))
        start += num
    return pieces


def _mask(num: int, seqlen: int, window: int, device: torch.device) -> Tensor | None:
    """Which tokens the last num of a sequence see: [num, seqlen], bool; None if that is just causal."""
    if num == seqlen and not 0 < window < seqlen:
        return None
    mask = torch.ones(num, seqlen, dtype=torch.bool, device=device).tril(seqlen - num)
    return mask.triu(seqlen - num - window + 1) if window else mask


class PagedAttention(nn.Module):
    """Latent attention with the weights of a native or DeepSeek attention module, which it replaces in a decoder layer.

    One new token for each sequence runs absorbed, through the ops; a prompt expands keys and values once per chunk, for
    ops.mla_prefill or, where that has no kernel, for SDPA. SDPA does not soft-cap scores, so there such a prompt runs
    absorbed. Where queries and keys are normalised, the projections in front of the norms run in plain torch.

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
        shape = getattr(attention, "shape", None)
        self.softcap = 0.0 if shape is None else float(shape.softcap)
        self.sliding_window = 0 if shape is None else int(shape.sliding_window)
        self.normed = attention if hasattr(attention, "k_norm") else None
        self.o_proj = attention.o_proj
        self.kv_a = attention.kv_a_proj_with_mqa
        self.w_kv_b = attention.kv_b_proj.weight
        self.w_uk, self.w_uv = self.w_kv_b.unflatten(0, (-1, mla.qk_nope_head_dim + mla.v_head_dim)).split(
            (mla.qk_nope_head_dim, mla.v_head_dim), dim=1
        )
        self.w_q_a = attention.q_a_proj.weight if mla.q_lora_rank is not None else None
        self.q = attention.q_proj if mla.q_lora_rank is None else attention.q_b_proj
        q_a_norm, kv_norm = (getattr(attention, name, None) for name in ("q_a_layernorm", "kv_a_layernorm"))
        self.q_a_norm = None if q_a_norm is None else q_a_norm.weight
        self.kv_norm = None if kv_norm is None else kv_norm.weight
        self.norm_eps = 0.0 if kv_norm is None else float(kv_norm.variance_epsilon)
        # Collected once: a parameter that is asked of its module costs more than an argument.
        self._weights = {
            "w_q": self.q.weight,
            "w_kv_a": self.kv_a.weight,
            "w_uk": self.w_uk,
            "w_q_a": self.w_q_a,
            "q_a_norm": self.q_a_norm,
            "kv_norm": self.kv_norm,
            "b_q": self.q.bias,
            "b_kv_a": self.kv_a.bias,
            "norm_eps": self.norm_eps,
        }

    def forward(self, hidden_states: Tensor, step: Step, **_: Any) -> tuple[Tensor, None]:
        """Attention output [1, num_tokens, hidden_size] for the packed tokens of a step."""
        attend = self._decode if step.pieces is None else self._prefill
        return self.o_proj(attend(hidden_states[0], step).flatten(1)).unsqueeze(0), None

    def _decode(self, hidden: Tensor, step: Step) -> Tensor:
        tables, latent_cache = step.tables, step.latent_caches[self.layer_idx]
        if self.normed is not None:
            q = self._absorb(self._append(hidden, step)[0])
        else:
            q = ops.mla_project(
                hidden,
                cos_sin=step.cos_sin[self.layer_idx],
                positions=tables.positions,
                slot_mapping=tables.slot_mapping,
                latent_cache=latent_cache,
                **self._weights,
            )
        return self._attend_absorbed(
            q.unsqueeze(1), latent_cache, tables.block_table, tables.cache_seqlens, batch_invariant=step.batch_invariant
        )

    def _prefill(self, hidden: Tensor, step: Step) -> Tensor:
        latent_cache = step.latent_caches[self.layer_idx]
        q, new_rows = self._append(hidden, step)
        outs = []
        for piece in step.pieces or ():
            if self.softcap and piece.masks is not None:
                seqlen = torch.tensor([piece.seqlen], dtype=torch.int32, device=q.device)
                absorbed = self._absorb(q[piece.new]).unsqueeze(0)
                outs.append(self._attend_absorbed(absorbed, latent_cache, piece.blocks.unsqueeze(0), seqlen))
                continue
            whole = piece.new.stop - piece.new.start == piece.seqlen
            rows = new_rows[piece.new] if whole else latent_cache[piece.blocks].flatten(0, 1)[: piece.seqlen]
            if piece.masks is None:
                outs.append(self._attend_fused(q[piece.new], rows))
            else:
                outs.append(self._attend_sdpa(q[piece.new], rows, piece.masks[self.sliding_window]))
        return torch.cat(outs)

    def _append(self, hidden: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Queries [num_tokens, num_heads, nope + rope] and cache rows of new tokens, rotated; the rows are stored."""
        mla, latent_cache = self.mla, step.latent_caches[self.layer_idx]
        cos, sin = step.cos_sin[self.layer_idx][step.tables.positions].chunk(2, dim=-1)
        q_nope, q_pe, kv_a = self._project(hidden)
        latent, k_pe = kv_a.split((mla.kv_lora_rank, mla.qk_rope_head_dim), dim=-1)
        if self.kv_norm is not None:
            latent = F.rms_norm(latent, latent.shape[-1:], self.kv_norm, self.norm_eps)
        new_rows = torch.cat((latent, rotate_pairs(k_pe, cos, sin).to(latent.dtype)), dim=-1)
        latent_cache.view(-1, mla.cache_dim)[step.tables.slot_mapping] = new_rows
        q_pe = rotate_pairs(q_pe, cos.unsqueeze(1), sin.unsqueeze(1)).to(q_nope.dtype)
        return torch.cat((q_nope, q_pe), dim=-1), new_rows

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.normed is not None:
            return *self.normed.queries(hidden), self.normed.latents(hidden)
        q_in = hidden if self.w_q_a is None else F.linear(hidden, self.w_q_a)
        if self.q_a_norm is not None:
            q_in = F.rms_norm(q_in, q_in.shape[-1:], self.q_a_norm, self.norm_eps)
        q = self.q(q_in).unflatten(-1, (self.w_uk.size(0), -1))
        return *q.split((self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim), dim=-1), self.kv_a(hidden)

    def _absorb(self, q: Tensor) -> Tensor:
        """Queries over cache rows, [num_tokens, num_heads, kv_lora_rank + rope], from those over keys."""
        q_nope, q_pe = q.split((self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim), dim=-1)
        return torch.cat((torch.bmm(q_nope.transpose(0, 1), self.w_uk).transpose(0, 1), q_pe), dim=-1)

    def _attend_absorbed(
        self,
        q: Tensor,
        latent_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        *,
        batch_invariant: bool = False,
    ) -> Tensor:
        """[batch_size * seqlen_q, num_heads, v_head_dim] from queries [batch_size, seqlen_q, num_heads, cache_dim]."""
        out, _ = ops.mla_decode(
            q,
            latent_cache,
            block_table,
            cache_seqlens,
            self.mla.kv_lora_rank,
            self.softmax_scale,
            softcap=self.softcap,
            sliding_window=self.sliding_window,
            batch_invariant=batch_invariant,
        )
        return ops.linear(out.flatten(0, 1), self.w_uv)

    def _attend_fused(self, q: Tensor, rows: Tensor) -> Tensor:
        """Attention of a sequence's new tokens over its cache rows: [num_new, num_heads, v_head_dim]."""
        if self.sliding_window:
            rows = rows[-(len(q) + self.sliding_window - 1) :]  # nobody sees an earlier one
        kv, k_pe = self._expand(rows)
        cu_seqlens_q, cu_seqlens_k = (torch.tensor((0, len(x)), dtype=torch.int32) for x in (q, kv))
        out, _ = ops.mla_prefill(
            q,
            kv,
            k_pe,
            cu_seqlens_q,
            cu_seqlens_k,
            self.softmax_scale,
            softcap=self.softcap,
            sliding_window=self.sliding_window,
        )
        return out

    def _attend_sdpa(self, q: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
        """What ``_attend_fused`` computes, without a soft-cap."""
        mla, (kv, k_pe) = self.mla, self._expand(rows)
        k_nope, value = kv.split((mla.qk_nope_head_dim, mla.v_head_dim), dim=-1)
        key = torch.cat((k_nope, k_pe.unsqueeze(1).expand(-1, kv.size(1), -1)), dim=-1)
        q, key, value = (x.transpose(0, 1).unsqueeze(0) for x in equal_head_dims(q, key, value))
        out = F.scaled_dot_product_attention(
            q, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale
        )
        return out[0, ..., : mla.v_head_dim].transpose(0, 1)

    def _expand(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[num_tokens, num_heads, nope + v_head_dim] keys and values, and [num_tokens, rope] keys, of cache rows."""
        latent, k_pe = rows.split((self.mla.kv_lora_rank, self.mla.qk_rope_head_dim), dim=-1)
        return F.linear(latent, self.w_kv_b).unflatten(-1, (self.w_uk.size(0), -1)), k_pe
