from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from accuracy import assert_as_accurate, to_double
from ptxvm import Stats
from torch import Tensor

from transmla_ext import reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_args(dtype: torch.dtype, *, num_heads: int = 5, head_dim: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out_a, out_b = torch.randn(2, 3, 2, num_heads, head_dim).to(dtype)
    lse_a, lse_b = torch.randn(2, 3, num_heads, 2) * 2
    return out_a, lse_a, out_b, lse_b


def merge(arch: str, *parts: Tensor) -> tuple[Tensor, Tensor, Stats]:
    out_a, lse_a, out_b, lse_b = parts
    out, lse = torch.full_like(out_a, torch.nan), torch.full_like(lse_a, torch.nan)
    args: dict[str, Any] = dict(zip(("batch_size", "seqlen_q", "num_heads", "head_dim"), out_a.shape, strict=True))
    args |= {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b, "out": out, "lse": lse}
    [(_, stats)] = harness.launch("merge_attn_states", arch, args | {"dtype": out_a.dtype})
    return out, lse, stats


def assert_matches_reference(arch: str, *parts: Tensor) -> None:
    actual = merge(arch, *parts)[:2]
    baseline = reference.merge_attn_states(*parts)
    expected = reference.merge_attn_states(*map(to_double, parts))
    for results in zip(actual, baseline, expected, strict=True):
        assert_as_accurate(*results)


@pytest.mark.parametrize("head_dim", [1, 6, 48, 88, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(arch: str, dtype: torch.dtype, head_dim: int) -> None:
    assert_matches_reference(arch, *make_args(dtype, head_dim=head_dim))


@pytest.mark.parametrize("size", [-300.0, 300.0])
def test_scores_of_any_size_do_not_overflow(arch: str, size: float) -> None:
    out_a, lse_a, out_b, lse_b = make_args(torch.float32)
    assert_matches_reference(arch, out_a, lse_a + size, out_b, lse_b + size)
    assert_matches_reference(arch, out_a, lse_a, out_b, lse_b + size)


@pytest.mark.parametrize("empty", [-torch.inf, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_part_leaves_the_other_as_it_is(arch: str, dtype: torch.dtype, empty: float) -> None:
    part = make_args(dtype)[:2]
    nothing = torch.full_like(part[0], torch.nan), torch.full_like(part[1], empty)
    for out, lse, _ in (merge(arch, *part, *nothing), merge(arch, *nothing, *part)):
        assert torch.equal(out, part[0])
        torch.testing.assert_close(lse, part[1], rtol=0, atol=1e-6)


def test_two_empty_parts_give_zero_and_minus_infinity(arch: str) -> None:
    out_a, lse_a, out_b, lse_b = make_args(torch.bfloat16)
    nan, inf = torch.nan, torch.inf
    out, lse, _ = merge(arch, out_a.fill_(nan), lse_a.fill_(-inf), out_b.fill_(nan), lse_b.fill_(inf))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -inf))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_alignment(arch: str, dtype: torch.dtype) -> None:
    out_a, lse_a, out_b, lse_b = make_args(dtype)
    storage = torch.empty(out_b.numel() + 1, dtype=dtype)
    shifted = storage[1:].view_as(out_b).copy_(out_b)
    for actual, expected in zip(
        merge(arch, out_a, lse_a, shifted, lse_b)[:2], merge(arch, out_a, lse_a, out_b, lse_b)[:2], strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moves_each_byte_once_in_whole_sectors(arch: str, dtype: torch.dtype) -> None:
    out_a, lse_a, out_b, lse_b = make_args(dtype, head_dim=512)
    out, lse, stats = merge(arch, out_a, lse_a, out_b, lse_b)
    sector = 32  # bytes; the lse of a row fills one alone
    assert sector * stats["global_sectors"]["load"] == out_a.nbytes + out_b.nbytes + 2 * sector * lse.numel()
    assert sector * stats["global_sectors"]["store"] == out.nbytes + sector * lse.numel()
