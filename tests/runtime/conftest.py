"""Random checkpoints of both formats, and memory that is NaN until somebody writes it."""

import pytest
import torch
from tiny import CONFIGS, tokenizer
from transformers import AutoModelForCausalLM

from transmla_ext import load


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Directories of random checkpoints, by name."""
    paths = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():
            if weight.dim() == 1:
                torch.nn.init.uniform_(weight, 0.5, 1.5)  # norms that do something
        paths[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(paths[name])
        tokenizer().save_pretrained(paths[name])
    return paths


@pytest.fixture
def checkpoint(checkpoints):
    return checkpoints["native"]


@pytest.fixture
def model(checkpoint):
    return load(checkpoint, block_size=4, max_tokens=256)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(one_thread):
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
