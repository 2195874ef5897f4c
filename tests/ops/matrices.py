"""Matrices that decompositions go wrong on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NUM_MATRICES = 2


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
