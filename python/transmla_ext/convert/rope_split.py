"""Which key components keep RoPE (RoRoPE and FreqFold of TransMLA, arXiv 2502.07864, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..architectures import AttentionShape

__all__ = ["RopeSplit", "freqfolds", "rope_slots", "split_rope"]


@dataclass(frozen=True)
class RopeSplit:
    """A rotation of the RoPE pairs of all KV heads, cut into the components that keep RoPE and the rest.

    A row holds the coefficients of one component over (KV head, frequency); they multiply the real and imaginary parts
    of a pair alike, which is what commutes with RoPE. All rows together are an orthogonal matrix.
    """

    kept: Tensor  # [qk_rope_head_dim / 2, num_kv_heads, num_frequencies], fp64
    dropped: Tensor  # [the other components, num_kv_heads, num_frequencies], fp64
    rope_slots: tuple[int, ...]  # for each kept component, the index of the frequency it turns with
    energy: float  # fraction of E|k|² in the kept components

    def dropped_rows(self) -> Tensor:
        """[2 * len(dropped), num_kv_heads, head_dim]: dropped components, real parts then imaginary, over key rows."""
        zero = torch.zeros_like(self.dropped)
        real, imaginary = torch.cat([self.dropped, zero], dim=-1), torch.cat([zero, self.dropped], dim=-1)
        return torch.cat([real, imaginary])


def freqfolds(shape: AttentionShape, qk_rope_head_dim: int) -> list[int]:
    """The numbers of adjacent frequencies that may be folded into one."""
    if qk_rope_head_dim == shape.kv_dim:  # every component keeps its own frequency
        return [1]
    collapse = shape.head_dim // qk_rope_head_dim
    pairs = shape.num_frequencies
    return [fold for fold in range(collapse, pairs + 1, collapse) if pairs % fold == 0]


def rope_slots(shape: AttentionShape, qk_rope_head_dim: int, freqfold: int) -> tuple[int, ...]:
    """The frequencies of the kept components: evenly spaced ones of each fold, from its first."""
    keep = qk_rope_head_dim // 2 * freqfold // shape.num_frequencies  # components kept per fold
    step = max(1, freqfold // keep)
    folds = range(0, shape.num_frequencies, freqfold)
    # A fold that keeps more components than it has frequencies uses them again.
    return tuple(first + c * step % freqfold for first in folds for c in range(keep))


def split_rope(kv: Tensor, shape: AttentionShape, qk_rope_head_dim: int, freqfold: int) -> RopeSplit:
    """PCA over the components of every `freqfold` adjacent frequencies; the leading ones keep RoPE.

    Args:
        kv: [2 * kv_dim, 2 * kv_dim], fp64, second moments of [k; v], keys before RoPE.
        qk_rope_head_dim: kept numbers; kv_dim keeps everything (and is exact with freqfold 1).
        freqfold: adjacent frequencies treated as one; one of freqfolds().
    """
    heads, pairs = shape.num_kv_heads, shape.num_frequencies
    folds, fold_dim = pairs // freqfold, heads * freqfold
    keep = qk_rope_head_dim // 2 // folds

    k = kv[: shape.kv_dim, : shape.kv_dim].view(heads, 2, pairs, heads, 2, pairs)
    moments = k[:, 0, :, :, 0] + k[:, 1, :, :, 1]  # real and imaginary parts turn alike
    moments = moments.reshape(heads, folds, freqfold, heads, folds, freqfold)
    moments = torch.stack([moments[:, f, :, :, f].reshape(fold_dim, fold_dim) for f in range(folds)])
    energies, vectors = ops.batched_pca(moments)

    components = vectors.mT.reshape(folds, fold_dim, heads, freqfold)
    rows = components.new_zeros(folds, fold_dim, heads, folds, freqfold)
    for fold in range(folds):
        rows[fold, :, :, fold] = components[fold]
    rows = rows.flatten(3)
    return RopeSplit(
        kept=rows[:, :keep].flatten(0, 1),
        dropped=rows[:, keep:].flatten(0, 1),
        rope_slots=rope_slots(shape, qk_rope_head_dim, freqfold),
        energy=float(energies[:, :keep].sum() / energies.sum()),
    )
