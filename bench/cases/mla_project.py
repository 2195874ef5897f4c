"""The projections of one layer for a few new tokens, or many: bytes and FLOPs, inputs, and the chain in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transmla_ext import ops

__all__ = ["BASELINES", "CASES", "OP", "QUICK", "Args", "Case", "torch_chain"]

Args = dict[str, Any]
_BLOCK_SIZE = 64
_EPS = 1e-6


OP = ops.mla_project


@dataclass(frozen=True, kw_only=True)
class Case:
    """ops.mla_project with a norm of the latent, each token at another position."""

    num_tokens: int
    hidden_size: int = 4096
    num_heads: int = 32
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    kv_lora_rank: int = 512
    dtype: torch.dtype = torch.bfloat16

    @property
    def cache_dim(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_weights(self) -> int:
        """Of w_q, w_kv_a, w_uk and kv_norm."""
        absorbed = self.num_heads * self.qk_nope_head_dim * self.kv_lora_rank
        q_dim = self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        return self.hidden_size * (q_dim + self.cache_dim) + absorbed + self.kv_lora_rank

    @property
    def num_bytes(self) -> int:
        """Weights, hidden, q and the rows of the cache, cosines, sines and both indices, each moved once."""
        numbers = self.num_weights + self.num_tokens * (self.hidden_size + (self.num_heads + 1) * self.cache_dim)
        return numbers * self.dtype.itemsize + self.num_tokens * (4 * self.qk_rope_head_dim + 2 * 8)

    @property
    def flops(self) -> int:
        """A multiply and an add for each weight of a matrix and token."""
        return 2 * self.num_tokens * (self.num_weights - self.kv_lora_rank)

    def inputs(self, device: torch.device, num_sets: int) -> list[Args]:
        """Arguments of the op whose products have unit variance; all sets share the cosines and the indices."""
        rope_dim, num_tokens = self.qk_rope_head_dim, self.num_tokens
        num_blocks = -(-num_tokens // _BLOCK_SIZE)
        angles = torch.rand(num_tokens, rope_dim // 2, device=device) * 6
        shared = {
            "cos_sin": torch.cat((angles.cos(), angles.sin()), dim=-1),
            "positions": torch.arange(num_tokens, device=device),
            "slot_mapping": torch.randperm(num_blocks * _BLOCK_SIZE, device=device)[:num_tokens],
            "norm_eps": _EPS,
        }

        def random(*shape: int, variance: int = 1) -> Tensor:
            return torch.randn(shape, device=device, dtype=self.dtype) / variance**0.5

        q_dim = self.num_heads * (self.qk_nope_head_dim + rope_dim)
        return [
            {
                "hidden": random(num_tokens, self.hidden_size),
                "w_q": random(q_dim, self.hidden_size, variance=self.hidden_size),
                "w_kv_a": random(self.cache_dim, self.hidden_size, variance=self.hidden_size),
                "w_uk": random(
                    self.num_heads, self.qk_nope_head_dim, self.kv_lora_rank, variance=self.qk_nope_head_dim
                ),
                "kv_norm": random(self.kv_lora_rank),
                "latent_cache": torch.zeros(num_blocks, _BLOCK_SIZE, self.cache_dim, device=device, dtype=self.dtype),
                **shared,
            }
            for _ in range(num_sets)
        ]

    def __str__(self) -> str:
        shape = f"hidden {self.hidden_size:,}, {self.num_heads} heads, rank {self.kv_lora_rank}"
        return f"{shape}, {str(self.dtype).removeprefix('torch.')}, {self.num_tokens} tokens"


def torch_chain(
    hidden: Tensor,
    w_q: Tensor,
    w_kv_a: Tensor,
    w_uk: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    latent_cache: Tensor,
    *,
    kv_norm: Tensor,
    norm_eps: float,
) -> Tensor:
    """What ops.mla_project computes and stores, op by op in torch."""
    num_heads, qk_nope_head_dim, kv_lora_rank = w_uk.shape
    cos, sin = cos_sin[positions].to(hidden.dtype).chunk(2, dim=-1)
    q_nope, q_pe = F.linear(hidden, w_q).unflatten(-1, (num_heads, -1)).tensor_split((qk_nope_head_dim,), dim=-1)
    latent, k_pe = F.linear(hidden, w_kv_a).tensor_split((kv_lora_rank,), dim=-1)
    latent = F.rms_norm(latent, (kv_lora_rank,), kv_norm, norm_eps)
    new_rows = torch.cat((latent, _rotate_pairs(k_pe, cos, sin)), dim=-1)
    latent_cache.flatten(0, 1).index_copy_(0, slot_mapping, new_rows)
    absorbed = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
    return torch.cat((absorbed, _rotate_pairs(q_pe, cos.unsqueeze(1), sin.unsqueeze(1))), dim=-1)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


BASELINES: dict[str, Callable[[Args], Callable[..., Tensor]]] = {"torch": lambda _: torch_chain}

_SMOLLM2 = {"hidden_size": 576, "num_heads": 9, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "kv_lora_rank": 88}
_SHAPES: list[dict[str, Any]] = [{}, {"hidden_size": 2048, "num_heads": 16}, _SMOLLM2]
_DTYPES = (torch.bfloat16, torch.float32)

CASES = [
    Case(num_tokens=num_tokens, dtype=dtype, **shape)
    for shape in _SHAPES
    for dtype in _DTYPES
    for num_tokens in (1, 4, 8, 512)
]
QUICK = [Case(num_tokens=num_tokens, dtype=dtype) for dtype in _DTYPES for num_tokens in (1, 8)]
