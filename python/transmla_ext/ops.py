"""The ops: one function each, callable on every device that has a kernel, under autocast-free inference.

All of them are ``torch.library`` ops of the namespace ``transmla`` (``torch.ops.transmla.*``), work under
``torch.compile(fullgraph=True)``, raise RuntimeError for a misuse and have no gradient: training uses plain torch.
They are called by their overload, ``.default``: torch would look it up anew in every call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _lib  # noqa: F401  (loading the libraries registers the ops)

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
    """Absorbed, rotated queries of new tokens; their latents and rotated keys go to the paged cache.

    Args:
        hidden: [num_tokens, hidden_size], bf16, fp16 or fp32: the attention layer's (normalised) input.
        w_q: [num_heads * (qk_nope_head_dim + qk_rope_head_dim), hidden_size or q_lora_rank], per head nope rows, then
            interleaved RoPE rows.
        w_kv_a: [kv_lora_rank + qk_rope_head_dim, hidden_size], latent rows, then interleaved RoPE rows.
        w_uk: [num_heads, qk_nope_head_dim, kv_lora_rank], last dimension dense; a view of kv_b_proj.weight will do.
            qk_nope_head_dim may be 0: the latent part of q is then zero.
        cos_sin: [max_position, qk_rope_head_dim], fp32: cosines of the qk_rope_head_dim / 2 pairs, then sines.
        positions: [num_tokens], int64, rows of cos_sin.
        slot_mapping: [num_tokens], int64, block * block_size + offset; negative: the token is not stored.
        latent_cache: [num_blocks, block_size, kv_lora_rank + qk_rope_head_dim], dtype of hidden; written in place.
        w_q_a: [q_lora_rank, hidden_size], if the query projection is factored.
        q_a_norm: [q_lora_rank], RMSNorm weight between the two query factors; None for no norm.
        kv_norm: [kv_lora_rank], RMSNorm weight of the latent; None for no norm.
        b_q: [num_heads * (qk_nope_head_dim + qk_rope_head_dim)], added after w_q.
        b_kv_a: [kv_lora_rank + qk_rope_head_dim], added after w_kv_a, before the norm and the rotation.
        norm_eps: added to the mean square in both norms.
        cache_scales: fp32, last dimension dense, written in place; latent_cache then holds numbers over their scale,
            rounded to nearest even, and the scale is 1 for zeros, NaN for what is not finite. On the CPU int8 and
            [num_blocks, block_size, 2]: max|latent| / 127, max|RoPE key| / 127. On CUDA float8_e4m3fn and
            [num_blocks, block_size]: the least power of two that is at least max|token| / 448.
    Returns:
        q [num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim], dtype of hidden: q_nope · W_UK, then rotated q_pe.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C, with W_UK absorbed into the query.
    """
    out: Tensor = torch.ops.transmla.mla_project.default(
        hidden, w_q, w_kv_a, w_uk, cos_sin, positions, slot_mapping, latent_cache,
        w_q_a, q_a_norm, kv_norm, b_q, b_kv_a, norm_eps, cache_scales,
    )  # fmt: skip
    return out


@torch.library.register_fake("transmla::mla_project")
def _(hidden, w_q, w_kv_a, w_uk, cos_sin, positions, slots, latent_cache, *_rest):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.size(0), w_uk.size(0), latent_cache.size(2))


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
    """Absorbed MLA attention of new queries over a paged latent cache.

    Args:
        q: [batch_size, seqlen_q, num_heads, kv_lora_rank + qk_rope_head_dim], bf16, fp16 or fp32, last dimension dense.
        latent_cache: [num_blocks, block_size, kv_lora_rank + qk_rope_head_dim], dtype of q; latent first, RoPE last.
        block_table: [batch_size, max_blocks], int32; entries past the sequence's end are never read.
        cache_seqlens: [batch_size], int32, tokens in the cache *including* the seqlen_q new ones, or 0.
        kv_lora_rank: numbers of the latent; the rest of the last dimension is the RoPE key.
        softmax_scale: applied to q·k before the softmax.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        sliding_window: a query sees itself and the sliding_window - 1 tokens before it; 0 is off.
        num_splits: parts each sequence is cut into; 0 lets the device decide.
        batch_invariant: cut at fixed token counts, so that a sequence's bits do not depend on its batch.
        cache_scales: fp32, last dimension dense; latent_cache then holds numbers over their scale, as mla_project
            writes them. On the CPU int8 and [num_blocks, block_size, 2]: of the latent, of the RoPE key. On CUDA
            float8_e4m3fn and [num_blocks, block_size]: other scales than powers of two cost a rounding to the dtype
            of q there, and NaN is looked for in scales only.
    Returns:
        out [batch_size, seqlen_q, num_heads, kv_lora_rank], dtype of q, and lse [batch_size, num_heads, seqlen_q],
        fp32, natural log. Query i of a sequence of length n sees tokens 0 .. n - seqlen_q + i (causal).
        A query that sees nothing gives out = 0 and lse = -inf.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2; splits merged as in Flash-Decoding.
    """
    out: tuple[Tensor, Tensor] = torch.ops.transmla.mla_decode.default(
        q, latent_cache, block_table, cache_seqlens, kv_lora_rank, softmax_scale,
        softcap, sliding_window, num_splits, batch_invariant, cache_scales,
    )  # fmt: skip
    return out


@torch.library.register_fake("transmla::mla_decode")
def _(q, latent_cache, block_table, cache_seqlens, kv_lora_rank, softmax_scale, *_rest):  # type: ignore[no-untyped-def]
    batch_size, seqlen_q, num_heads, _ = q.shape
    out = q.new_empty(batch_size, seqlen_q, num_heads, kv_lora_rank)
    return out, q.new_empty(batch_size, num_heads, seqlen_q, dtype=torch.float32)


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
    """Attention of many new tokens over keys and values that were expanded from latents; CPU only.

    The sequences of a batch lie behind each other, without padding. No memory is taken that grows with their lengths.

    Args:
        q: [num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim], bf16, fp16 or fp32, last dimension dense, RoPE
            last and rotated.
        kv: [num_kv_tokens, num_heads, qk_nope_head_dim + v_head_dim], dtype of q, last dimension dense: what kv_b_proj
            makes of latents, keys first. qk_nope_head_dim may be 0.
        k_pe: [num_kv_tokens, qk_rope_head_dim], dtype of q, last dimension dense: the rotated key that all heads share.
        cu_seqlens_q: [batch_size + 1], int32, from 0 to num_tokens: sequence b has tokens cu_seqlens_q[b] up to
            cu_seqlens_q[b + 1] of q.
        cu_seqlens_k: [batch_size + 1], int32, from 0 to num_kv_tokens: the same of kv and k_pe.
        softmax_scale: applied to q·k before the softmax.
        causal: the queries are the last tokens of kv and see no later one; else each sees all of its sequence, as in a
            part of it that merge_attn_states is to join.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        sliding_window: a query sees itself and the sliding_window - 1 tokens before it; 0 is off. Needs causal.
    Returns:
        out [num_tokens, num_heads, v_head_dim], dtype of q, and lse [num_heads, num_tokens], fp32, natural log.
        A query that sees nothing gives out = 0 and lse = -inf.
    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1, with the heads of DeepSeek-V2 (arXiv 2405.04434).
    """
    out: tuple[Tensor, Tensor] = torch.ops.transmla.mla_prefill.default(
        q, kv, k_pe, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, softcap, sliding_window
    )
    return out


@torch.library.register_fake("transmla::mla_prefill")
def _(q, kv, k_pe, *_rest):  # type: ignore[no-untyped-def]
    num_tokens, num_heads, qk_head_dim = q.shape
    v_head_dim = kv.size(2) + k_pe.size(1) - qk_head_dim
    return q.new_empty(num_tokens, num_heads, v_head_dim), q.new_empty(num_heads, num_tokens, dtype=torch.float32)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x wᵀ + bias, by torch but for up to 8 tokens on a CPU: those read each weight once, at memory bandwidth.

    Args:
        x: [num_tokens, in_features] or [batch_size, seqlen, in_features], bf16, fp16 or fp32; with groups
            [num_tokens, num_groups, in_features].
        w: [out_features, in_features], dtype of x, or [num_groups, out_features, in_features]: a matrix for each group.
        bias: [out_features], dtype of x; None with groups.
    Returns:
        [..., out_features], dtype of x, contiguous; sums in fp32. The bits of up to 8 tokens on a CPU do not depend on
        each other, nor on the number of threads.
    """
    out: Tensor = torch.ops.transmla.linear.default(x, w, bias)
    return out


@torch.library.register_fake("transmla::linear")
def _(x, w, bias=None):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], w.size(-2))


def merge_attn_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the whole from attention over two disjoint parts (context parallel, shared prefix).

    Args:
        out_a, out_b: [batch_size, seqlen_q, num_heads, head_dim], bf16, fp16 or fp32, contiguous.
        lse_a, lse_b: [batch_size, num_heads, seqlen_q], fp32, natural log; -inf or +inf marks an empty part.
    Returns:
        out and lse of the same shapes and dtypes; two empty parts give out = 0 and lse = -inf.
    Source: Flash-Decoding; Cascade attention (arXiv 2501.01005), equation 3.
    """
    out: tuple[Tensor, Tensor] = torch.ops.transmla.merge_attn_states.default(out_a, lse_a, out_b, lse_b)
    return out


@torch.library.register_fake("transmla::merge_attn_states")
def _(out_a, lse_a, out_b, lse_b):  # type: ignore[no-untyped-def]
    return torch.empty_like(out_a), torch.empty_like(lse_a)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x²) + eps)), the bracket rounded to the dtype of x as in Llama, DeepSeek and their kin.

    Args:
        x: [num_rows, dim] or [batch_size, seqlen, dim], bf16, fp16 or fp32, contiguous.
        weight: [dim], dtype of x.
    Returns:
        Shape and dtype of x; the mean is taken in fp32.
    Source: arXiv 1910.07467.
    """
    out: Tensor = torch.ops.transmla.rms_norm.default(x, weight, eps)
    return out


@torch.library.register_fake("transmla::rms_norm")
def _(x, weight, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def covariance_add_(acc: Tensor, x: Tensor, weight: Tensor | None = None) -> None:
    """Adds Xᵀ diag(weight) X of every group to an fp64 state, in place.

    Args:
        acc: [num_groups, dim, dim], fp64, contiguous; symmetric, both triangles kept.
        x: [num_tokens, num_groups, dim], bf16, fp16 or fp32, last dimension dense.
        weight: [num_tokens], fp32; None for ones.
    """
    torch.ops.transmla.covariance_add_.default(acc, x, weight)


@torch.library.register_fake("transmla::covariance_add_")
def _(acc, x, weight=None):  # type: ignore[no-untyped-def]
    return None


def batched_pca(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors of symmetric positive semi-definite matrices.

    Args:
        cov: [num_matrices, dim, dim], fp32 or fp64, symmetric; the lower triangle is read.
    Returns:
        eigenvalues [num_matrices, dim] and eigenvectors [num_matrices, dim, dim], one a column, its largest component
        positive; dtype of cov, computed in fp64. Large matrices go to LAPACK through torch, a thread for each.
    Raises:
        RuntimeError: a number is not finite.
    """
    out: tuple[Tensor, Tensor] = torch.ops.transmla.batched_pca.default(cov)
    return out


@torch.library.register_fake("transmla::batched_pca")
def _(cov):  # type: ignore[no-untyped-def]
    return cov.new_empty(cov.shape[:2]), torch.empty_like(cov, memory_format=torch.contiguous_format)


def batched_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition a = u · diag(s) · vh of many matrices.

    Args:
        a: [num_matrices, rows, cols], fp32 or fp64.
    Returns:
        u [num_matrices, rows, k], s [num_matrices, k] descending and vh [num_matrices, k, cols], k = min(rows, cols);
        dtype of a, computed in fp64. Large matrices go to LAPACK through torch, a thread for each.
    Raises:
        RuntimeError: a number is not finite.
    """
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.transmla.batched_svd.default(a)
    return out


@torch.library.register_fake("transmla::batched_svd")
def _(a):  # type: ignore[no-untyped-def]
    num_matrices, rows, cols = a.shape
    k = min(rows, cols)
    return a.new_empty(num_matrices, rows, k), a.new_empty(num_matrices, k), a.new_empty(num_matrices, k, cols)
