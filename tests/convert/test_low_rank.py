"""The joint latent: optimal for its balanced objective, lossless at full rank."""

import pytest
import torch
from torch import Tensor

from transmla_ext.convert import low_rank
from transmla_ext.convert.low_rank import joint_latent, leading_basis

KV_DIM, NOPE_DIM = 12, 8


def problem(seed: int = 0, key_scale: float = 10.0) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of [k; v] [n, 2 * KV_DIM], their second moments, and orthonormal nope rows [NOPE_DIM, KV_DIM]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(2 * KV_DIM, 2 * KV_DIM, generator=generator, dtype=torch.float64)
    kv = torch.randn(400, 2 * KV_DIM, generator=generator, dtype=torch.float64) @ mix
    kv[:, :KV_DIM] *= key_scale
    rows = torch.linalg.qr(torch.randn(KV_DIM, KV_DIM, generator=generator, dtype=torch.float64)).Q[:NOPE_DIM]
    return kv, kv.mT @ kv / len(kv), rows


def random_metrics() -> tuple[Tensor, Tensor]:
    """Some directions count a thousand times as much as others, one not at all."""
    generator = torch.Generator().manual_seed(5)
    metrics = []
    for n in (NOPE_DIM, KV_DIM):
        basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        scale = torch.logspace(-2, 1, n, dtype=torch.float64)
        scale[0] = 0
        metrics.append(basis * scale @ basis.mT)
    return metrics[0], metrics[1]


@pytest.mark.parametrize("metrics", [None, random_metrics()])
def test_full_rank_loses_nothing(metrics: tuple[Tensor, Tensor] | None) -> None:
    kv, moments, rows = problem()
    latent = joint_latent(moments, rows, NOPE_DIM + KV_DIM, metrics)
    c = kv @ latent.down.mT
    torch.testing.assert_close(c @ latent.up_k.mT, kv[:, :KV_DIM] @ rows.mT)
    torch.testing.assert_close(c @ latent.up_v.mT, kv[:, KV_DIM:])
    assert latent.energy == pytest.approx(1.0)


def test_rank_beyond_the_components_is_zero_padded() -> None:
    _, moments, rows = problem()
    latent = joint_latent(moments, rows, 32)
    assert latent.down.shape == (32, 2 * KV_DIM)
    assert (latent.down[NOPE_DIM + KV_DIM :] == 0).all()


def balanced_error(
    kv: Tensor, rows: Tensor, down: Tensor, up_k: Tensor, up_v: Tensor, metrics: tuple[Tensor, Tensor]
) -> float:
    """Squared error in the metrics, keys and values brought to the same mean square: what the latent minimises."""
    c = kv @ down.mT
    total = 0.0
    for x, up, metric in zip((kv[:, :KV_DIM] @ rows.mT, kv[:, KV_DIM:]), (up_k, up_v), metrics, strict=True):
        error = x - c @ up.mT
        total += float(((error @ metric) * error).sum() / ((x @ metric) * x).sum())
    return total


PLAIN = (torch.eye(NOPE_DIM, dtype=torch.float64), torch.eye(KV_DIM, dtype=torch.float64))


@pytest.mark.parametrize("metrics", [PLAIN, random_metrics()])
def test_no_nearby_latent_has_a_smaller_balanced_error(metrics: tuple[Tensor, Tensor]) -> None:
    kv, moments, rows = problem()
    latent = joint_latent(moments, rows, 6, None if metrics is PLAIN else metrics)
    best = balanced_error(kv, rows, latent.down, latent.up_k, latent.up_v, metrics)
    generator = torch.Generator().manual_seed(3)
    for size in (1e-3, 1e-1):
        for _ in range(20):
            down = latent.down + size * latent.down.std() * torch.randn(6, 2 * KV_DIM, generator=generator).double()
            c = kv @ down.mT
            solve = torch.linalg.lstsq(c, torch.cat([kv[:, :KV_DIM] @ rows.mT, kv[:, KV_DIM:]], dim=1)).solution.mT
            other = balanced_error(kv, rows, down, solve[:NOPE_DIM], solve[NOPE_DIM:], metrics)
            # The metric that divides is lifted by 1e-6 where it is singular.
            assert other >= best * (1 - (1e-9 if metrics is PLAIN else 1e-5))


def test_plain_metrics_change_nothing() -> None:
    _, moments, rows = problem()
    plain, none = joint_latent(moments, rows, 6, PLAIN), joint_latent(moments, rows, 6)
    for x, y in ((plain.up_k @ plain.down, none.up_k @ none.down), (plain.up_v @ plain.down, none.up_v @ none.down)):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-9)


def test_balance_keeps_loud_keys_from_crowding_out_the_values() -> None:
    for scale in (1e-2, 1.0, 1e2):
        kv, moments, rows = problem(key_scale=scale)
        latent = joint_latent(moments, rows, 6)
        c = kv @ latent.down.mT
        v = kv[:, KV_DIM:]
        lost = float((v - c @ latent.up_v.mT).square().sum() / v.square().sum())
        assert lost < 0.7  # without the balance 1.00 of the values' energy is lost at scale 1e2


def test_silent_values_or_no_keys_do_not_divide_by_zero() -> None:
    _, moments, rows = problem()
    silent = moments.clone()
    silent[KV_DIM:] = silent[:, KV_DIM:] = 0
    latents = [
        joint_latent(silent, rows, 4),
        joint_latent(moments, rows[:0], 4),
        joint_latent(torch.zeros_like(moments), rows, 4),
    ]
    for latent in latents[:2]:
        assert all(x.isfinite().all() for x in (latent.down, latent.up_k, latent.up_v))
    assert latents[2].down.isfinite().all()


@pytest.mark.parametrize("subset_driver", [False, True])
def test_leading_basis_is_orthonormal_and_ordered(subset_driver: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if subset_driver:
        monkeypatch.setattr(low_rank, "_LARGE", 1)
        monkeypatch.setattr(low_rank, "_TIMES_THE_RANK", 1)
    _, moments, _ = problem()
    basis, energy = leading_basis(moments.clone(), 5)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(5, dtype=torch.float64))
    captured = (basis.mT @ moments @ basis).diagonal()
    assert (captured.diff() <= 1e-9 * captured[0]).all()
    assert energy == pytest.approx(float(captured.sum() / moments.trace()))
