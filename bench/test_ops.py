"""The quick cases for pytest-benchmark: `pytest bench --benchmark-only`, with its comparisons and histories."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from roofline import cache_bytes
from run import OPS, load_op

CPU = torch.device("cpu")
NAMED = [
    (name, case, other) for name in OPS for case in load_op(name).QUICK for other in (None, *load_op(name).BASELINES)
]


@pytest.mark.parametrize(("op", "case", "baseline"), [pytest.param(*n, id=" ".join(map(str, n))) for n in NAMED])
def test_op(benchmark: BenchmarkFixture, op: str, case: Any, baseline: str | None) -> None:
    inputs = case.inputs(CPU, 1 + -(-2 * cache_bytes(CPU) // case.num_bytes))
    call = load_op(op).OP if baseline is None else load_op(op).BASELINES[baseline](inputs[0])
    turns = itertools.cycle(inputs)
    benchmark.group = f"{op}: {case}"
    benchmark.extra_info.update(num_bytes=case.num_bytes, flops=case.flops, threads=torch.get_num_threads())
    benchmark(lambda: call(**next(turns)))
