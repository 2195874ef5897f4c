"""Every family: exact at full rank, whole at half the cache, in transformers and in the runtime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, token_rows
from transformers import AutoModelForCausalLM

import transmla_ext
from transmla_ext.architectures import ARCHITECTURES
from transmla_ext.convert import ConversionReport

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, fields) for name, fields in FAMILIES.items()},
    "llama2-mha": ("llama", {"num_key_value_heads": 4}),
    "llama3-tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "phi3-whole-head": ("phi3", {}),
    "gemma2-no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
}
TEXT = "def f(x):\n    return x + 1\n" * 40


def convert(model: Path, out: Path, **options: Any) -> ConversionReport:
    return transmla_ext.convert(model, out, calibration_tokens=1024, sequence_length=128, progress=False, **options)


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def greedy(model: Any, prompts: list[list[int]], new: int = 24) -> list[list[int]]:
    """Continuations by transformers' generate, prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None)
    return out[:, longest:].tolist()


def test_every_family_of_the_registry_is_tested() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES)


@pytest.mark.parametrize("case", CASES)
def test_full_rank_is_the_original(tiny_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    model_type, fields = CASES[case]
    path = tiny_model(model_type, **fields)
    report = convert(path, tmp_path / "out", kv_lora_rank="full")
    assert report.plan.cache_bytes_after == report.plan.cache_bytes_before
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=1e-5)
    original, native, runtime = load(path), load(tmp_path / "out"), transmla_ext.load(tmp_path / "out", block_size=8)
    tokens = token_rows(path, TEXT, 2, 70)
    with torch.no_grad():
        expected = original(tokens).logits
        torch.testing.assert_close(native(tokens).logits, expected, atol=1e-4, rtol=0)

    # Prefill in chunks, ragged, then decode, past the window where there is one.
    prompts = [tokens[0, :50].tolist(), tokens[1, :9].tolist()]
    logits, sequences = runtime.prefill(prompts, chunk_size=16)
    for i in range(20):
        ends = torch.stack([expected[0, 49 + i], expected[1, 8 + i]])
        torch.testing.assert_close(logits, ends, atol=1e-4, rtol=0)
        logits = runtime.decode(sequences, [int(tokens[0, 50 + i]), int(tokens[1, 9 + i])])

    continuations = greedy(original, prompts)
    assert greedy(native, prompts) == continuations
    assert [g.tokens for g in runtime.generate(prompts, max_new_tokens=24, eos=())] == continuations


@pytest.mark.parametrize("case", CASES)
def test_half_the_cache_converts_saves_loads_and_generates(
    tiny_model: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    model_type, fields = CASES[case]
    path = tiny_model(model_type, **fields)
    report = convert(path, tmp_path / "out", kv_lora_rank=24 if "mha" not in case else 56, qk_rope_head_dim=8)
    assert report.plan.cache_saved == pytest.approx(0.5)
    assert 0 < max(layer.attention_error for layer in report.layers) < 1.5
    native = load(tmp_path / "out")
    native.save_pretrained(tmp_path / "saved")
    prompts = [row[:30].tolist() for row in token_rows(path, TEXT, 2, 70)]
    continuations = greedy(native, prompts)
    assert greedy(load(tmp_path / "saved"), prompts) == continuations
    runtime = transmla_ext.load(tmp_path / "out", block_size=8)
    assert [g.tokens for g in runtime.generate(prompts, max_new_tokens=24, eos=())] == continuations
