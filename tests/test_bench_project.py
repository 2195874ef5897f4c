"""bench/ of projections and of whole steps: what it counts, and that what it times is the same computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import decode
import pytest
import torch
from cases import linear, mla_project
from runtime.tiny import CONFIGS, SIZES
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from transmla_ext import load

CPU = torch.device("cpu")
SMALL = {"hidden_size": 40, "num_heads": 3, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "kv_lora_rank": 24}
CASES: list[tuple[Any, Any]] = [
    (mla_project, mla_project.Case(num_tokens=64, dtype=torch.float32, **SMALL)),  # fills its block of the cache
    (linear, linear.Case(num_tokens=3, out_features=9, in_features=40, dtype=torch.float32)),
]


@pytest.mark.parametrize(("op", "case"), CASES)
def test_bytes_are_those_of_the_tensors(op: Any, case: Any) -> None:
    (args,) = case.inputs(CPU, 1)
    tensors = [op.OP(**args), *(value for value in args.values() if isinstance(value, Tensor))]
    assert case.num_bytes == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_chain_in_torch_computes_and_stores_the_same(op: Any, case: Any) -> None:
    ours, theirs = case.inputs(CPU, 2)
    theirs = {name: ours[name].clone() if isinstance(ours[name], Tensor) else ours[name] for name in theirs}
    torch.testing.assert_close(op.BASELINES["torch"](theirs)(**theirs), op.OP(**ours))
    torch.testing.assert_close(theirs, ours)


def test_flops_of_a_projection_counted_by_hand() -> None:
    case = mla_project.Case(num_tokens=2)
    assert case.flops == 2 * 2 * (4096 * (32 * 192 + 576) + 32 * 128 * 512)


@pytest.fixture
def models(tmp_path: Path, one_thread: None) -> dict[str, Path]:
    """A tiny Llama, and random models of both formats."""
    configs = {"original": LlamaConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2), **CONFIGS}
    for name in ("original", "native", "stock"):
        AutoModelForCausalLM.from_config(configs[name]).save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in ("original", "native", "stock")}


@pytest.mark.parametrize("converted", ["native", "stock"])
def test_steps_of_all_three_are_timed(
    models: dict[str, Path], converted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "decode.json"
    options = ["--context", "40", "--steps", "2", "--threads", "1", "--dtype", "float32", "--json", str(figures)]
    assert decode.main([str(models["original"]), str(models[converted]), *options]) == 0
    (result,) = json.loads(figures.read_text())
    assert set(result["tokens/s"]) == {decode.ORIGINAL, decode.PLAIN, decode.OURS}
    printed = capsys.readouterr().out
    assert all(f"{speed:.1f}" in printed for speed in result["tokens/s"].values())


def test_the_parts_are_the_whole_step(models: dict[str, Path]) -> None:
    model = load(models["native"])
    _, sequences = model.prefill([[1, 2, 3]])
    parts, step = decode.breakdown(model, lambda: model.decode(sequences, [4]), num_steps=1)
    assert sum(parts.values()) == pytest.approx(step)
    assert all(seconds > 0 for seconds in parts.values())
    assert model._lm_head.forward.__name__ == "forward"
