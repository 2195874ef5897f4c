"""The error rule: what a kernel may be off by is what the same maths in eager torch at its dtype is off by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_double(value: Any) -> Any:
    """A floating-point tensor in fp64, a copy; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float64, copy=True)
    return value


def assert_as_accurate(actual: Tensor, baseline: Tensor, expected: Tensor, factor: float = 2.0) -> None:
    """The largest error is at most ``factor`` times the baseline's, the mean at most 1.5 times; NaN and inf agree.

    The rounding of the result, and two units in the last place of fp32, are always allowed: a baseline may be exact.
    """
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    torch.testing.assert_close(actual[~finite].double(), expected[~finite], equal_nan=True)
    assert actual[finite].isfinite().all()
    assert baseline[finite].isfinite().all()
    if not finite.any():
        return
    magnitude = expected[finite].abs()
    error = (actual[finite].double() - expected[finite]).abs()
    allowed = (baseline[finite].double() - expected[finite]).abs()
    rounding = max(torch.finfo(actual.dtype).eps / 2, 2 * torch.finfo(torch.float32).eps)
    assert error.max() <= max(factor * allowed.max(), rounding * magnitude.max())
    assert error.mean() <= max(1.5 * allowed.mean(), rounding * magnitude.mean())
