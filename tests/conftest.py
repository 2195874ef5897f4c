"""Fixtures of all tests; the models and texts are in models.py."""

import pytest
import torch

pytest_plugins = ["models"]


@pytest.fixture
def one_thread():
    """For models so small that a step would mostly wait for its second thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
