"""CUDA kernels without a GPU; ``make test-cuda`` runs this folder and tests/ptxvm, and nothing here is ever skipped."""

from __future__ import annotations

from pathlib import Path

import harness
import ptxvm
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--csrc", type=Path, default=harness.CSRC, help="kernels to test; mutations.py gives broken ones")


def pytest_configure(config: pytest.Config) -> None:
    harness.CSRC = config.getoption("--csrc").resolve()
    try:
        ptxvm.nvcc()
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture(params=harness.ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    """Runs the test on the PTX of each architecture that has kernels of its own."""
    return request.param
