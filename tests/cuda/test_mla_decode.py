"""Absorbed decode on CUDA: what splitkv_sm80 and the general kernel compute, and what they move."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from accuracy import assert_as_accurate, to_double
from ptxvm import Stats
from torch import Tensor

from transmla_ext import reference

SIZES = [(512, 64), (448, 128), (320, 256), (256, 64)]
NO_BLOCK = 2**30  # in the block table, where nothing may look


def make_args(
    dtype: torch.dtype = torch.bfloat16,
    *,
    size: tuple[int, int] = (512, 64),
    num_heads: int = 16,
    block_size: int = 64,
    seqlen_q: int = 1,
    seqlens: tuple[int, ...] = (33, 0, 1, 200),
) -> dict[str, Any]:
    """Arguments of the op: scores of unit variance, a scrambled block table, NaN wherever no token is."""
    kv_lora_rank, dim = size[0], sum(size)
    blocks_of = [-(-seqlen // block_size) for seqlen in seqlens]
    num_blocks = sum(blocks_of) + 3
    latent_cache = torch.full((num_blocks, block_size, dim), torch.nan, dtype=dtype)
    block_table = torch.full((len(seqlens), max(blocks_of) + 2), NO_BLOCK, dtype=torch.int32)
    free = torch.randperm(num_blocks).tolist()
    for row, seqlen, count in zip(block_table, seqlens, blocks_of, strict=True):
        for i in range(count):
            row[i] = block = free.pop()
            filled = min(block_size, seqlen - i * block_size)
            latent_cache[block, :filled] = torch.randn(filled, dim).to(dtype)
    return {
        "q": torch.randn(len(seqlens), seqlen_q, num_heads, dim).to(dtype),
        "latent_cache": latent_cache,
        "block_table": block_table,
        "cache_seqlens": torch.tensor(seqlens, dtype=torch.int32),
        "kv_lora_rank": kv_lora_rank,
        "softmax_scale": dim**-0.5,
    }


def decode(
    arch: str,
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
    split_size: int = 0,
    **device: int,
) -> tuple[Tensor, Tensor, dict[str, Stats]]:
    """out, lse, and what each kernel did."""
    batch_size, seqlen_q, num_heads, dim = q.shape
    fields: dict[str, Any] = {
        "q": q,
        "latent_cache": latent_cache,
        "block_table": block_table,
        "cache_seqlens": cache_seqlens,
        "out": torch.full((batch_size, seqlen_q, num_heads, kv_lora_rank), torch.nan, dtype=q.dtype),
        "lse": torch.full((batch_size, num_heads, seqlen_q), torch.nan),
        "dtype": q.dtype,
        "batch_size": batch_size,
        "seqlen_q": seqlen_q,
        "num_heads": num_heads,
        "kv_lora_rank": kv_lora_rank,
        "qk_rope_head_dim": dim - kv_lora_rank,
        "num_blocks": latent_cache.size(0),
        "block_size": latent_cache.size(1),
        "max_blocks": block_table.size(1),
        "q_stride_batch": q.stride(0),
        "q_stride_token": q.stride(1),
        "q_stride_head": q.stride(2),
        "cache_stride_block": latent_cache.stride(0),
        "cache_stride_token": latent_cache.stride(1),
        "block_table_stride": block_table.stride(0),
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "sliding_window": sliding_window,
        "num_splits": num_splits,
        "split_size": split_size,
        "workspace": None,
    }
    size = harness.workspace_size("mla_decode", arch, fields, **device)
    if size > 0:
        fields["workspace"] = torch.full((size // 4,), torch.nan)
    launches = harness.launch("mla_decode", arch, fields, **device)
    return fields["out"], fields["lse"], {name.split("_kernel")[0].split("mla_decode_")[1]: s for name, s in launches}


def assert_matches_reference(arch: str, args: dict[str, Any], kernel: str = "splitkv_sm80", **cut: int) -> None:
    out, lse, launches = decode(arch, **args, **cut)
    assert kernel in launches
    baseline = reference.mla_decode(**args)
    expected = reference.mla_decode(**{name: to_double(value) for name, value in args.items()})
    for results in zip((out, lse), baseline, expected, strict=True):
        assert_as_accurate(*results)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ragged_batch_matches_the_reference(arch: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    assert_matches_reference(arch, make_args(dtype, size=size, num_heads=28))
