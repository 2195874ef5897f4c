"""How long a call takes, on any device: the median over many calls that take several sets of inputs in turn."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Timing", "measure"]

_MIN_SAMPLES, _MAX_SAMPLES = 5, 1000
_GPU_SAMPLE_SECONDS = 1e-3  # events tick every 0.5 us
_MAX_CALLS_OF_SAMPLE = 16  # the queue of launches is about a thousand long
_SLEEP_CLOCK = 2e9  # cycles/s of the fastest GPU: a slower one sleeps longer, which does no harm


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median of the samples, and their quartiles."""

    seconds: float
    lower: float
    upper: float
    num_calls: int


def measure(
    call: Callable[..., object], inputs: Sequence[Mapping[str, Any]], *, device: torch.device, budget: float = 0.3
) -> Timing:
    """Time of call(**inputs[i]).

    Args:
        inputs: sets of arguments; together larger than twice the last cache, or the cache flatters the figure.
        device: where the call computes. On a GPU its own time is measured, whatever the host needs to launch it.
        budget: seconds that the measurement may take, if five samples take no longer.
    """
    turns = itertools.cycle(inputs)

    def run(num_calls: int) -> None:
        for _ in range(num_calls):
            call(**next(turns))

    run(1)  # loads, compiles, allocates
    num_calls, sample = 1, _host_seconds
    if device.type == "cuda":
        torch.cuda.synchronize()
        queueing = _host_seconds(run, 1)
        num_calls = min(_MAX_CALLS_OF_SAMPLE, math.ceil(_GPU_SAMPLE_SECONDS / _gpu_seconds(run, 1, queueing)))

        def sample(run: Callable[[int], None], num_calls: int) -> float:
            return _gpu_seconds(run, num_calls, 2 * num_calls * queueing)

    samples: list[float] = []
    end = time.perf_counter() + budget
    while len(samples) < _MIN_SAMPLES or (len(samples) < _MAX_SAMPLES and time.perf_counter() < end):
        samples.append(sample(run, num_calls) / num_calls)
    lower, median, upper = statistics.quantiles(samples, n=4)
    return Timing(median, lower, upper, len(samples) * num_calls)


def _host_seconds(run: Callable[[int], None], num_calls: int) -> float:
    begin = time.perf_counter()
    run(num_calls)
    return time.perf_counter() - begin


def _gpu_seconds(run: Callable[[int], None], num_calls: int, queueing: float) -> float:
    """The GPU sleeps while the host queues the calls, so that it need not wait for the host between them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(queueing * _SLEEP_CLOCK))
    start.record()
    run(num_calls)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
