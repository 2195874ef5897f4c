"""Times an op beside other implementations on the same inputs: one dictionary and one line a case."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Protocol

import torch
from roofline import Roofline, cache_bytes
from timing import Timing, measure
from torch import Tensor

__all__ = ["OURS", "Args", "Op", "headings", "line", "time_case"]

OURS = "ours"
_RESERVED_BYTES = 1 << 30  # for workspaces and for what the allocator cannot use
_MAX_DIFFERENCE = 0.02  # from ours, of another implementation's result, relative: two bf16 roundings are 0.005

Args = dict[str, Any]


class Op(Protocol):
    """A module of cases/: an op, its cases and what else computes it."""

    __name__: str
    CASES: list[Any]  # dataclasses with num_bytes, flops, inputs(device, num_sets) and a name for str()
    QUICK: list[Any]  # a few of those
    BASELINES: Mapping[
        str, Callable[[Args], Callable[..., Any]]
    ]  # each plans for a set of inputs, and gives a function

    def OP(self, **inputs: Any) -> Any: ...  # noqa: N802


def time_case(
    op: Op,
    case: Any,
    device: torch.device,
    roofline: Roofline,
    *,
    budget: float = 0.3,
    measure_flops: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Figures of the case by implementation; where one has none, why.

    Given measure_flops, the roofline's FLOP/s are the mean of what it says right before our op's turn and right after:
    a virtual machine's clock and neighbours change within seconds.
    """
    num_sets = 1 + -(-2 * cache_bytes(device) // case.num_bytes)
    result: dict[str, Any] = {
        "op": op.__name__.rpartition(".")[2],
        "case": str(case),
        **{name: str(value) if isinstance(value, torch.dtype) else value for name, value in asdict(case).items()},
        "num_bytes": case.num_bytes,
        "flops": case.flops,
        "num_sets": num_sets,
    }
    free = _free_bytes(device)
    if num_sets * case.num_bytes > free:
        return {**result, "skipped": f"needs {num_sets * case.num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} are free"}
    inputs = case.inputs(device, num_sets)
    expected = _tensor(op.OP(**inputs[0]))
    before = measure_flops() if measure_flops else roofline.flops
    timing = measure(op.OP, inputs, device=device, budget=budget)
    after = measure_flops() if measure_flops else roofline.flops
    roofline = replace(roofline, flops=(before + after) / 2)
    result.update(roofline=asdict(roofline), floor_us=1e6 * roofline.seconds(case.num_bytes, case.flops))
    result[OURS] = _figures(case, timing, roofline)
    for name, prepare in op.BASELINES.items():
        free = _free_bytes(device)
        needed = getattr(case, "gathered_bytes", 0)
        if name.startswith("torch") and needed > free:
            result[name] = {"skipped": f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free"}
        else:
            result[name] = _baseline(case, prepare, inputs, expected, device, roofline, budget)
    return result


def _free_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] - _RESERVED_BYTES


def _tensor(result: Any) -> Tensor:
    """A copy of the first result, which is what is compared."""
    tensor: Tensor = (result[0] if isinstance(result, tuple) else result).to(torch.float64, copy=True)
    return tensor


def _baseline(
    case: Any,
    prepare: Callable[[Args], Callable[..., Any]],
    inputs: list[Args],
    expected: Tensor,
    device: torch.device,
    roofline: Roofline,
    budget: float,
) -> dict[str, Any]:
    try:
        call = prepare(inputs[0])
        difference = (_tensor(call(**inputs[0])) - expected).norm() / expected.norm()
        timing = measure(call, inputs, device=device, budget=budget)
    except Exception as error:  # another project's code, on shapes and GPUs that it may not take
        return {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    if not difference <= _MAX_DIFFERENCE:
        return {"skipped": f"its result differs from {OURS} by {difference:.1%}"}
    return _figures(case, timing, roofline)


def _figures(case: Any, timing: Timing, roofline: Roofline) -> dict[str, float]:
    return {
        "us": 1e6 * timing.seconds,
        "us, lower quartile": 1e6 * timing.lower,
        "us, upper quartile": 1e6 * timing.upper,
        "GB/s": case.num_bytes / timing.seconds / 1e9,
        "GFLOP/s": case.flops / timing.seconds / 1e9,
        "% of bandwidth": 100 * case.num_bytes / timing.seconds / roofline.bandwidth,
        "% of GEMM": 100 * case.flops / timing.seconds / roofline.flops,
        "% of roofline": 100 * roofline.seconds(case.num_bytes, case.flops) / timing.seconds,
    }


def headings(op: Op) -> str:
    ours = f"{'us':>12} {'GB/s':>8} {'GFLOP/s':>10} {'% bandw.':>8} {'% GEMM':>7}"
    return f"{'':<56} {ours}" + "".join(f"{name + ', us':>27}" for name in op.BASELINES)


def line(op: Op, result: dict[str, Any]) -> str:
    """One case: ours, and each other's time with its ratio to ours."""
    if "skipped" in result:
        return f"{result['case']:<56} skipped: {result['skipped']}"
    ours = result[OURS]
    text = (
        f"{result['case']:<56} {ours['us']:>12,.1f} {ours['GB/s']:>8,.1f} {ours['GFLOP/s']:>10,.1f} "
        f"{ours['% of bandwidth']:>8.1f} {ours['% of GEMM']:>7.1f}"
    )
    others = {name: result[name] for name in op.BASELINES if name in result}
    for other in others.values():
        timed = f"{other['us']:,.1f} ({other['us'] / ours['us']:.2f} ×)" if "us" in other else "skipped"
        text += f"{timed:>27}"
    skipped = {f"{name}: {other['skipped']}" for name, other in others.items() if "skipped" in other}
    return "\n".join([text, *(f"{'':>22}{reason}" for reason in sorted(skipped))])
