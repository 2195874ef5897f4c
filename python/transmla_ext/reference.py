"""What every op means, in plain torch at the dtype of its inputs: fp64 in gives the meaning itself, bf16 in gives what
eager torch makes of it. Signatures, shapes and semantics are those of ``ops``; nothing here is fast."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "batched_pca",
    "batched_svd",
    "covariance_add_",
    "linear",
    "merge_attn_states",
    "mla_decode",
    "mla_prefill",
    "mla_project",
    "rms_norm",
]


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _widen(x)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def mla_project(
    hidden: Tensor,
    w_q: Tensor,
    w_kv_a: Tensor,
    w_uk: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    latent_cache: Tensor,
    *,
    w_q_a: Tensor | None = None,
    q_a_norm: Tensor | None = None,
    kv_norm: Tensor | None = None,
    b_q: Tensor | None = None,
    b_kv_a: Tensor | None = None,
    norm_eps: float = 1e-6,
    cache_scales: Tensor | None = None,
) -> Tensor:
    num_heads, qk_nope_head_dim, kv_lora_rank = w_uk.shape
    cos, sin = cos_sin.to(hidden.dtype)[positions].chunk(2, dim=-1)

    latent, k_pe = F.linear(hidden, w_kv_a, b_kv_a).tensor_split((kv_lora_rank,), dim=-1)
    if kv_norm is not None:
        latent = rms_norm(latent, kv_norm, norm_eps)
    stored = slot_mapping >= 0
    block, offset = slot_mapping[stored] // latent_cache.size(1), slot_mapping[stored] % latent_cache.size(1)
    rows = torch.cat((latent, _rotate(k_pe, cos, sin)), dim=-1)[stored]
    if cache_scales is not None and latent_cache.dtype == torch.int8:
        parts = rows.tensor_split((kv_lora_rank,), dim=-1)
        largest = torch.stack([_widen(F.pad(part, (0, 1)).abs().amax(-1)) for part in parts], dim=-1)
        scales = largest / torch.iinfo(torch.int8).max
        scales = scales.where(scales >= torch.finfo(torch.float32).tiny, 1)
        cache_scales[block, offset] = scales = scales.where(largest.isfinite(), torch.nan)
        rows = torch.cat([part / scale for part, scale in zip(parts, scales.split(1, -1), strict=True)], dim=-1).round()
    elif cache_scales is not None:
        scales = _widen(rows.abs().amax(-1)) / torch.finfo(torch.float8_e4m3fn).max
        mantissa, exponent = torch.frexp(scales)
        powers = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())  # 1 for zeros
        cache_scales[block, offset] = scales = powers.where(scales.isfinite(), torch.nan)
        rows = rows / scales[:, None]
    latent_cache[block, offset] = rows.to(latent_cache.dtype)

    q_in = hidden if w_q_a is None else hidden @ w_q_a.T
    if q_a_norm is not None:
        q_in = rms_norm(q_in, q_a_norm, norm_eps)
    q_nope, q_pe = F.linear(q_in, w_q, b_q).unflatten(-1, (num_heads, -1)).tensor_split((qk_nope_head_dim,), dim=-1)
    q_latent = torch.einsum("thn,hnr->thr", q_nope, w_uk)
    return torch.cat((q_latent, _rotate(q_pe, cos[:, None], sin[:, None])), dim=-1)


def mla_decode(
    q: Tensor,
    latent_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    *,
    softcap: float = 0.0,
    sliding_window: int = 0,
    num_splits: int = 0,
    batch_invariant: bool = False,
    cache_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch_size, seqlen_q, num_heads, _ = q.shape
    block_size = latent_cache.size(1)
    out = q.new_empty(batch_size, seqlen_q, num_heads, kv_lora_rank)
    lse = _widen(q.new_empty(batch_size, num_heads, seqlen_q))
    for i, seqlen in enumerate(cache_seqlens.tolist()):
        blocks = block_table[i, : -(-seqlen // block_size)].long()
        keys = latent_cache[blocks].flatten(0, 1)[:seqlen]
        if cache_scales is not None:
            scales = cache_scales[blocks].flatten(0, 1)[:seqlen]
            if keys.dtype == torch.int8:
                sizes = torch.tensor([kv_lora_rank, keys.size(-1) - kv_lora_rank], device=q.device)
                scales = scales.repeat_interleave(sizes, dim=-1)
            else:
                scales = scales[:, None]
            keys = (keys.to(scales.dtype) * scales).to(q.dtype)
        scores = torch.einsum("qhd,kd->hqk", q[i], keys) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        # Distance from each new query (row) back to each cached token.
        past = torch.arange(seqlen - seqlen_q, seqlen)[:, None] - torch.arange(seqlen)
        unseen = (past < 0) | ((past >= sliding_window) if sliding_window else False)
        scores = _widen(scores).masked_fill(unseen.to(q.device), -torch.inf)
        lse[i] = scores.logsumexp(-1)
        weights = (scores - lse[i][..., None]).exp().masked_fill(unseen.to(q.device), 0)
        out[i] = torch.einsum("hqk,kr->qhr", weights.to(q.dtype), keys[:, :kv_lora_rank])
    return out, lse


def mla_prefill(
    q: Tensor,
    kv: Tensor,
    k_pe: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    *,
    causal: bool = True,
    softcap: float = 0.0,
    sliding_window: int = 0,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads, qk_head_dim = q.shape
    k_nope, value = kv.tensor_split((qk_head_dim - k_pe.size(1),), dim=-1)
    key = torch.cat((k_nope, k_pe[:, None].expand(-1, num_heads, -1)), dim=-1)
    out = q.new_empty(num_tokens, num_heads, value.size(-1))
    lse = _widen(q.new_empty(num_heads, num_tokens))
    ends = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    for (q_begin, k_begin), (q_end, k_end) in itertools.pairwise(ends):
        new, seen = slice(q_begin, q_end), slice(k_begin, k_end)
        scores = torch.einsum("qhd,khd->hqk", q[new], key[seen]) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        # Distance from each query (row) back to each token.
        seqlen_q, seqlen_k = q_end - q_begin, k_end - k_begin
        past = torch.arange(seqlen_k - seqlen_q, seqlen_k)[:, None] - torch.arange(seqlen_k)
        unseen = ((past < 0) & causal) | ((past >= sliding_window) if sliding_window else False)
        scores = _widen(scores).masked_fill(unseen.to(q.device), -torch.inf)
        lse[:, new] = scores.logsumexp(-1)
        weights = (scores - lse[:, new, None]).exp().masked_fill(unseen.to(q.device), 0)
        out[new] = torch.einsum("hqk,khv->qhv", weights.to(q.dtype), value[seen])
    return out, lse


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, w, bias) if w.dim() == 2 else torch.einsum("tgi,goi->tgo", x, w)


def merge_attn_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse_a, lse_b = (torch.where(lse.isinf(), -torch.inf, lse) for lse in (lse_a, lse_b))
    lse = torch.logaddexp(lse_a, lse_b)
    out = torch.zeros_like(out_a)
    for part, part_lse in ((out_a, lse_a), (out_b, lse_b)):
        weight = (part_lse - lse).exp().mT[..., None]
        out += torch.where(part_lse.mT[..., None].isinf(), 0, weight.to(part.dtype) * part)
    return out, lse


def covariance_add_(acc: Tensor, x: Tensor, weight: Tensor | None = None) -> None:
    rows = x.to(acc.dtype)
    weighted = rows if weight is None else rows * weight.to(acc.dtype)[:, None, None]
    acc += torch.einsum("tgi,tgj->gij", weighted, rows)


def batched_pca(cov: Tensor) -> tuple[Tensor, Tensor]:
    eigenvalues, eigenvectors = (part.flip(-1) for part in torch.linalg.eigh(cov))
    largest = eigenvectors.abs().argmax(dim=-2, keepdim=True)
    return eigenvalues, eigenvectors * eigenvectors.gather(-2, largest).sign()


def batched_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return u, s, vh
