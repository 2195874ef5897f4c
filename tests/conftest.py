"""Fixtures of all tests; the models and texts are in models.py, the error rule in accuracy.py."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # what is no file is looked for nowhere else; read when the libraries are imported

import pytest
import torch

from transmla_ext._lib import core

pytest_plugins = ["models"]
pytest.register_assert_rewrite("accuracy", "matrices")
collect_ignore = ["cuda", "ptxvm", "plugins"]  # need nvcc or vLLM: `make test-cuda` and `make test-vllm` name them


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=core.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with every instruction set that this machine has."""
    core.force_isa(request.param)
    yield request.param
    core.reset_isa()


@pytest.fixture(params=[1, 2], ids="{}threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test with one thread and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that a step would mostly wait for its second thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
