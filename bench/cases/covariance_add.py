"""One call of ops.covariance_add_: its bytes and FLOPs, its inputs, and what else computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transmla_ext import ops

__all__ = ["BASELINES", "CASES", "OP", "QUICK", "Args", "Case", "covariance_add", "torch_upcast"]

Args = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """ops.covariance_add_ without weights."""

    num_tokens: int
    dim: int
    num_groups: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def num_bytes(self) -> int:
        """x read once, the state in fp64 read and written once."""
        state = self.num_groups * self.dim**2 * 8
        return self.num_tokens * self.num_groups * self.dim * self.dtype.itemsize + 2 * state

    @property
    def flops(self) -> int:
        """A multiply and an add for each token and each entry of the lower triangle."""
        return self.num_tokens * self.num_groups * self.dim * (self.dim + 1)

    def inputs(self, device: torch.device, num_sets: int) -> list[Args]:
        state = (self.num_groups, self.dim, self.dim)
        shape = (self.num_tokens, self.num_groups, self.dim)
        return [
            {
                "acc": torch.zeros(state, dtype=torch.float64, device=device),
                "x": torch.randn(shape, device=device).to(self.dtype),
            }
            for _ in range(num_sets)
        ]

    def __str__(self) -> str:
        groups = f"{self.num_groups} groups, " if self.num_groups > 1 else ""
        return f"{self.num_tokens:,} tokens, {groups}dim {self.dim}, {str(self.dtype).removeprefix('torch.')}"


def covariance_add(acc: Tensor, x: Tensor) -> Tensor:
    ops.covariance_add_(acc, x)
    return acc


def torch_upcast(acc: Tensor, x: Tensor) -> Tensor:
    """The sum of this call, in fp32 all through: it is less exact, and nothing is added to the state."""
    groups = x.float().transpose(0, 1)
    return groups.mT @ groups


OP = covariance_add
BASELINES: dict[str, Callable[[Args], Callable[..., Tensor]]] = {"torch X.float().T @ X": lambda _: torch_upcast}
CASES = [
    Case(num_tokens=32768, dim=2048),
    *(
        Case(num_tokens=8192, dim=dim, dtype=dtype)
        for dim in (576, 1024, 2048, 4096)
        for dtype in (torch.bfloat16, torch.float32)
    ),
    Case(num_tokens=8192, dim=128, num_groups=8),
]
QUICK = [Case(num_tokens=4096, dim=576), Case(num_tokens=4096, dim=2048)]
