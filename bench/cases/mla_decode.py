"""One decode step of a batch of equally long sequences: its bytes and FLOPs, its inputs, and what else computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "BASELINES",
    "CASES",
    "OP",
    "QUICK",
    "Args",
    "Case",
    "flash_mla",
    "flashinfer",
    "mla_decode",
    "torch_bmm",
    "torch_gemm",
    "torch_sdpa",
]

Args = dict[str, Any]
_WORKSPACE_BYTES = 128 << 20  # what FlashInfer asks for
_CHUNK_TOKENS = 512  # of torch_gemm: in fp32 they fill half of a core's L2 cache


@dataclass(frozen=True, kw_only=True)
class Case:
    """ops.mla_decode for one new token of each sequence."""

    batch_size: int
    seqlen: int
    num_heads: int
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    block_size: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def dim(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def blocks_per_sequence(self) -> int:
        return -(-self.seqlen // self.block_size)

    @property
    def cache_bytes(self) -> int:
        """Of the tokens; each is read once at least."""
        return self.batch_size * self.seqlen * self.dim * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """The cache, q, out, lse in fp32, block_table and cache_seqlens, each moved once."""
        row = (self.dim + self.kv_lora_rank) * self.dtype.itemsize + 4
        return self.cache_bytes + self.batch_size * (self.num_heads * row + 4 * self.blocks_per_sequence + 4)

    @property
    def flops(self) -> int:
        """A multiply and an add for each number of a key and of a value."""
        return 2 * self.batch_size * self.num_heads * self.seqlen * (self.dim + self.kv_lora_rank)

    @property
    def gathered_bytes(self) -> int:
        """What the compositions in torch need besides: the cache out of its pages, scores and probabilities."""
        return self.cache_bytes + 2 * self.batch_size * self.num_heads * self.seqlen * self.dtype.itemsize

    def inputs(self, device: torch.device, num_sets: int) -> list[Args]:
        """Arguments of the op: scores of unit variance, a scrambled block table, which all sets share."""
        num_blocks = self.batch_size * self.blocks_per_sequence
        block_table = torch.randperm(num_blocks, device=device, dtype=torch.int32).view(self.batch_size, -1)
        shared = {
            "block_table": block_table,
            "cache_seqlens": torch.full((self.batch_size,), self.seqlen, dtype=torch.int32, device=device),
            "kv_lora_rank": self.kv_lora_rank,
            "softmax_scale": self.dim**-0.5,
        }
        q_shape, cache_shape = (self.batch_size, 1, self.num_heads, self.dim), (num_blocks, self.block_size, self.dim)
        return [
            {
                "q": torch.randn(q_shape, device=device, dtype=self.dtype),
                "latent_cache": torch.randn(cache_shape, device=device, dtype=self.dtype),
                **shared,
            }
            for _ in range(num_sets)
        ]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"batch {self.batch_size}, context {self.seqlen:,}, {self.num_heads} heads, {dtype}"


def mla_decode(**args: Any) -> tuple[Tensor, Tensor]:
    from transmla_ext import ops  # here, since the package may have been built a moment ago

    return ops.mla_decode(**args)


OP = mla_decode
CASES = [
    Case(batch_size=batch_size, seqlen=seqlen, num_heads=num_heads, dtype=dtype)
    for dtype in (torch.bfloat16, torch.float32)
    for batch_size in (1, 8)
    for seqlen in (1024, 8192, 32768)
    for num_heads in (16, 32, 128)
]
QUICK = [case for case in CASES if (case.batch_size, case.seqlen) == (1, 8192) and case.num_heads < 128]


def torch_bmm(
    q: Tensor,
    latent_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
) -> Tensor:
    """out of ops.mla_decode, for one query a sequence and sequences that fill their blocks: it needs no mask."""
    keys = latent_cache[block_table].flatten(1, 2)
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q[:, 0], keys.mT, beta=0, alpha=softmax_scale)
    return torch.bmm(scores.softmax(-1), keys[..., :kv_lora_rank])[:, None]


def torch_sdpa(
    q: Tensor,
    latent_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
) -> Tensor:
    """The same by scaled_dot_product_attention: heads are queries there, so that no key is repeated for each."""
    keys = latent_cache[block_table].flatten(1, 2)[:, None]
    return F.scaled_dot_product_attention(
        q.transpose(1, 2).reshape(len(q), 1, -1, q.size(-1)), keys, keys[..., :kv_lora_rank], scale=softmax_scale
    )


def torch_gemm(
    q: Tensor,
    latent_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
) -> Tensor:
    """The same by fp32 GEMMs over chunks of tokens and an online softmax: a CPU has no fast GEMM of bf16."""
    outs = []
    for query, blocks in zip(q[:, 0].float() * softmax_scale, block_table, strict=True):
        out, total = query.new_zeros(len(query), kv_lora_rank), query.new_zeros(len(query), 1)
        top = query.new_full((len(query), 1), -torch.inf)
        for chunk in blocks.split(max(1, _CHUNK_TOKENS // latent_cache.size(1))):
            keys = latent_cache[chunk].flatten(0, 1).float()
            scores = query @ keys.T
            new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights, correction = scores.sub_(new_top).exp_(), (top - new_top).exp_()
            out = out.mul_(correction).addmm_(weights, keys[:, :kv_lora_rank])
            total = total * correction + weights.sum(-1, keepdim=True)
            top = new_top
        outs.append(out / total)
    return torch.stack(outs)[:, None].to(q.dtype)


def flash_mla(args: Args) -> Callable[..., Tensor]:
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    schedule, num_splits = get_mla_metadata(args["cache_seqlens"], args["q"].size(2), 1)

    def call(
        q: Tensor,
        latent_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        kv_lora_rank: int,
        softmax_scale: float,
    ) -> Tensor:
        cache = latent_cache[:, :, None]
        out: Tensor = flash_mla_with_kvcache(
            q, cache, block_table, cache_seqlens, kv_lora_rank, schedule, num_splits, softmax_scale
        )[0]
        return out

    return call


def flashinfer(args: Args) -> Callable[..., Tensor]:
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    q, table, rank = args["q"], args["block_table"], args["kv_lora_rank"]
    starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(_WORKSPACE_BYTES, dtype=torch.int8, device=q.device))
    wrapper.plan(
        starts, starts * table.size(1), table.flatten(), args["cache_seqlens"], q.size(2), rank, q.size(3) - rank,
        args["latent_cache"].size(1), False, args["softmax_scale"], q.dtype, q.dtype,
    )  # fmt: skip

    def call(q: Tensor, latent_cache: Tensor, **_: object) -> Tensor:
        q_latent, q_pe = q[:, 0].tensor_split((rank,), dim=-1)
        latent, k_pe = latent_cache.tensor_split((rank,), dim=-1)
        out: Tensor = wrapper.run(q_latent, q_pe, latent, k_pe)
        return out[:, None]

    return call


def _is_installed(module: str) -> bool:
    return find_spec(module) is not None


# Each plans for the first of the sets, and gives a function that takes any of them.
BASELINES: dict[str, Callable[[Args], Callable[..., Tensor]]] = {
    "torch bmm": lambda _: torch_bmm,
    "torch SDPA": lambda _: torch_sdpa,
    "torch GEMM": lambda _: torch_gemm,
    **({"FlashMLA": flash_mla} if _is_installed("flash_mla") else {}),
    **({"FlashInfer": flashinfer} if _is_installed("flashinfer") else {}),
}
