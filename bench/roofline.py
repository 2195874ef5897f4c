"""What a device can do at best, measured: bytes it moves and multiply-adds it makes in a second."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from timing import measure

__all__ = ["Roofline", "cache_bytes", "measure_flops", "measure_roofline"]

_MIN_STREAM_BYTES = 256 << 20
_GEMM_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Roofline:
    """Ceilings of a device."""

    bandwidth: (
        float  # bytes/s; on a GPU of a copy, read and written ones together, on a CPU of two streams that are read
    )
    flops: float  # FLOP/s of a square GEMM

    def seconds(self, num_bytes: int, flops: int) -> float:
        """The least that moving so many bytes while computing so much can take."""
        return max(num_bytes / self.bandwidth, flops / self.flops)


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before the memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) << 10 for size in sizes), default=64 << 20)


def measure_roofline(
    device: torch.device, dtype: torch.dtype, *, stream_bytes: int = 0, gemm_size: int = 0
) -> Roofline:
    """Streams much more than the cache holds, and multiplies square matrices; 0 takes sizes that suit the device.

    A CPU writes little in all of the ops, and its stores read what they write over: there the stream is a dot product.
    """
    stream_bytes = stream_bytes or max(_MIN_STREAM_BYTES, 4 * cache_bytes(device))
    first, second = torch.ones(2, stream_bytes // 4, device=device)
    stream = first.copy_ if device.type == "cuda" else first.dot
    streamed = measure(lambda: stream(second), [{}], device=device)
    return Roofline(2 * first.nbytes / streamed.seconds, measure_flops(device, dtype, gemm_size=gemm_size))


def measure_flops(device: torch.device, dtype: torch.dtype, *, gemm_size: int = 0, budget: float = 0.3) -> float:
    """Multiplies square matrices; 0 takes a size that suits the device."""
    gemm_size = gemm_size or _GEMM_SIZE[device.type]
    factor = torch.randn(gemm_size, gemm_size, device=device).to(dtype)
    gemm = measure(torch.mm, [{"input": factor, "mat2": factor}], device=device, budget=budget)
    return 2 * gemm_size**3 / gemm.seconds
