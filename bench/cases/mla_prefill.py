"""One chunk of a prompt: its bytes and FLOPs, its inputs, and what else computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transmla_ext import ops

__all__ = ["BASELINES", "CASES", "OP", "QUICK", "Args", "Case", "torch_sdpa", "torch_sdpa_math", "torch_softmax"]

Args = dict[str, Any]
OP = ops.mla_prefill
_MAX_SCORES_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Case:
    """ops.mla_prefill for the last ``seqlen_q`` tokens of one sequence."""

    seqlen_q: int
    seqlen_k: int
    num_heads: int
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    sliding_window: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_bytes(self) -> int:
        """q, kv, k_pe and out, lse in fp32, and the ends of the sequence, each moved once."""
        new = self.seqlen_q * self.num_heads * (self.qk_head_dim + self.v_head_dim)
        seen = self.seqlen_k * (self.num_heads * (self.qk_nope_head_dim + self.v_head_dim) + self.qk_rope_head_dim)
        return (new + seen) * self.dtype.itemsize + 4 * self.seqlen_q * self.num_heads + 2 * 2 * 4

    @property
    def flops(self) -> int:
        """A multiply and an add for each number of each key and value that a query sees."""
        window = self.sliding_window or self.seqlen_k
        seen = sum(min(end, window) for end in range(self.seqlen_k - self.seqlen_q + 1, self.seqlen_k + 1))
        return 2 * self.num_heads * seen * (self.qk_head_dim + self.v_head_dim)

    def inputs(self, device: torch.device, num_sets: int) -> list[Args]:
        """Arguments of the op, with scores of unit variance."""
        shared = {
            "cu_seqlens_q": torch.tensor([0, self.seqlen_q], dtype=torch.int32, device=device),
            "cu_seqlens_k": torch.tensor([0, self.seqlen_k], dtype=torch.int32, device=device),
            "softmax_scale": self.qk_head_dim**-0.5,
            "sliding_window": self.sliding_window,
        }
        shapes = {
            "q": (self.seqlen_q, self.num_heads, self.qk_head_dim),
            "kv": (self.seqlen_k, self.num_heads, self.qk_nope_head_dim + self.v_head_dim),
            "k_pe": (self.seqlen_k, self.qk_rope_head_dim),
        }
        return [
            {
                **{name: torch.randn(shape, device=device).to(self.dtype) for name, shape in shapes.items()},
                **shared,
            }
            for _ in range(num_sets)
        ]

    def __str__(self) -> str:
        dims = f"{self.qk_nope_head_dim}+{self.qk_rope_head_dim}/{self.v_head_dim}"
        window = f", window {self.sliding_window:,}" if self.sliding_window else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.seqlen_q:,} of {self.seqlen_k:,} tokens, {self.num_heads} heads of {dims}{window}, {dtype}"


def torch_sdpa(args: Args) -> Callable[..., Tensor]:
    """scaled_dot_product_attention with values padded to the size of keys, which its fused kernel wants."""
    mask = _mask(args)

    def call(q: Tensor, kv: Tensor, k_pe: Tensor, softmax_scale: float, **_: object) -> Tensor:
        key, value = _expand(q, kv, k_pe)
        padded = F.pad(value, (0, q.size(-1) - value.size(-1)))
        return _sdpa(q, key, padded, mask, softmax_scale)[..., : value.size(-1)]

    return call


def torch_sdpa_math(args: Args) -> Callable[..., Tensor]:
    """The same with values as they are: the kernel that makes all scores."""
    q, mask = args["q"], _mask(args)
    num_bytes = q.size(1) * q.size(0) * args["kv"].size(0) * q.element_size()
    if num_bytes > _MAX_SCORES_BYTES:
        raise ValueError(f"its scores have {num_bytes / 1e9:.1f} GB")

    def call(q: Tensor, kv: Tensor, k_pe: Tensor, softmax_scale: float, **_: object) -> Tensor:
        return _sdpa(q, *_expand(q, kv, k_pe), mask, softmax_scale)

    return call


def torch_softmax(args: Args) -> Callable[..., Tensor]:
    """Scores, softmax and values of one head after another."""
    unseen = ~_seen(args)

    def call(q: Tensor, kv: Tensor, k_pe: Tensor, softmax_scale: float, **_: object) -> Tensor:
        key, value = _expand(q, kv, k_pe)
        out = q.new_empty(*q.shape[:2], value.size(-1))
        for head in range(q.size(1)):
            scores = (q[:, head] * softmax_scale) @ key[:, head].mT
            out[:, head] = scores.masked_fill_(unseen, -torch.inf).softmax(-1) @ value[:, head]
        return out

    return call


def _seen(args: Args) -> Tensor:
    num_new, seqlen, window = len(args["q"]), len(args["kv"]), args["sliding_window"]
    seen = torch.ones(num_new, seqlen, dtype=torch.bool, device=args["q"].device).tril(seqlen - num_new)
    return seen.triu(seqlen - num_new - window + 1) if window else seen


def _mask(args: Args) -> Tensor | None:
    """None where SDPA's own causal mask does."""
    return None if len(args["q"]) == len(args["kv"]) and not args["sliding_window"] else _seen(args)


def _expand(q: Tensor, kv: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
    k_nope, value = kv.tensor_split((q.size(-1) - k_pe.size(-1),), dim=-1)
    return torch.cat((k_nope, k_pe.unsqueeze(1).expand(-1, q.size(1), -1)), dim=-1), value


def _sdpa(q: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softmax_scale: float) -> Tensor:
    q, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, key, value))
    out = F.scaled_dot_product_attention(q, key, value, attn_mask=mask, is_causal=mask is None, scale=softmax_scale)
    return out[0].transpose(0, 1)


# Each prepares for the first of the sets, and gives a function that takes any of them.
BASELINES: dict[str, Callable[[Args], Callable[..., Tensor]]] = {
    "torch SDPA": torch_sdpa,
    "torch SDPA math": torch_sdpa_math,
    "torch softmax": torch_softmax,
}

_SMALL = {"num_heads": 9, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
_LARGE = {"num_heads": 32, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    *(Case(seqlen_q=n, seqlen_k=n, **_SMALL, dtype=d) for d in _DTYPES for n in (512, 1024, 4096, 8192)),
    *(Case(seqlen_q=n, seqlen_k=n, **_LARGE, dtype=d) for d in _DTYPES for n in (512, 1024, 4096)),
    *(Case(seqlen_q=1024, seqlen_k=8192, **_SMALL, dtype=d) for d in _DTYPES),
    *(Case(seqlen_q=4096, seqlen_k=4096, **_SMALL, sliding_window=1024, dtype=d) for d in _DTYPES),
]
QUICK = [
    *(Case(seqlen_q=1024, seqlen_k=1024, **_SMALL, dtype=d) for d in _DTYPES),
    Case(seqlen_q=512, seqlen_k=2048, **_SMALL),
]
