from __future__ import annotations

import harness
import pytest
import torch
from accuracy import to_double
from ptxvm import Stats
from torch import Tensor

from transmla_ext import reference

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]


def make_args(
    dtype: torch.dtype, *, num_tokens: int = 100, num_groups: int = 2, dim: int = 24
) -> tuple[Tensor, Tensor, Tensor]:
    """A state that is not zero, numbers with a mean that is not zero, weights."""
    start = torch.randn(num_groups, 2 * dim + 1, dim, dtype=torch.float64)
    x = torch.randn(num_tokens, num_groups, dim) + 3 * torch.randn(num_groups, dim)
    return start.mT @ start, x.to(dtype), torch.rand(num_tokens)


def added(
    arch: str, acc: Tensor, x: Tensor, weight: Tensor | None = None, *, out: Tensor | None = None
) -> tuple[Tensor, Stats]:
    """The state after the launch, which leaves ``acc`` alone."""
    acc = acc.clone() if out is None else out.copy_(acc)
    num_tokens, num_groups, dim = x.shape
    args = {"x": x, "weight": weight, "acc": acc, "dtype": x.dtype, "workspace": None}
    args |= {"num_tokens": num_tokens, "num_groups": num_groups, "dim": dim}
    args |= {"x_stride_token": x.stride(0), "x_stride_group": x.stride(1)}
    [(_, stats)] = harness.launch("covariance_add", arch, args)
    return acc, stats


def assert_matches_reference(arch: str, acc: Tensor, x: Tensor, weight: Tensor | None = None) -> Stats:
    actual, stats = added(arch, acc, x, weight)
    expected = acc.clone()
    reference.covariance_add_(expected, to_double(x), to_double(weight))
    scale = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    error = (actual - expected).abs() / (scale[:, :, None] * scale[:, None])
    assert error.max() <= 1e-6
    assert torch.equal(actual, actual.mT)
    return stats


@pytest.mark.parametrize("dim", [8, 64, 128, 136, 264])
@pytest.mark.parametrize("dtype", HALVES)
def test_tensor_cores_are_exact_to_a_millionth(arch: str, dtype: torch.dtype, dim: int) -> None:
    acc, x, _ = make_args(dtype, dim=dim)
    stats = assert_matches_reference(arch, acc, x)
    assert stats["flops"][f"mma.{'bf16' if dtype == torch.bfloat16 else 'f16'}"]


@pytest.mark.parametrize("dim", [1, 3, 24, 64, 65, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_any_dim_are_exact_to_a_millionth(arch: str, dtype: torch.dtype, dim: int) -> None:
    acc, x, weight = make_args(dtype, dim=dim)
    assert_matches_reference(arch, acc, x, weight)
    assert_matches_reference(arch, acc, x)


# Round the ring of three stages of 64 tokens, past a fold at 256.
@pytest.mark.parametrize("num_tokens", [1, 15, 64, 65, 129, 256, 257, 500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_number_of_tokens(arch: str, dtype: torch.dtype, num_tokens: int) -> None:
    acc, x, weight = make_args(dtype, num_tokens=num_tokens, dim=136)
    assert_matches_reference(arch, acc * 0, x)
    if dtype == torch.float32:
        assert_matches_reference(arch, acc * 0, x, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_does_not_pile_up(dtype: torch.dtype) -> None:
    # Equal products round in the same direction again and again: in plain fp32 sums this is off by 1e-4.
    acc, x, _ = make_args(dtype, num_tokens=1, num_groups=1, dim=8)
    assert_matches_reference("sm_80", acc * 0, x.expand(20_000, 1, 8))


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_numbers_of_any_size(arch: str, size: float) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        acc, x, _ = make_args(dtype)
        assert_matches_reference(arch, acc * size**2, x * size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_and_groups_may_be_strided(arch: str, dtype: torch.dtype) -> None:
    acc, x, _ = make_args(dtype)
    expected, _ = added(arch, acc, x)
    wider = torch.full((*x.shape[:2], 40), torch.nan, dtype=dtype)
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), wider[..., 8:32].copy_(x)):
        assert not strided.is_contiguous()
        assert torch.equal(added(arch, acc, strided)[0], expected)
    shifted = wider[..., 7:31].copy_(x)  # no whole chunks
    assert_matches_reference(arch, acc, shifted)


def test_an_odd_state_address_is_right(arch: str) -> None:
    acc, x, _ = make_args(torch.bfloat16)
    shifted = torch.zeros(acc.numel() + 1, dtype=torch.float64)[1:].view_as(acc)
    assert torch.equal(added(arch, acc, x, out=shifted)[0], added(arch, acc, x)[0])


@pytest.mark.parametrize("dim", [128, 384])
def test_each_tile_reads_its_tokens_once_in_whole_sectors(arch: str, dim: int) -> None:
    num_tokens, num_tiles = 256, dim // 128
    acc, x, _ = make_args(torch.bfloat16, num_tokens=num_tokens, num_groups=1, dim=dim)
    _, stats = added(arch, acc, x)
    tile = 2 * 128 * num_tokens
    # A tile on the diagonal is its own columns.
    assert stats["cp_async_bytes"] == 32 * stats["cp_async_sectors"] == num_tiles**2 * tile
    assert stats["shared_wavefronts"] == stats["shared_ideal_wavefronts"]
    num_blocks = num_tiles * (num_tiles + 1) // 2
    assert stats["flops"]["mma.bf16"] == num_blocks * 2 * num_tokens * 128**2
