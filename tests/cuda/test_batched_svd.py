from __future__ import annotations

import harness
import pytest
import torch
from matrices import GENERAL, assert_is_svd
from torch import Tensor

from transmla_ext import reference


def svd(arch: str, a: Tensor, *, max_smem: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    num_matrices, rows, cols = a.shape
    k = min(rows, cols)
    shapes = ((num_matrices, rows, k), (num_matrices, k), (num_matrices, k, cols))
    u, s, vh = (torch.full(shape, torch.nan, dtype=a.dtype) for shape in shapes)
    args = {"a": a, "u": u, "s": s, "vh": vh, "workspace": None}
    args |= {"num_matrices": num_matrices, "rows": rows, "cols": cols}
    size = harness.workspace_size("batched_svd", arch, args, max_smem=max_smem)
    workspace = torch.full((size // a.itemsize,), torch.nan, dtype=a.dtype)
    harness.launch("batched_svd", arch, args | {"workspace": workspace}, max_smem=max_smem)
    return u, s, vh


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 5), (5, 1), (3, 3), (12, 40), (33, 20)])
@pytest.mark.parametrize("kind", GENERAL)
def test_difficult_matrices(arch: str, kind: str, rows: int, cols: int) -> None:
    a = GENERAL[kind](rows, cols)
    assert_is_svd(a, *svd(arch, a))


@pytest.mark.parametrize(("rows", "cols"), [(20, 33), (33, 33), (40, 12)])
def test_singular_values_match_the_reference(arch: str, rows: int, cols: int) -> None:
    a = GENERAL["random"](rows, cols)
    torch.testing.assert_close(svd(arch, a)[1], reference.batched_svd(a)[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("kib", [16, 32, 64])
def test_matrices_larger_than_shared_memory(arch: str, kib: int) -> None:
    a = GENERAL["random"](60, 40)
    assert_is_svd(a, *svd(arch, a, max_smem=kib << 10))


@pytest.mark.parametrize(("rows", "cols"), [(512, 20), (20, 512), (128, 128)])
def test_the_largest_matrices(rows: int, cols: int) -> None:
    a = GENERAL["random"](rows, cols)[:1]
    if rows == cols:  # nearly diagonal, to be quick
        a = a * 1e-7 + torch.eye(rows, dtype=torch.float64)
    assert_is_svd(a, *svd("sm_80", a))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_gives_nan(arch: str, value: float) -> None:
    a = torch.eye(40, dtype=torch.float64).repeat(2, 1, 1)
    a[1, 4, 30] = value
    u, s, vh = svd(arch, a)
    assert torch.equal(s[0], torch.ones(40, dtype=torch.float64))
    assert all(part[1].isnan().all() for part in (u, s, vh))


def test_bits_do_not_depend_on_the_batch(arch: str) -> None:
    a = torch.randn(3, 24, 17, dtype=torch.float64)
    alone = [svd(arch, matrix) for matrix in a.split(1)]
    for whole, parts in zip(svd(arch, a), zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))
