"""x wᵀ for few tokens: bytes and FLOPs, inputs, and torch's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transmla_ext import ops

__all__ = ["BASELINES", "CASES", "OP", "QUICK", "Args", "Case", "torch_linear"]

Args = dict[str, Any]


OP = ops.linear


@dataclass(frozen=True, kw_only=True)
class Case:
    """ops.linear without a bias."""

    num_tokens: int
    out_features: int
    in_features: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def num_bytes(self) -> int:
        """x, w and the result, each moved once."""
        numbers = self.out_features * self.in_features + self.num_tokens * (self.in_features + self.out_features)
        return numbers * self.dtype.itemsize

    @property
    def flops(self) -> int:
        return 2 * self.num_tokens * self.out_features * self.in_features

    def inputs(self, device: torch.device, num_sets: int) -> list[Args]:
        """Arguments of the op whose products have unit variance."""

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=self.dtype)

        return [
            {
                "x": random(self.num_tokens, self.in_features),
                "w": random(self.out_features, self.in_features) / self.in_features**0.5,
            }
            for _ in range(num_sets)
        ]

    def __str__(self) -> str:
        size = f"{self.out_features:,} × {self.in_features:,}"
        return f"{size}, {str(self.dtype).removeprefix('torch.')}, {self.num_tokens} tokens"


def torch_linear(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


BASELINES: dict[str, Callable[[Args], Callable[..., Tensor]]] = {"torch": lambda _: torch_linear}

# SmolLM2's head, gate and up projection, and down projection; a query projection of 32 heads.
_SIZES = [(49152, 576), (3072, 576), (576, 1536), (6144, 4096)]
_DTYPES = (torch.bfloat16, torch.float32)

CASES = [
    Case(num_tokens=num_tokens, out_features=out_features, in_features=in_features, dtype=dtype)
    for out_features, in_features in _SIZES
    for dtype in _DTYPES
    for num_tokens in (1, 4, 8)
]
QUICK = [Case(num_tokens=1, out_features=49152, in_features=576, dtype=dtype) for dtype in _DTYPES]
