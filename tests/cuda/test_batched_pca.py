from __future__ import annotations

import harness
import pytest
import torch
from matrices import GENERAL, assert_is_pca, symmetric
from torch import Tensor

from transmla_ext import reference


def pca(arch: str, cov: Tensor, *, max_smem: int | None = None) -> tuple[Tensor, Tensor]:
    num_matrices, dim, _ = cov.shape
    eigenvalues, eigenvectors = torch.full((num_matrices, dim), torch.nan, dtype=cov.dtype), torch.empty_like(cov)
    args = {"cov": cov, "eigenvalues": eigenvalues, "eigenvectors": eigenvectors.fill_(torch.nan), "workspace": None}
    args |= {"num_matrices": num_matrices, "dim": dim}
    size = harness.workspace_size("batched_pca", arch, args, max_smem=max_smem)
    workspace = torch.full((size // cov.itemsize,), torch.nan, dtype=cov.dtype)
    harness.launch("batched_pca", arch, args | {"workspace": workspace}, max_smem=max_smem)
    return eigenvalues, eigenvectors


@pytest.mark.parametrize("dim", [1, 2, 3, 12, 33])
@pytest.mark.parametrize("kind", GENERAL)
def test_difficult_matrices(arch: str, kind: str, dim: int) -> None:
    cov = symmetric(GENERAL[kind](dim, dim))
    assert_is_pca(cov, *pca(arch, cov))


@pytest.mark.parametrize("rank", [1, 20, 48])
def test_covariances_of_any_rank(arch: str, rank: int) -> None:
    x = torch.randn(2, 48, rank, dtype=torch.float64) * torch.logspace(0, -4, rank, dtype=torch.float64)
    cov = x @ x.mT
    assert_is_pca(cov, *pca(arch, cov))


@pytest.mark.parametrize("kib", [16, 32, 64])
def test_matrices_larger_than_shared_memory(arch: str, kib: int) -> None:
    x = torch.randn(2, 100, 50, dtype=torch.float64)
    cov = x.mT @ x
    actual = pca(arch, cov, max_smem=kib << 10)
    assert_is_pca(cov, *actual)
    torch.testing.assert_close(actual[0], reference.batched_pca(cov)[0], rtol=1e-13, atol=0)


def test_the_largest_matrix() -> None:
    # Two sweeps: the groups and their rounds are those of any matrix of this size.
    cov = torch.diag_embed(torch.rand(1, 256, dtype=torch.float64) + 1)
    for row, col in ((255, 0), (101, 100), (200, 40)):
        cov[:, row, col] = cov[:, col, row] = 0.5
    assert_is_pca(cov, *pca("sm_80", cov))


def test_only_the_lower_triangle_is_read(arch: str) -> None:
    cov = symmetric(GENERAL["random"](33, 33))
    expected = pca(arch, cov)
    cov[:, torch.ones(33, 33).triu(1).bool()] = torch.nan
    assert all(map(torch.equal, pca(arch, cov), expected))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_number_that_is_not_finite_gives_nan(arch: str, value: float) -> None:
    cov = torch.eye(40, dtype=torch.float64).repeat(2, 1, 1)
    cov[1, 30, 4] = value
    eigenvalues, eigenvectors = pca(arch, cov)
    assert torch.equal(eigenvalues[0], torch.ones(40, dtype=torch.float64))
    assert eigenvalues[1].isnan().all()
    assert eigenvectors[1].isnan().all()


def test_bits_do_not_depend_on_the_batch(arch: str) -> None:
    cov = symmetric(torch.randn(3, 24, 24, dtype=torch.float64))
    alone = [pca(arch, matrix) for matrix in cov.split(1)]
    for whole, parts in zip(pca(arch, cov), zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))
