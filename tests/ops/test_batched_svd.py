from __future__ import annotations

from typing import Any

import pytest
import torch
from matrices import GENERAL, assert_is_svd, with_singular_values
from torch import Tensor

from transmla_ext import ops, reference


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 5), (5, 1), (3, 3), (12, 40), (40, 12), (16, 16), (100, 16)])
@pytest.mark.parametrize("kind", GENERAL)
def test_difficult_matrices(isa: str, kind: str, rows: int, cols: int) -> None:
    a = GENERAL[kind](rows, cols)
    assert_is_svd(a, *ops.batched_svd(a))


@pytest.mark.parametrize(("rows", "cols"), [(65, 65), (30, 70), (600, 3)])
@pytest.mark.parametrize("kind", GENERAL)
def test_difficult_matrices_in_lapack(kind: str, rows: int, cols: int) -> None:
    a = GENERAL[kind](rows, cols)
    assert_is_svd(a, *ops.batched_svd(a))


@pytest.mark.parametrize(("rows", "cols"), [(20, 33), (33, 33), (40, 12)])
def test_singular_values_match_the_reference(isa: str, rows: int, cols: int) -> None:
    a = GENERAL["random"](rows, cols)
    torch.testing.assert_close(ops.batched_svd(a)[1], reference.batched_svd(a)[1], rtol=0, atol=1e-13)


def test_leading_subspaces_match_the_reference(isa: str) -> None:
    a = with_singular_values(50, 30, torch.linspace(5, 0.1, 30, dtype=torch.float64))
    u, _, vh = ops.batched_svd(a)
    expected_u, _, expected_vh = reference.batched_svd(a)
    for basis, expected in ((u, expected_u), (vh.mT, expected_vh.mT)):
        top, expected_top = basis[..., :8], expected[..., :8]
        torch.testing.assert_close(top @ top.mT, expected_top @ expected_top.mT, rtol=0, atol=1e-12)


def test_fp32_is_computed_in_fp64(isa: str) -> None:
    a = GENERAL["random"](20, 33).float()
    actual = ops.batched_svd(a)
    assert all(part.dtype == torch.float32 for part in actual)
    for part, wide in zip(actual, ops.batched_svd(a.double()), strict=True):
        assert torch.equal(part, wide.float())


def test_bits_do_not_depend_on_threads_or_batch(isa: str, threads: int) -> None:
    a = torch.randn(9, 24, 12, dtype=torch.float64)
    together = ops.batched_svd(a)
    torch.set_num_threads(1)
    alone = [ops.batched_svd(matrix) for matrix in a.split(1)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(("num_matrices", "rows", "cols"), [(7, 60, 40), (3, 600, 520)])
def test_lapack_in_threads_of_ours_decomposes_as_well(threads: int, num_matrices: int, rows: int, cols: int) -> None:
    a = torch.randn(num_matrices, rows, cols, dtype=torch.float64)
    with torch.inference_mode():
        assert_is_svd(a, *ops.batched_svd(a))


def test_a_view_is_decomposed_as_its_copy(isa: str) -> None:
    a = GENERAL["random"](20, 33).mT
    assert not a.is_contiguous()
    assert all(map(torch.equal, ops.batched_svd(a), ops.batched_svd(a.contiguous())))


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 4, 0)])
def test_nothing_to_decompose(shape: tuple[int, int, int]) -> None:
    u, s, vh = ops.batched_svd(torch.empty(shape))
    num_matrices, rows, cols = shape
    k = min(rows, cols)
    assert (u.shape, s.shape, vh.shape) == ((num_matrices, rows, k), (num_matrices, k), (num_matrices, k, cols))


def with_entry(value: float) -> Any:
    def change(a: Tensor) -> Tensor:
        a[1, 2, 4] = value
        return a

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.half(), r"a must be float32 or float64 \[.*\], got float16 \[2, 6, 5\]"),
        (lambda a: a[0], r"a must be .*\[num_matrices, rows, cols\], got float32 \[6, 5\]"),
        (with_entry(torch.nan), r"a must be finite, got -?nan"),
        (with_entry(torch.inf), r"a must be finite, got inf"),
    ],
    ids=["dtype", "dimensions", "nan", "inf"],
)
def test_misuse_says_what_was_expected_and_got(change: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match="transmla::batched_svd: " + message):
        ops.batched_svd(change(torch.ones(2, 6, 5)))


@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 5, 6), (1, 65, 65)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(torch.ops.transmla.batched_svd, (torch.randn(shape),))


def test_compiles_without_a_graph_break() -> None:
    a = torch.randn(2, 6, 5)
    compiled = torch.compile(ops.batched_svd, fullgraph=True)
    assert all(map(torch.equal, compiled(a), ops.batched_svd(a)))
