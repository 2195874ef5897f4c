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


def joint_latent(
    kv: Tensor, nope_keys: Tensor, kv_lora_rank: int, metrics: tuple[Tensor, Tensor] | None = None
) -> LatentBasis:
    """Joint PCA of the keys without RoPE and the values, balanced: both enter with the same mean square (BKV).

    With metrics the squares are those of what the errors do: q·(k - k̂) for the queries that read the keys, and
    W_O (v - v̂) for the values (as in KQ-SVD, arXiv 2512.05916). Without, all directions count alike (TransMLA).

    Args:
        kv: [2 * kv_dim, 2 * kv_dim], fp64, second moments of [k; v].
        nope_keys: [nope_dim, kv_dim], fp64: k_nope = nope_keys · k.
        metrics: [nope_dim, nope_dim] and [kv_dim, kv_dim], fp64, positive semi-definite.
    """
    nope_dim, kv_dim = nope_keys.shape
    moments = kv.new_empty(nope_dim + kv_dim, nope_dim + kv_dim)
    rows = nope_keys @ kv[:kv_dim]
    moments[:nope_dim, :nope_dim] = rows[:, :kv_dim] @ nope_keys.mT
    moments[:nope_dim, nope_dim:] = rows[:, kv_dim:]
    moments[nope_dim:, nope_dim:] = kv[kv_dim:, kv_dim:]
    del rows
    roots = None if metrics is None else [_SquareRoot(metric) for metric in metrics]
    if roots is not None:
        parts = (slice(0, nope_dim), slice(nope_dim, None))
        for i, j in ((0, 0), (0, 1), (1, 1)):
            half = roots[i].apply(moments[parts[i], parts[j]])
            moments[parts[i], parts[j]] = roots[j].apply(half.mT).mT
    moments[nope_dim:, :nope_dim] = moments[:nope_dim, nope_dim:].mT
    energy = moments.diagonal()
    # Without key components, or without energy in one of the two, there is nothing to balance.
    ratio = (energy[:nope_dim].sum() / energy[nope_dim:].sum()).sqrt().item() if nope_dim else 1.0
    alpha = ratio if 0.0 < ratio < float("inf") else 1.0

    moments[:nope_dim] /= alpha
    moments[:, :nope_dim] /= alpha
    basis, kept = leading_basis(moments, kv_lora_rank)
    down_k, down_v = basis[:nope_dim] / alpha, basis[nope_dim:]
    up_k, up_v = basis[:nope_dim] * alpha, basis[nope_dim:]
    if roots is not None:
        down_k, down_v = roots[0].apply(down_k), roots[1].apply(down_v)
        up_k, up_v = roots[0].apply_inverse(up_k), roots[1].apply_inverse(up_v)
    return LatentBasis(down=torch.cat([down_k.mT @ nope_keys, down_v.mT], dim=1), up_k=up_k, up_v=up_v, energy=kept)


class _SquareRoot:
    """The symmetric square root of a positive semi-definite matrix, directions of no weight lifted.

    Scaled to a mean eigenvalue of 1: what is in the metric is then about as large as before.
    """

    def __init__(self, metric: Tensor) -> None:
        self._roots, self._vectors = metric.new_empty(0), metric
        if len(metric):
            eigenvalues, vectors = ops.batched_pca(metric[None])
            scale = eigenvalues.mean()
            self._vectors = vectors[0]
            self._roots = (eigenvalues[0].clamp_min(0) / (scale if scale > 0 else 1)).add(1e-6).sqrt()

    def apply(self, x: Tensor) -> Tensor:
        return self._vectors @ (self._roots[:, None] * (self._vectors.mT @ x))

    def apply_inverse(self, x: Tensor) -> Tensor:
        return self._vectors @ ((self._vectors.mT @ x) / self._roots[:, None])
