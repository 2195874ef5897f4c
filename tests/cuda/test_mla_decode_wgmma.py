"""Absorbed decode on sm_90a, from 49 rows of q on: what wgmma_sm90 computes and moves, and what ptxas makes of it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from test_mla_decode import HALVES, NO_BLOCK, SIZES, assert_matches_reference, decode, make_args
from test_resources import assemble, main_loops

ARCH = "sm_90a"
TILE = 64  # tokens; the ring has two
INSTRUCTIONS_OF_A_TILE = 857  # of a warp, when written


def make_many(dtype: torch.dtype = torch.bfloat16, **shape: Any) -> dict[str, Any]:
    """Arguments of the op with 64 heads, unless told otherwise."""
    return make_args(dtype, **{"num_heads": 64, **shape})


def assert_right(args: dict[str, Any], **cut: int) -> None:
    assert_matches_reference(ARCH, args, "wgmma_sm90", **cut)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "seqlens",
    [(0, 1, 31, 32, 33), (63, 64, 65), (127, 128, 129, 0), (192, 193), (500, 7)],
    ids=str,
)
def test_any_length(seqlens: tuple[int, ...], dtype: torch.dtype) -> None:
    # One block has all sequences: its ring and the parities of its barriers go on from one to the next.
    assert_right(make_many(dtype, seqlens=seqlens), num_sms=1)
    assert_right(make_many(dtype, seqlens=seqlens))


@pytest.mark.parametrize(
    ("seqlen_q", "num_heads"),
    [(1, 49), (1, 50), (1, 56), (1, 63), (1, 64), (2, 32), (2, 25), (3, 19), (5, 13), (1, 65), (3, 40), (1, 128)],
)
def test_any_number_of_rows_from_49_on(seqlen_q: int, num_heads: int) -> None:
    # The sequence of one token has fewer tokens than queries: the first queries see nothing.
    assert_right(make_many(seqlen_q=seqlen_q, num_heads=num_heads, seqlens=(130, 1, 65)))


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 80])
def test_any_block_size_of_sixteens(block_size: int) -> None:
    assert_right(make_many(block_size=block_size, seqlens=(333, 17)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap: float, dtype: torch.dtype) -> None:
    assert_right({**make_many(dtype, seqlens=(100, 1)), "softcap": softcap})


@pytest.mark.parametrize("sliding_window", [1, 7, 64, 100, 1000])
@pytest.mark.parametrize(("seqlen_q", "num_heads"), [(1, 64), (3, 20)])
def test_sliding_window(seqlen_q: int, num_heads: int, sliding_window: int) -> None:
    args = make_many(seqlen_q=seqlen_q, num_heads=num_heads, block_size=16, seqlens=(33, 0, 1, 300))
    assert_right({**args, "sliding_window": sliding_window})
    assert_right({**args, "sliding_window": sliding_window}, num_splits=3)


def test_pages_before_the_window_are_never_read() -> None:
    args = {**make_many(block_size=16, seqlens=(257,)), "sliding_window": 100}
    expected = decode(ARCH, **args)[:2]
    args["latent_cache"][args["block_table"][0, :9].long()] = torch.nan
    args["latent_cache"][args["block_table"][0, 9], :13] = torch.nan  # the window begins at token 157
    args["block_table"][0, :9] = NO_BLOCK
    assert all(map(torch.equal, decode(ARCH, **args)[:2], expected))


@pytest.mark.parametrize("num_splits", [1, 2, 3, 100])
@pytest.mark.parametrize(("seqlen_q", "num_heads"), [(1, 64), (2, 25)])
def test_any_number_of_splits(seqlen_q: int, num_heads: int, num_splits: int) -> None:
    # Parts are whole tiles of 32 tokens: some begin in the middle of 64, some end there.
    args = make_many(seqlen_q=seqlen_q, num_heads=num_heads, seqlens=(0, 1, 33, 257, 500))
    assert_right(args, num_splits=num_splits)


@pytest.mark.parametrize("num_sms", [1, 2, 3, 7])
@pytest.mark.parametrize("num_heads", [64, 96])
def test_equal_shares_of_a_ragged_batch(num_heads: int, num_sms: int) -> None:
    seqlens = (700, *torch.randint(0, 100, (36,)).tolist(), 300, 0)
    assert_right(make_many(num_heads=num_heads, seqlens=seqlens), num_sms=num_sms)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("split_size", [32, 64, 96])
def test_batch_invariant_bits_do_not_depend_on_the_batch(split_size: int, dtype: torch.dtype) -> None:
    args = make_many(dtype, num_heads=50, seqlens=(300, 33, 0, 129))
    out, lse, _ = decode(ARCH, **args, split_size=split_size)
    for i, num_blocks in enumerate((5, 1, 1, 3)):
        row = {name: args[name][i : i + 1] for name in ("q", "block_table", "cache_seqlens")}
        row["block_table"] = row["block_table"][:, :num_blocks].contiguous()
        alone_out, alone_lse, _ = decode(ARCH, **{**args, **row}, split_size=split_size, num_sms=1)
        assert torch.equal(alone_out[0], out[i])
        assert torch.equal(alone_lse[0], lse[i])
    assert_right(args, split_size=split_size)


@pytest.mark.parametrize("cut", [{"num_sms": 1}, {"num_sms": 3}, {"split_size": 96}], ids=str)
def test_bits_do_not_depend_on_the_order_of_warps(cut: dict[str, int]) -> None:
    args = make_many(seqlens=(330, 33, 70))
    expected = decode(ARCH, **args, **cut)[:2]
    for seed in (1, 2, 3):
        with harness.random_order(seed):
            assert all(map(torch.equal, decode(ARCH, **args, **cut)[:2], expected))


@pytest.mark.parametrize("block_size", [16, 64])
def test_unused_pages_are_never_read(block_size: int) -> None:
    args = make_many(block_size=block_size)
    poisoned = decode(ARCH, **args)[:2]
    args["latent_cache"].nan_to_num_(0.0)
    args["block_table"][args["block_table"] == NO_BLOCK] = 0
    assert all(map(torch.equal, poisoned, decode(ARCH, **args)[:2]))


def test_nan_in_one_sequence_stays_there() -> None:
    args = make_many(seqlens=(40, 40), block_size=16)
    args["latent_cache"][args["block_table"][0, 1], 3] = torch.nan
    out, lse, _ = decode(ARCH, **args, num_sms=1)
    assert out[0].isnan().all()
    assert lse[0].isnan().all()
    assert out[1].isfinite().all()
    assert lse[1].isfinite().all()


def test_scores_of_any_size_do_not_overflow() -> None:
    args = make_many(seqlens=(257, 31))
    assert_right({**args, "softmax_scale": 10.0}, num_splits=2)
    assert_right({**args, "softmax_scale": 0.0}, num_splits=2)


def test_query_cache_and_block_table_may_be_strided() -> None:
    args = make_many(seqlen_q=2, num_heads=32)
    contiguous = decode(ARCH, **args)[:2]
    q, cache, table = args["q"], args["latent_cache"], args["block_table"]
    pages = torch.full((cache.size(0), cache.size(1), 2, 600), torch.nan, dtype=cache.dtype)
    strided = {
        "q": q.transpose(1, 2).contiguous().transpose(1, 2),
        "latent_cache": pages[:, :, 1, :576].copy_(cache),
        "block_table": torch.nn.functional.pad(table, (0, 3), value=NO_BLOCK)[:, : table.size(1)],
    }
    assert all(not tensor.is_contiguous() for tensor in strided.values())
    assert all(map(torch.equal, decode(ARCH, **{**args, **strided})[:2], contiguous))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_heads", [48, 49])
def test_other_shapes_keep_their_kernel(num_heads: int, size: tuple[int, int]) -> None:
    launches = decode(ARCH, **make_args(num_heads=num_heads, size=size, seqlens=(9,)))[2]
    assert ("wgmma_sm90" in launches) == (num_heads == 49 and size == (512, 64))


@pytest.mark.parametrize(("num_heads", "row_blocks"), [(64, 1), (100, 2)])
@pytest.mark.parametrize("block_size", [16, 64])
def test_moves_and_multiplies_no_more_than_it_has_to(block_size: int, num_heads: int, row_blocks: int) -> None:
    seqlen, row_bytes = 1000, 1152
    args = make_many(num_heads=num_heads, block_size=block_size, seqlens=(seqlen,))
    args["block_table"] = args["block_table"][:, :-2].contiguous()
    stats = decode(ARCH, **args, num_splits=1)[2]["wgmma_sm90"]
    num_tiles = -(-seqlen // TILE)
    cache_bytes = -(-seqlen // 16) * 16 * row_bytes
    # Every tile once; the tokens from 1008 on are zeros, which nothing is read for.
    assert stats["bulk_load_bytes"] == row_blocks * num_tiles * TILE * row_bytes
    assert stats["footprint"][next(name for name in stats["footprint"] if name.startswith("latent"))][0] == cache_bytes
    assert cache_bytes <= 1.02 * seqlen * row_bytes
    assert stats["cp_async_bytes"] == 32 * stats["cp_async_sectors"] == args["q"].nbytes
    assert 32 * stats["global_sectors"]["load"] <= args["q"].nbytes + 0.02 * cache_bytes
    assert stats.coalescing("store") == 1
    assert all(stats.bank_conflicts(kind) == 0 for kind in ("load", "store"))
    # Both groups compute all scores.
    assert stats["flops"]["wgmma.bf16"] == 2 * row_blocks * 64 * num_tiles * TILE * (2 * 576 + 512)


def test_parts_move_no_more_than_they_have_to() -> None:
    launches = decode(ARCH, **make_many(seqlens=(900, 640)), num_splits=4)[2]
    split, combine = launches["wgmma_sm90"], launches["combine"]
    assert split["cp_async_bytes"] == 8 * 64 * 1152
    assert split.coalescing("store") == combine.coalescing("store") == 1


def test_a_tile_costs_what_it_should(tmp_path: Path) -> None:
    log, cubin = assemble("mla_decode", ARCH, ARCH)
    assert "C75" not in log  # ptxas would say that it runs wgmma one after the other
    assert len(re.findall(r"wgmma_sm90.*?Used 168 registers", log, re.DOTALL)) == 2  # 384 threads have all of an SM
    loops = dict(main_loops(cubin, "HGMMA", tmp_path))
    assert len(loops) == 2
    for loop in loops.values():
        opcodes = Counter(line.split()[0].split(".")[0] for line in loop)
        products = Counter(line.split()[0].split(".")[1] for line in loop if line.startswith("HGMMA"))
        assert products == {"64x64x16": 576 // 16, "64x256x16": 64 // 16}
        waits = Counter(line.split()[0] for line in loop if line.startswith("WARPGROUP"))
        assert waits == {"WARPGROUP.ARRIVE": 2, "WARPGROUP.DEPBAR.LE": 2}
        assert opcodes["BAR"] == 1  # of the tiles that hold other tokens
        assert not opcodes.keys() & {"LDL", "STL", "LDSM"}
        assert len(loop) <= 1.05 * INSTRUCTIONS_OF_A_TILE
