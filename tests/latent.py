"""Arguments of mla_decode, for its tests on the CPU, in the virtual machine and on a GPU."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["NO_BLOCK", "RAGGED", "decode_args"]

RAGGED = (0, 1, 31, 32, 33, 257)
NO_BLOCK = 2**30  # in the block table, where nothing may look


def decode_args(
    dtype: torch.dtype = torch.float32,
    *,
    kv_lora_rank: int = 48,
    qk_rope_head_dim: int = 16,
    num_heads: int = 3,
    block_size: int = 16,
    seqlen_q: int = 1,
    seqlens: tuple[int, ...] = RAGGED,
) -> dict[str, Any]:
    """Arguments with scores of unit variance, a scrambled block table, and NaN wherever no token is."""
    dim = kv_lora_rank + qk_rope_head_dim
    blocks_of = [-(-seqlen // block_size) for seqlen in seqlens]
    num_blocks = sum(blocks_of) + 3
    latent_cache = torch.full((num_blocks, block_size, dim), torch.nan, dtype=dtype)
    block_table = torch.full((len(seqlens), max(blocks_of, default=0) + 2), NO_BLOCK, dtype=torch.int32)
    free = torch.randperm(num_blocks).tolist()
    for row, seqlen, count in zip(block_table, seqlens, blocks_of, strict=True):
        for i in range(count):
            row[i] = block = free.pop()
            size = min(block_size, seqlen - i * block_size)
            latent_cache[block, :size] = torch.randn(size, dim).to(dtype)
    return {
        "q": torch.randn(len(seqlens), seqlen_q, num_heads, dim).to(dtype),
        "latent_cache": latent_cache,
        "block_table": block_table,
        "cache_seqlens": torch.tensor(seqlens, dtype=torch.int32),
        "kv_lora_rank": kv_lora_rank,
        "softmax_scale": dim**-0.5,
    }
