"""Matrices that decompositions go wrong on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NUM_MATRICES = 2
EPS = torch.finfo(torch.float64).eps


def _random(rows: int, cols: int) -> Tensor:
    return torch.randn(NUM_MATRICES, rows, cols, dtype=torch.float64)


def with_singular_values(rows: int, cols: int, singular_values: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(_random(rows, cols), full_matrices=False)
    return (u * singular_values) @ vh


def _index(rows: int, cols: int) -> Tensor:
    return torch.arange(min(rows, cols), dtype=torch.float64)


GENERAL: dict[str, Callable[[int, int], Tensor]] = {
    "random": _random,
    "zero": lambda rows, cols: torch.zeros(NUM_MATRICES, rows, cols, dtype=torch.float64),
    "ones": lambda rows, cols: torch.ones(NUM_MATRICES, rows, cols, dtype=torch.float64),
    "identity": lambda rows, cols: torch.eye(rows, cols, dtype=torch.float64).repeat(NUM_MATRICES, 1, 1),
    "rank 1": lambda rows, cols: _random(rows, 1) @ _random(1, cols),
    "half rank": lambda rows, cols: with_singular_values(rows, cols, _index(rows, cols).remainder(2)),
    "three values": lambda rows, cols: with_singular_values(rows, cols, 1 + _index(rows, cols).remainder(3)),
    "decaying": lambda rows, cols: with_singular_values(rows, cols, 10.0 ** -_index(rows, cols)),
    "scaled columns": lambda rows, cols: _random(rows, cols) * 10.0 ** -torch.arange(cols, dtype=torch.float64),
    "tiny": lambda rows, cols: _random(rows, cols) * 1e-290,
    "huge": lambda rows, cols: _random(rows, cols) * 1e290,
    "subnormal": lambda rows, cols: _random(rows, cols) * 1e-315,
}


def symmetric(a: Tensor) -> Tensor:
    return (a + a.mT) / 2


def assert_is_pca(cov: Tensor, eigenvalues: Tensor, eigenvectors: Tensor) -> None:
    """Reconstruction, orthogonality, order and sign, all relative to the largest entry of each matrix."""
    dim = cov.size(-1)
    scale = cov.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(cov.dtype).tiny)
    rebuilt = (eigenvectors * (eigenvalues[:, None] / scale)) @ eigenvectors.mT
    assert (rebuilt - cov / scale).abs().max() <= 16 * dim * EPS
    assert (eigenvectors.mT @ eigenvectors - torch.eye(dim, dtype=cov.dtype)).abs().max() <= 16 * dim * EPS
    assert (eigenvalues.diff(dim=-1) <= 0).all()
    largest = eigenvectors.abs().argmax(dim=-2, keepdim=True)
    assert (eigenvectors.gather(-2, largest) > 0).all()


def assert_is_svd(a: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> None:
    """Reconstruction, orthogonality and order, all relative to the largest entry of each matrix."""
    k, size = min(a.shape[1:]), (a.size(1) * a.size(2)) ** 0.5
    scale = a.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
    assert ((u * (s[:, None] / scale)) @ vh - a / scale).abs().max() <= 16 * size * EPS
    identity = torch.eye(k, dtype=a.dtype)
    assert (u.mT @ u - identity).abs().max() <= 16 * size * EPS
    assert (vh @ vh.mT - identity).abs().max() <= 16 * size * EPS
    assert (s >= 0).all()
    assert (s.diff(dim=-1) <= 0).all()
