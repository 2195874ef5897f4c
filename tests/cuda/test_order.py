"""Which warp runs first is not up to the kernel: any order of them gives the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import harness
import pytest
import test_batched_pca
import test_batched_svd
import test_covariance_add
import test_fp8_cache
import test_merge_attn_states
import test_mla_decode
import test_mla_project
import torch
from torch import Tensor


def covariance_add(dtype: torch.dtype) -> Callable[[str], Iterable[Tensor]]:
    acc, x, _ = test_covariance_add.make_args(dtype, num_tokens=300, dim=136)
    return lambda arch: test_covariance_add.added(arch, acc, x)[:1]


def batched_pca() -> Callable[[str], Iterable[Tensor]]:
    x = torch.randn(2, 60, 40, dtype=torch.float64)
    return lambda arch: test_batched_pca.pca(arch, x @ x.mT, max_smem=24 << 10)


def batched_svd() -> Callable[[str], Iterable[Tensor]]:
    a = torch.randn(2, 30, 10, dtype=torch.float64) @ torch.ones(10, 20, dtype=torch.float64)
    return lambda arch: test_batched_svd.svd(arch, a)


def merge_attn_states() -> Callable[[str], Iterable[Tensor]]:
    parts = test_merge_attn_states.make_args(torch.bfloat16)
    return lambda arch: test_merge_attn_states.merge(arch, *parts)[:2]


def mla_decode(**cut: int) -> Callable[[str], Iterable[Tensor]]:
    args = test_mla_decode.make_args(seqlens=(250, 33, 7))
    return lambda arch: test_mla_decode.decode(arch, **args, **cut)[:2]


def mla_decode_fp8() -> Callable[[str], Iterable[Tensor]]:
    args = test_fp8_cache.quantised(test_mla_decode.make_args(seqlens=(250, 33, 7)))
    return lambda arch: test_mla_decode.decode(arch, **args)[:2]


def mla_project(num_tokens: int) -> Callable[[str], Iterable[Tensor]]:
    args = test_mla_project.make_args(num_tokens=num_tokens, qk_nope_head_dim=136)
    return lambda arch: test_mla_project.project(arch, args)[:2]


CASES = {
    "batched_pca": batched_pca,
    "batched_svd": batched_svd,
    "covariance_add": lambda: covariance_add(torch.bfloat16),
    "covariance_add, plain": lambda: covariance_add(torch.float32),
    "merge_attn_states": merge_attn_states,
    "mla_decode": mla_decode,
    "mla_decode, parts": lambda: mla_decode(split_size=64),
    "mla_decode, fp8": mla_decode_fp8,
    "mla_project": lambda: mla_project(5),
    "mla_project, many tokens": lambda: mla_project(70),
}


@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_the_order_of_warps(arch: str, case: str) -> None:
    run = CASES[case]()
    expected = [result.nan_to_num() for result in run(arch)]
    for seed in (1, 2):
        with harness.random_order(seed):
            assert all(map(torch.equal, (result.nan_to_num() for result in run(arch)), expected))
