"""Times mla_decode beside other implementations on the same inputs: one dictionary and one line a case."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from cases.mla_decode import BASELINES, Args, Case
from roofline import Roofline, cache_bytes
from timing import Timing, measure
from torch import Tensor

__all__ = ["OURS", "headings", "key", "line", "time_case"]

OURS = "mla_decode"
_RESERVED_BYTES = 1 << 30  # for workspaces and for what the allocator cannot use
_MAX_DIFFERENCE = 0.02  # from ours, of another implementation's result, relative: two bf16 roundings are 0.005


def key(case: Case) -> str:
    return f"{case.batch_size:>5} {case.seqlen:>8,} {case.num_heads:>6}"


def time_case(case: Case, device: torch.device, roofline: Roofline, *, budget: float = 0.3) -> dict[str, Any]:
    """Figures of the case by implementation; where one has none, why."""
    from transmla_ext import ops  # here, since the package may have been built a moment ago

    num_sets = 1 + -(-2 * cache_bytes(device) // case.num_bytes)
    result: dict[str, Any] = {
        **{name: getattr(case, name) for name in ("batch_size", "seqlen", "num_heads", "num_bytes", "flops")},
        "num_sets": num_sets,
        "floor_us": 1e6 * roofline.seconds(case.num_bytes, case.flops),
    }
    free = _free_bytes(device)
    if num_sets * case.num_bytes > free:
        return {**result, "skipped": f"needs {num_sets * case.num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} are free"}
    inputs = case.inputs(device, num_sets)
    expected = ops.mla_decode(**inputs[0])[0]
    result[OURS] = _figures(case, measure(ops.mla_decode, inputs, device=device, budget=budget), roofline)
    for name, prepare in BASELINES.items():
        free = _free_bytes(device)
        if name.startswith("torch") and case.gathered_bytes > free:
            needed = f"needs {case.gathered_bytes / 1e9:.1f} GB, {free / 1e9:.1f} are free"
            result[name] = {"skipped": needed}
        else:
            result[name] = _baseline(case, prepare, inputs, expected, device, roofline, budget)
    return result


def _free_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0] - _RESERVED_BYTES


def _baseline(
    case: Case,
    prepare: Callable[[Args], Callable[..., Tensor]],
    inputs: list[Args],
    expected: Tensor,
    device: torch.device,
    roofline: Roofline,
    budget: float,
) -> dict[str, Any]:
    try:
        call = prepare(inputs[0])
        difference = (call(**inputs[0]).float() - expected.float()).norm() / expected.float().norm()
        timing = measure(call, inputs, device=device, budget=budget)
    except Exception as error:  # another project's code, on shapes and GPUs that it may not take
        return {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    if not difference <= _MAX_DIFFERENCE:
        return {"skipped": f"its result differs from {OURS}'s by {difference:.1%}"}
    return _figures(case, timing, roofline)


def _figures(case: Case, timing: Timing, roofline: Roofline) -> dict[str, float]:
    bandwidth = case.num_bytes / timing.seconds
    return {
        "us": 1e6 * timing.seconds,
        "us, lower quartile": 1e6 * timing.lower,
        "us, upper quartile": 1e6 * timing.upper,
        "GB/s": bandwidth / 1e9,
        "TFLOP/s": case.flops / timing.seconds / 1e12,
        "% of copy": 100 * bandwidth / roofline.bandwidth,
        "% of roofline": 100 * roofline.seconds(case.num_bytes, case.flops) / timing.seconds,
    }


def headings() -> str:
    ours = f"{'us':>10} {'GB/s':>7} {'TFLOP/s':>8} {'% copy':>7} {'% roof':>7}"
    return f"{'batch':>5} {'context':>8} {'heads':>6} {ours}" + "".join(f"{name + ', us':>24}" for name in BASELINES)


def line(case: Case, result: dict[str, Any]) -> str:
    """One case: ours, and each other's time with its ratio to ours."""
    if "skipped" in result:
        return f"{key(case)} skipped: {result['skipped']}"
    ours = result[OURS]
    text = (
        f"{key(case)} {ours['us']:>10,.1f} {ours['GB/s']:>7,.0f} {ours['TFLOP/s']:>8,.1f} "
        f"{ours['% of copy']:>7.1f} {ours['% of roofline']:>7.1f}"
    )
    for name in BASELINES:
        other = result[name]
        timed = f"{other['us']:,.1f} ({other['us'] / ours['us']:.2f} ×)" if "us" in other else "skipped"
        text += f"{timed:>24}"
    skipped = {f"{name}: {result[name]['skipped']}" for name in BASELINES if "skipped" in result[name]}
    return "\n".join([text, *(f"{'':>22}{reason}" for reason in sorted(skipped))])
