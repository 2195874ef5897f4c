from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, to_double
from torch import Tensor

from transmla_ext import ops, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def assert_matches_reference(x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    args = (x, w, bias)
    actual = ops.linear(*args)
    assert actual.is_contiguous()
    assert_as_accurate(actual, reference.linear(*args), reference.linear(*map(to_double, args)))


# Up to 8 tokens are the kernel's, more are torch's. Rows of w that are no multiple of 4 end a pass early.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize(("out_features", "in_features"), [(129, 7), (131, 40), (66, 131), (64, 576)])
def test_matches_the_reference(
    isa: str, dtype: torch.dtype, num_tokens: int, out_features: int, in_features: int
) -> None:
    x, w = random(num_tokens, in_features, dtype=dtype), random(out_features, in_features, dtype=dtype)
    assert_matches_reference(x, w)
    assert_matches_reference(x, w, random(out_features, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 5, 20])
def test_each_group_has_its_matrix(isa: str, dtype: torch.dtype, num_tokens: int) -> None:
    """As W_UV lies in kv_b_proj.weight, below W_UK, which is not read."""
    w_kv_b = torch.full((6, 20 + 30, 48), torch.nan, dtype=dtype)
    w_uv = w_kv_b[:, 20:].copy_(random(6, 30, 48))
    assert_matches_reference(random(num_tokens, 6, 48, dtype=dtype), w_uv)
    assert_matches_reference(random(num_tokens, 6, 96, dtype=dtype)[..., :48], w_uv)


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_any_strides(isa: str, num_tokens: int) -> None:
    x, w = random(num_tokens, 40), random(130, 40)
    for strided_x in (random(num_tokens, 80)[:, 20:60].copy_(x), x.T.contiguous().T):
        for strided_w in (random(130, 80)[:, 20:60].copy_(w), w.T.contiguous().T):
            assert_matches_reference(strided_x, strided_w)
    assert_matches_reference(random(num_tokens, 2, 40).transpose(0, 1), w)


def test_batches_keep_their_shape(isa: str) -> None:
    x, w = random(2, 3, 40), random(9, 40)
    assert torch.equal(ops.linear(x, w), ops.linear(x.flatten(0, 1), w).view(2, 3, 9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_token_do_not_depend_on_the_others(isa: str, threads: int, dtype: torch.dtype) -> None:
    x, w = random(8, 576, dtype=dtype), random(301, 576, dtype=dtype)
    together = ops.linear(x, w)
    torch.set_num_threads(1)
    for num_tokens in (1, 3, 6):
        assert torch.equal(ops.linear(x[:num_tokens], w), together[:num_tokens])


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0)])
def test_empty(isa: str, shape: tuple[int, int, int]) -> None:
    num_tokens, out_features, in_features = shape
    bias = random(out_features)
    actual = ops.linear(random(num_tokens, in_features), random(out_features, in_features), bias)
    assert torch.equal(actual, bias.expand(num_tokens, -1))


MISUSE: list[tuple[Any, str]] = [
    ((random(3, 4).double(), random(2, 4)), r"x must be bfloat16, float16 or float32 .*, got float64 \[3, 4\]"),
    ((random(4), random(2, 4)), r"x must be .*\[num_tokens, in_features\], got float32 \[4\]"),
    ((random(3, 4), random(2, 4).half()), r"w must be float32 \[out_features, in_features=4\], got float16 \[2, 4\]"),
    ((random(3, 4), random(2, 5)), r"w must be float32 \[out_features, in_features=4\], got float32 \[2, 5\]"),
    ((random(3, 4), random(2, 4), random(3)), r"bias must be float32 \[out_features=2\], got float32 \[3\]"),
    ((random(3, 2, 4), random(3, 5, 4)), r"w must be float32 \[num_groups=2, out_features, in_features=4\], got"),
    ((random(3, 2, 4), random(2, 5, 4), random(5)), "bias must be None where w has groups, got a tensor"),
]


@pytest.mark.parametrize(("args", "message"), MISUSE)
def test_misuse_says_what_was_expected_and_got(args: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match="transmla::linear: " + message):
        ops.linear(*args)


def test_opcheck() -> None:
    for args in ((random(3, 40), random(9, 40), random(9)), (random(3, 2, 40), random(2, 9, 40), None)):
        torch.library.opcheck(torch.ops.transmla.linear, args)


def test_compiles_without_a_graph_break() -> None:
    args = random(3, 40), random(9, 40), random(9)
    assert torch.equal(torch.compile(ops.linear, fullgraph=True)(*args), ops.linear(*args))
