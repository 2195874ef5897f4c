"""Which key components keep RoPE (RoRoPE and FreqFold of TransMLA, arXiv 2502.07864, section 4.2)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..architectures import AttentionShape

__all__ = ["RopeSplit", "freqfolds", "rope_slots", "split_rope"]


@dataclass(frozen=True)
class RopeSplit:
    """An orthogonal change of basis of all KV heads' keys, cut into the components that keep RoPE and the rest.

    A component of a RoPE pair has the same coefficients over (KV head, frequency) for the pair's real and imaginary
    part, which is what commutes with RoPE. What RoPE does not turn in the original is in the rest as it is.
    """

    rope_rows: Tensor  # [2 * len(rope_slots), num_kv_heads, head_dim], fp64; pairs interleaved
    nope_rows: Tensor  # [the rest, num_kv_heads, head_dim], fp64
    rope_slots: tuple[int, ...]  # for each kept component, the index of the frequency it turns with
    energy: float  # fraction of E|k|², of what RoPE turns, in the kept components


def freqfolds(shape: AttentionShape, qk_rope_head_dim: int) -> list[int]:
    """The numbers of adjacent frequencies that may be folded into one."""
    if qk_rope_head_dim == shape.rope_dim:  # every component keeps its own frequency
        return [1]
    collapse = shape.rotary_dim // qk_rope_head_dim
    pairs = shape.num_frequencies
    return [fold for fold in range(collapse, pairs + 1, collapse) if pairs % fold == 0]


def rope_slots(
    shape: AttentionShape, qk_rope_head_dim: int, freqfold: int, available: Collection[int] | None = None
) -> list[list[int]]:
    """The frequencies of each fold's kept components: evenly spaced ones, from the fold's first.

    Args:
        available: frequencies that the output format has; a component whose frequency it lacks is not kept.
    """
    keep = qk_rope_head_dim // 2 * freqfold // shape.num_frequencies
    step = max(1, freqfold // keep)
    # A fold that keeps more components than it has frequencies uses them again.
    folds = [
        [first + component * step % freqfold for component in range(keep)]
        for first in range(0, shape.num_frequencies, freqfold)
    ]
    return [[slot for slot in fold if available is None or slot in available] for fold in folds]


def split_rope(keys: Tensor, shape: AttentionShape, freqfold: int, slots: Sequence[Sequence[int]]) -> RopeSplit:
    """PCA over the components of every `freqfold` adjacent frequencies; the leading ones keep RoPE.

    Args:
        keys: [kv_dim, kv_dim], fp64, second moments of the keys before RoPE.
        freqfold: adjacent frequencies treated as one; one of freqfolds().
        slots: rope_slots(): for each fold, the frequencies of the components it keeps.
    """
    heads, pairs, rotary_dim = shape.num_kv_heads, shape.num_frequencies, shape.rotary_dim
    folds, fold_dim = pairs // freqfold, heads * freqfold

    rotary = keys.view(heads, shape.head_dim, heads, shape.head_dim)[:, :rotary_dim, :, :rotary_dim]
    rotary = rotary.reshape(heads, 2, pairs, heads, 2, pairs)
    moments = rotary[:, 0, :, :, 0] + rotary[:, 1, :, :, 1]  # real and imaginary parts turn alike
    moments = moments.reshape(heads, folds, freqfold, heads, folds, freqfold)
    moments = torch.stack([moments[:, f, :, :, f].reshape(fold_dim, fold_dim) for f in range(folds)])
    energies, vectors = ops.batched_pca(moments)

    components = vectors.mT.reshape(folds, fold_dim, heads, freqfold)
    # [component, real or imaginary part, head, row of the head]
    rows = keys.new_zeros(folds, fold_dim, 2, heads, shape.head_dim)
    for fold in range(folds):
        for part in range(2):
            first = part * pairs + fold * freqfold
            rows[fold, :, part, :, first : first + freqfold] = components[fold]
    kept = [fold[: len(keep)] for fold, keep in zip(rows, slots, strict=True)]
    dropped = [fold[len(keep) :] for fold, keep in zip(rows, slots, strict=True)]
    kept_energy = sum(float(energy[: len(keep)].sum()) for energy, keep in zip(energies, slots, strict=True))

    pass_through = torch.eye(shape.kv_dim, dtype=keys.dtype, device=keys.device)
    pass_through = pass_through.view(heads, shape.head_dim, heads, shape.head_dim)[:, rotary_dim:].flatten(0, 1)
    return RopeSplit(
        rope_rows=torch.cat(kept).flatten(0, 1),
        nope_rows=torch.cat([torch.cat(dropped).flatten(0, 1), pass_through]),
        rope_slots=tuple(slot for fold in slots for slot in fold),
        energy=kept_energy / float(energies.sum()),
    )
