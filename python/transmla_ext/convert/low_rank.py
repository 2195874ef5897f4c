"""Low-rank bases of what is cached without position (TransMLA, arXiv 2502.07864, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops

__all__ = ["LatentBasis", "joint_latent", "leading_basis"]

# From here on LAPACK's subset driver takes two thirds of the time of all eigenvectors, and a quarter of the memory.
_LARGE = 2048
_TIMES_THE_RANK = 8


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
    The matrix is overwritten where that saves memory.
    """
    n, total = len(moments), moments.trace()
    basis = moments.new_zeros(n, rank)
    if n >= max(_LARGE, _TIMES_THE_RANK * rank) and moments.device.type == "cpu":
        from scipy.linalg import eigh

        energies, vectors = eigh(
            moments.numpy().T, subset_by_index=(n - rank, n - 1), overwrite_a=True, check_finite=False
        )
        basis[:] = torch.from_numpy(vectors).flip(-1)
        return basis, float(energies.sum() / total)
    eigenvalues, eigenvectors = ops.batched_pca(moments[None])
    basis[:, :n] = eigenvectors[0][:, :rank]
    return basis, float(eigenvalues[0, :rank].sum() / total)


def joint_latent(kv: Tensor, nope_rows: Tensor, kv_lora_rank: int) -> LatentBasis:
    """Joint PCA of the keys without RoPE and the values, balanced (BKV): both enter with the same mean square.

    Args:
        kv: [2 * kv_dim, 2 * kv_dim], fp64, second moments of [k; v].
        nope_rows: [nope_dim, kv_dim], fp64, orthonormal rows: k_nope = nope_rows · k.
    """
    nope_dim, kv_dim = nope_rows.shape
    moments = kv.new_empty(nope_dim + kv_dim, nope_dim + kv_dim)
    rows = nope_rows @ kv[:kv_dim]
    moments[:nope_dim, :nope_dim] = rows[:, :kv_dim] @ nope_rows.mT
    moments[:nope_dim, nope_dim:] = rows[:, kv_dim:]
    moments[nope_dim:, :nope_dim] = rows[:, kv_dim:].mT
    moments[nope_dim:, nope_dim:] = kv[kv_dim:, kv_dim:]
    energy = moments.diagonal()
    # Without key components, or without energy in one of the two, there is nothing to balance.
    ratio = (energy[:nope_dim].sum() / energy[nope_dim:].sum()).sqrt().item() if nope_dim else 1.0
    alpha = ratio if 0.0 < ratio < float("inf") else 1.0

    moments[:nope_dim] /= alpha
    moments[:, :nope_dim] /= alpha
    basis, kept = leading_basis(moments, kv_lora_rank)
    up_k, up_v = basis[:nope_dim], basis[nope_dim:]
    down = torch.cat([up_k.mT / alpha @ nope_rows, up_v.mT], dim=1)
    return LatentBasis(down=down, up_k=up_k * alpha, up_v=up_v, energy=kept)
