"""Every op on every device that is there: what bench/gpu.py runs on a GPU before it times anything.

The shapes are those at which the CUDA kernels change their ways; the other tests of this folder are the CPU's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, to_double
from latent import decode_args
from matrices import GENERAL, assert_is_pca, assert_is_svd, symmetric
from ops.test_covariance_add_ import added
from ops.test_covariance_add_ import make_args as covariance_args
from ops.test_merge_attn_states import make_args as merge_args
from ops.test_mla_project import make_args as project_args
from ops.test_mla_project import project
from torch import Tensor

from transmla_ext import ops, reference

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
CUDA = [pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else []
SIZE = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "block_size": 64}
Args = dict[str, Any]


@pytest.fixture(params=["cpu", *CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def moved(args: Args, device: torch.device) -> Args:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in args.items()}


def assert_decodes(args: Args, device: torch.device) -> None:
    args = moved(args, device)
    actual = ops.mla_decode(**args)
    baseline = reference.mla_decode(**args)
    expected = reference.mla_decode(**{name: to_double(value) for name, value in args.items()})
    for parts in zip(actual, baseline, expected, strict=True):
        assert_as_accurate(*parts)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("kv_lora_rank", "qk_rope_head_dim"), [(512, 64), (448, 128), (320, 256), (256, 64)])
def test_decode_of_a_ragged_batch(
    device: torch.device, dtype: torch.dtype, kv_lora_rank: int, qk_rope_head_dim: int
) -> None:
    size = {"kv_lora_rank": kv_lora_rank, "qk_rope_head_dim": qk_rope_head_dim, "block_size": 64}
    assert_decodes(decode_args(dtype, **size, num_heads=28, seqlens=(33, 0, 1, 31, 32, 700)), device)


@pytest.mark.parametrize("num_heads", [1, 3, 7, 16, 28, 32, 33, 48, 64, 128])
def test_decode_of_any_number_of_heads(device: torch.device, num_heads: int) -> None:
    assert_decodes(decode_args(torch.bfloat16, **SIZE, num_heads=num_heads, seqlens=(300, 33)), device)


@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_decode_in_any_block_size(device: torch.device, block_size: int) -> None:
    size = {**SIZE, "block_size": block_size}
    assert_decodes(decode_args(torch.bfloat16, **size, num_heads=16, seqlens=(530, 17)), device)


@pytest.mark.parametrize("seqlen_q", [2, 3])
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"sliding_window": 40}, {"num_splits": 3}], ids=str)
def test_decode_of_several_queries(device: torch.device, seqlen_q: int, options: Args) -> None:
    args = decode_args(torch.bfloat16, **SIZE, num_heads=7, seqlen_q=seqlen_q, seqlens=(300, 1, 0, 33))
    assert_decodes({**args, **options}, device)


def test_decode_of_long_and_short_sequences_at_once(device: torch.device) -> None:
    seqlens = (9000, *torch.randint(0, 100, (36,)).tolist(), 700, 0)
    assert_decodes(decode_args(torch.bfloat16, **SIZE, num_heads=32, seqlens=seqlens), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_lora_rank", "qk_rope_head_dim", "block_size"), [(88, 32, 16), (24, 8, 5), (512, 64, 20)])
def test_decode_of_any_shape(
    device: torch.device, dtype: torch.dtype, kv_lora_rank: int, qk_rope_head_dim: int, block_size: int
) -> None:
    size = {"kv_lora_rank": kv_lora_rank, "qk_rope_head_dim": qk_rope_head_dim, "block_size": block_size}
    assert_decodes(decode_args(dtype, **size, seqlen_q=2), device)


def test_decode_gives_the_same_bits_each_time(device: torch.device) -> None:
    args = moved(decode_args(torch.bfloat16, **SIZE, num_heads=32, seqlens=(3000, 33, 0, 700)), device)
    first = ops.mla_decode(**args)
    assert all(all(map(torch.equal, first, ops.mla_decode(**args))) for _ in range(10))


def test_batch_invariant_decode_of_a_sequence_alone(device: torch.device) -> None:
    args = moved(decode_args(torch.bfloat16, **SIZE, num_heads=28, seqlens=(3000, 33, 0, 1100)), device)
    out, lse = ops.mla_decode(**args, batch_invariant=True)
    for i in range(4):
        row = {name: args[name][i : i + 1] for name in ("q", "block_table", "cache_seqlens")}
        alone = ops.mla_decode(**{**args, **row}, batch_invariant=True)
        assert torch.equal(alone[0][0], out[i])
        assert torch.equal(alone[1][0], lse[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 5, 150])
@pytest.mark.parametrize(
    "options",
    [{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}, {"q_lora_rank": 40, "biases": True}],
    ids=["512+64", "factored"],
)
def test_project(device: torch.device, dtype: torch.dtype, num_tokens: int, options: Args) -> None:
    args = moved(project_args(dtype, num_tokens=num_tokens, **options), device)
    actual = project(ops.mla_project, args)
    baseline = project(reference.mla_project, args)
    expected = project(reference.mla_project, {name: to_double(value) for name, value in args.items()})
    for parts in zip(actual, baseline, expected, strict=True):
        assert_as_accurate(*parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [6, 48, 512])
def test_merge(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    args = [part.to(device) for part in merge_args(dtype, head_dim=head_dim, num_heads=33)]
    expected = reference.merge_attn_states(*map(to_double, args))
    for parts in zip(ops.merge_attn_states(*args), reference.merge_attn_states(*args), expected, strict=True):
        assert_as_accurate(*parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [33, 128, 200])
def test_covariance(device: torch.device, dtype: torch.dtype, dim: int) -> None:
    acc, x, weight = (part.to(device) for part in covariance_args(dtype, num_tokens=3000, dim=dim))
    for arguments in ((acc, x), (acc, x, weight)):
        actual = added(ops.covariance_add_, *arguments)
        expected = added(reference.covariance_add_, acc, *map(to_double, arguments[1:]))
        scale = expected.diagonal(dim1=-2, dim2=-1).sqrt()
        assert ((actual - expected).abs() / (scale[:, :, None] * scale[:, None])).max() <= 1e-6
        assert torch.equal(actual, actual.mT)


@pytest.mark.parametrize("dim", [12, 64, 129])
@pytest.mark.parametrize("kind", ["random", "half rank", "decaying"])
def test_pca_and_svd(device: torch.device, kind: str, dim: int) -> None:
    a = GENERAL[kind](dim, dim)
    cov = symmetric(a)
    assert_is_pca(cov, *(part.cpu() for part in ops.batched_pca(cov.to(device))))
    assert_is_svd(a, *(part.cpu() for part in ops.batched_svd(a.to(device))))


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_cuda_graph_replays_with_what_is_in_its_inputs() -> None:
    def filled(seqlen: int) -> Args:
        args = decode_args(torch.bfloat16, **SIZE, num_heads=32, seqlens=(700, 33))
        args["cache_seqlens"][0] = seqlen
        return moved(args, torch.device("cuda"))

    args = filled(700)
    ops.mla_decode(**args)  # loads the kernels, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.mla_decode(**args)
    for seqlen in (700, 100, 0):
        fresh = filled(seqlen)
        for name in ("q", "latent_cache", "block_table", "cache_seqlens"):
            args[name].copy_(fresh[name])
        graph.replay()
        assert all(map(torch.equal, captured, ops.mla_decode(**args)))
