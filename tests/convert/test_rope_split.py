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


def split(
    rope_dim: int, freqfold: int, shape: AttentionShape = SHAPE, available: Collection[int] | None = None
) -> RopeSplit:
    return split_rope(random_moments(shape), shape, freqfold, rope_slots(shape, rope_dim, freqfold, available))


def components(split: RopeSplit) -> tuple[Tensor, Tensor]:
    """Coefficients of the kept components' real and imaginary parts, [components, heads, frequencies] each."""
    pairs = split.rope_rows[..., : SHAPE.rotary_dim].unflatten(-1, (2, SHAPE.num_frequencies))
    assert (pairs[0::2, :, 1] == 0).all()
    assert (pairs[1::2, :, 0] == 0).all()
    return pairs[0::2, :, 0], pairs[1::2, :, 1]


@pytest.mark.parametrize("shape", [SHAPE, PARTIAL])
@pytest.mark.parametrize("available", [None, (0, 2, 6)])
@pytest.mark.parametrize(("rope_dim", "freqfold"), [(16, 1), (16, 4), (8, 2), (8, 8), (48, 1)])
def test_components_are_an_orthogonal_basis(
    rope_dim: int, freqfold: int, shape: AttentionShape, available: Collection[int] | None
) -> None:
    result = split(rope_dim, freqfold, shape, available)
    rows = torch.cat([result.rope_rows, result.nope_rows]).flatten(1)
    assert rows.shape == (shape.kv_dim, shape.kv_dim)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows), dtype=rows.dtype), atol=1e-12, rtol=0)
    assert len(result.rope_rows) == 2 * len(result.rope_slots)
    assert (len(result.rope_rows) == rope_dim) == (available is None)
    assert available is None or set(result.rope_slots) <= set(available)


def test_real_and_imaginary_parts_turn_alike_and_the_unrotated_stay_out() -> None:
    result = split(8, 4, PARTIAL)
    real, imaginary = components(result)
    assert torch.equal(real, imaginary)
    assert (result.rope_rows[..., PARTIAL.rotary_dim :] == 0).all()


@pytest.mark.parametrize(("rope_dim", "freqfold"), [(16, 1), (16, 2), (8, 2), (8, 4)])
def test_components_stay_within_their_fold_and_slots_are_evenly_spaced(rope_dim: int, freqfold: int) -> None:
    result = split(rope_dim, freqfold)
    folds = components(result)[0].unflatten(-1, (-1, freqfold)).abs().sum(dim=(1, 3)) > 0
    assert (folds.sum(dim=1) == 1).all()
    assert [slot // freqfold for slot in result.rope_slots] == folds.int().argmax(dim=1).tolist()
    assert list(result.rope_slots) == list(range(0, SHAPE.num_frequencies, SHAPE.head_dim // rope_dim))


def test_a_frequency_that_the_format_lacks_gets_no_component() -> None:
    assert rope_slots(SHAPE, 8, 2) == [[0], [2], [4], [6]]
    assert rope_slots(SHAPE, 8, 2, (0, 6)) == [[0], [], [], [6]]
    assert rope_slots(SHAPE, 8, 8, (0, 6)) == [[0, 6]]


def test_without_folding_rotated_scores_are_kept_exactly() -> None:
    """Rotating by the split and by RoPE commute, so all components together give the original's scores."""
    result = split(SHAPE.kv_dim, 1)
    pairs = SHAPE.num_frequencies
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(3, pairs, generator=generator, dtype=torch.complex128) for _ in range(2))
    turn = torch.polar(torch.ones(pairs, dtype=torch.float64), 17 * 10000.0 ** (-torch.arange(pairs) / pairs).double())
    rows, slots = components(result)[0].to(q.dtype), torch.tensor(result.rope_slots)
    for head in range(3):
        expected = (q[head] * k[head].conj() * turn).real.sum()
        q_components = rows[:, head] @ q[head]
        k_components = torch.einsum(
            "jgp,gp->j", rows, torch.zeros_like(k).index_copy(0, torch.tensor([head]), k[[head]])
        )
        actual = (q_components * k_components.conj() * turn[slots]).real.sum()
        torch.testing.assert_close(actual, expected)


def test_kept_energy_beats_every_other_rotation() -> None:
    kept = components(split(16, 1))[0]
    k = random_moments(SHAPE).view(3, 2, 8, 3, 2, 8)
    generator = torch.Generator().manual_seed(2)
    for frequency in range(8):
        block = k[:, 0, frequency, :, 0, frequency] + k[:, 1, frequency, :, 1, frequency]
        direction = kept[frequency, :, frequency]
        best = direction @ block @ direction
        others = torch.nn.functional.normalize(torch.randn(200, 3, generator=generator, dtype=torch.float64))
        assert best >= torch.einsum("ng,gh,nh->n", others, block, others).max() * (1 - 1e-12)


@pytest.mark.parametrize("available", [None, (0, 6)])
def test_energy_is_the_kept_fraction(available: Collection[int] | None) -> None:
    result = split(8, 4, available=available)
    rows, moments = result.rope_rows.flatten(1), random_moments(SHAPE)
    assert result.energy == pytest.approx(float((rows @ moments @ rows.mT).trace() / moments.trace()), rel=1e-12)


@pytest.mark.parametrize(("rope_dim", "expected"), [(16, [1, 2, 4, 8]), (8, [2, 4, 8]), (48, [1])])
def test_freqfolds(rope_dim: int, expected: list[int]) -> None:
    assert freqfolds(SHAPE, rope_dim) == expected
