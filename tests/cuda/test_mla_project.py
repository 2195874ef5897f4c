from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from accuracy import assert_as_accurate, to_double
from ptxvm import Stats
from torch import Tensor

from transmla_ext import reference

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
Args = dict[str, Any]


def make_args(
    dtype: torch.dtype = torch.bfloat16,
    *,
    num_tokens: int = 5,
    num_heads: int = 3,
    kv_lora_rank: int = 96,
    qk_nope_head_dim: int = 32,
    qk_rope_head_dim: int = 16,
    block_size: int = 16,
    norm: bool = True,
) -> Args:
    """Arguments whose products have unit variance; every third token is not stored, the cache holds NaN."""
    hidden_size = 24

    def random(*shape: int, variance: int = 1) -> Tensor:
        return (torch.randn(*shape) / max(1, variance) ** 0.5).to(dtype)

    angles = torch.rand(64, qk_rope_head_dim // 2) * 6
    num_blocks = num_tokens // block_size + 2
    slot_mapping = torch.randperm(num_blocks * block_size)[:num_tokens]
    slot_mapping[2::3] = -1
    return {
        "hidden": random(num_tokens, hidden_size),
        "w_q": random(num_heads * (qk_nope_head_dim + qk_rope_head_dim), hidden_size, variance=hidden_size),
        "w_kv_a": random(kv_lora_rank + qk_rope_head_dim, hidden_size, variance=hidden_size),
        "w_uk": random(num_heads, qk_nope_head_dim, kv_lora_rank, variance=qk_nope_head_dim),
        "cos_sin": torch.cat((angles.cos(), angles.sin()), dim=-1),
        "positions": torch.randint(64, (num_tokens,)),
        "slot_mapping": slot_mapping,
        "latent_cache": random(num_blocks, block_size, kv_lora_rank + qk_rope_head_dim).fill_(torch.nan),
        "kv_norm": random(kv_lora_rank) if norm else None,
        "norm_eps": 1e-6,
    }


def project(arch: str, args: Args) -> tuple[Tensor, Tensor, Stats]:
    """The kernel behind the two GEMMs, which torch does here as on a GPU; writes cache_scales in place."""
    cache, w_uk = args["latent_cache"].clone(), args["w_uk"]
    scales, dtype = args.get("cache_scales"), args["hidden"].dtype
    q = torch.full((len(args["hidden"]), len(w_uk), cache.size(2)), torch.nan, dtype=dtype)
    params = {name: args[name] for name in ("w_uk", "kv_norm", "cos_sin", "positions", "slot_mapping", "norm_eps")}
    params |= {
        "q_proj": args["hidden"] @ args["w_q"].T,
        "kv_a_proj": args["hidden"] @ args["w_kv_a"].T,
        "q": q,
        "latent_cache": cache,
        "cache_scales": scales,
        "dtype": dtype,
        "num_tokens": len(q),
        "num_heads": len(w_uk),
        "kv_lora_rank": w_uk.size(2),
        "qk_nope_head_dim": w_uk.size(1),
        "qk_rope_head_dim": cache.size(2) - w_uk.size(2),
        "num_blocks": cache.size(0),
        "block_size": cache.size(1),
        "max_position": len(args["cos_sin"]),
        "w_uk_stride_head": w_uk.stride(0),
        "w_uk_stride_row": w_uk.stride(1),
        "cache_stride_block": cache.stride(0),
        "cache_stride_token": cache.stride(1),
        "scales_stride_block": 0 if scales is None else scales.stride(0),
        "is_cache_int8": False,
        "scales_stride_token": 0,
    }
    [(_, stats)] = harness.launch("mla_project", arch, params)
    return q, cache, stats


def assert_matches_reference(arch: str, args: Args) -> Stats:
    def run(args: Args) -> tuple[Tensor, Tensor]:
        cache = args["latent_cache"].clone()
        return reference.mla_project(**{**args, "latent_cache": cache}), cache

    q, cache, stats = project(arch, args)
    expected = run({name: to_double(value) for name, value in args.items()})
    for parts in zip((q, cache), run(args), expected, strict=True):
        assert_as_accurate(*parts)
    return stats


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("kv_lora_rank", "qk_rope_head_dim"), [(512, 64), (448, 128), (320, 256), (256, 64), (16, 16)])
def test_matches_the_reference(arch: str, dtype: torch.dtype, kv_lora_rank: int, qk_rope_head_dim: int) -> None:
    stats = assert_matches_reference(
        arch,
        make_args(
            dtype, kv_lora_rank=kv_lora_rank, qk_nope_head_dim=128, qk_rope_head_dim=qk_rope_head_dim, num_tokens=3
        ),
    )
    assert stats["flops"][f"mma.{'bf16' if dtype == torch.bfloat16 else 'f16'}"]


@pytest.mark.parametrize("qk_nope_head_dim", [8, 64, 128, 136, 272])
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 70])
def test_any_nope_dim_and_number_of_tokens(arch: str, qk_nope_head_dim: int, num_tokens: int) -> None:
    assert_matches_reference(arch, make_args(qk_nope_head_dim=qk_nope_head_dim, num_tokens=num_tokens, num_heads=2))


def test_more_tokens_than_one_block_takes(arch: str) -> None:
    assert_matches_reference(arch, make_args(num_tokens=300, num_heads=2, kv_lora_rank=160))


@pytest.mark.parametrize("num_heads", [1, 7, 33])
def test_any_number_of_heads(arch: str, num_heads: int) -> None:
    assert_matches_reference(arch, make_args(num_heads=num_heads))


@pytest.mark.parametrize(
    ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
    [(48, 20, 16), (20, 8, 6), (3, 5, 2), (7, 3, 0), (200, 16, 0), (48, 0, 16)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_that_are_not_made_of_chunks(
    arch: str, dtype: torch.dtype, kv_lora_rank: int, qk_nope_head_dim: int, qk_rope_head_dim: int
) -> None:
    args = make_args(
        dtype, kv_lora_rank=kv_lora_rank, qk_nope_head_dim=qk_nope_head_dim, qk_rope_head_dim=qk_rope_head_dim
    )
    assert_matches_reference(arch, args)


@pytest.mark.parametrize("norm_eps", [1e-6, 10.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_optional_and_adds_eps_to_the_mean_square(arch: str, dtype: torch.dtype, norm_eps: float) -> None:
    args = make_args(dtype)
    assert_matches_reference(arch, {**args, "norm_eps": norm_eps, "w_kv_a": args["w_kv_a"] * 2**-6})
    assert_matches_reference(arch, {**args, "kv_norm": None})


def test_tokens_without_a_slot_are_not_stored(arch: str) -> None:
    args = make_args(num_tokens=20)
    _, cache, _ = project(arch, args)
    stored = args["slot_mapping"][args["slot_mapping"] >= 0]
    written = cache.flatten(0, 1).isfinite().all(-1)
    assert written.nonzero().flatten().tolist() == sorted(stored.tolist())


def test_weights_and_cache_may_be_strided(arch: str) -> None:
    args = make_args()
    q, cache, _ = project(arch, args)
    # As W_UK lies in kv_b_proj.weight, above W_UV; as layers that share one cache.
    kv_b_proj = torch.full((3, 32 + 8, 96), torch.nan, dtype=torch.bfloat16)
    layers = torch.full((cache.size(0), 2, *cache.shape[1:]), torch.nan, dtype=torch.bfloat16)
    args["w_uk"] = kv_b_proj[:, :32].copy_(args["w_uk"])
    args["latent_cache"] = layers[:, 1]
    strided_q, strided_cache, _ = project(arch, args)
    assert torch.equal(strided_q, q)
    assert torch.equal(strided_cache.nan_to_num(), cache.nan_to_num())


def test_moves_each_byte_once_in_whole_sectors(arch: str) -> None:
    """W_UK and the projections are read once, q and the cache written once; no bank conflicts."""
    num_tokens, num_heads, rank, nope, rope = 16, 2, 512, 128, 64
    args = make_args(
        num_tokens=num_tokens, num_heads=num_heads, kv_lora_rank=rank, qk_nope_head_dim=nope, qk_rope_head_dim=rope,
        norm=False,
    )  # fmt: skip
    args["slot_mapping"] = torch.randperm(32)[:num_tokens]
    q, _, stats = project(arch, args)
    assert stats["global_sectors"] == stats["global_ideal_sectors"]
    assert stats["shared_wavefronts"] == stats["shared_ideal_wavefronts"]
    # Each block of 128 columns reads its head's q_nope again.
    q_nope = 2 * num_tokens * num_heads * nope * rank // 128
    assert stats["cp_async_bytes"] == 32 * stats["cp_async_sectors"] == args["w_uk"].nbytes + q_nope
    assert 32 * stats["global_sectors"]["store"] == q.nbytes + 2 * num_tokens * (rank + rope)


@pytest.mark.parametrize("dim", [1, 12, 96, 1536])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(arch: str, dtype: torch.dtype, dim: int) -> None:
    x, weight = torch.randn(9, dim).to(dtype), torch.randn(dim).to(dtype)
    expected, baseline = (reference.rms_norm(*pair, 1e-3) for pair in ((x.double(), weight.double()), (x, weight)))
    args = {"x": x, "weight": weight, "out": x, "dtype": dtype, "num_rows": 9, "dim": dim, "eps": 1e-3}
    harness.launch("rms_norm", arch, args, directory="mla_project")
    assert_as_accurate(x, baseline, expected)
