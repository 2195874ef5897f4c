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
    """A change of basis of all KV heads' keys, and the one of queries that keeps every score, cut in two.

    The first part keeps RoPE. A component is a complex combination of RoPE pairs, taken as complex numbers, over (KV
    head, frequency), which is what commutes with RoPE. What RoPE does not turn in the original is in the rest as it is.
    A head's queries have coefficients in their own KV head's columns only.
    """

    rope_keys: Tensor  # [2 * len(rope_slots), num_kv_heads, head_dim], fp64; pairs interleaved
    rope_queries: Tensor  # of the same shape: rope_keysᵀ rope_queries + nope_keysᵀ nope_queries = 1
    nope_keys: Tensor  # [the rest, num_kv_heads, head_dim], fp64
    nope_queries: Tensor
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


def split_rope(
    keys: Tensor,
    shape: AttentionShape,
    freqfold: int,
    slots: Sequence[Sequence[int]],
    queries: Tensor | None = None,
) -> RopeSplit:
    """PCA over the components of every `freqfold` adjacent frequencies; the leading ones keep RoPE.

    Args:
        keys: [kv_dim, kv_dim], fp64, second moments of the keys before RoPE.
        freqfold: adjacent frequencies treated as one; one of freqfolds().
        slots: rope_slots(): for each fold, the frequencies of the components it keeps.
        queries: [num_kv_heads, head_dim, head_dim], fp64, second moments of the queries before RoPE, those of the heads
            that share a KV head added up. With them the PCA is of complex components, each weighed by the energy of the
            queries that read it; without, of real ones (TransMLA).
    """
    heads, pairs, rotary_dim = shape.num_kv_heads, shape.num_frequencies, shape.rotary_dim
    folds, fold_dim = pairs // freqfold, heads * freqfold

    # [fold, (head, frequency), (head, frequency)], in the metric of the queries
    moments = _complex_moments(keys, shape).reshape(heads, folds, freqfold, heads, folds, freqfold)
    moments = torch.stack([moments[:, f, :, :, f].reshape(fold_dim, fold_dim) for f in range(folds)])
    weight = torch.ones(folds, fold_dim, dtype=keys.dtype, device=keys.device)
    if queries is None:
        energies, real_vectors = ops.batched_pca(moments.real.contiguous())
        vectors = real_vectors.to(moments.dtype)
    else:
        energy = queries.diagonal(dim1=1, dim2=2)[:, :rotary_dim].view(heads, 2, folds, freqfold).sum(1)
        weight = energy.transpose(0, 1).reshape(folds, fold_dim).sqrt()
        weight = weight.clamp_min(1e-6 * float(weight.max()) or 1.0)  # a key that no query reads, not divided by zero
        energies, vectors = torch.linalg.eigh(weight[:, :, None] * moments * weight[:, None])
        energies, vectors = energies.flip(-1), vectors.flip(-1)

    # A component is vectorᴴ (weight * k); a query reads it with vectorᴴ (q / weight).
    components = vectors.mH

    def cut(components: Tensor) -> tuple[Tensor, Tensor]:
        rows = _real_rows(components, shape, freqfold)
        kept = [fold[: len(keep)] for fold, keep in zip(rows, slots, strict=True)]
        dropped = [fold[len(keep) :] for fold, keep in zip(rows, slots, strict=True)]
        return torch.cat(kept).flatten(0, 1), torch.cat([torch.cat(dropped).flatten(0, 1), unturned])

    unturned = keys.new_zeros(heads, shape.head_dim - rotary_dim, heads, shape.head_dim)
    unturned.diagonal(dim1=0, dim2=2)[:, rotary_dim:] = torch.eye(
        shape.head_dim - rotary_dim, dtype=keys.dtype, device=keys.device
    )[..., None]
    unturned = unturned.flatten(0, 1)
    rope_keys, nope_keys = cut(components * weight[:, None])
    rope_queries, nope_queries = (rope_keys, nope_keys) if queries is None else cut(components / weight[:, None])
    kept_energy = sum(float(energy[: len(keep)].sum()) for energy, keep in zip(energies, slots, strict=True))
    return RopeSplit(
        rope_keys,
        rope_queries,
        nope_keys,
        nope_queries,
        rope_slots=tuple(slot for fold in slots for slot in fold),
        energy=kept_energy / float(energies.sum()),
    )


def _complex_moments(keys: Tensor, shape: AttentionShape) -> Tensor:
    """E[k kᴴ] of the RoPE pairs as complex numbers, [head, frequency, head, frequency], from moments of real ones."""
    heads, dim, pairs = shape.num_kv_heads, shape.head_dim, shape.num_frequencies
    turned = keys.view(heads, dim, heads, dim)[:, : 2 * pairs, :, : 2 * pairs]
    parts = turned.reshape(heads, 2, pairs, heads, 2, pairs)
    real = parts[:, 0, :, :, 0] + parts[:, 1, :, :, 1]
    imaginary = parts[:, 1, :, :, 0] - parts[:, 0, :, :, 1]
    return torch.complex(real, imaginary)


def _real_rows(components: Tensor, shape: AttentionShape, freqfold: int) -> Tensor:
    """Complex rows [fold, component, (head, frequency)] over real numbers: [fold, component, part, head, head_dim]."""
    folds, num_components, _ = components.shape
    pairs = shape.num_frequencies
    coefficients = components.unflatten(-1, (shape.num_kv_heads, freqfold))
    of_parts = ((coefficients.real, -coefficients.imag), (coefficients.imag, coefficients.real))
    rows: Tensor = coefficients.real.new_zeros(folds, num_components, 2, shape.num_kv_heads, shape.head_dim)
    for fold in range(folds):
        for part in range(2):
            for source in range(2):
                first = source * pairs + fold * freqfold
                rows[fold, :, part, :, first : first + freqfold] = of_parts[part][source][fold]
    return rows
