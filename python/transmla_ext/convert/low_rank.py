"""Low-rank bases of what is cached without position (TransMLA, arXiv 2502.07864, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops

__all__ = ["LatentBasis", "joint_latent", "leading_basis"]


@dataclass(frozen=True)
class LatentBasis:
    """latent = down · [k; v]; k_nope ≈ up_k · latent; v ≈ up_v · latent. All fp64."""

    down: Tensor  # [kv_lora_rank, 2 * kv_dim]
    up_k: Tensor  # [nope_dim, kv_lora_rank]
    up_v: Tensor  # [kv_dim, kv_lora_rank]
    energy: float  # fraction of the balanced second moment that the latent holds


def leading_basis(moments: Tensor, rank: int) -> tuple[Tensor, float]:
    """The `rank` leading principal directions [n, rank] of a second-moment matrix [n, n] and the energy in them.

    Directions past n are zero. Damping the diagonal, as TransMLA does, moves eigenvalues and no eigenvector.
    """
    energies, vectors = ops.batched_pca(moments[None])
    basis = moments.new_zeros(len(moments), rank)
    basis[:, : len(moments)] = vectors[0][:, :rank]
    return basis, float(energies[0, :rank].sum() / energies[0].sum())


def joint_latent(kv: Tensor, nope_rows: Tensor, kv_lora_rank: int) -> LatentBasis:
    """Joint PCA of the keys without RoPE and the values, balanced (BKV): both enter with the same mean square.

    Args:
        kv: [2 * kv_dim, 2 * kv_dim], fp64, second moments of [k; v].
        nope_rows: [nope_dim, kv_dim], fp64, orthonormal rows: k_nope = nope_rows · k.
    """
    nope_dim, kv_dim = nope_rows.shape
    stacked = torch.block_diag(nope_rows, torch.eye(kv_dim, dtype=kv.dtype, device=kv.device))
    moments = stacked @ kv @ stacked.mT
    energy = moments.diagonal()
    # Without key components, or without energy in one of the two, there is nothing to balance.
    ratio = (energy[:nope_dim].sum() / energy[nope_dim:].sum()).sqrt().item() if nope_dim else 1.0
    alpha = ratio if 0.0 < ratio < float("inf") else 1.0

    scale = torch.ones(nope_dim + kv_dim, dtype=kv.dtype, device=kv.device)
    scale[:nope_dim] = 1.0 / alpha
    basis, kept = leading_basis(scale[:, None] * moments * scale, kv_lora_rank)
    up = basis / scale[:, None]
    return LatentBasis(down=basis.mT @ (scale[:, None] * stacked), up_k=up[:nope_dim], up_v=up[nope_dim:], energy=kept)
