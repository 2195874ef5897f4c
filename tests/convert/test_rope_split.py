"""RoRoPE and FreqFold: an orthogonal change of basis that commutes with RoPE, energy first."""

from collections.abc import Collection
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from transmla_ext.architectures import AttentionShape
from transmla_ext.convert.rope_split import RopeSplit, freqfolds, rope_slots, split_rope

SHAPE = AttentionShape(hidden_size=64, num_heads=6, num_kv_heads=3, head_dim=16, rotary_dim=16, softmax_scale=0.25)
PARTIAL = replace(SHAPE, head_dim=20)  # RoPE turns the first 16 numbers of each head


def random_moments(shape: AttentionShape, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, shape.kv_dim, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(shape.kv_dim, shape.kv_dim, generator=generator, dtype=torch.float64)
    return x.mT @ x / len(x)


def random_queries(shape: AttentionShape, seed: int = 7) -> Tensor:
    """Second moments [num_kv_heads, head_dim, head_dim], some directions a hundred times as loud as others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.num_kv_heads, shape.head_dim, shape.head_dim, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-1, 1, shape.head_dim, dtype=torch.float64)[:, None]
    return x @ x.mT


def split(
    rope_dim: int,
    freqfold: int,
    shape: AttentionShape = SHAPE,
    available: Collection[int] | None = None,
    *,
    aware: bool = False,
) -> RopeSplit:
    slots = rope_slots(shape, rope_dim, freqfold, available)
    return split_rope(random_moments(shape), shape, freqfold, slots, random_queries(shape) if aware else None)


def pairs_of(rows: Tensor) -> Tensor:
    """Interleaved real rows over (head, head_dim) as complex ones over (head, frequency)."""
    parts = rows[..., : SHAPE.rotary_dim].unflatten(-1, (2, SHAPE.num_frequencies)).unflatten(0, (-1, 2))
    real, imaginary = parts[:, 0, :, 0], parts[:, 1, :, 0]
    assert torch.equal(parts[:, 1, :, 1], real)  # what commutes with RoPE: multiplication by a complex number
    assert torch.equal(parts[:, 0, :, 1], -imaginary)
    return torch.complex(real, imaginary)


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("shape", [SHAPE, PARTIAL])
@pytest.mark.parametrize("available", [None, (0, 2, 6)])
@pytest.mark.parametrize(("rope_dim", "freqfold"), [(16, 1), (16, 4), (8, 2), (8, 8), (48, 1)])
def test_all_components_together_keep_every_score(
    rope_dim: int, freqfold: int, shape: AttentionShape, available: Collection[int] | None, aware: bool
) -> None:
    result = split(rope_dim, freqfold, shape, available, aware=aware)
    keys, queries = (
        torch.cat(rows).flatten(1)
        for rows in ((result.rope_keys, result.nope_keys), (result.rope_queries, result.nope_queries))
    )
    torch.testing.assert_close(keys.mT @ queries, torch.eye(shape.kv_dim, dtype=keys.dtype), atol=1e-9, rtol=0)
    assert len(result.rope_keys) == 2 * len(result.rope_slots)
    assert (len(result.rope_keys) == rope_dim) == (available is None)
    assert available is None or set(result.rope_slots) <= set(available)
    if not aware:
        assert torch.equal(result.rope_keys, result.rope_queries)
        assert (pairs_of(result.rope_keys).imag == 0).all()


@pytest.mark.parametrize("aware", [False, True])
def test_components_are_combinations_of_whole_pairs_and_the_unturned_stay_out(aware: bool) -> None:
    result = split(8, 4, PARTIAL, aware=aware)
    for rows in (result.rope_keys, result.rope_queries):
        pairs_of(rows)
        assert (rows[..., PARTIAL.rotary_dim :] == 0).all()


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize(("rope_dim", "freqfold"), [(16, 1), (16, 2), (8, 2), (8, 4)])
def test_components_stay_within_their_fold_and_slots_are_evenly_spaced(
    rope_dim: int, freqfold: int, aware: bool
) -> None:
    result = split(rope_dim, freqfold, aware=aware)
    folds = pairs_of(result.rope_keys).unflatten(-1, (-1, freqfold)).abs().sum(dim=(1, 3)) > 0
    assert (folds.sum(dim=1) == 1).all()
    assert [slot // freqfold for slot in result.rope_slots] == folds.int().argmax(dim=1).tolist()
    assert list(result.rope_slots) == list(range(0, SHAPE.num_frequencies, SHAPE.head_dim // rope_dim))


def test_a_frequency_that_the_format_lacks_gets_no_component() -> None:
    assert rope_slots(SHAPE, 8, 2) == [[0], [2], [4], [6]]
    assert rope_slots(SHAPE, 8, 2, (0, 6)) == [[0], [], [], [6]]
    assert rope_slots(SHAPE, 8, 8, (0, 6)) == [[0, 6]]


@pytest.mark.parametrize("aware", [False, True])
def test_without_folding_rotated_scores_are_kept_exactly(aware: bool) -> None:
    """Rotating by the split and by RoPE commute, so all components together give the original's scores."""
    result = split(SHAPE.kv_dim, 1, aware=aware)
    pairs = SHAPE.num_frequencies
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(3, pairs, generator=generator, dtype=torch.complex128) for _ in range(2))
    turn = torch.polar(torch.ones(pairs, dtype=torch.float64), 17 * 10000.0 ** (-torch.arange(pairs) / pairs).double())
    k_components = torch.einsum("jgp,gp->j", pairs_of(result.rope_keys), k)
    for head in range(3):
        expected = (q[head] * k[head].conj() * turn).real.sum()
        q_components = pairs_of(result.rope_queries)[:, head] @ q[head]
        actual = (q_components * k_components.conj() * turn[list(result.rope_slots)]).real.sum()
        torch.testing.assert_close(actual, expected)


def hermitian_moments(frequency: int) -> Tensor:
    k = random_moments(SHAPE).view(3, 2, 8, 3, 2, 8)[:, :, frequency, :, :, frequency]
    return torch.complex(k[:, 0, :, 0] + k[:, 1, :, 1], k[:, 1, :, 0] - k[:, 0, :, 1])


@pytest.mark.parametrize("aware", [False, True])
def test_kept_energy_beats_every_other_rotation(aware: bool) -> None:
    """Of real rotations, or of complex ones in the metric of the queries."""
    result = split(16, 1, aware=aware)
    weights = torch.ones(3, 8, dtype=torch.float64)
    if aware:
        weights = random_queries(SHAPE).diagonal(dim1=1, dim2=2).view(3, 2, 8).sum(1).sqrt()
    generator = torch.Generator().manual_seed(2)
    for frequency in range(8):
        weight = weights[:, frequency].to(torch.complex128)
        moments = weight[:, None] * hermitian_moments(frequency) * weight
        direction = pairs_of(result.rope_keys)[frequency, :, frequency] / weight
        torch.testing.assert_close(direction.abs().square().sum(), torch.tensor(1.0, dtype=torch.float64))
        best = (direction @ moments @ direction.conj()).real
        others = torch.randn(200, 3, generator=generator, dtype=torch.complex128 if aware else torch.float64)
        others = torch.nn.functional.normalize(others).to(torch.complex128)
        assert best >= torch.einsum("ng,gh,nh->n", others, moments, others.conj()).real.max() * (1 - 1e-12)


def test_queries_that_read_everything_alike_leave_the_keys_their_own_weight() -> None:
    """In the special case the split is the complex PCA of the keys alone: it keeps at least what the real one keeps."""
    slots = rope_slots(SHAPE, 8, 2)
    alike = torch.eye(16, dtype=torch.float64).expand(3, -1, -1)
    real, complex_ = (split_rope(random_moments(SHAPE), SHAPE, 2, slots, queries) for queries in (None, alike))
    assert complex_.energy > real.energy
    louder = split_rope(random_moments(SHAPE), SHAPE, 2, slots, 100 * alike)
    assert louder.energy == pytest.approx(complex_.energy, rel=1e-12)


def test_queries_that_are_silent_do_not_divide_by_zero() -> None:
    result = split_rope(random_moments(SHAPE), SHAPE, 2, rope_slots(SHAPE, 8, 2), torch.zeros(3, 16, 16).double())
    assert result.rope_keys.isfinite().all()
    assert result.nope_queries.isfinite().all()


@pytest.mark.parametrize("available", [None, (0, 6)])
def test_energy_is_the_kept_fraction(available: Collection[int] | None) -> None:
    result = split(8, 4, available=available)
    rows, moments = result.rope_keys.flatten(1), random_moments(SHAPE)
    assert result.energy == pytest.approx(float((rows @ moments @ rows.mT).trace() / moments.trace()), rel=1e-12)


@pytest.mark.parametrize(("rope_dim", "expected"), [(16, [1, 2, 4, 8]), (8, [2, 4, 8]), (48, [1])])
def test_freqfolds(rope_dim: int, expected: list[int]) -> None:
    assert freqfolds(SHAPE, rope_dim) == expected
