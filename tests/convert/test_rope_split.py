"""RoRoPE and FreqFold: an orthogonal change of basis that commutes with RoPE, energy first."""

import pytest
import torch
from torch import Tensor

from transmla_ext.architectures import AttentionShape
from transmla_ext.convert.rope_split import RopeSplit, freqfolds, split_rope

SHAPE = AttentionShape(hidden_size=64, num_heads=6, num_kv_heads=3, head_dim=16, softmax_scale=0.25)


def random_moments(shape: AttentionShape, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, 2 * shape.kv_dim, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(2 * shape.kv_dim, 2 * shape.kv_dim, generator=generator, dtype=torch.float64)
    return x.mT @ x / len(x)


def matrix(split: RopeSplit) -> Tensor:
    return torch.cat([split.kept, split.dropped]).flatten(1)


@pytest.mark.parametrize(("rope_dim", "freqfold"), [(16, 1), (16, 4), (8, 2), (8, 8), (48, 1)])
def test_components_are_an_orthogonal_basis(rope_dim: int, freqfold: int) -> None:
    split = split_rope(random_moments(SHAPE), SHAPE, rope_dim, freqfold)
    rows = matrix(split)
    assert rows.shape == (SHAPE.kv_dim // 2, SHAPE.kv_dim // 2)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows), dtype=rows.dtype), atol=1e-12, rtol=0)
    assert len(split.kept) == len(split.rope_slots) == rope_dim // 2


@pytest.mark.parametrize(("rope_dim", "freqfold"), [(16, 1), (16, 2), (8, 2), (8, 4)])
def test_components_stay_within_their_fold_and_slots_are_evenly_spaced(rope_dim: int, freqfold: int) -> None:
    split = split_rope(random_moments(SHAPE), SHAPE, rope_dim, freqfold)
    folds = split.kept.unflatten(-1, (-1, freqfold)).abs().sum(dim=(1, 3)) > 0
    assert (folds.sum(dim=1) == 1).all()
    assert [slot // freqfold for slot in split.rope_slots] == folds.int().argmax(dim=1).tolist()
    assert list(split.rope_slots) == list(range(0, SHAPE.num_frequencies, SHAPE.head_dim // rope_dim))


def test_without_folding_rotated_scores_are_kept_exactly() -> None:
    """Rotating by the split and by RoPE commute, so all components together give the original's scores."""
    split = split_rope(random_moments(SHAPE), SHAPE, SHAPE.kv_dim, 1)
    pairs = SHAPE.num_frequencies
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(3, pairs, generator=generator, dtype=torch.complex128) for _ in range(2))
    turn = torch.polar(torch.ones(pairs, dtype=torch.float64), 17 * 10000.0 ** (-torch.arange(pairs) / pairs).double())
    rows, slots = split.kept.to(q.dtype), torch.tensor(split.rope_slots)
    for head in range(3):
        expected = (q[head] * k[head].conj() * turn).real.sum()
        q_components = rows[:, head] @ q[head]
        k_components = torch.einsum(
            "jgp,gp->j", rows, torch.zeros_like(k).index_copy(0, torch.tensor([head]), k[[head]])
        )
        actual = (q_components * k_components.conj() * turn[slots]).real.sum()
        torch.testing.assert_close(actual, expected)


def test_kept_energy_beats_every_other_rotation() -> None:
    moments = random_moments(SHAPE)
    split = split_rope(moments, SHAPE, 16, 1)
    k = moments[: SHAPE.kv_dim, : SHAPE.kv_dim].view(3, 2, 8, 3, 2, 8)
    generator = torch.Generator().manual_seed(2)
    for frequency in range(8):
        block = k[:, 0, frequency, :, 0, frequency] + k[:, 1, frequency, :, 1, frequency]
        direction = split.kept[frequency, :, frequency]
        best = direction @ block @ direction
        others = torch.nn.functional.normalize(torch.randn(200, 3, generator=generator, dtype=torch.float64))
        assert best >= torch.einsum("ng,gh,nh->n", others, block, others).max() * (1 - 1e-12)


def test_energy_is_the_kept_fraction() -> None:
    moments = random_moments(SHAPE)
    split = split_rope(moments, SHAPE, 8, 4)
    k = moments[: SHAPE.kv_dim, : SHAPE.kv_dim].view(3, 2, 8, 3, 2, 8)
    both_parts = (k[:, 0, :, :, 0] + k[:, 1, :, :, 1]).reshape(24, 24)
    rows = split.kept.flatten(1)
    assert split.energy == pytest.approx(float((rows @ both_parts @ rows.mT).trace() / both_parts.trace()), rel=1e-12)


@pytest.mark.parametrize(("rope_dim", "expected"), [(16, [1, 2, 4, 8]), (8, [2, 4, 8]), (48, [1])])
def test_freqfolds(rope_dim: int, expected: list[int]) -> None:
    assert freqfolds(SHAPE, rope_dim) == expected
