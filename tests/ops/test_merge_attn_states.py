from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, to_double
from torch import Tensor

from transmla_ext import ops, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_args(
    dtype: torch.dtype = torch.float32,
    *,
    batch_size: int = 3,
    seqlen_q: int = 2,
    num_heads: int = 5,
    head_dim: int = 48,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out_a, out_b = torch.randn(2, batch_size, seqlen_q, num_heads, head_dim).to(dtype)
    lse_a, lse_b = torch.randn(2, batch_size, num_heads, seqlen_q) * 2
    return out_a, lse_a, out_b, lse_b


def assert_matches_reference(*args: Tensor) -> None:
    actual = ops.merge_attn_states(*args)
    baseline = reference.merge_attn_states(*args)
    expected = reference.merge_attn_states(*map(to_double, args))
    for parts in zip(actual, baseline, expected, strict=True):
        assert_as_accurate(*parts)


@pytest.mark.parametrize("head_dim", [1, 6, 16, 48, 88, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(isa: str, threads: int, dtype: torch.dtype, head_dim: int) -> None:
    assert_matches_reference(*make_args(dtype, head_dim=head_dim, num_heads=33))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_the_halves_of_a_sequence_gives_the_whole(isa: str, dtype: torch.dtype) -> None:
    tokens, dim, rank = 96, 64, 48
    q = torch.randn(1, 1, 3, dim).to(dtype)
    cache = torch.randn(1, tokens, dim).to(dtype)
    table = torch.zeros(1, 1, dtype=torch.int32)

    def attend(part: Tensor) -> tuple[Tensor, Tensor]:
        seqlens = torch.tensor([part.size(1)], dtype=torch.int32)
        return ops.mla_decode(q, part, table, seqlens, rank, dim**-0.5)

    merged = ops.merge_attn_states(*attend(cache[:, :40]), *attend(cache[:, 40:]))
    args = (q, cache, table, torch.tensor([tokens], dtype=torch.int32), rank, dim**-0.5)
    baseline = reference.mla_decode(*args)
    expected = reference.mla_decode(*map(to_double, args))
    for parts in zip(merged, baseline, expected, strict=True):
        assert_as_accurate(*parts)


@pytest.mark.parametrize("empty", [-torch.inf, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_part_leaves_the_other_as_it_is(isa: str, dtype: torch.dtype, empty: float) -> None:
    part = make_args(dtype)[:2]
    nothing = torch.full_like(part[0], torch.nan), torch.full_like(part[1], empty)
    for out, lse in (ops.merge_attn_states(*part, *nothing), ops.merge_attn_states(*nothing, *part)):
        assert torch.equal(out, part[0])
        torch.testing.assert_close(lse, part[1], rtol=0, atol=1e-6)


def test_two_empty_parts_give_zero_and_minus_infinity(isa: str) -> None:
    out_a, lse_a, out_b, lse_b = make_args()
    out, lse = ops.merge_attn_states(
        out_a.fill_(torch.nan), lse_a.fill_(-torch.inf), out_b.fill_(torch.nan), lse_b.fill_(torch.inf)
    )
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.parametrize("size", [-300.0, 300.0])
def test_scores_of_any_size_do_not_overflow(isa: str, size: float) -> None:
    out_a, lse_a, out_b, lse_b = make_args()
    assert_matches_reference(out_a, lse_a + size, out_b, lse_b + size)
    assert_matches_reference(out_a, lse_a, out_b, lse_b + size)


def test_empty_batch() -> None:
    out, lse = ops.merge_attn_states(*make_args(batch_size=0))
    assert out.shape == (0, 2, 5, 48)
    assert lse.shape == (0, 5, 2)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: x.double(), r"out_a must be bfloat16, float16 or float32 \[.*\], got float64 \[3, 2, 5, 48\]"),
        (0, lambda x: x[0], r"out_a must be .*\[batch_size, seqlen_q, num_heads, head_dim\], got float32 \[2, 5, 48\]"),
        (0, lambda x: x.mT.contiguous().mT, r"out_a must be .*contiguous, got .* with strides"),
        (1, lambda x: x.half(), r"lse_a must be float32 \[.*\], got float16 \[3, 5, 2\]"),
        (1, lambda x: x.mT.contiguous(), r"lse_a must be .*num_heads=5, seqlen_q=2\], got float32 \[3, 2, 5\]"),
        (2, lambda x: x.half(), r"out_b must be float32 \[.*\], got float16 \[3, 2, 5, 48\]"),
        (2, lambda x: x[..., :5], r"out_b must be .*head_dim=48\], got float32 \[3, 2, 5, 5\]"),
        (3, lambda x: x[:1], r"lse_b must be .*\[batch_size=3, .*\], got float32 \[1, 5, 2\]"),
        (3, lambda x: x.mT.contiguous().mT, r"lse_b must be .*contiguous, got .* with strides"),
    ],
    ids=[f"{name}-{i}" for i, name in enumerate(["out_a"] * 3 + ["lse_a"] * 2 + ["out_b"] * 2 + ["lse_b"] * 2)],
)
def test_misuse_says_what_was_expected_and_got(index: int, change: Any, message: str) -> None:
    args = list(make_args())
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match="transmla::merge_attn_states: " + message):
        ops.merge_attn_states(*args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.transmla.merge_attn_states, make_args(dtype))


def test_compiles_without_a_graph_break() -> None:
    args = make_args()
    compiled = torch.compile(ops.merge_attn_states, fullgraph=True)
    assert all(map(torch.equal, compiled(*args), ops.merge_attn_states(*args)))
