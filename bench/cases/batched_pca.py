"""Eigen-decompositions of a batch of covariances: their bytes and FLOPs, their inputs, and what else computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla_ext import ops

__all__ = ["BASELINES", "CASES", "OP", "QUICK", "Args", "Case", "torch_eigh"]

Args = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """ops.batched_pca in fp64."""

    num_matrices: int
    dim: int

    @property
    def num_bytes(self) -> int:
        """Matrices, eigenvalues and eigenvectors, each moved once."""
        return 8 * self.num_matrices * self.dim * (2 * self.dim + 1)

    @property
    def flops(self) -> int:
        """Of the symmetric QR algorithm with eigenvectors (Golub & Van Loan, Matrix Computations, 8.3)."""
        return 9 * self.num_matrices * self.dim**3

    def inputs(self, device: torch.device, num_sets: int) -> list[Args]:
        def covariance() -> Tensor:
            x = torch.randn(self.num_matrices, 2 * self.dim, self.dim, dtype=torch.float64, device=device)
            return x.mT @ x / x.size(1)

        return [{"cov": covariance()} for _ in range(num_sets)]

    def __str__(self) -> str:
        return f"{self.num_matrices} x {self.dim} x {self.dim}"


def torch_eigh(cov: Tensor) -> tuple[Tensor, Tensor]:
    """The same with vectors in ascending order and of any sign: only the eigenvalues, turned round, can be compared."""
    eigenvalues, eigenvectors = torch.linalg.eigh(cov)
    return eigenvalues.flip(-1), eigenvectors


OP = ops.batched_pca
BASELINES: dict[str, Callable[[Args], Callable[..., tuple[Tensor, Tensor]]]] = {
    "torch.linalg.eigh": lambda _: torch_eigh
}
_SHAPES = ((32, 16), (32, 32), (32, 64), (32, 128), (32, 256), (2, 512), (2, 1024), (1, 128), (1, 1024))
CASES = [Case(num_matrices=num_matrices, dim=dim) for num_matrices, dim in _SHAPES]
QUICK = [Case(num_matrices=32, dim=dim) for dim in (32, 128, 256)]
