"""Absorbed decode on CUDA: what splitkv_sm80 and the general kernel compute, and what they move."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from accuracy import assert_as_accurate, to_double
from latent import NO_BLOCK, decode_args
from ptxvm import Stats
from torch import Tensor

from transmla_ext import reference

HALVES = [torch.bfloat16, torch.float16]
SIZES = [(512, 64), (448, 128), (320, 256), (256, 64)]
SPLITKV = {"sm_80": "splitkv_sm80", "sm_90a": "splitkv_sm90"}


def make_args(
    dtype: torch.dtype = torch.bfloat16,
    *,
    size: tuple[int, int] = (512, 64),
    num_heads: int = 16,
    block_size: int = 64,
    seqlens: tuple[int, ...] = (33, 0, 1, 200),
    **fields: Any,
) -> dict[str, Any]:
    """decode_args() of the sizes that the kernels are made for."""
    rank, rope = size
    return decode_args(
        dtype,
        kv_lora_rank=rank,
        qk_rope_head_dim=rope,
        num_heads=num_heads,
        block_size=block_size,
        seqlens=seqlens,
        **fields,
    )


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
    cache_scales: Tensor | None = None,
    **device: int,
) -> tuple[Tensor, Tensor, dict[str, Stats]]:
    """out, lse, and what each kernel did."""
    batch_size, seqlen_q, num_heads, dim = q.shape
    fields: dict[str, Any] = {
        "q": q,
        "latent_cache": latent_cache,
        "cache_scales": cache_scales,
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
        "scales_stride_block": 0 if cache_scales is None else cache_scales.stride(0),
        "is_cache_int8": False,
        "scales_stride_token": 0,
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


def kernel_of(arch: str, q: Tensor, kv_lora_rank: int) -> str:
    """The kernel of a shape that tensor cores take; test_mla_decode_wgmma.py has more about wgmma_sm90."""
    _, seqlen_q, num_heads, dim = q.shape
    is_wgmma = arch == "sm_90a" and seqlen_q * num_heads > 48 and (kv_lora_rank, dim) == (512, 576)
    return "wgmma_sm90" if is_wgmma else SPLITKV[arch]


def assert_matches_reference(arch: str, args: dict[str, Any], kernel: str = "", **cut: int) -> None:
    out, lse, launches = decode(arch, **args, **cut)
    assert (kernel or kernel_of(arch, args["q"], args["kv_lora_rank"])) in launches
    baseline = reference.mla_decode(**args)
    expected = reference.mla_decode(**{name: to_double(value) for name, value in args.items()})
    for results in zip((out, lse), baseline, expected, strict=True):
        assert_as_accurate(*results)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", HALVES)
def test_ragged_batch_matches_the_reference(arch: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    assert_matches_reference(arch, make_args(dtype, size=size, num_heads=28, seqlens=(33, 0, 1, 31, 32, 200)))


@pytest.mark.parametrize("size", [(512, 64), (256, 64)])
@pytest.mark.parametrize("num_heads", [1, 3, 7, 16, 28, 32, 33, 64])
def test_any_number_of_heads(arch: str, num_heads: int, size: tuple[int, int]) -> None:
    assert_matches_reference(arch, make_args(num_heads=num_heads, size=size, seqlens=(70, 33)))


@pytest.mark.parametrize("block_size", [16, 32, 48, 64])
def test_any_block_size_of_sixteens(arch: str, block_size: int) -> None:
    # 530 tokens: the warps look up pages of 512 tokens at a time.
    assert_matches_reference(arch, make_args(block_size=block_size, seqlens=(530, 17)), num_splits=1)


@pytest.mark.parametrize("num_heads", [5, 16, 33])
@pytest.mark.parametrize("seqlen_q", [2, 3])
def test_each_new_query_sees_no_later_token(arch: str, seqlen_q: int, num_heads: int) -> None:
    # The sequences of 1 and 0 tokens have fewer tokens than queries: the first queries see nothing.
    assert_matches_reference(arch, make_args(seqlen_q=seqlen_q, num_heads=num_heads, seqlens=(65, 1, 0, 33)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(arch: str, softcap: float, dtype: torch.dtype) -> None:
    assert_matches_reference(arch, {**make_args(dtype), "softcap": softcap})


@pytest.mark.parametrize("sliding_window", [1, 7, 64, 1000])
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_sliding_window(arch: str, seqlen_q: int, sliding_window: int) -> None:
    args = make_args(seqlen_q=seqlen_q, num_heads=5, block_size=16, seqlens=(33, 0, 1, 300))
    assert_matches_reference(arch, {**args, "sliding_window": sliding_window})
    assert_matches_reference(arch, {**args, "sliding_window": sliding_window}, num_splits=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pages_before_the_window_are_never_read(arch: str, dtype: torch.dtype) -> None:
    args = {**make_args(dtype, block_size=16, seqlens=(257,)), "sliding_window": 2}
    expected = decode(arch, **args)[:2]
    args["latent_cache"][args["block_table"][0, :15].long()] = torch.nan
    args["block_table"][0, :15] = NO_BLOCK
    assert all(map(torch.equal, decode(arch, **args)[:2], expected))


@pytest.mark.parametrize("block_size", [16, 64])
def test_tma_gives_the_bits_of_cp_async(block_size: int) -> None:
    args = {**make_args(seqlen_q=2, block_size=block_size, seqlens=(0, 1, 150, 530)), "sliding_window": 300}
    assert all(map(torch.equal, decode("sm_80", **args)[:2], decode("sm_90a", **args)[:2]))


def test_blocks_that_are_no_matrix_are_copied_without_tma() -> None:
    args = make_args()
    blocks, block_size, dim = args["latent_cache"].shape
    cache = torch.full((blocks, block_size * dim + 8), torch.nan, dtype=torch.bfloat16)[:, :-8]
    cache = cache.unflatten(1, (block_size, dim)).copy_(args["latent_cache"])
    assert_matches_reference("sm_90a", {**args, "latent_cache": cache}, "splitkv_sm80")


@pytest.mark.parametrize("num_stages", [2, 3, 4, 5])
@pytest.mark.parametrize("num_heads", [16, 32, 48])
def test_ring_of_any_number_of_stages(num_heads: int, num_stages: int) -> None:
    fixed, stage = num_heads * (8 * 160 + 4 * 32 + 80) + 8 * 5 * 8, 36_864
    max_smem = fixed + num_stages * stage
    if max_smem > 227 << 10:
        max_smem = 227 << 10
        num_stages -= 1
    args = make_args(num_heads=num_heads, seqlens=(400, 33))  # thirteen tiles
    expected = decode("sm_90a", **args, num_splits=1)[:2]
    *actual, launches = decode("sm_90a", **args, num_splits=1, max_smem=max_smem)
    assert launches["splitkv_sm90"]["smem"] == fixed + num_stages * stage
    assert all(map(torch.equal, actual, expected))


def test_99_kilobytes_of_shared_memory_are_enough(arch: str) -> None:
    args = make_args(num_heads=33, seqlens=(200, 33))
    out, lse, launches = decode(arch, **args, max_smem=99 << 10)
    expected = decode(arch, **args, num_splits=1)
    assert SPLITKV[arch] in launches
    assert_as_accurate(out, expected[0], expected[0].double())
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 100])
@pytest.mark.parametrize("seqlen_q", [1, 2])
def test_any_number_of_splits(arch: str, seqlen_q: int, num_splits: int) -> None:
    args = make_args(seqlen_q=seqlen_q, num_heads=7, seqlens=(0, 1, 33, 257, 500))
    assert_matches_reference(arch, args, num_splits=num_splits)


@pytest.mark.parametrize("num_sms", [1, 2, 3, 7, 32])
@pytest.mark.parametrize("num_heads", [8, 33])
def test_equal_shares_of_a_ragged_batch(arch: str, num_heads: int, num_sms: int) -> None:
    # More than 32 sequences: a warp looks for its first one in two steps. One sequence needs many blocks.
    seqlens = (3000, *torch.randint(0, 100, (36,)).tolist(), 700, 0)
    assert_matches_reference(arch, make_args(num_heads=num_heads, size=(256, 64), seqlens=seqlens), num_sms=num_sms)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_batch_invariant_bits_do_not_depend_on_the_batch(arch: str, dtype: torch.dtype) -> None:
    args = make_args(dtype, num_heads=28, seqlens=(300, 33, 0, 129))
    out, lse, _ = decode(arch, **args, split_size=64)
    for i in range(4):
        row = {name: args[name][i : i + 1] for name in ("q", "block_table", "cache_seqlens")}
        row["block_table"] = row["block_table"][:, : 2 + (3, 0, 0, 1)[i]]  # as wide as it needs
        alone_out, alone_lse, _ = decode(arch, **{**args, **row}, split_size=64, num_sms=1)
        assert torch.equal(alone_out[0], out[i])
        assert torch.equal(alone_lse[0], lse[i])
    assert_matches_reference(arch, args, "general" if dtype == torch.float32 else "", split_size=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unused_pages_are_never_read(arch: str, dtype: torch.dtype) -> None:
    args = make_args(dtype, seqlen_q=2, num_heads=7)
    poisoned = decode(arch, **args)[:2]
    args["latent_cache"].nan_to_num_(0.0)
    args["block_table"][args["block_table"] == NO_BLOCK] = 0
    assert all(map(torch.equal, poisoned, decode(arch, **args)[:2]))


def test_nan_in_one_sequence_stays_there(arch: str) -> None:
    args = make_args(seqlens=(40, 40), block_size=16)
    args["latent_cache"][args["block_table"][0, 1], 3] = torch.nan
    out, lse, _ = decode(arch, **args)
    assert out[0].isnan().all()
    assert lse[0].isnan().all()
    assert out[1].isfinite().all()
    assert lse[1].isfinite().all()


def test_scores_of_any_size_do_not_overflow(arch: str) -> None:
    args = make_args(seqlens=(257, 31))
    assert_matches_reference(arch, {**args, "softmax_scale": 10.0}, num_splits=2)
    assert_matches_reference(arch, {**args, "softmax_scale": 0.0}, num_splits=2)


def test_query_cache_and_block_table_may_be_strided(arch: str) -> None:
    args = make_args(seqlen_q=2)
    contiguous = decode(arch, **args)[:2]
    q, cache, table = args["q"], args["latent_cache"], args["block_table"]
    strided_cache = torch.full((cache.size(0), 2, *cache.shape[1:]), torch.nan, dtype=cache.dtype)[:, 1]
    strided = {
        "q": q.transpose(1, 2).contiguous().transpose(1, 2),
        "latent_cache": strided_cache.copy_(cache),
        "block_table": torch.nn.functional.pad(table, (0, 3), value=NO_BLOCK)[:, : table.size(1)],
    }
    assert all(not tensor.is_contiguous() for tensor in strided.values())
    assert all(map(torch.equal, decode(arch, **{**args, **strided})[:2], contiguous))


def test_empty_batch_launches_nothing(arch: str) -> None:
    assert decode(arch, **make_args(seqlens=()))[2] == {}


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(("size", "block_size"), [((88, 32), 16), ((24, 8), 5), ((7, 0), 1), ((512, 64), 20)])
def test_general_kernel_takes_any_shape(arch: str, size: tuple[int, int], block_size: int, dtype: torch.dtype) -> None:
    args = make_args(dtype, size=size, block_size=block_size, num_heads=3, seqlen_q=2, seqlens=(100, 0, 1, 33))
    assert_matches_reference(arch, args, "general")
    assert_matches_reference(arch, args, "general", num_splits=3)
    assert_matches_reference(arch, {**args, "softcap": 2.0, "sliding_window": 40}, "general")


def test_general_kernel_takes_any_alignment(arch: str) -> None:
    args = make_args(num_heads=3)
    q = torch.empty(args["q"].numel() + 1, dtype=torch.bfloat16)[1:].view_as(args["q"]).copy_(args["q"])
    assert_matches_reference(arch, {**args, "q": q}, "general")
    cache = torch.full((*args["latent_cache"].shape[:2], 577), torch.nan, dtype=torch.bfloat16)[..., :576]
    assert_matches_reference(arch, {**args, "latent_cache": cache.copy_(args["latent_cache"])}, "general")


@pytest.mark.parametrize(
    ("arch", "num_heads", "rows"),
    [
        *((arch, *rows) for arch in harness.ARCHS for rows in ((16, 16), (28, 32), (32, 32), (48, 48))),
        ("sm_80", 64, 32),
        ("sm_80", 96, 48),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_moves_and_multiplies_no_more_than_it_has_to(
    arch: str, size: tuple[int, int], num_heads: int, rows: int
) -> None:
    seqlen = 1000
    args = make_args(num_heads=num_heads, size=size, seqlens=(seqlen,))
    stats = decode(arch, **args, num_splits=1)[2][SPLITKV[arch]]
    num_row_blocks = -(-num_heads // rows)
    tokens = seqlen if arch == "sm_80" else -(-seqlen // 32) * 32  # a box of TMA brings the rest of the page along
    cache_bytes = tokens * sum(size) * 2
    copied = num_row_blocks * cache_bytes + args["q"].nbytes
    assert stats["cp_async_bytes"] + stats["bulk_load_bytes"] == copied
    assert stats["bulk_load_bytes"] == (0 if arch == "sm_80" else num_row_blocks * cache_bytes)
    assert 32 * stats["cp_async_sectors"] == stats["cp_async_bytes"]
    assert stats["footprint"][next(name for name in stats["footprint"] if name.startswith("latent"))][0] == cache_bytes
    assert 32 * stats["global_sectors"]["load"] + stats["bulk_load_bytes"] <= 1.02 * copied
    assert stats.coalescing("store") == 1
    assert all(stats.bank_conflicts(kind) == 0 for kind in ("load", "store", "ldmatrix"))
    padded = num_row_blocks * rows * -(-seqlen // 32) * 32
    assert stats["flops"]["mma.bf16"] == 2 * padded * (sum(size) + size[0])


@pytest.mark.parametrize("num_splits", [0, 4])
def test_parts_move_no_more_than_they_have_to(arch: str, num_splits: int) -> None:
    args = make_args(num_heads=32, seqlens=(900, 640))
    launches = decode(arch, **args, num_splits=num_splits)[2]
    parts = 8 if num_splits else 5  # of four blocks one has the end of a sequence and the start of the other
    split, combine = launches[SPLITKV[arch]], launches["combine"]
    part_bytes = 32 * 512 * 4
    tokens = 1540 if arch == "sm_80" else 928 + 640
    assert split["cp_async_bytes"] + split["bulk_load_bytes"] == (tokens + parts * 32) * 1152
    assert split.coalescing("store") == 1
    assert combine.coalescing("store") == 1
    assert combine.coalescing("load") > 0.9  # an lse of a part is alone in its sector
    assert combine["footprint"][next(name for name in combine["footprint"] if name.startswith("workspace"))][0] == (
        parts * (part_bytes + 32 * 4)
    )
