"""What the attention of the native format and that of the runtime have in common, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["equal_head_dims", "rotate_pairs"]


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with interleaved pair (2j, 2j + 1) turned by angle j.

    Args:
        x: [..., qk_rope_head_dim].
        cos, sin: [..., qk_rope_head_dim / 2], broadcast against x's pairs.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def equal_head_dims(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three with zeros appended to the last dimension where another's is larger.

    Fused attention wants one head size; without it, attention on a CPU takes five times as long.
    """
    head_dim = max(query.size(-1), value.size(-1))
    query, key, value = (
        x if x.size(-1) == head_dim else F.pad(x, (0, head_dim - x.size(-1))) for x in (query, key, value)
    )
    return query, key, value
