"""Weights of one MLA layer from the original's weights, a RoPE split and a latent basis."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..architectures import AttentionShape, Projections
from ..config import MLAConfig
from .low_rank import LatentBasis
from .rope_split import RopeSplit

__all__ = ["MLALayer", "build_layer", "truncated"]


@dataclass(frozen=True)
class MLALayer:
    """One converted attention layer: its shape and its weights under the names of models.MLAAttention, fp32."""

    config: MLAConfig
    weights: dict[str, Tensor]


def build_layer(
    weights: Projections,
    shape: AttentionShape,
    split: RopeSplit,
    latent: LatentBasis,
    rope_scale: float,
    q_basis: Tensor | None = None,
) -> MLALayer:
    """Folds the bases into DeepSeek's projections.

    A head keeps its own head_dim query numbers as q_nope, so W_UK of a head is the way from the latent back to that
    head's keys, less the components that keep RoPE; q_pe are the head's queries in the basis of those components.

    A bias of the keys adds the same number to all scores of a query, save where RoPE turns it; a bias of the values
    adds the same vector to every output. So the latent carries neither: the one stays in the RoPE rows, the other goes
    to the bias of o_proj. Behind a norm of the keys nothing folds: the original's projections stay in front.

    Args:
        rope_scale: of the original's cosines and sines; queries and keys have it, so what loses RoPE gets its square.
        q_basis: [num_heads * head_dim, q_lora_rank], orthonormal columns: the query projection is factored over it.
    """
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    kv_head = torch.arange(heads) // (heads // kv_heads)
    w_q, w_k, w_v = (weight.double() for weight in (weights.w_q, weights.w_k, weights.w_v))
    rope_of_keys = split.rope_keys.flatten(1)  # [qk_rope_head_dim, kv_dim]
    rope_of_queries = split.rope_queries.transpose(0, 1)  # [kv_heads, qk_rope_head_dim, head_dim]
    has_nope = len(split.nope_keys) > 0

    kv_b = latent.up_v.view(kv_heads, dim, -1)[kv_head]
    if has_nope:
        up_k = torch.einsum("ngd,nr->gdr", split.nope_queries, latent.up_k)
        up_k[:, : shape.rotary_dim] *= rope_scale**2
        kv_b = torch.cat([up_k[kv_head], kv_b], dim=1)
    config = MLAConfig(
        kv_lora_rank=len(latent.down),
        qk_rope_head_dim=2 * len(split.rope_slots),
        qk_nope_head_dim=dim if has_nope else 0,
        v_head_dim=dim,
        rope_slots=split.rope_slots,
        q_lora_rank=None if q_basis is None else q_basis.shape[1],
    )
    named: dict[str, Tensor | None] = {
        "kv_b_proj.weight": kv_b.flatten(0, 1),
        "o_proj.weight": weights.w_o,
        "o_proj.bias": weights.b_o,
    }

    q_source, b_q = w_q if q_basis is None else q_basis, weights.b_q
    if weights.k_norm is None:
        nope = torch.eye(dim if has_nope else 0, dim, dtype=w_q.dtype, device=w_q.device).expand(heads, -1, -1)
        own = torch.cat([nope, rope_of_queries[kv_head]], dim=1)  # per head, over its query numbers
        q_source = (own @ q_source.view(heads, dim, -1)).flatten(0, 1)
        named["kv_a_proj_with_mqa.weight"] = torch.cat([latent.down @ torch.cat([w_k, w_v]), rope_of_keys @ w_k])
        if weights.b_q is not None and weights.b_k is not None and weights.b_v is not None:
            b_q = (own @ weights.b_q.double().view(heads, dim, 1)).flatten()
            b_rope = rope_of_keys @ weights.b_k.double()
            named["kv_a_proj_with_mqa.bias"] = torch.cat([b_rope.new_zeros(config.kv_lora_rank), b_rope])
            b_o = weights.w_o.double() @ weights.b_v.double().view(kv_heads, dim)[kv_head].flatten()
            named["o_proj.bias"] = b_o if weights.b_o is None else b_o + weights.b_o
    else:
        of_values = rope_of_keys.new_zeros(len(rope_of_keys), shape.kv_dim)
        named |= {
            "q_norm.weight": weights.q_norm,
            "q_rope_proj.weight": rope_of_queries.flatten(0, 1),
            "kv_proj.weight": torch.cat([w_k, w_v]),
            "kv_proj.bias": _cat(weights.b_k, weights.b_v),
            "k_norm.weight": weights.k_norm,
            "kv_a_proj_with_mqa.weight": torch.cat([latent.down, torch.cat([rope_of_keys, of_values], dim=1)]),
        }
    if q_basis is None:
        named |= {"q_proj.weight": q_source, "q_proj.bias": b_q}
    else:
        named |= {"q_a_proj.weight": q_basis.mT @ w_q, "q_b_proj.weight": q_source, "q_b_proj.bias": b_q}
    # Copies, of w_o and the norms too: the layer may be trained, and the original has to stay what it is.
    own_weights = {name: w.to(torch.float32, copy=True).contiguous() for name, w in named.items() if w is not None}
    return MLALayer(config, own_weights)


def truncated(layer: MLALayer, kv_lora_rank: int) -> MLALayer:
    """What build_layer() makes of the first kv_lora_rank directions of the same basis."""
    rank = layer.config.kv_lora_rank
    weights = dict(layer.weights)
    for name, weight in layer.weights.items():
        if name.startswith("kv_a_proj_with_mqa."):
            weights[name] = torch.cat([weight[:kv_lora_rank], weight[rank:]])
        elif name == "kv_b_proj.weight":
            weights[name] = weight[:, :kv_lora_rank].contiguous()
    return MLALayer(replace(layer.config, kv_lora_rank=kv_lora_rank), weights)


def _cat(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])
