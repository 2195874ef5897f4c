"""Weights of one MLA layer from the original's weights, a RoPE split and a latent basis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures import AttentionShape, Projections
from ..config import MLAConfig
from .low_rank import LatentBasis
from .rope_split import RopeSplit

__all__ = ["MLALayer", "build_layer"]


@dataclass(frozen=True)
class MLALayer:
    """One converted attention layer: its shape and its weights under the names of models.MLAAttention, fp32."""

    config: MLAConfig
    weights: dict[str, Tensor]


def build_layer(
    weights: Projections, shape: AttentionShape, split: RopeSplit, latent: LatentBasis, q_basis: Tensor | None = None
) -> MLALayer:
    """Folds the bases into DeepSeek's projections.

    A head keeps its own head_dim query numbers as q_nope, so W_UK of a head is the way from the latent back to that
    head's keys, less the components that keep RoPE; q_pe are the head's queries in the basis of those components.

    Args:
        q_basis: [num_heads * head_dim, q_lora_rank], orthonormal columns: the query projection is factored over it.
    """
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    kv_head = torch.arange(heads) // (heads // kv_heads)
    w_q, w_k, w_v = (weight.double() for weight in (weights.w_q, weights.w_k, weights.w_v))

    k_pe = _interleave(split.kept.flatten(1), w_k.view(kv_heads, 2, -1, shape.hidden_size))
    kv_a = torch.cat([latent.down @ torch.cat([w_k, w_v]), k_pe])

    has_nope = len(split.dropped) > 0
    kv_b = latent.up_v.view(kv_heads, dim, -1)[kv_head]
    if has_nope:
        up_k = torch.einsum("ngd,nr->gdr", split.dropped_rows(), latent.up_k)[kv_head]
        kv_b = torch.cat([up_k, kv_b], dim=1)

    q_source = w_q if q_basis is None else q_basis  # rows: one per query number
    per_head = q_source.view(heads, dim, -1)
    q_pe = torch.stack(
        [_interleave(split.kept[:, kv_head[h]], per_head[h].view(1, 2, dim // 2, -1)) for h in range(heads)]
    )
    q = torch.cat([per_head, q_pe], dim=1) if has_nope else q_pe

    config = MLAConfig(
        kv_lora_rank=len(latent.down),
        qk_rope_head_dim=2 * len(split.rope_slots),
        qk_nope_head_dim=dim if has_nope else 0,
        v_head_dim=dim,
        rope_slots=split.rope_slots,
        q_lora_rank=None if q_basis is None else q_basis.shape[1],
    )
    named = {"kv_a_proj_with_mqa.weight": kv_a, "kv_b_proj.weight": kv_b.flatten(0, 1), "o_proj.weight": weights.w_o}
    if q_basis is None:
        named["q_proj.weight"] = q.flatten(0, 1)
    else:
        named |= {"q_a_proj.weight": q_basis.mT @ w_q, "q_b_proj.weight": q.flatten(0, 1)}
    return MLALayer(config, {name: weight.float().contiguous() for name, weight in named.items()})


def _interleave(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Components of RoPE pairs, interleaved: [slots, heads * pairs] over [heads, 2, pairs, n] -> [2 * slots, n]."""
    real, imaginary = (coefficients @ rows[:, part].flatten(0, 1) for part in (0, 1))
    return torch.stack([real, imaginary], dim=1).flatten(0, 1)
