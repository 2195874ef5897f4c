"""The CUDA library as it is installed: it loads where there is no GPU, holds every op, and says what it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from transmla_ext import _lib, ops

OPS = sorted(path.parent.name for path in Path(harness.CSRC, "cuda").glob("*/launch.cu"))
CUDA = torch._C.DispatchKey.CUDA


def merge_attn_states() -> tuple[Tensor, ...]:
    return 2 * (torch.ones(1, 1, 2, 8), torch.ones(1, 2, 1))


def mla_project() -> tuple[Any, ...]:
    w_uk, cache = torch.ones(2, 8, 16), torch.ones(1, 4, 24)
    return (
        torch.ones(3, 5), torch.ones(32, 5), torch.ones(24, 5), w_uk, torch.ones(9, 8),
        torch.zeros(3, dtype=torch.int64), torch.arange(3), cache, *5 * (None,), 1e-6,
    )  # fmt: skip


def mla_decode() -> tuple[Any, ...]:
    table, seqlens = torch.zeros(1, 1, dtype=torch.int32), torch.full((1,), 5, dtype=torch.int32)
    return torch.ones(1, 1, 2, 24), torch.ones(1, 16, 24), table, seqlens, 16, 1.0, 0.0, 0, 0, False


def batched_pca() -> tuple[Any, ...]:
    return (torch.eye(8)[None],)


def batched_svd() -> tuple[Any, ...]:
    return (torch.ones(1, 4, 6),)


def covariance_add() -> tuple[Any, ...]:
    return torch.zeros(1, 8, 8, dtype=torch.float64), torch.ones(3, 1, 8), None


ARGS: dict[str, Callable[[], tuple[Any, ...]]] = {
    op.__name__: op for op in (batched_pca, batched_svd, covariance_add, merge_attn_states, mla_decode, mla_project)
}


def overload(op: str) -> torch._ops.OpOverload:
    """torch.ops.transmla.<op>, whose name ends in _ if it writes its first argument and returns nothing."""
    (name,) = (name for name in ops.__all__ if name.rstrip("_") == op)
    return getattr(torch.ops.transmla, name).default


def test_the_library_was_built_and_loads() -> None:
    assert _lib.has_cuda_kernels, "the package was built without nvcc: build it again (make -B build)"
    assert _lib.core.build_info()["cuda_archs"]


def test_every_launcher_is_registered() -> None:
    assert OPS
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(overload(op).name(), "CUDA"), op


@pytest.mark.parametrize("op", OPS)
def test_without_a_device_an_op_says_so(op: str) -> None:
    with pytest.raises(RuntimeError, match=rf"transmla::{op}_?: the CUDA kernel needs tensors on a CUDA device"):
        overload(op).redispatch(torch._C.DispatchKeySet(CUDA), *ARGS[op]())


def test_an_op_without_a_kernel_says_so() -> None:
    ends = torch.tensor([0, 2], dtype=torch.int32)
    args = torch.ones(2, 3, 24), torch.ones(2, 3, 32), torch.ones(2, 8), ends, ends, 1.0, True, 0.0, 0
    with pytest.raises(RuntimeError, match="transmla::mla_prefill: there is no CUDA kernel"):
        overload("mla_prefill").redispatch(torch._C.DispatchKeySet(CUDA), *args)
