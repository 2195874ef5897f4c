from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import to_double
from torch import Tensor

from transmla_ext import ops, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_args(
    dtype: torch.dtype = torch.float32, *, num_tokens: int = 300, num_groups: int = 2, dim: int = 24
) -> tuple[Tensor, Tensor, Tensor]:
    """A state that is not zero, numbers with a mean that is not zero, weights."""
    start = torch.randn(num_groups, 2 * dim + 1, dim, dtype=torch.float64)
    x = torch.randn(num_tokens, num_groups, dim) + 3 * torch.randn(num_groups, dim)
    return start.mT @ start, x.to(dtype), torch.rand(num_tokens)


def added(op: Any, acc: Tensor, *rest: Tensor | None) -> Tensor:
    """The state after the call, which leaves ``acc`` alone."""
    acc = acc.clone()
    op(acc, *rest)
    return acc


def assert_matches_reference(acc: Tensor, *rest: Tensor | None) -> None:
    actual = added(ops.covariance_add_, acc, *rest)
    expected = added(reference.covariance_add_, acc, *map(to_double, rest))
    scale = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    error = (actual - expected).abs() / (scale[:, :, None] * scale[:, None])
    assert error.max() <= 1e-6
    assert torch.equal(actual, actual.mT)


@pytest.mark.parametrize("dim", [1, 3, 12, 33, 96, 97, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_exact_to_a_millionth(isa: str, dtype: torch.dtype, dim: int) -> None:
    acc, x, weight = make_args(dtype, dim=dim)
    assert_matches_reference(acc, x)
    assert_matches_reference(acc, x, weight)


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 512, 513, 5000])
def test_any_number_of_tokens(isa: str, threads: int, num_tokens: int) -> None:
    acc, x, weight = make_args(num_tokens=num_tokens, num_groups=5)
    assert_matches_reference(acc * 0, x, weight)


def test_rounding_does_not_pile_up(isa: str) -> None:
    # Equal products round in the same direction again and again: in plain fp32 sums this is off by 1e-4.
    acc, x, _ = make_args(num_tokens=50_000, num_groups=1, dim=9)
    assert_matches_reference(acc * 0, x[:1].expand_as(x))


def test_numbers_of_any_size(isa: str) -> None:
    acc, x, weight = make_args()
    for size in (1e-12, 1e12):
        assert_matches_reference(acc * size**2, x * size, weight)


def test_no_tokens_change_nothing(isa: str) -> None:
    acc, x, weight = make_args(num_tokens=0)
    assert torch.equal(added(ops.covariance_add_, acc, x, weight), acc)


def test_weights_of_one_are_no_weights(isa: str) -> None:
    acc, x, weight = make_args(torch.bfloat16)
    ones = torch.ones_like(weight)
    assert torch.equal(added(ops.covariance_add_, acc, x, ones), added(ops.covariance_add_, acc, x))


def test_bits_do_not_depend_on_the_number_of_threads(isa: str, threads: int) -> None:
    acc, x, weight = make_args(num_groups=5, dim=200)  # so many that one thread takes whole groups
    actual = added(ops.covariance_add_, acc, x, weight)
    torch.set_num_threads(1)
    assert torch.equal(actual, added(ops.covariance_add_, acc, x, weight))


def test_tokens_and_groups_may_be_strided(isa: str) -> None:
    acc, x, weight = make_args(torch.bfloat16)
    wider = torch.full((*x.shape[:2], 40), torch.nan, dtype=x.dtype)
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), wider[..., 7:31].copy_(x)):
        assert not strided.is_contiguous()
        assert torch.equal(added(ops.covariance_add_, acc, strided, weight), added(ops.covariance_add_, acc, x, weight))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda acc: acc.float(), r"acc must be float64 \[num_groups, dim=24, dim=24\], got float32 \[2, 24, 24\]"),
        (0, lambda acc: acc[0], r"acc must be float64 \[num_groups, dim, dim\], got float64 \[24, 24\]"),
        (0, lambda acc: acc[:, 1:], r"acc must be .*dim=24, dim=24\], got float64 \[2, 23, 24\]"),
        (0, lambda acc: acc.mT, r"acc must be .*contiguous, got .* with strides \[576, 1, 24\]"),
        (1, lambda x: x.double(), r"x must be bfloat16, float16 or float32 \[.*\], got float64 \[300, 2, 24\]"),
        (1, lambda x: x[:, 0], r"x must be .*\[num_tokens, num_groups=2, dim=24\], got float32 \[300, 24\]"),
        (1, lambda x: x[:, :1], r"x must be .*num_groups=2, dim=24\], got float32 \[300, 1, 24\]"),
        (1, lambda x: x[..., ::2], r"x must be .*dim=24\], got float32 \[300, 2, 12\]"),
        (1, lambda x: x.mT.contiguous().mT, r"x must be .*dense in the last dimension, got .* with strides"),
        (2, lambda weight: weight.double(), r"weight must be float32 \[num_tokens=300\], got float64 \[300\]"),
        (2, lambda weight: weight[1:], r"weight must be float32 \[num_tokens=300\], got float32 \[299\]"),
    ],
    ids=[f"{name}-{i}" for name, count in (("acc", 4), ("x", 5), ("weight", 2)) for i in range(count)],
)
def test_misuse_says_what_was_expected_and_got(index: int, change: Any, message: str) -> None:
    args = list(make_args())
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match="transmla::covariance_add_: " + message):
        ops.covariance_add_(*args)


def test_opcheck() -> None:
    acc, x, weight = make_args(torch.bfloat16)
    torch.library.opcheck(torch.ops.transmla.covariance_add_, (acc, x, weight))
    torch.library.opcheck(torch.ops.transmla.covariance_add_, (acc, x, None))


def test_compiles_without_a_graph_break() -> None:
    args = make_args()
    compiled = torch.compile(ops.covariance_add_, fullgraph=True)
    assert torch.equal(added(compiled, *args), added(ops.covariance_add_, *args))
