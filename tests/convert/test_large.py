"""A checkpoint bigger than memory: LLaMA-2-7B's shape, its layers one at a time."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from transmla_ext.checkpoint import expected_shapes
from transmla_ext.convert import dry_run

LAYERS = 1  # that are converted; more of them take time and no more memory
SCRIPT = """
import re, sys, transmla_ext
model, out, layers, refine_steps = sys.argv[1:]
transmla_ext.convert(model, out, kv_lora_rank=512, qk_rope_head_dim=64, freqfold=2, layers=int(layers),
                     calibration_tokens=2048, refine_steps=int(refine_steps), refine_window=1,
                     progress=False)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.fixture
def llama2_7b(tiny_llama: Callable[..., Path], tmp_path: Path) -> Iterator[Path]:
    """Random bf16 weights in one shard a layer; those of layers that are not read are holes in the file."""
    path = tmp_path / "llama-2-7b"
    config = LlamaConfig(dtype="bfloat16")  # transformers' defaults are LLaMA-2-7B's shape
    config.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_llama()).save_pretrained(path)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in expected_shapes(config).items():
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else "rest", {})[name] = shape
    for shard, shapes in shards.items():
        if shard == "rest" or int(shard) < LAYERS:
            tensors = {name: _random(shape) for name, shape in shapes.items()}
            save_file(tensors, path / f"{shard}.safetensors", metadata={"format": "pt"})
        else:
            _write_holes(path / f"{shard}.safetensors", shapes)
    weight_map = {name: f"{shard}.safetensors" for shard, shapes in shards.items() for name in shapes}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    yield path
    for file in path.glob("*.safetensors"):
        file.unlink()


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else torch.randn(shape).bfloat16() * 0.02


def _write_holes(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


@pytest.mark.slow
def test_a_7b_model_is_converted_in_less_than_6_gb_and_refined_in_less_than_8(llama2_7b: Path, tmp_path: Path) -> None:
    assert sum(file.stat().st_size for file in llama2_7b.glob("*.safetensors")) > 13e9
    options = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "refine_window": 1}
    for refine_steps, limit in ((0, 6e9), (1, 8e9)):
        out = tmp_path / f"out-{refine_steps}"
        arguments = [str(llama2_7b), str(out), str(LAYERS), str(refine_steps)]
        run = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
        peak = int(run.stdout) * 1024
        # The whole conversion holds the same, and the calibration tokens that were spared here.
        whole = dry_run(llama2_7b, refine_steps=refine_steps, **options)
        assert whole.num_layers == 32
        assert whole.peak_memory_bytes < limit
        short = dry_run(llama2_7b, refine_steps=refine_steps, calibration_tokens=2048, layers=LAYERS, **options)
        assert peak < short.peak_memory_bytes
        assert peak + whole.peak_memory_bytes - short.peak_memory_bytes < limit
        shutil.rmtree(out)
