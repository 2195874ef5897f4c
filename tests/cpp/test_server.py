"""examples/cpp: what the C++ server generates is what the reference ops in Python make of the same weights."""

import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from transmla_ext import _lib, reference

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
LAYERS, VOCAB, HIDDEN, HEADS, RANK, ROPE, NOPE, VALUE = 2, 64, 64, 4, 32, 16, 16, 16
REQUESTS = [([3, 1, 4, 1, 5], 12), ([9], 14), ([2, 6, 5], 6), ([35, 8], 17), ([9, 7, 9, 3], 9)]


def random_tensor(seed, *shape, fan_in):
    x = np.arange(math.prod(shape), dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(seed)
    x = (x ^ (x >> 15)) * np.uint32(0x85EBCA77)
    x ^= x >> 13
    numbers = ((x >> 8).astype(np.float32) * np.float32(2**-24) - np.float32(0.5)) * np.float32(math.sqrt(12 / fan_in))
    return torch.from_numpy(numbers).double().view(shape)


def generate(prompt, num_tokens):
    """Tokens, and the last one's logit, in fp64 and in one page."""
    embedding = random_tensor(1000, VOCAB, HIDDEN, fan_in=1)
    head = random_tensor(2000, VOCAB, HIDDEN, fan_in=HIDDEN)
    ones = torch.ones(HIDDEN, dtype=torch.float64)
    angles = torch.outer(torch.arange(40.0).double(), 1e4 ** (-2 * torch.arange(ROPE // 2).double() / ROPE))
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    caches = [torch.full((1, 40, RANK + ROPE), torch.nan, dtype=torch.float64) for _ in range(LAYERS)]
    tokens = list(prompt)
    for position in range(num_tokens - 1):
        hidden, slot = embedding[None, tokens[position]], torch.tensor([position])
        for layer, cache in enumerate(caches):
            seed = 10 * layer
            w_uv = random_tensor(seed + 3, HEADS, VALUE, RANK, fan_in=RANK)
            w_o = random_tensor(seed + 4, HIDDEN, HEADS * VALUE, fan_in=HEADS * VALUE)
            q = reference.mla_project(
                reference.rms_norm(hidden, ones, 1e-6),
                random_tensor(seed, HEADS * (NOPE + ROPE), HIDDEN, fan_in=HIDDEN),
                random_tensor(seed + 1, RANK + ROPE, HIDDEN, fan_in=HIDDEN),
                random_tensor(seed + 2, HEADS, NOPE, RANK, fan_in=NOPE),
                cos_sin,
                slot,
                slot,
                cache,
            )
            table, seqlens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([position + 1], dtype=torch.int32)
            out, _ = reference.mla_decode(q[:, None], cache, table, seqlens, RANK, (NOPE + ROPE) ** -0.5)
            hidden = hidden + reference.linear(out[:, 0], w_uv).flatten(1) @ w_o.T
        logits = (reference.rms_norm(hidden, ones, 1e-6) @ head.T)[0]
        if position + 1 == len(tokens):
            tokens.append(int(logits.argmax()))
    return tokens, float(logits.max())


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("ninja"), reason="needs cmake and ninja")
def test_the_server_generates_what_the_reference_does(tmp_path: Path) -> None:
    options = ["-G", "Ninja", f"-Dtransmla_DIR={_lib.get_cmake_dir()}", "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"]
    subprocess.run(["cmake", "-S", EXAMPLE, "-B", tmp_path, *options], check=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True)
    done = subprocess.run([tmp_path / "server"], capture_output=True, text=True, check=True)
    *lines, free = done.stdout.splitlines()
    assert free == "10 blocks free"
    finished = {}
    for line in lines:
        request_id, *tokens, logit = line.replace(":", "").replace("(", "").replace(")", "").split()
        finished[int(request_id)] = list(map(int, tokens)), float(logit)
    assert list(finished) != sorted(finished)  # the short one overtakes: they ran together
    for request_id, (prompt, num_tokens) in enumerate(REQUESTS):
        tokens, logit = generate(prompt, num_tokens)
        assert finished[request_id] == (tokens, pytest.approx(logit, abs=1e-3))
