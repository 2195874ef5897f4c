"""Rotary position embedding in DeepSeek's layout."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotate_pairs"]


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with interleaved pair (2j, 2j + 1) turned by angle j.

    Args:
        x: [..., qk_rope_head_dim].
        cos, sin: [..., qk_rope_head_dim / 2], broadcast against x's pairs.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
