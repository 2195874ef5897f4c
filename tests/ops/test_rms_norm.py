from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, to_double
from torch import Tensor

from transmla_ext import ops, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_args(*shape: int, dtype: torch.dtype = torch.float32, eps: float = 1e-6) -> tuple[Tensor, Tensor, float]:
    return torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype), eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 40), (200, 576)])
@pytest.mark.parametrize("eps", [1e-6, 10.0])
def test_matches_the_reference(isa: str, threads: int, dtype: torch.dtype, shape: tuple[int, ...], eps: float) -> None:
    args = make_args(*shape, dtype=dtype, eps=eps)
    expected = reference.rms_norm(*map(to_double, args))
    assert_as_accurate(ops.rms_norm(*args), reference.rms_norm(*args), expected)


def test_rounds_before_the_weight_as_the_models_were_trained(isa: str) -> None:
    x, weight, eps = make_args(64, 576, dtype=torch.bfloat16)
    unweighted = ops.rms_norm(x, torch.ones_like(weight), eps)
    assert torch.equal(ops.rms_norm(x, weight, eps), weight * unweighted)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty(isa: str, shape: tuple[int, int]) -> None:
    assert ops.rms_norm(*make_args(*shape)).shape == shape


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(3, 4).double(), torch.ones(4), r"x must be bfloat16, float16 or float32 .*, got float64 \[3, 4\]"),
        (torch.ones(4), torch.ones(4), r"x must be .*\[num_rows, dim\], got float32 \[4\]"),
        (torch.ones(4, 3).T, torch.ones(4), r"x must be .*contiguous, got float32 \[3, 4\] with strides \[1, 3\]"),
        (torch.ones(3, 4), torch.ones(5), r"weight must be float32 \[dim=4\].*, got float32 \[5\]"),
    ],
)
def test_misuse_says_what_was_expected_and_got(x: Any, weight: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match="transmla::rms_norm: " + message):
        ops.rms_norm(x, weight, 1e-6)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.transmla.rms_norm, make_args(3, 40))


def test_compiles_without_a_graph_break() -> None:
    args = make_args(3, 40)
    assert torch.equal(torch.compile(ops.rms_norm, fullgraph=True)(*args), ops.rms_norm(*args))
