"""What a device can do at best, measured: bytes it copies and multiply-adds it makes in a second."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from timing import measure

__all__ = ["Roofline", "cache_bytes", "measure_roofline"]

_MIN_COPY_BYTES = 256 << 20
_GEMM_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Roofline:
    """Ceilings of a device."""

    bandwidth: float  # bytes/s of a copy, read and written ones together
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


def measure_roofline(device: torch.device, dtype: torch.dtype, *, copy_bytes: int = 0, gemm_size: int = 0) -> Roofline:
    """Copies much more than the cache holds, and multiplies square matrices; 0 takes sizes that suit the device."""
    copy_bytes = copy_bytes or max(_MIN_COPY_BYTES, 4 * cache_bytes(device))
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    copy = measure(torch.empty_like(source).copy_, [{"other": source}], device=device)
    gemm_size = gemm_size or _GEMM_SIZE[device.type]
    factor = torch.randn(gemm_size, gemm_size, device=device).to(dtype)
    gemm = measure(torch.mm, [{"input": factor, "mat2": factor}], device=device)
    return Roofline(2 * copy_bytes / copy.seconds, 2 * gemm_size**3 / gemm.seconds)
