"""Every family: exact at full rank, whole at half the cache, in transformers and in the runtime."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, token_rows
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

import transmla_ext
from transmla_ext.architectures import ARCHITECTURES
from transmla_ext.convert import ConversionReport
from transmla_ext.convert.export import NativeExport
from transmla_ext.errors import UnsupportedModelError

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
# As published with Phi-4-mini: keys at the top of the config, RoPE over three quarters of a head.
PHI4_MINI = {
    "hidden_size": 128,
    "head_dim": 32,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0] * 4, "long_factor": [2.0, 3.0, 6.0] * 4},
    "tie_word_embeddings": True,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, fields) for name, fields in FAMILIES.items()},
    "llama2-mha": ("llama", {"num_key_value_heads": 4}),
    "llama3-tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "phi3-whole-head": ("phi3", {}),
    "gemma2-no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
}
TEXT = "def f(x):\n    return x + 1\n" * 40


def convert(model: Path, out: Path, **options: Any) -> ConversionReport:
    small = {"calibration_tokens": 1024, "sequence_length": 128, "refine_steps": 2, "progress": False}
    return transmla_ext.convert(model, out, **small | options)


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def greedy(model: Any, prompts: list[list[int]], new: int = 24) -> list[list[int]]:
    """Continuations by transformers' generate, prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None)
    return out[:, longest:].tolist()


def test_every_family_of_the_registry_is_tested_and_every_stock_export_that_it_names() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES)
    named = {name for name, architecture in ARCHITECTURES.items() if architecture.stock.startswith("yes")}
    assert {model_type for model_type, _ in STOCK.values()} | {"mixtral"} == named


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
    runtime._prefills_fused = False  # as on a GPU
    logits, sequences = runtime.prefill(prompts, chunk_size=16)
    torch.testing.assert_close(logits, torch.stack([expected[0, 49], expected[1, 8]]), atol=1e-4, rtol=0)
    runtime.free(sequences)
    runtime._prefills_fused = True
    logits, sequences = runtime.prefill(prompts, chunk_size=16)
    for i in range(20):
        ends = torch.stack([expected[0, 49 + i], expected[1, 8 + i]])
        torch.testing.assert_close(logits, ends, atol=1e-4, rtol=0)
        logits = runtime.decode(sequences, [int(tokens[0, 50 + i]), int(tokens[1, 9 + i])])

    continuations = greedy(original, prompts)
    assert greedy(native, prompts) == continuations
    assert [g.tokens for g in runtime.generate(prompts, max_new_tokens=24, eos=())] == continuations

    original.set_attn_implementation("eager")
    native.set_attn_implementation("eager")
    with torch.no_grad():
        attentions, expected = (model(tokens, output_attentions=True).attentions for model in (native, original))
    assert len(attentions) == 2
    torch.testing.assert_close(attentions, expected, atol=1e-4, rtol=0)


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
    tokens = token_rows(path, TEXT, 2, 70)
    native(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad.any() for parameter in native.parameters())
    native.save_pretrained(tmp_path / "saved")
    prompts = tokens[:, :30].tolist()
    continuations = greedy(native, prompts)
    assert greedy(load(tmp_path / "saved"), prompts) == continuations
    runtime = transmla_ext.load(tmp_path / "out", block_size=8)
    assert [g.tokens for g in runtime.generate(prompts, max_new_tokens=24, eos=())] == continuations


STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama2-mha": CASES["llama2-mha"],
    "llama3-tied": ("llama", {"head_dim": 32, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 512}),  # as long as the context: it hides nothing
    "phi3": CASES["phi3"],
    "phi3-whole-head": CASES["phi3-whole-head"],
    "granite": CASES["granite"],
}


def kl(p: Tensor, q: Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("case", STOCK)
def test_the_stock_checkpoint_gives_the_native_logits(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    model_type, fields = STOCK[case]
    path = tiny_model(model_type, **fields)
    options: dict[str, Any] = {"kv_lora_rank": 24, "qk_rope_head_dim": 8}
    stock_report = convert(path, tmp_path / "stock", format="deepseek_v3", **options)
    stock = load(tmp_path / "stock")
    assert type(stock).__name__ == "DeepseekV3ForCausalLM"
    if "llama3" in case:  # one of its four slots has a frequency of its own, so the native model must do without too
        assert stock_report.plan.mla["qk_rope_head_dim"] == 6
        monkeypatch.setattr(NativeExport, "frequencies", {0: 0, 8: 2, 12: 3})
    native_report = convert(path, tmp_path / "native", **options)
    assert native_report.layers == stock_report.layers
    tokens = token_rows(path, TEXT, 2, 300)
    with torch.no_grad():
        original, expected, actual = (model(tokens).logits for model in (load(path), load(tmp_path / "native"), stock))
    assert kl(expected, actual) <= 1e-6
    assert kl(original, actual) > 1e-3  # half the cache is gone: equality would mean nothing converted
    runtime = transmla_ext.load(tmp_path / "stock", block_size=8)
    logits, _ = runtime.prefill([tokens[0].tolist()])
    torch.testing.assert_close(logits, actual[:1, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("llama", "biases"),
        ("mistral", "a window of less than its 512 positions"),
        ("qwen2", "biases.*a window"),
        ("qwen3", "a norm of queries and keys, biases"),
        ("qwen3_moe", "a norm of queries and keys"),
        ("gemma2", "soft-capped scores, a window .*gelu.*norms after attention and MLP, soft-capped logits"),
    ],
)
def test_what_the_stock_format_has_no_place_for_is_named(
    tiny_model: Callable[..., Path], tmp_path: Path, case: str, words: str
) -> None:
    path = tiny_model(case, **FAMILIES[case])
    with pytest.raises(UnsupportedModelError, match=f"deepseek_v3 has no place for .*{words}"):
        convert(path, tmp_path / "out", kv_lora_rank=24, qk_rope_head_dim=8, format="deepseek_v3")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("experts_per_token", [2, 4])
def test_mixtral_is_a_deepseek_v2_for_engines_that_renormalise(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts_per_token: int
) -> None:
    path = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=experts_per_token, sliding_window=None)
    options: dict[str, Any] = {"kv_lora_rank": 24, "qk_rope_head_dim": 8}
    with pytest.raises(UnsupportedModelError, match="a mixtral model is exported as deepseek_v2, not as deepseek_v3"):
        convert(path, tmp_path / "stock", format="deepseek_v3", **options)
    convert(path, tmp_path / "native", **options)
    convert(path, tmp_path / "stock", format="deepseek_v2", **options)
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["norm_topk_prob"]
    if experts_per_token < 4:  # with all experts the weights sum to one anyhow, and transformers is right as it is
        route = DeepseekV2TopkRouter.forward

        def renormalised(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits, weights, experts = route(self, hidden)
            return logits, weights / weights.sum(-1, keepdim=True), experts

        monkeypatch.setattr(DeepseekV2TopkRouter, "forward", renormalised)
    stock = load(tmp_path / "stock")
    assert type(stock).__name__ == "DeepseekV2ForCausalLM"
    tokens = token_rows(path, TEXT, 2, 300)
    with torch.no_grad():
        assert kl(load(tmp_path / "native")(tokens).logits, stock(tokens).logits) <= 1e-6
    with pytest.raises(UnsupportedModelError, match="without norm_topk_prob; serve it with vLLM"):
        transmla_ext.load(tmp_path / "stock")


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"max_position_embeddings": 128, "rope_parameters": {"rope_type": "dynamic", "factor": 8.0}}),
        ("phi3", PHI4_MINI),
    ],
)
def test_rope_that_changes_with_the_length_is_exact_in_transformers_and_refused_by_the_runtime(
    tiny_model: Callable[..., Path], tmp_path: Path, model_type: str, fields: dict[str, Any]
) -> None:
    path = tiny_model(model_type, **fields)
    convert(path, tmp_path / "out", kv_lora_rank="full")
    original, native = load(path), load(tmp_path / "out")
    tokens = token_rows(path, TEXT, 2, 200)
    with torch.no_grad():
        for seqlen in (50, 200, 50):
            expected = original(tokens[:, :seqlen]).logits
            torch.testing.assert_close(native(tokens[:, :seqlen]).logits, expected, atol=1e-4, rtol=0)
    prompts = [tokens[0, :50].tolist(), tokens[1, :30].tolist()]
    assert greedy(native, prompts, 40) == greedy(original, prompts, 40)  # past the original 64 positions
    with pytest.raises(UnsupportedModelError, match="run the model with transformers"):
        transmla_ext.load(tmp_path / "out")


def test_the_scale_of_scaled_rope_stays_on_what_loses_its_rope(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Frequencies of nothing: RoPE is its scale alone, and a latent with room for all loses nothing."""
    standing = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 8.0}
    standing |= {"short_factor": [1e9] * 4, "long_factor": [1e9] * 4, "original_max_position_embeddings": 64}
    path = tiny_model("phi3", rope_parameters=standing)
    convert(path, tmp_path / "out", kv_lora_rank=56, qk_rope_head_dim=8)
    tokens = token_rows(path, TEXT, 2, 60)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "out")(tokens).logits, load(path)(tokens).logits, atol=1e-4, rtol=0)
