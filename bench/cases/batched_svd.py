"""Thin singular value decompositions of a batch: their bytes and FLOPs, their inputs, and what else computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla_ext import ops

__all__ = ["BASELINES", "CASES", "OP", "QUICK", "Args", "Case", "batched_svd", "torch_svd"]

Args = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """ops.batched_svd in fp64."""

    num_matrices: int
    rows: int
    cols: int

    @property
    def num_bytes(self) -> int:
        """a, u, s and vh, each moved once."""
        k = min(self.rows, self.cols)
        return 8 * self.num_matrices * (self.rows * self.cols + k * (self.rows + self.cols + 1))

    @property
    def flops(self) -> int:
        """Of QR and the SVD of R, with both sides' vectors (Golub & Van Loan, Matrix Computations, 8.6)."""
        long, short = max(self.rows, self.cols), min(self.rows, self.cols)
        return self.num_matrices * (6 * long * short**2 + 20 * short**3)

    def inputs(self, device: torch.device, num_sets: int) -> list[Args]:
        shape = (self.num_matrices, self.rows, self.cols)
        return [{"a": torch.randn(shape, dtype=torch.float64, device=device)} for _ in range(num_sets)]

    def __str__(self) -> str:
        return f"{self.num_matrices} x {self.rows} x {self.cols}"


def batched_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values first: they can be compared, whatever the vectors' signs."""
    u, s, vh = ops.batched_svd(a)
    return s, u, vh


def torch_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return s, u, vh


OP = batched_svd
BASELINES: dict[str, Callable[[Args], Callable[..., tuple[Tensor, Tensor, Tensor]]]] = {
    "torch.linalg.svd": lambda _: torch_svd
}
_BATCHES = ((32, 32), (32, 64), (32, 128), (32, 256), (2, 512), (2, 1024))
CASES = [
    *(Case(num_matrices=num_matrices, rows=n, cols=n // 2) for num_matrices, n in _BATCHES),
    *(Case(num_matrices=num_matrices, rows=n // 2, cols=n) for num_matrices, n in _BATCHES),
]
QUICK = [Case(num_matrices=32, rows=n, cols=n // 2) for n in (32, 128, 256)]
