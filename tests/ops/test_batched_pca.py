from __future__ import annotations

from typing import Any

import pytest
import torch
from matrices import GENERAL, assert_is_pca, symmetric
from torch import Tensor

from transmla_ext import ops, reference


@pytest.mark.parametrize("dim", [1, 2, 3, 12, 33, 64])
@pytest.mark.parametrize("kind", GENERAL)
def test_difficult_matrices(isa: str, kind: str, dim: int) -> None:
    cov = symmetric(GENERAL[kind](dim, dim))
    assert_is_pca(cov, *ops.batched_pca(cov))


@pytest.mark.parametrize("kind", GENERAL)
def test_difficult_matrices_in_lapack(kind: str) -> None:
    cov = symmetric(GENERAL[kind](129, 129))
    assert_is_pca(cov, *ops.batched_pca(cov))


def test_eigenvalues_match_the_reference(isa: str) -> None:
    cov = symmetric(GENERAL["random"](33, 33))
    eigenvalues, _ = ops.batched_pca(cov)
    torch.testing.assert_close(eigenvalues, reference.batched_pca(cov)[0], rtol=0, atol=1e-13)


def test_leading_subspace_matches_the_reference(isa: str) -> None:
    x = torch.randn(4, 200, 32, dtype=torch.float64) * torch.linspace(5, 0.1, 32, dtype=torch.float64)
    cov = x.mT @ x
    top, expected = (op.batched_pca(cov)[1][..., :8] for op in (ops, reference))
    torch.testing.assert_close(top @ top.mT, expected @ expected.mT, rtol=0, atol=1e-12)


def test_fp32_is_computed_in_fp64(isa: str) -> None:
    cov = symmetric(GENERAL["random"](33, 33)).float()
    actual = ops.batched_pca(cov)
    assert all(part.dtype == torch.float32 for part in actual)
    for part, wide in zip(actual, ops.batched_pca(cov.double()), strict=True):
        assert torch.equal(part, wide.float())


@pytest.mark.parametrize("dim", [33, 129])
def test_the_upper_triangle_is_not_read(isa: str, dim: int) -> None:
    cov = symmetric(GENERAL["random"](dim, dim))
    expected = ops.batched_pca(cov)
    cov[:, torch.ones(dim, dim).triu(1).bool()] = torch.nan
    assert all(map(torch.equal, ops.batched_pca(cov), expected))


def test_bits_do_not_depend_on_threads_or_batch(isa: str, threads: int) -> None:
    cov = symmetric(torch.randn(9, 24, 24, dtype=torch.float64))
    together = ops.batched_pca(cov)
    torch.set_num_threads(1)
    alone = [ops.batched_pca(matrix) for matrix in cov.split(1)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(("num_matrices", "dim"), [(7, 100), (3, 600)])
def test_lapack_in_threads_of_ours_decomposes_as_well(threads: int, num_matrices: int, dim: int) -> None:
    cov = symmetric(torch.randn(num_matrices, dim, dim, dtype=torch.float64))
    with torch.inference_mode():
        assert_is_pca(cov, *ops.batched_pca(cov))


def test_a_view_is_decomposed_as_its_copy(isa: str) -> None:
    cov = symmetric(GENERAL["random"](40, 40))[:, 3:30, 3:30]
    assert not cov.is_contiguous()
    assert all(map(torch.equal, ops.batched_pca(cov), ops.batched_pca(cov.contiguous())))


@pytest.mark.parametrize("shape", [(0, 5, 5), (3, 0, 0)])
def test_nothing_to_decompose(shape: tuple[int, ...]) -> None:
    eigenvalues, eigenvectors = ops.batched_pca(torch.empty(shape))
    assert eigenvalues.shape == shape[:2]
    assert eigenvectors.shape == shape


def with_entry(value: float) -> Any:
    def change(cov: Tensor) -> Tensor:
        cov[1, 4, 2] = value
        return cov

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cov: cov.half(), r"cov must be float32 or float64 \[.*\], got float16 \[2, 6, 6\]"),
        (lambda cov: cov[0], r"cov must be .*\[num_matrices, dim, dim\], got float32 \[6, 6\]"),
        (lambda cov: cov[:, 1:], r"cov must be .*\[num_matrices, dim=6, dim=6\], got float32 \[2, 5, 6\]"),
        (with_entry(torch.nan), r"cov must be finite, got -?nan"),
        (with_entry(-torch.inf), r"cov must be finite, got -inf"),
    ],
    ids=["dtype", "dimensions", "square", "nan", "inf"],
)
def test_misuse_says_what_was_expected_and_got(change: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match="transmla::batched_pca: " + message):
        ops.batched_pca(change(torch.ones(2, 6, 6)))


@pytest.mark.parametrize("dim", [5, 129])
def test_opcheck(dim: int) -> None:
    torch.library.opcheck(torch.ops.transmla.batched_pca, (symmetric(torch.randn(2, dim, dim)),))


def test_compiles_without_a_graph_break() -> None:
    cov = symmetric(torch.randn(2, 6, 6))
    compiled = torch.compile(ops.batched_pca, fullgraph=True)
    assert all(map(torch.equal, compiled(cov), ops.batched_pca(cov)))
