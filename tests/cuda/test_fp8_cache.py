"""The float8_e4m3fn latent cache with a scale for each token: appended by mla_project, read by mla_decode."""

from __future__ import annotations

from typing import Any

import pytest
import test_mla_decode as decoding
import test_mla_project as projecting
import torch
from accuracy import assert_as_accurate, to_double
from torch import Tensor

from transmla_ext import reference

FP8 = torch.float8_e4m3fn
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CODES = torch.arange(256, dtype=torch.uint8).view(FP8)
NUMBERS = CODES.float()[CODES.float().isfinite()].unique()  # 253: both zeros are one
Args = dict[str, Any]


def quantised(args: Args) -> Args:
    """The same cache in fp8; where no token is, the scale is NaN."""
    cache = args["latent_cache"].float()
    scales = (cache.abs().amax(-1) / 448).log2().ceil().exp2()
    return {**args, "latent_cache": (cache / scales[..., None]).to(FP8), "cache_scales": scales}


def widened(args: Args) -> Args:
    """The same cache in the dtype of q, which has room for every number of an fp8 cache."""
    cache = stored(args["latent_cache"], args["cache_scales"]).to(args["q"].dtype)
    return {**args, "latent_cache": cache, "cache_scales": None}


def with_empty_fp8_cache(args: Args) -> Args:
    cache = args["latent_cache"]
    return {**args, "latent_cache": cache.float().to(FP8), "cache_scales": torch.full(cache.shape[:2], torch.nan)}


def stored(cache: Tensor, scales: Tensor) -> Tensor:
    return cache.double() * scales[..., None].double()


def assert_has_the_bits_of_a_widened_cache(arch: str, args: Args, **cut: int) -> None:
    """Scales are powers of two: not a rounding differs, so whatever test_mla_decode.py has of splitkv_sm80 holds."""
    args = quantised(args)
    *actual, launches = decoding.decode(arch, **args, **cut)
    assert "splitkv_fp8" in launches
    assert all(map(torch.equal, actual, decoding.decode("sm_80", **widened(args), **cut)[:2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_read_as_torch_reads_it(arch: str, dtype: torch.dtype) -> None:
    """By tensor cores, in 16 bits, and by the general kernel."""
    args = decoding.make_args(dtype, size=(256, 64), num_heads=1, block_size=16, seqlens=(1,))
    codes = torch.cat((CODES[CODES.float().isfinite()].float(), torch.zeros(2 + 64)))
    args["latent_cache"] = codes.to(FP8).expand_as(args["latent_cache"]).contiguous()
    out = decoding.decode(arch, **args, cache_scales=torch.full(args["latent_cache"].shape[:2], 0.25))[0]
    assert torch.equal(out.flatten(), codes[:256].to(dtype) / 4)


def test_numbers_are_rounded_as_torch_rounds_them(arch: str) -> None:
    """All numbers of fp8, the ties between them, and the floats next to both; 448 is among them: the scale is 1."""
    exact = torch.cat((NUMBERS, (NUMBERS[1:] + NUMBERS[:-1]) / 2))
    row = torch.cat([exact, *(torch.nextafter(exact, torch.tensor(end)) for end in (-torch.inf, torch.inf))])
    row = row[row.abs() <= 448][None] + 0.0  # the product with the unit matrix has no -0
    args = projecting.make_args(torch.float32, kv_lora_rank=row.size(1), qk_rope_head_dim=0, num_tokens=1, norm=False)
    args["hidden"], args["w_kv_a"] = row, torch.eye(row.size(1))
    args["w_q"] = torch.ones(args["w_q"].size(0), row.size(1))
    args = with_empty_fp8_cache(args)
    _, cache, _ = projecting.project(arch, args)
    slot = args["slot_mapping"][0]
    assert args["cache_scales"].flatten()[slot] == 1
    assert torch.equal(cache.flatten(0, 1)[slot].view(torch.uint8), row[0].to(FP8).view(torch.uint8))


def test_scales_are_the_least_powers_of_two_that_do(arch: str) -> None:
    powers = torch.tensor([2.0**-126, 2.0**-20, 0.5, 1.0, 2.0**20])
    largest = torch.cat((448 * powers, 449 * powers[1:], 447 * powers[1:], torch.tensor([2.0**-149])))
    args = projecting.make_args(torch.float32, kv_lora_rank=12, qk_rope_head_dim=0, num_tokens=len(largest), norm=False)
    args["slot_mapping"] = torch.randperm(2 * 16)[: len(largest)]
    args["hidden"] = torch.nn.functional.pad(-largest[:, None], (7, args["hidden"].size(1) - 8))
    args["w_kv_a"] = torch.eye(*args["w_kv_a"].shape)
    args = with_empty_fp8_cache(args)
    projecting.project(arch, args)
    expected = torch.cat((powers, 2 * powers[1:], powers[1:], torch.ones(1)))  # the last token is as good as zero
    assert torch.equal(args["cache_scales"].flatten()[args["slot_mapping"]], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(512, 64), (48, 16), (20, 6), (7, 0)])
def test_append_is_as_accurate_as_the_reference(arch: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    args = projecting.make_args(dtype, kv_lora_rank=sizes[0], qk_rope_head_dim=sizes[1], num_tokens=20)
    exact = {name: to_double(value) for name, value in args.items()}
    reference.mla_project(**exact)
    fp8 = with_empty_fp8_cache(args)
    baseline = {name: value.clone() if isinstance(value, Tensor) else value for name, value in fp8.items()}
    baseline_q = reference.mla_project(**baseline)
    q, cache, _ = projecting.project(arch, fp8)
    assert_as_accurate(q, baseline_q, reference.mla_project(**exact))
    assert_as_accurate(
        stored(cache, fp8["cache_scales"]),
        stored(baseline["latent_cache"], baseline["cache_scales"]),
        exact["latent_cache"],
    )
    # Half a unit in the last place of a normal number, or of a subnormal one, and what rounding to dtype adds.
    error = (stored(cache, fp8["cache_scales"]) - exact["latent_cache"]).abs()
    half_ulp = torch.maximum(exact["latent_cache"].abs() / 16, fp8["cache_scales"][..., None] * 2**-10)
    written = exact["latent_cache"].isfinite()
    largest = exact["latent_cache"].abs().amax(-1, keepdim=True)
    assert (error - half_ulp)[written].max() <= (4 * torch.finfo(dtype).eps * largest).nan_to_num().max()


def test_tokens_without_a_slot_leave_cache_and_scales_alone(arch: str) -> None:
    args = with_empty_fp8_cache(projecting.make_args(num_tokens=20))
    _, cache, _ = projecting.project(arch, args)
    expected = sorted(args["slot_mapping"][args["slot_mapping"] >= 0].tolist())
    for written in (cache.float().isfinite().all(-1), args["cache_scales"].isfinite()):
        assert written.flatten().nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_are_stored_as_zeros(arch: str, dtype: torch.dtype) -> None:
    args = projecting.make_args(dtype)
    args = with_empty_fp8_cache({**args, "w_kv_a": torch.zeros_like(args["w_kv_a"])})
    _, cache, _ = projecting.project(arch, args)
    slots = args["slot_mapping"][args["slot_mapping"] >= 0]
    assert not cache.float().flatten(0, 1)[slots].any()
    assert (args["cache_scales"].flatten()[slots] == 1).all()


def test_scales_may_be_a_slice(arch: str) -> None:
    args = with_empty_fp8_cache(projecting.make_args())
    projecting.project(arch, args)
    layers = torch.full((len(args["cache_scales"]), 2, 16), torch.nan)
    projecting.project(arch, {**args, "cache_scales": layers[:, 1]})
    assert torch.equal(layers[:, 1].nan_to_num(), args["cache_scales"].nan_to_num())
    assert layers[:, 0].isnan().all()


def test_append_writes_a_byte_for_each_number_in_whole_sectors(arch: str) -> None:
    num_tokens, num_heads, dim = 16, 2, 576
    args = projecting.make_args(
        num_tokens=num_tokens, num_heads=num_heads, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64
    )
    args = with_empty_fp8_cache({**args, "slot_mapping": torch.randperm(32)[:num_tokens]})
    stats = projecting.project(arch, args)[2]
    q_bytes = num_tokens * num_heads * dim * 2
    assert stats.coalescing("load") == stats.coalescing("store") == 1
    assert 32 * stats["global_sectors"]["store"] == q_bytes + num_tokens * (dim + 32)  # a scale is alone in its sector


@pytest.mark.parametrize(
    ("size", "dtype"),
    [*((size, dtype) for size in ((24, 8), (7, 0)) for dtype in DTYPES), ((512, 64), torch.float32)],
)
def test_general_kernel_matches_the_reference(arch: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    args = decoding.make_args(dtype, size=size, num_heads=3, seqlen_q=2, block_size=16, seqlens=(100, 0, 1, 33))
    args = quantised(args)
    args["cache_scales"] *= 1 + torch.rand(args["cache_scales"].shape)  # no powers of two
    decoding.assert_matches_reference(arch, args, "general")
    decoding.assert_matches_reference(arch, args, "general", num_splits=3)
    decoding.assert_matches_reference(arch, {**args, "softcap": 2.0, "sliding_window": 40}, "general")


@pytest.mark.parametrize("size", decoding.SIZES)
@pytest.mark.parametrize("dtype", decoding.HALVES)
def test_tensor_cores_match_the_reference(arch: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    args = quantised(decoding.make_args(dtype, size=size, num_heads=28, seqlens=(33, 0, 1, 31, 32, 200)))
    decoding.assert_matches_reference(arch, args, "splitkv_fp8")


@pytest.mark.parametrize("dtype", decoding.HALVES)
def test_scales_need_not_be_powers_of_two(arch: str, dtype: torch.dtype) -> None:
    """A probability times such a scale is rounded, the largest, 1, too: that is once more than the reference rounds."""
    args = quantised(decoding.make_args(dtype, size=(256, 64), num_heads=28, seqlens=(200, 33)))
    args["cache_scales"] *= 1 + torch.rand(args["cache_scales"].shape)
    out, lse, launches = decoding.decode(arch, **args)
    assert "splitkv_fp8" in launches
    exact = {name: to_double(value) for name, value in args.items()}
    results = zip((out, lse), reference.mla_decode(**args), reference.mla_decode(**exact), strict=True)
    for actual, baseline, expected in results:
        assert_as_accurate(actual, baseline, expected, factor=3)


@pytest.mark.parametrize("dtype", decoding.HALVES)
def test_scales_of_each_token_reach_scores_and_values(arch: str, dtype: torch.dtype) -> None:
    """Tokens whose sizes differ by 2^10: a scale that is missed, or another token's, is seen."""
    args = decoding.make_args(dtype, size=(256, 64), num_heads=2, seqlens=(70, 33))
    magnitude = 2.0 ** -torch.randint(0, 11, args["latent_cache"].shape[:2])[..., None]
    args = quantised({**args, "latent_cache": args["latent_cache"] * magnitude.to(dtype)})
    scales = torch.full((len(args["latent_cache"]), 2, 64), torch.nan)[:, 1].copy_(args["cache_scales"])
    decoding.assert_matches_reference(arch, {**args, "cache_scales": scales}, "splitkv_fp8", num_splits=1)


@pytest.mark.parametrize("size", [(512, 64), (256, 64)])
@pytest.mark.parametrize("num_heads", [1, 3, 16, 28, 33, 64])
def test_any_number_of_heads(arch: str, num_heads: int, size: tuple[int, int]) -> None:
    args = decoding.make_args(num_heads=num_heads, size=size, seqlens=(70, 33))
    assert_has_the_bits_of_a_widened_cache(arch, args, num_splits=1)


@pytest.mark.parametrize("block_size", [16, 32, 48, 64])
def test_any_block_size_of_sixteens(arch: str, block_size: int) -> None:
    # 530 tokens: the warps look up pages of 512 tokens at a time, and go round every ring.
    args = decoding.make_args(block_size=block_size, seqlens=(530, 17, 0, 1))
    assert_has_the_bits_of_a_widened_cache(arch, args, num_splits=1)


@pytest.mark.parametrize("sliding_window", [0, 7, 64])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_masks_and_softcap(arch: str, softcap: float, sliding_window: int) -> None:
    args = decoding.make_args(seqlen_q=3, num_heads=5, block_size=16, seqlens=(33, 0, 1, 300))
    args |= {"softcap": softcap, "sliding_window": sliding_window}
    assert_has_the_bits_of_a_widened_cache(arch, args, num_splits=2)


@pytest.mark.parametrize("num_stages", [2, 3, 4, 5])
@pytest.mark.parametrize("num_heads", [16, 48])
def test_ring_of_any_number_of_stages(num_heads: int, num_stages: int) -> None:
    fixed, stage = num_heads * (8 * 160 + 4 * 32 + 80) + 8 * 5 * 8 + 32 * 576 * 2, 32 * (576 + 4)
    args = quantised(decoding.make_args(num_heads=num_heads, seqlens=(400, 33)))  # thirteen tiles
    max_smem = fixed + num_stages * stage
    *actual, launches = decoding.decode("sm_90a", **args, num_splits=1, max_smem=max_smem)
    assert launches["splitkv_fp8"]["smem"] == max_smem
    assert all(map(torch.equal, actual, decoding.decode("sm_80", **widened(args), num_splits=1)[:2]))


def test_99_kilobytes_of_shared_memory_are_enough(arch: str) -> None:
    args = decoding.make_args(num_heads=33, seqlens=(200, 33))
    assert_has_the_bits_of_a_widened_cache(arch, args, num_splits=1, max_smem=99 << 10)


def test_equal_shares_of_a_ragged_batch(arch: str) -> None:
    args = quantised(decoding.make_args(num_heads=8, seqlens=(900, *torch.randint(0, 100, (9,)).tolist(), 300, 0)))
    decoding.assert_matches_reference(arch, args, "splitkv_fp8", num_sms=7)


def test_pages_that_no_query_sees_are_never_read(arch: str) -> None:
    args = quantised(decoding.make_args(block_size=16, seqlens=(257, 33)))
    args["sliding_window"] = 2
    expected = decoding.decode(arch, **args)[:2]
    unseen = args["block_table"][0, :15].long()
    args["cache_scales"][unseen] = torch.nan
    args["block_table"][0, :15] = decoding.NO_BLOCK
    assert all(map(torch.equal, decoding.decode(arch, **args)[:2], expected))


@pytest.mark.parametrize("size", [(512, 64), (24, 8)])
def test_batch_invariant_bits_do_not_depend_on_the_batch(arch: str, size: tuple[int, int]) -> None:
    args = quantised(decoding.make_args(num_heads=2, size=size, seqlens=(100, 33)))
    out, lse, _ = decoding.decode(arch, **args, split_size=64)
    alone = {name: args[name][1:] for name in ("q", "block_table", "cache_seqlens")}
    alone_out, alone_lse, _ = decoding.decode(arch, **{**args, **alone}, split_size=64, num_sms=1)
    assert torch.equal(alone_out[0], out[1])
    assert torch.equal(alone_lse[0], lse[1])


@pytest.mark.parametrize(("num_heads", "rows"), [(16, 16), (28, 32), (48, 48), (64, 32)])
@pytest.mark.parametrize("size", [(512, 64), (256, 64)])
def test_decode_moves_and_multiplies_no_more_than_it_has_to(size: tuple[int, int], num_heads: int, rows: int) -> None:
    seqlen = 1000
    args = quantised(decoding.make_args(num_heads=num_heads, size=size, seqlens=(seqlen,)))
    stats = decoding.decode("sm_80", **args, num_splits=1)[2]["splitkv_fp8"]
    num_row_blocks = -(-num_heads // rows)
    (codes,) = (read for name, (read, _) in stats["footprint"].items() if name.startswith("latent"))
    (scales,) = (read for name, (read, _) in stats["footprint"].items() if name.startswith("cache_scales"))
    assert (codes, scales) == (seqlen * sum(size), seqlen * 4)
    assert stats["cp_async_bytes"] == num_row_blocks * seqlen * (sum(size) + 4) + args["q"].nbytes
    # Four warps copy 16 bytes each of a token's last 64, half a sector.
    assert 32 * stats["cp_async_sectors"] == stats["cp_async_bytes"] + num_row_blocks * seqlen * 64
    assert stats.coalescing("store") == 1
    assert all(stats.bank_conflicts(kind) == 0 for kind in ("load", "store", "ldmatrix"))
    padded = num_row_blocks * rows * -(-seqlen // 32) * 32
    assert stats["flops"]["mma.bf16"] == 2 * padded * (sum(size) + size[0])


@pytest.mark.parametrize("size", [(512, 64), (24, 8)])
def test_a_token_that_is_not_finite_stays_in_its_sequence(arch: str, size: tuple[int, int]) -> None:
    args = quantised(decoding.make_args(size=size, num_heads=2, seqlens=(40, 40), block_size=16))
    args["cache_scales"][args["block_table"][0, 1], 3] = torch.nan
    out, lse, _ = decoding.decode(arch, **args)
    assert out[0].isnan().all()
    assert lse[0].isnan().all()
    assert out[1].isfinite().all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize("weird", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_is_stored_as_nan(arch: str, weird: float) -> None:
    args = projecting.make_args(kv_lora_rank=96, qk_rope_head_dim=16)
    args["hidden"][0, 0] = weird
    args = with_empty_fp8_cache(args)
    _, cache, _ = projecting.project(arch, args)
    first, *others = args["slot_mapping"][args["slot_mapping"] >= 0].tolist()
    row = stored(cache, args["cache_scales"]).flatten(0, 1)
    assert row[first].isnan().all()
    assert row[others].isfinite().all()
